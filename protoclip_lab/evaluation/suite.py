"""Every measure that applies, over any number of data sets, for one model."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field, model_validator
from torch import Tensor
from tqdm.auto import tqdm

from protoclip_lab import encoders
from protoclip_lab.config import Settings, nearest_name
from protoclip_lab.data import downstream, shapes
from protoclip_lab.data.pairs import Pairs, prepare
from protoclip_lab.evaluation import clusters, gap, probes, prompts, ranking
from protoclip_lab.runs import Run, pairs_of

log = logging.getLogger(__name__)

MEASURES = ("zero_shot", "linear_probe", "knn", "grouping", "retrieval", "gap")
# What a set must have for some of them.
NEEDS = {
    "classes (images, or a table with label)": ("zero_shot", "linear_probe", "knn", "grouping"),
    "train_images or train_where": ("linear_probe", "knn"),
    "a table of captions": ("retrieval", "gap"),
}
TABLE_ONLY = ("image_root", "where", "train_where", "label")


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

    @model_validator(mode="after")
    def _fit_together(self) -> EvaluationSet:
        self.templates = downstream.templates(self.templates)
        # A file is read with the images: one that is missing is reported with them.
        if self.classes and not (isinstance(self.classes, str) and Path(self.classes).suffix):
            self.classes = downstream.class_names(self.classes)
        if bool(self.images) == bool(self.table):
            raise ValueError(f"evaluation set {self.name!r} needs images or a table, one of the two")
        stray = [name for name in (TABLE_ONLY if self.images else ("train_images",)) if getattr(self, name)]
        if stray:
            other = "a table" if self.images else "images"
            raise ValueError(f"{stray} of evaluation set {self.name!r} are for a set with {other}")
        has = (self.images or self.label, self.train_images or self.train_where, self.table)
        wanting = [need for need, found in zip(NEEDS, has, strict=True) if not found]
        lacks = {measure: [need for need in wanting if measure in NEEDS[need]] for measure in MEASURES}
        for measure in self.measures:
            if measure not in MEASURES:
                near = nearest_name(measure, MEASURES)
                raise ValueError(f"unknown measure {measure!r} of {self.name!r}; the nearest valid name is {near!r}")
            if lacks[measure]:
                raise ValueError(f"measure {measure!r} of {self.name!r} needs {' and '.join(lacks[measure])}")
        self.measures = self.measures or [measure for measure in MEASURES if not lacks[measure]]
        return self


def evaluate(
    model: encoders.TwoTowers,
    sets: Sequence[EvaluationSet | dict],
    *,
    batch_size: int = 256,
    workers: int = 0,
    seed: int = 0,
    folder: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Every measure of every set, by the model's z_I and z_T; each image is encoded once, also for several sets.

    Args:
        seed: of the probe's split and of k-means.
        folder: where prepared tables are kept for the next call; None prepares them anew each time.

    Returns:
        Rows such as ``{"dataset": "cifar10", "measure": "zero_shot_top1", "value": 31.4}``. A set with a missing
        path gives none: a warning is logged that names it.

    Raises:
        ValueError: a setting or data that do not fit; all sets are opened before the first image is encoded.
    """
    sets = [EvaluationSet.model_validate(given) for given in sets]
    if len({given.name for given in sets}) < len(sets):
        raise ValueError(f"evaluation sets need a name each, these are {[given.name for given in sets]}")
    texts = partial(encoders.encode_texts, model, batch_size=batch_size)
    images = partial(encoders.encode_images, model, batch_size=batch_size, workers=workers)
    known: dict[str, Tensor] = {}

    def features(items: downstream.ImageFiles | downstream.PairImages | Pairs) -> Tensor:
        """Of images, or of the captions of pairs."""
        if items.fingerprint not in known:
            known[items.fingerprint] = texts(items.captions) if isinstance(items, Pairs) else images(items)
        return known[items.fingerprint]

    with tempfile.TemporaryDirectory() as temporary:
        opened = [_Opened(given, Path(folder or temporary)) for given in sets if _is_there(given)]
        todo = [(data, measure) for data in opened for measure in data.given.measures]
        rows = []
        for data, measure in tqdm(todo, desc="evaluating", mininterval=2, unit="measure"):
            for key, value in data.measure(measure, features, texts, seed).items():
                name = key if key == measure else f"{measure}_{key}"
                rows.append({"dataset": data.given.name, "measure": name, "value": value})
    return rows


def _is_there(given: EvaluationSet) -> bool:
    paths = (given.images, given.train_images, given.table, given.image_root, given.classes)
    named = [Path(path).absolute() for path in paths if path and isinstance(path, str)]
    missing = ", ".join(str(path) for path in named if not path.exists())
    if missing:
        log.warning("evaluation set %s is left out, put its data there or correct the path: %s", given.name, missing)
    return not missing


class _Opened:
    """The images of a set; where it has them, the same with classes, and those to fit probes on."""

    def __init__(self, given: EvaluationSet, folder: Path) -> None:
        self.given, self.folder = given, folder
        self.test = self.train = None
        if given.images:
            self.test = downstream.from_classes(given.images, given.classes or None)
            self.images = self.test.images
            self.train = downstream.from_classes(given.train_images) if given.train_images else None
        else:
            pairs = self._prepare(given.where)
            self.images = downstream.PairImages(pairs)
            if given.label:
                self.test = downstream.from_pairs(pairs, given.label, given.classes or None)
            if given.label and given.train_where:
                self.train = downstream.from_pairs(self._prepare(given.train_where), given.label)
        if self.train and not self.train.images.paths.isdisjoint(self.images.paths):
            raise ValueError(f"evaluation set {given.name!r} would fit its probes on images it tests them on")

    def _prepare(self, where: dict[str, Any]) -> Pairs:
        arguments = self.given.model_dump(include={"image_root", "image_column", "caption_column"}) | {"where": where}
        # Sets that differ in their labels alone share a preparation.
        key = hashlib.sha256(json.dumps([self.given.table, arguments], sort_keys=True).encode()).hexdigest()[:16]
        return prepare(self.given.table, self.folder / key, **arguments)

    def measure(self, measure: str, features: Callable, texts: Callable, seed: int) -> dict[str, float]:
        image, images, test, train = features(self.images), self.images, self.test, self.train
        if measure == "zero_shot":
            weights = prompts.classifier(texts, test.class_names, self.given.templates)
            return prompts.zero_shot(image, weights, test.labels)
        if measure == "grouping":
            return clusters.grouping(image, test.labels, seed=seed)
        if measure == "retrieval":
            return ranking.retrieval(image, features(images.pairs), images.image_of_caption)
        if measure == "gap":
            return gap.modality_gap(image, features(images.pairs), image_of_caption=images.image_of_caption)
        # By name: train may lack a class, and then numbers them differently.
        train_y, test_y = (np.array(part.classes)[part.labels] for part in (train, test))
        if measure == "knn":
            return probes.knn(features(train.images), train_y, image, test_y)
        return probes.linear_probe(features(train.images), train_y, image, test_y, seed=seed)


def default_sets(run: Run) -> list[dict[str, Any]]:
    """What to evaluate a run on when nothing is named: the held-out part of the shapes world it was trained on.

    Raises:
        ValueError: it was trained on something else.
    """
    table = Path(pairs_of(run).source)
    if not table.with_name("shapes.json").exists():
        raise ValueError(f"{run.path} was not trained on the shapes world: name what to evaluate on in `sets`")
    world = {"table": str(table), "image_root": str(table.with_name("images.tar")), "where": {"split": "test"}}
    train = {"train_where": {"split": "train"}, "measures": ["zero_shot", "linear_probe", "grouping"]}
    factors = [{"name": f, "label": f, "templates": f"shapes/{f}", **world, **train} for f in shapes.FACTORS]
    return [*factors, {"name": "shapes", "measures": ["retrieval", "gap"], **world}]


def evaluate_run(
    run: str | Path,
    output: str | Path,
    *,
    checkpoint: str | Path = "",
    sets: Sequence[dict[str, Any]] = (),
    batch_size: int = 256,
    workers: int = 0,
    seed: int = 0,
) -> pd.DataFrame:
    """Evaluate one checkpoint of a run and keep the rows in the run's ``evaluation.jsonl``.

    Args:
        output: folder for ``evaluation.csv`` and the prepared tables.
        checkpoint: empty takes the latest.
        sets: settings of :class:`EvaluationSet`; none takes :func:`default_sets`.

    Returns:
        A row for each data set and measure: episode, dataset, measure, value.
    """
    run = Run(run)
    checkpoint = run.checkpoint(checkpoint)
    episode = json.loads((checkpoint / "trainer.json").read_text())["episode"]
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    options = {"batch_size": batch_size, "workers": workers, "seed": seed, "folder": output / "sets"}
    found = evaluate(encoders.load(checkpoint).to(encoders.best_device()), sets or default_sets(run), **options)
    rows = [{"episode": episode, **row} for row in found]
    run.record_evaluations(rows)
    table = pd.DataFrame(rows, columns=["episode", "dataset", "measure", "value"])
    table.to_csv(output / "evaluation.csv", index=False)
    return table
