"""Labelled image sets to evaluate on, and the class names and prompts the field uses for them."""

import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from protoclip_lab.config import nearest_name
from protoclip_lab.data import shapes
from protoclip_lab.data.pairs import Pairs, decode, fingerprint, index_tar

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
# Folder names that say nothing of the class, so that a list of names can't be checked against them.
UNREADABLE = re.compile(r"n\d{8}|\d+")


@dataclass
class Labelled:
    """Images with one class each.

    Attributes:
        name: file, folder or column it was read from.
        classes: C class names as they stand in the data, sorted; a class has at least one image.
        class_names: the same C classes in words, for prompts.
        labels: (N,) int64, index into ``classes``.
        images: N RGB images, read when asked for; equal ``images.fingerprint`` means equal features.
    """

    name: str
    classes: list[str]
    class_names: list[str]
    labels: np.ndarray
    images: "ImageFiles | PairImages"


@dataclass
class ImageFiles(Sequence):
    """Images of a folder, or of a tar by (offset, size) of its members; RGB."""

    root: Path
    members: list[tuple[str, tuple[int, int] | None]]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over paths, sizes and times of change: no image is read for it."""
        names = [str(self.root.absolute()), *(name for name, _ in self.members)]
        files = [self.root, *(self.root if place else self.root / name for name, place in self.members)]
        states = [file.stat() for file in files]
        return fingerprint(names, (f"{state.st_size} {state.st_mtime_ns}" for state in states))

    @property
    def paths(self) -> set[str]:
        """Where each image is."""
        return {str(self.root.resolve() / name) for name, _ in self.members}

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Image.Image:
        name, place = self.members[index]
        try:
            # Opened for each image: a descriptor kept open could not be shared with worker processes.
            with open(self.root if place else self.root / name, "rb") as file:
                file.seek(place[0] if place else 0)
                return decode(file.read(place[1] if place else -1))
        except (OSError, ValueError) as error:
            raise OSError(f"{self.root}: {name} is not a readable image: {error}. Replace it or take it out") from error


class PairImages(Sequence):
    """The distinct images of a table of pairs, each once.

    Attributes:
        rows: (n,) the first row of each image.
        image_of_caption: (N,) image of each row.
    """

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        # The table's own fingerprint does not say which folder or tar its images are in.
        self.fingerprint = fingerprint([str(pairs.folder.absolute())], [pairs.fingerprint])
        _, self.rows, self.image_of_caption = np.unique(pairs.image_ids, return_index=True, return_inverse=True)

    @property
    def paths(self) -> set[str]:
        """Where each image is, as the table says."""
        return set(self.pairs.column("filepath"))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        return self.pairs.image(self.rows[index])


def from_classes(path: str | Path, classes: str | Path | Sequence[str] | None = None) -> Labelled:
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
    if path.is_dir():
        places = {file.relative_to(path).as_posix(): None for file in path.glob("*/*")}
    else:
        places = index_tar(path)
    files = {PurePosixPath(name): place for name, place in sorted(places.items())}
    files = {f: p for f, p in files.items() if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".")}
    parents = {file.parent.parent for file in files}
    if len(parents) != 1 or any(not file.parent.name for file in files):
        found = sorted(map(str, parents))[:5]
        raise ValueError(
            f"{path} has class folders in {found or 'no place'}: expected <class>/<image file>, in one place"
        )
    members = [(str(file), place) for file, place in files.items()]
    return _labelled(str(path), [file.parent.name for file in files], classes, ImageFiles(path, members))


def from_pairs(pairs: Pairs, label_column: str, classes: str | Path | Sequence[str] | None = None) -> Labelled:
    """The distinct images of a table, with the classes of one of its columns.

    Raises:
        KeyError: no such column.
        ValueError: an image has two classes, or ``classes`` do not fit.
    """
    images = PairImages(pairs)
    values = np.array(pairs.column(label_column), dtype=str)
    labels = values[images.rows]
    differs = labels[images.image_of_caption] != values
    if differs.any():
        row = int(differs.argmax())
        both = f"'{labels[images.image_of_caption[row]]}' and '{values[row]}'"
        raise ValueError(
            f"{pairs.column('filepath')[row]} of {pairs.source} has two values of {label_column!r}: {both}"
        )
    return _labelled(f"{pairs.source}:{label_column}", labels, classes, images)


def _labelled(
    name: str,
    values: Sequence[str],
    classes: str | Path | Sequence[str] | None,
    images: ImageFiles | PairImages,
) -> Labelled:
    found, labels = np.unique(values, return_inverse=True)
    names = [value.replace("_", " ") for value in found.tolist()]
    if classes is not None:
        names = _fitting(class_names(classes), found.tolist(), name)
    return Labelled(name, found.tolist(), names, labels.astype(np.int64), images)


def _fitting(names: list[str], found: list[str], where: str) -> list[str]:
    """The names, when they can only be those of the sorted classes: a list shifted by one would pass unseen."""
    if len(names) != len(found):
        raise ValueError(f"{len(names)} class names are given for the {len(found)} classes of {where}: {found[:10]}")
    numbers = [value for value in found if value.isdigit()]
    if len({len(value) for value in numbers}) > 1:
        # As text "10" sorts before "2": the list, which counts, would be shifted.
        raise ValueError(f"classes of {where} are numbers of different length {numbers[:10]}: pad them with zeros")
    for position, (given, value) in enumerate(zip(names, found, strict=True)):
        if not UNREADABLE.fullmatch(value) and _bare(given) != _bare(value):
            raise ValueError(f"class name {position} is {given!r}, the class in {where} is {value!r}: lists must agree")
    return names


def _bare(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def class_names(classes: str | Path | Sequence[str]) -> list[str]:
    """Names themselves, a text file with one a line, or the name of a known set ("imagenet", "flowers", …).

    Raises:
        ValueError: neither a known set (the nearest is named) nor a file.
    """
    if not isinstance(classes, str | Path):
        return list(classes)
    known = known_class_names()
    if str(classes) in known:
        return list(known[str(classes)])
    if Path(classes).is_file():
        return [line.strip() for line in Path(classes).read_text(encoding="utf-8").splitlines() if line.strip()]
    raise ValueError(_unknown("classes", str(classes), known, "a file with one name a line, "))


def templates(templates: str | Sequence[str]) -> list[str]:
    """Templates themselves, or those of a known set ("cifar10", "imagenet", "shapes/colour", …).

    Raises:
        ValueError: no known set (the nearest is named), or a template without ``{}``.
    """
    if isinstance(templates, str):
        known = known_templates()
        if templates not in known:
            raise ValueError(_unknown("templates", templates, known, "a list, "))
        templates = known[templates]
    without = [template for template in templates if "{}" not in template]
    if without or not templates:
        raise ValueError(f"templates {without}: at least one is needed, each with {{}} where the class name goes")
    return list(templates)


def known_class_names() -> dict[str, Sequence[str]]:
    """Class names by set: ImageNet's from open_clip, others from clip_benchmark where it is installed."""
    from open_clip import IMAGENET_CLASSNAMES

    return {**_clip_benchmark("classnames"), "imagenet": IMAGENET_CLASSNAMES}


def known_templates() -> dict[str, Sequence[str]]:
    """Templates by set: as :func:`known_class_names`, and those of the factors of the drawn shapes."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    own = {f"shapes/{factor}": prompts for factor, prompts in shapes.PROMPTS.items()}
    imagenet = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    return {**_clip_benchmark("zeroshot_classification_templates"), **own, "imagenet": imagenet}


@cache
def _clip_benchmark(kind: str) -> dict[str, list[str]]:
    if importlib.util.find_spec("clip_benchmark") is None:
        return {}
    text = (resources.files("clip_benchmark") / "datasets" / f"en_{kind}.json").read_text(encoding="utf-8")
    return {name: [entry.replace("{c}", "{}") for entry in entries] for name, entries in json.loads(text).items()}


def _unknown(setting: str, value: str, known: dict, others: str) -> str:
    more = "" if importlib.util.find_spec("clip_benchmark") else "; pip install clip-benchmark adds the usual sets"
    return (
        f"{setting} = {value!r} is neither {others}nor a known set; the nearest is {nearest_name(value, known)!r}{more}"
    )
