"""Image-text pairs: a training table and its images, checked once and then held in Arrow."""

import hashlib
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from protoclip_lab.config import nearest_name

# Columns of the prepared table; the source table's other columns stay beside them.
OWN = ("filepath", "title", "_row", "_image", "_file", "_offset", "_size")
BAD_ROWS = "bad_rows.jsonl"


class BadRows(ValueError):
    """More rows are unusable than the stated share allows."""


class Pairs(Sequence):
    """Prepared pairs, memory-mapped from Arrow files: worker processes share the pages, none copies the table.

    ``pairs[i]`` is ``(PIL image, caption)``. Made by :func:`prepare`, opened again by ``Pairs(folder)``.

    Attributes:
        folder: where it lies, with ``pairs.json`` (source, fingerprint, counts) and ``bad_rows.jsonl``.
        fingerprint: SHA-256 over (file path, caption) of the rows in order; teacher features are tied to it.
        source: the table it was made from.
        image_ids: (N,) int64, number of the distinct image of each row.
    """

    def __init__(self, folder: str | Path) -> None:
        from datasets import load_from_disk

        self.folder = Path(folder)
        about = json.loads((self.folder / "pairs.json").read_text())
        self.fingerprint: str = about["fingerprint"]
        self.source: str = about["source"]
        self.bad_rows: int = about["bad_rows"]
        self._files: list[str] = about["files"]
        self._table = load_from_disk(str(self.folder / "table")).data.table.combine_chunks()
        self._columns = {name: self._table.column(name) for name in self._table.column_names}
        self._open: dict[str, int] = {}
        self._pid = os.getpid()

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return self.image(index), self.caption(index)

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return self._table.column_names

    def column(self, name: str) -> list:
        """All values of a column."""
        if name not in self._columns:
            raise KeyError(
                f"{self.source} has no column {name!r}; the nearest is {nearest_name(name, self._columns)!r}"
            )
        return self._columns[name].to_pylist()

    @property
    def captions(self) -> list[str]:
        """All captions, in order."""
        return self.column("title")

    @property
    def image_ids(self) -> np.ndarray:
        return self._columns["_image"].to_numpy()

    def caption(self, index: int) -> str:
        """The caption of one row."""
        return self._columns["title"][int(index)].as_py()

    def image(self, index: int) -> Image.Image:
        """The image of one row, RGB."""
        filepath, row, file, offset, size = (
            self._columns[name][int(index)].as_py() for name in ("filepath", "_row", "_file", "_offset", "_size")
        )
        path = self._files[file] if file >= 0 else os.path.join(self._files[0], filepath)
        try:
            return decode(self._read(path, offset, size))
        except (OSError, ValueError) as error:
            raise OSError(
                f"{filepath} ({self.source}, row {row}) was readable when the table was prepared and "
                f"is not now: {error}. Bring the file back, or run 01_prepare_data again."
            ) from error

    def _read(self, path: str, offset: int, size: int) -> bytes:
        if size < 0:
            return Path(path).read_bytes()
        if self._pid != os.getpid():
            # A forked worker gets its own descriptors: tar members are read by position, but closing must not be shared.
            self._open, self._pid = {}, os.getpid()
        if path not in self._open:
            self._open[path] = os.open(path, os.O_RDONLY)
        return os.pread(self._open[path], size, offset)


def decode(data: bytes) -> Image.Image:
    """Image bytes to RGB, upright; ValueError or OSError for what is not a whole image of sane size."""
    try:
        image = Image.open(BytesIO(data))
        # Pillow only warns up to twice its own limit.
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"decompression bomb: {image.width} x {image.height} pixels")
        image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"decompression bomb: {error}") from error
    except (SyntaxError, EOFError) as error:
        raise ValueError(f"broken image: {error}") from error
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16-bit grey: convert("RGB") would clip everything above 255 to white.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image.convert("RGB")


def index_tar(path: str | Path) -> dict[str, tuple[int, int]]:
    """Offset and size of each regular member of an uncompressed tar, by name: one scan, nothing extracted."""
    with tarfile.open(path, "r:") as tar:
        return {member.name.removeprefix("./"): (member.offset_data, member.size) for member in tar if member.isreg()}


def read_table(path: str | Path) -> tuple[pa.Table, np.ndarray, list[dict]]:
    """A TSV, CSV or Parquet table, all columns as text.

    TSV knows no quoting: a caption may begin with a quotation mark. CSV quotes with ``"``. No word is a
    missing value: the caption "None" stays.

    Returns:
        The table; the 1-based line (Parquet: row) of each of its rows; rows with the wrong number of fields,
        as bad-row records.
    """
    import pyarrow.csv as csv

    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet as parquet

        table = parquet.read_table(path)
        text = [c.cast(pa.string()) if not pa.types.is_string(c.type) else c for c in table.columns]
        return pa.table(dict(zip(table.column_names, text, strict=True))), np.arange(1, table.num_rows + 1), []
    if suffix not in (".tsv", ".csv", ".txt"):
        raise ValueError(f"{path} is not a table: expected .tsv, .csv or .parquet, or a folder of 01_prepare_data")
    bad: list[dict] = []

    def skip(row: csv.InvalidRow) -> str:
        bad.append(
            {
                "row": row.number,
                "filepath": "",
                "reason": f"{row.actual_columns} fields, {row.expected_columns} expected",
            }
        )
        return "skip"

    tabs = suffix != ".csv"
    parse = csv.ParseOptions(
        delimiter="\t" if tabs else ",",
        quote_char=False if tabs else '"',
        newlines_in_values=not tabs,
        invalid_row_handler=skip,
    )
    with path.open(encoding="utf-8-sig") as file:
        header = file.readline().rstrip("\r\n")
    names = [name.strip('"') for name in header.split("\t" if tabs else ",")]
    convert = csv.ConvertOptions(column_types={name: pa.string() for name in names}, strings_can_be_null=False)
    # One thread, or pyarrow does not number the rows it refuses.
    table = csv.read_csv(path, csv.ReadOptions(use_threads=False), parse, convert)
    lines = np.setdiff1d(np.arange(2, table.num_rows + len(bad) + 2), [row["row"] for row in bad])
    return table, lines, bad


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
    table, out = Path(table), Path(out)
    if (table / "pairs.json").exists():
        about = json.loads((table / "pairs.json").read_text())
        asked = {"where": dict(where or {}), "dataset_size": dataset_size}
        other = {name: about[name] for name, value in asked.items() if value and value != about[name]}
        if other:
            raise ValueError(f"{table} is prepared already, with {other}, not {asked}: name the table it was made from")
        return Pairs(table)
    if not table.is_file():
        raise FileNotFoundError(f"{table.absolute()} is neither a table nor a folder that 01_prepare_data has finished")
    root = Path(image_root) if image_root else table.parent
    if not root.exists():
        raise FileNotFoundError(f"image_root {root.absolute()} does not exist")
    stat = [[str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns] for p in (table, root)]
    arguments = [stat, image_column, caption_column, dict(where or {}), dataset_size, max_bad_share]
    key = hashlib.sha256(json.dumps(arguments, sort_keys=True, default=str).encode()).hexdigest()
    if (out / "pairs.json").exists() and json.loads((out / "pairs.json").read_text())["key"] == key:
        return Pairs(out)

    rows, lines, bad = read_table(table)
    for column in (image_column, caption_column, *(where or {})):
        if column not in rows.column_names:
            near = nearest_name(column, rows.column_names)
            raise ValueError(f"{table} has no column {column!r} (it has {rows.column_names}); the nearest is {near!r}")
    rows, lines = _select(rows, lines, where, table)
    total = len(lines) + len(bad)
    paths = rows.column(image_column).to_pylist()
    captions = rows.column(caption_column).to_pylist()
    place, failure = _check_images(paths, root, progress)
    keep = []
    for index, (path, caption) in enumerate(zip(paths, captions, strict=True)):
        reason = failure.get(path) or (None if caption and caption.strip() else "empty caption")
        if reason:
            bad.append({"row": int(lines[index]), "filepath": path, "reason": reason})
        else:
            keep.append(index)
    bad.sort(key=lambda row: row["row"])
    staging = out.with_name(out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    (staging / BAD_ROWS).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad))
    if len(bad) > max_bad_share * total:
        report = out.with_name(out.name + "_" + BAD_ROWS)
        (staging / BAD_ROWS).replace(report)
        first = "; ".join(f"row {r['row']} {r['filepath']}: {r['reason']}" for r in bad[:5])
        raise BadRows(
            f"{len(bad)} of {total} rows of {table} are unusable, more than max_bad_share = {max_bad_share:.1%}: {first}. "
            f"All of them: {report}"
        )
    if bad:
        logging.getLogger(__name__).warning(
            "%d of %d rows of %s left out, see %s", len(bad), total, table, out / BAD_ROWS
        )
    keep = keep[:dataset_size]
    if not keep:
        raise ValueError(f"{table} has no usable pair{f' where {dict(where)}' if where else ''}")
    kept_paths = [paths[i] for i in keep]
    kept_captions = [captions[i] for i in keep]
    numbers = {path: number for number, path in enumerate(dict.fromkeys(kept_paths))}
    columns = {
        "filepath": kept_paths,
        "title": kept_captions,
        "_row": lines[keep],
        "_image": np.array([numbers[path] for path in kept_paths], dtype=np.int64),
        # File 0 is the tar; images of a folder have a path each, which is not spelt out again.
        "_file": np.full(len(keep), 0 if root.is_file() else -1, dtype=np.int32),
        "_offset": np.array([place[path][0] for path in kept_paths], dtype=np.int64),
        "_size": np.array([place[path][1] for path in kept_paths], dtype=np.int64),
    }
    others = [name for name in rows.column_names if name not in (*OWN, image_column, caption_column)]
    columns |= {name: rows.column(name).take(keep) for name in others}
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()  # of the library's own: one line for a write of seconds
    Dataset(pa.table(columns)).save_to_disk(str(staging / "table"))
    about = {
        "key": key,
        "source": str(table),
        "fingerprint": fingerprint(kept_paths, kept_captions),
        "pairs": len(keep),
        "images": len(numbers),
        "bad_rows": len(bad),
        "where": dict(where or {}),
        "dataset_size": dataset_size,
        "files": [str(root.absolute())],
    }
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


def _select(
    rows: pa.Table, lines: np.ndarray, where: Mapping[str, Any] | None, name: Path
) -> tuple[pa.Table, np.ndarray]:
    import pyarrow.compute as compute

    if not where and "split" in rows.column_names:
        found = compute.unique(rows.column("split")).to_pylist()
        raise ValueError(
            f"{name} has a column 'split' with {found}: say which rows to take, e.g. where={{'split': {found[0]!r}}}"
        )
    for column, wanted in (where or {}).items():
        values = [str(v) for v in wanted] if isinstance(wanted, list | tuple) else [str(wanted)]
        mask = compute.is_in(rows.column(column), pa.array(values)).to_numpy()
        if not mask.any():
            found = compute.unique(rows.column(column)).to_pylist()[:10]
            raise ValueError(f"no row of {name} has {column} = {wanted!r}; values there: {found}")
        rows, lines = rows.filter(pa.array(mask)), lines[mask]
    return rows, lines


def _check_images(paths: list[str], root: Path, progress: bool) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Offset and size of each distinct path (-1, -1 for a file of its own), and why the others are unusable."""
    members = index_tar(root) if root.is_file() else None
    archive = os.open(root, os.O_RDONLY) if members is not None else None
    real_root = root.resolve()

    def check(path: str) -> tuple[tuple[int, int], str | None]:
        try:
            if members is not None:
                if path not in members:
                    return (-1, -1), "missing from the tar"
                offset, size = members[path]
                decode(os.pread(archive, size, offset))
                return (offset, size), None
            if not path or not (real_root / path).resolve().is_relative_to(real_root):
                return (-1, -1), "path is empty or outside image_root"
            decode((real_root / path).read_bytes())
            return (-1, -1), None
        except FileNotFoundError:
            return (-1, -1), "missing file"
        except Exception as error:  # a decoder may raise anything on a broken file
            return (-1, -1), f"unreadable image: {type(error).__name__}: {error}"

    distinct = list(dict.fromkeys(paths))
    try:
        # Pillow decodes outside the interpreter lock, so threads are enough.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            bar = tqdm(distinct, desc="checking images", disable=not progress, mininterval=2, unit="image")
            checked = list(zip(bar, pool.map(check, distinct), strict=True))
    finally:
        if archive is not None:
            os.close(archive)
    place = {path: found for path, (found, _) in checked}
    return place, {path: reason for path, (_, reason) in checked if reason}
