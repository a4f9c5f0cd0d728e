"""Probes against scikit-learn and a written-out vote."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from protoclip_lab.evaluation import knn, linear_probe, probes


def problem(classes=4, rows=240, dim=12, noise=3.0, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, dim))
    mixing = rng.normal(size=(dim, dim))  # correlated features of different scale

    def draw(n):
        y = rng.integers(0, classes, n)
        x = (centres[y] + noise * rng.normal(size=(n, dim)) / 2) @ mixing + 5
        return x.astype(np.float32), y

    return (*draw(rows), *draw(500))


@pytest.mark.parametrize(("classes", "dim"), [(2, 12), (4, 12), (7, 60)])
def test_linear_probe_equals_scikit_learn_at_its_strength(classes, dim):
    train_x, train_y, test_x, test_y = problem(classes, dim=dim)
    found = linear_probe(train_x, train_y, test_x, test_y)
    scaler = StandardScaler().fit(train_x.astype(np.float64))
    # With two classes scikit-learn has one weight vector, w and not ±w/2, at half the penalty.
    scale = 2 if classes == 2 else 1
    model = LogisticRegression(C=scale / (len(train_x) * found["strength"]), tol=1e-8, max_iter=5000)
    model.fit(scaler.transform(train_x.astype(np.float64)), train_y)
    predicted = model.predict(scaler.transform(test_x.astype(np.float64)))
    assert found["accuracy"] == pytest.approx(100 * np.mean(predicted == test_y), abs=1e-4)
    per_class = [np.mean(predicted[test_y == c] == c) for c in range(classes)]
    assert found["mean_per_class"] == pytest.approx(100 * np.mean(per_class), abs=1e-4)
    assert 100 / classes + 10 < found["accuracy"] < 99


def test_fit_reaches_the_minimum_of_the_stated_objective():
    train_x, train_y, _, _ = problem()
    x = torch.linalg.svd(torch.from_numpy(train_x - train_x.mean(axis=0)), full_matrices=False)
    x = x.U * x.S  # principal axes
    weights = probes._fit(x, torch.from_numpy(train_y), 1e-2, torch.zeros(4, 13), iterations=500, tolerance=1e-6)
    model = LogisticRegression(C=1 / (len(x) * 1e-2), tol=1e-9, max_iter=9000).fit(x.double().numpy(), train_y)
    np.testing.assert_allclose(weights[:, :-1].numpy(), model.coef_, atol=2e-3)


def test_strength_does_not_depend_on_test():
    train_x, train_y, test_x, test_y = problem()
    rng = np.random.default_rng(1)
    found = linear_probe(train_x, train_y, test_x, test_y)
    shuffled = linear_probe(train_x, train_y, test_x, rng.permutation(test_y))
    other = linear_probe(train_x, train_y, 100 * rng.normal(size=(5, 12)), [0] * 5)
    assert found["strength"] == shuffled["strength"] == other["strength"]
    assert shuffled["accuracy"] < found["accuracy"] - 20


def test_strength_is_the_best_on_rows_held_out_of_train(monkeypatch):
    train_x, train_y, test_x, test_y = problem(noise=5.0)
    held_out = probes._stratified(train_y, seed=2)
    scaler = StandardScaler().fit(train_x)
    x = scaler.transform(train_x.astype(np.float64))
    scores = []
    for strength in probes.STRENGTHS:
        model = LogisticRegression(C=1 / (strength * np.sum(~held_out)), tol=1e-8, max_iter=5000)
        scores.append(model.fit(x[~held_out], train_y[~held_out]).score(x[held_out], train_y[held_out]))
    chosen = linear_probe(train_x, train_y, test_x, test_y, seed=2)["strength"]
    assert chosen == probes.STRENGTHS[int(np.argmax(scores))]
    assert len(set(scores)) > 1


def test_each_class_gives_its_share_to_the_split():
    y = np.repeat([0, 1, 2, 3], [1, 2, 11, 101])
    held_out = probes._stratified(y, seed=0)
    assert np.bincount(y[held_out], minlength=4).tolist() == [0, 1, 2, 20]
    assert (held_out != probes._stratified(y, seed=1)).any()


def test_words_are_labels_too():
    train_x, train_y, test_x, test_y = problem()
    words = np.array(["owl", "ant", "elk", "bat"])
    found = linear_probe(torch.from_numpy(train_x), words[train_y], test_x, words[test_y])
    assert found["accuracy"] == pytest.approx(linear_probe(train_x, train_y, test_x, test_y)["accuracy"], abs=1)


def test_class_that_train_lacks_counts_as_wrong():
    train_x, train_y, test_x, test_y = problem()
    seen = train_y != 2
    for probe in (linear_probe, knn):
        found = probe(train_x[seen], train_y[seen], test_x, test_y)
        alone = probe(train_x[seen], train_y[seen], test_x[test_y != 2], test_y[test_y != 2])
        assert found["accuracy"] == pytest.approx(alone["accuracy"] * np.mean(test_y != 2))
        assert found["mean_per_class"] == pytest.approx(alone["mean_per_class"] * 3 / 4)


def test_one_class_is_always_right():
    x = np.random.default_rng(0).normal(size=(9, 3))
    for probe in (linear_probe, knn):
        assert probe(x, ["a"] * 9, x, ["a"] * 9)["accuracy"] == 100


def test_one_row_of_each_class_is_enough():
    assert linear_probe(np.eye(3), [4, 7, 9], 2 * np.eye(3), [4, 7, 9])["accuracy"] == 100


def test_constant_features_predict_the_commonest_class():
    x = np.full((50, 3), 0.1, dtype=np.float32)
    y = np.array([0] * 20 + [1] * 30)
    assert linear_probe(x, y, x + 1e-3, y)["accuracy"] == pytest.approx(60)


def test_constant_column_changes_nothing():
    train_x, train_y, test_x, test_y = problem()
    columns = [np.concatenate([x, np.full((len(x), 1), 0.3)], axis=1) for x in (train_x, test_x)]
    found = linear_probe(columns[0], train_y, columns[1], test_y)
    assert found == pytest.approx(linear_probe(train_x, train_y, test_x, test_y), abs=0.21)


@pytest.mark.parametrize("k", [1, 20, 1000])
def test_knn_equals_a_vote_written_out(k):
    train_x, train_y, test_x, test_y = problem()
    right = []
    for x, y in zip(test_x, test_y, strict=True):
        cosine = train_x @ x / np.linalg.norm(train_x, axis=1) / np.linalg.norm(x)
        right.append(np.bincount(train_y[np.argsort(-cosine)[:k]]).argmax() == y)
    assert knn(train_x, train_y, test_x, test_y, k=k)["accuracy"] == pytest.approx(100 * np.mean(right), abs=1e-4)


def test_shapes_that_do_not_fit_are_both_named():
    for probe in (linear_probe, knn):
        with pytest.raises(ValueError, match=r"train_x \(3, 3\) and test_x \(2, 2\)"):
            probe(np.eye(3), [0, 1, 2], np.eye(2), [0, 1])
        with pytest.raises(ValueError, match=r"test_y has shape \(1,\), its features have 3 rows"):
            probe(np.eye(3), [0, 1, 2], np.eye(3), [0])
