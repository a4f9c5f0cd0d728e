"""What the measures share: checked features and labels, accuracy, values with an interval."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protoclip_lab.randomness import torch_generator

# Scores held at once by the blockwise measures: 2**24 float32 are 64 MiB.
BLOCK_ELEMENTS = 2**24


def as_features(values: Any, name: str, *, normalise: bool = False) -> Tensor:
    """A NumPy array or tensor of one row per item -> (N, d) float32, on its device; float32 is not copied.

    Raises:
        ValueError: not two-dimensional, no rows, or NaN or Inf, with the first such row.
    """
    values = np.require(values, requirements="W") if isinstance(values, np.ndarray) else values  # torch warns of read-only memory
    features = torch.as_tensor(values).detach().float()
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name} has shape {tuple(features.shape)}: expected (rows, dimensions), at least one of each")
    if len(bad := (~features.isfinite().all(dim=1)).nonzero()):
        raise ValueError(f"{name} has NaN or Inf, first in row {int(bad[0])}: unreadable, or the model has diverged")
    return torch.nn.functional.normalize(features, dim=1) if normalise else features


def as_labels(values: Any, rows: int, name: str) -> np.ndarray:
    """Labels of any kind -> (rows,) array; ValueError when there is not one for each row."""
    labels = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    if labels.shape != (rows,):
        raise ValueError(f"{name} has shape {labels.shape}, its features have {rows} rows: one label a row is needed")
    return labels


def as_indices(values: Any, rows: int, below: int, name: str) -> Tensor:
    """Whole numbers from 0 to ``below`` - 1 -> (rows,) int64; ValueError names the first that is not."""
    indices = as_labels(values, rows, name)
    if len(wrong := np.flatnonzero(~np.isin(indices, np.arange(below)))):
        raise ValueError(f"{name} is {indices[wrong[0]]} in row {wrong[0]}: expected whole numbers from 0 to {below - 1}")
    return torch.from_numpy(indices.astype(np.int64))


def as_pairs(image: Any, text: Any, image_of_caption: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Features of images and texts, L2-normalised, and the image of each text, (M,) int64; None pairs row with row.

    Raises:
        ValueError: shapes that do not fit, naming both; an index outside ``image``; NaN or Inf.
    """
    image, text = as_features(image, "image", normalise=True), as_features(text, "text", normalise=True)
    pairs = range(len(text)) if image_of_caption is None else image_of_caption
    if image.shape[1] != text.shape[1] or (image_of_caption is None and len(image) != len(text)):
        raise ValueError(f"image {tuple(image.shape)} and text {tuple(text.shape)} do not fit, or image_of_caption is missing")
    return image, text, as_indices(pairs, len(text), len(image), "image_of_caption").to(image.device)


class Estimate(float):
    """A value with the 95 % interval of a bootstrap over test items; a float wherever one is wanted.

    Attributes:
        low, high: the interval; NaN where none was asked for.
    """

    def __new__(cls, value: float, low: float = np.nan, high: float = np.nan) -> "Estimate":
        estimate = super().__new__(cls, value)
        estimate.low, estimate.high = float(low), float(high)
        return estimate


Estimates = dict[str, Estimate]


def mean(found: Sequence[Estimates]) -> Estimates:
    """By name the mean of values, and of both ends of their intervals."""
    ends = {name: [[each[name], each[name].low, each[name].high] for each in found] for name in found[0]}
    return {name: Estimate(*np.mean(values, axis=0)) for name, values in ends.items()}


def estimate(under: Callable[[Tensor], dict[str, Tensor]], items: int, draws: int, seed: int, *, centred: bool = False) -> Estimates:
    """Values of a measure, with percentile intervals over resamples of its items.

    Args:
        under: (B, items) float64 weights, how often each item counts -> a (B,) tensor for the name of each value.
        draws: number of resamples; 0 makes no intervals.
        seed: of the resamples, the same for every measure of as many items.
        centred: for what is no plain mean: a resample repeats items, and so moves it (two clusterings seem to agree
            better). The percentiles are then moved back by the distance of the draws' mean from the value.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 10 and 13.
    """
    found = {name: Estimate(value) for name, value in under(torch.ones(1, items, dtype=torch.float64)).items()}
    generator, blocks = torch_generator(seed, "bootstrap"), []
    size = max(1, BLOCK_ELEMENTS // items)
    for start in range(0, draws, size):
        picked = torch.randint(items, (min(size, draws - start), items), generator=generator)
        blocks.append(under(torch.stack([row.bincount(minlength=items) for row in picked]).double()))
    for name, value in found.items() if draws else ():
        drawn = torch.cat([block[name] for block in blocks]).double()
        edges = drawn.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        low, high = (edges + (value - drawn.nanmean() if centred else 0)).tolist()
        found[name] = Estimate(value, min(low, value), max(high, value))  # a constant one may miss the value by a rounding
    return found


def resampled(weights: Tensor) -> list[np.ndarray]:
    """The rows of each resample, one as often as it counts: (B, N) -> B arrays."""
    return [np.repeat(np.arange(len(row)), row.int()) for row in weights]


def class_sums(values: Tensor, classes: Any, count: int) -> Tensor:
    """Columns added up by class, or captions by image: (B, N), (N,) int64 -> (B, count)."""
    return values.new_zeros(len(values), count).index_add_(1, torch.as_tensor(classes), values)


def pair_cosines(sphere: Tensor, weights: Tensor) -> Tensor:
    """Sum of the cosines, and number, of ordered pairs of different items; an item and its copies are none.

    (N, d) L2-normalised, (B, N) how often each counts -> (2, B).
    """
    # The squared norm of the sum holds every ordered pair once, and each item with itself and its copies.
    cosines = (weights @ sphere).square().sum(dim=1) - weights.square() @ sphere.square().sum(dim=1)
    return torch.stack([cosines, weights.sum(dim=1).square() - weights.square().sum(dim=1)])


def ratio(sums: Tensor, counts: Tensor) -> Tensor:
    """Means of what is counted; NaN where nothing is."""
    return torch.where(counts > 0, sums / counts, torch.nan)


def accuracy(correct: Mapping[str, np.ndarray], labels: np.ndarray, draws: int, seed: int) -> Estimates:
    """Percent correct by name, and the first's "mean_per_class": averaged over the classes among ``labels``.

    Args:
        correct: (N,) by name, bool or a share.
        labels: (N,) of any kind.
        draws, seed: see :func:`estimate`.
    """
    classes, index = np.unique(labels, return_inverse=True)
    hits = {name: torch.from_numpy(values).double() for name, values in correct.items()}
    first = next(iter(hits.values()))

    def under(weights: Tensor) -> dict[str, Tensor]:
        shares = {name: 100 * (weights @ values) / weights.sum(dim=1) for name, values in hits.items()}
        per_class = class_sums(weights * first, index, len(classes)) / class_sums(weights, index, len(classes))
        return {**shares, "mean_per_class": 100 * per_class.nanmean(dim=1)}

    return estimate(under, len(labels), draws, seed)
