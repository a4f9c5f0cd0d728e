"""Every measure that applies, over any number of data sets, for one model."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from tqdm.auto import tqdm

from protoclip_lab import encoders
from protoclip_lab.config import Settings, nearest_name
from protoclip_lab.data import downstream
from protoclip_lab.data.downstream import Labelled, PairImages
from protoclip_lab.data.pairs import Pairs, prepare
from protoclip_lab.evaluation import clusters, gap, probes, prompts, ranking

# What each measure needs of a set.
MEASURES = {
    "zero_shot": "classes (images, or a table with label)",
    "linear_probe": "classes (images, or a table with label) and train_images or train_where",
    "knn": "classes (images, or a table with label) and train_images or train_where",
    "grouping": "classes (images, or a table with label)",
    "retrieval": "a table",
    "gap": "a table",
}
TABLE_ONLY = {"image_root", "image_column", "caption_column", "where", "train_where", "label"}


class EvaluationSet(Settings):
    """One data set and what to measure on it: labelled ``images``, or a ``table`` of captions."""

    name: str = Field(description="what the results call it")
    images: str = Field("", description="folder of class folders, or a tar of the same")
    train_images: str = Field("", description="the same, to fit probes on")
    table: str = Field("", description="TSV, CSV, Parquet or folder of 01_prepare_data, with captions")
    image_root: str = Field("", description="folder or tar of the table's images; empty takes the table's folder")
    image_column: str = Field("filepath", description="column of image paths")
    caption_column: str = Field("title", description="column of captions")
    where: dict[str, Any] = Field(default_factory=dict, description="column to value; only these rows are taken")
    train_where: dict[str, Any] = Field(default_factory=dict, description="the same, rows to fit probes on")
    label: str = Field("", description="column of the table with each image's class")
    classes: list[str] | str = Field("", description="class names in sorted order, a file of them, or a known set")
    templates: list[str] | str = Field(["a photo of a {}."], description="prompts with {}, or a known set's name")
    measures: list[str] = Field(default_factory=list, description="what to measure; empty takes all that apply")

    @field_validator("templates")
    @classmethod
    def _known_templates(cls, templates: list[str] | str) -> list[str]:
        return downstream.templates(templates)

    @field_validator("classes")
    @classmethod
    def _known_classes(cls, classes: list[str] | str) -> list[str] | str:
        # A file is read with the images: one that is missing is reported with them.
        return classes if not classes or Path(classes).suffix else downstream.class_names(classes)

    @model_validator(mode="after")
    def _measures_apply(self) -> "EvaluationSet":
        if bool(self.images) == bool(self.table):
            raise ValueError(f"evaluation set {self.name!r} needs images or a table, one of the two")
        stray = self.model_fields_set & (TABLE_ONLY if self.images else {"train_images"})
        if stray:
            other = "a table" if self.images else "images"
            raise ValueError(f"{sorted(stray)} of evaluation set {self.name!r} are for a set with {other}")
        labelled = bool(self.images or self.label)
        split = bool(self.train_images if self.images else self.train_where)
        flags = {
            "zero_shot": labelled,
            "grouping": labelled,
            "linear_probe": labelled and split,
            "knn": labelled and split,
        }
        applies = [m for m in MEASURES if flags.get(m, bool(self.table))]
        for measure in self.measures:
            if measure not in MEASURES:
                near = nearest_name(measure, MEASURES)
                raise ValueError(f"unknown measure {measure!r} of {self.name!r}; the nearest valid name is {near!r}")
            if measure not in applies:
                raise ValueError(f"measure {measure!r} of evaluation set {self.name!r} needs {MEASURES[measure]}")
        self.measures = self.measures or applies
        return self


class Results(list):
    """Rows {"dataset", "measure", "value"}.

    Attributes:
        missing: {"dataset", "reason"} of each set whose files are not there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.missing: list[dict[str, str]] = []


def evaluate(
    model: encoders.TwoTowers,
    sets: Sequence[EvaluationSet | dict],
    *,
    batch_size: int = 256,
    workers: int = 0,
    seed: int = 0,
    progress: bool = True,
    folder: str | Path | None = None,
) -> Results:
    """Every measure of every set, by the model's z_I and z_T; each image is encoded once, also for several sets.

    Args:
        seed: of the probe's split and of k-means.
        folder: where prepared tables are kept for the next call; None prepares them anew each time.

    Returns:
        Rows such as ``{"dataset": "cifar10", "measure": "zero_shot_top1", "value": 31.4}``. A set with a missing
        path gives none: it is logged, and listed in ``.missing``.

    Raises:
        ValueError: a setting or data that do not fit; all sets are opened before the first image is encoded.
    """
    sets = [EvaluationSet.model_validate(given) for given in sets]
    names = [given.name for given in sets]
    if len(set(names)) < len(names):
        raise ValueError(f"evaluation sets need a name each, these are {names}")
    results = Results()
    encoder = _Encoder(model, batch_size, workers, progress)
    with tempfile.TemporaryDirectory() as temporary:
        opened = []
        for given in sets:
            missing = _missing_paths(given)
            if missing:
                reason = f"not there: {', '.join(map(str, missing))}. Put the data there or correct the path"
                logging.getLogger(__name__).warning("evaluation set %s is left out: %s", given.name, reason)
                results.missing.append({"dataset": given.name, "reason": reason})
            else:
                opened.append((given, _open(given, Path(folder or temporary), progress)))
        todo = [(given, data, measure) for given, data in opened for measure in given.measures]
        for given, data, measure in (bar := tqdm(todo, disable=not progress, mininterval=2, unit="measure")):
            bar.set_description(f"{given.name}: {measure}")
            for key, value in _measure(measure, given, data, encoder, seed).items():
                name = key if key == measure else f"{measure}_{key}"
                results.append({"dataset": given.name, "measure": name, "value": value})
    return results


@dataclass
class _Data:
    images: Sequence
    fingerprint: str
    pairs: Pairs | None = None
    labelled: Labelled | None = None
    train: Labelled | None = None


@dataclass
class _Encoder:
    model: encoders.TwoTowers
    batch_size: int
    workers: int
    progress: bool

    def __post_init__(self) -> None:
        self._known: dict[tuple[str, str], Tensor] = {}

    def images(self, images: Sequence, fingerprint: str) -> Tensor:
        options = {"batch_size": self.batch_size, "workers": self.workers, "progress": self.progress}
        return self._once(("image", fingerprint), lambda: encoders.encode_images(self.model, images, **options))

    def captions(self, pairs: Pairs) -> Tensor:
        return self._once(("text", pairs.fingerprint), lambda: self.texts(pairs.captions))

    def texts(self, texts: list[str]) -> Tensor:
        return encoders.encode_texts(self.model, texts, batch_size=self.batch_size, progress=self.progress)

    def _once(self, key: tuple[str, str], encode: Callable[[], Tensor]) -> Tensor:
        if key not in self._known:
            self._known[key] = encode()
        return self._known[key]


def _missing_paths(given: EvaluationSet) -> list[Path]:
    classes = given.classes if isinstance(given.classes, str) else ""
    paths = (given.images, given.train_images, given.table, given.image_root, classes)
    return [Path(path).absolute() for path in paths if path and not Path(path).exists()]


def _open(given: EvaluationSet, folder: Path, progress: bool) -> _Data:
    classes = given.classes or None
    if given.images:
        test = downstream.from_classes(given.images, classes)
        train = downstream.from_classes(given.train_images) if given.train_images else None
        data = _Data(test.images, test.fingerprint, labelled=test, train=train)
    else:
        pairs = _prepare(given, given.where, folder, progress)
        data = _Data(PairImages(pairs), pairs.fingerprint, pairs)
        if given.label:
            data.labelled = downstream.from_pairs(pairs, given.label, classes)
        if given.label and given.train_where:
            data.train = downstream.from_pairs(_prepare(given, given.train_where, folder, progress), given.label)
    if data.train and data.train.fingerprint == data.fingerprint:
        raise ValueError(f"evaluation set {given.name!r} would fit its probes on the images it tests them on")
    return data


def _prepare(given: EvaluationSet, where: dict[str, Any], folder: Path, progress: bool) -> Pairs:
    columns = {"image_column": given.image_column, "caption_column": given.caption_column}
    arguments = {"image_root": given.image_root, "where": where, **columns}
    # Sets that differ in their labels alone share a preparation.
    key = hashlib.sha256(json.dumps([given.table, arguments], sort_keys=True).encode()).hexdigest()[:16]
    return prepare(given.table, folder / key, progress=progress, **arguments)


def _measure(measure: str, given: EvaluationSet, data: _Data, encoder: _Encoder, seed: int) -> dict[str, float]:
    image = encoder.images(data.images, data.fingerprint)
    if measure == "zero_shot":
        weights = prompts.classifier(encoder.texts, data.labelled.class_names, given.templates)
        return prompts.zero_shot(image, weights, data.labelled.labels)
    if measure == "grouping":
        return clusters.grouping(image, data.labelled.labels, seed=seed)
    if measure in ("linear_probe", "knn"):
        train = encoder.images(data.train.images, data.train.fingerprint)
        train_y, test_y = (np.array(part.classes)[part.labels] for part in (data.train, data.labelled))
        if measure == "knn":
            return probes.knn(train, train_y, image, test_y)
        return probes.linear_probe(train, train_y, image, test_y, seed=seed)
    if measure == "retrieval":
        return ranking.retrieval(image, encoder.captions(data.pairs), data.images.image_of_caption)
    return gap.modality_gap(image, encoder.captions(data.pairs), image_of_caption=data.images.image_of_caption)
