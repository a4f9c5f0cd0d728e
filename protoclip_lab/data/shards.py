"""Sources in shards: WebDataset tars; Parquet files with their images in them; data sets of the Hugging Face hub."""

import hashlib
import json
import mmap
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image

from protoclip_lab.config import require_known
from protoclip_lab.randomness import numpy_generator
from protoclip_lab.storage import writing

_HUB_NAME = re.compile("hf://datasets/([^/]+/[^/]+)/?(.+)?$")
IMAGES = "images"  # file of what was copied out of Parquet files and from the hub
PLACE = ("_tar", "_offset", "_size")  # columns: of an image, a file below the root, and where in it
NO_PLACE = ("", 0, -1)  # of an image that is a file of its own
Position = tuple[int, int, int]  # passes done, shards done in this one, samples done in the next shard


class Shards:
    """Samples of a source in shards; a shard is a tar, or a row group of a Parquet file.

    Args:
        source: a folder of WebDataset tars as img2dataset writes them, where members of one name up to its first dot are
            one sample; a Parquet file or a folder of them, whose images lie in a column; or hf://datasets/NAME, with the
            name of a configuration after one more slash where it has several.
        columns: of images, in Parquet files and on the hub, and of captions. A list of captions makes as many samples.
        where: its "split" is one of the source's splits, if it has several.
        seed: shards come in another order in each pass; None leaves them in theirs.

    Raises:
        ValueError: no such column or split.
    """

    def __init__(self, source: str, columns: Sequence[str], where: Mapping[str, object], seed: int | None = None) -> None:
        self.source, self.wanted, self.seed = source, columns, seed
        self.tars = sorted(Path(source).glob("*.tar"))
        self.files = self.tars or sorted(Path(source).rglob("*.parquet"))
        # Where the images are: copied ones beside the table they are for.
        self.root, self.columns = (Path(source).absolute(), columns) if self.tars else (Path(), ("filepath", "title"))
        if not self.tars:
            named = _HUB_NAME.match(source)
            name, file = (named.groups() if named else (source, None)), None
            if Path(source).is_file():
                name, file = ("parquet",), source
            found = datasets.load_dataset(*name, data_files=file, streaming=True)
            split = next(iter(found)) if len(found) == 1 else str(where.get("split"))
            require_known(
                split, found, f"{source} has the splits {[*found]}, not {split!r}: say which, e.g. where={{'split': 'train'}}"
            )
            self.split = {"split": split} if "split" in where else {}
            for column in columns:
                require_known(column, found[split].column_names, f"{source} has no column {column!r}")
            self.data = found[split].cast_column(columns[0], datasets.Image(decode=False)).reshard()

    def __len__(self) -> int:
        return len(self.tars) or self.data.num_shards

    def take(self, out: Path, position: Position, most: int, limit: int) -> tuple[pa.Table, list[tuple[int, str, str]], Position]:
        """The samples after a position, at most so many and none of pass ``limit``; images in no tar are copied into ``out``.

        Returns:
            A table of texts and vectors of float: "filepath", a column for each member or field, "_row" (in its shard), and
            PLACE; what cannot be read: row, path, reason; the position after them.
        """
        tables, bad, (past, shard, row) = [], [], position
        while most > 0 and past < limit:
            order = range(len(self)) if self.seed is None else numpy_generator(self.seed, "pass", past).permutation(len(self))
            rows, copied, count = [], {}, 0
            for fields, image, fault in islice(self._samples(order[shard]), row, row + most):
                path, count = fields["filepath"], count + 1
                if isinstance(image, bytes):
                    image = copied[path] = copied.get(path) or _append(out / IMAGES, image)
                if fault:
                    bad.append((row + count, path, fault))
                else:
                    rows.append(fields | dict(zip(PLACE, image, strict=True)) | {"_row": row + count})
            names = dict.fromkeys(name for fields in rows for name in fields)
            tables.append(pa.table({name: [fields.get(name) for fields in rows] for name in names}))
            shard, row = (shard, row + count) if count == most else (shard + 1, 0)
            past, shard, most = past + shard // len(self), shard % len(self), most - count
        return pa.concat_tables(tables, promote_options="default"), bad, (past, shard, row)

    def _samples(self, index: int) -> Iterator[tuple[dict[str, Any], tuple | bytes, str]]:
        """Fields, the image or its place, and what is wrong, of each sample of a shard."""
        if self.tars:
            yield from _tar_samples(self.tars[index])
            return
        for row in self.data.shard(len(self), index):
            image, captions = (row.pop(name) for name in self.wanted)
            image = (image or {}).get("bytes") or b""
            # By its content: captions may come as several rows with the same image.
            fields = self.split | {name: _field(value) for name, value in row.items()}
            fields["filepath"] = f"{index:05d}/{hashlib.sha256(image).hexdigest()[:20]}"
            for caption in captions if isinstance(captions, list) else [captions]:
                yield fields | {"title": _field(caption)}, image, ""


def _tar_samples(shard: Path) -> Iterator[tuple[dict[str, Any], tuple, str]]:
    samples: dict[str, dict] = defaultdict(dict)
    for name, place in index_tar(shard, shard.name).items():
        key = re.sub(r"\.[^/]*$", "", name)
        samples[key][name.removeprefix(f"{key}.")] = place
    with shard.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        for key, parts in samples.items():
            kind = next((kind for kind in parts if f".{kind.lower()}" in Image.registered_extensions()), "")
            fields, fault = {"filepath": f"{shard.name}/{key}.{kind}", "title": ""}, ""
            for member, (_, start, size) in parts.items():
                data = whole[start : start + size] if member in ("txt", "json") or member.endswith("npy") else b""
                try:
                    if member == "txt":
                        fields["title"] = data.decode(errors="replace")
                    elif member == "json":
                        fields = {name: _field(value) for name, value in json.loads(data).items()} | fields
                    elif data:
                        fields[member] = np.load(BytesIO(data), allow_pickle=False).ravel()
                except (ValueError, AttributeError) as error:
                    fault = f"unreadable .{member}: {error}"
            yield fields, parts.get(kind, NO_PLACE), fault


def is_sharded(source: str, image_column: str) -> bool:
    """Whether this is a source in shards, with the images in them, and not a table of their paths."""
    path = Path(source)
    if path.suffix.lower() == ".parquet" and path.is_file():
        schema = parquet.ParquetDataset(path).schema
        return image_column in schema.names and not pa.types.is_string(schema.field(image_column).type)
    return bool(_HUB_NAME.match(source)) or any(path.glob("*.tar")) or any(path.glob("**/*.parquet"))


def index_tar(path: str | Path, below: str = "") -> dict[str, tuple[str, int, int]]:
    """Where each regular member of an uncompressed tar is, by name: one scan, nothing extracted.

    Args:
        below: the tar's name below the root of the images; empty where the tar is the root.

    Returns:
        That name, offset and size.

    Raises:
        ValueError: it is compressed, cut short or no tar.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            return {member.name.removeprefix("./"): (below, member.offset_data, member.size) for member in tar if member.isreg()}
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a whole uncompressed tar: {error}. Make it again") from error


def _append(path: Path, data: bytes) -> tuple[str, int, int]:
    with writing(path), path.open("ab") as file:
        return IMAGES, file.tell(), file.write(data)


def _field(value: Any) -> Any:
    """As text; a vector of float stays one."""
    if isinstance(value, list) and value and all(isinstance(item, float) for item in value):
        return value
    return "" if value is None else str(value)
