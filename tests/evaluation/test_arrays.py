"""Values with an interval, against SciPy's bootstrap and simulated test sets; what features and labels may be."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

from protoclip_lab import evaluation
from protoclip_lab.evaluation import arrays


def written_out(measure, items, draws, seed, centred=False):
    """Value and interval, each resample as real copies of its items: ``measure`` gets the rows drawn."""
    seen = []

    def under(weights):
        seen.extend(weights.long().numpy())
        return {"": weights[:, 0]}

    arrays.estimate(under, items, draws, seed)
    value, *drawn = (measure(np.repeat(np.arange(items), weights)) for weights in seen)
    low, high = np.nanpercentile(drawn, [2.5, 97.5]) + (value - np.nanmean(drawn) if centred else 0)
    return [value, low, high]


def parts(estimate):
    return [estimate, estimate.low, estimate.high]


def mean_of(values):
    return lambda weights: {"": weights @ torch.from_numpy(values) / weights.sum(dim=1)}


VALUES = np.random.default_rng(0).lognormal(size=80)


def test_interval_of_a_mean_equals_scipy_percentiles():
    options = {"n_resamples": 5000, "method": "percentile", "rng": np.random.default_rng(1)}
    expected = stats.bootstrap((VALUES,), np.mean, **options).confidence_interval
    found = arrays.estimate(mean_of(VALUES), 80, 5000, seed=0)[""]
    # A percentile of 5,000 draws is off by about 0.04 standard errors.
    assert [found.low, found.high] == pytest.approx([*expected], abs=0.2 * stats.sem(VALUES))
    assert found == pytest.approx(VALUES.mean(), abs=1e-12)


@pytest.mark.parametrize("centred", [False, True])
def test_centring_moves_the_interval_of_a_biased_value_by_its_bias(centred):
    # A resample of 100 holds 63 distinct items on average.
    found = arrays.estimate(lambda weights: {"": (weights > 0).sum(dim=1)}, 100, 4000, 0, centred=centred)[""]
    rng = np.random.default_rng(0)
    drawn = [len(set(rng.integers(0, 100, 100))) for _ in range(4000)]
    expected = np.percentile(drawn, [2.5, 97.5]) + (100 * 0.99**100 if centred else 0)
    assert parts(found) == pytest.approx([100, *expected], abs=1.1)  # percentiles are whole numbers here


def test_a_resample_draws_as_many_items_each_as_likely():
    seen = []
    arrays.estimate(lambda weights: seen.append(weights) or {"": weights[:, 0]}, 20, 4000, seed=0)
    assert (seen[0] == 1).all()
    drawn = torch.cat(seen[1:])
    assert drawn.shape == (4000, 20) and (drawn.sum(dim=1) == 20).all()
    for count in range(4):
        share = (drawn == count).double().mean(dim=0).numpy()
        np.testing.assert_allclose(share, stats.binom.pmf(count, 20, 1 / 20), atol=5 * np.sqrt(0.25 / 4000))


def test_interval_depends_on_the_seed_and_not_on_blocks(monkeypatch):
    whole, again, other = (parts(arrays.estimate(mean_of(VALUES), 80, 100, seed)[""]) for seed in (3, 3, 4))
    monkeypatch.setattr(arrays, "BLOCK_ELEMENTS", 7 * 80)
    assert whole == again == pytest.approx(parts(arrays.estimate(mean_of(VALUES), 80, 100, 3)[""]), abs=1e-12)
    assert whole[0] == other[0] and whole[1:] != other[1:]


def test_resamples_without_a_value_are_left_out():
    def under(weights):
        return {"": torch.where(weights[:, 0] > 0, weights[:, 0], torch.nan)}

    for centred in (False, True):
        expected = written_out(lambda rows: np.sum(rows == 0) or np.nan, 5, 300, 0, centred)
        found = arrays.estimate(under, 5, 300, 0, centred=centred)[""]
        assert parts(found) == pytest.approx(expected, abs=1e-9)


def test_estimate_is_a_float():
    found = arrays.Estimate(0.25, 0.125, 0.5)
    assert isinstance(found, float) and found == 0.25 and found + 1 == 1.25
    assert json.dumps({"value": found}) == '{"value": 0.25}'
    assert np.asarray([found]).dtype == np.float64


def test_interval_of_an_accuracy_holds_the_truth_in_95_of_100_test_sets():
    rng = np.random.default_rng(0)
    held = 0
    for repeat in range(500):
        found = arrays.accuracy({"": rng.random(200) < 0.7}, np.zeros(200), 400, repeat)[""]
        held += found.low <= 70 <= found.high
    assert 0.92 <= held / 500 <= 0.975  # three standard errors of 0.95


X, Y = np.random.default_rng(0).normal(size=(2, 60, 6)) + 0.7
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
    for values in (found, again, none):
        values.pop("strength", None)  # a choice, no measurement
    assert all(value.low < value < value.high for value in found.values())
    assert all(parts(again[key]) == parts(value) for key, value in found.items())
    assert any(other[key].low != value.low for key, value in found.items())
    assert none == found and all(np.isnan([value.low, value.high]).all() for value in none.values())


@pytest.mark.parametrize("centred", [False, True])
def test_a_value_that_no_resample_changes_has_an_interval_of_no_width(centred):
    found = arrays.estimate(mean_of(np.full(3, 1 / 3)), 3, 100, 0, centred=centred)[""]
    assert parts(found) == pytest.approx([1 / 3] * 3, abs=1e-9)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.xfail(strict=True, reason="rounding leaves the value a last digit outside: no error bar can be drawn")
def test_a_value_that_no_resample_changes_is_in_its_interval_to_the_last_digit(centred):
    found = [arrays.estimate(mean_of(np.full(n, 1 / 3)), n, 100, 0, centred=centred)[""] for n in (1, 3, 7)]
    assert all(value.low <= value <= value.high for value in found)


@pytest.mark.xfail(strict=True, reason="centring takes the upper end past what can be")
def test_interval_of_an_agreement_ends_at_1():
    classes = np.repeat([0, 1], 150)
    found = evaluation.agreement([1, *classes[1:]], classes, draws=200)
    assert all(value.high <= 1 for value in found.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_no_number_are_refused_with_their_row(bad):
    features = np.ones((4, 2))
    features[2, 1] = bad
    with pytest.raises(ValueError, match="image has NaN or Inf, first in row 2"):
        arrays.as_features(features, "image")


@pytest.mark.parametrize("shape", [(3,), (0, 3), (3, 0), (2, 2, 2)])
def test_features_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="expected .rows, dimensions., at least one of each"):
        arrays.as_features(np.ones(shape), "image")


def test_read_only_memory_is_taken():
    image = np.ones((3, 2), dtype=np.float32)
    image.flags.writeable = False
    assert arrays.as_features(image, "image").shape == (3, 2)
