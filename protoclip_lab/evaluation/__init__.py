"""Measures of image and text features: pure functions here, run over whole data sets by ``evaluation.suite``.

Images against texts (zero-shot classification, retrieval, the modality gap), then the features of one modality and
their classes (probes learnt on train and counted on test, clusters, separation).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip_lab.clustering import BLOCK_ELEMENTS, kmeans
from protoclip_lab.config import require
from protoclip_lab.encoders import best_device
from protoclip_lab.randomness import numpy_generator, torch_generator

DEPTHS = (1, 5, 10)
# Equal features can differ by a few float32 roundings, depending on where a matrix product's tiles fall.
TIE = 1e-6
# Kept by the gap sweep.
SWEPT = ("top1", "mean_recall", "image_to_text_R@1", "text_to_image_R@1")
# L2 strengths to choose from, strongest first, so that each fit starts from the one before it.
STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# Up to so many numbers (4,000 rows of 1,024) the fit is in float64, whose line search comes closer to the minimum.
DOUBLE_ELEMENTS = 2**22
# Resamples of what has to be computed anew for each; means take as many as are asked for.
COSTLY_DRAWS = 100
# Of so many (class, cluster) cells chance agreement takes seconds: fewer resamples have to do.
LARGE_TABLE, LARGE_DRAWS = 100_000, 20


def as_features(values: Any, name: str, *, normalise: bool = False) -> Tensor:
    """A NumPy array or tensor of one row per item -> (N, d) float32, on its device; float32 is not copied.

    Raises:
        ValueError: not two-dimensional, no rows, or NaN or Inf, with the first such row.
    """
    values = np.require(values, requirements="W") if isinstance(values, np.ndarray) else values  # torch warns of read-only memory
    features = torch.as_tensor(values).detach().float()
    require(features.ndim == 2 and features.numel(), f"{name} has shape {[*features.shape]}: rows and dimensions are needed")
    if len(bad := (~features.isfinite().all(dim=1)).nonzero()):
        raise ValueError(f"{name} has NaN or Inf, first in row {int(bad[0])}: unreadable, or the model has diverged")
    return F.normalize(features, dim=1) if normalise else features


def as_labels(values: Any, rows: int, name: str, *, below: int | None = None) -> np.ndarray:
    """Labels of any kind, or whole numbers from 0 to ``below`` - 1 -> (rows,) array.

    Raises:
        ValueError: there is not one for each row, or no such number, with the first such row.
    """
    labels = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    require(labels.shape == (rows,), f"{name} has shape {labels.shape}, its features have {rows} rows: one label a row is needed")
    if below and len(wrong := np.flatnonzero(~np.isin(labels, np.arange(below)))):
        raise ValueError(f"{name} is {labels[wrong[0]]} in row {wrong[0]}: expected whole numbers from 0 to {below - 1}")
    return labels


def as_pairs(image: Any, text: Any, image_of_caption: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Features of images and texts, L2-normalised, and the image of each text, (M,) int64; None pairs row with row.

    Raises:
        ValueError: not one image for each text, naming both numbers; an index outside ``image``; NaN or Inf.
        RuntimeError: features of another width, from torch.
    """
    image, text = as_features(image, "image", normalise=True), as_features(text, "text", normalise=True)
    pairs = range(len(image)) if image_of_caption is None else image_of_caption
    return image, text, torch.as_tensor(as_labels(pairs, len(text), "image_of_caption", below=len(image)), device=image.device).long()


class Estimate(float):
    """A value with the 95 % interval of a bootstrap over test items; a float wherever one is wanted.

    Attributes:
        low, high: the interval; NaN where none was asked for.
    """

    def __new__(cls, value: float, low: float = np.nan, high: float = np.nan) -> "Estimate":
        estimate = super().__new__(cls, value)
        estimate.low, estimate.high = float(low), float(high)
        return estimate


Estimates = dict[str, Estimate]


def mean(found: Sequence[Estimates]) -> Estimates:
    """By name the mean of values, and of both ends of their intervals."""
    ends = {name: [[each[name], each[name].low, each[name].high] for each in found] for name in found[0]}
    return {name: Estimate(*np.mean(values, axis=0)) for name, values in ends.items()}


def estimate(under: Callable[[Tensor], dict[str, Tensor]], items: int, draws: int, seed: int, *, centred: bool = False) -> Estimates:
    """Values of a measure, with percentile intervals over resamples of its items.

    Args:
        under: (B, items) float64 weights, how often each item counts -> a (B,) tensor for the name of each value.
        draws: number of resamples; 0 makes no intervals.
        seed: of the resamples, the same for every measure of as many items.
        centred: for what is no plain mean: a resample repeats items, and so moves it (two clusterings seem to agree
            better). The percentiles are then moved back by the distance of the draws' mean from the value.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 10 and 13.
    """
    found = {name: Estimate(value) for name, value in under(torch.ones(1, items, dtype=torch.float64)).items()}
    generator, blocks = torch_generator(seed, "bootstrap"), []
    size = max(1, BLOCK_ELEMENTS // items)
    for start in range(0, draws, size):
        picked = torch.randint(items, (min(size, draws - start), items), generator=generator)
        blocks.append(under(torch.stack([row.bincount(minlength=items) for row in picked]).double()))
    for name, value in found.items() if draws else ():
        drawn = torch.cat([block[name] for block in blocks]).double()
        edges = drawn.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        low, high = (edges + (value - drawn.nanmean() if centred else 0)).tolist()
        found[name] = Estimate(value, min(low, value), max(high, value))  # a constant one may miss the value by a rounding
    return found


def resampled(weights: Tensor) -> list[np.ndarray]:
    """The rows of each resample, one as often as it counts: (B, N) -> B arrays."""
    return [np.repeat(np.arange(len(row)), row.int()) for row in weights]


def class_sums(values: Tensor, classes: Any, count: int) -> Tensor:
    """Columns added up by class, or captions by image: (B, N), (N,) int64 -> (B, count)."""
    return values.new_zeros(len(values), count).index_add_(1, torch.as_tensor(classes), values)


def pair_cosines(sphere: Tensor, weights: Tensor) -> Tensor:
    """Sum of the cosines, and number, of ordered pairs of different items; an item and its copies are none.

    (N, d) L2-normalised, (B, N) how often each counts -> (2, B).
    """
    # The squared norm of the sum holds every ordered pair once, and each item with itself and its copies.
    cosines = (weights @ sphere).square().sum(dim=1) - weights.square() @ sphere.square().sum(dim=1)
    return torch.stack([cosines, weights.sum(dim=1).square() - weights.square().sum(dim=1)])


def ratio(sums: Tensor, counts: Tensor) -> Tensor:
    """Means of what is counted; NaN where nothing is."""
    return torch.where(counts > 0, sums / counts, torch.nan)


def accuracy(correct: Mapping[str, np.ndarray], labels: np.ndarray, draws: int, seed: int) -> Estimates:
    """Percent correct by name, and the first's "mean_per_class": averaged over the classes among ``labels``.

    Args:
        correct: (N,) by name, bool or a share.
        labels: (N,) of any kind.
        draws, seed: see :func:`estimate`.
    """
    classes, index = np.unique(labels, return_inverse=True)
    hits = {name: torch.from_numpy(values).double() for name, values in correct.items()}

    def under(weights: Tensor) -> dict[str, Tensor]:
        shares = {name: 100 * (weights @ values) / weights.sum(dim=1) for name, values in hits.items()}
        per_class = class_sums(weights * next(iter(hits.values())), index, len(classes)) / class_sums(weights, index, len(classes))
        return {**shares, "mean_per_class": 100 * per_class.nanmean(dim=1)}

    return estimate(under, len(labels), draws, seed)


def classifier(encode_text: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """One direction a class: its name in each template, averaged in feature space and normalised again.

    Args:
        encode_text: n texts -> (n, d), L2-normalised.
        class_names: C names.
        templates: texts with ``{}`` where the name goes, see :func:`protoclip_lab.data.downstream.listed`.

    Returns:
        (d, C) float32, as open_clip.build_zero_shot_classifier gives it.
    """
    features = encode_text([template.replace("{}", name) for name in class_names for template in templates])
    means = features.float().reshape(len(class_names), len(templates), -1).mean(dim=1)
    return F.normalize(means, dim=1).T


def zero_shot(image: Any, classifier: Any, labels: Any, *, draws: int = 0, seed: int = 0) -> Estimates:
    """Accuracy of the nearest class by cosine, in percent.

    Args:
        image: (N, d).
        classifier: (d, C), a column a class.
        labels: (N,) whole numbers, 0 to C - 1.
        draws, seed: resamples of the images for 95 % intervals, see :func:`~protoclip_lab.evaluation.estimate`.

    Returns:
        "top1"; "top5" (all classes where there are fewer than five, so 100); "mean_per_class": top-1 averaged
        over the classes that have an image.

    Raises:
        ValueError: a label missing or out of range; NaN or Inf.
        RuntimeError: features of another width, from torch.
    """
    image = as_features(image, "image", normalise=True)
    classifier = F.normalize(as_features(classifier, "classifier"), dim=0)
    classes = classifier.shape[1]
    labels = as_labels(labels, len(image), "labels", below=classes)
    top = [(block @ classifier).topk(min(5, classes)).indices for block in image.split(max(1, BLOCK_ELEMENTS // classes))]
    correct = torch.cat(top).cpu().numpy() == labels[:, None]
    return accuracy({"top1": correct[:, 0], "top5": correct.any(axis=1)}, labels, draws, seed)


def retrieval(image: Any, text: Any, image_of_caption: Any, *, draws: int = 0, seed: int = 0) -> Estimates:
    """Recall at 1, 5 and 10, both ways, by cosine, in percent.

    A caption finds its image, an image any of its captions, among the first k. A tie counts against the model:
    a wrong item with the same score (to 1e-6) ranks first. Scores are made in blocks and counted, never sorted.

    Args:
        image: (N, d), one row for each distinct image.
        text: (M, d).
        image_of_caption: (M,) row of ``image`` that each caption belongs to. An image without captions is a
            candidate, but asks for none.
        draws, seed: resamples of the images, each with its captions, for 95 % intervals; the candidates stay as they
            are. See :func:`~protoclip_lab.evaluation.estimate`.

    Returns:
        "image_to_text_R@1", "…@5", "…@10", "text_to_image_R@1", "…@5", "…@10", and "mean_recall", the mean of the six.

    Raises:
        ValueError: not one image for each text, naming both numbers; an index outside ``image``; NaN or Inf.
        RuntimeError: features of another width, from torch.
    """
    image, text, owner = as_pairs(image, text, image_of_caption)
    own_score = (image[owner] * text).sum(dim=1)
    # Infinite where an image has no caption.
    best_own = own_score.new_full((len(image),), torch.inf).scatter_reduce(0, owner, own_score, "amax", include_self=False)
    # Wrong items that rank before the right one.
    before_image, before_text = (torch.zeros_like(scores, dtype=torch.int64) for scores in (best_own, own_score))
    for rows in torch.arange(len(image), device=image.device).split(max(1, BLOCK_ELEMENTS // len(text))):
        scores = image[rows] @ text.T
        scores[rows[:, None] == owner] = -torch.inf
        before_image[rows] = (scores >= best_own[rows, None] - TIE).sum(dim=1)
        before_text += (scores >= own_score - TIE).sum(dim=0)
    owner, depths = owner.cpu(), torch.tensor(DEPTHS)
    captions = class_sums(torch.ones(1, len(text), dtype=torch.float64), owner, len(image))[0]
    asking = (captions > 0).double()
    # By image, (N, 3) and (N,): is its caption found at each depth, and how many of its captions find it; how many ask.
    to_text = (before_image.cpu()[:, None] < depths) * asking[:, None], asking
    to_image = class_sums((before_text.cpu() < depths[:, None]).double(), owner, len(image)).T, captions
    names = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in DEPTHS]

    def under(weights: Tensor) -> dict[str, Tensor]:
        recalls = torch.cat([100 * (weights @ found) / (weights @ asked)[:, None] for found, asked in (to_text, to_image)], dim=1)
        return {**dict(zip(names, recalls.T, strict=True)), "mean_recall": recalls.mean(dim=1)}

    return estimate(under, len(image), draws, seed)


def modality_gap(image: Any, text: Any, *, image_of_caption: Any = None, draws: int = 0, seed: int = 0) -> Estimates:
    """How far images and texts lie apart, and how far each spreads. Features are L2-normalised first.

    Args:
        image: (N, d).
        text: (M, d); M = N unless ``image_of_caption`` is given.
        image_of_caption: (M,) row of ``image`` that each caption belongs to; None pairs row with row.
        draws, seed: resamples of the images, each with its captions, for 95 % intervals, see
            :func:`~protoclip_lab.evaluation.estimate`.

    Returns:
        - "gap": Euclidean distance of the two means.
        - "image_self_similarity", "text_self_similarity": mean cosine over all pairs of different items; the sign
          is kept. NaN for a single item.
        - "pair_similarity": mean cosine of the true pairs.
        - "image_std", "text_std": standard deviation of a dimension, averaged over dimensions.

    Raises:
        ValueError: not one image for each text, naming both numbers; NaN or Inf.
        RuntimeError: features of another width, from torch.

    Source: Liang et al., "Mind the Gap", NeurIPS 2022 (arXiv 2203.02053).
    """
    image, text, owner = (part.cpu() for part in as_pairs(image, text, image_of_caption))
    image, text = image.double(), text.double()
    cosines = (image[owner] * text).sum(dim=1)

    def under(weights: Tensor) -> dict[str, Tensor]:
        found, means = {}, []
        for name, x, times in (("image", image, weights), ("text", text, weights[:, owner])):
            items = times.sum(dim=1, keepdim=True)
            means.append(times @ x / items)
            found[f"{name}_self_similarity"] = ratio(*pair_cosines(x, times))
            found[f"{name}_std"] = (times @ x.square() / items - means[-1].square()).clamp(min=0).sqrt().mean(dim=1)
        found["pair_similarity"] = times @ cosines / items[:, 0]
        return {"gap": (means[0] - means[1]).norm(dim=1), **found}

    return estimate(under, len(image), draws, seed, centred=True)


def separability(image: Any, text: Any, *, image_of_caption: Any = None, draws: int = 0, seed: int = 0) -> Estimates:
    """How well a hyperplane tells images from texts, in percent; 50 is chance.

    A linear probe learns on half of the images and the first caption of each, and is asked about the other half.

    Args and errors as :func:`modality_gap`. Returns "separability"; NaN for fewer than two images with captions.
    """
    image, text, owner = as_pairs(image, text, image_of_caption)
    images, first = np.unique(owner.cpu().numpy(), return_index=True)
    order = numpy_generator(seed, "separability").permutation(len(images))
    both = torch.stack([image[images[order]], text[first[order]]], dim=1).flatten(0, 1)
    sides, half = np.tile(["image", "text"], len(order)), len(order) // 2 * 2
    if not half:
        return {"separability": Estimate(np.nan)}
    return {"separability": linear_probe(both[:half], sides[:half], both[half:], sides[half:], draws=draws, seed=seed)["accuracy"]}


def gap_sweep(image: Any, text: Any, measure: Callable[[Tensor, Tensor], Estimates]) -> Estimates:
    """What zero-shot or retrieval gives with the modalities moved along the gap towards each other, and normalised again.

    Args:
        image, text: (N, d), (M, d); L2-normalised first.
        measure: (image, text) -> values; those named in ``SWEPT`` are kept.

    Returns:
        Names such as "mean_recall@+0.25": brought together by a quarter of the gap. At 1 the means meet (before
        normalising), at -1 the gap is twice as wide.

    Source: Liang et al., "Mind the Gap", NeurIPS 2022 (arXiv 2203.02053), section 4.
    """
    image, text = as_features(image, "image", normalise=True), as_features(text, "text", normalise=True)
    steps = {share: share / 2 * (image.mean(dim=0) - text.mean(dim=0)) for share in np.linspace(-1, 1, 9).tolist()}
    found = {share: measure(F.normalize(image - step, dim=1), F.normalize(text + step, dim=1)) for share, step in steps.items()}
    return {f"{name}@{share:+.2f}": v for share, values in found.items() for name, v in values.items() if name in SWEPT}


def linear_probe(train_x, train_y, test_x, test_y, *, seed: int = 0, scaling: str = "standardise", draws: int = 0) -> Estimates:
    """Multinomial logistic regression on frozen features, counted on test.

    Minimises ``mean cross-entropy + strength/2 · ‖W‖²`` (the intercept is free) by L-BFGS, on a GPU where there is
    one. The strength is chosen by accuracy on a random fifth of train (the strongest of equals), then all of train is
    fitted; test takes no part, not even in mean and standard deviation. On N rows scikit-learn's C is
    ``1 / (N · strength)``, twice that for two classes. Copies of ``train_x`` (three at once) are
    float32 unless it is small.

    Args:
        train_x, test_x: (N, d), (M, d).
        train_y, test_y: (N,), (M,) labels of any one kind. A class that train lacks is never predicted.
        seed: of the split of train and of the resamples.
        scaling: "standardise" gives each dimension mean 0 and standard deviation 1 on train, "l2" each row norm 1.
        draws: resamples of test for 95 % intervals, see :func:`~protoclip_lab.evaluation.estimate`.

    Returns:
        "accuracy" and "mean_per_class" (over classes in test), percent; "strength", the one chosen.

    Raises:
        ValueError: a label missing; NaN or Inf; an unknown scaling.
        RuntimeError: features of another width, from torch.
    """
    require(scaling in ("standardise", "l2"), f"scaling {scaling!r} is neither 'standardise' nor 'l2'")
    x, y, classes, test_x, test_y = _checked(train_x, train_y, test_x, test_y, normalise=scaling == "l2")
    if x.numel() <= DOUBLE_ELEMENTS:
        x, test_x = x.double(), test_x.double()
    if scaling == "standardise":
        mean, scale = x.mean(dim=0), x.std(dim=0, correction=0)
        # A constant feature's deviation is rounding, which standardising would blow up.
        scale[scale <= 1e-6 * mean.abs()] = 1
        x, test_x = (x - mean) / scale, (test_x - mean) / scale
    # A rotation changes neither the penalty nor the predictions, and spares the solver correlated features.
    axes = torch.linalg.eigh(x.T @ x)[1]
    order = numpy_generator(seed, "linear probe").permutation(len(x))
    x, y, test_x, fitted = (x @ axes)[order], y[order], test_x @ axes, len(x) - len(x) // 5
    scores, weights = [], x.new_zeros(len(classes), x.shape[1] + 1)
    for strength in STRENGTHS:
        weights = _fit(x[:fitted], y[:fitted], strength, weights, iterations=50, tolerance=1e-4)
        scores.append(int((_logits(x[fitted:], weights).argmax(dim=1) == y[fitted:]).sum()))
    strength = STRENGTHS[np.argmax(scores)]
    weights = _fit(x, y, strength, weights, iterations=500, tolerance=1e-6)
    predicted = classes[_logits(test_x, weights).argmax(dim=1).cpu().numpy()]
    return {**accuracy({"accuracy": predicted == test_y}, test_y, draws, seed), "strength": Estimate(strength)}


def knn(train_x, train_y, test_x, test_y, *, k: int = 20, draws: int = 0, seed: int = 0) -> Estimates:
    """Majority vote of the k nearest rows of train by cosine (all of train where it has fewer), counted on test.

    Of classes with as many votes the first in sorted order wins. Shapes, errors, draws and seed as
    :func:`linear_probe`. Returns "accuracy" and "mean_per_class", percent.
    """
    x, y, classes, test_x, test_y = _checked(train_x, train_y, test_x, test_y, normalise=True)
    nearest = [(block @ x.T).topk(min(k, len(x)), dim=1).indices for block in test_x.split(max(1, BLOCK_ELEMENTS // len(x)))]
    predicted = classes[y[torch.cat(nearest)].cpu().mode(dim=1).values.numpy()]
    return accuracy({"accuracy": predicted == test_y}, test_y, draws, seed)


def _checked(train_x: Any, train_y: Any, test_x: Any, test_y: Any, *, normalise: bool) -> tuple:
    """Features of train, its classes' numbers, the classes, features of test, on a GPU where there is one, and labels of test."""
    given = {"train_x": train_x, "test_x": test_x}
    train_x, test_x = (as_features(x, name, normalise=normalise).to(best_device()) for name, x in given.items())
    classes, y = np.unique(as_labels(train_y, len(train_x), "train_y"), return_inverse=True)
    return train_x, torch.from_numpy(y).to(train_x.device), classes, test_x, as_labels(test_y, len(test_x), "test_y")


def _logits(x: Tensor, weights: Tensor) -> Tensor:
    # Not x @ weights.T: its gradient is a product that BLAS computes several times slower.
    return torch.addmm(weights[:, -1:], weights[:, :-1], x.T).T


def _fit(x: Tensor, y: Tensor, strength: float, start: Tensor, *, iterations: int, tolerance: float) -> Tensor:
    """Weights (C, d + 1) of the regression, the intercept in the last column. Expects ``x`` in principal axes."""
    # There the curvature is near diag(variance)/C + strength. Steps of that length take L-BFGS to the minimum in a
    # half to a quarter of the iterations.
    step = F.pad((x.square().mean(dim=0) / len(start) + strength).rsqrt(), (0, 1), value=1)
    weights = (start / step).requires_grad_()
    solver = torch.optim.LBFGS([weights], max_iter=iterations, tolerance_grad=tolerance, history_size=10, line_search_fn="strong_wolfe")

    # In blocks of rows: the logits of a million rows and a thousand classes would not fit beside the features.
    rows = max(1, 4 * BLOCK_ELEMENTS // len(start))

    def objective() -> Tensor:
        solver.zero_grad()
        total = strength / 2 * (weights * step)[:, :-1].square().sum()
        total.backward()
        for block, labels in zip(x.split(rows), y.split(rows), strict=True):
            loss = F.cross_entropy(_logits(block, weights * step), labels, reduction="sum") / len(x)
            loss.backward()
            total = total + loss
        return total.detach()

    solver.step(objective)
    return (weights * step).detach()


def grouping(features: Any, labels: Any, k: int | None = None, *, seed: int = 0, seeds: int = 1, draws: int = 0) -> Estimates:
    """Agreement of k-means clusters of the features, as given, with class labels: see :func:`agreement`.

    Args:
        features: (N, d).
        labels: (N,) of any kind.
        k: number of clusters; None takes the number of classes among ``labels``.
        seed: of k-means and of the resamples.
        seeds: k-means is run from ``seed``, ``seed + 1``, …, and values and intervals are means over them.
        draws: resamples of the items for 95 % intervals.

    Raises:
        ValueError: as :func:`agreement`, and k > N.
    """
    features = as_features(features, "features")
    k = len(np.unique(as_labels(labels, len(features), "labels"))) if k is None else k
    starts = range(seed, seed + seeds)
    return mean([agreement(kmeans(features, k, seed=start).labels, labels, draws=draws, seed=seed) for start in starts])


def agreement(assignments: Any, labels: Any, *, draws: int = 0, seed: int = 0) -> Estimates:
    """Agreement of a clustering with class labels, whatever the clusters are called.

    Args:
        assignments: (N,) cluster of each item, of any kind.
        labels: (N,) class of each item, of any kind.
        draws, seed: resamples of the items for 95 % intervals, see :func:`~protoclip_lab.evaluation.estimate`; at
            most 100, and 20 where classes times clusters are more than 100,000.

    Returns:
        "ARI" (adjusted Rand index), "AMI" and "NMI" (adjusted and normalised mutual information, arithmetic mean),
        "purity" (share of items that are of their cluster's commonest class). 1 is full agreement; ARI and AMI are
        0 on average for a random clustering, NMI and purity are not.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    from sklearn.metrics import cluster

    rows = len(labels)
    found = np.unique(as_labels(assignments, rows, "assignments"), return_inverse=True)[1]
    known = np.unique(as_labels(labels, rows, "labels"), return_inverse=True)[1]
    scores = {"ARI": cluster.adjusted_rand_score, "AMI": cluster.adjusted_mutual_info_score}
    scores["NMI"] = cluster.normalized_mutual_info_score
    scores["purity"] = lambda *pair: cluster.contingency_matrix(*pair).max(axis=0).sum() / rows

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
        draws, seed: resamples of the items for 95 % intervals, see :func:`~protoclip_lab.evaluation.estimate`; at
            most 100 but for the silhouette.

    Returns:
        - "silhouette" (−1 to 1, of 10,000 items drawn by ``seed`` where there are more),
          "davies_bouldin" (0 is best), "calinski_harabasz" (more is better), Euclidean, as
          scikit-learn has them; NaN for one class or one item a class;
        - "within_similarity", "between_similarity": mean cosine over pairs of different items of one class, of
          two; "similarity_ratio": the first over the second. NaN where there is no such pair.

    Raises:
        ValueError: shapes that do not fit; NaN or Inf.
    """
    x = as_features(features, "features").cpu()
    classes, y = np.unique(as_labels(labels, len(x), "labels"), return_inverse=True)
    sphere = F.normalize(x.double(), dim=1)

    def under(weights: Tensor) -> dict[str, Tensor]:
        same = sum(pair_cosines(sphere[y == c], weights[:, y == c]) for c in range(len(classes)))
        within, between = ratio(*same), ratio(*(pair_cosines(sphere, weights) - same))
        found = {"within_similarity": within, "between_similarity": between, "similarity_ratio": within / between}
        for name in ("davies_bouldin", "calinski_harabasz"):
            found[name] = torch.tensor([_index(f"{name}_score", x.numpy()[r], y[r]) for r in resampled(weights)])
        return found

    found = estimate(under, len(x), min(draws, COSTLY_DRAWS), seed, centred=True)
    # One NaN for all where it is not defined.
    some = np.sort(numpy_generator(seed, "silhouette").permutation(len(x))[:10_000])
    values = torch.tensor(_index("silhouette_samples", x.numpy()[some], y[some])).double().expand(len(some))
    return estimate(lambda w: {"silhouette": w @ values / w.sum(dim=1)}, len(some), draws, seed) | found


def _index(score: str, x: np.ndarray, y: np.ndarray) -> Any:
    """A score that scikit-learn defines from two classes on, one of them of several items; else NaN."""
    from sklearn import metrics

    return getattr(metrics, score)(x, y) if 1 < len(np.unique(y)) < len(y) else np.nan
