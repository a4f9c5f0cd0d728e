"""Watching a run: each checkpoint is evaluated once, whatever is killed; rows written by two processes all stay."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from helpers import record_rows, toy_settings, toy_table, train_in_steps

import protoclip_lab
from protoclip_lab.evaluation import suite
from protoclip_lab.runs import Run, checkpoint_name
from protoclip_lab.training import train

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["protoclip_lab.training"])
EPISODES = 4
DEADLINE = 120.0  # seconds after which something that should have come will not


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return toy_table(tmp_path_factory.mktemp("data"))


def settings(table, run):
    return toy_settings(table, run, model="RN-micro", objective="clip", episodes=EPISODES)


@contextmanager
def watcher(run):
    command = [sys.executable, "-m", "protoclip_lab", "watch", str(run), "-p", "measures=[zero_shot, gap]"]
    root = str(Path(protoclip_lab.__file__).parents[1])
    process = subprocess.Popen(
        [*command, "-p", "draws=20"],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(there, running, wait):
    """Wait for a condition while a process runs; ``wait(seconds)`` returns or times out."""
    for _ in range(int(DEADLINE / 0.05)):
        if there():
            return
        with suppress(subprocess.TimeoutExpired):
            wait(0.05)
        assert running(), "it ended"
    pytest.fail("it never came")


def rows_of(run):
    return [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]


def test_killed_interrupted_and_started_again_while_a_run_trains_each_checkpoint_is_evaluated_once(table, tmp_path):
    run, permits = tmp_path / "run", SERVER.Semaphore(0)
    config = settings(table, run)
    training = SERVER.Process(target=train_in_steps, args=(config, permits))
    training.start()
    for _ in range(2):
        permits.release()
    until((run / "checkpoints" / checkpoint_name(1)).exists, training.is_alive, training.join)
    with watcher(run) as first:
        # Killed in mid-evaluation of a later checkpoint, or while it waits for one.
        until(lambda: (run / "evaluation.jsonl").stat().st_size, lambda: first.poll() is None, first.wait)
        first.kill()
        first.wait()
    before = (run / "evaluation.jsonl").read_bytes()
    assert b'"episode_0001"' in before
    with watcher(run) as second:
        said = [second.stdout.readline()]
        while "2 checkpoints evaluated" not in said[-1]:
            said.append(second.stdout.readline())
            assert said[-1], second.stderr.read()
        second.send_signal(signal.SIGINT)
        _, messages = second.communicate(timeout=DEADLINE)
        assert second.returncode == 130
        assert messages.endswith("stopped; the same command continues from there\n") and "Traceback" not in messages
    between = (run / "evaluation.jsonl").read_bytes()
    assert between.startswith(before)
    with watcher(run) as third:
        for _ in range(EPISODES):
            permits.release()
        table_shown, messages = third.communicate(timeout=DEADLINE)
        assert third.returncode == 0, messages
    training.join()
    assert training.exitcode == 0 and Run(run).finished
    assert (run / "evaluation.jsonl").read_bytes().startswith(between)
    rows = rows_of(run)
    found = [(row["checkpoint"], row["dataset"], row["measure"]) for row in rows]
    assert len(set(found)) == len(found)
    names = [{found[1:] for found in found if found[0] == checkpoint_name(n)} for n in range(1, EPISODES + 1)]
    assert all(name == names[0] for name in names) and len(found) == EPISODES * len(names[0])
    assert {("shape", "zero_shot_top1"), ("shapes", "gap")} <= names[0]
    # What the second had done the third did not do again, and it did each of the others once.
    assert re.findall(r"(\d+) checkpoints evaluated", table_shown) == ["2", "3", "4"]
    last = table_shown.rpartition("checkpoints evaluated")[2]
    assert all(part in last for part in ("episode_0001", "episode_0004", "zero_shot_top1", "background"))
    assert "nan" not in last.lower()


@pytest.fixture(scope="module")
def finished(table, tmp_path_factory):
    return train(settings(table, tmp_path_factory.mktemp("finished") / "run"))


@pytest.fixture
def copied(finished, tmp_path):
    return Run(shutil.copytree(finished.path, tmp_path / "run"))


def damage(checkpoint):
    weights = checkpoint / "open_clip_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)


def watch(run, **options):
    return list(suite.watch(run.path, measures=["gap"], draws=0, **options))


def test_half_written_and_damaged_checkpoints_are_never_evaluated(copied, monkeypatch, caplog):
    first, second, *_ = copied.checkpoints()
    damage(second)
    shutil.copytree(first, first.with_name(".episode_0005.partial"))
    asked, real = [], suite.evaluate_checkpoint
    monkeypatch.setattr(suite, "evaluate_checkpoint", lambda c, **k: asked.append(Path(c).name) or real(c, **k))
    watch(copied)
    assert asked == ["episode_0001", "episode_0003", "episode_0004"]
    assert copied.evaluations()["checkpoint"].unique().tolist() == asked
    assert f"{second} is damaged (open_clip_model.safetensors)" in caplog.text


def test_finished_and_watched_run_is_not_evaluated_again(copied, monkeypatch):
    seen = watch(copied)
    assert [frame["checkpoint"].nunique() for frame in seen] == [0, 1, 2, 3, 4]
    with monkeypatch.context() as patched:
        patched.setattr(suite, "evaluate_checkpoint", lambda *a, **k: pytest.fail("evaluated again"))
        (again,) = watch(copied)
    assert again.equals(copied.evaluations()) and not again["measure"].str.contains("zero_shot").any()


def test_wrong_names_and_no_run_are_refused_at_once(copied, tmp_path):
    shutil.rmtree(copied.path / "checkpoints")  # none to evaluate yet
    with pytest.raises(ValueError, match="'zeroshot' .* nearest valid name is 'zero_shot'"):
        list(suite.watch(copied.path, measures=["zeroshot"]))
    with pytest.raises(FileNotFoundError, match="is not a run"):
        list(suite.watch(tmp_path / "none"))


def test_two_processes_that_record_at_once_lose_no_row(tmp_path):
    writers = [SERVER.Process(target=record_rows, args=(tmp_path, name, 60)) for name in ("episode_0001", "run/2")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    rows = rows_of(tmp_path)
    assert len(rows) == 120
    assert {(row["checkpoint"], row["value"]) for row in rows} == {
        (name, index / 7) for name in ("episode_0001", "run/2") for index in range(60)
    }
