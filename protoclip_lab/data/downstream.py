"""Labelled image sets to evaluate on, and the class names and prompts the field uses for them."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from protoclip_lab.config import nearest_name
from protoclip_lab.data import shapes
from protoclip_lab.data.pairs import NO_PLACE, Pairs, fingerprint, index_tar, read_image

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}

Classes = str | Path | Sequence[str]


@dataclass
class Labelled:
    """Images with one class each.

    Attributes:
        classes: C class names as they stand in the data, sorted; a class has at least one image.
        class_names: the same C classes in words, for prompts.
        labels: (N,) int64, index into ``classes``.
        images: N RGB images, read when asked for; equal ``images.fingerprint`` means equal features.
    """

    classes: list[str]
    class_names: list[str]
    labels: np.ndarray
    images: "ImageFiles | PairImages"


class ImageFiles(Sequence):
    """Images of a folder, or of a tar; RGB.

    Attributes:
        places: name to (offset, size) in the tar, (-1, -1) in a folder.
        paths: where each image is.
        fingerprint: SHA-256 over paths, sizes and times of change: no image is read for it.
    """

    def __init__(self, root: Path, places: dict[str, tuple[int, int]]) -> None:
        self.root, self.places, self._names = root.absolute(), places, list(places)
        self.paths = {str(root.resolve() / name) for name in places}
        files = {file: file.stat() for file in ([self.root] if root.is_file() else map(self.root.joinpath, places))}
        self.fingerprint = fingerprint(map(str, files), (f"{s.st_size} {s.st_mtime_ns}" for s in files.values()))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Image.Image:
        name = self._names[index]
        try:
            return read_image(self.root, name, self.places[name])
        except Exception as error:  # a decoder may raise anything on a broken file
            raise OSError(f"{self.root}: {name} is not a readable image: {error}. Replace it or take it out") from error


class PairImages(Sequence):
    """The distinct images of a table of pairs, each once.

    Attributes:
        rows: (n,) the first row of each image.
        image_of_caption: (N,) image of each row.
        paths: where each image is, as the table says.
    """

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        # The table's own fingerprint does not say which folder or tar its images are in.
        self.fingerprint = fingerprint([str(pairs.folder.absolute())], [pairs.fingerprint])
        self.paths = set(pairs.column("filepath"))
        _, self.rows, self.image_of_caption = np.unique(pairs.image_ids, return_index=True, return_inverse=True)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        return self.pairs.image(self.rows[index])


def from_classes(path: str | Path, classes: Classes | None = None) -> Labelled:
    """A folder of class folders, or a tar of the same (``<class>/<file>``), read without extracting.

    Labels follow the sorted folder names; other files and hidden ones are passed over.

    Args:
        classes: class names for prompts, in the order of the sorted folders: see :func:`class_names`. None takes the
            folder names, underscores as spaces.

    Raises:
        FileNotFoundError: nothing at ``path``.
        ValueError: no images, class folders at different places of a tar, or ``classes`` that do not fit.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no image set at {path.absolute()}: expected class folders or a tar of them")
    names = index_tar(path) if path.is_file() else {f.relative_to(path): NO_PLACE for f in path.glob("*/*")}
    places = {PurePosixPath(name): place for name, place in names.items()}
    files = sorted(f for f in places if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith("."))
    parents = {file.parent.parent for file in files}
    if len(parents) != 1 or any(not file.parent.name for file in files):
        found = sorted(map(str, parents))[:5]
        raise ValueError(f"{path} has class folders in {found}: expected <class>/<image file>, in one place")
    images = ImageFiles(path, {str(file): places[file] for file in files})
    return _labelled(str(path), [file.parent.name for file in files], classes, images)


def from_pairs(pairs: Pairs, column: str, classes: Classes | None = None) -> Labelled:
    """The distinct images of a table, with the classes of one of its columns.

    Raises:
        KeyError: no such column.
        ValueError: an image has two classes, or ``classes`` do not fit.
    """
    seen: dict[str, str] = {}  # in the order of the first rows, as PairImages has them
    for path, label in zip(pairs.column("filepath"), map(str, pairs.column(column)), strict=True):
        if seen.setdefault(path, label) != label:
            raise ValueError(f"{path} of {pairs.source} has two values of {column!r}: {seen[path]!r} and {label!r}")
    return _labelled(f"{pairs.source}:{column}", list(seen.values()), classes, PairImages(pairs))


def _labelled(where: str, values: list[str], classes: Classes | None, images: "ImageFiles | PairImages") -> Labelled:
    found, labels = np.unique(values, return_inverse=True)
    found = found.tolist()
    if classes is None:
        return Labelled(found, [value.replace("_", " ") for value in found], labels, images)
    # The names must be those of the sorted classes: a list shifted by one would pass unseen.
    names = class_names(classes)
    if len(names) != len(found):
        raise ValueError(f"{len(names)} class names are given for the {len(found)} classes of {where}: {found[:10]}")
    if len({len(value) for value in found if value.isdigit()}) > 1:
        # As text "10" sorts before "2": the list, which counts, would be shifted.
        raise ValueError(f"classes of {where} are numbers of different length {found[:10]}: pad them with zeros")
    for position, (given, value) in enumerate(zip(names, found, strict=True)):
        bare = {re.sub(r"[\W_]", "", name.casefold()) for name in (given, value)}
        # A folder name such as n01440764 or 7 says nothing of the class.
        if len(bare) > 1 and not re.fullmatch(r"n\d{8}|\d+", value):
            raise ValueError(f"class name {position} is {given!r}, the class in {where} is {value!r}: lists must agree")
    return Labelled(found, names, labels, images)


def class_names(classes: Classes) -> list[str]:
    """Names themselves, a text file with one a line, or the name of a set that clip_benchmark knows ("flowers", …).

    Raises:
        ValueError: neither a known set (the nearest is named) nor a file.
    """
    if not isinstance(classes, str | Path):
        return list(classes)
    known = _clip_benchmark("classnames")
    if classes in known:
        return list(known[classes])
    if Path(classes).is_file():
        return [line.strip() for line in Path(classes).read_text(encoding="utf-8").splitlines() if line.strip()]
    near = nearest_name(str(classes), known)
    raise ValueError(f"classes = {str(classes)!r} is neither a file of names nor a known set; the nearest is {near!r}")


def templates(templates: str | Sequence[str]) -> list[str]:
    """Templates themselves, or those of a known set ("cifar10", "imagenet", "shapes/colour", …).

    Raises:
        ValueError: no known set (the nearest is named), or a template without ``{}``.
    """
    if isinstance(templates, str):
        own = {f"shapes/{factor}": prompts for factor, prompts in shapes.PROMPTS.items()}
        known = _clip_benchmark("zeroshot_classification_templates") | own
        if templates not in known:
            near = nearest_name(templates, known)
            raise ValueError(f"templates = {templates!r} is neither a list nor a known set; the nearest is {near!r}")
        templates = known[templates]
    without = [template for template in templates if "{}" not in template]
    if without or not templates:
        raise ValueError(f"templates {without}: at least one is needed, each with {{}} where the class name goes")
    return list(templates)


@cache
def _clip_benchmark(kind: str) -> dict[str, list[str]]:
    text = (resources.files("clip_benchmark") / "datasets" / f"en_{kind}.json").read_text(encoding="utf-8")
    known = {name: [entry.replace("{c}", "{}") for entry in entries] for name, entries in json.loads(text).items()}
    return {**known, "imagenet": known["imagenet1k"]}
