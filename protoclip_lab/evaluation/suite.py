"""Every measure that applies, over any number of data sets, for one checkpoint: in one go, or as a run saves them."""

import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from protoclip_lab import clustering, encoders, prototypes
from protoclip_lab.config import Settings, nearest_name
from protoclip_lab.data import downstream, shapes
from protoclip_lab.data.pairs import Pairs, fingerprint, prepare
from protoclip_lab.evaluation import arrays, clusters, gap, probes, prompts, ranking
from protoclip_lab.runs import CHECKSUMS, Run, damaged_files, locked, pairs_of, record_evaluations

log = logging.getLogger(__name__)


def possible(classes: Any = True, train: Any = True, captions: Any = True) -> list[str]:
    """The measures that can be taken of a set with classes, with images to fit probes on, with captions."""
    needs = {"zero_shot": classes, "linear_probe": train, "knn": train, "grouping": classes}
    needs |= {"retrieval": captions, "gap": captions, "gap_sweep": classes or captions}
    return [measure for measure, found in needs.items() if found]


SEEDS = 3  # of the k-means that grouping is measured by
# A set with a larger share of unreadable images is not measured.
MAX_UNREADABLE = 0.05


class EvaluationSet(Settings):
    """One data set and what to measure on it: labelled ``images``, a ``table`` of captions, or a known name."""

    name: str = Field(description="what the results call it; with root one of the names of data/downstream.yaml")
    root: str = Field("", description="data root that holds the set known by this name")
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
    scaling: Literal["standardise", "l2"] = Field("standardise", description="of features for the linear probe")
    measures: list[str] = Field(default_factory=list, description="what to measure; empty takes all that apply")

    @model_validator(mode="after")
    def _fit_together(self) -> "EvaluationSet":
        if self.root and self.name not in downstream.KNOWN:
            raise ValueError(
                f"no data set is known as {self.name!r}; the nearest name is {nearest_name(self.name, downstream.KNOWN)!r}"
            )
        if bool(self.root) + bool(self.images) + bool(self.table) != 1:
            raise ValueError(f"evaluation set {self.name!r} needs one of images, a table, and the root of a known set")
        needs = {"train_images": self.images, **dict.fromkeys(("image_root", "where", "train_where", "label"), self.table)}
        if stray := [name for name, found in needs.items() if getattr(self, name) and not found]:
            raise ValueError(f"{stray} of evaluation set {self.name!r} do not go with what it is made of")
        # A file is read with the images: one that is missing is reported with them.
        if self.classes and not (isinstance(self.classes, str) and Path(self.classes).suffix):
            self.classes = downstream.class_names(self.classes)
        known = downstream.KNOWN[self.name] if self.root else {}
        self.templates = downstream.templates(known.get("templates", self.templates))
        has = self.images or self.label, self.train_images or self.train_where, self.table
        # What a known set has is seen when it is opened.
        _check(self.measures, possible() if self.root else possible(*has), f" of {self.name!r}")
        return self


def _check(measures: Sequence[str], valid: Sequence[str], where: str = "") -> None:
    for measure in measures:
        if measure not in valid:
            raise ValueError(
                f"measure {measure!r}{where} is none of {valid}; the nearest valid name is {nearest_name(measure, valid)!r}"
            )


def evaluate(
    model: encoders.TwoTowers,
    sets: Sequence[EvaluationSet | dict],
    *,
    measures: Sequence[str] = (),
    records: Sequence[prototypes.Prototypes] = (),
    batch_size: int = 256,
    workers: int = 0,
    seed: int = 0,
    draws: int = 1000,
    folder: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Every measure of every set, by the model's z_I and z_T; each image is encoded once, also for several sets.

    Args:
        measures: what to measure of what a set asks for; none takes all.
        records: the model's prototypes; grouping then tells how well they match the classes too.
        seed: of the probe's split, of k-means and of the resamples.
        draws: resamples of the test items for the 95 % intervals.
        folder: where prepared tables (``sets/``) and features (``features/``, by fingerprint of model and data) are
            kept for the next call; None keeps none.

    Returns:
        Rows such as ``{"dataset": "cifar10", "measure": "zero_shot_top1", "value": 31.4, "low": 30.2, "high": 32.7}``.
        A set with a missing path, and one known by name that does not fit its class names, gives none: a warning is
        logged that says what was looked for and how to get it.

    Raises:
        ValueError: a setting or data that do not fit; all sets are opened before the first image is encoded.
    """
    sets = [EvaluationSet.model_validate(given) for given in sets]
    if len({given.name for given in sets}) < len(sets):
        raise ValueError(f"evaluation sets need a name each, these are {[given.name for given in sets]}")
    _check(measures, possible())
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(folder or temporary)
        opened = list(_open(sets, home / "sets"))
        features = _Features(model, home / "features", batch_size, workers)
        todo = [(data, m) for data in opened for m in data.measures if not measures or m in measures]
        for data, measure in tqdm(todo, desc="evaluating", mininterval=2, unit="measure"):
            for key, value in data.measure(measure, features, records, seed, draws).items():
                name = key if key == measure else f"{measure}_{key}"
                numbers = zip(("value", "low", "high"), (value, value.low, value.high), strict=True)
                numbers = {what: None if math.isnan(number) else float(number) for what, number in numbers}  # JSON knows no NaN
                rows.append({"dataset": data.given.name, "measure": name, **numbers})
    return rows


class _Features:
    """Features of a model, made once and kept in a folder."""

    def __init__(self, model: encoders.TwoTowers, folder: Path, batch_size: int, workers: int) -> None:
        self.image_encoder = partial(encoders.encode_images, model, batch_size=batch_size, workers=workers)
        self.text_encoder = partial(encoders.encode_texts, model, batch_size=batch_size)
        self.folder, self.model = folder, encoders.fingerprint(model)
        folder.mkdir(parents=True, exist_ok=True)

    def images(self, images: downstream.Images) -> tuple[torch.Tensor, torch.Tensor]:
        """z_I and h_I."""
        kept = self._kept(images.fingerprint, lambda: self.image_encoder(images)[::2])
        return kept["0"], kept["1"]

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """z_T."""
        return self._kept(fingerprint(texts, texts), lambda: [self.text_encoder(texts)])["0"]

    def _kept(self, mark: str, encode: Callable[[], Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
        file = self.folder / f"{fingerprint([self.model], [mark])[:32]}.safetensors"
        if not file.exists():
            found = {str(index): part.clone(memory_format=torch.contiguous_format) for index, part in enumerate(encode())}
            if not all(part.isfinite().all() for part in found.values()):
                return found  # a file may be readable the next time
            staging = file.with_suffix(f".{os.getpid()}")  # a training and its watcher may both be at it
            save_file(found, staging)
            staging.replace(file)
        return load_file(file)


@dataclass
class _Opened:
    """What a set holds: test images with classes (several lists of them, in a few sets), train images, captions."""

    given: EvaluationSet
    tests: list[downstream.Labelled]
    train: downstream.Labelled | None
    captions: downstream.PairImages | None

    @property
    def measures(self) -> list[str]:
        """What is asked for and can be taken."""
        can = possible(self.tests, self.train, self.captions)
        return [measure for measure in can if measure in (self.given.measures or can)]

    def measure(self, measure: str, features: _Features, records: Sequence[prototypes.Prototypes], seed: int, draws: int) -> dict:
        options = {"seed": seed, "draws": draws}
        found = {}
        if self.captions and measure in ("retrieval", "gap", "gap_sweep"):
            image, text = features.images(self.captions)[0], features.texts(self.captions.pairs.captions)
            rank = partial(ranking.retrieval, image_of_caption=self.captions.image_of_caption, **options)
            if measure == "retrieval":
                return rank(image, text)
            if measure == "gap":
                return gap.modality_gap(image, text, **rank.keywords) | gap.separability(image, text, **rank.keywords)
            found = gap.gap_sweep(image, text, rank)
        parts = [self._of_classes(measure, test, features, records, options) for test in self.tests]
        for name in parts[0] if parts else ():
            found[name] = arrays.mean([part[name] for part in parts])
        return found

    def _of_classes(self, measure: str, test: downstream.Labelled, features: _Features, records: Sequence, options: dict) -> dict:
        z, h, labels = self._readable(test, features)
        if measure in ("linear_probe", "knn"):
            x, _, train_labels = self._readable(self.train, features)
            # By name: train may lack a class, and then numbers them differently.
            train_y, test_y = np.array(self.train.classes)[train_labels], np.array(test.classes)[labels]
            probe = probes.knn if measure == "knn" else partial(probes.linear_probe, scaling=self.given.scaling)
            return probe(x, train_y, z, test_y, **options)
        if measure == "grouping":
            found = clusters.grouping(z, labels, seeds=SEEDS, **options) | clusters.separation(z, labels, **options)
            if (own := prototypes.of_modality(records, "image")) is not None:
                matched = clusters.agreement(clustering.nearest(h, own), labels, **options)
                found |= {f"prototypes_{name}": value for name, value in matched.items()}
            return found
        weights = prompts.classifier(features.texts, test.class_names, self.given.templates)
        if measure == "gap_sweep":
            return gap.gap_sweep(z, weights.T, lambda x, w: prompts.zero_shot(x, w.T, labels, **options))
        return prompts.zero_shot(z, weights, labels, **options)

    def _readable(self, part: downstream.Labelled, features: _Features) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """z_I, h_I and labels of the images that could be read."""
        z, h = features.images(part.images)
        good = z.isfinite().all(dim=1)
        lost = len(good) - int(good.sum())
        if lost > MAX_UNREADABLE * len(good):
            raise ValueError(f"{lost} of {len(good)} images of {self.given.name} have no finite features: see the log")
        if lost:
            log.warning("%d of %d images of %s are left out as unreadable", lost, len(good), self.given.name)
        return z[good], h[good], part.labels[good.numpy()]


def _open(sets: Sequence[EvaluationSet], folder: Path) -> Iterator[_Opened]:
    for given in sets:
        try:
            yield _opened(given, folder)
        except Exception as error:  # a reader may raise anything on broken files
            if not (given.root or isinstance(error, FileNotFoundError)):
                raise
            log.warning("evaluation set %s is left out: %s: %s", given.name, type(error).__name__, error)


def _opened(given: EvaluationSet, folder: Path) -> _Opened:
    tests, train, captions = [], None, None
    if given.root and given.name not in downstream.CAPTIONED:
        tests = downstream.known(given.name, given.root)
        try:
            train = downstream.known(given.name, given.root, "train")[0]
        except (FileNotFoundError, RuntimeError) as missing:  # the latter is torchvision's
            log.info("evaluation set %s is not probed: %s", given.name, missing)
    elif given.images:
        tests = [downstream.from_classes(given.images, given.classes or None)]
        train = downstream.from_classes(given.train_images) if given.train_images else None
    else:
        table = given.model_dump(include={"table", "image_root", "image_column", "caption_column", "where"})
        table |= downstream.captioned(given.name, given.root, folder) if given.root else {}
        captions = downstream.PairImages(_prepared(table, folder))
        if given.label:
            tests = [downstream.from_pairs(captions.pairs, given.label, given.classes or None)]
        if given.label and given.train_where:
            train = downstream.from_pairs(_prepared(table | {"where": given.train_where}, folder), given.label)
    if train and any(not set(train.images.names).isdisjoint(test.images.names) for test in tests):
        raise ValueError(f"evaluation set {given.name!r} would fit its probes on images it tests them on")
    return _Opened(given, tests, train, captions)


def _prepared(arguments: dict[str, Any], folder: Path) -> Pairs:
    # Sets that differ in their labels alone share a preparation.
    key = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock"):  # a training and its watcher may both be at it
        return prepare(arguments["table"], folder / key, **{k: v for k, v in arguments.items() if k != "table"})


def default_sets(run: Run) -> list[dict[str, Any]]:
    """What to evaluate a run on when nothing is named: the held-out part of the shapes world it was trained on.

    Raises:
        ValueError: it was trained on something else.
    """
    table = Path(pairs_of(run).source)
    if not table.with_name("shapes.json").exists():
        raise ValueError(f"{run.path} was not trained on the shapes world: name what to evaluate on, and its data_root")
    world = {"table": str(table), "image_root": str(table.with_name("images.tar")), "where": {"split": "test"}}
    train = {"train_where": {"split": "train"}, "measures": ["zero_shot", "linear_probe", "grouping"]}
    factors = [{"name": f, "label": f, "templates": f"shapes/{f}", **world, **train} for f in shapes.FACTORS]
    return [*factors, {"name": "shapes", "measures": ["retrieval", "gap", "gap_sweep"], **world}]


def evaluate_checkpoint(
    checkpoint: str | Path,
    output: str | Path = "",
    *,
    datasets: Sequence[str] = (),
    data_root: str | Path = "",
    sets: Sequence[dict[str, Any]] = (),
    scaling: str = "standardise",
    **options: Any,
) -> pd.DataFrame:
    """Evaluate a checkpoint and keep the rows in its run's ``evaluation.jsonl``, all of them as ``evaluation.csv``.

    Args:
        checkpoint: a run (its latest checkpoint is taken), a checkpoint folder, or what else
            :func:`protoclip_lab.encoders.load` takes.
        output: folder for ``evaluation.csv``, and for ``evaluation.jsonl`` where the checkpoint belongs to no run;
            empty takes the run's.
        datasets: names of ``data/downstream.yaml``; none takes all of them.
        data_root: the folder that holds them.
        sets: further ones, settings of :class:`EvaluationSet`; without any and without a data root a run's
            :func:`default_sets` are taken.
        scaling: "standardise" | "l2", of features for the linear probe on the sets of ``datasets``.
        options: measures, batch_size, workers, seed, draws of :func:`evaluate`.

    Returns:
        A row for each data set and measure: checkpoint, dataset, measure, value, low, high.

    Raises:
        ValueError: a checkpoint of no run without ``output``, unknown names, or nothing that could be evaluated.
    """
    run, source = _located(checkpoint)
    if not (run or output):
        raise ValueError(f"{checkpoint} belongs to no run: name a folder for its results (output; --out FOLDER)")
    chosen = _chosen(run, datasets, data_root, sets, scaling, **options)
    home = run.path if run else Path(output)
    model = encoders.load(source).to(encoders.best_device())
    rows = evaluate(model, chosen, records=prototypes.load(source) if run else [], folder=home, **options)
    if not rows:
        raise ValueError(f"none of {[given.name for given in chosen]} is there and has what the measures need")
    rows = [{"checkpoint": source.name if run else str(checkpoint), **row} for row in rows]
    kept = record_evaluations(home, rows)
    folder = Path(output or home)
    folder.mkdir(parents=True, exist_ok=True)
    kept.to_csv(folder / "evaluation.csv", index=False)
    return pd.DataFrame(rows).astype(dict.fromkeys(("value", "low", "high"), float))


def watch(run: str | Path, *, interval: float = 5.0, **options: Any) -> Iterator[pd.DataFrame]:
    """Evaluate each checkpoint of a run as it appears, once, until the run is finished.

    It may be stopped and started at will: what was evaluated with the same options is marked in ``watched/``. A
    checkpoint is there when its folder has its name; one whose files do not match their checksums is passed over.

    Args:
        interval: seconds between looks.
        options: of :func:`evaluate_checkpoint`.

    Yields:
        All evaluations of the run: at the start, and whenever there are new ones.
    """
    run, damaged = Run(run), set()
    _chosen(run, **options)
    marks = run.path / "watched"
    marks.mkdir(exist_ok=True)
    yield run.evaluations()
    while True:
        finished = run.finished  # asked first: when it is, the last checkpoint is there
        kept = set(run.evaluations()["checkpoint"])
        for checkpoint in run.checkpoints():
            look = json.dumps([checkpoint.name, (checkpoint / CHECKSUMS).read_text(), options], default=str)
            mark = marks / hashlib.sha256(look.encode()).hexdigest()[:16]
            state = checkpoint, checkpoint.stat().st_mtime_ns
            if state in damaged or (mark.exists() and checkpoint.name in kept):
                continue
            if found := damaged_files(checkpoint):
                log.warning("checkpoint %s is damaged (%s) and is passed over", checkpoint, ", ".join(found))
                damaged.add(state)
                continue
            evaluate_checkpoint(checkpoint, **options)
            mark.touch()
            yield run.evaluations()
        if finished:
            return
        time.sleep(interval)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Evaluation rows of one checkpoint to read: measures by data sets, "value [low, high]"."""

    def text(row: Any) -> str:
        value, low, high = (f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}" for x in (row.value, row.low, row.high))
        return value if pd.isna(row.low) else f"{value} [{low}, {high}]"

    texts = rows.assign(value=[text(row) for row in rows.itertuples()])
    return texts.pivot_table(index="measure", columns="dataset", values="value", aggfunc="first", sort=False).fillna("")


def _located(checkpoint: str | Path) -> tuple[Run | None, Path | str]:
    """The run a checkpoint belongs to, if any, and the checkpoint."""
    path = Path(checkpoint)
    home = path.parents[1] if path.parent.name == "checkpoints" else path
    # A checkpoint may hold the config.json of its text tower.
    if (home / "config.json").exists() and not (home / "open_clip_config.json").exists():
        run = Run(home)
        return run, run.checkpoint("" if home == path else path)
    return None, checkpoint


def _chosen(run: Run | None, datasets=(), data_root="", sets=(), scaling="standardise", measures=(), **rest) -> list[EvaluationSet]:
    _check(measures, possible())
    if datasets and not data_root:
        raise ValueError(f"datasets = {list(datasets)} need data_root, the folder that holds them")
    names = datasets or (downstream.KNOWN if data_root else ())
    given = [*({"name": name, "root": str(data_root), "scaling": scaling} for name in names), *sets]
    if not (given or run):
        raise ValueError("name what to evaluate on: data_root, with datasets for some of those in it, or sets")
    return [EvaluationSet.model_validate(each) for each in given or default_sets(run)]
