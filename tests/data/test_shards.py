"""WebDataset shards as img2dataset writes them become pairs where they lie, nothing extracted."""

import json
import os

import numpy as np
import pytest
from helpers import encoded, picture, write_shard

from protoclip_lab.data.downstream import PairImages
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


def test_only_as_many_rows_are_read_as_are_wanted_and_good_ones_come_in_for_bad(folder, tmp_path):
    write_shard(folder / "00000.tar", [*sample(0), ("1.png", encoded(1)[:50]), ("1.txt", b"broken"), *sample(2), ("3.json", b"{")])
    pairs = prepare(folder, tmp_path / "out", dataset_size=4, max_bad_share=0.5)
    assert pairs.captions == [f"caption {i}" for i in (0, 2, 10, 11)]
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert {(row["row"], row["filepath"]) for row in listed} == {(2, "00000.tar/1.png"), (4, "00000.tar/3.")}


def test_where_a_sample_lacks_the_field_it_is_passed_over(folder, tmp_path):
    odd = [*sample(20, kind="a"), *sample(21), ("22.png", encoded(22)), ("22.txt", b"no json"), *sample(23, kind="a")]
    write_shard(folder / "00002.tar", odd)
    assert prepare(folder, tmp_path / "out", where={"kind": "a"}).captions == ["caption 20", "caption 23"]
    with pytest.raises(ValueError, match="0 of 0 rows .* are usable.*none has {'kind': 'b'}"):
        prepare(folder, tmp_path / "none", where={"kind": "b"})


def test_fields_of_any_kind_become_texts(folder, tmp_path):
    odd = [*sample(20, tags=[0.5, 1]), *sample(21, tags=None), *sample(22, tags=[]), *sample(23, tags="half of a pair: \ud83d")]
    write_shard(folder / "00002.tar", odd)
    found = prepare(folder, tmp_path / "out").column("tags")[6:]
    assert found == ["[0.5, 1]", "", "[]", "half of a pair: ?"]


def test_images_of_shards_can_be_evaluated_and_taught_from(folder, tmp_path):
    pairs = prepare(folder, tmp_path / "out")
    images = PairImages(pairs)
    np.testing.assert_array_equal(np.asarray(images[4]), np.asarray(picture(11)))
    assert len(images) == 6 and images.fingerprint == PairImages(pairs).fingerprint
    (folder / "00001.tar").touch()
    assert images.fingerprint != PairImages(pairs).fingerprint
