"""The modality gap against loops over all pairs."""

import math

import numpy as np
import pytest
import torch

from protoclip_lab.evaluation import modality_gap


def reference(image, text, owner):
    image = np.array([row / np.linalg.norm(row) for row in image.astype(np.float64)])
    text = np.array([row / np.linalg.norm(row) for row in text.astype(np.float64)])

    def similarity(x):
        cosines = [float(a @ b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
        return sum(cosines) / len(cosines)

    return {
        "gap": math.dist(image.mean(axis=0), text.mean(axis=0)),
        "image_self_similarity": similarity(image),
        "text_self_similarity": similarity(text),
        "pair_similarity": np.mean([float(image[i] @ t) for i, t in zip(owner, text, strict=True)]),
        "image_std": np.mean([np.std(column) for column in image.T]),
        "text_std": np.mean([np.std(column) for column in text.T]),
    }


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_gap_equals_loops_over_pairs(shift):
    rng = np.random.default_rng(0)
    image = (rng.normal(size=(40, 6)) * 5).astype(np.float32)
    text = (rng.normal(size=(40, 6)) + shift).astype(np.float32)
    assert modality_gap(image, text) == pytest.approx(reference(image, text, range(40)), abs=1e-5)
    assert modality_gap(torch.from_numpy(image), torch.from_numpy(text)) == modality_gap(image, text)


def test_several_captions_of_an_image_count_the_image_once():
    rng = np.random.default_rng(1)
    image, text = rng.normal(size=(7, 5)), rng.normal(size=(20, 5))
    owner = rng.integers(0, 7, 20)
    found = modality_gap(image, text, image_of_caption=owner)
    assert found == pytest.approx(reference(image, text, owner), abs=1e-5)


def test_opposite_features_keep_the_sign():
    found = modality_gap(np.array([[1.0, 0], [-1, 0]]), np.array([[0.0, 2], [0, 2]]))
    assert found["image_self_similarity"] == pytest.approx(-1)
    assert found["text_self_similarity"] == pytest.approx(1)
    assert found["gap"] == pytest.approx(1)


def test_single_item_has_no_self_similarity():
    found = modality_gap(np.array([[3.0, 4]]), np.array([[3.0, 4]]))
    assert math.isnan(found["image_self_similarity"]) and math.isnan(found["text_self_similarity"])
    assert found["gap"] == pytest.approx(0) and found["pair_similarity"] == pytest.approx(1)
    assert found["image_std"] == 0


@pytest.mark.parametrize("text", [np.ones((3, 2)), np.ones((2, 3))])
def test_shapes_that_do_not_fit_are_both_named(text):
    with pytest.raises(ValueError, match=r"image \(3, 3\) and text \("):
        modality_gap(np.ones((3, 3)), text)


def test_nan_is_refused_with_its_row():
    image = np.ones((4, 2))
    image[2, 1] = np.nan
    with pytest.raises(ValueError, match="image has NaN or Inf, first in row 2"):
        modality_gap(image, np.ones((4, 2)))


def test_read_only_memory_is_taken():
    image = np.ones((3, 2), dtype=np.float32)
    image.flags.writeable = False
    assert modality_gap(image, image)["gap"] == pytest.approx(0)
