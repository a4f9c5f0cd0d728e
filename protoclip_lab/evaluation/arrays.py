"""What the measures share: checked features and labels, accuracy, values with an interval."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip_lab.randomness import torch_generator

# Scores held at once by the blockwise measures: 2**24 float32 are 64 MiB.
BLOCK_ELEMENTS = 2**24


def as_features(values: Any, name: str, *, normalise: bool = False) -> Tensor:
    """A NumPy array or tensor of one row per item -> (N, d) float32, on its device; float32 is not copied.

    Raises:
        ValueError: not two-dimensional, no rows, or NaN or Inf, with the first such row.
    """
    if isinstance(values, np.ndarray) and not values.flags.writeable:
        values = values.copy()  # torch warns of read-only memory
    features = torch.as_tensor(values).detach().float()
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name} has shape {tuple(features.shape)}: expected (rows, dimensions), at least one of each")
    finite = features.isfinite().all(dim=1)
    if not finite.all():
        raise ValueError(f"{name} has NaN or Inf, first in row {int((~finite).nonzero()[0])}: unreadable, or the model has diverged")
    return F.normalize(features, dim=1) if normalise else features


def as_labels(values: Any, rows: int, name: str) -> np.ndarray:
    """Labels of any kind -> (rows,) array; ValueError when there is not one for each row."""
    labels = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    if labels.shape != (rows,):
        raise ValueError(f"{name} has shape {labels.shape}, its features have {rows} rows: one label a row is needed")
    return labels


def as_indices(values: Any, rows: int, below: int, name: str) -> np.ndarray:
    """Whole numbers from 0 to ``below`` - 1 -> (rows,) int64; ValueError names the first that is not."""
    indices = as_labels(values, rows, name)
    if indices.dtype.kind not in "iu":
        raise ValueError(f"{name} is of type {indices.dtype}: whole numbers are needed")
    wrong = (indices < 0) | (indices >= below)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"{name} is {indices[row]} in row {row}: expected 0 to {below - 1}")
    return indices.astype(np.int64)


class Estimate(float):
    """A value with the 95 % interval of a bootstrap over test items; a float wherever one is wanted.

    Attributes:
        low, high: the interval; NaN where none was asked for.
    """

    def __new__(cls, value: float, low: float = math.nan, high: float = math.nan) -> "Estimate":
        estimate = super().__new__(cls, value)
        estimate.low, estimate.high = float(low), float(high)
        return estimate


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of values, and of both ends of their intervals."""
    return Estimate(*np.mean([[value, value.low, value.high] for value in estimates], axis=0))


def estimate(
    under: Callable[[Tensor], dict[str, Tensor]], items: int, draws: int, seed: int, *, centred: bool = False
) -> dict[str, Estimate]:
    """Values of a measure, with percentile intervals over resamples of its items.

    Args:
        under: (B, items) float64 weights, how often each item counts -> a (B,) tensor for the name of each value.
        draws: number of resamples; 0 makes no intervals.
        seed: of the resamples, the same for every measure of as many items.
        centred: for what is no plain mean: a resample repeats items, and so moves it (two clusterings seem to agree
            better). The percentiles are then moved back by the distance of the draws' mean from the value.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 10 and 13.
    """
    values = {name: float(value) for name, value in under(torch.ones(1, items, dtype=torch.float64)).items()}
    generator, blocks = torch_generator(seed, "bootstrap"), []
    size = max(1, BLOCK_ELEMENTS // items)
    for start in range(0, draws, size):
        picked = torch.randint(items, (min(size, draws - start), items), generator=generator)
        weights = torch.zeros(picked.shape, dtype=torch.float64)
        blocks.append(under(weights.scatter_add_(1, picked, torch.ones_like(weights))))
    found = {}
    for name, value in values.items():
        interval = ()
        if draws:
            drawn = torch.cat([block[name] for block in blocks]).double()
            edges = drawn.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
            low, high = (edges + (value - drawn.nanmean() if centred else 0)).tolist()
            interval = min(low, value), max(high, value)  # a constant one may miss the value by a rounding
        found[name] = Estimate(value, *interval)
    return found


def class_sums(values: Tensor, classes: Tensor, count: int) -> Tensor:
    """Columns added up by class, or captions by image: (B, N), (N,) int64 -> (B, count)."""
    return values.new_zeros(len(values), count).index_add_(1, classes, values)


def accuracy(correct: Mapping[str, np.ndarray], labels: np.ndarray, draws: int, seed: int) -> dict[str, Estimate]:
    """Percent correct by name, and the first's "mean_per_class": averaged over the classes among ``labels``.

    Args:
        correct: (N,) by name, bool or a share.
        labels: (N,) of any kind.
        draws, seed: see :func:`estimate`.
    """
    found, index = np.unique(labels, return_inverse=True)
    index = torch.from_numpy(index)
    hits = {name: torch.from_numpy(values).double() for name, values in correct.items()}
    first = next(iter(hits.values()))

    def under(weights: Tensor) -> dict[str, Tensor]:
        shares = {name: 100 * (weights @ values) / weights.sum(dim=1) for name, values in hits.items()}
        per_class = class_sums(weights * first, index, len(found)) / class_sums(weights, index, len(found))
        return {**shares, "mean_per_class": 100 * per_class.nanmean(dim=1)}

    return estimate(under, len(labels), draws, seed)
