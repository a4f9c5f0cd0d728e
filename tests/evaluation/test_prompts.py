"""Zero-shot classification against open_clip and scikit-learn."""

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import recall_score, top_k_accuracy_score
from test_arrays import parts, written_out

from protoclip_lab.evaluation import prompts, zero_shot


class TextTower(torch.nn.Module):
    """Texts as their letters' counts through a random matrix; what open_clip's builder calls on a model."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.randn(128, 7, generator=torch.Generator().manual_seed(0))

    def encode_text(self, tokens, normalize=False):
        features = F.one_hot(tokens, 128).float().sum(dim=1) @ self.matrix
        return F.normalize(features, dim=-1) if normalize else features


def tokenize(texts):
    return torch.tensor([list(text.encode().ljust(64)) for text in texts])


def test_classifier_equals_open_clip():
    tower, names, templates = TextTower(), ["cat", "dog", "fire {truck}"], ["a photo of a {}.", "{} or {}", "bad {}"]
    expected = open_clip.build_zero_shot_classifier(
        tower, tokenize, names, [lambda name, t=template: t.replace("{}", name) for template in templates]
    )
    found = prompts.classifier(lambda texts: tower.encode_text(tokenize(texts), normalize=True), names, templates)
    torch.testing.assert_close(found, expected)
    assert found.shape == (7, 3)


def test_template_without_place_for_the_name_is_refused():
    with pytest.raises(ValueError, match="a photo"):
        prompts.classifier(lambda texts: torch.ones(len(texts), 2), ["cat"], ["{}", "a photo"])
    with pytest.raises(ValueError, match="class_names is empty"):
        prompts.classifier(lambda texts: torch.ones(len(texts), 2), [], ["{}"])


def problem(classes=9, rows=300):
    """Columns of different length; class 0 has no image, others few. Also the cosines."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(6, classes)) * rng.uniform(0.1, 9, classes)
    labels = rng.choice(classes, rows, p=np.arange(classes) / np.arange(classes).sum())
    directions = weights / np.linalg.norm(weights, axis=0)
    image = directions.T[labels] + 0.5 * rng.normal(size=(rows, 6))
    return image, weights, labels, image / np.linalg.norm(image, axis=1, keepdims=True) @ directions


def macro_recall(labels, predicted):
    return 100 * recall_score(labels, predicted, labels=np.unique(labels), average="macro")


@pytest.mark.parametrize("block", [1, 2**24])
def test_accuracies_equal_scikit_learn(monkeypatch, block):
    monkeypatch.setattr(prompts, "BLOCK_ELEMENTS", block)
    image, weights, labels, scores = problem()
    top1, top5 = (top_k_accuracy_score(labels, scores, k=k, labels=np.arange(9)) for k in (1, 5))
    per_class = macro_recall(labels, scores.argmax(axis=1))
    found = zero_shot(image, weights, labels)
    assert found == pytest.approx({"top1": 100 * top1, "top5": 100 * top5, "mean_per_class": per_class}, abs=1e-4)
    assert found["top1"] < found["top5"] < 100
    assert abs(found["top1"] - found["mean_per_class"]) > 0.1


def test_interval_where_resamples_lack_a_class_equals_scikit_learn_on_copies():
    image, weights, labels, scores = problem(rows=40)
    assert np.bincount(labels)[1:].min() < 3
    predicted = scores.argmax(axis=1)
    found = zero_shot(image, weights, labels, draws=200, seed=3)
    expected = written_out(lambda rows: macro_recall(labels[rows], predicted[rows]), 40, 200, 3)
    assert parts(found["mean_per_class"]) == pytest.approx(expected, abs=1e-4)
    top5 = np.any(np.argsort(-scores, axis=1)[:, :5] == labels[:, None], axis=1)
    expected = written_out(lambda rows: 100 * top5[rows].mean(), 40, 200, 3)
    assert parts(found["top5"]) == pytest.approx(expected, abs=1e-4)


def test_below_five_classes_top5_takes_all():
    found = zero_shot(np.eye(3), np.eye(3)[:, [1, 2, 0]], [0, 1, 2])
    assert found == pytest.approx({"top1": 0, "top5": 100, "mean_per_class": 0})


def test_one_class_and_one_image_are_right():
    assert zero_shot([[1.0, 0.0]], [[-1.0], [0.0]], [0]) == {"top1": 100, "top5": 100, "mean_per_class": 100}


def test_constant_features_reach_chance():
    labels = np.repeat(np.arange(8), 5)
    found = zero_shot(np.ones((40, 8)), np.eye(8), labels)
    assert found == pytest.approx({"top1": 100 / 8, "top5": 500 / 8, "mean_per_class": 100 / 8})


def test_wrong_shapes_are_both_named():
    with pytest.raises(ValueError, match=r"image \(4, 3\) and classifier \(2, 3\)"):
        zero_shot(np.ones((4, 3)), np.ones((2, 3)), [0, 0, 0, 0])
    with pytest.raises(ValueError, match=r"labels has shape \(3,\), its features have 4 rows"):
        zero_shot(np.ones((4, 3)), np.eye(3), [0, 0, 0])


def test_labels_that_name_no_column_are_refused():
    with pytest.raises(ValueError, match="labels is 3 in row 1: expected 0 to 2"):
        zero_shot(np.ones((2, 3)), np.eye(3), [0, 3])
    for labels in ([0.0, 1.0], ["cat", "dog"]):
        with pytest.raises(ValueError, match="whole numbers"):
            zero_shot(np.ones((2, 3)), np.eye(3), labels)
