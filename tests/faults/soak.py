"""A training of the demo's size that goes on for half an hour: ``python -m tests.faults.soak [MINUTES] [setting=value ...]``.

``stream=True`` streams the same pairs from Parquet files.

Every few seconds its memory and its file handles, its readers' too, are counted. Prints both by sixths of the time; exit status 1
where the last third holds over a twentieth more memory than the third before it, or any more handles.
"""

import json
import multiprocessing
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import yaml
from pyarrow import parquet

from protoclip_lab import teachers
from protoclip_lab.data.pairs import Pairs

SECONDS = 5
RECIPE = Path(__file__).parents[2] / "notebooks" / "recipes" / "demo.yaml"


def settings(folder: Path) -> dict[str, Any]:
    """The demo's ProtoCLIP, without an end, evaluated and drawn every other episode, prototypes of every kind."""
    demo = yaml.safe_load(RECIPE.read_text())["03_train"]
    features, pairs = teachers.teach(folder / "teacher", model="sentence-transformers/all-MiniLM-L6-v2")
    held_out = {"table": str(folder / "shapes" / "captions.tsv"), "image_root": str(folder / "shapes" / "images")}
    held_out |= {"where": {"split": "test"}, "label": "colour", "measures": ["zero_shot", "retrieval", "gap", "grouping"]}
    watching = {"evaluate_every": 2, "evaluation_sets": [held_out | {"name": "shapes"}]}
    taught = {"teachers": [{"features": str(features), "name": "minilm"}], "table": str(pairs.folder), "draw_every": 2}
    return demo["common"] | demo["arms"]["protoclip"] | watching | taught | {"episodes": 10_000, "run": str(folder / "run")}


def streamed(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The same pairs with their images and the teacher's vectors in Parquet files, to be streamed."""
    pairs, features = Pairs(given["table"]), np.load(given["teachers"][0]["features"], allow_pickle=False)
    images = [(pairs.root / name).read_bytes() for name in pairs.column("filepath")]
    (folder / "parts").mkdir()
    for number, rows in enumerate(np.array_split(np.arange(len(pairs)), 7)):
        part = {"image": [images[row] for row in rows], "text": [pairs.caption(row) for row in rows], "vector": [*features[rows]]}
        parquet.write_table(pa.table(part), folder / "parts" / f"{number:05d}.parquet")
    columns = {"image_column": "image", "caption_column": "text", "teachers": [{"features": "vector"}]}
    return {"table": str(folder / "parts"), "episode_size": 1000, **columns}


def _train(given: dict[str, Any]) -> None:
    from protoclip_lab import training

    signal.signal(signal.SIGINT, signal.default_int_handler)
    training.train(given)


def _held(process: psutil.Process) -> dict[str, float]:
    """MiB that no file backs, handles and processes, of a training and what it started."""
    family = [process, *process.children(recursive=True)]
    memory = sum(p.memory_info().rss - p.memory_info().shared for p in family)
    return {"MiB": memory / 2**20, "handles": sum(p.num_fds() for p in family), "processes": len(family)}


def main(minutes: float = 30, **changes: Any) -> int:
    """Soak for so long; 0 where nothing grew."""
    with tempfile.TemporaryDirectory() as folder:
        given = settings(Path(folder))
        given |= (streamed(Path(folder), given) if changes.get("stream") else {}) | changes
        child = multiprocessing.get_context("spawn").Process(target=_train, args=(given,))
        child.start()
        rows, begin = [], time.monotonic()
        while (passed := time.monotonic() - begin) < 60 * minutes:
            child.join(SECONDS)
            assert child.exitcode is None, f"the training ended after {passed:.0f} s with {child.exitcode}"
            rows.append({"minute": passed / 60} | _held(psutil.Process(child.pid)))
        psutil.Process(child.pid).send_signal(signal.SIGINT)
        child.join()
        metrics = Path(given["run"], "metrics.jsonl").read_text().splitlines()
        checkpoints = sorted(path.name for path in Path(given["run"], "checkpoints").iterdir())
        evaluated = Path(given["run"], "evaluation.jsonl").read_text().count("\n")
    found = pd.DataFrame(rows)
    found["sixth"] = np.minimum(6 * found["minute"] // minutes, 5).astype(int) + 1
    print(found.groupby("sixth")[["MiB", "handles", "processes"]].agg(["median", "max"]).round(0).to_string())
    print(f"{json.loads(metrics[-1])['episode']} episodes, {len(metrics)} rows of metrics, {evaluated} of evaluation")
    print(f"last checkpoint {checkpoints[-1]}")
    middle, last = (found[found["sixth"].isin(part)].median() for part in ((3, 4), (5, 6)))
    grown = last["MiB"] > 1.05 * middle["MiB"] or last["handles"] > middle["handles"]
    print("grown" if grown else "flat")
    return int(grown)


if __name__ == "__main__":
    minutes = [float(argument) for argument in sys.argv[1:2]]
    sys.exit(main(*minutes, **{name: yaml.safe_load(value) for name, value in (text.split("=", 1) for text in sys.argv[2:])}))
