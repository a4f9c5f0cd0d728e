"""A data set as a stream: every pair once a pass, an episode at a time, from any place again."""

import json
import shutil
import signal
from collections import Counter

import numpy as np
import pytest
from faults.children import SERVER, assert_same, together
from helpers import encoded, picture, run_training, toy_settings, train_and_die, write_shard

from protoclip_lab import teachers
from protoclip_lab.config import TrainConfig
from protoclip_lab.data.pairs import Stream
from protoclip_lab.runs import Run, pairs_of
from protoclip_lab.snapshot import open_snapshot
from protoclip_lab.training import train

MINI_LM = "sentence-transformers/all-MiniLM-L6-v2"  # from its package, no download
SIZE = 24  # pairs of an episode


def shard(path, numbers, bad=()):
    members = []
    for i in numbers:
        members += [(f"{i:04d}.png", encoded(i)[: 50 if i in bad else None]), (f"{i:04d}.txt", f"caption {i}".encode())]
    write_shard(path, members)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Sixty pairs in five shards."""
    folder = tmp_path_factory.mktemp("tars")
    for number in range(5):
        shard(folder / f"{number:05d}.tar", range(12 * number, 12 * number + 12))
    return folder


def settings(table, run, **changes):
    own = {"image_root": "", "where": {}, "stream": True, "episode_size": SIZE, "max_bad_share": 0.3}
    return toy_settings(table, run) | own | changes


def stream(table, run, **changes):
    return Stream(TrainConfig(**settings(table, run, **changes)), run)


def numbers(pairs):
    return [int(caption.split()[1]) for caption in pairs.captions]


def test_every_pair_once_before_any_twice(tars, tmp_path):
    source = stream(tars, tmp_path)
    drawn = [numbers(source.open(episode)) for episode in range(1, 11)]
    assert [len(episode) for episode in drawn] == [SIZE] * 10
    seen = [number for episode in drawn for number in episode]
    for start in range(0, 240, 60):
        assert sorted(seen[start : start + 60]) == list(range(60))
    # Another order in each pass.
    assert len({tuple(seen[start : start + 60]) for start in range(0, 240, 60)}) == 4


def test_an_episode_has_its_pixels_and_only_the_one_before_is_held_too(tars, tmp_path):
    source = stream(tars, tmp_path)
    for episode in (1, 2, 3):
        pairs = source.open(episode)
    for index, number in enumerate(numbers(pairs)):
        np.testing.assert_array_equal(np.asarray(pairs.image(index)), np.asarray(picture(number)))
    assert [path.name for path in (tmp_path / "stream").glob("*/")] == ["000002", "000003"]


def test_from_a_saved_place_the_same_pairs_come(tars, tmp_path):
    source = stream(tars, tmp_path / "one")
    drawn, places = {}, {}
    for episode in range(1, 6):
        drawn[episode] = source.open(episode).fingerprint
        places[episode] = json.loads(json.dumps(source.starts))
    for episode in (2, 4):
        other = stream(tars, tmp_path / "other")
        other.starts = places[episode]
        assert [other.open(number).fingerprint for number in (episode, episode + 1)] == [drawn[episode], drawn[episode + 1]]
        # What was fetched half-way is fetched again.
        (tmp_path / "other" / "stream" / f"{episode + 1:06d}" / "pairs.json").unlink()
        assert other.open(episode + 1).fingerprint == drawn[episode + 1]
    assert stream(tars, tmp_path / "seed", seed=1).open(1).fingerprint != drawn[1]


def test_bad_samples_are_listed_and_the_episode_is_full(tars, tmp_path):
    table = tmp_path / "tars"
    shutil.copytree(tars, table)
    shard(table / "00002.tar", range(24, 36), bad=(25, 30))
    source = stream(table, tmp_path / "run")
    seen = [number for episode in (1, 2) for number in numbers(source.open(episode))]
    seen += numbers(source.open(3))[: 58 - 48]
    assert sorted(seen) == sorted(set(range(60)) - {25, 30})
    lists = sorted((tmp_path / "run" / "stream").glob("bad_rows_*.jsonl"))
    assert [path.name for path in lists] == [f"bad_rows_{episode:06d}.jsonl" for episode in (1, 2, 3)]
    listed = [json.loads(line) for path in lists for line in path.read_text().splitlines()]
    found = Counter((row["filepath"], row["row"]) for row in listed)
    assert set(found) == {("00002.tar/0025.png", 2), ("00002.tar/0030.png", 7)}
    with pytest.raises(ValueError, match=r"max_bad_share = 1.0%: row \d 00002.tar/00"):
        strict = stream(table, tmp_path / "strict", max_bad_share=0.01)
        for episode in (1, 2, 3):
            strict.open(episode)


def test_rows_are_chosen_before_they_are_counted(tmp_path):
    for number in range(4):
        split = [part for i in range(10) for part in sample_of(10 * number + i)]
        write_shard(tmp_path / f"{number}.tar", split)
    source = stream(tmp_path, tmp_path / "run", where={"kind": "even"}, episode_size=10)
    drawn = [numbers(source.open(episode)) for episode in (1, 2)]
    assert sorted(drawn[0] + drawn[1]) == list(range(0, 40, 2))


def sample_of(number):
    about = json.dumps({"kind": "odd" if number % 2 else "even"}).encode()
    return [(f"{number}.png", encoded(number)), (f"{number}.txt", f"caption {number}".encode()), (f"{number}.json", about)]


def test_with_other_shards_a_run_does_not_go_on(tars, tmp_path):
    table = tmp_path / "tars"
    shutil.copytree(tars, table)
    source = stream(table, tmp_path / "run")
    source.open(1)
    shard(table / "00005.tar", range(60, 72))
    other = stream(table, tmp_path / "run")
    other.starts = source.starts
    with pytest.raises(ValueError, match="has other shards now: their order would change"):
        other.open(2)


def test_an_episode_that_was_being_removed_is_fetched_again(tars, tmp_path):
    source = stream(tars, tmp_path)
    before = source.open(1).fingerprint
    shutil.rmtree(tmp_path / "stream" / "000001" / "table")
    (tmp_path / "stream" / "000001" / "pairs.json").unlink()  # first of all
    source.starts = stream(tars, tmp_path).starts
    assert source.open(1).fingerprint == before


def test_an_episode_larger_than_a_pass_and_a_table_of_paths_are_refused(tars, tmp_path):
    with pytest.raises(ValueError, match="has 60 usable pairs: lower episode_size"):
        stream(tars, tmp_path, episode_size=61).open(1)
    with pytest.raises(ValueError, match=r"table\.tsv is neither shards nor a data set of the hub: stream = False"):
        stream(tmp_path / "table.tsv", tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"episode_size": None}, "stream needs episode_size"),
        ({"dataset_size": 100}, "stream needs episode_size, and no dataset_size"),
    ],
)
def test_settings_that_do_not_go_with_a_stream_are_refused(changes, message, tars, tmp_path):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings(tars, tmp_path, **changes))


# --- training


def in_process(target, *arguments):
    process = SERVER.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


MORE = {"episodes": 4, "k": [4, 6], "batch_size": 12}


@pytest.fixture(scope="module", params=[{}, {"prototypes": "rolling", "visits": 2}], ids=["faithful", "rolling"])
def whole(request, tars, tmp_path_factory):
    """Settings, and a run that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(settings(tars, run, **MORE | request.param))
    return MORE | request.param, run


@pytest.mark.parametrize("where, call", [("learning", 6), ("saving", 17)])
def test_killed_and_taken_up_again_is_bit_identical(where, call, whole, tars, tmp_path):
    own, unbroken = whole
    broken = settings(tars, tmp_path / "broken", **own)
    assert in_process(train_and_die, broken, where, call) == -signal.SIGKILL
    # As on another machine: nothing of the stream is left.
    shutil.rmtree(tmp_path / "broken" / "stream")
    assert in_process(run_training, broken) == 0
    assert_same(tmp_path / "broken", unbroken)


def test_reading_in_other_processes_changes_nothing(whole, tars, tmp_path):
    own, unbroken = whole
    train(settings(tars, tmp_path / "two", **own, workers=2))
    assert_same(tmp_path / "two", unbroken)


def test_a_streamed_run_can_be_looked_at(tars, tmp_path):
    run = train(settings(tars, tmp_path / "run", teachers=[{"features": MINI_LM, "name": "v"}]))
    assert run.finished and (run.metrics(kind="episode")["time/fetch"] > 0).all()
    seen = open_snapshot(run.path, samples=10)
    assert pairs_of(run).folder.name == "000003" and len(seen.rows) == 10
    labels, _, features = seen.prototypes("v")
    assert labels.shape == (10,) and features.shape == (10, 384)


def test_two_processes_learn_what_one_learns_by_the_teacher_that_one_of_them_made(tars, tmp_path):
    # Without BatchNorm, whose statistics are each process's own on a CPU.
    own = {
        "teachers": [{"name": "minilm", "features": MINI_LM, "k": 3}],
        "projection_depth": 0,
        "kmeans_engine": "torch",
        "batch_size": 12,
    }
    for processes in (1, 2):
        assert together(settings(tars, tmp_path / str(processes), **own), processes=processes) == [0] * processes
    one, two = (Run(tmp_path / name) for name in ("1", "2"))
    losses = [run.metrics(kind="step").filter(like="loss") for run in (one, two)]
    assert "loss/minilm_to_image_3" in losses[0]
    np.testing.assert_allclose(*losses, rtol=1e-3, atol=1e-4)
    pairs = pairs_of(two)
    found = teachers.of(MINI_LM, pairs)
    np.testing.assert_allclose(found, teachers.extract(pairs.captions, MINI_LM, dim=None), atol=1e-5)
