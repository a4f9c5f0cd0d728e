"""Probes against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import recall_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import Normalizer, StandardScaler
from test_arrays import flat, written_out
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from protoclip_lab import evaluation
from protoclip_lab.evaluation import knn, linear_probe
from protoclip_lab.randomness import numpy_generator

SCALERS = {"standardise": StandardScaler, "l2": Normalizer}
WORDS = np.array(["owl", "ant", "elk", "bat", "yak", "cow", "pig"])


def problem(classes=4, rows=240, dim=12, noise=1.5):
    """Of seven classes train lacks the last."""
    rng = np.random.default_rng(0)
    centres, mixing = rng.normal(size=(classes, dim)), rng.normal(size=(dim, dim))  # correlated, of different scale
    y = np.append(rng.integers(0, min(classes, 6), rows), rng.integers(0, classes, 500))
    x = ((centres[y] + noise * rng.normal(size=(len(y), dim))) @ mixing + 5).astype(np.float32)
    return x[:rows], y[:rows], x[rows:], y[rows:]


def scores(labels, predicted):
    per_class = recall_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0)
    return {"accuracy": 100 * np.mean(predicted == labels), "mean_per_class": 100 * per_class}


def regression(train_x, train_y, test_x, strength, scaling):
    """Predictions of scikit-learn's logistic regression."""
    scaler = SCALERS[scaling]().fit(train_x.astype(np.float64))
    train_x, test_x = (scaler.transform(x.astype(np.float64)) for x in (train_x, test_x))
    # With two classes scikit-learn has one weight vector, w and not ±w/2, at half the penalty.
    scale = 2 if len(set(train_y)) == 2 else 1
    model = LogisticRegression(C=scale / (len(train_x) * strength), tol=1e-8, max_iter=9000)
    return model.fit(train_x, train_y).predict(test_x)


def neighbours(train_x, train_y, test_x, k):
    model = KNeighborsClassifier(min(k, len(train_x)), metric="cosine")
    return model.fit(train_x.astype(np.float64), train_y).predict(test_x.astype(np.float64))


@pytest.mark.parametrize("scaling", SCALERS)
@pytest.mark.parametrize(("classes", "dim"), [(2, 12), (4, 12), (7, 60)])
def test_linear_probe_equals_scikit_learn_at_its_strength_in_value_and_interval(classes, dim, scaling):
    train_x, train_y, test_x, test_y = problem(classes, dim=dim)
    train_y, test_y = WORDS[train_y], WORDS[test_y]
    found = linear_probe(train_x, train_y, test_x, test_y, scaling=scaling, draws=30, seed=1)
    predicted = regression(train_x, train_y, test_x, strength := found.pop("strength"), scaling)
    expected = written_out(lambda rows: scores(test_y[rows], predicted[rows]), 500, 30, 1)
    assert strength in evaluation.STRENGTHS and flat(found) == pytest.approx(expected, abs=1e-4)
    assert 100 / classes + 10 < found["accuracy"] < 99


@pytest.mark.parametrize("block", [47, 2**24])  # 47 rows of 4 logits: the last of six blocks is short
def test_fit_in_any_blocks_reaches_the_minimum_of_the_stated_objective(monkeypatch, block):
    monkeypatch.setattr(evaluation, "BLOCK_ELEMENTS", block)
    train_x, train_y, _, _ = problem()
    x = torch.linalg.svd(torch.from_numpy(train_x - train_x.mean(axis=0)).double(), full_matrices=False)
    x, y = x.U * x.S, torch.from_numpy(train_y)  # principal axes
    model = LogisticRegression(C=1 / (len(x) * 1e-2), tol=1e-9, max_iter=9000).fit(x.numpy(), train_y)
    weights = evaluation._fit(x, y, 1e-2, torch.zeros(4, 13).double(), iterations=500, tolerance=1e-6)
    np.testing.assert_allclose(weights[:, :-1].numpy(), model.coef_, atol=5e-4)


class LargestDouble(TorchDispatchMode):
    """Elements of the largest float64 tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if getattr(tensor, "dtype", None) == torch.float64:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("scaling", SCALERS)
def test_large_data_are_never_doubled(scaling):
    dim, rows = 256, evaluation.DOUBLE_ELEMENTS // 256
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, rows + 1)
    x = (rng.normal(size=(rows + 1, dim)) + 0.1 * rng.normal(size=(3, dim))[y]).astype(np.float32)
    with LargestDouble() as large:
        found = linear_probe(x, y, x[:500], y[:500], scaling=scaling)
    assert large.elements <= rows and found["accuracy"] > 60
    with LargestDouble() as small:
        linear_probe(x[:500], y[:500], x[:9], y[:9], scaling=scaling)
    assert small.elements == 500 * dim


def test_strength_is_the_best_on_rows_held_out_of_train():
    train_x, train_y, test_x, test_y = problem(noise=2.5)
    held_out = np.isin(np.arange(240), numpy_generator(2, "linear probe").permutation(240)[192:])
    x, right = StandardScaler().fit_transform(train_x.astype(np.float64)), []
    for strength in evaluation.STRENGTHS:
        model = LogisticRegression(C=1 / (strength * np.sum(~held_out)), tol=1e-8, max_iter=5000)
        right.append(model.fit(x[~held_out], train_y[~held_out]).score(x[held_out], train_y[held_out]))
    chosen = linear_probe(train_x, train_y, test_x, test_y, seed=2)["strength"]
    assert chosen == evaluation.STRENGTHS[np.argmax(right)] and len(set(right)) > 1


@pytest.mark.parametrize("probe", [linear_probe, knn])
def test_one_class_is_always_right(probe):
    x = np.random.default_rng(0).normal(size=(9, 3))
    assert probe(x, ["a"] * 9, x, ["a"] * 9)["accuracy"] == 100
    assert probe(x[:1], ["a"], x, ["a"] * 8 + ["b"])["mean_per_class"] == 50


@pytest.mark.parametrize("scaling", SCALERS)
def test_constant_features_predict_the_commonest_class(scaling):
    x = np.full((50, 3), 0.1, dtype=np.float32)
    y = np.array([0] * 20 + [1] * 30)
    found = linear_probe(x, y, x + 1e-3, y, scaling=scaling)
    assert [found["accuracy"], found["mean_per_class"]] == pytest.approx([60, 50])


@pytest.mark.parametrize("block", [1, 2**24])
@pytest.mark.parametrize("k", [1, 2, 20, 1000])
def test_knn_equals_scikit_learn_in_value_and_interval(monkeypatch, k, block):
    monkeypatch.setattr(evaluation, "BLOCK_ELEMENTS", block)
    train_x, train_y, test_x, test_y = problem(7)
    train_y, test_y = WORDS[train_y], WORDS[test_y]
    predicted = neighbours(train_x, train_y, test_x, k)
    expected = written_out(lambda rows: scores(test_y[rows], predicted[rows]), 500, 30, 1)
    assert flat(knn(train_x, train_y, test_x, test_y, k=k, draws=30, seed=1)) == pytest.approx(expected, abs=1e-4)
