"""Grouping and the classes' separation against scikit-learn and loops over all pairs."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics
from test_arrays import flat, written_out

from protoclip_lab import evaluation
from protoclip_lab.clustering import kmeans
from protoclip_lab.evaluation import agreement, grouping, separation


def reference(found, known):
    common = [max(np.sum((found == cluster) & (known == label)) for label in known) for cluster in np.unique(found)]
    return {
        "ARI": metrics.adjusted_rand_score(known, found),
        "AMI": metrics.adjusted_mutual_info_score(known, found),
        "NMI": metrics.normalized_mutual_info_score(known, found),
        "purity": sum(common) / len(known),
    }


def labelings(rng, rows):
    """Random, one group, every item its own, pairs, and the groups of the random one under other names."""
    drawn = rng.integers(0, rng.integers(1, rows + 1), rows)
    return drawn, np.zeros(rows), np.arange(rows), np.arange(rows) // 2, np.array(list("zebrafish-duck"))[drawn]


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9, 14])
def test_agreement_equals_scikit_learn(rows):
    rng = np.random.default_rng(rows)
    for _ in range(5):
        for found in labelings(rng, rows):
            for known in labelings(rng, rows):
                assert agreement(found, known) == pytest.approx(reference(found, known), abs=1e-9)


def test_interval_equals_agreement_of_repeated_labels():
    rng = np.random.default_rng(0)
    known = rng.integers(0, 4, 30)
    found = np.where(rng.random(30) < 0.6, known, rng.integers(0, 6, 30))
    expected = written_out(lambda rows: reference(found[rows], known[rows]), 30, 60, 2, centred=True)
    assert flat(agreement(torch.from_numpy(found), known, draws=60, seed=2)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("k", [None, 8])
def test_grouping_of_three_seeds_is_the_mean_of_single_ones(k):
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(80, 4)).astype(np.float32), rng.integers(0, 5, 80)
    groups = [kmeans(torch.from_numpy(features), k or 5, seed=seed).labels for seed in (4, 5, 6)]
    single = [flat(agreement(group, labels, draws=30, seed=4)) for group in groups]
    assert flat(grouping(features, labels, k, seed=4, draws=30)) == single[0]
    found = grouping(features, labels, k, seed=4, seeds=3, draws=30)
    assert flat(found) == pytest.approx({n: np.mean([one[n] for one in single]) for n in single[0]}, abs=1e-9)


def separated(x, y, rows=None):
    """Of the items in ``rows``; an item is no pair with its copies."""
    rows = np.arange(len(x)) if rows is None else rows
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y)
    sphere = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [(i, j) for i in rows for j in rows if i != j]
    cosines = ([sphere[i] @ sphere[j] for i, j in pairs if (y[i] == y[j]) == same] for same in (True, False))
    within, between = (np.mean(values) if values else np.nan for values in cosines)
    found = {"within_similarity": within, "between_similarity": between, "similarity_ratio": within / between}
    for name in ("silhouette", "davies_bouldin", "calinski_harabasz"):
        score = getattr(metrics, f"{name}_score")
        found[name] = score(x[rows], y[rows]) if 1 < len(set(y[rows])) < len(rows) else np.nan
    return found


RANDOM = np.random.default_rng(0).normal((1, 2, 3), size=(24, 3))
CLASSES = np.array(["owl", "ant", "elk"])[np.random.default_rng(1).integers(0, 3, 24)]
LABELINGS = {"words": CLASSES, "one class": [0] * 24, "one item a class": range(24), "an item apart": [0] * 23 + [1]}
SEPARATIONS = {name: (RANDOM, list(y)) for name, y in LABELINGS.items()}
SEPARATIONS |= {"one": (RANDOM[:1], [7]), "two": (RANDOM[:2], [0, 0]), "constant": (np.ones((6, 2)), [0, 1] * 3)}


@pytest.mark.parametrize("name", SEPARATIONS)
def test_separation_equals_scikit_learn_and_loops_over_pairs(name):
    assert separation(*SEPARATIONS[name]) == pytest.approx(separated(*SEPARATIONS[name]), abs=1e-4, nan_ok=True)


def test_interval_equals_separation_of_repeated_items():
    found = separation(RANDOM, CLASSES, draws=40, seed=5)
    found.pop("silhouette")
    expected = written_out(lambda rows: separated(RANDOM, CLASSES, rows), 24, 40, 5, centred=True)
    assert flat(found) == pytest.approx({name: expected[name] for name in flat(found)}, abs=1e-4)


def test_interval_of_the_silhouette_is_that_of_a_mean_over_items():
    values = metrics.silhouette_samples(RANDOM, CLASSES)
    found = separation(RANDOM, CLASSES, draws=4000)["silhouette"]
    options = {"n_resamples": 4000, "method": "percentile", "rng": np.random.default_rng(1)}
    expected = stats.bootstrap((values,), np.mean, **options).confidence_interval
    assert [found.low, found.high] == pytest.approx([*expected], abs=0.2 * stats.sem(values))


def test_fewer_resamples_have_to_do_where_each_is_costly(monkeypatch):
    labels, found = np.random.default_rng(0).integers(0, 4, (2, 300))
    few = flat(agreement(found, labels, draws=20))
    assert flat(agreement(found, labels, draws=100)) == flat(agreement(found, labels, draws=1000)) != few
    monkeypatch.setattr(evaluation, "LARGE_TABLE", 10)
    assert flat(agreement(found, labels, draws=1000)) == few


def test_interval_ends_where_the_measure_does():
    labels = np.repeat([0, 1], 150)
    found = agreement(np.where(np.arange(300) == 0, 1, labels), labels, draws=200)
    assert all(value.low <= value <= value.high <= 1 for value in found.values())
