"""Grouping: do the features' clusters match the classes, and do the classes lie apart?"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from protoclip_lab.clustering import kmeans
from protoclip_lab.evaluation.arrays import Estimate, Estimates, as_features, as_labels, estimate, mean, pair_cosines, ratio, resampled
from protoclip_lab.randomness import numpy_generator

# Silhouettes need every distance: more items than this are sampled.
SILHOUETTE_ITEMS = 10_000
# Resamples of what has to be computed anew for each; means take as many as are asked for.
COSTLY_DRAWS = 100
# Of so many (class, cluster) cells chance agreement takes seconds: fewer resamples have to do.
LARGE_TABLE, LARGE_DRAWS = 100_000, 20


def grouping(features: Any, labels: Any, k: int | None = None, *, seed: int = 0, seeds: int = 1, draws: int = 0) -> Estimates:
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
    k = len(np.unique(as_labels(labels, len(features), "labels"))) if k is None else k
    runs = [agreement(kmeans(features, k, seed=start).labels, labels, draws=draws, seed=seed) for start in range(seed, seed + seeds)]
    spread = {f"{name}_sd": Estimate(np.std([run[name] for run in runs], ddof=1)) for name in runs[0]} if seeds > 1 else {}
    return mean(runs) | spread


def agreement(assignments: Any, labels: Any, *, draws: int = 0, seed: int = 0) -> Estimates:
    """Agreement of a clustering with class labels, whatever the clusters are called.

    Args:
        assignments: (N,) cluster of each item, of any kind.
        labels: (N,) class of each item, of any kind.
        draws, seed: resamples of the items for 95 % intervals, see :func:`~protoclip_lab.evaluation.arrays.estimate`; at
            most 100, and 20 where classes times clusters are more than 100,000.

    Returns:
        "ARI" (adjusted Rand index), "AMI" and "NMI" (adjusted and normalised mutual information, arithmetic mean),
        "purity" (share of items that are of their cluster's commonest class). 1 is full agreement; ARI and AMI are
        0 on average for a random clustering, NMI and purity are not.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    rows = len(labels)
    found = np.unique(as_labels(assignments, rows, "assignments"), return_inverse=True)[1]
    known = np.unique(as_labels(labels, rows, "labels"), return_inverse=True)[1]
    scores = {"ARI": adjusted_rand_score, "AMI": adjusted_mutual_info_score, "NMI": normalized_mutual_info_score}
    scores["purity"] = lambda *pair: contingency_matrix(*pair).max(axis=0).sum() / rows

    def under(weights: Tensor) -> dict[str, Tensor]:
        pairs = [(known[resample], found[resample]) for resample in resampled(weights)]
        return {name: torch.from_numpy(np.array([score(*pair) for pair in pairs])) for name, score in scores.items()}

    draws = min(draws, LARGE_DRAWS if (known.max() + 1) * (found.max() + 1) > LARGE_TABLE else COSTLY_DRAWS)
    values = estimate(under, rows, draws, seed, centred=True)
    return {name: Estimate(value, value.low, min(value.high, 1.0)) for name, value in values.items()}


def separation(features: Any, labels: Any, *, draws: int = 0, seed: int = 0) -> Estimates:
    """How far apart the classes themselves lie in feature space, without any clustering.

    Args:
        features: (N, d), taken as given by the three indices, L2-normalised by the similarities.
        labels: (N,) of any kind.
        draws, seed: resamples of the items for 95 % intervals, see :func:`~protoclip_lab.evaluation.arrays.estimate`; at
            most 100 but for the silhouette.

    Returns:
        - "silhouette" (−1 to 1, of 10,000 items drawn by ``seed`` where there are more), "davies_bouldin" (0 is best),
          "calinski_harabasz" (more is better), Euclidean, as scikit-learn has them; NaN for one class or one item a
          class;
        - "within_similarity", "between_similarity": mean cosine over pairs of different items of one class, of
          two; "similarity_ratio": the first over the second. NaN where there is no such pair.

    Raises:
        ValueError: shapes that do not fit; NaN or Inf.
    """
    x = as_features(features, "features").cpu()
    classes, y = np.unique(as_labels(labels, len(x), "labels"), return_inverse=True)
    sphere = torch.nn.functional.normalize(x.double(), dim=1)

    def under(weights: Tensor) -> dict[str, Tensor]:
        same = sum(pair_cosines(sphere[y == c], weights[:, y == c]) for c in range(len(classes)))
        within, between = ratio(*same), ratio(*(pair_cosines(sphere, weights) - same))
        found = {"within_similarity": within, "between_similarity": between, "similarity_ratio": within / between}
        for name in ("davies_bouldin", "calinski_harabasz"):
            found[name] = torch.tensor([_index(f"{name}_score", x.numpy()[r], y[r]) for r in resampled(weights)])
        return found

    found = estimate(under, len(x), min(draws, COSTLY_DRAWS), seed, centred=True)
    # In the items' order, so that draws pair with those of the other measures; one NaN for all where it is not defined.
    sample = np.sort(numpy_generator(seed, "silhouette").permutation(len(x))[:SILHOUETTE_ITEMS])
    values = torch.tensor(_index("silhouette_samples", x.numpy()[sample], y[sample])).double().expand(len(sample))
    return estimate(lambda w: {"silhouette": w @ values / w.sum(dim=1)}, len(sample), draws, seed) | found


def _index(score: str, x: np.ndarray, y: np.ndarray) -> Any:
    """A score that scikit-learn defines from two classes on, one of them of several items; else NaN."""
    from sklearn import metrics

    return getattr(metrics, score)(x, y) if 1 < len(np.unique(y)) < len(y) else np.nan
