"""The modality gap: where images and texts lie on the sphere, apart and among themselves."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from protoclip_lab.evaluation.arrays import as_features, as_indices


def modality_gap(image: Any, text: Any, *, image_of_caption: Any = None) -> dict[str, float]:
    """How far images and texts lie apart, and how far each spreads. Features are L2-normalised first.

    Args:
        image: (N, d).
        text: (M, d); M = N unless ``image_of_caption`` is given.
        image_of_caption: (M,) row of ``image`` that each caption belongs to; None pairs row with row.

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
    image, text = as_features(image, "image", normalise=True), as_features(text, "text", normalise=True)
    pairs = range(len(image)) if image_of_caption is None else image_of_caption
    if image.shape[1] != text.shape[1] or len(text) != len(pairs):
        raise ValueError(f"image {tuple(image.shape)} and text {tuple(text.shape)} do not fit for {len(pairs)} pairs")
    pairs = torch.from_numpy(as_indices(pairs, len(text), len(image), "image_of_caption")).to(image.device)
    means = [features.mean(dim=0, dtype=torch.float64) for features in (image, text)]
    return {
        "gap": float((means[0] - means[1]).norm()),
        "image_self_similarity": _self_similarity(image),
        "text_self_similarity": _self_similarity(text),
        "pair_similarity": float((image[pairs] * text).sum(dim=1).mean()),
        "image_std": float(image.std(dim=0, correction=0).mean()),
        "text_std": float(text.std(dim=0, correction=0).mean()),
    }


def _self_similarity(features: Tensor) -> float:
    # The squared norm of the sum holds every ordered pair once, and each item with itself.
    items = len(features)
    if items == 1:
        return float("nan")
    with_itself = features.square().sum(dtype=torch.float64)
    all_pairs = features.sum(dim=0, dtype=torch.float64).square().sum()
    return float((all_pairs - with_itself) / np.float64(items * (items - 1)))
