"""Retrieval: how often the right caption or image ranks among the first."""

from typing import Any

import torch
from torch import Tensor

from protoclip_lab.evaluation.arrays import BLOCK_ELEMENTS, Estimates, as_pairs, class_sums, estimate

DEPTHS = (1, 5, 10)
# Equal features can differ by a few float32 roundings, depending on where a matrix product's tiles fall.
TIE = 1e-6


def retrieval(image: Any, text: Any, image_of_caption: Any, *, draws: int = 0, seed: int = 0) -> Estimates:
    """Recall at 1, 5 and 10, both ways, by cosine, in percent.

    A caption finds its image, an image any of its captions, among the first k. A tie counts against the model:
    a wrong item with the same score (to 1e-6) ranks first. Scores are made in blocks and counted, never sorted.

    Args:
        image: (N, d), one row for each distinct image.
        text: (M, d).
        image_of_caption: (M,) row of ``image`` that each caption belongs to. An image without captions is a
            candidate, but asks for none.
        draws, seed: resamples of the images, each with its captions, for 95 % intervals; the candidates stay as they
            are. See :func:`~protoclip_lab.evaluation.arrays.estimate`.

    Returns:
        "image_to_text_R@1", "…@5", "…@10", "text_to_image_R@1", "…@5", "…@10", and "mean_recall", the mean of the six.

    Raises:
        ValueError: shapes that do not fit, naming both; an index outside ``image``; NaN or Inf.
    """
    image, text, owner = as_pairs(image, text, image_of_caption)
    own_score = (image[owner] * text).sum(dim=1)
    # Infinite where an image has no caption.
    best_own = own_score.new_full((len(image),), torch.inf).scatter_reduce(0, owner, own_score, "amax", include_self=False)
    # Wrong items that rank before the right one.
    before_image, before_text = (torch.zeros_like(scores, dtype=torch.int64) for scores in (best_own, own_score))
    for rows in torch.arange(len(image), device=image.device).split(max(1, BLOCK_ELEMENTS // len(text))):
        scores = image[rows] @ text.T
        scores[rows[:, None] == owner] = -torch.inf
        before_image[rows] = (scores >= best_own[rows, None] - TIE).sum(dim=1)
        before_text += (scores >= own_score - TIE).sum(dim=0)
    owner, depths = owner.cpu(), torch.tensor(DEPTHS)
    captions = class_sums(torch.ones(1, len(text), dtype=torch.float64), owner, len(image))[0]
    asking = (captions > 0).double()
    # By image, (N, 3) and (N,): is its caption found at each depth, and how many of its captions find it; how many ask.
    to_text = (before_image.cpu()[:, None] < depths) * asking[:, None], asking
    to_image = class_sums((before_text.cpu() < depths[:, None]).double(), owner, len(image)).T, captions
    names = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in DEPTHS]

    def under(weights: Tensor) -> dict[str, Tensor]:
        recalls = torch.cat([100 * (weights @ found) / (weights @ asked)[:, None] for found, asked in (to_text, to_image)], dim=1)
        return {**dict(zip(names, recalls.T, strict=True)), "mean_recall": recalls.mean(dim=1)}

    return estimate(under, len(image), draws, seed)
