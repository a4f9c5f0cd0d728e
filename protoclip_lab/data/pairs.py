"""Image-text pairs: a training table and its images, checked once and then held in Arrow."""

import csv
import hashlib
import json
import logging
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from datasets import Dataset, disable_progress_bars, load_from_disk
from PIL import Image, ImageOps
from tqdm.contrib.concurrent import thread_map

from protoclip_lab.config import require, require_known
from protoclip_lab.storage import write_json

BAD_ROWS = "bad_rows.jsonl"
NO_PLACE = (-1, -1)  # offset and size in a tar, of an image that is a file of its own


class BadRows(ValueError):
    """More rows are unusable than the stated share allows."""


class Pairs(Sequence):
    """Prepared pairs, memory-mapped from Arrow files: worker processes share the pages, none copies the table.

    ``pairs[i]`` is ``(PIL image, caption)``. Made by :func:`prepare`, opened again by ``Pairs(folder)``.

    Attributes:
        about: what ``pairs.json`` says.
        folder: where it lies, with ``pairs.json`` (source, fingerprint, counts) and ``bad_rows.jsonl``.
        fingerprint: SHA-256 over (file path, caption) of the rows in order; teacher features are tied to it.
        source: the table it was made from.
        image_ids: (N,) int64, number of the distinct image of each row.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.about = about = json.loads((self.folder / "pairs.json").read_text())
        self.fingerprint, self.source, self.bad_rows = about["fingerprint"], about["source"], about["bad_rows"]
        self.root = Path(about["files"][0])
        self._table = load_from_disk(str(self.folder / "table")).data.table.combine_chunks()
        self.image_ids = self._table["_image"].to_numpy()

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return self.image(index), self.caption(index)

    def column(self, name: str) -> list:
        """All values of a column; ValueError if there is none of this name."""
        return _column(self._table, name, self.source).to_pylist()

    @property
    def captions(self) -> list[str]:
        """All captions, in order."""
        return self.column("title")

    def caption(self, index: int) -> str:
        """The caption of one row."""
        return self._table["title"][int(index)].as_py()

    def image(self, index: int, at_least: int = 0) -> Image.Image:
        """The image of one row, as :func:`read_image` gives it."""
        filepath, *place = (self._table[name][int(index)].as_py() for name in ("filepath", "_offset", "_size"))
        return read_image(self.root, (filepath, place), at_least)


def read_image(root: Path, image: tuple[str, Sequence[int]], at_least: int = 0) -> Image.Image:
    """The image of this name in a folder, or at this place (offset and size) of a tar: RGB, upright.

    Args:
        root: the folder or tar.
        image: name, and place or NO_PLACE.
        at_least: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where this leaves both sides so many pixels; 0 in full.

    Raises:
        OSError: it is missing or broken, or so large that Pillow takes it for a decompression bomb.
    """
    name, (offset, size) = image
    try:
        require(size >= 0 or Path(os.path.abspath(root / name)).is_relative_to(os.path.abspath(root)), "it lies outside image_root")
        # Opened for each image: a descriptor kept open could not be shared with worker processes.
        with open(root / name if size < 0 else root, "rb") as file:
            file.seek(max(offset, 0))
            image = Image.open(BytesIO(file.read(size)))
        # A square, as it is asked before the picture is set upright.
        image.draft(None, (at_least, at_least) if at_least else None)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            # 16-bit grey: convert("RGB") would clip everything above 255 to white.
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:  # a decoder may raise anything on a broken file
        remedy = "Bring it back, or take it out and run 01_prepare_data again"
        raise OSError(f"{root / name} is not a readable image: {error}. {remedy}") from error


def index_tar(path: str | Path) -> dict[str, tuple[int, int]]:
    """Offset and size of each regular member of an uncompressed tar, by name: one scan, nothing extracted.

    Raises:
        ValueError: it is compressed, cut short or no tar.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            return {member.name.removeprefix("./"): (member.offset_data, member.size) for member in tar if member.isreg()}
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a whole uncompressed tar: {error}. Make it again") from error


def read_table(path: Path) -> tuple[pa.Table, list[tuple[int, str, str]]]:
    """A TSV, CSV or Parquet table, all columns as text.

    TSV knows no quoting: a caption may begin with a quotation mark. CSV quotes with ``"``. No word is a
    missing value: the caption "None" stays.

    Returns:
        The table, with the 1-based line (Parquet: row) of each of its rows as "_row"; rows with the wrong number of
        fields or that are not UTF-8: line, no path, reason.

    Raises:
        ValueError: it has no header, or a quotation mark is never closed.
    """
    if path.suffix.lower() == ".parquet":
        table = parquet.read_table(path)
        columns = {name: table[name].cast(pa.string()) for name in table.column_names}
        return pa.table(columns | {"_row": np.arange(1, table.num_rows + 1)}), []
    dialect = {"strict": True} if path.suffix.lower() == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    csv.field_size_limit(2**31 - 1)  # of the whole process: a caption may have any length
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, **dialect)
        try:
            header = [*next(reader, []), "_row"]
            rows = [(*fields, reader.line_num) for fields in reader if fields]
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}. Close its quotation marks, or write it as .tsv") from error
    named = header[1:] and not _row_fault(header, len(header))
    require(named, f"{path} does not begin with column names in UTF-8: write them into its first line, and a row for each pair")
    wrong = [_row_fault(row, len(header)) for row in rows]
    bad = [(row[-1], "", why) for row, why in zip(rows, wrong, strict=True) if why]
    columns = {name: [row[index] for row, why in zip(rows, wrong, strict=True) if not why] for index, name in enumerate(header)}
    return pa.table(columns, schema=pa.schema(dict.fromkeys(header, pa.string()) | {"_row": pa.int64()})), bad


def prepare(
    table: str | Path,
    out: str | Path,
    *,
    image_root: str | Path = "",
    image_column: str = "filepath",
    caption_column: str = "title",
    where: Mapping[str, object] | None = None,
    dataset_size: int | None = None,
    max_bad_share: float = 0.05,
) -> Pairs:
    """Check a training table and its images and hold the usable pairs in Arrow.

    Rows with a missing, truncated or oversized file, with something that is no image, without a caption or with the
    wrong number of fields are listed in ``bad_rows.jsonl`` and left out. Every distinct image is decoded once.

    Args:
        table: TSV, CSV or Parquet file, or a folder made by this function (then returned as it is).
        out: folder to write; one that is there and was made from the same table with the same arguments is reused.
        image_root: folder or ``.tar`` of the images; empty takes the table's folder.
        where: column to value (or list of values); other rows are left out before anything is counted.
        dataset_size: keep the first so many usable pairs.
        max_bad_share: share of bad rows above which :class:`BadRows` is raised.

    Raises:
        FileNotFoundError: no table, or no image root.
        ValueError: a column or value of ``where`` that is not there, a ``split`` column without ``where``.
        BadRows: too many rows are bad, or all; the message shows the first.
    """
    table, out, where = Path(table), Path(out), dict(where or {})
    if (table / "pairs.json").exists():
        made = Pairs(table)
        for name, asked in (("where", where), ("dataset_size", dataset_size)):
            if asked and asked != made.about[name]:
                raise ValueError(f"{table} is prepared already, {name} = {made.about[name]}, not {asked}: name the table it came from")
        return made
    root = Path(image_root or table.parent).absolute()
    if not table.is_file() or table.suffix.lower() not in (".tsv", ".csv", ".txt", ".parquet"):
        raise FileNotFoundError(f"{table.absolute()} is neither a table (.tsv, .csv, .parquet) nor what 01_prepare_data has finished")
    if not root.exists():
        raise FileNotFoundError(f"there is no image_root {root}: name the folder or tar that the paths in {table} start from")
    # By content, as a table may be written anew and be the same.
    about = {"source": str(table), "sha256": hashlib.sha256(table.read_bytes()).hexdigest()}
    about |= {"files": [str(root)], "changed": root.stat().st_mtime_ns, "columns": [image_column, caption_column]}
    # As JSON gives it back, to compare.
    about |= json.loads(json.dumps({"where": where, "dataset_size": dataset_size, "max_bad_share": max_bad_share}, default=str))
    if (out / "pairs.json").exists() and about.items() <= Pairs(out).about.items():
        return Pairs(out)

    rows, bad = read_table(table)
    if not where and "split" in rows.column_names:
        raise ValueError(f"{table} has 'split' with {rows['split'].unique().to_pylist()}: say which, e.g. where={{'split': 'train'}}")
    for column, wanted in where.items():
        values = [str(v) for v in (wanted if isinstance(wanted, list | tuple) else [wanted])]
        found = _column(rows, column, table).to_pylist()
        rows = rows.filter(pa.array([value in values for value in found], pa.bool_()))
        if not len(rows):
            raise ValueError(f"no row of {table} has {column} = {wanted!r}; values there: {list(dict.fromkeys(found))[:10]}")
    total = len(rows) + len(bad)
    paths, captions = (_column(rows, name, table).fill_null("").to_pylist() for name in (image_column, caption_column))
    places = index_tar(root) if root.is_file() else {}
    images = {path: places.get(path, NO_PLACE) for path in paths}
    # Pillow decodes outside the interpreter lock, so threads are enough.
    faults = dict(zip(images, thread_map(partial(_fault, root), images.items(), desc="checking images", mininterval=2), strict=True))
    reasons = [faults[p] or ("" if c.strip() else "empty caption") for p, c in zip(paths, captions, strict=True)]
    bad += [entry for entry in zip(rows["_row"].to_pylist(), paths, reasons, strict=True) if entry[-1]]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    listed = (json.dumps({"row": row, "filepath": path, "reason": why}, ensure_ascii=False) + "\n" for row, path, why in sorted(bad))
    (out / BAD_ROWS).write_text("".join(listed), "utf-8")
    if len(bad) > max_bad_share * total or len(bad) == total:
        first = "; ".join(f"row {row} {path}: {why}" for row, path, why in sorted(bad)[:5])
        usable = f"{total - len(bad)} of {total} rows of {table} are usable"
        raise BadRows(f"{usable}, max_bad_share = {max_bad_share:.1%}; the first bad ones: {first}. All: {out / BAD_ROWS}")
    if bad:
        logging.getLogger(__name__).warning("%d of %d rows of %s left out, see %s", len(bad), total, table, out / BAD_ROWS)
    rows = rows.filter(pa.array([not reason for reason in reasons], pa.bool_())).slice(0, dataset_size)
    paths, captions = (rows[name].to_pylist() for name in (image_column, caption_column))
    offsets, sizes = zip(*(images[path] for path in paths), strict=True)
    image_ids = pa.array(paths).dictionary_encode().indices.cast(pa.int64())
    columns = {"filepath": paths, "title": captions, "_row": rows["_row"], "_image": image_ids, "_offset": offsets, "_size": sizes}
    # The table's other columns stay beside our own.
    columns |= {n: rows[n] for n in rows.column_names if n not in (*columns, image_column, caption_column)}
    disable_progress_bars()  # of the library's own: one line for a write of seconds
    Dataset(pa.table(columns)).save_to_disk(str(out / "table"))
    # Last, and at once: a folder without it is taken for unfinished and made again.
    write_json(out / "pairs.json", about | {"fingerprint": fingerprint(paths, captions), "bad_rows": len(bad)})
    return Pairs(out)


def _fault(root: Path, image: tuple[str, Sequence[int]]) -> str:
    """Why an image cannot be used, or ""."""
    try:
        read_image(root, image)
    except OSError as error:
        # The latter for what lies "below" a tar.
        missing = isinstance(error.__cause__, FileNotFoundError | NotADirectoryError)
        return "missing file" if missing else f"unreadable image: {error.__cause__}"
    return ""


def _row_fault(row: Sequence, width: int) -> str:
    """Why a row of a table cannot be used, or ""."""
    if len(row) != width:
        return f"{len(row) - 1} fields, {width - 1} expected"
    # What is no UTF-8 was read as halves of surrogate pairs.
    return "not UTF-8, or a NUL byte" if re.search("[\0\ud800-\udfff]", "".join(row[:-1])) else ""


def _column(table: pa.Table, name: str, source: str | Path) -> pa.ChunkedArray:
    require_known(name, table.column_names, f"{source} has no column {name!r}")
    return table[name]


def fingerprint(paths: Iterable[str], captions: Iterable[str]) -> str:
    """SHA-256 over the (path, caption) rows in order."""
    # Lengths keep two rows from reading as one: neither text may hold the other's border.
    rows = (f"{len(path)} {len(caption)} {path}{caption}" for path, caption in zip(paths, captions, strict=True))
    return hashlib.sha256("".join(rows).encode()).hexdigest()
