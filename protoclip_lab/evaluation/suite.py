"""Every measure that applies, over any number of data sets, for one model."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from tqdm.auto import tqdm

from protoclip_lab import encoders
from protoclip_lab.config import Settings, nearest_name
from protoclip_lab.data import downstream, shapes
from protoclip_lab.data.downstream import ImageFiles, Labelled, PairImages
from protoclip_lab.data.pairs import Pairs, prepare
from protoclip_lab.evaluation import clusters, gap, probes, prompts, ranking
from protoclip_lab.runs import Run, pairs_of

if TYPE_CHECKING:
    import pandas as pd

CLASSES = "classes (images, or a table with label)"
TRAIN = "train_images or train_where"
CAPTIONS = "a table of captions"
# Each measure and what it needs of a set.
MEASURES = {
    "zero_shot": (CLASSES,),
    "linear_probe": (CLASSES, TRAIN),
    "knn": (CLASSES, TRAIN),
    "grouping": (CLASSES,),
    "retrieval": (CAPTIONS,),
    "gap": (CAPTIONS,),
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

    @field_validator("templates")
    @classmethod
    def _known_templates(cls, templates: list[str] | str) -> list[str]:
        return downstream.templates(templates)

    @field_validator("classes")
    @classmethod
    def _known_classes(cls, classes: list[str] | str) -> list[str] | str:
        # A file is read with the images: one that is missing is reported with them.
        is_file = isinstance(classes, str) and Path(classes).suffix
        return classes if is_file or not classes else downstream.class_names(classes)

    @model_validator(mode="after")
    def _measures_apply(self) -> EvaluationSet:
        if bool(self.images) == bool(self.table):
            raise ValueError(f"evaluation set {self.name!r} needs images or a table, one of the two")
        stray = [name for name in (TABLE_ONLY if self.images else ("train_images",)) if getattr(self, name)]
        if stray:
            other = "a table" if self.images else "images"
            raise ValueError(f"{stray} of evaluation set {self.name!r} are for a set with {other}")
        has = {CLASSES: self.images or self.label, TRAIN: self.train_images or self.train_where, CAPTIONS: self.table}
        lacks = {measure: [need for need in needs if not has[need]] for measure, needs in MEASURES.items()}
        for measure in self.measures:
            if measure not in MEASURES:
                near = nearest_name(measure, MEASURES)
                raise ValueError(f"unknown measure {measure!r} of {self.name!r}; the nearest valid name is {near!r}")
            if lacks[measure]:
                needs = " and ".join(lacks[measure])
                raise ValueError(f"measure {measure!r} of evaluation set {self.name!r} needs {needs}")
        self.measures = self.measures or [measure for measure in MEASURES if not lacks[measure]]
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
                opened.append((given, *_open(given, Path(folder or temporary), progress)))
        todo = [(measure, *of_set) for of_set in opened for measure in of_set[0].measures]
        bar = tqdm(todo, disable=not progress, mininterval=2, unit="measure")
        for measure, given, images, test, train in bar:
            bar.set_description(f"{given.name}: {measure}")
            for key, value in _measure(measure, images, test, train, given.templates, encoder, seed).items():
                name = key if key == measure else f"{measure}_{key}"
                results.append({"dataset": given.name, "measure": name, "value": value})
    return results


@dataclass
class _Encoder:
    model: encoders.TwoTowers
    batch_size: int
    workers: int
    progress: bool
    known: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def images(self, images: ImageFiles | PairImages) -> Tensor:
        key = ("images", images.fingerprint)
        if key not in self.known:
            options = {"batch_size": self.batch_size, "workers": self.workers, "progress": self.progress}
            self.known[key] = encoders.encode_images(self.model, images, **options)
        return self.known[key]

    def captions(self, pairs: Pairs) -> Tensor:
        key = ("captions", pairs.fingerprint)
        if key not in self.known:
            self.known[key] = self.texts(pairs.captions)
        return self.known[key]

    def texts(self, texts: list[str]) -> Tensor:
        return encoders.encode_texts(self.model, texts, batch_size=self.batch_size, progress=self.progress)


def _missing_paths(given: EvaluationSet) -> list[Path]:
    classes = given.classes if isinstance(given.classes, str) else ""
    paths = (given.images, given.train_images, given.table, given.image_root, classes)
    return [Path(path).absolute() for path in paths if path and not Path(path).exists()]


def _open(
    given: EvaluationSet, folder: Path, progress: bool
) -> tuple[ImageFiles | PairImages, Labelled | None, Labelled | None]:
    """The images, the same with classes, and those to fit probes on."""
    test = train = None
    if given.images:
        test = downstream.from_classes(given.images, given.classes or None)
        images = test.images
        train = downstream.from_classes(given.train_images) if given.train_images else None
    else:
        pairs = _prepare(given, given.where, folder, progress)
        images = PairImages(pairs)
        if given.label:
            test = downstream.from_pairs(pairs, given.label, given.classes or None)
        if given.label and given.train_where:
            train = downstream.from_pairs(_prepare(given, given.train_where, folder, progress), given.label)
    if train and not train.images.paths.isdisjoint(images.paths):
        raise ValueError(f"evaluation set {given.name!r} would fit its probes on images it tests them on")
    return images, test, train


def _prepare(given: EvaluationSet, where: dict[str, Any], folder: Path, progress: bool) -> Pairs:
    columns = {"image_column": given.image_column, "caption_column": given.caption_column}
    arguments = {"image_root": given.image_root, "where": where, **columns}
    # Sets that differ in their labels alone share a preparation.
    key = hashlib.sha256(json.dumps([given.table, arguments], sort_keys=True).encode()).hexdigest()[:16]
    return prepare(given.table, folder / key, progress=progress, **arguments)


def _measure(
    measure: str,
    images: ImageFiles | PairImages,
    test: Labelled | None,
    train: Labelled | None,
    templates: list[str],
    encoder: _Encoder,
    seed: int,
) -> dict[str, float]:
    image = encoder.images(images)
    if measure == "zero_shot":
        return prompts.zero_shot(image, prompts.classifier(encoder.texts, test.class_names, templates), test.labels)
    if measure == "grouping":
        return clusters.grouping(image, test.labels, seed=seed)
    if measure == "retrieval":
        return ranking.retrieval(image, encoder.captions(images.pairs), images.image_of_caption)
    if measure == "gap":
        return gap.modality_gap(image, encoder.captions(images.pairs), image_of_caption=images.image_of_caption)
    # By name: train may lack a class, and then numbers them differently.
    train_y, test_y = (np.array(part.classes)[part.labels] for part in (train, test))
    if measure == "knn":
        return probes.knn(encoder.images(train.images), train_y, image, test_y)
    return probes.linear_probe(encoder.images(train.images), train_y, image, test_y, seed=seed)


def default_sets(run: Run) -> list[dict[str, Any]]:
    """What to evaluate a run on when nothing is named: the held-out part of the shapes world it was trained on.

    Raises:
        ValueError: it was trained on something else.
    """
    table = Path(pairs_of(run).source)
    if not table.with_name("shapes.json").exists():
        raise ValueError(
            f"{run.path} was not trained on the shapes world: name evaluation sets in the parameter `sets`"
        )
    world = {"table": str(table), "image_root": str(table.with_name("images.tar")), "where": {"split": "test"}}
    train = {"train_where": {"split": "train"}, "measures": ["zero_shot", "linear_probe", "grouping"]}
    factors = [
        {"name": factor, "label": factor, "templates": list(shapes.PROMPTS[factor]), **world, **train}
        for factor in shapes.FACTORS
    ]
    return [*factors, {"name": "shapes", "measures": ["retrieval", "gap"], **world}]


def evaluate_run(
    run: str | Path,
    *,
    output: str | Path = "",
    checkpoint: str | Path = "",
    sets: Sequence[dict[str, Any]] = (),
    batch_size: int = 256,
    workers: int = 0,
    seed: int = 0,
) -> pd.DataFrame:
    """Evaluate one checkpoint of a run and keep the rows in the run's ``evaluation.jsonl``.

    Args:
        output: folder for ``evaluation.csv``; empty writes none.
        checkpoint: empty takes the latest.
        sets: settings of :class:`EvaluationSet`; none takes :func:`default_sets`.

    Returns:
        A row for each data set and measure: episode, dataset, measure, value.
    """
    import pandas as pd

    run = Run(run)
    checkpoint = run.checkpoint(checkpoint)
    episode = json.loads((checkpoint / "trainer.json").read_text())["episode"]
    found = evaluate(
        encoders.load(checkpoint),
        sets or default_sets(run),
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        folder=Path(output) / "sets" if output else None,
    )
    rows = [{"episode": episode, **row} for row in found]
    run.record_evaluations(rows)
    table = pd.DataFrame(rows, columns=["episode", "dataset", "measure", "value"])
    if output:
        Path(output).mkdir(parents=True, exist_ok=True)
        table.to_csv(Path(output) / "evaluation.csv", index=False)
    return table
