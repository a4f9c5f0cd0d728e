"""Every measure that applies, over any number of data sets, for one checkpoint: in one go, or as a run saves them."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from filelock import FileLock
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from protoclip_lab import encoders, evaluation, prototypes
from protoclip_lab.config import Settings, require, require_known
from protoclip_lab.data import downstream, shapes
from protoclip_lab.data.downstream import Labelled, PairImages
from protoclip_lab.data.pairs import Pairs, fingerprint, prepare
from protoclip_lab.encoders import TwoTowers
from protoclip_lab.runs import Run, damaged_files, pairs_of, record_evaluations

log = logging.getLogger(__name__)

MEASURES = ("zero_shot", "linear_probe", "knn", "grouping", "retrieval", "gap", "gap_sweep")


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
    classes: list[str] | str = Field("", description="class names in sorted order, or a known set")
    templates: list[str] | str = Field(["a photo of a {}."], min_length=1, description="prompts with {}, or a known set's name")
    scaling: Literal["standardise", "l2"] = Field("standardise", description="of features for the linear probe")
    measures: list[str] = Field(default_factory=list, description="what to measure; empty takes all that apply")

    @model_validator(mode="after")
    def _fit_together(self) -> "EvaluationSet":
        if self.root:
            require_known(self.name, downstream.KNOWN, f"no set is known as {self.name!r}")
        require([self.root, self.images, self.table].count("") == 2, f"evaluation set {self.name!r} needs one of images, table, root")
        self.classes = downstream.listed("classes", self.classes or [])
        known = downstream.KNOWN.get(self.root and self.name, {})
        self.templates = downstream.listed("templates", known.get("templates", self.templates))
        require(all("{}" in template for template in self.templates), f"templates {self.templates}: each needs {{}} for the class")
        _check(self.measures)
        return self


def _check(measures: Sequence[str]) -> None:
    for measure in measures:
        require_known(measure, MEASURES, f"measure {measure!r} is none of {MEASURES}")


def evaluate(model: TwoTowers, sets: Sequence, folder: Path, *, measures: Sequence = (), records=(), seed=0, draws=1000) -> list[dict]:
    """Every measure of every set, by the model's z_I and z_T; each image is encoded once, also for several sets.

    Args:
        sets: an :class:`EvaluationSet` each, or its settings as a dict.
        folder: where prepared tables (``sets/``) and features (``features/``, by fingerprint of model and data) are
            kept for the next call.
        measures: what to measure of what a set asks for; none takes all.
        records: the model's prototypes; grouping then tells how well they match the classes too.
        seed: of the probe's split, of k-means and of the resamples.
        draws: resamples of the test items for the 95 % intervals.

    Returns:
        Rows such as ``{"dataset": "cifar10", "measure": "zero_shot_top1", "value": 31.4, "low": 30.2, "high": 32.7}``.
        A set that is missing, or does not fit its class names, gives none: a warning is logged that says what was looked
        for and how to get it. All sets are opened before the first image is encoded.

    Raises:
        ValueError: a setting that does not fit.
    """
    sets = [EvaluationSet.model_validate(given) for given in sets]
    require(len({given.name for given in sets}) == len(sets), f"evaluation sets need a name each: {[given.name for given in sets]}")
    todo, rows = [], []
    for given in sets:
        try:
            parts = _opened(given, folder / "sets")
            todo += [(name, given, *parts) for name in given.measures or MEASURES if name in (measures or MEASURES)]
        except Exception as error:  # a reader may raise anything on broken files
            log.warning("evaluation set %s is left out: %s: %s", given.name, type(error).__name__, error)
    (folder / "features").mkdir(parents=True, exist_ok=True)
    features = partial(_encoded, model, encoders.fingerprint(model), folder / "features")
    for measure, given, tests, train in tqdm(todo, desc="evaluating", mininterval=2, unit="measure"):
        parts = [_measured(measure, given, test, train, features, records, seed=seed, draws=draws) for test in tests]
        for key, found in evaluation.mean(parts).items():
            name = key if key == measure else f"{measure}_{key}"
            value, low, high = (None if np.isnan(x) else float(x) for x in (found, found.low, found.high))  # JSON knows no NaN
            rows.append({"dataset": given.name, "measure": name, "value": value, "low": low, "high": high})
    return rows


def _encoded(model: TwoTowers, mark: str, folder: Path, data: Sequence) -> dict:
    """Features of a model, made once and kept in a folder: "0" is z_I of images, z_T of texts; "1" h_I of images."""
    visual = isinstance(data, downstream.Images)
    file = folder / f"{fingerprint([mark], [data.fingerprint if visual else fingerprint(data, data)])[:32]}.safetensors"
    if not file.exists():
        # Many images are read by processes of their own, which take a while to start.
        workers = min(8, os.cpu_count() - 1, len(data) // 2000)
        found = encoders.encode_images(model, data, workers=workers)[::2] if visual else [encoders.encode_texts(model, data)]
        staging = file.with_suffix(f".{os.getpid()}")  # a training and its watcher may both be at it
        save_file({str(index): part.clone() for index, part in enumerate(found)}, staging)
        staging.replace(file)
    return load_file(file)


def _opened(given: EvaluationSet, folder: Path) -> tuple[list[Labelled], Labelled | None]:
    """Test images (several lists of them, in a few sets) and train images; without classes where a table has none."""
    train = None
    if given.images:
        tests = [downstream.from_classes(given.images, given.classes or None)]
        train = downstream.from_classes(given.train_images) if given.train_images else None
    elif given.root and "images" not in downstream.KNOWN[given.name]:
        tests = downstream.known(given.name, given.root)
        with suppress(FileNotFoundError, RuntimeError):  # not there, so not probed; the latter is torchvision's
            train = downstream.known(given.name, given.root, "train")[0]
    else:
        table = given.model_dump(include={"table", "image_root", "image_column", "caption_column", "where"})
        table |= downstream.captioned(given.name, given.root, folder) if given.root else {}
        pairs = _prepared(table, folder)
        captioned = Labelled([], [], np.empty(0), PairImages(pairs))
        tests = [downstream.from_pairs(pairs, given.label, given.classes or None) if given.label else captioned]
        if given.train_where:
            train = downstream.from_pairs(_prepared(table | {"where": given.train_where}, folder), given.label)
    if train and any(not set(train.images.names).isdisjoint(test.images.names) for test in tests):
        raise ValueError(f"evaluation set {given.name!r} would fit its probes on images it tests them on")
    return tests, train


def _prepared(arguments: dict[str, Any], folder: Path) -> Pairs:
    # Sets that differ in their labels alone share a preparation.
    with FileLock(folder / "lock"):  # a training and its watcher may both be at it
        return prepare(**arguments, out=folder / fingerprint([str(arguments)], [""])[:16])


def _measured(measure: str, given: EvaluationSet, test: Labelled, train: Any, features: Callable, records: Sequence, **options) -> dict:
    """One measure of one list of images: by their captions, by their classes, the sweep by both; nothing without either."""
    found = {}
    if measure in ("retrieval", "gap", "gap_sweep") and isinstance(test.images, PairImages):
        image, text = features(test.images)["0"], features(test.images.pairs.captions)["0"]
        rank = partial(evaluation.retrieval, image_of_caption=test.images.image_of_caption, **options)
        ways = {"retrieval": rank, "gap_sweep": partial(evaluation.gap_sweep, measure=rank)}
        ways["gap"] = lambda *both: evaluation.modality_gap(*both, **rank.keywords) | evaluation.separability(*both, **rank.keywords)
        found = ways[measure](image, text)
    if measure in ("retrieval", "gap") or not test.classes or (measure in ("linear_probe", "knn") and train is None):
        return found
    z, h, labels = _readable(test, features, given.name)
    if measure in ("linear_probe", "knn"):
        x, _, train_labels = _readable(train, features, given.name)
        # By name: train may lack a class, and then numbers them differently.
        train_y, test_y = np.array(train.classes)[train_labels], np.array(test.classes)[labels]
        probe = evaluation.knn if measure == "knn" else partial(evaluation.linear_probe, scaling=given.scaling)
        return probe(x, train_y, z, test_y, **options)
    if measure == "grouping":
        found = evaluation.grouping(z, labels, seeds=3, **options) | evaluation.separation(z, labels, **options)
        if own := prototypes.among(records, "image"):
            matched = evaluation.agreement(own.labels_of(slice(None), h), labels, **options)
            found |= {f"prototypes_{name}": value for name, value in matched.items()}
        return found
    weights = evaluation.classifier(lambda texts: features(texts)["0"], test.class_names, given.templates)
    if measure == "gap_sweep":
        return found | evaluation.gap_sweep(z, weights.T, lambda x, w: evaluation.zero_shot(x, w.T, labels, **options))
    return evaluation.zero_shot(z, weights, labels, **options)


def _readable(part: Labelled, features: Callable, name: str) -> tuple:
    """z_I, h_I and labels of the images that could be read."""
    z, h = features(part.images).values()
    good = z.isfinite().all(dim=1)
    if lost := int((~good).sum()):
        log.warning("%d of %d images of %s are left out as unreadable", lost, len(good), name)
    return z[good], h[good], part.labels[good.numpy()]


def default_sets(run: Run) -> list[dict[str, Any]]:
    """What to evaluate a run on when nothing is named: the held-out part of the shapes world it was trained on.

    Raises:
        ValueError: it was trained on something else.
    """
    table = Path(pairs_of(run).source)
    require(table.with_name("shapes.json").exists(), f"{run.path} was not trained on the shapes world: name what to evaluate on")
    world = {"table": str(table), "image_root": str(table.with_name("images")), "where": {"split": "test"}}
    train = {"train_where": {"split": "train"}, "measures": ["zero_shot", "linear_probe", "grouping"]}
    factors = [{"name": f, "label": f, "templates": shapes.PROMPTS[f], **world, **train} for f in shapes.FACTORS]
    return [*factors, {"name": "shapes", "measures": ["retrieval", "gap", "gap_sweep"], **world}]


def evaluate_checkpoint(checkpoint: str | Path, output: str | Path = "", *, datasets=(), data_root="", sets=(), **more) -> pd.DataFrame:
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
        more: measures, seed and draws of :func:`evaluate`.

    Returns:
        A row for each data set and measure: checkpoint, dataset, measure, value, low, high.

    Raises:
        ValueError: a checkpoint of no run without ``output``, unknown names, or nothing that could be evaluated.
    """
    path = Path(checkpoint)
    home = path.parents[1] if path.parent.name == "checkpoints" else path
    # A checkpoint may hold the config.json of its text tower.
    run = Run(home) if (home / "config.json").exists() and not (home / "open_clip_config.json").exists() else None
    source = run.checkpoint("" if home == path else path) if run else checkpoint
    require(run or output, f"{checkpoint} belongs to no run: name a folder for its results (output; --out FOLDER)")
    chosen = _chosen(run, datasets, data_root, sets, **more)
    output, home = Path(output or home), home if run else Path(output)
    records = prototypes.load(source) if run else []
    rows = evaluate(encoders.load(source).to(encoders.best_device()), chosen, home, records=records, **more)
    require(rows, f"none of {[given.name for given in chosen]} is there and has what the measures need")
    rows = [{"checkpoint": source.name if run else str(checkpoint), **row} for row in rows]
    output.mkdir(parents=True, exist_ok=True)
    record_evaluations(home, rows).to_csv(output / "evaluation.csv", index=False)
    return pd.DataFrame(rows).astype(dict.fromkeys(("value", "low", "high"), float))


def watch(run: str | Path, *, interval: float = 5.0, **options: Any) -> Iterator[pd.DataFrame]:
    """Evaluate each checkpoint of a run as it appears, once, until the run is finished.

    It may be stopped and started at will: a checkpoint that the run has evaluations of, on any of these sets, is done. One is
    there when its folder has its name; one whose files do not match their checksums is passed over.

    Args:
        interval: seconds between looks.
        options: of :func:`evaluate_checkpoint`.

    Yields:
        All evaluations of the run: at the start, and whenever there are new ones.
    """
    run, seen, finished = Run(run), set(), False
    wanted = {chosen.name for chosen in _chosen(run, **options)}
    yield run.evaluations()
    while not finished:
        finished = run.finished  # asked first: when it is, the last checkpoint is there
        done = seen | {row.checkpoint for row in run.evaluations().itertuples() if row.dataset in wanted}
        # Those of interruptions go when a later one is there.
        for checkpoint in [c for c in run.checkpoints() if c.name not in done and "_step_" not in c.name]:
            seen.add(checkpoint.name)
            if not damaged_files(checkpoint):
                evaluate_checkpoint(checkpoint, **options)
                yield run.evaluations()
        time.sleep(0 if finished else interval)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Evaluation rows of one checkpoint to read: measures by data sets, "value [low, high]"."""
    texts = rows[["value", "low", "high"]].map(lambda x: f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}").astype(str)
    shown = rows.assign(value=texts["value"] + (" [" + texts["low"] + ", " + texts["high"] + "]").where(rows["low"].notna(), ""))
    return shown.pivot_table("value", "measure", "dataset", aggfunc="first", sort=False).fillna("")


def _chosen(run: Run | None, datasets=(), data_root="", sets=(), measures=(), **rest) -> list[EvaluationSet]:
    """The sets named, or a run's own, that ask for any of these measures."""
    _check(measures)
    given = [*({"name": name, "root": str(data_root)} for name in datasets or (data_root and downstream.KNOWN)), *sets]
    require(given or run, "name what to evaluate on: data_root, with datasets for some of those in it, or sets")
    found = [EvaluationSet.model_validate(each) for each in given or default_sets(run)]
    return [each for each in found if {*(measures or MEASURES)}.intersection(each.measures or MEASURES)]
