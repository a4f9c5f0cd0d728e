"""Grouping: do the features' clusters match the classes?"""

from typing import Any

import numpy as np

from protoclip_lab.clustering import kmeans
from protoclip_lab.evaluation.arrays import as_features, as_labels


def grouping(features: Any, labels: Any, k: int | None = None, *, seed: int = 0) -> dict[str, float]:
    """Agreement of k-means clusters of the features, as given, with class labels: see :func:`agreement`.

    Args:
        features: (N, d).
        labels: (N,) of any kind.
        k: number of clusters; None takes the number of classes among ``labels``.

    Raises:
        ValueError: as :func:`agreement`, and k > N.
    """
    features = as_features(features, "features")
    labels = as_labels(labels, len(features), "labels")
    clusters = kmeans(features, k or len(np.unique(labels)), seed=seed)
    return agreement(clusters.labels, labels)


def agreement(assignments: Any, labels: Any) -> dict[str, float]:
    """Agreement of a clustering with class labels, whatever the clusters are called.

    Args:
        assignments: (N,) cluster of each item, of any kind.
        labels: (N,) class of each item, of any kind.

    Returns:
        "ARI" (adjusted Rand index), "AMI" and "NMI" (adjusted and normalised mutual information, arithmetic mean),
        "purity" (share of items that are of their cluster's commonest class). 1 is full agreement; ARI and AMI are
        0 on average for a random clustering, NMI and purity are not.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    from sklearn import metrics
    from sklearn.metrics.cluster import contingency_matrix

    rows = len(labels)
    if rows == 0:
        raise ValueError("no items to compare")
    found, known = (
        np.unique(as_labels(values, rows, name), return_inverse=True)[1]
        for values, name in ((assignments, "assignments"), (labels, "labels"))
    )
    return {
        "ARI": float(metrics.adjusted_rand_score(known, found)),
        "AMI": float(metrics.adjusted_mutual_info_score(known, found)),
        "NMI": float(metrics.normalized_mutual_info_score(known, found)),
        "purity": float(contingency_matrix(known, found).max(axis=0).sum() / rows),
    }
