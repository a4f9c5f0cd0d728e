"""Retrieval against clip_benchmark and a sort of the dense score matrix."""

import numpy as np
import pytest
import torch
from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k
from test_arrays import flat, written_out

from protoclip_lab import evaluation
from protoclip_lab.evaluation import retrieval

NAMES = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


def scores_of(image, text):
    image, text = (np.array([row / np.linalg.norm(row) for row in np.asarray(x, np.float64)]) for x in (image, text))
    return np.round(image @ text.T, 9)


def reference(image, text, owner, asking=None):
    """Sort everything; among equal scores the wrong item comes first. ``asking`` are images, with their captions."""
    scores, owner = scores_of(image, text), np.asarray(owner)
    right = np.arange(len(image))[:, None] == owner

    def found(scores, right, rows):
        orders = [sorted(zip(-scores[row], right[row], strict=True)) for row in rows]
        ranks = [next(place for place, (_, good) in enumerate(order) if good) for order in orders]
        return [100 * np.mean(np.array(ranks) < k) for k in (1, 5, 10)]

    asking = range(len(image)) if asking is None else asking
    captions = [caption for row in asking for caption in np.flatnonzero(owner == row)]
    values = found(scores, right, [row for row in asking if right[row].any()]) + found(scores.T, right.T, captions)
    return {**dict(zip(NAMES, values, strict=True)), "mean_recall": np.mean(values)}


def problem(captions, images=37):
    rng = np.random.default_rng(captions)
    image = rng.normal(size=(images, 8)).astype(np.float32)
    owner = rng.permutation(np.repeat(np.arange(images), captions))
    return image, (image[owner] + 1.5 * rng.normal(size=(len(owner), 8))).astype(np.float32), owner


@pytest.mark.parametrize("block", [1, 200, 2**24])
@pytest.mark.parametrize("captions", [1, 3, 5])
def test_recall_equals_clip_benchmark(monkeypatch, block, captions):
    monkeypatch.setattr(evaluation, "BLOCK_ELEMENTS", block)
    image, text, owner = problem(captions)
    scores = torch.from_numpy(scores_of(image, text))
    pairs = torch.arange(37)[:, None] == torch.from_numpy(owner)
    ways = ((scores, pairs), (scores.T, pairs.T))
    expected = [100 * (recall_at_k(*way, k) > 0).double().mean().item() for way in ways for k in (1, 5, 10)]
    expected.append(np.mean(expected))
    found = retrieval(image, text, owner)
    assert found == pytest.approx(dict(zip([*NAMES, "mean_recall"], expected, strict=True)), abs=1e-4)
    assert 0 < found["text_to_image_R@1"] < found["text_to_image_R@10"] < 100
    assert retrieval(torch.from_numpy(image), torch.from_numpy(text), torch.from_numpy(owner)) == found


def test_interval_where_images_lack_captions_equals_images_repeated_with_their_captions():
    image, text, owner = problem(3, images=20)
    kept = owner > 4  # images 0 to 4 have no captions, the others one to three
    kept[::4] = False
    text, owner = text[kept], owner[kept]
    assert len(set(np.bincount(owner)[5:])) > 1
    expected = written_out(lambda rows: reference(image, text, owner, rows), 20, 40, 2)
    assert flat(retrieval(image, text, owner, draws=40, seed=2)) == pytest.approx(expected, abs=1e-4)


def test_ties_count_against_the_model():
    # Each image is there twice, so a wrong one always scores the same. As the product's rounding differs from place
    # to place, only a tolerance sees all of these ties.
    image = np.repeat(np.random.default_rng(0).normal(size=(300, 61)), 2, axis=0).astype(np.float32)
    found = retrieval(image, image, np.arange(600))
    assert found == pytest.approx(reference(image, image, np.arange(600)), abs=1e-4)
    assert found["text_to_image_R@1"] == found["image_to_text_R@1"] == 0
    assert found["text_to_image_R@5"] == found["image_to_text_R@5"] == 100


def test_constant_features_find_nothing_and_a_single_pair_is_found():
    image = np.tile(np.random.default_rng(0).normal(size=64), (700, 1)).astype(np.float32)
    assert set(retrieval(image, image, np.arange(700)).values()) == {0.0}
    assert set(retrieval([[1.0, 2.0]], [[-1.0, 0.0]], [0]).values()) == {100.0}
