"""Labelled image sets to evaluate on, and the class names and prompts the field uses for them."""

import json
import pickletools
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import yaml
from PIL import Image

from protoclip_lab.config import require, require_known
from protoclip_lab.data.pairs import NO_PLACE, Pairs, fingerprint, index_tar, read_image
from protoclip_lab.storage import write_text

Classes = str | Sequence[str]

# Data sets known by name: see the file.
KNOWN: dict[str, dict] = yaml.safe_load((resources.files("protoclip_lab.data") / "downstream.yaml").read_text("utf-8"))
# Folders that torchvision knows how to read, and how far above them the root lies that it wants.
TORCHVISION = {"stl10_binary": ("STL10", 0), "GTSRB": ("GTSRB", 1), "flowers-102": ("Flowers102", 0), "devkit": ("StanfordCars", 1)}


class Images(Sequence):
    """N RGB images, read when asked for.

    Args:
        names: N, where each is; equal names are equal images.
        items: N, what ``read`` makes the images of.
        read: item -> image; OSError for one that is missing or broken.
        root, files: the tar that holds them, or a folder and the files in it.
        about: what is taken from these.

    Attributes:
        fingerprint: SHA-256 over ``about``, paths, sizes and times of change, for which no image is read; equal ones mean
            equal features.
    """

    def __init__(self, names: list[str], items: Sequence, read: Callable, root: Path, files: Iterable[str | Path], about: str) -> None:
        self.names, self.items, self.read = names, items, read
        stats = {str(file): file.stat() for file in ([root] if root.is_file() else [root / name for name in files])}
        self.fingerprint = fingerprint([about, *stats], ["", *(f"{s.st_size} {s.st_mtime_ns}" for s in stats.values())])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Image.Image:
        return self.read(self.items[index])


class PairImages(Images):
    """The distinct images of a table of pairs, each once.

    Attributes:
        pairs: the table.
        rows: (n,) the first row of each image.
        image_of_caption: (N,) image of each row.
    """

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        _, self.rows, self.image_of_caption = np.unique(pairs.image_ids, return_index=True, return_inverse=True)
        names, places = (np.array(pairs.column(name), object)[self.rows].tolist() for name in ("filepath", "_at"))
        # The table's own fingerprint does not say where its images are, nor whether they changed: files do, or tars.
        files = {place.rpartition("/")[0].rpartition("/")[0] or name for name, place in zip(names, places, strict=True)}
        super().__init__(names, self.rows, pairs.image, pairs.root, sorted(files), pairs.fingerprint)


class Labelled(NamedTuple):
    """Images with one class each.

    Attributes:
        classes: C class names as they stand in the data, sorted (numbers by value); in the order of its own index
            where a set comes with one.
        class_names: the same C classes in words, for prompts.
        labels: (N,) int64, index into ``classes``.
        images: N images.
    """

    classes: list[str]
    class_names: list[str]
    labels: np.ndarray
    images: Images


def _files(root: Path, places: dict[str, tuple[int, int]]) -> Images:
    """Images of a folder, or of a tar: name to (offset, size) in the tar, (-1, -1) in a folder."""
    names, read = [str(root / name) for name in places], partial(read_image, root)
    return Images(names, list(places.items()), read, root, places, f"{root} {list(places)}")


def _array(pixels: np.ndarray, files: list[Path], part: str) -> Images:
    """Images of one array, (N, 3, H, W) uint8."""
    names = [f"{files[0].resolve()} {part} {index}" for index in range(len(pixels))]
    return Images(names, pixels.transpose(0, 2, 3, 1), Image.fromarray, Path(), files, part)


def from_classes(path: str | Path, classes: Classes | None = None) -> Labelled:
    """A folder of class folders, or a tar of the same (``<class>/<file>``), read without extracting.

    Labels follow the sorted folder names; files of other kinds, in no class folder or hidden are passed over.

    Args:
        classes: class names for prompts, in the order of the sorted folders: see :func:`listed`. None takes the
            folder names, underscores as spaces.

    Raises:
        ValueError: no images there, a broken tar, class folders at different places of one, or ``classes`` that do not fit.
    """
    path = Path(path).resolve()
    places = index_tar(path) if path.is_file() else {f.relative_to(path).as_posix(): NO_PLACE for f in path.glob("*/*")}
    files = sorted(PurePosixPath(name) for name in places if "/" in name and not re.search(r"(^|/)\.", name))
    files = [file for file in files if file.suffix.lower() in Image.registered_extensions()]
    require(len({f.parent.parent for f in files}) == 1, f"{path} is no folder or tar of <class>/<image file>, all in one place")
    return _labelled(str(path), [file.parent.name for file in files], classes, _files(path, {str(f): places[str(f)] for f in files}))


def from_pairs(pairs: Pairs, column: str, classes: Classes | None = None) -> Labelled:
    """The distinct images of a table, with the classes of one of its columns.

    Raises:
        ValueError: no such column, an image has two classes, or ``classes`` do not fit.
    """
    seen: dict[str, str] = {}  # in the order of the first rows, as PairImages has them
    for path, label in zip(pairs.column("filepath"), map(str, pairs.column(column)), strict=True):
        require(seen.setdefault(path, label) == label, f"{path} has two values of {column!r}: {seen[path]!r} and {label!r}")
    return _labelled(f"{pairs.source}:{column}", list(seen.values()), classes, PairImages(pairs))


def known(name: str, root: str | Path, part: str = "test") -> list[Labelled]:
    """A data set known by name, under a data root laid out by ProtoCLIP's code, by torchvision or as class folders.

    Args:
        name: one of ``KNOWN`` that has classes, such as "cifar10".
        part: "test" | "train".

    Returns:
        One entry; one for each list of a set that has several (ucf101).

    Raises:
        FileNotFoundError: it is not there; names the places looked at and how to get it.
        ValueError: class names and folders, or images and labels, do not fit. What a reader finds missing or broken
            otherwise comes as its own error.
    """
    about, classes = KNOWN[name], KNOWN[name].get("classes")
    found = find(name, root, [f"{name}/{part}", f"{name}/{part}.tar", *about[part]])
    if found[0].name in TORCHVISION or found[0].parent.name.startswith("cifar-"):
        read = _torchvision if found[0].name in TORCHVISION else _cifar
        try:
            images, labels, names = read(found, part, classes)
            fit = 0 < len(images) == len(labels) and max(labels) < len(names)
            require(fit, f"{len(images)} images, {len(labels)} labels of {len(names)} classes do not fit")
        except ValueError as error:
            raise ValueError(f"{part} part of {name} in {found[0].parent} is cut short: {error}. To get it: {about['get']}") from error
        return [Labelled(names, list(names), np.asarray(labels, dtype=np.int64), images)]
    labelled = [from_classes(path, classes) for path in found]
    # Numbers in prompts would give figures that look like results.
    require(classes or not any(map(str.isdigit, labelled[0].classes)), f"class folders of {found[0]} are numbers: name them by class")
    return labelled


def find(name: str, root: str | Path, places: Sequence[str]) -> list[Path]:
    """What lies at the first of some places (with wildcards) under a data root that there is.

    Raises:
        FileNotFoundError: none is there; names them and how to get the set.
    """
    for place in places:
        if found := sorted(Path(root).glob(place)):
            return found
    raise FileNotFoundError(f"{name} is at none of {[str(Path(root).absolute() / p) for p in places]}. To get it: {KNOWN[name]['get']}")


def captioned(name: str, root: str | Path, folder: Path) -> dict[str, str | dict]:
    """A set of captions known by name as arguments of :func:`protoclip_lab.data.pairs.prepare`: its test part.

    COCO's and Karpathy's JSON are written as a table into ``folder``; all captions of an image are taken.

    Raises:
        FileNotFoundError: captions or images are not there; names the places looked at and how to get them.
    """
    file, images = (find(name, root, KNOWN[name][part])[0] for part in ("test", "images"))
    if file.suffix == ".tsv":
        return {"table": str(file), "image_root": str(images), "where": {"split": "test"}}
    content = json.loads(file.read_text("utf-8"))
    if "annotations" in content:
        files = {image["id"]: image["file_name"] for image in content["images"]}
        rows = [(files[entry["image_id"]], entry["caption"]) for entry in content["annotations"]]
    else:
        rows = [(each["filename"], said["raw"]) for each in content["images"] if each["split"] == "test" for said in each["sentences"]]
    text = "\n".join(["filepath\ttitle", *(f"{path}\t{' '.join(caption.split())}" for path, caption in rows)])
    table = folder / f"{name}.tsv"
    folder.mkdir(parents=True, exist_ok=True)
    if not table.exists() or table.read_text("utf-8") != text:  # written again it would be prepared again
        write_text(table, text)
    return {"table": str(table), "image_root": str(images), "where": {}}


def _torchvision(found: list[Path], part: str, classes: Classes | None) -> tuple[Images, list[int], list[str]]:
    """What torchvision's reader of a folder finds: images, labels and class names."""
    from torchvision import datasets

    kind, above = TORCHVISION[found[0].name]
    # Without its checksum over gigabytes: data that are cut short fail as they are read.
    reader = type(kind, (getattr(datasets, kind),), {"_check_integrity": lambda self: True})
    root = found[0].parents[above].resolve()
    data = reader(str(root), split=part)
    if kind == "STL10":
        return _array(data.data, sorted(found[0].glob(f"{part}_*.bin")), part), data.labels.tolist(), listed("classes", classes)
    samples = list(zip(data._image_files, data._labels, strict=True)) if kind == "Flowers102" else data._samples
    names = {str(Path(file).relative_to(root)): NO_PLACE for file, _ in samples}
    return _files(root, names), [int(label) for _, label in samples], listed("classes", classes or data.classes)


def _cifar(found: list[Path], part: str, classes: Classes) -> tuple[Images, list[int], list[str]]:
    """CIFAR's Python files, which are pickles: read as a list of words and numbers, never unpickled."""
    pixels, labels, key = b"", [], b""
    for file in found:
        for operation, value, _ in pickletools.genops(file.read_bytes()):
            if isinstance(value, str | bytes):
                key = value if isinstance(value, bytes) else value.encode("latin-1")
                # No word has the length of a picture.
                pixels += key if len(key) >= 3 * 32 * 32 else b""
            elif key in (b"labels", b"fine_labels") and operation.name.startswith("BININT"):
                labels.append(value)
    return _array(np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32), found, part), labels, listed("classes", classes)


def _labelled(where: str, values: list[str], classes: Classes | None, images: Images) -> Labelled:
    # As text "10" sorts before "2".
    found = sorted(set(values), key=int if all(value.isdigit() for value in values) else None)
    position = {value: index for index, value in enumerate(found)}
    labels = np.array([position[value] for value in values], dtype=np.int64)
    names = [_words(value) for value in found] if classes is None else listed("classes", classes)
    # The names must be those of the sorted classes: a list shifted by one would pass unseen.
    require(len(names) == len(found), f"{len(names)} class names are given for the {len(found)} classes of {where}: {found[:10]}")
    for index, (given, value) in enumerate(zip(names, found, strict=True)):
        bare, *same = (re.sub(r"[\W_]", "", name.casefold()) for name in (given, value, _words(value)))
        # A folder name such as n01440764, 7 or NZ says nothing of the class.
        if bare not in same and not re.fullmatch(r"n\d{8}|\d+|[A-Z]{2}", value):
            raise ValueError(f"class name {index} is {given!r}, the class in {where} is {value!r}: lists must agree")
    return Labelled(found, names, labels, images)


def _words(folder: str) -> str:
    """A folder's name as one would say it: "017.Blue_Jay" and "TaiChi" are "Blue Jay" and "Tai Chi"."""
    name = re.sub(r"^\d+[._\s-]+", "", folder).replace("_", " ")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name) if re.fullmatch(r"([A-Z][a-z]*){2,}", name) else name


def listed(what: str, given: Classes) -> list[str]:
    """A list as given, or that of a set that clip_benchmark knows: its "classes" or "templates".

    Raises:
        ValueError: no known set; the nearest is named.
    """
    if isinstance(given, str):
        file = {"classes": "en_classnames.json", "templates": "en_zeroshot_classification_templates.json"}[what]
        known = json.loads((resources.files("clip_benchmark") / "datasets" / file).read_text("utf-8").replace("{c}", "{}"))
        require_known(given, known, f"{what} = {given!r} is neither a list nor a known set")
        given = known[given]
    return list(given)
