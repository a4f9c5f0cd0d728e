"""Probes of frozen features: a linear classifier and nearest neighbours, learnt on train, counted on test."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip_lab.config import require
from protoclip_lab.encoders import best_device
from protoclip_lab.evaluation.arrays import BLOCK_ELEMENTS, Estimate, Estimates, accuracy, as_features, as_labels
from protoclip_lab.randomness import numpy_generator

# L2 strengths to choose from, strongest first, so that each fit starts from the one before it.
STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# Up to so many numbers (4,000 rows of 1,024) the fit is in float64, whose line search comes closer to the minimum.
DOUBLE_ELEMENTS = 2**22


def linear_probe(
    train_x: Any, train_y: Any, test_x: Any, test_y: Any, *, seed: int = 0, scaling: str = "standardise", draws: int = 0
) -> Estimates:
    """Multinomial logistic regression on frozen features, counted on test.

    Minimises ``mean cross-entropy + strength/2 · ‖W‖²`` (the intercept is free) by L-BFGS, on a GPU where there is
    one. The strength is chosen by accuracy on a random fifth of train (the strongest of equals), then all of train is
    fitted; test takes no part, not even in mean and standard deviation. On N rows scikit-learn's C is
    ``1 / (N · strength)``, twice that for two classes. Copies of ``train_x`` (three at once) are
    float32 unless it is small.

    Args:
        train_x, test_x: (N, d), (M, d).
        train_y, test_y: (N,), (M,) labels of any one kind. A class that train lacks is never predicted.
        seed: of the split of train and of the resamples.
        scaling: "standardise" gives each dimension mean 0 and standard deviation 1 on train, "l2" each row norm 1.
        draws: resamples of test for 95 % intervals, see :func:`~protoclip_lab.evaluation.arrays.estimate`.

    Returns:
        "accuracy" and "mean_per_class" (over classes in test), percent; "strength", the one chosen.

    Raises:
        ValueError: shapes that do not fit, naming both; NaN or Inf; an unknown scaling.
    """
    require(scaling in ("standardise", "l2"), f"scaling {scaling!r} is neither 'standardise' nor 'l2'")
    x, y, classes, test_x, test_y = _checked(train_x, train_y, test_x, test_y, normalise=scaling == "l2")
    if x.numel() <= DOUBLE_ELEMENTS:
        x, test_x = x.double(), test_x.double()
    if scaling == "standardise":
        mean, scale = x.mean(dim=0), x.std(dim=0, correction=0)
        # A constant feature's deviation is rounding, which standardising would blow up.
        scale[scale <= 1e-6 * mean.abs()] = 1
        x, test_x = (x - mean) / scale, (test_x - mean) / scale
    # A rotation changes neither the penalty nor the predictions, and spares the solver correlated features.
    axes = torch.linalg.eigh(x.T @ x)[1]
    order = numpy_generator(seed, "linear probe").permutation(len(x))
    x, y, test_x, fitted = (x @ axes)[order], y[order], test_x @ axes, len(x) - len(x) // 5
    scores, weights = [], x.new_zeros(len(classes), x.shape[1] + 1)
    for strength in STRENGTHS:
        weights = _fit(x[:fitted], y[:fitted], strength, weights, iterations=50, tolerance=1e-4)
        scores.append(int((_logits(x[fitted:], weights).argmax(dim=1) == y[fitted:]).sum()))
    strength = STRENGTHS[np.argmax(scores)]
    weights = _fit(x, y, strength, weights, iterations=500, tolerance=1e-6)
    predicted = classes[_logits(test_x, weights).argmax(dim=1).cpu().numpy()]
    return {**accuracy({"accuracy": predicted == test_y}, test_y, draws, seed), "strength": Estimate(strength)}


def knn(train_x: Any, train_y: Any, test_x: Any, test_y: Any, *, k: int = 20, draws: int = 0, seed: int = 0) -> Estimates:
    """Majority vote of the k nearest rows of train by cosine (all of train where it has fewer), counted on test.

    Of classes with as many votes the first in sorted order wins. Shapes, errors, draws and seed as
    :func:`linear_probe`. Returns "accuracy" and "mean_per_class", percent.
    """
    x, y, classes, test_x, test_y = _checked(train_x, train_y, test_x, test_y, normalise=True)
    nearest = [(block @ x.T).topk(min(k, len(x)), dim=1).indices for block in test_x.split(max(1, BLOCK_ELEMENTS // len(x)))]
    predicted = classes[y[torch.cat(nearest)].cpu().mode(dim=1).values.numpy()]
    return accuracy({"accuracy": predicted == test_y}, test_y, draws, seed)


def _checked(train_x: Any, train_y: Any, test_x: Any, test_y: Any, *, normalise: bool) -> tuple:
    """Features of train, its classes' numbers, the classes, features of test, on a GPU where there is one, and labels of test."""
    given = {"train_x": train_x, "test_x": test_x}
    train_x, test_x = (as_features(x, name, normalise=normalise).to(best_device()) for name, x in given.items())
    require(train_x.shape[1] == test_x.shape[1], f"train_x {tuple(train_x.shape)} and test_x {tuple(test_x.shape)} do not fit")
    classes, y = np.unique(as_labels(train_y, len(train_x), "train_y"), return_inverse=True)
    return train_x, torch.from_numpy(y).to(train_x.device), classes, test_x, as_labels(test_y, len(test_x), "test_y")


def _logits(x: Tensor, weights: Tensor) -> Tensor:
    # Not x @ weights.T: its gradient is a product that BLAS computes several times slower.
    return torch.addmm(weights[:, -1:], weights[:, :-1], x.T).T


def _fit(x: Tensor, y: Tensor, strength: float, start: Tensor, *, iterations: int, tolerance: float) -> Tensor:
    """Weights (C, d + 1) of the regression, the intercept in the last column. Expects ``x`` in principal axes."""
    # There the curvature is near diag(variance)/C + strength. Steps of that length take L-BFGS to the minimum in a
    # half to a quarter of the iterations.
    step = F.pad((x.square().mean(dim=0) / len(start) + strength).rsqrt(), (0, 1), value=1)
    weights = (start / step).requires_grad_()
    solver = torch.optim.LBFGS([weights], max_iter=iterations, tolerance_grad=tolerance, history_size=10, line_search_fn="strong_wolfe")

    # In blocks of rows: the logits of a million rows and a thousand classes would not fit beside the features.
    rows = max(1, 4 * BLOCK_ELEMENTS // len(start))

    def objective() -> Tensor:
        solver.zero_grad()
        total = strength / 2 * (weights * step)[:, :-1].square().sum()
        total.backward()
        for block, labels in zip(x.split(rows), y.split(rows), strict=True):
            loss = F.cross_entropy(_logits(block, weights * step), labels, reduction="sum") / len(x)
            loss.backward()
            total = total + loss
        return total.detach()

    solver.step(objective)
    return (weights * step).detach()
