"""Zero-shot classification: class names in prompts become a classifier."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip_lab.evaluation.arrays import BLOCK_ELEMENTS, Estimates, accuracy, as_features, as_indices


def classifier(encode_text: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """One direction a class: its name in each template, averaged in feature space and normalised again.

    Args:
        encode_text: n texts -> (n, d), L2-normalised.
        class_names: C names.
        templates: texts with ``{}`` where the name goes, see :func:`protoclip_lab.data.downstream.templates`.

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
        draws, seed: resamples of the images for 95 % intervals, see :func:`~protoclip_lab.evaluation.arrays.estimate`.

    Returns:
        "top1"; "top5" (all classes where there are fewer than five, so 100); "mean_per_class": top-1 averaged
        over the classes that have an image.

    Raises:
        ValueError: shapes that do not fit, naming both; a label out of range; NaN or Inf.
    """
    image = as_features(image, "image", normalise=True)
    classifier = F.normalize(as_features(classifier, "classifier"), dim=0)
    if image.shape[1] != len(classifier):
        raise ValueError(f"image {tuple(image.shape)} and classifier {tuple(classifier.shape)} do not fit: expected (N, d) and (d, C)")
    classes = classifier.shape[1]
    labels = as_indices(labels, len(image), classes, "labels").numpy()
    top = torch.cat([(block @ classifier).topk(min(5, classes)).indices for block in image.split(max(1, BLOCK_ELEMENTS // classes))])
    correct = top.cpu().numpy() == labels[:, None]
    return accuracy({"top1": correct[:, 0], "top5": correct.any(axis=1)}, labels, draws, seed)
