"""A disk that fills up: an error that names the file and the remedy, and the last good state goes on once there is room.

Full is a limit on the size of files (RLIMIT_FSIZE) in a child process from a stated moment on: it needs no rights, and cuts
files short in the middle of a write as a full disk does. A real one, a small tmpfs, where mounting is permitted: there a
memory-mapped file is written without an error until SIGBUS.
"""

import json
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from helpers import encoded

from faults.children import ALL, assert_same, command, together
from protoclip_lab import teachers
from protoclip_lab.data.pairs import prepare
from protoclip_lab.runs import Run, damaged_files

RUNS = "protoclip_lab.runs"
FULL = {
    "weights": ("protoclip_lab.encoders", "save", 2, 1_000_000),
    "optimizer": ("protoclip_lab.prototypes", "save", 2, 30_000_000),
    "checksums": (RUNS, "_sha256", 13, 0),
    "metrics": (f"{RUNS}:Run", "append", 6, 3000),
}


def refused(status, said, path):
    assert status == 1 and "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ") and "make room, then do it again" in last and str(path) in last, last


@pytest.mark.parametrize("what", FULL if ALL else ["weights", "metrics"])
def test_a_training_stops_and_goes_on_once_there_is_room(what, settings, unbroken, tmp_path):
    config, run = settings(tmp_path / "run"), tmp_path / "run"
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    status, said = command("train", tmp_path / "train.yaml", full=FULL[what])
    refused(status, said, run / ("metrics.jsonl" if what == "metrics" else "checkpoints"))
    assert what == "metrics" or "episode_0002" in said
    assert Run(run).latest.name == "episode_0001" and not Run(run).finished
    assert together(config) == [0]
    assert_same(run, unbroken)


def test_the_images_of_a_stream(settings, tmp_path):
    rows = {"image": [encoded(i) for i in range(60)], "text": [f"caption {i}" for i in range(60)]}
    pa.parquet.write_table(pa.table(rows), tmp_path / "pairs.parquet")
    columns = {"image_column": "image", "caption_column": "text", "image_root": "", "where": {}}
    run, own = tmp_path / "run", {"table": str(tmp_path / "pairs.parquet"), "stream": True, **columns}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings(run) | own))
    status, said = command("train", tmp_path / "train.yaml", full=("protoclip_lab.data.pairs", "_append", 70, 1000))
    refused(status, said, run / "stream" / "000002" / "images")
    assert Run(run).latest.name == "episode_0001" and not Run(run).finished
    assert together(settings(run) | own) == [0]
    assert together(settings(tmp_path / "whole") | own) == [0]
    assert_same(run, tmp_path / "whole")


def test_the_first_files_of_a_run(settings, tmp_path):
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings(tmp_path / "run")))
    status, said = command("train", tmp_path / "train.yaml", full=(f"{RUNS}:Run", "create", 1, 10))
    refused(status, said, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_report_keeps_its_old_page(tmp_path):
    (tmp_path / "recipe.yaml").write_text("parameters: {}\n")
    arguments, page = ("run", tmp_path / "recipe.yaml", "--out", tmp_path / "report"), tmp_path / "report" / "index.html"
    assert command(*arguments)[0] == 0
    before = page.read_bytes()
    refused(*command(*arguments, full=("protoclip_lab.batch", "plan", 1, len(before) // 2)), page)
    assert page.read_bytes() == before
    assert command(*arguments)[0] == 0


def test_evaluations_keep_their_old_rows(tmp_path, monkeypatch):
    from protoclip_lab import storage
    from protoclip_lab.runs import record_evaluations

    row = {"checkpoint": "c", "dataset": "d", "measure": "m", "value": 1.0, "low": None, "high": None}
    record_evaluations(tmp_path, [row])

    def half(path, text, encoding):
        path.write_bytes(text.encode(encoding)[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.Path, "write_text", half)
    with pytest.raises(OSError, match=r"evaluation\.jsonl could not be written \(.*No space left on device\): make room"):
        record_evaluations(tmp_path, [row | {"value": 2.0}])
    assert json.loads((tmp_path / "evaluation.jsonl").read_text()) == row


@pytest.fixture
def small_disk(tmp_path):
    """Mount a tmpfs of so many KiB, or give it another size."""
    place = tmp_path / "disk"
    place.mkdir()

    def sized(kib, *options):
        done = subprocess.run(["mount", *options, "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", place], capture_output=True)
        if done.returncode:
            pytest.skip("no tmpfs may be mounted here")
        return place

    yield sized
    subprocess.run(["umount", place], capture_output=True)


def embedded(visual, items, model, done=0, *, batch_size, **options):
    """In place of a language model: 8 blocks of 10 rows of width 4096."""
    for start in range(done, len(items), batch_size):
        rows = np.arange(start, min(start + batch_size, len(items)), dtype=np.float32)
        yield np.repeat(rows[:, None], 4096, axis=1) + 1


@pytest.mark.parametrize("room", [300, 1500])  # KiB: of what is embedded a part, or all and a part of what is made of it
def test_teacher_features(room, table, tmp_path, small_disk, monkeypatch):
    monkeypatch.setattr(teachers, "_embed", embedded)
    pairs = prepare(table, tmp_path / "pairs", image_root=table.with_name("images"), where={"split": "train"})
    how = {"model": "m", "dim": None, "batch_size": 10}
    whole, _ = teachers.teach(tmp_path / "whole", str(pairs.folder), **how)
    disk = small_disk(room)
    with pytest.raises(OSError, match=rf"{disk}/teacher.* could not be written \(.*\): make room"):
        teachers.teach(disk, str(pairs.folder), **how)
    with pytest.raises(ValueError, match="never finished"):
        teachers.load(disk / "teacher.npy", pairs)
    small_disk(10_000, "-o", "remount")
    out, _ = teachers.teach(disk, str(pairs.folder), **how)
    assert out.read_bytes() == whole.read_bytes() and len(teachers.load(out, pairs)) == len(pairs)
    assert sorted(path.name for path in disk.iterdir()) == ["teacher.json", "teacher.npy"]


@pytest.mark.skipif(not ALL, reason="make faults: six seconds")
def test_a_training_on_a_real_disk(settings, unbroken, tmp_path, small_disk):
    disk = small_disk(150_000)
    run = disk / "run"
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings(run)))
    status, said = command("train", tmp_path / "train.yaml")
    refused(status, said, run / "checkpoints")
    assert "No space left on device" in said
    assert not damaged_files(Run(run).latest) and Run(run).latest.name == "episode_0001"
    small_disk(800_000, "-o", "remount")
    assert together(settings(run)) == [0]
    assert_same(run, unbroken)
