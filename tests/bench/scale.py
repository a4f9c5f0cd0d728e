"""A table of millions of rows: what it takes to start on it, to sample episodes of it, and to hold it in each process."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from protoclip_lab.data.batches import Episodes
from protoclip_lab.data.pairs import Pairs, prepare

from . import data, measure

ROWS = (312_500, 625_000, 1_250_000, 2_500_000)
READ = 2000  # pairs a reader reads before its memory is looked at
MIB = 2**20


def resident() -> float:
    """MiB of memory of this process that no file backs: pages of mapped files, which all processes share, are not counted."""
    about = psutil.Process().memory_info()
    return (about.rss - about.shared) / MIB


def write_table(folder: Path, rows: int, images: int = 500, captions: int = 5000) -> Path:
    """Many rows over few tiny pictures and some thousand captions."""
    data.write_jpegs(folder, images, size=(40, 30))
    table = folder / "table.tsv"
    with table.open("w", encoding="utf-8") as file:
        file.write("filepath\ttitle\n")
        for row in range(rows):
            file.write(f"{row % images:06d}.jpg\ta picture of {row % captions} things in a row by the sea\n")
    return table


def _prepare(folder: Path, found: dict[str, float]) -> None:
    found["prepare again"] = _seconds(lambda: prepare(folder / "table.tsv", folder / "pairs", image_root=folder / "images.tar"))


def _open(folder: Path, found: dict[str, float]) -> None:
    before = resident()
    opened: list[Pairs] = []
    found["open"] = _seconds(lambda: opened.append(Pairs(folder / "pairs")))
    (pairs,) = opened
    rows = np.random.default_rng(0).integers(0, len(pairs), READ)
    found["read a pair"] = _seconds(lambda: [pairs[row] for row in rows]) / READ
    found["a reader: MiB above the imports"] = resident() - before
    episodes = Episodes(len(pairs), min(200_000, len(pairs)), seed=0)
    found["episode 1"] = _seconds(lambda: episodes.ids(1))
    # As many passes as the paper makes.
    found["episode of pass 32"] = _seconds(lambda: episodes.ids(32 * len(pairs) // episodes.size))
    found["a trainer: MiB above the imports"] = resident() - before


def _teach(folder: Path, found: dict[str, float]) -> None:
    from unittest import mock

    from protoclip_lab import teachers

    def embed(visual: bool, items: Any, model: str, start: int = 0, **options: Any) -> Any:
        """The width and number of MiniLM's embeddings, without its towers, which take days here."""
        rng = np.random.default_rng(0)
        for first in range(start, len(items), 2048):
            yield rng.standard_normal((min(2048, len(items) - first), 384), np.float32)

    before = resident()
    with mock.patch.object(teachers, "_embed", embed):
        found["teacher, without its tower"] = _seconds(lambda: teachers.teach(folder / "teacher", str(folder / "pairs"), model="none"))
    found["a teacher: MiB above the imports"] = resident() - before
    found["open teacher features"] = _seconds(lambda: teachers.load(folder / "teacher" / "teacher.npy", Pairs(folder / "pairs")))


FIRST = {"prepare again": "prepare", "MiB at most": "prepare: MiB at most"}
PARTS: dict[str, Callable[[Path, dict[str, float]], None]] = {"prepare": _prepare, "open": _open, "teach": _teach}


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def scale(*, rows: tuple[int, ...] = ROWS) -> dict[str, Any]:
    """Each part in a process of its own, on tables of several sizes."""
    found: dict[str, dict[str, float]] = {}
    for size in rows:
        with data.work_folder() as folder:
            write_table(folder, size)
            # Twice for the first: the table is read and checked, then it is there.
            for turn, part in enumerate(("prepare", *PARTS)):
                command = [sys.executable, "-m", "tests.bench.scale", part, str(folder), str(folder / "found.json")]
                done = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(done.stderr[-3000:])
                made = json.loads((folder / "found.json").read_text())
                for name, value in made.items():
                    if not turn or name != "MiB at most":
                        found.setdefault(name if turn else FIRST[name], {})[str(size)] = value
    return {"settings": {"rows": list(rows), "read": READ}, "found": found}


if __name__ == "__main__":
    import resource

    found: dict[str, float] = {}
    PARTS[sys.argv[1]](Path(sys.argv[2]), found)
    if sys.argv[1] == "prepare":
        found["MiB at most"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path(sys.argv[3]).write_text(json.dumps(found))
