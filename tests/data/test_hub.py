"""Parquet files with images in them, and data sets of the Hugging Face hub: as tables, as streams, vectors and all."""

import io
import json
import shutil
import signal
import sys
import threading

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from faults.children import SERVER, assert_same
from fsspec.implementations.local import LocalFileOpener
from helpers import encoded, picture, run_training, toy_settings, train_and_die, write_shard

from protoclip_lab import teachers
from protoclip_lab.config import TrainConfig
from protoclip_lab.data.downstream import PairImages
from protoclip_lab.data.pairs import Pairs, Shards, Stream, prepare
from protoclip_lab.training import train

COLUMNS = {"image_column": "image", "caption_column": "text"}
KINDS = {
    "image": datasets.Image(),
    "text": datasets.List(datasets.Value("string")),
    "mask": datasets.Image(),
    "kind": datasets.Value("int32"),
    "vector": datasets.List(datasets.Value("float32")),
}


def vector(number):
    return np.random.default_rng(number).standard_normal(5).astype(np.float32)


def write(path, numbers, captions=lambda i: [f"caption {i}"], image=encoded, **kinds):
    """A Parquet file as the hub holds it; the mask is no picture at all."""
    rows = {
        "image": [{"bytes": image(i), "path": "x.png"} for i in numbers],
        "text": [captions(i) for i in numbers],
        "mask": [{"bytes": b"broken", "path": None} for i in numbers],
        "kind": [i % 2 for i in numbers],
        "vector": [vector(i).tolist() for i in numbers],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows, features=datasets.Features(KINDS | kinds)).to_parquet(path)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Sixty pairs of training in five files, ten of a test in one."""
    folder = tmp_path_factory.mktemp("hub")
    for number in range(5):
        write(folder / "data" / f"train-{number:05d}-of-00005.parquet", range(12 * number, 12 * number + 12))
    write(folder / "data" / "test-00000-of-00001.parquet", range(100, 110))
    return folder


def numbers(pairs):
    return [int(caption.split()[1]) for caption in pairs.captions]


def assert_pictures(pairs):
    for row, number in enumerate(numbers(pairs)):
        np.testing.assert_array_equal(np.asarray(pairs.image(row)), np.asarray(picture(number)))


def test_a_folder_of_files_becomes_pairs_of_one_split(hub, tmp_path):
    pairs = prepare(hub, tmp_path / "out", where={"split": "train"}, **COLUMNS)
    assert numbers(pairs) == list(range(60)) and pairs.bad_rows == 0
    assert_pictures(pairs)
    assert pairs.column("kind") == [str(i % 2) for i in range(60)]
    # The other picture of a row is not written out as text.
    assert "mask" not in pairs.whole.column_names
    # Images are beside the table, wherever that is.
    shutil.move(tmp_path / "out", tmp_path / "moved")
    moved = Pairs(tmp_path / "moved")
    assert_pictures(moved)
    assert PairImages(moved)[7].size == picture(7).size


def test_rows_are_chosen_by_their_other_columns_and_counted(hub, tmp_path):
    pairs = prepare(hub, tmp_path / "out", where={"split": "train", "kind": 1}, dataset_size=5, **COLUMNS)
    assert numbers(pairs) == [1, 3, 5, 7, 9]
    both = prepare(hub, tmp_path / "both", where={"split": ["train", "test"]}, **COLUMNS)
    assert numbers(both) == [*range(100, 110), *range(60)]


def test_prepared_again_nothing_is_read_unless_a_file_changed(tmp_path, monkeypatch):
    write(tmp_path / "set" / "a.parquet", range(4))
    prepare(tmp_path / "set", tmp_path / "out", **COLUMNS)
    with monkeypatch.context() as closed:
        closed.setattr(Shards, "take", lambda *_, **__: pytest.fail("read again"))
        assert len(prepare(tmp_path / "set", tmp_path / "out", **COLUMNS)) == 4
    write(tmp_path / "set" / "b.parquet", range(4, 6))
    again = prepare(tmp_path / "set", tmp_path / "out", **COLUMNS)
    assert numbers(again) == list(range(6))
    assert_pictures(again)


def test_one_file_with_images_is_a_table_too_and_one_with_paths_stays_one(tmp_path):
    write(tmp_path / "pairs.parquet", range(4))
    pairs = prepare(tmp_path / "pairs.parquet", tmp_path / "out", **COLUMNS)
    assert numbers(pairs) == list(range(4))
    assert_pictures(pairs)
    with pytest.raises(ValueError, match=r"pairs\.parquet has no column 'title'.* 'text'"):
        prepare(tmp_path / "pairs.parquet", tmp_path / "other", image_column="image")


def test_bare_bytes_and_one_caption_each_will_do(tmp_path):
    kinds = {"image": datasets.Value("binary"), "text": datasets.Value("string")}
    rows = {"image": [encoded(i) for i in range(3)], "text": [f"caption {i}" for i in range(3)]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(tmp_path / "bare.parquet")
    pairs = prepare(tmp_path / "bare.parquet", tmp_path / "out", **COLUMNS)
    assert numbers(pairs) == [0, 1, 2]
    assert_pictures(pairs)


def test_several_captions_share_their_image_and_what_cannot_be_used_is_listed(tmp_path):
    write(tmp_path / "set" / "a.parquet", range(3), captions=lambda i: [f"caption {i} {n}" for n in range(3)])
    write(
        tmp_path / "set" / "b.parquet",
        range(3, 6),
        captions=lambda i: [None] if i == 4 else [f"caption {i}"],
        image=lambda i: b"no image" if i == 5 else encoded(i),
    )
    pairs = prepare(tmp_path / "set", tmp_path / "out", max_bad_share=0.5, **COLUMNS)
    assert numbers(pairs) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert pairs.image_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert_pictures(pairs)
    # Once for all of its captions.
    assert (tmp_path / "out" / "images").stat().st_size == sum(len(encoded(i)) for i in range(5)) + len(b"no image")
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["row"], row["filepath"], row["reason"].partition(":")[0]) for row in listed] == [
        (2, "b.parquet/1", "empty caption"),
        (3, "b.parquet/2", "unreadable image"),
    ]


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({}, r"Parquet files of 'split' \['test', 'train'\]: say which"),
        ({"where": {"split": "trian"}}, r"Parquet files of 'split' \['test', 'train'\]"),
        (
            {"where": {"split": "train"}, "image_column": "imag"},
            "train-00000-of-00005.parquet has no column 'imag'; the nearest valid name is 'image'",
        ),
        ({"where": {"split": "train"}, "caption_column": "txt"}, "no column 'txt'; the nearest valid name is 'text'"),
    ],
)
def test_a_split_or_column_that_is_not_there_is_named(wrong, named, hub, tmp_path):
    with pytest.raises(ValueError, match=named):
        prepare(hub, tmp_path / "out", **COLUMNS | wrong)


def test_a_data_set_is_asked_of_the_hub_by_its_name(hub, tmp_path, monkeypatch):
    asked, local = [], fsspec.core.url_to_fs
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda source: asked.append(source) or local(str(hub)))
    pairs = prepare("hf://datasets/nobody/things", tmp_path / "out", where={"split": "test"}, **COLUMNS)
    assert numbers(pairs) == list(range(100, 110)) and pairs.source == "hf://datasets/nobody/things"
    assert asked == ["hf://datasets/nobody/things"]


def test_the_address_of_the_hub_is_understood():
    # No network is needed until files are asked for.
    shards = Shards("hf://datasets/nobody/things/small", ("image", "text"), {})
    assert shards.files and type(shards.system).__name__ == "HfFileSystem" and shards.place == "datasets/nobody/things/small"


# A folder whose name means something to a library, beside others.
@pytest.mark.parametrize("name", ["set#default", "set[1]", "parquet", "my set", "test"])
def test_a_folder_may_have_any_name(name, tmp_path, monkeypatch):
    for number, folder in enumerate((name, "set", "set1", "other")):
        write(tmp_path / folder / "a.parquet", range(10 * number, 10 * number + 3))
    (tmp_path / name / "about.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert numbers(prepare(name, tmp_path / "out", **COLUMNS)) == [0, 1, 2]
    monkeypatch.chdir(tmp_path / "set")
    assert_pictures(Pairs(tmp_path / "out"))


def test_a_column_that_is_called_split_is_asked_before_the_names_of_files(tmp_path):
    table = pa.table(
        {"image": [encoded(i) for i in range(6)], "text": [f"caption {i}" for i in range(6)], "split": ["train", "val", "test"] * 2}
    )
    pa.parquet.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    assert numbers(prepare(tmp_path, tmp_path / "a", where={"split": "train"}, **COLUMNS)) == [0, 3]
    assert numbers(prepare(tmp_path, tmp_path / "b", where={"split": ["val", "test"]}, **COLUMNS)) == [1, 2, 4, 5]
    with pytest.raises(ValueError, match=r"'split' with \['train', 'val', 'test'\]: say which"):
        prepare(tmp_path, tmp_path / "c", **COLUMNS)


def test_paths_in_place_of_images_are_refused(tmp_path):
    (tmp_path / "set").mkdir()
    pa.parquet.write_table(pa.table({"image": ["a.png"], "text": ["a"]}), tmp_path / "set" / "a.parquet")
    with pytest.raises(ValueError, match=r"column 'image' of .*a\.parquet holds no images"):
        prepare(tmp_path / "set", tmp_path / "out", **COLUMNS)


def test_files_are_read_in_this_thread_alone(hub, tmp_path, monkeypatch):
    """A reading thread that is left in the middle of a Python file crashes the interpreter, or hangs it, as it ends."""
    readers, read = set(), LocalFileOpener.read
    monkeypatch.setattr(LocalFileOpener, "read", lambda *arguments: readers.add(threading.get_ident()) or read(*arguments))
    assert len(prepare(hub, tmp_path / "out", where={"split": "train"}, dataset_size=5, **COLUMNS)) == 5
    assert readers == {threading.get_ident()}


# --- streams


def settings(table, run, **changes):
    own = {"image_root": "", "where": {"split": "train"}, "stream": True, "episode_size": 24, **COLUMNS}
    return toy_settings(table, run) | own | changes


def test_a_stream_gives_every_pair_once_before_any_twice(hub, tmp_path):
    source = Stream(TrainConfig(**settings(hub, tmp_path)), tmp_path)
    seen, places = [], {}
    for episode in range(1, 11):
        pairs = source.open(episode)
        assert len(pairs) == 24
        assert_pictures(pairs)
        seen += numbers(pairs)
        places[episode] = json.loads(json.dumps(source.starts)), pairs.fingerprint
    for start in range(0, 240, 60):
        assert sorted(seen[start : start + 60]) == list(range(60))
    assert len({tuple(seen[start : start + 60]) for start in range(0, 240, 60)}) == 4
    # From a saved place the same come again.
    other = Stream(TrainConfig(**settings(hub, tmp_path / "other")), tmp_path / "other")
    other.starts = places[4][0]
    assert [other.open(episode).fingerprint for episode in (4, 5)] == [places[4][1], places[5][1]]
    # What was held is gone but for the last two, images too.
    assert [path.parent.name for path in sorted((tmp_path / "stream").glob("*/images"))] == ["000009", "000010"]


def in_process(target, *arguments):
    process = SERVER.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def test_a_training_killed_in_mid_stream_ends_in_the_same_bits_by_vectors_that_came_along(hub, tmp_path):
    own = {"episodes": 3, "batch_size": 12, "teachers": [{"features": "vector", "k": 3}]}
    train(settings(hub, tmp_path / "whole", **own))
    broken = settings(hub, tmp_path / "broken", **own)
    assert in_process(train_and_die, broken, "learning", 5) == -signal.SIGKILL
    shutil.rmtree(tmp_path / "broken" / "stream")
    assert in_process(run_training, broken) == 0
    assert_same(tmp_path / "broken", tmp_path / "whole")
    assert "loss/vector_to_image_3" in (tmp_path / "whole" / "metrics.jsonl").read_text()


# --- vectors that come with the pairs


def test_a_column_of_vectors_is_a_teacher(hub, tmp_path):
    pairs = prepare(hub, tmp_path / "out", where={"split": "train"}, **COLUMNS)
    found = teachers.of("vector", pairs)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.stack([vector(i) for i in range(60)]))


@pytest.fixture
def tars(tmp_path):
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def sample(number, member="clip.npy", array=None):
    file = io.BytesIO()
    np.save(file, vector(number) if array is None else array, allow_pickle=True)
    return [
        (f"{number}.png", encoded(number)),
        (f"{number}.txt", f"caption {number}".encode()),
        (f"{number}.{member}", file.getvalue()),
    ]


def test_npy_members_of_a_tar_are_vectors_too(tars, tmp_path):
    write_shard(tars / "0.tar", [part for i in range(5) for part in sample(i)])
    pairs = prepare(tars, tmp_path / "out")
    np.testing.assert_array_equal(teachers.of("clip.npy", pairs), np.stack([vector(i) for i in range(5)]))


class Canary:
    """Unpickled, it leaves a mark."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_among_them_is_listed_and_never_loaded(tars, tmp_path):
    members = [part for i in range(5) for part in sample(i)] + sample(5, array=np.array([Canary(tmp_path / "sung")], object))
    write_shard(tars / "0.tar", members)
    pairs = prepare(tars, tmp_path / "out", max_bad_share=0.5)
    assert len(pairs) == 5 and not (tmp_path / "sung").exists()
    assert "unreadable .clip.npy" in (tmp_path / "out" / "bad_rows.jsonl").read_text()


@pytest.mark.parametrize(
    "last, named",
    [
        (np.full(5, np.nan, np.float32), "row 4 of column 'clip.npy' of .*set is broken"),
        (np.zeros(3, np.float32), "row 4 of column 'clip.npy' of .*set is broken.* size 3 into shape \\(5,\\)"),
        (None, "row 4 of column 'clip.npy' of .*set is broken"),
    ],
)
def test_vectors_that_are_missing_or_unlike_the_others_are_refused(last, named, tars, tmp_path):
    whole = [part for i in range(4) for part in sample(i)]
    write_shard(tars / "0.tar", whole + (sample(4)[:2] if last is None else sample(4, array=last)))
    with pytest.raises(ValueError, match=named):
        teachers.of("clip.npy", prepare(tars, tmp_path / "out"))


def test_the_command_line_streams_a_data_set(hub, tmp_path, monkeypatch):
    from protoclip_lab import __main__

    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(settings(hub, tmp_path / "run", objective="clip")))
    monkeypatch.setattr(sys, "argv", ["protoclip_lab", "train", str(config)])
    __main__.main()
    assert (tmp_path / "run" / "finished.json").exists()
