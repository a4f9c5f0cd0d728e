"""Image-text pairs: a table, shards, a data set of the hub or a stream of these, checked and held in Arrow, images at hand."""

import csv
import hashlib
import json
import logging
import mmap
import os
import re
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet
from PIL import Image, ImageOps
from tqdm.contrib.concurrent import thread_map

from protoclip_lab.config import TrainConfig, require, require_known
from protoclip_lab.randomness import numpy_generator
from protoclip_lab.storage import reading, write_json, write_text, writing

BAD_ROWS = "bad_rows.jsonl"
IMAGES = "images"  # of pairs that came with their images, one after the other
HUB = "hf://datasets/"
SPLIT = r"(?<![a-z])(train|test|validation|valid|val|dev)(?![a-z])"  # as data sets name their files
NO_PLACE = ""  # of an image that is a file of its own; else "file/offset/size", the file below the root
NOTHING = pa.table({name: pa.array([], "int64" if name == "_row" else "string") for name in ("filepath", "title", "_row", "_at")})
Position = tuple[int, int, int]  # passes done, shards done in this one, samples done in the next shard


class Pairs(Sequence):
    """Prepared pairs, memory-mapped from Arrow files: worker processes share the pages, none copies the table.

    ``pairs[i]`` is ``(PIL image, caption)``. Made by :func:`prepare`, opened again by ``Pairs(folder)``.

    Attributes:
        about: what ``pairs.json`` says.
        folder: where it lies, with ``pairs.json`` (source, fingerprint, counts) and ``bad_rows.jsonl``.
        fingerprint: SHA-256 over (file path, caption) of the rows in order; teacher features are tied to it.
        source: the table it was made from.
        whole: the table with all its columns, pyarrow.
        image_ids: (N,) int64, number of the distinct image of each row.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        with reading(self.folder, "Of another version, perhaps. Run 01_prepare_data again"):
            self.about = about = json.loads((self.folder / "pairs.json").read_text())
            self.fingerprint, self.source, self.bad_rows = about["fingerprint"], about["source"], about["bad_rows"]
            self.root = self.folder / about["root"]  # that root, or the folder itself
            self.whole = datasets.load_from_disk(str(self.folder / "table")).data.table
            # In one piece, which is in this process's memory, what is asked for row by row; other columns stay in the files.
            self._table = self.whole.select(["filepath", "title", "_image", "_at"]).combine_chunks()
            self.image_ids = self._table["_image"].to_numpy()

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return self.image(index), self.caption(index)

    def column(self, name: str) -> list:
        """All values of a column; ValueError if there is none of this name."""
        return _column(self.whole, name, self.source).to_pylist()

    @property
    def captions(self) -> list[str]:
        """All captions, in order."""
        return self.column("title")

    def caption(self, index: int) -> str:
        """The caption of one row."""
        return self._table["title"][int(index)].as_py()

    def image(self, index: int, at_least: int = 0) -> Image.Image:
        """The image of one row, as :func:`read_image` gives it."""
        return read_image(self.root, tuple(self._table[name][int(index)].as_py() for name in ("filepath", "_at")), at_least)


def read_image(root: Path, image: tuple[str, str], at_least: int = 0) -> Image.Image:
    """The image of this name at this place: RGB, upright.

    Args:
        root: folder or tar.
        image: name, and place or NO_PLACE.
        at_least: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where this leaves both sides so many pixels; 0 in full.

    Raises:
        OSError: it is missing or broken, or so large that Pillow takes it for a decompression bomb.
    """
    name, place = image
    tar, offset, size = place.rsplit("/", 2) if place else (name, 0, -1)
    try:
        inside = place or Path(os.path.abspath(root / name)).is_relative_to(os.path.abspath(root))
        require(inside, "it lies outside image_root (which may be /)")
        # Opened for each image: a descriptor kept open could not be shared with worker processes.
        with open(root / tar, "rb") as file:
            file.seek(int(offset))
            image = Image.open(BytesIO(file.read(int(size))))
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


def index_tar(path: str | Path, below: str = "") -> dict[str, str]:
    """Where each regular member of an uncompressed tar is, by name: one scan, nothing extracted.

    Args:
        below: the tar's name below the root of the images; empty where the tar is the root.

    Returns:
        "below/offset/size".

    Raises:
        ValueError: it is compressed, cut short or no tar.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            return {m.name.removeprefix("./"): f"{below}/{m.offset_data}/{m.size}" for m in tar if m.isreg()}
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
        columns = {name: table[name].cast(pa.string()) for name in table.column_names if not pa.types.is_nested(table[name].type)}
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


class Shards:
    """Samples that come with their images, shard by shard.

    Args:
        source: a folder of WebDataset tars as img2dataset writes them (members of one name up to its first dot are one
            sample); a Parquet file with images in it, or a folder of such, which may lie on the Hugging Face hub:
            ``hf://datasets/NAME`` or a folder in it.
        columns: of image paths and captions. In tars "filepath", "title" (a sample's ``.txt``), or a field of its ``.json``;
            in Parquet the column of the images themselves, and one of captions or of lists of them, a sample each.
        where: column to value (or list of values); other samples are passed over. "split" is a column, or else what
            files are named after.
        seed: shards come in another order in each pass; None leaves them in theirs.

    Attributes:
        files: what there is of these; empty where the source is nothing of the kind.
    """

    def __init__(self, source: str, columns: Sequence[str], where: Mapping[str, object], seed: int | None = None) -> None:
        path, self.seed = Path(source), seed
        self.tars = sorted(path.glob("*.tar"))
        self.files = self.tars or sorted(path.rglob("*.parquet")) or [path] * (source.startswith(HUB) or _holds(path, columns[0]))
        self.where = {name: [*map(str, wanted if isinstance(wanted, list | tuple) else [wanted])] for name, wanted in where.items()}
        # Images in tars are read where they lie, others are copied.
        root = str(path.absolute()) if self.tars else ""
        self.about = {"source": source, "root": root, "columns": columns, "where": where}
        self.system, self.place = fsspec.core.url_to_fs(source)

    @cached_property
    def parquets(self) -> list[tuple[str, str]]:
        """Paths of files, and the split that each is named after."""
        files = [file for file in self.system.find(self.place) if file.endswith(".parquet")]
        named = ["".join(re.findall(SPLIT, file.removeprefix(self.place).lower())[-1:]) for file in files]
        wanted = {*named} if len({*named}) == 1 else {*named}.intersection(self.where.get("split", ()))
        require(wanted, f"{self.about['source']} has Parquet files of 'split' {sorted({*named})}: say which, where={{'split': ...}}")
        return [each for each in zip(files, named, strict=True) if each[1] in wanted]

    def __len__(self) -> int:
        return len(self.tars or self.parquets)

    def seek(self, position: Position) -> None:
        """Go to a place, from where one pass can be read at most."""
        self.position, self._reading = position, self._walk(*position)

    def take(self, most: int, folder: Path) -> tuple[pa.Table, list[tuple[int, str, str]], Position]:
        """The next samples that fit ``where``, at most so many; none at the end.

        Args:
            folder: where images go that are not in tars, to the end of a file.

        Returns:
            A table of texts: "filepath", "title", a column for each field of ``.json``, "_row" (in its shard) and "_at", the
            image's place; what cannot be read: row, path, reason; the position after them.
        """
        rows, bad, places, image = [], [], {}, self.about["columns"][0]
        for position, fields, fault in self._reading:
            self.position = position
            if fault:
                bad.append((position[-1], fields["filepath"], fault))
            elif all(fields.get(name) in values for name, values in self.where.items()):
                if not self.tars:
                    fields["_at"] = places[fields[image]] = places.get(fields[image]) or _append(folder / IMAGES, fields["_at"])
                rows.append(fields | {"_row": position[-1]})
            if len(rows) == most:
                break
        names = dict.fromkeys(name for fields in rows for name in fields)
        table = pa.table({name: [fields.get(name) for fields in rows] for name in names})
        return pa.concat_tables([NOTHING, table], promote_options="default"), bad, self.position

    def _walk(self, past: int, shard: int, row: int) -> Iterator[tuple[Position, dict[str, Any], str]]:
        limit = past + 1 + (shard > 0 or row > 0)
        while past < limit:
            order = range(len(self)) if self.seed is None else numpy_generator(self.seed, "pass", past).permutation(len(self))
            samples = _members(self.tars[order[shard]]) if self.tars else self._copied(int(order[shard]))
            for number, sample in enumerate(islice(samples, row, None), row + 1):
                yield (past, shard, number), *sample
            past, shard, row = past + (shard + 1) // len(self), (shard + 1) % len(self), 0

    def _copied(self, shard: int) -> Iterator[tuple[dict[str, Any], str]]:
        (image, caption), (name, split) = self.about["columns"], self.parquets[shard]
        with self.system.open(name) as file:
            whole = parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
            for column in (image, caption):
                require_known(column, whole.schema_arrow.names, f"{name} has no column {column!r}")
            # Other pictures are not even read.
            read = [c.name for c in whole.schema_arrow if c.name in (image, caption) or not re.search("binary|struct", str(c.type))]
            batches = whole.iter_batches(64, columns=read, use_threads=False)
            for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
                found, captions = row[image], row[caption]
                data = (found["bytes"] if isinstance(found, dict) else found) or b""
                require(isinstance(data, bytes), f"column {image!r} of {name} holds no images")
                fields = {"split": split} if "split" in self.where else {}
                fields |= {key: None if value is None else str(value) for key, value in row.items() if key != image}
                fields |= {image: f"{name.removeprefix(self.place)}/{number}".strip("/"), "_at": data}
                for text in (captions or [None]) if isinstance(captions, list) else [captions]:
                    yield fields | {caption: "" if text is None else str(text)}, ""


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
        table: TSV, CSV or Parquet file of paths and captions; what :class:`Shards` takes, whose images are read where they
            lie in tars and else copied once, still compressed; or a folder made by this function (then returned as it is).
        out: folder to write; one that is there and was made from the same table with the same arguments is reused.
        image_root: folder or ``.tar`` of the images; empty takes the table's folder.
        where: column to value (or list of values); other rows are left out before anything is counted.
        dataset_size: keep the first so many usable pairs.
        max_bad_share: share of bad rows above which it is an error.

    Raises:
        FileNotFoundError: no table, or no image root.
        ValueError: a column or value of ``where`` that is not there, a ``split`` column without ``where``; too many rows
            are bad, or all: the message shows the first.
    """
    path, out, where, columns = Path(table), Path(out), dict(where or {}), (image_column, caption_column)
    if (path / "pairs.json").exists():
        require(not where and not dataset_size, f"{table} is prepared already: to choose other rows, name the table it came from")
        return Pairs(path)
    shards = Shards(str(table), columns, where)
    if not shards.files and (path.suffix.lower() not in (".tsv", ".csv", ".txt", ".parquet") or not path.is_file()):
        raise FileNotFoundError(f"{path.absolute()} is no table (.tsv, .csv, .parquet), hf://datasets/NAME or folder of shards")
    root = Path(image_root or path.parent).absolute()
    if not shards.files and not root.exists():
        raise FileNotFoundError(f"there is no image_root {root}: name the folder or tar that the paths in {table} start from")
    about = shards.about if shards.files else {"source": str(table), "root": str(root), "columns": columns, "where": where}
    changed = [file.stat().st_mtime_ns for file in shards.files or (path, root) if file.exists()]
    about |= {"rows": [dataset_size, max_bad_share], "start": (0, 0, 0), "changed": changed, "form": 3}
    about = json.loads(json.dumps(about, default=str))  # to compare
    if (out / "pairs.json").exists() and about.items() <= json.loads((out / "pairs.json").read_text()).items():
        return Pairs(out)
    if shards.files:
        shards.seek(about["start"])
        return hold(out, about, shards.take)

    rows, unread = read_table(path)
    there = {column: _column(rows, column, table).unique().to_pylist()[:10] for column in where}
    for column, wanted in where.items():
        values = [*map(str, wanted if isinstance(wanted, list | tuple) else [wanted])]
        rows = rows.filter(pc.is_in(rows[column], pa.array(values)))
    require(len(rows) or not where, f"no row of {table} has {where}; values there: {there}")
    places = index_tar(root) if root.is_file() else {}
    found = [places.get(name, NO_PLACE) for name in _column(rows, image_column, table).to_pylist()]
    rows = rows.append_column("_at", pa.array(found, pa.string()))
    whole = iter([(rows, unread, None)])
    return hold(out, about, lambda most, _: next(whole, (NOTHING, [], None)))


def hold(out: Path, about: dict[str, Any], take: Callable[[int, Path], tuple[pa.Table, list, Any]]) -> Pairs:
    """Check samples of a source and hold the usable ones in Arrow.

    Args:
        out: folder to write; what is there goes.
        about: for ``pairs.json``: "source"; "root" of the images, as seen from ``out``; "columns" of image paths and captions;
            "where"; "rows", how many to hold (None: all) and the share that may be bad; whatever else is to be known. To
            this comes "next", the position after them.
        take: gives the next so many, as `Shards` does; nothing at the end.
    """
    source, root, columns, where, (most, share) = about["source"], out / about["root"], about["columns"], about["where"], about["rows"]
    remove(out)
    out.mkdir(parents=True)
    kept, bad, missing = [], [], most or 2**62
    while missing > 0:
        rows, unread, position = take(min(missing, 2**14), out)  # so that what is read before it is checked stays small
        if not len(rows) and not unread:
            break
        splits = rows["split"].unique().to_pylist() if "split" in rows.column_names else []
        require(where or not splits, f"{source} has 'split' with {splits}: say which, e.g. where={{'split': 'train'}}")
        paths, captions = (_column(rows, name, source).fill_null("").to_pylist() for name in columns)
        images = dict(zip(paths, rows["_at"].to_pylist(), strict=True))
        # Pillow decodes outside the interpreter lock, so threads are enough.
        faults = thread_map(partial(_fault, root), images.items(), desc="checking images", mininterval=2, delay=2, leave=False)
        faults = dict(zip(images, faults, strict=True))
        reasons = [faults[p] or ("" if c.strip() else "empty caption") for p, c in zip(paths, captions, strict=True)]
        bad += [*unread, *(entry for entry in zip(rows["_row"].to_pylist(), paths, reasons, strict=True) if entry[-1])]
        kept.append(rows.filter(pa.array([not reason for reason in reasons], pa.bool_())))
        missing -= len(kept[-1])
    kept.append(NOTHING)
    rows = pa.concat_tables(kept, promote_options="default")
    total = len(rows) + len(bad)
    listed = (json.dumps({"row": row, "filepath": path, "reason": why}, ensure_ascii=False) + "\n" for row, path, why in sorted(bad))
    write_text(out / BAD_ROWS, "".join(listed))
    said = f"{len(rows)} of {total} rows of {source} are usable, for the others see {out / BAD_ROWS}"
    first = "; ".join(f"row {row} {path}: {why}" for row, path, why in sorted(bad)[:5]) or f"none has {where}"
    require(len(bad) <= share * total and len(rows), f"{said}; max_bad_share = {share:.1%}: {first}")
    if bad:
        logging.getLogger(__name__).warning(said)
    rows = rows.slice(0, most)
    paths, captions = (rows[name].to_pylist() for name in columns)
    image_ids = pa.array(paths).dictionary_encode().indices.cast(pa.int64())
    # The table's other columns stay beside our own.
    own = {"filepath": paths, "title": captions, "_image": image_ids}
    own |= {name: rows[name] for name in rows.column_names if name not in (*own, *columns)}
    datasets.disable_progress_bars()  # of the library's own: one line for a write of seconds
    datasets.Dataset(pa.table(own)).save_to_disk(str(out / "table"))
    # Last, and at once: a folder without it is taken for unfinished and made again.
    write_json(out / "pairs.json", about | {"fingerprint": fingerprint(paths, captions), "bad_rows": len(bad), "next": position})
    return Pairs(out)


def folder_of(run: Path, number: int) -> Path:
    """Where the pairs of a streamed episode lie."""
    return run / "stream" / f"{number:06d}"


class Stream:
    """The pairs of each episode: the next ``episode_size`` usable ones of the source.

    Each pass takes the shards in another order, a function of the seed alone. The episode is the shuffle buffer: its pairs are
    learnt in an order of their own. Where a pass ends within an episode, a pair may come twice in it.

    Args:
        config: of the run.
        run: its folder; ``run/stream/NUMBER`` holds an episode, and ``run/stream/bad_rows_NUMBER.jsonl`` stays.

    Attributes:
        starts: where in the stream the present episode begins, and the next, by number: for checkpoints.

    Raises:
        ValueError: the table is nothing that :class:`Shards` takes.
    """

    def __init__(self, config: TrainConfig, run: Path) -> None:
        self.shards = Shards(config.table, (config.image_column, config.caption_column), config.where, config.seed)
        require(self.shards.files, f"{config.table} is neither shards nor a data set of the hub: stream = False reads it")
        self.run, self.about = run, self.shards.about | {"rows": [config.episode_size, config.max_bad_share]}
        self.starts = {"1": [0, 0, 0], "shards": len(self.shards)}

    def open(self, number: int) -> Pairs:
        """The pairs of an episode, fetched unless they are there; those of others go.

        Raises:
            ValueError: too many samples are bad, or a pass has fewer that are usable than an episode.
        """
        out, start = folder_of(self.run, number), self.starts[str(number)]
        require(self.starts["shards"] == len(self.shards), f"{self.about['source']} has other shards now: their order would change")
        if not (out / "pairs.json").exists() or Pairs(out).about["start"] != start:
            self.shards.seek(start)
            hold(out, self.about | {"start": start}, self.shards.take)
        for old in out.parent.iterdir():
            # The one before stays: somebody may be looking at it.
            if old.is_dir() and old not in (out, folder_of(self.run, number - 1)):
                remove(old)
        shutil.copyfile(out / BAD_ROWS, out.with_name(f"bad_rows_{out.name}.jsonl"))
        pairs = Pairs(out)
        require(len(pairs) == self.about["rows"][0], f"a pass over {pairs.source} has {len(pairs)} usable pairs: lower episode_size")
        self.starts |= {str(number): start, str(number + 1): pairs.about["next"]}
        return pairs


def remove(folder: Path) -> None:
    """Remove a folder of pairs; first what says that it is whole."""
    (folder / "pairs.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _append(file: Path, image: bytes) -> str:
    """Put an image at the end of a file; its place there."""
    with writing(file), file.open("ab") as stream:
        return f"{file.name}/{stream.tell()}/{stream.write(image)}"


def _holds(file: Path, column: str) -> bool:
    """Whether a Parquet file holds images in this column, and not their paths."""
    schema = parquet.ParquetDataset(file).schema if file.suffix.lower() == ".parquet" and file.is_file() else pa.schema([])
    binary = [field.name for field in schema if "binary" in str(field.type)]
    return bool(binary) and (column in binary or column not in schema.names)


def _members(shard: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Fields of each sample of a tar, and what is wrong with it."""
    samples: dict[str, dict] = defaultdict(dict)
    for name, place in index_tar(shard, shard.name).items():
        key = re.sub(r"\.[^/]*$", "", name)
        samples[key][name.removeprefix(f"{key}.")] = place
    with shard.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        for key, parts in samples.items():
            kind = next((kind for kind in parts if f".{kind.lower()}" in Image.registered_extensions()), "")
            fields, fault = {"title": ""}, ""
            for member in sorted(kind for kind in parts if kind in ("json", "txt") or kind.endswith("npy")):  # .txt after .json
                start, size = map(int, parts[member].split("/")[1:])
                data = whole[start : start + size]
                try:
                    if member.endswith("npy"):
                        array = np.lib.format.read_array(BytesIO(data), allow_pickle=False)
                        told = {member: array.tolist()} if array.ndim == 1 else {}
                    else:
                        text = data.decode(errors="replace")
                        told = {"title": text} if member == "txt" else json.loads(text)
                    # JSON may hold halves of surrogate pairs, which are no text.
                    fields |= {name: "" if v is None else str(v).encode(errors="replace").decode() for name, v in told.items()}
                except Exception as error:  # a broken header may raise anything
                    fault = f"unreadable .{member}: {error}"
            yield fields | {"filepath": f"{shard.name}/{key}.{kind}", "_at": parts.get(kind, NO_PLACE)}, fault


def _fault(root: Path, image: tuple[str, str]) -> str:
    """Why an image cannot be used, or ""."""
    try:
        read_image(root, image, 1)  # broken at an eighth of its size is broken
    except OSError as error:
        return f"unreadable image: {error.__cause__}"
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
