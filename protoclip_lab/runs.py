"""The run directory: config, metrics, checkpoints, and what an interrupted run needs to go on."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from protoclip_lab.config import TrainConfig
from protoclip_lab.data.pairs import Pairs
from protoclip_lab.data.source import open_pairs
from protoclip_lab.storage import sync, write_json, write_text

# These may change when a run is resumed: none has a say in weights or metrics.
FREE = {"workers", "save_every", "tensorboard", "wandb", "run", "draw_every"}
CHECKSUMS = "checksums.json"

log = logging.getLogger(__name__)


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
            raise FileNotFoundError(
                f"{self.path.absolute()} is not a run: it has no config.json. Train one with 03_train, or name another."
            )

    @classmethod
    def create(cls, config: TrainConfig) -> Run:
        """The run of this config, new or already there.

        Raises:
            ValueError: the folder holds a run with other settings; they are named with both values.
        """
        path = Path(config.run)
        file = path / "config.json"
        wanted = config.model_dump(mode="json")
        if file.exists():
            found = TrainConfig(**json.loads(file.read_text("utf-8"))).model_dump(mode="json")
            other = {k: (found[k], v) for k, v in wanted.items() if k not in FREE and found[k] != v}
            if other:
                listed = ", ".join(f"{k} = {there!r} there, {asked!r} asked for" for k, (there, asked) in other.items())
                raise ValueError(
                    f"{path.absolute()} holds a run with other settings: {listed}. Choose another run folder."
                )
        path.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)
        if not (path / "environment.json").exists():
            write_json(path / "environment.json", _environment(path))
        return cls(path)

    @property
    def config(self) -> TrainConfig:
        """The run's settings."""
        return TrainConfig(**json.loads((self.path / "config.json").read_text("utf-8")))

    @property
    def finished(self) -> bool:
        """Whether the last episode is done."""
        return (self.path / "finished.json").exists()

    def metrics(self, *, kind: str | None = None) -> pd.DataFrame:
        """One row for each logged step and each episode; ``kind`` "step" or "episode" takes only those."""
        rows = _read_rows(self.path / "metrics.jsonl")
        return pd.DataFrame([row for row in rows if kind in (None, row["kind"])])

    def evaluations(self) -> pd.DataFrame:
        """Rows of (checkpoint, dataset, measure, value, low, high)."""
        return _evaluations(_read_rows(self.path / "evaluation.jsonl"))

    def checkpoints(self) -> list[Path]:
        """Complete checkpoint folders, oldest first."""
        return sorted(p for p in (self.path / "checkpoints").glob("episode_*") if (p / CHECKSUMS).exists())

    @property
    def latest(self) -> Path | None:
        """The newest checkpoint whose files match their checksums; damaged ones are passed over with a warning."""
        for folder in reversed(self.checkpoints()):
            damaged = damaged_files(folder)
            if not damaged:
                return folder
            log.warning("checkpoint %s is damaged (%s): taking the one before", folder, ", ".join(damaged))
        return None

    def checkpoint(self, path: str | Path = "") -> Path:
        """The checkpoint at ``path``, by default the latest.

        Raises:
            FileNotFoundError: there is none yet.
        """
        found = Path(path) if path else self.latest
        if found is None:
            raise FileNotFoundError(f"{self.path} has no checkpoint yet: let 03_train finish an episode first")
        return found

    def append(self, file: str, row: Mapping[str, Any]) -> None:
        """Add one row to a ``.jsonl`` file of the run."""
        with (self.path / file).open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def truncate(self, episode: int) -> None:
        """Drop what was logged after an episode: the resumed run writes it again."""
        kept = [row for row in _read_rows(self.path / "metrics.jsonl") if row["episode"] <= episode]
        _write_rows(self.path / "metrics.jsonl", kept)
        with locked(self.path / "evaluation.lock"):
            file, last = self.path / "evaluation.jsonl", checkpoint_name(episode)
            _write_rows(file, [row for row in _read_rows(file) if row["checkpoint"] <= last])

    def save(self, episode: int, write: Callable[[Path], None]) -> Path:
        """A checkpoint: ``write`` fills a folder that gets its checksums and is renamed into place last."""
        final = self.path / "checkpoints" / checkpoint_name(episode)
        staging = final.with_name(f".{final.name}.partial")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write(staging)
        sums = {p.name: _sha256(p) for p in sorted(staging.iterdir())}
        write_json(staging / CHECKSUMS, sums)
        for name in [*sums, "."]:
            sync(staging / name)
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)
        sync(final.parent)
        return final

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the lock goes with the process, however it ends.

        Raises:
            RuntimeError: another process trains this run.
        """
        try:
            with locked(self.path / "lock", wait=False):
                yield
        except BlockingIOError as error:
            raise RuntimeError(f"{self.path.absolute()} is being trained by another process") from error


def checkpoint_name(episode: int) -> str:
    """The folder of an episode's checkpoint; in the order of episodes as text too."""
    return f"episode_{episode:04d}"


def record_evaluations(folder: Path, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Add rows to a folder's ``evaluation.jsonl`` and return all; a measure taken again replaces its last value."""
    folder.mkdir(parents=True, exist_ok=True)
    # A training and a watcher may write at once.
    with locked(folder / "evaluation.lock"):
        known = {(r["checkpoint"], r["dataset"], r["measure"]): r for r in _read_rows(folder / "evaluation.jsonl")}
        known |= {(r["checkpoint"], r["dataset"], r["measure"]): r for r in rows}
        _write_rows(folder / "evaluation.jsonl", known.values())
    return _evaluations(known.values())


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock file; BlockingIOError where another process does and ``wait`` is False."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def pairs_of(run: Run) -> Pairs:
    """The pairs a run trains on, prepared in its folder (the shapes world: beside it) unless its table is already."""
    config = run.config
    names = ("image_root", "image_column", "caption_column", "where", "dataset_size", "max_bad_share")
    folder = run.path.parent / "shapes" if config.table == "shapes" else run.path
    return open_pairs(folder, config.table, **{name: getattr(config, name) for name in names})


def damaged_files(folder: Path) -> list[str]:
    """Files of a checkpoint that are missing or differ from their checksum."""
    sums = json.loads((folder / CHECKSUMS).read_text("utf-8"))
    return [name for name, wanted in sums.items() if not (folder / name).exists() or _sha256(folder / name) != wanted]


HEADLINES = ["zero_shot_top1", "linear_probe_accuracy", "retrieval_mean_recall", "gap", "grouping_AMI"]


def headlines(rows: pd.DataFrame) -> pd.DataFrame:
    """The headline measures of a run's evaluations, a column for each checkpoint."""
    shown = rows[rows["measure"].isin(HEADLINES)]
    return shown.pivot_table(index=["dataset", "measure"], columns="checkpoint", values="value", sort=True).round(2)


def compare(runs: Sequence[str | Path], output: str | Path = "", measures: Sequence[str] = ()) -> Comparison:
    """Any number of runs side by side, by their last evaluation.

    Runs that differ in their seed alone are one arm: its name is the run folder's without the seed.

    Args:
        runs: run folders, evaluated.
        output: folder for ``comparison.csv`` (one column per arm, mean ± standard deviation over seeds) and
            ``values.csv`` (a row per run, all measures); empty writes none.
        measures: endings of the names to show, such as "top1"; none takes the field's headline measures.

    Raises:
        ValueError: a run without evaluations.
    """
    rows, opened = [], [Run(run) for run in runs]
    for run in opened:
        found = run.evaluations()
        if found.empty:
            raise ValueError(f"{run.path} has no evaluations: run 05_evaluate on it first")
        last = found[found["checkpoint"] == found["checkpoint"].max()]
        arm = re.sub(r"_?seed=\d+", "", run.path.name) or run.path.name
        values = {f"{row.dataset}: {row.measure}": row.value for row in last.itertuples()}
        rows.append({"run": run.path.name, "arm": arm, "seed": run.config.seed, **values})
    values = pd.DataFrame(rows)
    shown = [c for c in values.columns[3:] if c.endswith(tuple(measures or [f": {m}" for m in HEADLINES]))]
    arms = values.groupby("arm", sort=False)[shown]
    mean, spread = arms.mean().T, arms.std().T
    table = mean.map("{:.2f}".format) + spread.map(lambda sd: "" if pd.isna(sd) else f" ± {sd:.2f}")
    table.index.name = "measure"
    if output:
        Path(output).mkdir(parents=True, exist_ok=True)
        table.to_csv(Path(output) / "comparison.csv")
        values.to_csv(Path(output) / "values.csv", index=False)
    return Comparison(values, table, shown, opened)


@dataclass
class Comparison:
    """What :func:`compare` found."""

    values: pd.DataFrame  # a row per run: run, arm, seed, then every measure
    table: pd.DataFrame  # a row per measure shown, a column per arm: mean ± standard deviation
    shown: list[str]  # the measures shown

    runs: list[Run]

    def curves(self) -> pd.DataFrame:
        """Episode metrics of the runs, one after the other, told apart by column "run"."""
        return pd.concat([run.metrics(kind="episode").assign(run=run.path.name) for run in self.runs])

    def settings(self) -> pd.DataFrame:
        """A row for each setting in which the runs differ, a column for each run."""
        table = pd.DataFrame({run.path.name: run.config.model_dump(mode="json") for run in self.runs}).astype(str)
        return table[table.nunique(axis=1) > 1].drop(index="run", errors="ignore")


def keep(figure: Any, output: str | Path, name: str) -> Any:
    """Save a figure as ``output/figures/name.png`` and hand it back, for a notebook's last line."""
    folder = Path(output) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png")
    return figure


def _evaluations(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["checkpoint", "dataset", "measure", "value", "low", "high"])
    return table.astype({"value": float, "low": float, "high": float})


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _read_rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")
    # What follows the last newline was cut off by a kill in mid-write.
    return [json.loads(line) for line in lines[:-1]]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _environment(path: Path) -> dict[str, Any]:
    source = Path(__file__).parent
    commit = _git(source, "rev-parse", "HEAD")
    if commit:
        (path / "uncommitted.diff").write_text(_git(source, "diff", "HEAD") or "", "utf-8")
    return {
        "python": sys.version,
        "platform": platform.platform(),
        "packages": {found.name: found.version for found in importlib.metadata.distributions()},
        "commit": commit and commit.strip(),
        "command": sys.argv,
    }


def _git(folder: Path, *words: str) -> str | None:
    try:
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
