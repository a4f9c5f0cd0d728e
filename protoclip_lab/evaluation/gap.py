"""The modality gap: where images and texts lie on the sphere, apart and among themselves."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip_lab.evaluation.arrays import Estimate, accuracy, as_features, as_indices, class_sums, estimate
from protoclip_lab.evaluation.probes import predict
from protoclip_lab.randomness import numpy_generator

# Shares of the gap by which the sweep brings the modalities together; below 0 it takes them further apart.
SWEEP = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
SWEPT = ("top1", "mean_recall", "image_to_text_R@1", "text_to_image_R@1")


def modality_gap(image: Any, text: Any, *, image_of_caption: Any = None, draws: int = 0, seed: int = 0) -> dict[str, Estimate]:
    """How far images and texts lie apart, and how far each spreads. Features are L2-normalised first.

    Args:
        image: (N, d).
        text: (M, d); M = N unless ``image_of_caption`` is given.
        image_of_caption: (M,) row of ``image`` that each caption belongs to; None pairs row with row.
        draws, seed: resamples of the images, each with its captions, for 95 % intervals, see
            :func:`~protoclip_lab.evaluation.arrays.estimate`.

    Returns:
        - "gap": Euclidean distance of the two means.
        - "image_self_similarity", "text_self_similarity": mean cosine over all pairs of different items; the sign
          is kept. NaN for a single item.
        - "pair_similarity": mean cosine of the true pairs.
        - "image_std", "text_std": standard deviation of a dimension, averaged over dimensions.

    Raises:
        ValueError: shapes that do not fit, naming both; NaN or Inf.

    Source: Liang et al., "Mind the Gap", NeurIPS 2022 (arXiv 2203.02053).
    """
    image, text, owner = (part.cpu() for part in _checked(image, text, image_of_caption))
    count, width = image.shape
    pairs = (image[owner] * text).double().sum(dim=1, keepdim=True)

    def sums(x: Tensor, rows: Tensor) -> Tensor:
        """Features, their squares and their number, by image: the two modalities are resampled together."""
        x = x.double()
        return class_sums(torch.cat([x, x.square(), torch.ones_like(x[:, :1])], dim=1).T, rows, count).T

    images, texts, paired = sums(image, torch.arange(count)), sums(text, owner), class_sums(pairs.T, owner, count)[0]

    def spread(name: str, by_image: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total, squares, items = (weights @ by_image).tensor_split([width, 2 * width], dim=1)
        mean = total / items
        # The squared norm of the sum holds every ordered pair once, and each item with itself and its copies.
        same, copies = (weights.square() @ s.sum(dim=1) for s in by_image[:, width:].tensor_split([width], dim=1))
        others = items[:, 0].square() - copies
        similarity = torch.where(others > 0, (total.square().sum(dim=1) - same) / others, torch.nan)
        std = (squares / items - mean.square()).clamp(min=0).sqrt().mean(dim=1)
        return mean, {f"{name}_self_similarity": similarity, f"{name}_std": std}

    def under(weights: Tensor) -> dict[str, Tensor]:
        (i_mean, i_spread), (t_mean, t_spread) = spread("image", images, weights), spread("text", texts, weights)
        pair_similarity = (weights @ paired) / (weights @ texts[:, -1])
        return {"gap": (i_mean - t_mean).norm(dim=1), "pair_similarity": pair_similarity, **i_spread, **t_spread}

    return estimate(under, count, draws, seed, centred=True)


def separability(image: Any, text: Any, *, image_of_caption: Any = None, draws: int = 0, seed: int = 0) -> dict[str, Estimate]:
    """How well a hyperplane tells images from texts, in percent; 50 is chance.

    A linear probe learns on half of the images and the first caption of each, and is asked about the other half.

    Args and errors as :func:`modality_gap`. Returns "separability"; NaN for fewer than two images with captions.
    """
    image, text, owner = _checked(image, text, image_of_caption)
    images, first = np.unique(owner.numpy(), return_index=True)
    order = numpy_generator(seed, "separability").permutation(len(images))
    train, test = order[: len(order) // 2], order[len(order) // 2 :]
    if not len(train):
        return {"separability": Estimate(np.nan)}
    train_x, test_x = (torch.cat([image[images[part]], text[first[part]]]) for part in (train, test))
    found = predict(train_x, np.repeat([False, True], len(train)), test_x, seed=seed)[0].reshape(2, -1)
    right = (found == [[False], [True]]).mean(axis=0)
    return {"separability": accuracy({"": right}, np.zeros(len(test)), draws, seed)[""]}


def moved(image: Any, text: Any, share: float) -> tuple[Tensor, Tensor]:
    """Both modalities moved along the gap towards each other, ``share`` of it together, and normalised again.

    At 1 their means meet (before they are normalised), at -1 the gap is twice as wide.

    Args:
        image, text: (N, d), (M, d); L2-normalised first.

    Source: Liang et al., "Mind the Gap", NeurIPS 2022 (arXiv 2203.02053), section 4.
    """
    image, text = as_features(image, "image", normalise=True), as_features(text, "text", normalise=True)
    step = share / 2 * (image.mean(dim=0) - text.mean(dim=0))
    return F.normalize(image - step, dim=1), F.normalize(text + step, dim=1)


def gap_sweep(
    image: Any, text: Any, measure: Callable[[Tensor, Tensor], dict[str, Estimate]], shares: Sequence[float] = SWEEP
) -> dict[str, Estimate]:
    """What zero-shot or retrieval gives with the modalities moved along the gap: see :func:`moved`.

    Args:
        measure: (image, text) -> values; those named in ``SWEPT`` are kept.

    Returns:
        Names such as "mean_recall@+0.25": brought together by a quarter of the gap.
    """
    found = {share: measure(*moved(image, text, share)) for share in shares}
    return {f"{name}@{share:+.2f}": v for share, values in found.items() for name, v in values.items() if name in SWEPT}


def _checked(image: Any, text: Any, image_of_caption: Any) -> tuple[Tensor, Tensor, Tensor]:
    image, text = as_features(image, "image", normalise=True), as_features(text, "text", normalise=True)
    pairs = range(len(image)) if image_of_caption is None else image_of_caption
    if image.shape[1] != text.shape[1] or len(text) != len(pairs):
        raise ValueError(f"image {tuple(image.shape)} and text {tuple(text.shape)} do not fit for {len(pairs)} pairs")
    return image, text, torch.from_numpy(as_indices(pairs, len(text), len(image), "image_of_caption"))
