"""Training tables become pairs; bad rows are counted, listed and skipped."""

import io
import json
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from protoclip_lab.data import pairs as pairs_module
from protoclip_lab.data.pairs import NO_PLACE, Pairs, index_tar, prepare, read_image


def jpeg(colour="red", size=(20, 16), mode="RGB", kind="JPEG", **options) -> bytes:
    data = io.BytesIO()
    Image.new(mode, size, colour).save(data, kind, **options)
    return data.getvalue()


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i, colour in enumerate(["red", "green", "blue", "white"]):
        (images / f"{i}.jpg").write_bytes(jpeg(colour))
    return tmp_path


def decode(folder, data):
    (folder / "one").write_bytes(data)
    return read_image(folder, ("one", NO_PLACE))


def write(folder, text, name="captions.tsv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(table, **options):
    options.setdefault("image_root", table.parent / "images")
    return prepare(table, table.parent / "out", **options)


def test_rows_come_back_as_they_stand_in_the_file(folder):
    rows = ['0.jpg\t"quoted start', "1.jpg\tNone", "2.jpg\tein Mädchen 👧 يبتسم", "0.jpg\tnan", '3.jpg\tsays "hi"']
    found = read(write(folder, "filepath\ttitle\n" + "\n".join(rows) + "\n"))
    assert [f"{p}\t{t}" for p, t in zip(found.column("filepath"), found.captions, strict=True)] == rows
    assert found.image_ids.tolist() == [0, 1, 2, 0, 3]
    assert found.column("_row") == [2, 3, 4, 5, 6]
    image, caption = found[2]
    assert caption == "ein Mädchen 👧 يبتسم" and image.size == (20, 16)
    assert image.getpixel((3, 3))[2] > 200


def test_csv_quotes_and_parquet_give_the_same_pairs(folder):
    rows = [("0.jpg", 'a, "b"'), ("1.jpg", "two\nlines"), ("2.jpg", "3")]
    quoted = "".join('{},"{}"\n'.format(p, t.replace('"', '""')) for p, t in rows)
    from_csv = read(write(folder, "filepath,title\n" + quoted, "t.csv"))
    path = folder / "t.parquet"
    pa.parquet.write_table(pa.table({"filepath": [r[0] for r in rows], "title": [r[1] for r in rows]}), path)
    from_parquet = prepare(path, folder / "out2", image_root=folder / "images")
    assert from_csv.captions == from_parquet.captions == [t for _, t in rows]
    assert from_csv.fingerprint == from_parquet.fingerprint


def test_a_tar_gives_the_same_pixels_as_a_folder(folder):
    with tarfile.open(folder / "images.tar", "w") as tar:
        for file in sorted((folder / "images").iterdir()):
            tar.add(file, file.name)
    table = write(folder, "filepath\ttitle\n" + "".join(f"{i}.jpg\tpicture {i}\n" for i in range(4)))
    loose = read(table)
    packed = prepare(table, folder / "packed", image_root=folder / "images.tar")
    for i in range(4):
        assert np.array_equal(np.asarray(loose.image(i)), np.asarray(packed.image(i)))
    assert loose.fingerprint == packed.fingerprint
    assert set(index_tar(folder / "images.tar")) == {f"{i}.jpg" for i in range(4)}


def test_bad_rows_are_counted_listed_and_skipped(folder, caplog):
    images = folder / "images"
    (images / "truncated.jpg").write_bytes(jpeg(size=(200, 200))[:400])
    (images / "text.jpg").write_bytes(b"this is no image")
    (images / "empty.jpg").write_bytes(b"")
    rows = [
        "0.jpg\tgood",
        "truncated.jpg\ta",
        "text.jpg\ta",
        "empty.jpg\ta",
        "gone.jpg\ta",
        "1.jpg\t   ",
        "\ta",
        "1.jpg\ttoo\tmany",
        "3.jpg\talso good",
    ]
    found = read(write(folder, "filepath\ttitle\n" + "\n".join(rows) + "\n"), max_bad_share=0.9)
    assert found.captions == ["good", "also good"]
    assert found.column("_row") == [2, 10]
    listed = [json.loads(line) for line in (found.folder / "bad_rows.jsonl").read_text().splitlines()]
    assert found.bad_rows == len(listed) == 7
    assert "2 of 9 rows" in caplog.text and "bad_rows.jsonl" in caplog.text
    reasons = {row["row"]: row["reason"] for row in listed}
    assert "unreadable image" in reasons[3] and "unreadable image" in reasons[4] and "unreadable image" in reasons[5]
    assert "No such file" in reasons[6] and reasons[7] == "empty caption"
    assert "unreadable image" in reasons[8] and "3 fields, 2 expected" in reasons[9]


def test_too_many_bad_rows_stop_with_the_first_of_them(folder):
    table = write(folder, "filepath\ttitle\n0.jpg\tgood\ngone.jpg\tbad\n1.jpg\tgood\n")
    with pytest.raises(ValueError, match=r"2 of 3 rows .* are usable, .*max_bad_share = 5.0%: row 3 gone.jpg: .*No such file"):
        read(table)
    assert "gone.jpg" in (folder / "out" / "bad_rows.jsonl").read_text() and not (folder / "out" / "pairs.json").exists()
    assert len(read(table, max_bad_share=0.34)) == 2
    for rows, usable in {"": "0 of 0", "gone.jpg\tbad\n": "0 of 1"}.items():
        with pytest.raises(ValueError, match=f"{usable} rows .* are usable"):
            read(write(folder, "filepath\ttitle\n" + rows), max_bad_share=1)


def test_a_decompression_bomb_is_a_bad_row(folder, monkeypatch):
    (folder / "images" / "big.png").write_bytes(jpeg(size=(300, 300), kind="PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    found = read(write(folder, "filepath\ttitle\n0.jpg\tgood\nbig.png\tbomb\n"), max_bad_share=0.5)
    assert found.captions == ["good"]
    assert "decompression bomb" in (found.folder / "bad_rows.jsonl").read_text()


@pytest.mark.parametrize(
    "data",
    [
        jpeg(0, mode="L"),
        jpeg((0, 0, 0, 0), mode="CMYK"),
        jpeg(3, mode="P", kind="PNG"),
        jpeg((1, 2, 3, 4), mode="RGBA", kind="PNG"),
        jpeg(40_000, mode="I;16", kind="PNG"),
    ],
)
def test_every_colour_mode_becomes_rgb(tmp_path, data):
    assert decode(tmp_path, data).mode == "RGB"


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    assert decode(tmp_path, jpeg(40_000, mode="I;16", kind="PNG")).getpixel((0, 0))[0] == 40_000 >> 8


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(tmp_path, jpeg(size=(20, 10), exif=exif)).size == (10, 20)


def photograph(width, height, kind="JPEG", **options) -> bytes:
    """Slow waves of colour, which a reduced decoding shows as well as the full one."""
    x, y = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    waves = [np.sin(7 * x + 3 * y), np.cos(5 * x - 4 * y), np.sin(9 * y)]
    data = io.BytesIO()
    Image.fromarray((127 + 100 * np.stack(waves, axis=2)).astype(np.uint8)).save(data, kind, **options)
    return data.getvalue()


@pytest.mark.parametrize(
    ("at_least", "size"),
    [(0, (400, 304)), (305, (400, 304)), (153, (400, 304)), (152, (200, 152)), (77, (200, 152)), (76, (100, 76)), (1, (50, 38))],
)
def test_a_jpeg_is_reduced_as_far_as_both_sides_stay_large_enough(tmp_path, at_least, size):
    data = photograph(400, 304, quality=95)
    (tmp_path / "one").write_bytes(data)
    found = read_image(tmp_path, ("one", NO_PLACE), at_least)
    assert found.size == size and found.mode == "RGB"
    whole = decode(tmp_path, data)
    assert np.array_equal(np.asarray(whole), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    # The same picture, to within a few of 255: two ways of making a picture smaller.
    difference = np.asarray(found, float) - np.asarray(whole.resize(size, Image.Resampling.BOX), float)
    assert np.abs(difference).mean() < 2


def test_a_reduced_jpeg_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "one").write_bytes(photograph(400, 120, quality=95, exif=exif))
    whole = read_image(tmp_path, ("one", NO_PLACE))
    found = read_image(tmp_path, ("one", NO_PLACE), 60)
    assert whole.size == (120, 400) and found.size == (60, 200)
    difference = np.asarray(found, float) - np.asarray(whole.resize((60, 200), Image.Resampling.BOX), float)
    assert np.abs(difference).mean() < 2


def test_what_is_no_jpeg_is_decoded_in_full(tmp_path):
    (tmp_path / "one").write_bytes(photograph(400, 300, "PNG"))
    assert read_image(tmp_path, ("one", NO_PLACE), 10).size == (400, 300)


def test_where_selects_before_anything_is_counted(folder):
    rows = "0.jpg\ta\ttrain\ngone.jpg\tb\ttest\n1.jpg\tc\ttrain\n2.jpg\td\tval\n"
    table = write(folder, "filepath\ttitle\tsplit\n" + rows)
    assert read(table, where={"split": "train"}).captions == ["a", "c"]
    assert read(table, where={"split": ["train", "val"]}).captions == ["a", "c", "d"]
    with pytest.raises(ValueError, match="'split' with .'train', 'test', 'val'"):
        read(table)
    with pytest.raises(ValueError, match="no row of .* has {'split': 'tran'}; values there"):
        read(table, where={"split": "tran"})


def test_missing_columns_name_the_nearest(folder):
    table = write(folder, "filepath\ttitel\n0.jpg\ta\n")
    with pytest.raises(ValueError, match="no column 'title'; the nearest valid name is 'titel'"):
        read(table)
    assert read(table, caption_column="titel").captions == ["a"]


def test_dataset_size_keeps_the_first_usable(folder):
    table = write(folder, "filepath\ttitle\ngone.jpg\tx\n" + "".join(f"{i}.jpg\t{i}\n" for i in range(4)))
    assert read(table, dataset_size=2, max_bad_share=0.5).captions == ["0", "1"]


def test_prepared_pairs_are_reused_until_the_table_or_arguments_change(folder, monkeypatch):
    table = write(folder, "filepath\ttitle\n0.jpg\ta\n1.jpg\tb\n")
    first = read(table)
    monkeypatch.setattr(pairs_module, "read_table", lambda path: pytest.fail("read again"))
    assert read(table).fingerprint == first.fingerprint
    assert prepare(first.folder, "unused").fingerprint == first.fingerprint
    monkeypatch.undo()
    assert len(read(table, dataset_size=1)) == 1
    write(folder, "filepath\ttitle\n0.jpg\ta\n1.jpg\tb\n2.jpg\tc\n")
    assert len(read(table)) == 3


def test_a_prepared_folder_is_not_mistaken_for_other_rows(folder):
    table = write(folder, "filepath\ttitle\tsplit\n0.jpg\ta\ttrain\n1.jpg\tb\ttest\n")
    found = read(table, where={"split": "train"})
    with pytest.raises(ValueError, match="prepared already"):
        prepare(found.folder, "unused", where={"split": "test"})
    with pytest.raises(ValueError, match="prepared already"):
        prepare(found.folder, "unused", dataset_size=1)


def test_fingerprint_tells_tables_apart():
    assert pairs_module.fingerprint(["ab"], ["c"]) != pairs_module.fingerprint(["a"], ["bc"])
    assert pairs_module.fingerprint(["a", "b"], ["x", "y"]) != pairs_module.fingerprint(["b", "a"], ["y", "x"])


def test_byte_order_mark_and_crlf_do_no_harm(folder):
    found = read(write(folder, b"\xef\xbb\xbffilepath\ttitle\r\n0.jpg\ta\r\n"))
    assert found.captions == ["a"]


def test_an_image_that_vanishes_later_is_named_with_its_row(folder):
    found = read(write(folder, "filepath\ttitle\n0.jpg\ta\n"))
    (folder / "images" / "0.jpg").unlink()
    with pytest.raises(OSError, match=r"images/0.jpg is not a readable image: .* 01_prepare_data"):
        found.image(0)


def test_neither_table_nor_prepared_folder(tmp_path):
    (tmp_path / "table.pdf").touch()
    for name in ("nothing.tsv", "table.pdf", "."):
        with pytest.raises(FileNotFoundError, match=f"{tmp_path / name} is no table"):
            prepare(tmp_path / name, tmp_path / "out")


def test_a_missing_image_root_is_named_with_the_remedy(folder):
    table = write(folder, "filepath\ttitle\n0.jpg\ta\n")
    with pytest.raises(FileNotFoundError, match=f"no image_root {folder / 'gone.tar'}: name the folder or tar"):
        read(table, image_root=folder / "gone.tar")


@pytest.mark.parametrize("root", ["images", "images.tar"])
def test_what_is_not_in_the_folder_or_tar_is_missing(folder, root):
    with tarfile.open(folder / "images.tar", "w") as tar:
        tar.add(folder / "images" / "0.jpg", "0.jpg")
    table = write(folder, "filepath\ttitle\n0.jpg\ta\ngone.jpg\tb\n")
    found = read(table, image_root=folder / root, max_bad_share=0.5)
    assert found.captions == ["a"]
    assert json.loads((found.folder / "bad_rows.jsonl").read_text())["reason"].startswith(
        "unreadable image: [Errno 2]" if root == "images" else "unreadable image: [Errno 20]"
    )


def test_other_columns_stay_whatever_they_are_called(folder):
    rows = "0.jpg\ta\tred\tlarge\t7\n1.jpg\tb\tgreen\tsmall\t9\n"
    found = read(write(folder, "filepath\ttitle\tcolour\tsize\timage\n" + rows))
    assert found.column("colour") == ["red", "green"] and found.column("size") == ["large", "small"]
    assert found.column("image") == ["7", "9"] and found.image_ids.tolist() == [0, 1]
    with pytest.raises(ValueError, match="'color'.*'colour'"):
        found.column("color")


def test_pairs_open_again_from_their_folder(folder):
    found = read(write(folder, "filepath\ttitle\n0.jpg\ta\n1.jpg\tb\n"))
    again = Pairs(found.folder)
    assert again.captions == found.captions and len(again) == 2


def test_flickr8k_training_split_holds_no_val_or_test_picture(flickr8k, tmp_path):
    options = {"image_root": flickr8k / "train.tar", "where": {"split": "train"}}
    found = prepare(flickr8k / "captions.tsv", tmp_path / "out", **options)
    assert len(found) == 30_000 and found.image_ids.max() == 5_999
    others = set(index_tar(flickr8k / "val.tar")) | set(index_tar(flickr8k / "test.tar"))
    assert not others & set(found.column("filepath"))


def test_what_an_older_version_prepared_is_prepared_anew(folder):
    table = write(folder, "filepath\ttitle\n0.jpg\tred\n1.jpg\tgreen\n")
    made = read(table)
    about = json.loads((made.folder / "pairs.json").read_text())
    (made.folder / "pairs.json").write_text(json.dumps(about | {"form": 1}))
    shutil.rmtree(made.folder / "table")  # of another form, so not to be opened
    again = read(table)
    assert again.fingerprint == made.fingerprint and again.captions == ["red", "green"]
