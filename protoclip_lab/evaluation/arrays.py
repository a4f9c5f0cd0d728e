"""What the measures share: checked features and labels, accuracy."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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
        raise ValueError(f"{name} has NaN or Inf, first in row {int((~finite).nonzero()[0])}: the model has diverged")
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


def mean_per_class(correct: np.ndarray, labels: np.ndarray) -> float:
    """Percent correct, averaged over the classes that occur among ``labels``. (N,) bool, (N,) -> percent."""
    _, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return float(100 * np.mean(np.bincount(index, weights=correct) / sizes))
