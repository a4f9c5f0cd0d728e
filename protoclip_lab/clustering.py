"""K-means over an episode's features, and prototypical back translation: pure functions of features."""

from collections.abc import Iterator
from typing import NamedTuple

import faiss
import torch
from accelerate import PartialState, utils
from faiss.contrib.clustering import reassign_centroids
from torch import Tensor

from protoclip_lab.config import require
from protoclip_lab.randomness import derive, numpy_generator

# Distances held at once by the torch engine: 2**24 floats are 64 MiB.
BLOCK_ELEMENTS = 2**24


class Clusters(NamedTuple):
    """What k-means found."""

    labels: Tensor  # (N,) int64: nearest of `centroids`
    centroids: Tensor  # (K, d) float32
    sizes: Tensor  # (K,) int64
    objective: float  # sum of squared distances of the rows to their centroids


def kmeans(
    features: Tensor, k, *, iterations=20, restarts=1, seed=0, init=None, tolerance=0.0, balanced=False, engine="auto", share_above=None
) -> Clusters:
    """Euclidean k-means on the features as given, all rows used, best of several restarts.

    A centroid that loses its members takes over half of a large cluster (faiss's policy, kept by both
    engines), so empty clusters are rare but possible after the last update.

    Args:
        features: (N, d), computed in float32.
        k: number of clusters, an int, 1 ≤ k ≤ N.
        iterations: Lloyd iterations.
        restarts: independent starts, the one with the lowest objective is returned; 1 when ``init`` is given.
        seed: same seed and threads give the same bits on the CPU.
        init: (k, d) tensor of initial centroids; None draws k distinct rows.
        tolerance: stop before ``iterations`` when one lowers the objective by less than this share (faiss before
            1.15 knows none and makes them all).
        balanced: clusters of about one size by Sinkhorn's assignment, see :func:`balance`; then labels are not the
            nearest centroids, and the engine is "torch".
        engine: "faiss" (CPU, and GPUs with the GPU build), "torch" (blocked, on the features' device), or
            "auto": faiss, except on a GPU for which faiss has no build.
        share_above: an int, given by all processes of a group that call this at once, with the same features: where N·k is
            above it, each assigns a part of the rows in every iteration (by the engine "torch"); below, the first
            process clusters and the others receive. None is for one process alone.

    Returns:
        :class:`Clusters` on the features' device.

    Raises:
        ValueError: k > N, k < 1, NaN or Inf among the features.
    """
    features = torch.as_tensor(features).detach().float().contiguous()
    require(1 <= k <= len(features), f"k = {k} clusters cannot be made of {len(features)} rows")
    if len(bad := (~torch.isfinite(features).all(dim=1)).nonzero()):
        raise ValueError(f"row {int(bad[0])} of the features to cluster holds NaN or Inf: their model has diverged, take a lower lr")
    together = share_above is not None and PartialState().num_processes > 1
    shared = together and len(features) * k > share_above
    if balanced or shared or (engine == "auto" and features.is_cuda and not faiss.get_num_gpus()):
        engine = "torch"
    run = {"auto": _faiss_kmeans, "faiss": _faiss_kmeans, "torch": _torch_kmeans}[engine]
    how = {"balanced": balanced, "shared": shared} if engine == "torch" else {}
    labels, centroids = features.new_empty(len(features), dtype=torch.int64), features.new_empty(k, features.shape[1])
    if shared or not together or PartialState().is_main_process:
        labels, centroids = run(features, k, iterations, restarts if init is None else 1, seed, init, tolerance, **how)
    if together:
        labels, centroids = utils.broadcast([labels, centroids])
    return Clusters(labels, centroids, torch.bincount(labels, minlength=k), _objective(features, labels, centroids))


def back_translate(labels: Tensor, features: Tensor, k: int) -> Tensor:
    """Prototypical back translation: a teacher's clusters carried into the student's space.

    ``C[j] = mean of the features whose teacher label is j``, plain means, not normalised again.

    Args:
        labels: the teacher's cluster of each sample, (N,) int64 in [0, k).
        features: student features, (N, d).
        k: number of clusters.

    Returns:
        C, (k, d); rows of empty clusters are zeros.

    Source: ProtoCLIP (arXiv 2206.10996), PBT.
    """
    sums = features.new_zeros(k, features.shape[1]).index_add_(0, labels, features)
    return sums / torch.bincount(labels, minlength=k).clamp(min=1).unsqueeze(1)


def nearest(features: Tensor, centroids: Tensor, penalty: Tensor | None = None) -> Tensor:
    """Index of the nearest centroid (Euclidean) of each row: (N, d), (K, d) -> (N,) int64, in blocks.

    Args:
        penalty: (K,), added to half the squared distance to each centroid; infinite for one that takes no part.
    """
    return torch.cat([block.argmin(dim=1) for block in _half_distances(features, centroids, penalty)])


def balance(features: Tensor, centroids: Tensor, *, temperature: float = 0.05, rounds: int = 3) -> Tensor:
    """The penalties under which :func:`nearest` gives all centroids about equally many rows, (K,).

    Sinkhorn's iterations on ``exp(−|x − c|² / 2τ)``, its rows normalised, then its columns, as often as ``rounds``
    says; in blocks, so that no (N, K) tensor exists.

    Source: SwAV (arXiv 2006.09882), section 3.1 and its τ and rounds.
    """
    penalty = features.new_zeros(len(centroids))
    for _ in range(rounds):
        mass = sum(torch.softmax(block / -temperature, dim=1).sum(dim=0) for block in _half_distances(features, centroids, penalty))
        penalty = penalty + temperature * (mass.clamp(min=1e-30) * len(centroids) / len(features)).log()
    return penalty


def _half_distances(features: Tensor, centroids: Tensor, penalty: Tensor | None) -> Iterator[Tensor]:
    # Without |x|²/2, which is the same for all centroids.
    offsets = centroids.square().sum(dim=1) / 2 + (0 if penalty is None else penalty)
    for block in features.split(max(1, BLOCK_ELEMENTS // len(centroids))):
        yield torch.addmm(offsets, block, centroids.T, alpha=-1)


def _objective(features: Tensor, labels: Tensor, centroids: Tensor) -> float:
    # Not from the engines' own distances: those expand |x|² − 2x·c + |c|² and lose digits near a centroid.
    # Summed in float64 on the CPU: not every device has it.
    return float((features - centroids[labels]).square().sum(dim=1).cpu().double().sum())


def _faiss_kmeans(features: Tensor, k: int, iterations: int, restarts: int, seed: int, init: Tensor | None, tolerance: float) -> tuple:
    # faiss brings an OpenMP pool of its own, which would otherwise ignore the caller's thread setting.
    faiss.omp_set_num_threads(torch.get_num_threads())
    array = features.cpu().numpy()
    # All rows: faiss otherwise samples 256 for each centroid, and warns below 39 of them.
    all_rows = {"max_points_per_centroid": -(-len(array) // k), "min_points_per_centroid": 1}
    search = {"niter": iterations, "nredo": restarts, "gpu": features.is_cuda and faiss.get_num_gpus() > 0}
    if hasattr(faiss.ClusteringParameters, "early_stop_threshold"):
        search["early_stop_threshold"] = tolerance
    engine = faiss.Kmeans(array.shape[1], k, seed=derive(seed, "kmeans") % 2**31, **search, **all_rows)
    engine.train(array, init_centroids=None if init is None else init.detach().float().cpu().numpy())
    return tuple(torch.from_numpy(found).to(features.device) for found in (engine.assign(array)[1], engine.centroids))


def _torch_kmeans(features: Tensor, k, iterations, restarts, seed, init, tolerance, balanced=False, shared=False) -> tuple:
    own, total = slice(None), lambda found: found
    if shared:
        # Each process assigns its part of the rows; what is added up over all comes out with the same bits in each.
        state = PartialState()
        own = slice(*(len(features) * (state.process_index + i) // state.num_processes for i in range(2)))
        total = lambda found: utils.reduce(torch.as_tensor(found, device=features.device), "sum")  # noqa: E731
    rows, found = features[own], []

    def assign() -> Tensor:
        return nearest(rows, centroids, balance(features, centroids) if balanced else None)

    for restart in range(restarts):
        draws = numpy_generator(seed, "kmeans", restart)
        centroids = features[draws.permutation(len(features))[:k]] if init is None else init.to(features)
        objective = torch.inf
        for _ in range(iterations):
            labels = assign()
            before, objective = objective, float(total(_objective(rows, labels, centroids))) if tolerance else torch.inf
            if tolerance and objective > before * (1 - tolerance):
                break
            sizes = total(torch.bincount(labels, minlength=k))
            sums = total(features.new_zeros(k, features.shape[1]).index_add_(0, labels, rows))
            # An empty cluster takes half of one drawn in proportion to its size. On the host: faiss 1.8 does it for NumPy alone.
            means = (sums / sizes.clamp(min=1).unsqueeze(1)).cpu().numpy()
            reassign_centroids(sizes.cpu().numpy(), means, draws)
            centroids = torch.from_numpy(means).to(features.device)
        labels = features.new_zeros(len(features), dtype=torch.int64)
        labels[own] = assign()
        found.append((total(labels), centroids))
    return min(found, key=lambda labels_centroids: _objective(features, *labels_centroids))
