"""Probes of frozen features: a linear classifier and nearest neighbours, learnt on train, counted on test."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip_lab.evaluation.arrays import as_features, as_labels, mean_per_class
from protoclip_lab.randomness import numpy_generator

# L2 strengths to choose from, strongest first, so that each fit starts from the one before it.
STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
PATIENCE = 2  # strengths in a row without a better one that end the search


def linear_probe(train_x: Any, train_y: Any, test_x: Any, test_y: Any, *, seed: int = 0) -> dict[str, float]:
    """Multinomial logistic regression on standardised features, counted on test.

    Minimises ``mean cross-entropy + strength/2 · ‖W‖²`` (the intercept is free) by L-BFGS in float32. The strength
    is chosen by accuracy on a stratified fifth of train (the strongest of equals), then all of train is fitted; test
    takes no part, not even in mean and standard deviation. On N rows scikit-learn's C is ``1 / (N · strength)``,
    twice that for two classes.

    Args:
        train_x, test_x: (N, d), (M, d).
        train_y, test_y: (N,), (M,) labels of any one kind. A class that train lacks is never predicted.
        seed: of the split of train.

    Returns:
        "accuracy" and "mean_per_class" (over classes in test), percent; "strength", the one chosen.

    Raises:
        ValueError: shapes that do not fit, naming both; NaN or Inf.
    """
    x, test_x, train_y, test_y = _checked(train_x, train_y, test_x, test_y)
    classes, y = np.unique(train_y, return_inverse=True)
    mean, scale = x.mean(dim=0), x.std(dim=0, correction=0)
    # A constant feature's deviation is rounding, which standardising would blow up.
    scale[scale <= 1e-6 * mean.abs()] = 1
    x = (x - mean) / scale
    # A rotation changes neither the penalty nor the predictions, and spares the solver correlated features.
    axes = torch.linalg.eigh(x.T @ x)[1]
    x, test_x = x @ axes, (test_x - mean) / scale @ axes
    held, y = (torch.from_numpy(values).to(x.device) for values in (_stratified(y, seed), y))
    fit_x, fit_y, held_x, held_y = x[~held], y[~held], x[held], y[held]
    scores, weights = [], x.new_zeros(len(classes), x.shape[1] + 1)
    for strength in STRENGTHS:
        weights = _fit(fit_x, fit_y, strength, weights, iterations=50, tolerance=1e-4)
        scores.append(int((_logits(held_x, weights).argmax(dim=1) == held_y).sum()))
        if len(scores) - 1 - np.argmax(scores) == PATIENCE:
            break
    strength = STRENGTHS[np.argmax(scores)]
    weights = _fit(x, y, strength, weights, iterations=500, tolerance=1e-5)
    predicted = classes[_logits(test_x, weights).argmax(dim=1).cpu().numpy()]
    return {**_accuracy(predicted, test_y), "strength": strength}


def knn(train_x: Any, train_y: Any, test_x: Any, test_y: Any, *, k: int = 20) -> dict[str, float]:
    """Majority vote of the k nearest rows of train by cosine (all of train where it has fewer), counted on test.

    Shapes and errors as :func:`linear_probe`. Returns "accuracy" and "mean_per_class", percent.
    """
    from sklearn.neighbors import KNeighborsClassifier

    x, test_x, train_y, test_y = _checked(train_x, train_y, test_x, test_y)
    # On the sphere the order by Euclidean distance is the order by cosine.
    x, test_x = (F.normalize(features, dim=1).cpu().numpy() for features in (x, test_x))
    model = KNeighborsClassifier(n_neighbors=min(k, len(x)), algorithm="brute").fit(x, train_y)
    return _accuracy(model.predict(test_x), test_y)


def _checked(train_x: Any, train_y: Any, test_x: Any, test_y: Any) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    train_x, test_x = as_features(train_x, "train_x"), as_features(test_x, "test_x")
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"train_x {tuple(train_x.shape)} and test_x {tuple(test_x.shape)} differ in dimensions")
    return train_x, test_x, as_labels(train_y, len(train_x), "train_y"), as_labels(test_y, len(test_x), "test_y")


def _accuracy(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    correct = predicted == labels
    return {"accuracy": float(100 * correct.mean()), "mean_per_class": mean_per_class(correct, labels)}


def _stratified(y: np.ndarray, seed: int) -> np.ndarray:
    """(N,) bool: a random fifth of each class, at least one of each class that can spare one."""
    held_out = np.zeros(len(y), dtype=bool)
    order = numpy_generator(seed, "linear probe").permutation(len(y))
    for members in np.split(order[np.argsort(y[order], kind="stable")], np.cumsum(np.bincount(y))[:-1]):
        held_out[members[: (len(members) + 3) // 5]] = True
    return held_out


def _logits(x: Tensor, weights: Tensor) -> Tensor:
    # Not x @ weights.T: its gradient is a product that BLAS computes several times slower.
    return torch.addmm(weights[:, -1:], weights[:, :-1], x.T).T


def _fit(x: Tensor, y: Tensor, strength: float, start: Tensor, *, iterations: int, tolerance: float) -> Tensor:
    """Weights (C, d + 1) of the regression, the intercept in the last column. Expects ``x`` in principal axes."""
    # There the curvature is near diag(variance)/C + strength. Steps of that length take L-BFGS to the minimum in a
    # half to a quarter of the iterations.
    step = F.pad((x.square().mean(dim=0) / len(start) + strength).rsqrt(), (0, 1), value=1)
    weights = (start / step).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=iterations, tolerance_grad=tolerance, history_size=10, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        scaled = weights * step
        loss = F.cross_entropy(_logits(x, scaled), y) + strength / 2 * scaled[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return (weights * step).detach()
