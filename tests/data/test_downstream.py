"""Labelled sets: classes of folders, tars and tables; class names and prompts."""

import multiprocessing
import os
import shutil
import tarfile

import numpy as np
import open_clip
import pytest
from PIL import Image

from protoclip_lab.data import downstream
from protoclip_lab.data.pairs import prepare

CLASSES = ["ant_hill", "bee", "cow"]


def grey(value):
    return Image.new("RGB", (8, 8), (value, value, value))


def brightness(image):
    return int(np.asarray(image).mean())


@pytest.fixture
def folder(tmp_path):
    """Two images a class, made in an order that is not the sorted one; brightness 10 × class + number."""
    root = tmp_path / "set"
    for label, name in reversed(list(enumerate(CLASSES))):
        (root / name).mkdir(parents=True)
        for number in (1, 0):
            grey(10 * label + number).save(root / name / f"{number}.png")
        (root / name / "._0.png").write_bytes(b"a Mac was here")
        (root / name / "notes.txt").write_text("no image")
    (root / "classes.txt").write_text("ant hill\nBee\ncow\n")
    return root


def pack(folder, out, prefix=""):
    with tarfile.open(out, "w") as tar:
        for file in sorted(folder.rglob("*"), reverse=True):
            if file.is_file():
                tar.add(file, prefix + file.relative_to(folder).as_posix())
    return out


@pytest.mark.parametrize("kind", ["folder", "tar", "tar under ./", "tar under a folder"])
def test_labels_follow_sorted_folder_names(folder, tmp_path, kind):
    prefix = {"tar under ./": "./", "tar under a folder": "some/test/"}.get(kind, "")
    path = folder if kind == "folder" else pack(folder, tmp_path / "set.tar", prefix)
    found = downstream.from_classes(path)
    assert found.classes == CLASSES
    assert found.class_names == ["ant hill", "bee", "cow"]
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2] and found.labels.dtype == np.int64
    assert [brightness(image) for image in found.images] == [0, 1, 10, 11, 20, 21]
    assert {image.mode for image in found.images} == {"RGB"}


def test_images_are_read_in_other_processes(folder, tmp_path):
    images = downstream.from_classes(pack(folder, tmp_path / "set.tar")).images
    assert brightness(images[5]) == 21
    with multiprocessing.get_context("forkserver").Pool(2) as pool:
        assert [brightness(image) for image in pool.map(images.__getitem__, range(6))] == [0, 1, 10, 11, 20, 21]


def test_fingerprint_changes_with_place_names_and_content(folder, tmp_path):
    def mark(path):
        return downstream.from_classes(path).images.fingerprint

    first = mark(folder)
    assert mark(folder) == first
    # Bitmaps of one size: names and lengths alone would take one set for the other.
    shutil.copytree(folder, tmp_path / "copy")
    tar = pack(folder, tmp_path / "set.tar")
    marks = {first, mark(tmp_path / "copy"), mark(tar)}
    assert mark(tar) == mark(tar)
    os.utime(folder / "cow" / "1.png", ns=(0, 10**9))
    marks.add(mark(folder))
    (folder / "cow" / "1.png").unlink()
    marks.add(mark(folder))
    assert len(marks) == 5


@pytest.mark.parametrize("as_file", [True, False])
def test_fitting_class_list_names_the_classes(folder, as_file):
    classes = folder / "classes.txt" if as_file else ["ant hill", "Bee", "cow"]
    assert downstream.from_classes(folder, classes).class_names == ["ant hill", "Bee", "cow"]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["ant hill", "bee"], "2 class names are given for the 3 classes"),
        (["bee", "cow", "ant hill"], "class name 0 is 'bee', the class in .* is 'ant_hill'"),
        (["ant hill", "wasp", "cow"], "class name 1 is 'wasp'"),
        ("flower", "nearest is 'flowers'"),
    ],
)
def test_class_list_that_does_not_fit_is_refused(folder, classes, message):
    with pytest.raises(ValueError, match=message):
        downstream.from_classes(folder, classes)


@pytest.mark.parametrize("names", [("n01440764", "n01443537"), ("00000", "00001")])
def test_numbered_folders_take_any_list_of_their_length(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
        grey(0).save(tmp_path / name / "0.png")
    assert downstream.from_classes(tmp_path, ["tench", "goldfish"]).class_names == ["tench", "goldfish"]


def test_numbers_that_sort_otherwise_as_text_take_no_list(tmp_path):
    for name in ("2", "10"):
        (tmp_path / name).mkdir()
        grey(0).save(tmp_path / name / "0.png")
    with pytest.raises(ValueError, match="pad them with zeros"):
        downstream.from_classes(tmp_path, ["two", "ten"])
    assert downstream.from_classes(tmp_path).class_names == ["10", "2"]


def test_missing_or_strange_sets_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        downstream.from_classes(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected <class>/<image file>"):
        downstream.from_classes(folder / "cow")
    both = tmp_path / "both"
    (both / "train").mkdir(parents=True)
    (folder / "cow").rename(both / "train" / "cow")
    (folder / "bee").rename(both / "bee")
    with pytest.raises(ValueError, match="in one place"):
        downstream.from_classes(pack(both, tmp_path / "both.tar"))


def test_broken_image_is_named(folder, tmp_path):
    (folder / "bee" / "0.png").write_bytes(b"nothing")
    for path in (folder, pack(folder, tmp_path / "set.tar")):
        with pytest.raises(OSError, match=r"bee/0\.png is not a readable image"):
            downstream.from_classes(path).images[2]


@pytest.fixture
def pairs(tmp_path):
    rows = [("b.png", "x", "dog"), ("a.png", "y", "cat"), ("b.png", "z", "dog"), ("c.png", "w", "dog")]
    for value, name in enumerate("abc"):
        grey(10 * value).save(tmp_path / f"{name}.png")
    text = "".join("\t".join(row) + "\n" for row in [("filepath", "title", "animal"), *rows])
    (tmp_path / "table.tsv").write_text(text)
    return prepare(tmp_path / "table.tsv", tmp_path / "pairs", progress=False)


def test_table_gives_each_distinct_image_once(pairs):
    found = downstream.from_pairs(pairs, "animal")
    assert [brightness(image) for image in found.images] == [10, 0, 20]
    assert found.labels.tolist() == [1, 0, 1] and found.class_names == ["cat", "dog"]
    assert found.images.image_of_caption.tolist() == [0, 1, 0, 2]
    assert found.images.paths == {"a.png", "b.png", "c.png"}


def test_fingerprint_of_a_table_tells_its_image_root(pairs, tmp_path):
    shutil.copytree(tmp_path, tmp_path / "sharper", ignore=shutil.ignore_patterns("pairs"))
    root = tmp_path / "sharper"
    other = prepare(tmp_path / "table.tsv", tmp_path / "other", image_root=root, progress=False)
    assert other.fingerprint == pairs.fingerprint
    assert downstream.PairImages(other).fingerprint != downstream.PairImages(pairs).fingerprint


def test_table_column_that_does_not_label_images_is_refused(pairs):
    with pytest.raises(ValueError, match=r"b\.png of .* has two values of 'title': 'x' and 'z'"):
        downstream.from_pairs(pairs, "title")
    with pytest.raises(KeyError, match="nearest is 'animal'"):
        downstream.from_pairs(pairs, "animals")


def test_known_sets_are_those_of_open_clip_and_the_shapes():
    assert downstream.class_names("imagenet") == list(open_clip.IMAGENET_CLASSNAMES)
    assert downstream.templates("imagenet")[0] == "a bad photo of a {}." and len(downstream.templates("imagenet")) == 80
    assert "something {}" in downstream.templates("shapes/colour")


def test_clip_benchmark_gives_the_usual_sets():
    assert downstream.templates("cifar10")[0] == "a photo of a {}." and len(downstream.templates("cifar10")) == 18
    assert len(downstream.class_names("flowers")) == 102
    for name in downstream._clip_benchmark("zeroshot_classification_templates"):
        assert downstream.templates(name)


def test_unknown_or_faulty_templates_are_refused():
    with pytest.raises(ValueError, match="nearest is 'imagenet'"):
        downstream.templates("imagenets")
    with pytest.raises(ValueError, match=r"\['a photo'\]"):
        downstream.templates(["a {}", "a photo"])
    with pytest.raises(ValueError, match="at least one"):
        downstream.templates([])


def test_cifar10_tar_has_its_ten_classes(cifar10):
    found = downstream.from_classes(cifar10 / "test.tar", cifar10 / "classes.txt")
    assert np.bincount(found.labels).tolist() == [500] * 10
    assert found.classes == (cifar10 / "classes.txt").read_text().split()
    assert found.images[4999].size == (32, 32)
