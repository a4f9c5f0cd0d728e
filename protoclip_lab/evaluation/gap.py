"""The modality gap: where images and texts lie on the sphere, apart and among themselves."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip_lab.evaluation.arrays import Estimate, Estimates, as_features, as_pairs, estimate, pair_cosines, ratio
from protoclip_lab.evaluation.probes import linear_probe
from protoclip_lab.randomness import numpy_generator

# Shares of the gap by which the sweep brings the modalities together; below 0 it takes them further apart.
SWEEP = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
SWEPT = ("top1", "mean_recall", "image_to_text_R@1", "text_to_image_R@1")


def modality_gap(image: Any, text: Any, *, image_of_caption: Any = None, draws: int = 0, seed: int = 0) -> Estimates:
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
    image, text, owner = (part.cpu() for part in as_pairs(image, text, image_of_caption))
    image, text = image.double(), text.double()
    cosines = (image[owner] * text).sum(dim=1)

    def under(weights: Tensor) -> dict[str, Tensor]:
        found, means = {}, []
        for name, x, times in (("image", image, weights), ("text", text, weights[:, owner])):
            items = times.sum(dim=1, keepdim=True)
            means.append(times @ x / items)
            found[f"{name}_self_similarity"] = ratio(*pair_cosines(x, times))
            found[f"{name}_std"] = (times @ x.square() / items - means[-1].square()).clamp(min=0).sqrt().mean(dim=1)
        found["pair_similarity"] = times @ cosines / items[:, 0]
        return {"gap": (means[0] - means[1]).norm(dim=1), **found}

    return estimate(under, len(image), draws, seed, centred=True)


def separability(image: Any, text: Any, *, image_of_caption: Any = None, draws: int = 0, seed: int = 0) -> Estimates:
    """How well a hyperplane tells images from texts, in percent; 50 is chance.

    A linear probe learns on half of the images and the first caption of each, and is asked about the other half.

    Args and errors as :func:`modality_gap`. Returns "separability"; NaN for fewer than two images with captions.
    """
    image, text, owner = as_pairs(image, text, image_of_caption)
    images, first = np.unique(owner.cpu().numpy(), return_index=True)
    order = numpy_generator(seed, "separability").permutation(len(images))
    both = torch.stack([image[images[order]], text[first[order]]], dim=1).flatten(0, 1)
    sides, half = np.tile(["image", "text"], len(order)), len(order) // 2 * 2
    if not half:
        return {"separability": Estimate(np.nan)}
    return {"separability": linear_probe(both[:half], sides[:half], both[half:], sides[half:], draws=draws, seed=seed)["accuracy"]}


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


def gap_sweep(image: Any, text: Any, measure: Callable[[Tensor, Tensor], Estimates], shares: Sequence[float] = SWEEP) -> Estimates:
    """What zero-shot or retrieval gives with the modalities moved along the gap: see :func:`moved`.

    Args:
        measure: (image, text) -> values; those named in ``SWEPT`` are kept.

    Returns:
        Names such as "mean_recall@+0.25": brought together by a quarter of the gap.
    """
    found = {share: measure(*moved(image, text, share)) for share in shares}
    return {f"{name}@{share:+.2f}": v for share, values in found.items() for name, v in values.items() if name in SWEPT}
