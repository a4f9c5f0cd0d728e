"""Retrieval: how often the right caption or image ranks among the first."""

from typing import Any

import torch

from protoclip_lab.evaluation.arrays import BLOCK_ELEMENTS, as_features, as_indices

DEPTHS = (1, 5, 10)
# Equal features can differ by a few float32 roundings, depending on where a matrix product's tiles fall.
TIE = 1e-6


def retrieval(image: Any, text: Any, image_of_caption: Any) -> dict[str, float]:
    """Recall at 1, 5 and 10, both ways, by cosine, in percent.

    A caption finds its image, an image any of its captions, among the first k. A tie counts against the model:
    a wrong item with the same score (to 1e-6) ranks first. Scores are made in blocks and counted, never sorted.

    Args:
        image: (N, d), one row for each distinct image.
        text: (M, d).
        image_of_caption: (M,) row of ``image`` that each caption belongs to. An image without captions is a
            candidate, but asks for none.

    Returns:
        "image_to_text_R@1", "…@5", "…@10", "text_to_image_R@1", "…@5", "…@10", and "mean_recall", the mean of the six.

    Raises:
        ValueError: shapes that do not fit, naming both; an index outside ``image``; NaN or Inf.
    """
    image, text = as_features(image, "image", normalise=True), as_features(text, "text", normalise=True)
    if image.shape[1] != text.shape[1]:
        raise ValueError(f"image {tuple(image.shape)} and text {tuple(text.shape)} differ in dimensions")
    owner = as_indices(image_of_caption, len(text), len(image), "image_of_caption")
    owner = torch.from_numpy(owner).to(image.device)
    own_score = (image[owner] * text).sum(dim=1)
    best_own = own_score.new_full((len(image),), float("inf")).scatter_reduce(
        0, owner, own_score, "amax", include_self=False
    )
    # Wrong items that rank before the right one.
    before_text = torch.zeros(len(text), dtype=torch.int64, device=image.device)
    before_image = torch.empty(len(image), dtype=torch.int64, device=image.device)
    for rows in torch.arange(len(image), device=image.device).split(max(1, BLOCK_ELEMENTS // len(text))):
        scores = image[rows] @ text.T
        scores[rows[:, None] == owner] = float("-inf")
        before_image[rows] = (scores >= best_own[rows, None] - TIE).sum(dim=1)
        before_text += (scores >= own_score - TIE).sum(dim=0)
    asking = before_image[owner.unique()]
    recalls = {f"image_to_text_R@{k}": 100 * float((asking < k).double().mean()) for k in DEPTHS}
    recalls |= {f"text_to_image_R@{k}": 100 * float((before_text < k).double().mean()) for k in DEPTHS}
    return {**recalls, "mean_recall": sum(recalls.values()) / len(recalls)}
