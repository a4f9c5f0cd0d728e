"""Grouping: do the features' clusters match the classes, and do the classes lie apart?"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip_lab.clustering import kmeans
from protoclip_lab.evaluation.arrays import Estimate, as_features, as_labels, class_sums, estimate, mean
from protoclip_lab.randomness import numpy_generator

# Silhouettes need every distance: more items than this are sampled.
SILHOUETTE_ITEMS = 10_000
# Resamples of what has to be computed anew for each; means take as many as are asked for.
COSTLY_DRAWS = 200
LARGE_TABLE = 10_000


def grouping(features: Any, labels: Any, k: int | None = None, *, seed: int = 0, seeds: int = 1, draws: int = 0) -> dict[str, Estimate]:
    """Agreement of k-means clusters of the features, as given, with class labels: see :func:`agreement`.

    Args:
        features: (N, d).
        labels: (N,) of any kind.
        k: number of clusters; None takes the number of classes among ``labels``.
        seed: of k-means and of the resamples.
        seeds: k-means is run from ``seed``, ``seed + 1``, …, and values and intervals are means over them; with more
            than one, "ARI_sd" and so on tell the standard deviation between them.
        draws: resamples of the items for 95 % intervals.

    Raises:
        ValueError: as :func:`agreement`, and k > N.
    """
    features = as_features(features, "features")
    labels = as_labels(labels, len(features), "labels")
    runs = []
    for start in range(seed, seed + seeds):
        clusters = kmeans(features, len(np.unique(labels)) if k is None else k, seed=start)
        runs.append(agreement(clusters.labels, labels, draws=draws, seed=seed))
    found = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        found[name] = mean(values)
        if seeds > 1:
            found[f"{name}_sd"] = Estimate(np.std(values, ddof=1))
    return found


def agreement(assignments: Any, labels: Any, *, draws: int = 0, seed: int = 0) -> dict[str, Estimate]:
    """Agreement of a clustering with class labels, whatever the clusters are called.

    Args:
        assignments: (N,) cluster of each item, of any kind.
        labels: (N,) class of each item, of any kind.
        draws, seed: resamples of the items for 95 % intervals, see :func:`~protoclip_lab.evaluation.arrays.estimate`.

    Returns:
        "ARI" (adjusted Rand index), "AMI" and "NMI" (adjusted and normalised mutual information, arithmetic mean),
        "purity" (share of items that are of their cluster's commonest class). 1 is full agreement; ARI and AMI are
        0 on average for a random clustering, NMI and purity are not.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    rows = len(labels)
    if rows == 0:
        raise ValueError("no items to compare")
    clusters, found = np.unique(as_labels(assignments, rows, "assignments"), return_inverse=True)
    classes, known = np.unique(as_labels(labels, rows, "labels"), return_inverse=True)
    cells = torch.from_numpy(known * len(clusters) + found)
    shape = len(classes), len(clusters)

    # Of very many cells chance agreement takes seconds: resamples, whose margins hardly differ, then share it.
    everything = class_sums(torch.ones(1, rows, dtype=torch.float64), cells, math.prod(shape)).reshape(shape).numpy()
    expected = _by_chance(everything) if everything.size > LARGE_TABLE else None

    def under(weights: Tensor) -> dict[str, Tensor]:
        tables = (class_sums(row[None], cells, math.prod(shape)).reshape(shape).numpy() for row in weights)
        scores = [_scores(table, expected) for table in tables]
        return {name: torch.tensor([s[name] for s in scores], dtype=torch.float64) for name in scores[0]}

    found = estimate(under, rows, min(draws, COSTLY_DRAWS), seed, centred=True)
    return {name: Estimate(value, value.low, min(value.high, 1.0)) for name, value in found.items()}


def _by_chance(table: np.ndarray) -> float:
    """Expected mutual information of a random clustering with the same margins."""
    from scipy.sparse import csr_array
    from sklearn.metrics.cluster import expected_mutual_information

    return expected_mutual_information(csr_array(table), int(table.sum()))


def _entropy(counts: np.ndarray) -> float:
    shares = counts / counts.sum()
    return -(shares * np.log(shares)).sum()


def _scores(table: np.ndarray, expected: float | None = None) -> dict[str, float]:
    """Agreement from a contingency table (classes, clusters), as scikit-learn has it from labels."""
    # A resample may lack a class or a cluster.
    table = table[table.any(axis=1)][:, table.any(axis=0)]
    total, rows, columns = table.sum(), table.sum(axis=1), table.sum(axis=0)
    purity = table.max(axis=0).sum() / total
    if np.count_nonzero(table) == len(rows) == len(columns):
        # The same groups under other names: 1 in the limit too, where 0/0 would stand.
        return {"ARI": 1.0, "AMI": 1.0, "NMI": 1.0, "purity": purity}
    pairs, row_pairs, column_pairs = (np.sum(x * (x - 1)) / 2 for x in (table, rows, columns))
    by_chance = row_pairs * column_pairs / (total * (total - 1) / 2)
    apart, together = _entropy(rows) + _entropy(columns), _entropy(table[table > 0])
    mutual, uncertainty = max(0.0, apart - together), apart / 2
    expected = _by_chance(table) if expected is None else expected
    spare = uncertainty - expected
    return {
        "ARI": (pairs - by_chance) / ((row_pairs + column_pairs) / 2 - by_chance),
        "AMI": (mutual - expected) / (spare if abs(spare) > 1e-15 else math.copysign(1e-15, spare)),
        "NMI": mutual / uncertainty,
        "purity": purity,
    }


def separation(features: Any, labels: Any, *, draws: int = 0, seed: int = 0) -> dict[str, Estimate]:
    """How far apart the classes themselves lie in feature space, without any clustering.

    Args:
        features: (N, d), taken as given by the three indices, L2-normalised by the similarities.
        labels: (N,) of any kind.
        draws, seed: resamples of the items for 95 % intervals, see :func:`~protoclip_lab.evaluation.arrays.estimate`.

    Returns:
        - "silhouette" (−1 to 1, of 10,000 items drawn by ``seed`` where there are more), "davies_bouldin" (0 is best),
          "calinski_harabasz" (more is better), Euclidean, as scikit-learn has them; NaN for one class or one item a
          class;
        - "within_similarity", "between_similarity": mean cosine over pairs of different items of one class, of
          two; "similarity_ratio": the first over the second. NaN where there is no such pair.

    Raises:
        ValueError: shapes that do not fit; NaN or Inf.
    """
    from sklearn import metrics

    x = as_features(features, "features").cpu()
    classes, y = np.unique(as_labels(labels, len(x), "labels"), return_inverse=True)
    sphere, index = F.normalize(x.double(), dim=1), torch.from_numpy(y)

    def similarities(weights: Tensor) -> dict[str, Tensor]:
        sums = torch.zeros(len(classes), x.shape[1], dtype=torch.float64)
        in_class = torch.stack([sums.index_add(0, index, row[:, None] * sphere).square().sum() for row in weights])
        # Ordered pairs; an item and its copies in a resample are none.
        squares = class_sums(weights, index, len(classes)).square().sum(dim=1)
        copies, everything = weights.square().sum(dim=1), weights.sum(dim=1).square()
        same = in_class - weights.square() @ sphere.square().sum(dim=1)
        other = (weights @ sphere).square().sum(dim=1) - in_class
        within = torch.where(squares > copies, same / (squares - copies), torch.nan)
        between = torch.where(everything > squares, other / (everything - squares), torch.nan)
        return {"within_similarity": within, "between_similarity": between, "similarity_ratio": within / between}

    def under(weights: Tensor) -> dict[str, Tensor]:
        found = similarities(weights)
        for name in ("davies_bouldin", "calinski_harabasz"):
            resamples = (np.repeat(np.arange(len(x)), row.int()) for row in weights)
            found[name] = torch.tensor([_index(getattr(metrics, f"{name}_score"), x.numpy()[r], y[r]) for r in resamples])
        return found

    found = estimate(under, len(x), min(draws, COSTLY_DRAWS), seed, centred=True)
    sample = numpy_generator(seed, "silhouette").permutation(len(x))[:SILHOUETTE_ITEMS]
    sample.sort()  # in the items' order, so that draws pair with those of the other measures
    values = torch.from_numpy(np.asarray(_index(metrics.silhouette_samples, x.numpy()[sample], y[sample]))).double()
    values = values.expand(len(sample))  # NaN where it is not defined
    return estimate(lambda w: {"silhouette": w @ values / w.sum(dim=1)}, len(sample), draws, seed) | found


def _index(score: Callable, x: np.ndarray, y: np.ndarray) -> Any:
    """A score that scikit-learn defines from two classes on, one of them of several items; else NaN."""
    return score(x, y) if 1 < len(np.unique(y)) < len(y) else np.nan
