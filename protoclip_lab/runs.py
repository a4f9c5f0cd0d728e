"""The run directory: config, metrics, checkpoints, and what an interrupted run needs to go on."""

import hashlib
import importlib.metadata
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from scipy.special import stdtrit

from protoclip_lab.config import TrainConfig, require
from protoclip_lab.data import pairs, shapes
from protoclip_lab.storage import reading, write_json, write_text, writing

# These may change when a run is resumed: none has a say in weights or metrics.
FREE = {"workers", "processes", "save_every", "tensorboard", "wandb", "run", "draw_every"}
CHECKSUMS = "checksums.json"
KEYS = ("checkpoint", "dataset", "measure")  # of a row of evaluation.jsonl


class Run:
    """A run directory.

    ``config.json``, ``environment.json`` (versions, commit, ``uncommitted.diff`` beside it), ``metrics.jsonl``,
    ``evaluation.jsonl``, ``checkpoints/episode_000N/`` and, at the end, ``finished.json``.

    Raises:
        FileNotFoundError: there is no run at ``path``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").exists():
            raise FileNotFoundError(f"{self.path.absolute()} is not a run: no config.json. Train one with 03_train, or name another.")

    @classmethod
    def create(cls, config: TrainConfig) -> "Run":
        """The run of this config, new or already there.

        Raises:
            ValueError: the folder holds a run with other settings; they are named with both values.
        """
        path, wanted = Path(config.run), config.model_dump(mode="json")
        if (path / "config.json").exists():
            old = cls(path).config.model_dump(mode="json", exclude=FREE)
            other = [f"{name} = {old[name]!r} there, {wanted[name]!r} asked for" for name in old if old[name] != wanted[name]]
            require(not other, f"{path.absolute()} holds a run with other settings: {', '.join(other)}. Choose another run folder.")
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / "environment.json", _environment(config))
        write_json(path / "config.json", wanted)
        return cls(path)

    @property
    def config(self) -> TrainConfig:
        """The run's settings; ValueError where they are damaged or another version's."""
        with reading(self.path / "config.json", "Of another version, perhaps. Take another folder"):
            return TrainConfig(**json.loads((self.path / "config.json").read_text("utf-8")))

    @property
    def finished(self) -> bool:
        """Whether the last episode is done."""
        return (self.path / "finished.json").exists()

    def metrics(self, *, kind: str | None = None) -> pd.DataFrame:
        """One row for each logged step and each episode; ``kind`` "step" or "episode" takes only those."""
        return pd.DataFrame([row for row in _read_rows(self.path / "metrics.jsonl") if kind in (None, row["kind"])])

    def evaluations(self) -> pd.DataFrame:
        """Rows of (checkpoint, dataset, measure, value, low, high)."""
        return _evaluations(_read_rows(self.path / "evaluation.jsonl"))

    def checkpoints(self) -> list[Path]:
        """Complete checkpoint folders, oldest first."""
        return sorted(p for p in (self.path / "checkpoints").glob("episode_*") if (p / CHECKSUMS).exists())

    @property
    def latest(self) -> Path | None:
        """The newest checkpoint whose files match their checksums; damaged ones are passed over with a warning."""
        return next((folder for folder in reversed(self.checkpoints()) if not damaged_files(folder)), None)

    def checkpoint(self, path: str | Path = "") -> Path:
        """The checkpoint at ``path``, by default the latest.

        Raises:
            FileNotFoundError: there is none yet.
            ValueError: its files do not match their checksums.
        """
        if not (found := path or self.latest):
            raise FileNotFoundError(f"{self.path} has no checkpoint yet: let 03_train finish an episode first")
        require(not path or not damaged_files(Path(path)), f"checkpoint {path} is damaged: take the one before")
        return Path(found)

    def append(self, file: str, row: Mapping[str, Any]) -> None:
        """Add one row to a ``.jsonl`` file of the run."""
        with writing(self.path / file), (self.path / file).open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def last_row(self) -> dict[str, Any]:
        """The last whole row of the metrics; empty before the first."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().rsplit(b"\n", 2) if path.exists() else []
        return json.loads(lines[-2]) if len(lines) > 1 else {}

    def truncate(self, step: int, checkpoint: str) -> None:
        """Drop what was logged after a step and a checkpoint: the resumed run writes it again."""
        _rewrite(self.path / "metrics.jsonl", lambda rows: [row for row in rows if row["step"] <= step])
        _rewrite(self.path / "evaluation.jsonl", lambda rows: [row for row in rows if row["checkpoint"] <= checkpoint])

    def save(self, name: str, write: Callable[[Path], None]) -> Path:
        """A checkpoint: ``write`` fills a folder that gets its checksums and is renamed into place last.

        Those of earlier interruptions go, now that a later one is there.
        """
        final = self.path / "checkpoints" / name
        staging = final.with_name(f".{final.name}.partial")
        shutil.rmtree(staging, ignore_errors=True)
        with writing(final):
            staging.mkdir(parents=True)
            write(staging)
        write_json(staging / CHECKSUMS, {p.name: _sha256(p) for p in sorted(staging.iterdir())})
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)
        for passed in {*final.parent.glob("episode_*_step_*")} - {final}:
            shutil.rmtree(passed)
        return final


def checkpoint_name(episode: int, step: int = 0) -> str:
    """The folder of the checkpoint after an episode, and some steps of the next; in the order of training as text too."""
    return f"episode_{episode:04d}" + (f"_step_{step:06d}" if step else "")


def record_evaluations(folder: Path, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Add rows to a folder's ``evaluation.jsonl`` and return all; a measure taken again replaces its last value."""
    changed = _rewrite(folder / "evaluation.jsonl", lambda old: {tuple(map(row.get, KEYS)): row for row in [*old, *rows]}.values())
    return _evaluations(changed)


def pairs_of(run: Run) -> pairs.Pairs:
    """The pairs a run trains on, prepared in its folder (the shapes world: beside it) unless its table is already.

    Where it reads a stream, those of its last episode.
    """
    if run.config.stream:
        held = sorted(run.path.glob("stream/*/pairs.json"))
        require(held, f"{run.path} holds no pairs of its stream yet: let 03_train fetch an episode first")
        return pairs.Pairs(held[-1].parent)
    folder = run.path.parent / "shapes" if run.config.table == "shapes" else run.path
    names = {"table", "image_root", "image_column", "caption_column", "where", "dataset_size", "max_bad_share"}
    return shapes.open_pairs(folder, **run.config.model_dump(include=names))


def damaged_files(folder: Path) -> list[str]:
    """Files of a checkpoint that are missing or differ from their checksum; a warning is logged that names them."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text("utf-8"))
    except ValueError:
        sums = {CHECKSUMS: "itself"}
    damaged = [name for name, wanted in sums.items() if not (folder / name).exists() or _sha256(folder / name) != wanted]
    if damaged:
        logging.getLogger(__name__).warning("checkpoint %s is damaged (%s): it is passed over", folder, ", ".join(damaged))
    return damaged


HEADLINES = ["zero_shot_top1", "linear_probe_accuracy", "retrieval_mean_recall", "gap", "grouping_AMI"]


def headlines(rows: pd.DataFrame) -> pd.DataFrame:
    """The headline measures of a run's evaluations, a column for each checkpoint."""
    return rows[rows["measure"].isin(HEADLINES)].pivot_table("value", ["dataset", "measure"], "checkpoint").round(2)


class Comparison:
    """Any number of runs side by side, by their last evaluated checkpoint.

    Runs that differ in their seed alone are one arm: its name is the run folder's without the seed.

    Args:
        runs: run folders, evaluated.
        output: folder for ``comparison.csv`` and ``values.csv``, the two tables below.
        measures: endings of the names to show, such as "top1"; none takes the field's headline measures.

    Attributes:
        values: a row per run: run, arm, seed, checkpoint, then every measure.
        shown: the measures shown.
        table: a row per measure shown, a column per arm: over several seeds "mean ± standard deviation", from one
            "value [low, high]" with the measure's own 95 % interval, where it has one. Then a column per arm but the
            baseline, which is "clip" or else the first arm: mean difference over the n seeds both have, from two seeds
            on with its 95 % interval (paired Student t).

    Raises:
        ValueError: a run without evaluations.
    """

    def __init__(self, runs: Sequence[str | Path], output: str | Path, measures: Sequence[str] = ()) -> None:
        self.runs, tables = [Run(run) for run in runs], []
        for run in self.runs:
            require(len(found := run.evaluations()), f"{run.path} has no evaluations: run 05_evaluate on it first")
            last = found[found["checkpoint"] == found["checkpoint"].max()]
            about = {"run": str(run.path), "arm": re.sub(r"_?seed=\d+", "", run.path.name) or run.path.name, "seed": run.config.seed}
            tables.append(last.assign(**about, measure=last["dataset"] + ": " + last["measure"]))
        rows = pd.concat(tables)
        self.values = rows.pivot_table("value", [*about, "checkpoint"], "measure", sort=False).reset_index()
        self.shown = [name for name in self.values.columns[4:] if name.endswith(tuple(measures or [f": {m}" for m in HEADLINES]))]
        cells = rows.groupby(["measure", "arm"])[["value", "low", "high"]].apply(_cell)
        table = cells.unstack(fill_value="").loc[self.shown, self.values["arm"].unique()]
        by_seed = self.values.groupby(["arm", "seed"])[self.shown].mean()
        baseline, *others = sorted(table, key=lambda arm: arm != "clip")
        above = [_differences(by_seed.loc[arm], by_seed.loc[baseline], f"{arm} − {baseline}") for arm in others]
        self.table = table.join(above).fillna("")
        Path(output).mkdir(parents=True, exist_ok=True)
        self.table.to_csv(Path(output) / "comparison.csv")
        self.values.to_csv(Path(output) / "values.csv", index=False)

    def curves(self) -> pd.DataFrame:
        """Episode metrics of the runs, one after the other, told apart by column "run"."""
        return pd.concat([run.metrics(kind="episode").assign(run=run.path.name) for run in self.runs])

    def settings(self) -> "pd.io.formats.style.Styler":
        """A row for each setting in which the runs differ, a column for each run; values unlike the first run's stand out."""
        table = pd.DataFrame({run.path.name: run.config.model_dump(mode="json") for run in self.runs}).astype(str)
        table = table[table.nunique(axis=1) > 1].drop(index="run", errors="ignore")
        return table.style.apply(lambda row: np.where(row == row.iloc[0], "", "font-weight: bold; background: #fdf3c7"), axis=1)


def keep(figure: Any, output: str | Path, name: str) -> Any:
    """Save a figure as ``output/figures/name.png``, one drawn for paper as ``.pdf`` too, and hand it back."""
    folder = Path(output) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "pdf") if getattr(figure, "paper", False) else ("png",):
        figure.savefig(folder / f"{name}.{kind}")
    return figure


def _evaluations(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=[*KEYS, "value", "low", "high"]).astype({"value": float, "low": float, "high": float})


def _rewrite(path: Path, change: Callable[[list[dict]], Iterable[dict]]) -> Iterable[dict]:
    # A training and a watcher may write at once.
    with FileLock(f"{path}.lock"):
        rows = change(_read_rows(path))
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _read_rows(path: Path) -> list[dict]:
    lines = path.read_text("utf-8").split("\n") if path.exists() else []
    with reading(path, "Take out the row"):
        # What follows the last newline was cut off by a kill in mid-write.
        return [json.loads(line) for line in lines[:-1]]


def _cell(found: pd.DataFrame) -> str:
    return f"{found['value'].mean():.2f} ± {found['value'].std():.2f}" if len(found) > 1 else _interval(*found.iloc[0])


def _interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.2f}" + ("" if pd.isna(low) else f" [{low:{sign}.2f}, {high:{sign}.2f}]")


def _differences(arm: pd.DataFrame, baseline: pd.DataFrame, name: str) -> pd.Series:
    """Mean of what an arm has above the baseline, over the seeds both have: rows are seeds, columns measures."""
    each = (arm - baseline).dropna(how="all").dropna(axis=1, how="all")
    # paired Student t
    mean, reach = each.mean(), each.sem() * stdtrit(each.count() - 1, 0.975)
    cells = map(_interval, mean, mean - reach, mean + reach, ["+"] * len(mean))
    return pd.Series(list(cells), each.columns, dtype=object, name=f"{name} (n = {len(each)})")


def _sha256(path: Path) -> str:
    # mapped, not read: an optimizer's state may be larger than memory has room for twice; nothing cannot be mapped
    return hashlib.sha256(np.memmap(path, mode="r") if path.stat().st_size else b"").hexdigest()


def _environment(config: TrainConfig) -> dict[str, Any]:
    device = f"cpu ({config.threads or torch.get_num_threads()} threads)"
    if config.device != "cpu" and torch.accelerator.is_available():
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "mps"
    write_text(Path(config.run) / "uncommitted.diff", _git("diff HEAD"))
    packages = {found.name: found.version for found in importlib.metadata.distributions()}
    return {"python": sys.version, "device": device, "packages": packages, "commit": _git("rev-parse --verify HEAD").strip()}


def _git(command: str) -> str:
    """What git says of this source; nothing where there is no git or no checkout."""
    return subprocess.run(f"git {command}", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True).stdout
