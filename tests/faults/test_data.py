"""Images, tables and teacher features as the world has them: read with the right pixels, counted, or refused by name."""

import io
import json
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from protoclip_lab import teachers
from protoclip_lab.data.pairs import prepare

# A different colour in each corner tells every turn and mirroring.
CORNERS = np.array([[[250, 10, 10], [10, 250, 10]], [[10, 10, 250], [240, 240, 20]]], np.uint8)
PICTURE = np.kron(CORNERS, np.ones((16, 24, 1), np.uint8))


def encoded(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def palette(transparency):
    indices = np.kron([[0, 1], [2, 3]], np.ones((16, 24), int)).astype(np.uint8)
    image = Image.fromarray(indices, "L").convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette(CORNERS.reshape(-1).tolist())
    return encoded(image, "PNG", transparency=transparency)


def rotated(orientation):
    """Stored so that a viewer who heeds the EXIF orientation shows PICTURE."""
    methods = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(PICTURE).transpose(Image.Transpose[methods[orientation]]), "JPEG", quality=95, exif=exif)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colours, rows):
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


SIXTEEN = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in PICTURE)
GREY = PICTURE[..., 0].astype(np.uint16) * 256 + 255

READABLE = {
    "cmyk.jpg": (encoded(Image.fromarray(PICTURE).convert("CMYK"), "JPEG", quality=95), PICTURE),
    "cmyk.tif": (encoded(Image.fromarray(PICTURE).convert("CMYK"), "TIFF"), PICTURE),
    "sixteen_colours.png": (png(48, 32, 16, 2, SIXTEEN), PICTURE),
    "sixteen_grey.png": (encoded(Image.fromarray(GREY), "PNG"), PICTURE[..., :1].repeat(3, axis=2)),
    "sixteen_grey.tif": (encoded(Image.fromarray(GREY), "TIFF"), PICTURE[..., :1].repeat(3, axis=2)),
    "palette_one.png": (palette(2), PICTURE),
    "palette_many.png": (palette(bytes([255, 0, 128, 3])), PICTURE),
    "alpha.png": (encoded(Image.fromarray(np.dstack([PICTURE, PICTURE[..., 0]])), "PNG"), PICTURE),
    "animated.gif": (
        encoded(Image.fromarray(PICTURE), "GIF", save_all=True, append_images=[Image.fromarray(255 - PICTURE)] * 3),
        PICTURE,
    ),
    "a_png_named.jpg": (encoded(Image.fromarray(PICTURE), "PNG"), PICTURE),
    **{f"turned_{orientation}.jpg": (rotated(orientation), PICTURE) for orientation in range(2, 9)},
}
GOOD = encoded(Image.fromarray(PICTURE), "JPEG", quality=95)


@pytest.fixture
def folder(tmp_path):
    """Images of which 0.jpg is good; the table lies beside them."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(GOOD)
    return tmp_path


def prepared(folder, text, name="captions.tsv", **options):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    options = {"image_root": folder / "images", "max_bad_share": 0.99} | options
    return prepare(folder / name, folder / "out", **options)


def listed(folder):
    rows = (json.loads(line) for line in (folder / "out" / "bad_rows.jsonl").read_text().splitlines())
    return {row["row"]: (row["filepath"], row["reason"]) for row in rows}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
def test_what_can_be_read_has_the_right_pixels(folder):
    for name, (data, _) in READABLE.items():
        (folder / "images" / name).write_bytes(data)
    found = prepared(folder, "filepath\ttitle\n" + "".join(f"{name}\tcaption\n" for name in READABLE), max_bad_share=0)
    for index, (name, (_, expected)) in enumerate(READABLE.items()):
        image = found.image(index)
        difference = np.abs(np.asarray(image, int) - expected)
        # A JPEG mixes the colours where two meet.
        inner = difference.reshape(2, 16, 2, 24, 3)[:, 4:12, :, 4:20]
        assert image.mode == "RGB" and image.size == (48, 32) and inner.max() <= (12 if name.endswith("jpg") else 1), name


def broken_images(folder):
    """{name: (content or None, reason)} of what cannot be used."""
    (folder / "x.jpg").write_bytes(GOOD)
    (folder / "images" / "folder.jpg").mkdir()
    os.symlink("loop.jpg", folder / "images" / "loop.jpg")
    os.symlink("gone.jpg", folder / "images" / "dangling.jpg")
    return {
        "gone.jpg": (None, "No such file"),
        "dangling.jpg": (None, "No such file"),
        "empty.jpg": (b"", "cannot identify"),
        "truncated.jpg": (GOOD[:-40], "truncated"),
        "header_alone.jpg": (GOOD[:200], "unreadable image"),
        "truncated.png": (READABLE["sixteen_colours.png"][0][:90], "unreadable image"),
        "text.jpg": (b"<html>404</html>", "cannot identify"),
        "page.jpg": (b"%PDF-1.4\n", "cannot identify"),
        "bomb.png": (png(30_000, 30_000, 1, 0, bytes((30_000 // 8 + 1) * 30_000)), "decompression bomb"),
        "folder.jpg": (None, "Is a directory"),
        "loop.jpg": (None, "symbolic links"),
        "../x.jpg": (None, "outside image_root"),
        "a/../../x.jpg": (None, "outside image_root"),
        str(folder / "x.jpg"): (None, "outside image_root"),
        "nul\0.jpg": (None, "NUL"),
    }


def test_what_cannot_be_read_is_counted_and_the_rest_goes_on(folder):
    bad = broken_images(folder)
    for name, (data, _) in bad.items():
        if data is not None:
            (folder / "images" / name).write_bytes(data)
    assert (folder / "images" / "bomb.png").stat().st_size < 200_000
    found = prepared(folder, "filepath\ttitle\n0.jpg\tgood\n" + "".join(f"{name}\tbad\n" for name in bad))
    assert found.captions == ["good"] and found.bad_rows == len(bad)
    for row, (name, (_, reason)) in zip(range(3, 99), bad.items(), strict=False):
        path, why = listed(folder)[row]
        assert reason in why and path in (name, ""), (name, why)
    with pytest.raises(ValueError, match=rf"1 of {1 + len(bad)} rows .*bad_rows\.jsonl.*row 3 gone\.jpg: .* No such file"):
        prepared(folder, (folder / "captions.tsv").read_bytes(), max_bad_share=0.5)


def test_a_member_of_a_tar_never_leaves_it(folder):
    (folder / "x.jpg").write_bytes(GOOD)
    with tarfile.open(folder / "images.tar", "w") as tar:
        for name, picture in (("0.jpg", PICTURE), ("../x.jpg", 255 - PICTURE), ("/y.jpg", PICTURE)):
            member = tarfile.TarInfo(name)
            data = encoded(Image.fromarray(picture), "PNG")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "../x.jpg"
        tar.addfile(link)
    before = sorted(path.name for path in folder.iterdir())
    text = "filepath\ttitle\n0.jpg\ta\n../x.jpg\tb\nlink.jpg\tc\n../images/0.jpg\td\n"
    found = prepared(folder, text, image_root=folder / "images.tar")
    # The member of that name, not the file beside the tar.
    assert found.captions == ["a", "b"] and np.array_equal(np.asarray(found.image(1)), 255 - PICTURE)
    assert {row for row in listed(folder)} == {4, 5}
    assert sorted(path.name for path in folder.iterdir()) == sorted([*before, "captions.tsv", "out"])


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("t.tsv", "filepath,title\n0.jpg,a\n", "t.tsv has no column 'filepath'; the nearest valid name is 'filepath,title'"),
        ("t.csv", "filepath\ttitle\n0.jpg\ta\n", "t.csv has no column 'filepath'; the nearest valid name is 'filepath\\\\ttitle'"),
        ("t.tsv", "filepath\n0.jpg\n", "t.tsv has no column 'title'"),
        ("t.tsv", "", "t.tsv does not begin with column names in UTF-8: write them"),
        ("t.csv", "\n\n", "t.csv does not begin with column names in UTF-8: write them"),
        ("t.tsv", "filepath\ttitle\n0.jpg\ta\n".encode("utf-16"), "t.tsv does not begin with column names in UTF-8"),
        ("t.tsv", "filepath\ttitle\n", "0 of 0 rows of .*t.tsv are usable"),
        ("t.csv", 'filepath,title\n0.jpg,"never closed\n0.jpg,b\n', r"t.csv, line 3: .* Close its quotation marks"),
        ("t.csv", 'filepath,title\n0.jpg,"closed" too early\n0.jpg,b\n', r"t.csv, line 2: .* Close its quotation marks"),
        ("t.parquet", b"", "t.parquet.*file size is 0"),
        ("t.parquet", b"PAR1 and nothing", "t.parquet.*corrupted"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_by_name(name, text, message, folder):
    with pytest.raises(ValueError, match=message):
        prepared(folder, text, name)
    assert not (folder / "out" / "pairs.json").exists()


MEGABYTE = "word " * 200_000


@pytest.mark.parametrize(
    "name, text, captions, bad",
    [
        ("t.tsv", "filepath\ttitle\r\n0.jpg\ta\r\n0.jpg\tb\r\n", ["a", "b"], {}),
        ("t.tsv", "\ufefffilepath\ttitle\n0.jpg\ta\n", ["a"], {}),
        ("t.tsv", "filepath\ttitle\n0.jpg\ta\n0.jpg\ta\n0.jpg\ta\n", ["a", "a", "a"], {}),
        ("t.tsv", f"filepath\ttitle\n0.jpg\t{MEGABYTE}\n0.jpg\tb\n", [MEGABYTE, "b"], {}),
        ("t.csv", f'filepath,title\n0.jpg,"{MEGABYTE}"\n0.jpg,b\n', [MEGABYTE, "b"], {}),
        ("t.tsv", "filepath\ttitle\n0.jpg\t👩‍👩‍👧 🏳️‍🌈\n0.jpg\tקורא עברית ثم عربية\n", ["👩‍👩‍👧 🏳️‍🌈", "קורא עברית ثم عربية"], {}),
        ("t.tsv", b"filepath\ttitle\n0.jpg\ta\n0.jpg\tcaf\xe9\n0.jpg\tc\n", ["a", "c"], {3: "not UTF-8"}),
        ("t.csv", b"filepath,title\n0.jpg,a\n0\xff.jpg,b\n0.jpg,c\n", ["a", "c"], {3: "not UTF-8"}),
    ],
)
def test_what_can_be_read_of_a_table_is_and_the_rest_is_listed(name, text, captions, bad, folder):
    found = prepared(folder, text, name)
    assert found.captions == captions
    reasons = {row: why for row, (_, why) in listed(folder).items()}
    assert reasons.keys() == bad.keys() and all(bad[row] in why for row, why in reasons.items())


def test_a_nul_byte_is_listed_or_its_table_refused_by_line(folder):
    try:
        assert prepared(folder, "filepath\ttitle\n0.jpg\ta\n0.jpg\tb\0\n").captions == ["a"]
        assert "NUL" in listed(folder)[3][1]
    except ValueError as error:  # by csv of Python 3.10
        assert "captions.tsv, line 3" in str(error) and "NUL" in str(error)


def test_a_caption_of_a_megabyte_fills_the_context_and_no_more(folder):
    import open_clip

    found = prepared(folder, f"filepath\ttitle\n0.jpg\t{MEGABYTE}\n")
    assert open_clip.SimpleTokenizer(context_length=16)(found.captions).shape == (1, 16)


class Table(list):
    source, fingerprint = "captions.tsv", "3fa9c0ffee00"


@pytest.mark.parametrize(
    "features, shown",
    [
        (np.ones((6, 4), np.float64), "float64"),
        (np.ones((6, 4), np.int64), "int64"),
        (np.ones((6, 4), ">f4"), ">f4"),
        (np.ones((6, 4), bool), "bool"),
        (np.full((6, 4), "1.0"), "<U3"),
        (np.ones((6, 4), np.complex64), "complex64"),
        (np.ones(6, np.float32), r"\(6,\)"),
        (np.ones((6, 2, 2), np.float32), r"\(6, 2, 2\)"),
        (np.ones((6, 2), [("a", "f4")]), "'a'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_teacher_features_of_another_type_are_refused_naming_it(features, shown, tmp_path):
    path = tmp_path / "teacher.npy"
    np.save(path, features)
    path.with_suffix(".json").write_text(json.dumps({"fingerprint": Table.fingerprint, "table": Table.source}))
    with pytest.raises(ValueError, match=f"teacher.npy are .*{shown}.*, not float32 .* Run 02_extract_teacher again"):
        teachers.load(path, Table(range(6)))
