"""Retrieval against a sort of the dense score matrix."""

import numpy as np
import pytest
import torch

from protoclip_lab.evaluation import ranking, retrieval


def unit(rows):
    return np.array([row / np.linalg.norm(row) for row in np.asarray(rows, dtype=np.float64)])


def reference(image, text, owner):
    """Sort everything; among equal scores the wrong item comes first."""
    scores = np.round(unit(image) @ unit(text).T, 9)
    owner = np.asarray(owner)

    def recalls(scores, right):
        ranks = []
        for row, good in zip(scores, right, strict=True):
            if good.any():
                order = sorted(range(len(row)), key=lambda j: (-row[j], good[j]))
                ranks.append(next(place for place, j in enumerate(order) if good[j]))
        return [100 * np.mean(np.array(ranks) < k) for k in (1, 5, 10)]

    right = np.arange(len(image))[:, None] == owner
    values = recalls(scores, right) + recalls(scores.T, right.T)
    names = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    return {**dict(zip(names, values, strict=True)), "mean_recall": np.mean(values)}


@pytest.mark.parametrize("block", [1, 200, 2**24])
@pytest.mark.parametrize("captions", [1, 3, 5])
def test_recall_equals_dense_sort(monkeypatch, block, captions):
    monkeypatch.setattr(ranking, "BLOCK_ELEMENTS", block)
    rng = np.random.default_rng(captions)
    image = rng.normal(size=(37, 8)).astype(np.float32)
    owner = rng.permutation(np.repeat(np.arange(37), captions))
    text = (image[owner] + 1.5 * rng.normal(size=(len(owner), 8))).astype(np.float32)
    found = retrieval(image, text, owner)
    assert found == pytest.approx(reference(image, text, owner), abs=1e-4)
    assert 0 < found["text_to_image_R@1"] < found["text_to_image_R@10"] < 100
    assert retrieval(torch.from_numpy(image), torch.from_numpy(text), torch.from_numpy(owner)) == found


def test_ties_count_against_the_model():
    # Each image is there twice, so a wrong one always scores the same. As the product's rounding differs from place
    # to place, only a tolerance sees all of these ties.
    image = np.repeat(np.random.default_rng(0).normal(size=(300, 61)), 2, axis=0).astype(np.float32)
    found = retrieval(image, image, np.arange(600))
    assert found == pytest.approx(reference(image, image, np.arange(600)), abs=1e-4)
    assert found["text_to_image_R@1"] == found["image_to_text_R@1"] == 0
    assert found["text_to_image_R@5"] == found["image_to_text_R@5"] == 100


def test_image_without_captions_is_a_candidate_and_asks_for_none():
    image = np.eye(4)
    text = np.array([[2.0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0]])
    owner = [0, 1, 2]  # captions 1 and 2 are swapped, image 3 has none
    found = retrieval(image, text, owner)
    assert found == pytest.approx(reference(image, text, owner), abs=1e-4)
    assert found["image_to_text_R@1"] == pytest.approx(100 / 3)


def test_constant_features_find_nothing():
    image = np.tile(np.random.default_rng(0).normal(size=64), (700, 1)).astype(np.float32)
    found = retrieval(image, image, np.arange(700))
    assert set(found.values()) == {0.0}


def test_the_better_of_several_captions_counts():
    image = np.eye(12)
    text = np.concatenate([np.eye(12), -np.eye(12)])
    assert retrieval(image, text, np.tile(np.arange(12), 2))["image_to_text_R@1"] == 100


def test_single_pair_is_found():
    assert set(retrieval([[1.0, 2.0]], [[-1.0, 0.0]], [0]).values()) == {100.0}


def test_caption_of_an_image_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="image_of_caption is 2 in row 1: expected 0 to 1"):
        retrieval(np.eye(2), np.eye(2), [0, 2])
    with pytest.raises(ValueError, match=r"image \(2, 2\) and text \(3, 3\)"):
        retrieval(np.eye(2), np.eye(3), [0, 1, 1])
    with pytest.raises(ValueError, match="image_of_caption has shape"):
        retrieval(np.eye(2), np.eye(2), [0, 1, 1])
