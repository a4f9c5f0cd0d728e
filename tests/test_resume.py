"""A run killed at any moment and started again ends as one that never was: same weights, same metrics."""

import multiprocessing
import shutil
import signal

import pandas as pd
import pytest
from filelock import FileLock, Timeout
from helpers import run_training, toy_settings, toy_table, train_and_die
from safetensors.torch import load_file

from protoclip_lab.evaluation.suite import evaluate_checkpoint
from protoclip_lab.runs import Run, damaged_files
from protoclip_lab.training import train

# One clean server process holds the imports; each training is forked from it in milliseconds.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["protoclip_lab.training"])


def in_process(target, *arguments):
    process = SERVER.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return toy_table(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def settings():
    # BatchNorm in towers and heads, two granularities: all state there is.
    return {"model": "RN-mini", "episodes": 4, "k": [4, 6]}


@pytest.fixture(scope="module")
def unbroken(table, settings, tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    assert in_process(run_training, toy_settings(table, run, **settings)) == 0
    return Run(run)


def untimed(run):
    frame = run.metrics()
    return frame.drop(columns=[c for c in frame.columns if c.startswith("time/")])


def assert_same(run, other):
    assert run.finished and other.finished
    assert untimed(run).equals(untimed(other))
    assert [p.name for p in run.checkpoints()] == [p.name for p in other.checkpoints()]
    for mine, theirs in zip(run.checkpoints(), other.checkpoints(), strict=True):
        assert not damaged_files(mine)
        for file in sorted(p.name for p in theirs.glob("*.safetensors")):
            a, b = load_file(mine / file), load_file(theirs / file)
            assert a.keys() == b.keys()
            assert all(a[key].equal(b[key]) for key in a), file


@pytest.mark.parametrize(
    "where, call",
    [
        ("extraction", 4 + 2),  # 3 batches of warm-up learning, then the second of the first extraction
        ("clustering", 3),
        ("learning", 5),
        ("logging", 6),
        ("saving", 3),  # the first checkpoint
        ("saving", 13),  # a later one
    ],
)
def test_killed_and_resumed_is_bit_identical(where, call, table, settings, unbroken, tmp_path):
    config = toy_settings(table, tmp_path / "run", **settings)
    assert in_process(train_and_die, config, where, call) == -signal.SIGKILL
    assert not Run(tmp_path / "run").finished
    assert in_process(run_training, config) == 0
    assert_same(Run(tmp_path / "run"), unbroken)


def test_killed_twice_is_bit_identical(table, settings, unbroken, tmp_path):
    config = toy_settings(table, tmp_path / "run", **settings)
    for where, call in [("learning", 5), ("saving", 9)]:
        assert in_process(train_and_die, config, where, call) == -signal.SIGKILL
    assert in_process(run_training, config) == 0
    assert_same(Run(tmp_path / "run"), unbroken)


@pytest.mark.parametrize(
    "where, call, left, workers",
    [
        ("extraction", 3 + 2, "episode_0001", 0),  # before a batch of the first extraction: the episode before is all there is
        ("clustering", 3, "episode_0001_step_000001", 1),  # clustering and the first step of the episode end first
        ("learning", 5, "episode_0001_step_000002", 1),
        ("learning", 9, "episode_0003", 0),  # the last step of an episode: the next one's extraction
        ("learning", 8, "episode_0002_step_000002", 1),  # in the middle of an episode
    ],
)
def test_interrupted_and_taken_up_again_is_bit_identical(where, call, left, workers, table, settings, unbroken, tmp_path):
    config = toy_settings(table, tmp_path / "run", **settings, workers=workers)
    assert in_process(train_and_die, config, where, call, signal.SIGINT) == 1
    run = Run(tmp_path / "run")
    assert run.checkpoints()[-1].name == left
    assert not damaged_files(run.checkpoints()[-1])
    assert not run.finished
    steps = run.metrics(kind="step")["step"]
    episode, _, step = left.removeprefix("episode_").partition("_step_")
    assert steps.max() == 3 * int(episode) + int(step or 0)
    assert in_process(run_training, config) == 0
    # The checkpoint of the interruption is gone: a later one is there.
    assert_same(run, unbroken)


@pytest.fixture(scope="module")
def rolling(table, settings, tmp_path_factory):
    """Settings of rolling prototypes with two visits to the same pairs, and such a run."""
    own = settings | {"prototypes": "rolling", "visits": 2, "kmeans_warm_start": True, "log_every": 2}
    run = tmp_path_factory.mktemp("rolling") / "run"
    assert in_process(run_training, toy_settings(table, run, **own)) == 0
    return own, Run(run)


@pytest.mark.parametrize(
    "where, call, blow",
    [("learning", 8, "SIGKILL"), ("clustering", 7, "SIGKILL"), ("learning", 5, "SIGINT"), ("learning", 8, "SIGINT")],
)
def test_rolling_prototypes_go_on_where_they_were(where, call, blow, table, rolling, tmp_path):
    own, unbroken = rolling
    config = toy_settings(table, tmp_path / "run", **own)
    assert in_process(train_and_die, config, where, call, getattr(signal, blow)) in (1, -signal.SIGKILL)
    assert not Run(tmp_path / "run").finished
    assert in_process(run_training, config) == 0
    assert_same(Run(tmp_path / "run"), unbroken)


def test_an_episode_of_one_step_can_be_interrupted_and_a_checkpoint_that_stands_is_left_alone(table, tmp_path):
    settings = toy_settings(table, tmp_path / "run", objective="clip", episodes=4, batch_size=48)
    assert in_process(train_and_die, settings, "learning", 2, signal.SIGINT) == 1
    run = Run(tmp_path / "run")
    assert run.metrics(kind="step")["step"].max() == 2
    assert [checkpoint.name for checkpoint in run.checkpoints()] == ["episode_0001", "episode_0002"]
    assert in_process(run_training, settings) == 0 and run.finished


def test_killed_after_an_interruption_is_bit_identical(table, settings, unbroken, tmp_path):
    config = toy_settings(table, tmp_path / "run", **settings)
    assert in_process(train_and_die, config, "learning", 5, signal.SIGINT) == 1
    assert in_process(train_and_die, config, "logging", 2) == -signal.SIGKILL
    assert in_process(run_training, config) == 0
    assert_same(Run(tmp_path / "run"), unbroken)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(table, settings, unbroken, tmp_path, caplog):
    config = toy_settings(table, tmp_path / "run", **settings)
    assert in_process(train_and_die, config, "learning", 11) == -signal.SIGKILL
    newest = Run(tmp_path / "run").checkpoints()[-1]
    weights = newest / "open_clip_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    assert Run(tmp_path / "run").latest == Run(tmp_path / "run").checkpoints()[-2]
    assert f"{newest} is damaged" in caplog.text
    assert in_process(run_training, config) == 0
    assert_same(Run(tmp_path / "run"), unbroken)


def test_half_a_row_at_the_end_is_dropped(table, settings, unbroken, tmp_path):
    config = toy_settings(table, tmp_path / "run", **settings)
    assert in_process(train_and_die, config, "learning", 8) == -signal.SIGKILL
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "episo')
    assert in_process(run_training, config) == 0
    assert_same(Run(tmp_path / "run"), unbroken)


def test_evaluations_made_while_training_and_kept_over_a_kill_are_those_of_the_checkpoints(table, tmp_path):
    where = {"image_root": str(table.with_name("images")), "where": {"split": "test"}}
    world = {"name": "world", "table": str(table), "label": "colour", **where}
    world |= {"measures": ["zero_shot", "grouping", "retrieval", "gap"]}
    # Intervals are drawn from the run's seed in both.
    # Under bf16 the features that are measured are fp32 all the same.
    settings = {"evaluate_every": 1, "evaluation_sets": [world], "precision": "bf16"}
    config = toy_settings(table, tmp_path / "run", episodes=2, seed=2, **settings)
    assert in_process(train_and_die, config, "learning", 5) == -signal.SIGKILL
    run = Run(tmp_path / "run")
    before = (run.path / "evaluation.jsonl").read_bytes()
    assert run.evaluations()["checkpoint"].unique().tolist() == ["episode_0001"]
    assert in_process(run_training, config) == 0
    assert (run.path / "evaluation.jsonl").read_bytes().startswith(before)
    rows = run.evaluations()
    assert rows["checkpoint"].unique().tolist() == [checkpoint.name for checkpoint in run.checkpoints()]
    assert rows["low"].notna().sum() > 30
    shutil.rmtree(run.path / "features")
    for checkpoint in run.checkpoints():
        trained = rows[rows["checkpoint"] == checkpoint.name].reset_index(drop=True)
        assert trained["measure"].str.contains("prototypes").any() == (checkpoint.name != "episode_0001")
        again = evaluate_checkpoint(checkpoint, sets=[world], seed=2)
        pd.testing.assert_frame_equal(again, trained, rtol=1e-5, atol=1e-6)


def test_other_workers_change_nothing(table, settings, unbroken, tmp_path):
    assert in_process(run_training, toy_settings(table, tmp_path / "run", **settings, workers=2)) == 0
    assert_same(Run(tmp_path / "run"), unbroken)


def test_a_finished_run_is_returned_as_it_is(table, settings, unbroken):
    before = (unbroken.path / "metrics.jsonl").stat().st_mtime_ns
    train(toy_settings(table, unbroken.path, **settings))
    assert (unbroken.path / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_run_with_other_settings_is_refused_naming_them(table, settings, unbroken):
    with pytest.raises(ValueError, match="other settings: seed = 0 there, 1 asked for"):
        train(toy_settings(table, unbroken.path, **settings, seed=1))


def test_two_trainings_of_one_run_at_once_are_refused(table, tmp_path):
    from protoclip_lab.config import TrainConfig

    config = TrainConfig(**toy_settings(table, tmp_path / "run"))
    lock = Run.create(config).path / "only_one_process_trains.lock"
    with FileLock(lock), pytest.raises(Timeout, match=str(lock)):
        train(config)
