"""Shards become pairs: WebDataset tars where they lie, nothing extracted; Parquet and hub data sets by a copy of their images."""

import json
import os
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from helpers import encoded, npy, picture, write_parquet, write_shard

from protoclip_lab import teachers
from protoclip_lab.data.pairs import Pairs, prepare


def sample(number, **about):
    key, fields = f"{number:09d}", {"caption": f"caption {number}", "width": 10} | about
    text = fields["caption"].encode()
    return [(f"{key}.png", encoded(number)), (f"{key}.txt", text), (f"{key}.json", json.dumps(fields).encode())]


@pytest.fixture
def folder(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(2):
        write_shard(shards / f"{shard:05d}.tar", [part for i in range(3) for part in sample(10 * shard + i)])
    # What img2dataset leaves beside them.
    (shards / "00000_stats.json").write_text("{}")
    return shards


def test_pairs_of_shards_have_their_pixels_captions_and_columns(folder, tmp_path):
    pairs = prepare(folder, tmp_path / "out", where={"width": 10})
    assert len(pairs) == 6 and pairs.bad_rows == 0
    for pair, number in zip(pairs, (0, 1, 2, 10, 11, 12), strict=True):
        np.testing.assert_array_equal(np.asarray(pair[0]), np.asarray(picture(number)))
        assert pair[1] == f"caption {number}"
    assert pairs.column("width") == ["10"] * 6
    assert pairs.column("filepath")[3] == "00001.tar/000000010.png"
    again = Pairs(tmp_path / "out")
    assert again.fingerprint == pairs.fingerprint
    assert not [p for p in tmp_path.rglob("*.png")]


def test_the_caption_may_come_from_the_json(folder, tmp_path):
    pairs = prepare(folder, tmp_path / "out", caption_column="caption")
    assert pairs.captions == [f"caption {i}" for i in (0, 1, 2, 10, 11, 12)]


def test_samples_that_are_not_whole_are_listed(folder, tmp_path):
    whole = [part for i in range(20, 28) for part in sample(i)]
    odd = [("a/30.tar.txt", b"no picture"), ("31.jpg", b"no jpeg"), ("31.txt", b"x"), ("32.png", encoded(32)), ("32.json", b"{")]
    odd += [("33.png", encoded(33)), ("../34.png", encoded(34)), ("../34.txt", b"outside, and nowhere written")]
    write_shard(folder / "00002.tar", whole + odd)
    pairs = prepare(folder, tmp_path / "out", max_bad_share=0.5)
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert {row["filepath"]: row["reason"].partition(":")[0] for row in listed} == {
        "00002.tar/a/30.": "unreadable image",
        "00002.tar/31.jpg": "unreadable image",
        "00002.tar/32.png": "unreadable .json",
        "00002.tar/33.png": "empty caption",
    }
    assert len(pairs) == 15 and pairs.captions[-1] == "outside, and nowhere written"
    np.testing.assert_array_equal(np.asarray(pairs.image(14)), np.asarray(picture(34)))


def test_a_shard_cut_short_is_named(folder, tmp_path):
    shard = folder / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"00001\.tar is not a whole uncompressed tar"):
        prepare(folder, tmp_path / "out")


def test_a_shard_written_anew_in_place_is_indexed_anew(folder, tmp_path):
    prepare(folder, tmp_path / "out")
    before = folder.stat()
    write_shard(folder / "00001.tar", [part for i in (10, 11, 12) for part in sample(i + 20)])
    os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))  # a folder does not see its files' contents change
    pairs = prepare(folder, tmp_path / "out")
    assert pairs.captions[3:] == [f"caption {i}" for i in (30, 31, 32)]
    np.testing.assert_array_equal(np.asarray(pairs.image(3)), np.asarray(picture(30)))


# --- Parquet and the hub


@pytest.fixture
def hub(tmp_path):
    """A data set as the hub holds it: Parquet files of two splits, read by its folder."""
    for number in range(2):
        rows = [10 * number + i for i in range(5)]
        write_parquet(tmp_path / "set" / "data" / f"train-0000{number}-of-00002.parquet", rows)
    write_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", [90, 91])
    return tmp_path / "set"


IMAGE = {"image_column": "image", "caption_column": "text"}


def test_pairs_of_parquet_files_have_their_pixels_captions_and_columns(hub, tmp_path):
    pairs = prepare(hub, tmp_path / "out", where={"split": "train"}, **IMAGE)
    numbers = [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert pairs.captions == [f"caption {i}" for i in numbers]
    for index, number in enumerate(numbers):
        np.testing.assert_array_equal(np.asarray(pairs.image(index)), np.asarray(picture(number)))
    assert pairs.column("width") == ["10"] * 10 and pairs.column("split") == ["train"] * 10
    vectors = teachers.of("vector", "teacher", pairs)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, [[i, 0.5, -i] for i in numbers])
    # Prepared once; moved elsewhere with its images.
    (hub / "data" / "train-00001-of-00002.parquet").touch()
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    np.testing.assert_array_equal(np.asarray(Pairs(tmp_path / "elsewhere").image(7)), np.asarray(picture(12)))


def test_parquet_files_without_splits_need_none(tmp_path):
    write_parquet(tmp_path / "set" / "one.parquet", [3, 4])
    pairs = prepare(tmp_path / "set", tmp_path / "out", **IMAGE)
    assert pairs.captions == ["caption 3", "caption 4"] and "split" not in pairs.columns


def test_only_as_many_rows_are_read_as_are_wanted(hub, tmp_path):
    pairs = prepare(hub, tmp_path / "out", where={"split": "train"}, dataset_size=3, **IMAGE)
    assert pairs.captions == ["caption 0", "caption 1", "caption 2"]
    assert (tmp_path / "out" / "images").stat().st_size == sum(len(encoded(i)) for i in range(3))


def test_rows_without_an_image_are_listed_and_the_wanted_number_is_reached(tmp_path):
    write_parquet(tmp_path / "set" / "a.parquet", range(20), without=[1], broken=[2])
    pairs = prepare(tmp_path / "set", tmp_path / "out", dataset_size=10, max_bad_share=0.5, **IMAGE)
    assert pairs.captions == [f"caption {i}" for i in (0, *range(3, 12))]
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    # The second row of the first row group, and the first of the second.
    assert {(row["row"], row["filepath"][:6]) for row in listed} == {(2, "00000/"), (1, "00001/")}


def test_several_captions_of_an_image_are_pairs_of_one_image(tmp_path):
    image = {"bytes": encoded(5), "path": None}
    (tmp_path / "set").mkdir()
    parquet.write_table(pa.table({"image": [image], "text": [["one", "two"]]}), tmp_path / "set" / "one.parquet")
    pairs = prepare(tmp_path / "set", tmp_path / "out", **IMAGE)
    assert pairs.captions == ["one", "two"] and pairs.image_ids.tolist() == [0, 0]


def test_a_name_of_the_hub_goes_to_the_hub(hub, tmp_path, monkeypatch):
    asked, load = [], datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, **options: asked.append(name) or load(str(hub), **options))
    for name in ("hf://datasets/nobody/things", "hf://datasets/nobody/things:small"):
        pairs = prepare(name, tmp_path / name[-5:], where={"split": "test"}, **IMAGE)
        assert pairs.captions == ["caption 90", "caption 91"]
    assert asked == [("nobody/things",), ("nobody/things", "small")]


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, r"has splits \[.*\], not 'None'.*where={'split': 'train'}"),
        ({"where": {"split": "trian"}}, "not 'trian'.*nearest valid name is 'train'"),
        ({"where": {"split": "train"}, "image_column": "imag"}, "no column 'imag'; the nearest valid name is 'image'"),
        ({"where": {"split": "train"}, "caption_column": "txt"}, "no column 'txt'; the nearest valid name is 'text'"),
        ({"where": {"split": "train", "width": 11}}, "0 of 0 rows .* are usable.*none has .*'width': 11"),
    ],
)
def test_what_is_not_there_is_named_before_anything_is_copied(options, message, hub, tmp_path):
    with pytest.raises(ValueError, match=message):
        prepare(hub, tmp_path / "out", **IMAGE | options)


def test_vectors_of_a_shard_are_teacher_features_and_no_pickle_is_opened(folder, tmp_path):
    write_shard(folder / "00000.tar", [part for i in range(3) for part in [*sample(i), (f"{i:09d}.clip.npy", npy([i, 1.0]))]])
    poison = pickle.dumps(print)
    write_shard(folder / "00001.tar", [*sample(7), ("000000007.clip.npy", poison), *sample(8), ("000000008.clip.npy", npy([8, 1]))])
    pairs = prepare(folder, tmp_path / "out", max_bad_share=0.5)
    assert "unreadable .clip.npy" in (tmp_path / "out" / "bad_rows.jsonl").read_text()
    np.testing.assert_array_equal(teachers.of("clip.npy", "t", pairs), [[0, 1], [1, 1], [2, 1], [8, 1]])
    with pytest.raises(ValueError, match="title of .* holds no vectors"):
        pairs.vectors("title")


def test_vectors_of_unlike_length_are_refused(folder, tmp_path):
    write_shard(folder / "00001.tar", [*sample(7), ("000000007.v.npy", npy([1])), *sample(8), ("000000008.v.npy", npy([8, 1]))])
    with pytest.raises(ValueError, match=r"v\.npy of .* holds no vectors of one length"):
        prepare(folder, tmp_path / "out").vectors("v.npy")
