"""Values with an interval, against SciPy's bootstrap and simulated test sets; what features and labels may be."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

from protoclip_lab import evaluation


def flat(found):
    ends = [(name, (value, value.low, value.high)) for name, value in found.items()]
    return {(name, end): values[end] for name, values in ends for end in range(3)}


def written_out(measure, items, draws, seed, centred=False):
    """As ``flat``, each resample as real copies of its items: ``measure`` takes the rows drawn and gives a dict."""
    seen = []
    evaluation.estimate(lambda weights: seen.extend(weights) or {"": weights[:, 0]}, items, draws, seed)
    value, *drawn = (measure(np.repeat(np.arange(items), weights.long())) for weights in seen)
    found = {}
    for name in value:
        values = [one[name] for one in drawn]
        low, high = np.nanpercentile(values, [2.5, 97.5]) + (value[name] - np.nanmean(values) if centred else 0)
        found |= {(name, 0): value[name], (name, 1): low, (name, 2): high}
    return found


def mean_of(values):
    return lambda weights: {"": weights @ torch.from_numpy(values) / weights.sum(dim=1)}


VALUES = np.random.default_rng(0).lognormal(size=80)


def test_interval_of_a_mean_equals_scipy_percentiles():
    options = {"n_resamples": 5000, "method": "percentile", "rng": np.random.default_rng(1)}
    expected = stats.bootstrap((VALUES,), np.mean, **options).confidence_interval
    found = evaluation.estimate(mean_of(VALUES), 80, 5000, seed=0)[""]
    # A percentile of 5,000 draws is off by about 0.04 standard errors.
    assert [found.low, found.high] == pytest.approx([*expected], abs=0.2 * stats.sem(VALUES))
    assert found == pytest.approx(VALUES.mean(), abs=1e-12)


def test_interval_does_not_depend_on_blocks(monkeypatch):
    whole = flat(evaluation.estimate(mean_of(VALUES), 80, 100, 3))
    monkeypatch.setattr(evaluation, "BLOCK_ELEMENTS", 7 * 80)
    assert flat(evaluation.estimate(mean_of(VALUES), 80, 100, 3)) == pytest.approx(whole, abs=1e-12)


def test_estimate_is_a_float():
    found = evaluation.Estimate(0.25, 0.125, 0.5)
    assert isinstance(found, float) and found + 1 == 1.25 and json.dumps({"value": found}) == '{"value": 0.25}'


def test_interval_of_an_accuracy_holds_the_truth_in_95_of_100_test_sets():
    rng = np.random.default_rng(0)
    found = [evaluation.accuracy({"": rng.random(200) < 0.7}, np.zeros(200), 400, seed)[""] for seed in range(500)]
    assert 0.92 <= np.mean([value.low <= 70 <= value.high for value in found]) <= 0.975  # three standard errors of 0.95


BOTH = np.random.default_rng(0).normal(0.7, size=(2, 60, 6)).astype(np.float32)
BOTH.flags.writeable = False  # as read from a mapped file
X, Y = BOTH
CLASSES = np.repeat(np.arange(6), 10)
MEASURES = {
    "zero_shot": partial(evaluation.zero_shot, X, Y[:6].T, CLASSES),
    "linear_probe": partial(evaluation.linear_probe, Y, CLASSES, X, CLASSES),
    "knn": partial(evaluation.knn, Y, CLASSES, X, CLASSES),
    "retrieval": partial(evaluation.retrieval, X, X + Y, np.arange(60)),
    "modality_gap": partial(evaluation.modality_gap, X, Y),
    "separability": partial(evaluation.separability, X, Y),
    "agreement": partial(evaluation.agreement, CLASSES, CLASSES * X[:, 0] > 1),
    "grouping": partial(evaluation.grouping, X, CLASSES),
    "separation": partial(evaluation.separation, X, CLASSES),
}


@pytest.mark.parametrize("name", MEASURES)
def test_every_value_lies_in_its_interval_which_the_seed_fixes(name):
    found, again, other, none = (MEASURES[name](draws=d, seed=s) for d, s in ((50, 1), (50, 1), (50, 2), (0, 1)))
    for values in (found, none):
        values.pop("strength", None)  # a choice, no measurement
    assert all(value.low < value < value.high for value in found.values())
    assert flat(found).items() <= flat(again).items()
    assert any(other[key].low != value.low for key, value in found.items())
    assert none == found and all(np.isnan([value.low, value.high]).all() for value in none.values())


EYE, ONES = np.eye(3), np.ones((3, 3))
REFUSED = [
    (evaluation.as_features, (ONES[:, :0], "image"), "rows and dimensions are needed"),
    (evaluation.as_features, (np.ones(3), "image"), "rows and dimensions are needed"),
    (evaluation.as_features, ([[1], [np.nan]], "image"), "image has NaN or Inf, first in row 1"),
    (evaluation.as_features, ([[1], [np.inf]], "image"), "image has NaN or Inf, first in row 1"),
    (evaluation.zero_shot, (ONES, EYE, [0] * 2), r"labels has shape \(2,\), its features have 3 rows"),
    (evaluation.zero_shot, (ONES, EYE, [0, 3, 0]), "labels is 3 in row 1: expected whole numbers from 0 to 2"),
    (evaluation.zero_shot, (ONES, EYE, ["cat", "dog", "cat"]), "whole numbers"),
    (evaluation.knn, (EYE, [0, 1, 2], EYE, [0]), r"test_y has shape \(1,\), its features have 3 rows"),
    (evaluation.retrieval, (EYE, EYE[:2], [0, 3]), "image_of_caption is 3 in row 1: expected whole numbers from 0 to 2"),
    (evaluation.retrieval, (EYE, EYE[:2], [0, 1, 1]), "image_of_caption has shape"),
    (evaluation.separability, (EYE, EYE[:2]), r"image_of_caption has shape \(3,\), its features have 2 rows"),
    (evaluation.agreement, ([0, 1], [0, 1, 1]), "assignments has shape"),
    (evaluation.agreement, ([], []), "zero-size"),
    (evaluation.grouping, (EYE, [0, 1, 2], 4), "k = 4"),
]


@pytest.mark.parametrize(("measure", "arguments", "message"), REFUSED)
def test_what_does_not_fit_is_named(measure, arguments, message):
    with pytest.raises(ValueError, match=message):
        measure(*arguments)


@pytest.mark.parametrize(
    "measure", [evaluation.modality_gap, evaluation.separability, partial(evaluation.retrieval, image_of_caption=[0, 1, 1])]
)
def test_features_of_another_width_are_refused(measure):
    with pytest.raises(RuntimeError, match=r"3.*2"):
        measure(EYE, EYE[:, :2])


def test_features_of_another_width_are_refused_by_torch_with_both_shapes():
    with pytest.raises(RuntimeError, match=r"3x3 and 2x3"):
        evaluation.zero_shot(ONES, ONES[:2], [0] * 3)
    for probe in (evaluation.linear_probe, evaluation.knn):
        with pytest.raises(RuntimeError, match="2"):
            probe(EYE, [0, 1, 2], np.eye(2), [0, 1])
