"""The modality gap against loops over all pairs, and what moving along it does."""

import math

import numpy as np
import pytest
import torch
from test_arrays import flat, written_out

from protoclip_lab.evaluation import gap_sweep, modality_gap, retrieval, separability, zero_shot


def unit(x):
    return np.array([row / np.linalg.norm(row) for row in np.asarray(x, dtype=np.float64)])


def reference(image, text, owner, rows=None):
    """Of the images in ``rows``, with their captions; an item is no pair with itself, nor with its copies."""
    image, text = unit(image), unit(text)
    rows = range(len(image)) if rows is None else rows
    captions = [caption for row in rows for caption in np.flatnonzero(np.asarray(owner) == row)]

    found = {"gap": math.dist(image[rows].mean(axis=0), text[captions].mean(axis=0))}
    found["pair_similarity"] = np.mean([image[owner[caption]] @ text[caption] for caption in captions])
    for name, x, items in (("image", image, rows), ("text", text, captions)):
        cosines = [x[i] @ x[j] for i in items for j in items if i != j]
        found[f"{name}_self_similarity"] = np.mean(cosines) if cosines else math.nan
        found[f"{name}_std"] = np.mean([np.std(column) for column in x[items].T])
    return found


def problem(images=8, captions=20):
    """Some images have several captions, image 0 has none."""
    rng = np.random.default_rng(1)
    image, text = rng.normal(size=(images, 5)) * 5, rng.normal(size=(captions, 5)) + 1
    return image, text, rng.integers(1, images, captions)


ALONE, OPPOSITE = np.array([[3.0, 4]]), np.array([[1.0, 0], [-1, 0]])
PROBLEMS = {
    "captions": problem(),
    "pairs": (*problem(40, 40)[:2], range(40)),
    "three pairs": (*problem(3, 3)[:2], range(3)),
    "constant": (np.ones((6, 3)), -np.ones((6, 3)), range(6)),
    "one pair": (ALONE, ALONE + 1, [0]),
    "opposite": (OPPOSITE, OPPOSITE[:, ::-1].copy(), range(2)),
    "one caption": (OPPOSITE, ALONE, [1]),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_gap_equals_loops_over_pairs(name):
    image, text, owner = PROBLEMS[name]
    expected = pytest.approx(reference(image, text, owner), abs=1e-4, nan_ok=True)
    assert modality_gap(image, text, image_of_caption=owner) == expected
    if isinstance(owner, range):
        assert modality_gap(torch.from_numpy(image), torch.from_numpy(text)) == expected


@pytest.mark.parametrize("name", ["captions", "three pairs"])  # a resample of three may hold one of them alone
def test_interval_equals_images_repeated_with_their_captions(name):
    image, text, owner = PROBLEMS[name]
    found = modality_gap(image, text, image_of_caption=owner, draws=40, seed=2)
    expected = written_out(lambda rows: reference(image, text, owner, rows), len(image), 40, 2, centred=True)
    assert flat(found) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("captions", [1, 9])
def test_separability_is_half_for_the_same_features_and_full_for_parted_ones(captions):
    rng = np.random.default_rng(0)
    image, owner = rng.normal(size=(40, 8)), np.repeat(np.arange(40), captions)
    image[:, 0] = 30
    assert separability(image, image[owner], image_of_caption=owner)["separability"] == 50
    assert separability(image, image[owner] * -1, image_of_caption=owner)["separability"] == 100


def test_separability_is_the_share_of_unseen_items_on_their_side():
    exchanged = np.arange(1000) % 5 == 0  # of these the image is where texts are, and the text where images are
    ends = np.array([[1.0, 0.2], [0.2, 1]])
    found = separability(ends[exchanged.astype(int)], ends[1 - exchanged], draws=100)["separability"]
    assert found == pytest.approx(80, abs=4) and found.low < 80 < found.high
    noise = np.random.default_rng(0).normal(size=(2, 60, 100))  # more dimensions than items: what is seen is learnt
    assert separability(*noise)["separability"] < 75


def test_without_both_modalities_to_learn_and_to_ask_about_there_is_no_separability():
    assert math.isnan(separability(ALONE, OPPOSITE, image_of_caption=[0, 0])["separability"])
    found = [separability(OPPOSITE, ALONE, image_of_caption=[1], seed=seed)["separability"] for seed in range(9)]
    assert any(math.isnan(value) for value in found)


def moved(image, text, share):
    """What the sweep measures at this share."""
    seen = []
    gap_sweep(image, text, lambda *both: seen.append(both) or {})
    return seen[round(4 * share) + 4]


def test_moved_equals_its_formula_where_means_meet_at_1_and_the_gap_doubles_at_minus_1():
    image, text, _ = problem()
    way = unit(image).mean(axis=0) - unit(text).mean(axis=0)
    for share in (-1, 0.25, 1):
        expected = unit(image) - share / 2 * way, unit(text) + share / 2 * way
        np.testing.assert_allclose(expected[0].mean(axis=0) - expected[1].mean(axis=0), (1 - share) * way, atol=1e-9)
        for found, before in zip(moved(image, text, share), expected, strict=True):
            np.testing.assert_allclose(found.numpy(), unit(before), atol=1e-5)


def test_sweep_measures_what_is_moved():
    image, text, owner = problem(40, 90)
    text += image[owner]
    measures = {
        lambda image, text: zero_shot(image, text[:7].T, np.arange(40) % 7): {"top1"},
        lambda image, text: retrieval(image, text, owner): {"mean_recall", "image_to_text_R@1", "text_to_image_R@1"},
    }
    for measure, names in measures.items():
        found, unmoved, apart = gap_sweep(image, text, measure), measure(image, text), moved(image, text, -0.75)
        assert found.keys() == {f"{name}@{share / 4:+.2f}" for name in names for share in range(-4, 5)}
        for name in names:
            assert found[f"{name}@+0.00"] == pytest.approx(unmoved[name], abs=1e-4)
            assert found[f"{name}@-0.75"] == measure(*apart)[name]
        assert len(set(found.values())) > len(names)


def test_separability_counts_an_image_once_however_many_captions_it_has():
    image = np.random.default_rng(0).normal(size=(200, 4))
    once = separability(image, image + 1, draws=200)["separability"]
    owner = np.repeat(np.arange(200), 5)
    often = separability(image, (image + 1)[owner], image_of_caption=owner, draws=200)["separability"]
    assert (often, often.low, often.high) == (once, once.low, once.high)
    assert 60 < once < 95


def test_separability_needs_two_images_with_captions():
    assert np.isnan(separability(np.eye(3), np.eye(3)[:1], image_of_caption=[1])["separability"])
    two = separability(np.eye(3), np.eye(3)[:2], image_of_caption=[0, 2])["separability"]
    assert 0 <= two <= 100
