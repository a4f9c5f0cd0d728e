"""Image-text pairs: a training table and its images, checked once and then held in Arrow."""

import csv
import hashlib
import json
import logging
import shutil
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image, ImageOps
from tqdm.contrib.concurrent import thread_map

from protoclip_lab.config import nearest_name

# Columns of the prepared table; the source table's other columns stay beside them.
OWN = ("filepath", "title", "_row", "_image", "_offset", "_size")
BAD_ROWS = "bad_rows.jsonl"
NO_PLACE = (-1, -1)  # offset and size of an image that is a file of its own

log = logging.getLogger(__name__)


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
        from datasets import load_from_disk

        self.folder = Path(folder)
        self.about = about = json.loads((self.folder / "pairs.json").read_text())
        self.fingerprint, self.source, self.bad_rows = about["fingerprint"], about["source"], about["bad_rows"]
        self.root = Path(about["files"][0])
        self._table = load_from_disk(str(self.folder / "table")).data.table.combine_chunks()

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return self.image(index), self.caption(index)

    def column(self, name: str) -> list:
        """All values of a column."""
        if name not in self._table.column_names:
            raise KeyError(f"{self.source} has no column {name!r}; the nearest is {nearest_name(name, self._table.column_names)!r}")
        return self._table[name].to_pylist()

    @property
    def captions(self) -> list[str]:
        """All captions, in order."""
        return self.column("title")

    @property
    def image_ids(self) -> np.ndarray:
        return self._table["_image"].to_numpy()

    def caption(self, index: int) -> str:
        """The caption of one row."""
        return self._table["title"][int(index)].as_py()

    def image(self, index: int) -> Image.Image:
        """The image of one row, RGB."""
        filepath, row, *place = (self._table[name][int(index)].as_py() for name in ("filepath", "_row", "_offset", "_size"))
        try:
            return read_image(self.root, filepath, place)
        except Exception as error:  # a decoder may raise anything on a broken file
            now = f"was readable when prepared, is not now: {error}. Bring it back, or run 01_prepare_data again."
            raise OSError(f"{filepath} ({self.source}, row {row}) {now}") from error


def read_image(root: Path, name: str, place: Sequence[int] = NO_PLACE) -> Image.Image:
    """The RGB image ``name`` of a folder, or at ``place`` (offset and size) of a tar; any Exception if it is broken."""
    offset, size = place
    # Opened for each image: a descriptor kept open could not be shared with worker processes.
    with open(root / name if size < 0 else root, "rb") as file:
        file.seek(max(offset, 0))
        return decode(file.read(size))


def decode(data: bytes) -> Image.Image:
    """Image bytes to RGB, upright; any Exception for what is not a whole image of sane size."""
    image = Image.open(BytesIO(data))
    # Pillow only warns up to twice its own limit.
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"decompression bomb: {image.width} x {image.height} pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16-bit grey: convert("RGB") would clip everything above 255 to white.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image.convert("RGB")


def index_tar(path: str | Path) -> dict[str, tuple[int, int]]:
    """Offset and size of each regular member of an uncompressed tar, by name: one scan, nothing extracted."""
    with tarfile.open(path, "r:") as tar:
        return {member.name.removeprefix("./"): (member.offset_data, member.size) for member in tar if member.isreg()}


def read_table(path: Path) -> tuple[pa.Table, list[dict]]:
    """A TSV, CSV or Parquet table, all columns as text.

    TSV knows no quoting: a caption may begin with a quotation mark. CSV quotes with ``"``. No word is a
    missing value: the caption "None" stays.

    Returns:
        The table, with the 1-based line (Parquet: row) of each of its rows as "_row"; rows with the wrong number of
        fields, as bad-row records.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        table = parquet.read_table(path)
        columns = {name: table[name].cast(pa.string()) for name in table.column_names}
        return pa.table({**columns, "_row": np.arange(1, table.num_rows + 1)}), []
    if suffix not in (".tsv", ".csv", ".txt"):
        raise ValueError(f"{path} is not a table: expected .tsv, .csv or .parquet, or a folder of 01_prepare_data")
    dialect = {} if suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, **dialect)
        header = [*next(reader, []), "_row"]
        rows = [(*fields, reader.line_num) for fields in reader if fields]
    good = [row for row in rows if len(row) == len(header)]
    odd = [row for row in rows if len(row) != len(header)]
    columns = {name: [row[index] for row in good] for index, name in enumerate(header)}
    bad = [{"row": row[-1], "filepath": "", "reason": f"{len(row) - 1} fields, {len(header) - 1} expected"} for row in odd]
    return pa.table(columns, schema=pa.schema(dict.fromkeys(header, pa.string()) | {"_row": pa.int64()})), bad


def prepare(
    table: str | Path,
    out: str | Path,
    *,
    image_root: str | Path = "",
    image_column: str = "filepath",
    caption_column: str = "title",
    where: Mapping[str, Any] | None = None,
    dataset_size: int | None = None,
    max_bad_share: float = 0.05,
    progress: bool = True,
) -> Pairs:
    """Check a training table and its images and hold the usable pairs in Arrow.

    Rows with a missing, truncated or oversized file, with something that is no image, with a path outside
    ``image_root``, without a caption or with the wrong number of fields are listed in ``bad_rows.jsonl`` and
    left out. Every distinct image is decoded once.

    Args:
        table: TSV, CSV or Parquet file, or a folder made by this function (then returned as it is).
        out: folder to write; one that is there and was made from the same table with the same arguments is reused.
        image_root: folder or ``.tar`` of the images; empty takes the table's folder.
        where: column to value (or list of values); other rows are left out before anything is counted.
        dataset_size: keep the first so many usable pairs.
        max_bad_share: share of bad rows above which :class:`BadRows` is raised.

    Raises:
        ValueError: a column or value of ``where`` that is not there, a ``split`` column without ``where``, no row left.
        BadRows: too many rows are bad; the message shows the first.
    """
    table, out, where = Path(table), Path(out), dict(where or {})
    if (table / "pairs.json").exists():
        made = Pairs(table)
        for name, asked in (("where", where), ("dataset_size", dataset_size)):
            if asked and asked != made.about[name]:
                raise ValueError(f"{table} is prepared already, {name} = {made.about[name]}, not {asked}: name the table it came from")
        return made
    if not table.is_file():
        raise FileNotFoundError(f"{table.absolute()} is neither a table nor a folder that 01_prepare_data has finished")
    root = Path(image_root) if image_root else table.parent
    if not root.exists():
        raise FileNotFoundError(f"image_root {root.absolute()} does not exist")
    stat = [[str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns] for p in (table, root)]
    arguments = [stat, image_column, caption_column, where, dataset_size, max_bad_share]
    key = hashlib.sha256(json.dumps(arguments, sort_keys=True, default=str).encode()).hexdigest()
    if (out / "pairs.json").exists() and Pairs(out).about["key"] == key:
        return Pairs(out)

    rows, bad = read_table(table)
    for column in (image_column, caption_column, *where):
        if column not in rows.column_names:
            near, names = nearest_name(column, rows.column_names), rows.column_names[:-1]
            raise ValueError(f"{table} has no column {column!r} (it has {names}); the nearest is {near!r}")
    rows = _select(rows, where, table)
    total = len(rows) + len(bad)
    paths, captions = (rows.column(name).fill_null("").to_pylist() for name in (image_column, caption_column))
    places, failures = _check_images(list(dict.fromkeys(paths)), root, progress)
    reasons = [failures[p] or ("" if c.strip() else "empty caption") for p, c in zip(paths, captions, strict=True)]
    judged = zip(rows["_row"].to_pylist(), paths, reasons, strict=True)
    bad += [{"row": line, "filepath": path, "reason": reason} for line, path, reason in judged if reason]
    bad.sort(key=lambda row: row["row"])
    listed = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad)
    out.parent.mkdir(parents=True, exist_ok=True)
    if len(bad) > max_bad_share * total:
        report = out.with_name(out.name + "_" + BAD_ROWS)
        report.write_text(listed, encoding="utf-8")
        first = "; ".join(f"row {r['row']} {r['filepath']}: {r['reason']}" for r in bad[:5])
        found = f"{len(bad)} of {total} rows of {table} are unusable, more than max_bad_share = {max_bad_share:.1%}"
        raise BadRows(f"{found}: {first}. All of them: {report}")
    if bad:
        log.warning("%d of %d rows of %s left out, see %s", len(bad), total, table, out / BAD_ROWS)
    rows = rows.filter(pa.array([not reason for reason in reasons], pa.bool_())).slice(0, dataset_size)
    if not len(rows):
        raise ValueError(f"{table} has no usable pair{f' where {where}' if where else ''}")
    paths, captions = (rows[name].to_pylist() for name in (image_column, caption_column))
    offsets, sizes = zip(*(places.get(path, NO_PLACE) for path in paths), strict=True)
    images = pa.array(paths).dictionary_encode().indices.cast(pa.int64())
    columns = dict(zip(OWN, (paths, captions, rows["_row"], images, offsets, sizes), strict=True))
    columns |= {n: rows[n] for n in rows.column_names if n not in (*OWN, image_column, caption_column)}
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()  # of the library's own: one line for a write of seconds
    staging = out.with_name(out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    Dataset(pa.table(columns)).save_to_disk(str(staging / "table"))
    (staging / BAD_ROWS).write_text(listed, encoding="utf-8")
    about = {"key": key, "source": str(table), "fingerprint": fingerprint(paths, captions), "bad_rows": len(bad)}
    about |= {"where": where, "dataset_size": dataset_size, "files": [str(root.absolute())]}
    (staging / "pairs.json").write_text(json.dumps(about, indent=2, default=str))
    shutil.rmtree(out, ignore_errors=True)
    staging.replace(out)
    return Pairs(out)


def fingerprint(paths: Iterable[str], captions: Iterable[str]) -> str:
    """SHA-256 over the (path, caption) rows in order."""
    digest = hashlib.sha256()
    for path, caption in zip(paths, captions, strict=True):
        # Lengths keep two rows from reading as one: neither text may hold the other's border.
        digest.update(f"{len(path)} {len(caption)} {path}{caption}".encode())
    return digest.hexdigest()


def _select(rows: pa.Table, where: Mapping[str, Any], name: Path) -> pa.Table:
    if not where and "split" in rows.column_names:
        found = rows["split"].unique().to_pylist()
        raise ValueError(f"{name} has a column 'split' with {found}: say which, e.g. where={{'split': {found[:1]}}}")
    for column, wanted in where.items():
        values = [str(v) for v in (wanted if isinstance(wanted, list | tuple) else [wanted])]
        found = rows[column].unique().to_pylist()[:10]
        rows = rows.filter(pa.array([value in values for value in rows[column].to_pylist()], pa.bool_()))
        if not len(rows):
            raise ValueError(f"no row of {name} has {column} = {wanted!r}; values there: {found}")
    return rows


def _check_images(paths: list[str], root: Path, progress: bool) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """The members of a tar by name, and why each of the distinct paths is unusable, or ""."""
    root = root.resolve()
    is_tar = root.is_file()
    members = index_tar(root) if is_tar else {}

    def check(path: str) -> str:
        try:
            if is_tar and path not in members:
                return "missing from the tar"
            if not is_tar and not (path and (root / path).resolve().is_relative_to(root)):
                return "path is empty or outside image_root"
            read_image(root, path, members.get(path, NO_PLACE))
        except FileNotFoundError:
            return "missing file"
        except Exception as error:  # a decoder may raise anything on a broken file
            return f"unreadable image: {type(error).__name__}: {error}"
        return ""

    # Pillow decodes outside the interpreter lock, so threads are enough.
    reasons = thread_map(check, paths, desc="checking images", disable=not progress, mininterval=2, unit="image")
    return members, dict(zip(paths, reasons, strict=True))
