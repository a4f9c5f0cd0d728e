"""Grouping against written-out formulas."""

from math import comb, log

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_mutual_info_score

from protoclip_lab.clustering import kmeans
from protoclip_lab.evaluation import agreement, grouping


def reference(found, known):
    table = np.array([[np.sum((found == c) & (known == y)) for y in np.unique(known)] for c in np.unique(found)])
    rows, a, b = len(known), table.sum(axis=1), table.sum(axis=0)
    same = sum(comb(int(n), 2) for n in table.flat)
    same_a, same_b = (sum(comb(int(n), 2) for n in sizes) for sizes in (a, b))
    expected = same_a * same_b / comb(rows, 2)
    information = sum(
        table[i, j] / rows * log(table[i, j] * rows / (a[i] * b[j]))
        for i in range(len(a))
        for j in range(len(b))
        if table[i, j]
    )
    entropy = [-sum(n / rows * log(n / rows) for n in sizes) for sizes in (a, b)]
    return {
        "ARI": (same - expected) / ((same_a + same_b) / 2 - expected),
        "AMI": adjusted_mutual_info_score(found, known),
        "NMI": information / np.mean(entropy),
        "purity": sum(row.max() for row in table) / rows,
    }


def test_agreement_equals_formulas_and_ignores_names():
    rng = np.random.default_rng(0)
    known = rng.integers(0, 4, 200)
    found = np.where(rng.random(200) < 0.6, known, rng.integers(0, 6, 200))
    expected = reference(found, known)
    assert agreement(found, known) == pytest.approx(expected, abs=1e-9)
    words = np.array(["d", "a", "c", "b"])[known]
    assert agreement(torch.from_numpy(5 - found), words) == pytest.approx(expected, abs=1e-9)


def test_one_class_in_one_cluster_agrees_fully():
    assert agreement([0, 0, 0], ["x", "x", "x"]) == {"ARI": 1, "AMI": 1, "NMI": 1, "purity": 1}


def test_one_cluster_of_two_classes_says_nothing():
    found = agreement([7, 7, 7, 7], [0, 0, 0, 1])
    assert found == pytest.approx({"ARI": 0, "AMI": 0, "NMI": 0, "purity": 0.75})


def test_clusters_of_blobs_are_their_classes():
    features, labels = make_blobs(300, centers=np.eye(5)[:4] * 9, random_state=0)
    assert grouping(features, labels) == pytest.approx({"ARI": 1, "AMI": 1, "NMI": 1, "purity": 1})


def test_grouping_is_agreement_of_the_clusters_of_that_seed():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(200, 4)).astype(np.float32), rng.integers(0, 5, 200)
    for k in (None, 8):
        clusters = kmeans(torch.from_numpy(features), k or 5, seed=3)
        assert grouping(features, labels, k, seed=3) == agreement(clusters.labels, labels)


def test_constant_features_group_nothing():
    found = grouping(np.ones((12, 3)), [0, 1, 2] * 4)
    assert found["ARI"] == pytest.approx(0, abs=1e-9)


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match="assignments has shape"):
        agreement([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="no items"):
        agreement([], [])
    with pytest.raises(ValueError, match="k = 4"):
        grouping(np.eye(3), [0, 1, 2], 4)
