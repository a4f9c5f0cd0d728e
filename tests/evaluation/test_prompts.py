"""Zero-shot classification against open_clip and scikit-learn."""

from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import recall_score, top_k_accuracy_score
from test_arrays import flat, written_out

from protoclip_lab.evaluation import prompts, zero_shot


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
    found = prompts.classifier(lambda texts: encode_text(tokenize(texts)), names, templates)
    torch.testing.assert_close(found, expected)
    assert found.shape == (7, 3)


def test_template_without_place_for_the_name_is_refused():
    with pytest.raises(ValueError, match="a photo"):
        prompts.classifier(lambda texts: torch.ones(len(texts), 2), ["cat"], ["{}", "a photo"])
    with pytest.raises(ValueError, match="class_names is empty"):
        prompts.classifier(lambda texts: torch.ones(len(texts), 2), [], ["{}"])


def problem(rows):
    """Columns of different length; class 0 has no image, others few. Also the cosines."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(6, 9)) * rng.uniform(0.1, 9, 9)
    labels = rng.choice(9, rows, p=np.arange(9) / 36)
    directions = weights / np.linalg.norm(weights, axis=0)
    image = directions.T[labels] + 0.5 * rng.normal(size=(rows, 6))
    return image, weights, labels, image / np.linalg.norm(image, axis=1, keepdims=True) @ directions


def macro_recall(labels, predicted):
    return 100 * recall_score(labels, predicted, labels=np.unique(labels), average="macro")


@pytest.mark.parametrize("block", [1, 2**24])
def test_accuracies_equal_scikit_learn(monkeypatch, block):
    monkeypatch.setattr(prompts, "BLOCK_ELEMENTS", block)
    image, weights, labels, scores = problem(300)
    expected = {f"top{k}": 100 * top_k_accuracy_score(labels, scores, k=k, labels=np.arange(9)) for k in (1, 5)}
    expected["mean_per_class"] = macro_recall(labels, scores.argmax(axis=1))
    assert zero_shot(image, weights, labels) == pytest.approx(expected, abs=1e-4)
    assert expected["mean_per_class"] + 0.1 < expected["top1"] < expected["top5"] < 100


def test_interval_where_resamples_lack_a_class_equals_scikit_learn_on_copies():
    image, weights, labels, scores = problem(40)
    assert np.bincount(labels)[1:].min() < 3
    ranked = np.argsort(-scores, axis=1)

    def measure(rows):
        found = {f"top{k}": 100 * (ranked[rows, :k] == labels[rows, None]).any(axis=1).mean() for k in (1, 5)}
        return found | {"mean_per_class": macro_recall(labels[rows], ranked[rows, 0])}

    found = flat(zero_shot(image, weights, labels, draws=200, seed=3))
    assert found == pytest.approx(written_out(measure, 40, 200, 3), abs=1e-4)


def test_degenerate_input_gives_what_it_must():
    three, one = zero_shot(np.eye(3), np.eye(3)[:, [1, 2, 0]], [0, 1, 2]), zero_shot([[1.0, 0]], [[-1.0], [0]], [0])
    assert three == {"top1": 0, "top5": 100, "mean_per_class": 0}  # fewer than five classes
    assert one == {"top1": 100, "top5": 100, "mean_per_class": 100}
    constant = zero_shot(np.ones((40, 8)), np.eye(8), np.repeat(np.arange(8), 5))
    assert constant == pytest.approx({"top1": 100 / 8, "top5": 500 / 8, "mean_per_class": 100 / 8})


def test_what_does_not_fit_is_named():
    for message, classifier, labels in (
        (r"image \(3, 3\) and classifier \(2, 3\)", np.ones((2, 3)), [0] * 3),
        (r"labels has shape \(2,\), its features have 3 rows", np.eye(3), [0] * 2),
        ("labels is 3 in row 1: expected 0 to 2", np.eye(3), [0, 3, 0]),
        ("whole numbers", np.eye(3), ["cat", "dog", "cat"]),
    ):
        with pytest.raises(ValueError, match=message):
            zero_shot(np.ones((3, 3)), classifier, labels)
