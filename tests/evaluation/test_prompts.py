"""Zero-shot classification against open_clip and scikit-learn."""

from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import recall_score, top_k_accuracy_score
from test_arrays import flat, written_out

from protoclip_lab import evaluation
from protoclip_lab.evaluation import zero_shot


def tokenize(texts):
    return torch.tensor([list(text.encode().ljust(64)) for text in texts])


def encode_text(tokens, normalize=True):
    """Texts as their letters' counts through a matrix."""
    features = F.one_hot(tokens, 128).float().sum(dim=1) @ torch.arange(128.0 * 7).sin().view(128, 7)
    return F.normalize(features, dim=-1) if normalize else features


def test_classifier_equals_open_clip():
    names, templates = ["cat", "dog", "fire {truck}"], ["a photo of a {}.", "{} or {}", "bad {}"]
    writers = [lambda name, t=template: t.replace("{}", name) for template in templates]
    expected = open_clip.build_zero_shot_classifier(SimpleNamespace(encode_text=encode_text), tokenize, names, writers)
    found = evaluation.classifier(lambda texts: encode_text(tokenize(texts)), names, templates)
    torch.testing.assert_close(found, expected)
    assert found.shape == (7, 3)


def problem(rows):
    """Columns of different length; class 0 has no image, others few. Also the cosines."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(6, 9)) * rng.uniform(0.1, 9, 9)
    labels = rng.choice(9, rows, p=np.arange(9) / 36)
    directions = weights / np.linalg.norm(weights, axis=0)
    image = directions.T[labels] + 0.5 * rng.normal(size=(rows, 6))
    return image, weights, labels, image / np.linalg.norm(image, axis=1, keepdims=True) @ directions


@pytest.mark.parametrize("block", [1, 2**24])
def test_value_and_interval_equal_scikit_learn_also_where_a_resample_lacks_a_class(monkeypatch, block):
    monkeypatch.setattr(evaluation, "BLOCK_ELEMENTS", block)
    image, weights, labels, scores = problem(60)
    assert np.bincount(labels)[1:].min() < 3

    def measure(rows):
        y, found = labels[rows], scores[rows]
        tops = {f"top{k}": 100 * top_k_accuracy_score(y, found, k=k, labels=np.arange(9)) for k in (1, 5)}
        recall = recall_score(y, found.argmax(axis=1), labels=np.unique(y), average="macro")
        return tops | {"mean_per_class": 100 * recall}

    found = zero_shot(image, weights, labels, draws=100, seed=3)
    assert flat(found) == pytest.approx(written_out(measure, 60, 100, 3), abs=1e-4)
    assert found["mean_per_class"] + 0.1 < found["top1"] < found["top5"] < 100


def test_degenerate_input_gives_what_it_must():
    three, one = zero_shot(np.eye(3), np.eye(3)[:, [1, 2, 0]], [0, 1, 2]), zero_shot([[1.0, 0]], [[-1.0], [0]], [0])
    assert three == {"top1": 0, "top5": 100, "mean_per_class": 0}  # fewer than five classes
    assert one == {"top1": 100, "top5": 100, "mean_per_class": 100}
    constant = zero_shot(np.ones((40, 8)), np.eye(8), np.repeat(np.arange(8), 5))
    assert constant == pytest.approx({"top1": 100 / 8, "top5": 500 / 8, "mean_per_class": 100 / 8})
