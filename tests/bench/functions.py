"""Back translation, prototype loss and k-means by themselves, and how their cost grows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip_lab import clustering, encoders, losses
from protoclip_lab.data.batches import Episodes
from protoclip_lab.randomness import torch_generator
from protoclip_lab.training import train

from . import data, measure

TEMPERATURE = 0.01  # of the internal teachers
SCALE = 1 / 0.07
KMEANS = "k-means, one iteration"  # and the assignment after it


def unit_rows(seed: int, name: str, *shape: int) -> Tensor:
    """Rows of length 1 in random directions."""
    return F.normalize(torch.randn(*shape, generator=torch_generator(seed, name)), dim=-1)


def textbook_back_translate(labels: Tensor, features: Tensor, k: int) -> Tensor:
    """Back translation as one writes it first: a pass over the labels for each cluster."""
    centroids = features.new_zeros(k, features.shape[1])
    for j in range(k):
        members = torch.where(labels == j)[0]
        if len(members):
            centroids[j] = features[members].mean(dim=0)
    return centroids


def back_translation(*, n: int = 200_000, k: int = 20_000, d: int = 128, rounds: int = 5, seed: int = 0) -> dict[str, Any]:
    """Ours, the textbook loop and one reading of the features, on one thread."""
    features = unit_rows(seed, "features", n, d)
    labels = torch.randint(k, (n,), generator=torch_generator(seed, "labels"))
    ours, textbook = clustering.back_translate, textbook_back_translate
    with measure.torch_threads(1):
        difference = float((ours(labels, features, k) - textbook(labels, features, k)).abs().max())
        calls = {"ours": lambda: ours(labels, features, k), "textbook": lambda: textbook(labels, features, k)}
        seconds = measure.in_turn(calls | {"read": features.sum}, rounds, warm_up=True)
    about = {"n": n, "k": k, "d": d, "threads": 1, "rounds": rounds, "seed": seed}
    return {"settings": about, "seconds": seconds, "largest_difference": difference}


def loss_cases(batch: int, k: int, d: int, seed: int, device: str = "cpu") -> dict[str, Callable[[], Tensor]]:
    """The prototype loss, ours and textbook, as a training step calls it: 1 % of the clusters are empty."""
    features, centroids, teachers = (unit_rows(seed, name, rows, d) for name, rows in (("h", batch), ("C", k), ("T", k)))
    occupied = torch.rand(k, generator=torch_generator(seed, "occupied")) > 0.01
    labels = occupied.nonzero()[:, 0][torch.randint(int(occupied.sum()), (batch,), generator=torch_generator(seed, "y"))]
    features, centroids, teachers, occupied, labels = (t.to(device) for t in (features, centroids, teachers, occupied, labels))
    # Once an episode and so no part of the step; here of the batch's clusters alone.
    soft = F.softmax(losses.masked(teachers[labels] @ teachers.T / TEMPERATURE, occupied), dim=1)
    targets = soft @ centroids
    scale = torch.tensor(SCALE, device=device, requires_grad=True)

    def ours() -> Tensor:
        return losses.prototype_loss(features.detach().requires_grad_(), centroids, targets, scale, occupied=occupied)

    def textbook() -> Tensor:
        h = features.detach().requires_grad_()
        return losses.prototype_loss_reference(h, centroids, teachers, labels, scale, TEMPERATURE, occupied=occupied)

    return {"ours": ours, "textbook": textbook}


def prototype_loss(
    *, batches: tuple[int, ...] = (64, 512, 4096), k: int = 20_000, d: int = 128, rounds: int = 5, seed: int = 0, device: str = "cpu"
) -> dict[str, Any]:
    """Seconds and peak memory of the loss, forward and backward, by batch size."""
    seconds, peaks, differences = {}, {}, {}
    for batch in batches:
        values = loss_cases(batch, k, d, seed, device)
        differences[str(batch)] = abs(float(values["ours"]().detach() - values["textbook"]().detach()))
        cases = {name: lambda value=value: value().backward() for name, value in values.items()}
        seconds[str(batch)] = measure.in_turn(cases, rounds)
        peaks[str(batch)] = {name: measure.peak_memory(case, device) for name, case in cases.items()}
    about = {"batches": batches, "k": k, "d": d, "threads": torch.get_num_threads(), "rounds": rounds, "seed": seed, "device": device}
    return {"settings": about, "seconds": seconds, "peak_bytes": peaks, "differences": differences}


def kmeans_chain(episodes: list[Tensor], k: int, rounds: int, tolerance: float, seed: int) -> list[dict[str, Any]]:
    """K-means of consecutive episodes, from nothing and from the centroids that the chain has so far."""
    centroids = clustering.kmeans(episodes[0], k, iterations=20, restarts=3, seed=seed).centroids
    found = []
    for number, features in enumerate(episodes[1:], 1):
        results: dict[str, clustering.Clusters] = {}

        def cluster(name: str, features: Tensor = features, results: dict = results, seed: int = seed + number, **how: Any) -> None:
            results[name] = clustering.kmeans(features, k, seed=seed, **how)

        cases = {
            "faithful": lambda cluster=cluster: cluster("faithful", iterations=20, restarts=3),
            "warm": lambda cluster=cluster, init=centroids: cluster("warm", init=init, iterations=20, tolerance=tolerance),
        }
        seconds = measure.in_turn(cases, rounds, warm_up=rounds > 1)
        warm = results["warm"]
        radius = (warm.objective / len(features)) ** 0.5
        moved = float((warm.centroids - centroids).norm(dim=1).median()) / radius
        objective = {name: clusters.objective for name, clusters in results.items()}
        found.append({"link": number, "seconds": seconds, "objective": objective, "moved_by_radii": moved})
        centroids = warm.centroids
    return found


def drifting(n: int, k: int, d: int, episodes: int, drift: float, seed: int) -> list[Tensor]:
    """Synthetic episodes: other samples each time of 2 k directions with noise of norm 1, which themselves move by ``drift``.

    The sizes of the groups fall as 1/√rank. Real features at a small size say how much drift is lifelike.
    """
    directions = unit_rows(seed, "directions", 2 * k, d)
    share = torch.arange(1, 2 * k + 1).rsqrt()
    found = []
    for episode in range(episodes):
        generator = torch_generator(seed, "episode", episode)
        group = torch.multinomial(share, n, replacement=True, generator=generator)
        found.append(F.normalize(directions[group] + torch.randn(n, d, generator=generator) / d**0.5, dim=1))
        directions = F.normalize(directions + drift * torch.randn(2 * k, d, generator=generator) / d**0.5, dim=1)
    return found


def training_features(folder: Path, size: int, episodes: int, seed: int) -> dict[str, list[Tensor]]:
    """Projected features of consecutive episodes, each by the model that would extract them, of a short training."""
    pairs = data.pairs(folder, episodes * size)
    config = data.settings(folder, pairs, seed=seed) | {"episodes": episodes - 1, "episode_size": size, "k": max(2, size // 10)}
    run = train(config | {"run": str(folder / "kmeans_run"), "save_every": 1})
    ids = Episodes(len(pairs), size, seed)
    found: dict[str, list[Tensor]] = {"image": [], "text": []}
    for checkpoint, episode in zip(run.checkpoints(), range(2, episodes + 1), strict=True):
        outputs = encoders.encode_pairs(encoders.load(checkpoint), pairs, ids.ids(episode))
        found["image"].append(outputs.image_projection)
        found["text"].append(outputs.text_projection)
    return found


def kmeans(
    *,
    size: int = 3000,
    ks: tuple[int, ...] = (200,),
    episodes: int = 6,
    early: int = 4,
    large: tuple[int, int] = (20_000, 2_000),
    huge: tuple[int, int] = (200_000, 20_000),
    d: int = 128,
    drift: float = 0.5,
    tolerance: float = 7.5e-3,
    rounds: int = 3,
    large_rounds: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Faithful k-means (20 iterations, three restarts) against warm-started: real features, and synthetic ones of a large size.

    Engines are compared at the paper's size, by one iteration each.

    Episode 1 is InfoNCE alone, so the chain begins in 2. Up to the episode ``early`` the heads have hardly learnt and
    features move far from one episode to the next: shown by themselves.
    """
    with data.work_folder() as folder:
        real = training_features(folder, size, episodes, seed)
        about_data = data.about(folder)
    cases: dict[str, list[dict[str, Any]]] = {}
    for k in ks:
        # The first link of a chain leads into episode 3.
        chains = [link for features in real.values() for link in kmeans_chain(features, k, rounds, tolerance, seed)]
        for first, last in ((3, early), (early + 1, episodes)):
            if found := [link for link in chains if first <= link["link"] + 2 <= last]:
                cases[f"N {size:,}, K {k:,}, image and text, episodes {first} to {last}"] = found
    n, k = large
    cases[f"N {n:,}, K {k:,}, synthetic"] = kmeans_chain(drifting(n, k, d, 3, drift, seed), k, large_rounds, tolerance, seed)
    features = unit_rows(seed, "features", huge[0], d)
    once = {
        engine: lambda engine=engine: clustering.kmeans(features, huge[1], iterations=1, engine=engine) for engine in ("faiss", "torch")
    }
    engines = measure.in_turn(once, 1, warm_up=False)
    about = {
        "size": size,
        "ks": ks,
        "episodes": episodes,
        "large": large,
        "huge": huge,
        "d": d,
        "drift": drift,
        "rounds": rounds,
        "seed": seed,
    }
    about |= {"faithful": {"iterations": 20, "restarts": 3}, "warm": {"iterations": 20, "tolerance": tolerance}, "early": early}
    about |= {"threads": torch.get_num_threads(), "data": about_data}
    return {"settings": about, "cases": cases, "engines": engines}


def growth(
    *, n: int = 200_000, k: int = 20_000, batch: int = 4096, d: int = 128, doublings: int = 3, rounds: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Seconds as N, K and the batch are doubled one at a time, the others at their largest."""
    steps = [2**-power for power in range(doublings, -1, -1)]
    features = unit_rows(seed, "features", n, d)
    curves: dict[str, dict[str, list]] = {}

    def add(curve: str, x: int, call: Callable[[], Any], times: int = rounds, warm_up: bool = True) -> None:
        points = curves.setdefault(curve, {"x": [], "seconds": []})
        points["x"].append(x)
        points["seconds"].append(measure.in_turn({"call": call}, times, warm_up=warm_up)["call"])

    def clusterings(axis: str, x: int, rows: int, clusters: int) -> None:
        part = features[:rows]
        labels = torch.randint(clusters, (rows,), generator=torch_generator(seed, "labels"))
        add(f"{axis}: back translation", x, lambda: clustering.back_translate(labels, part, clusters))
        # Half a minute at the largest: once, without a warm-up.
        once = lambda: clustering.kmeans(part, clusters, iterations=1, restarts=1, seed=seed)  # noqa: E731
        add(f"{axis}: {KMEANS}", x, once, times=1, warm_up=False)

    for share in steps:
        clusterings("N", int(n * share), int(n * share), k)
    for share in steps:
        clusters = int(k * share)
        clusterings("K", clusters, n, clusters)
        teacher, student = features[:clusters], features[-clusters:]
        add("K: expected prototypes", clusters, lambda t=teacher, s=student: losses.expected_prototypes(t, s, TEMPERATURE), times=1)
        loss = loss_cases(min(512, batch), clusters, d, seed)["ours"]
        add(f"K: loss, B {min(512, batch)}", clusters, lambda loss=loss: loss().backward())
    peaks: dict[str, list[int]] = {"ours": [], "textbook": []}
    for share in steps:
        for name, loss in loss_cases(int(batch * share), k, d, seed).items():
            add(f"B: loss, {name}", int(batch * share), lambda loss=loss: loss().backward())
            peaks[name].append(measure.peak_memory(lambda loss=loss: loss().backward()))
    about = {"n": n, "k": k, "batch": batch, "d": d, "threads": torch.get_num_threads(), "rounds": rounds, "seed": seed}
    return {"settings": about, "curves": curves, "kmeans": KMEANS, "loss_peak_bytes": peaks}
