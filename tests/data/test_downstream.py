"""Labelled sets: classes of folders, tars and tables; class names and prompts."""

import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from protoclip_lab.data import downstream
from protoclip_lab.data.pairs import prepare
from protoclip_lab.evaluation.suite import EvaluationSet

CLASSES = ["017.Blue_Jay", "ApplyEyeMakeup", "cow"]


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
    shutil.copytree(root / "ApplyEyeMakeup", root / ".ipynb_checkpoints")
    return root


def pack(folder, out, prefix=""):
    with tarfile.open(out, "w") as tar:
        for file in sorted(folder.rglob("*"), reverse=True):
            if file.is_file():
                tar.add(file, prefix + file.relative_to(folder).as_posix())
    return out


@pytest.mark.parametrize("prefix", [None, "", "./", "some/test/"])
def test_labels_follow_sorted_folder_names(folder, tmp_path, prefix):
    path = folder if prefix is None else pack(folder, tmp_path / "set.tar", prefix)
    found = downstream.from_classes(path)
    assert found.classes == CLASSES and found.class_names == ["Blue Jay", "Apply Eye Makeup", "cow"]
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2] and found.labels.dtype == np.int64
    assert [brightness(image) for image in found.images] == [0, 1, 10, 11, 20, 21]
    assert {image.mode for image in found.images} == {"RGB"}


def test_fingerprint_changes_with_place_names_and_content(folder, tmp_path):
    def mark(path):
        return downstream.from_classes(path).images.fingerprint

    marks = [mark(folder)]
    # Bitmaps of one size: names and lengths alone would take one set for the other.
    for path in (shutil.copytree(folder, tmp_path / "copy"), pack(folder, tmp_path / "set.tar")):
        marks.append(mark(path))
        assert mark(path) == marks[-1]
    os.utime(folder / "cow" / "1.png", ns=(0, 10**9))
    marks.append(mark(folder))
    (folder / "cow" / "1.png").unlink()
    assert len({*marks, mark(folder)}) == 5


def test_class_list_names_the_classes_or_is_refused(folder):
    classes = ["Blue jay", "apply eye makeup", "cow"]
    assert downstream.from_classes(folder, classes).class_names == classes
    for classes, message in {
        ("Blue Jay", "cow"): "2 class names are given for the 3 classes",
        ("cow", "Blue Jay", "Bee"): "class name 0 is 'cow', the class in .* is '017.Blue_Jay'",
        ("Blue Jay", "wasp", "cow"): "class name 1 is 'wasp'",
        "flower": "nearest valid name is 'flowers'",
    }.items():
        with pytest.raises(ValueError, match=message):
            downstream.from_classes(folder, classes)


def test_missing_strange_or_broken_sets_are_refused(folder, tmp_path):
    (folder / "ApplyEyeMakeup" / "0.png").write_bytes(b"nothing")
    tar = pack(folder, tmp_path / "set.tar")
    for path in (folder, tar):
        with pytest.raises(OSError, match=r"ApplyEyeMakeup/0\.png is not a readable image"):
            downstream.from_classes(path).images[2]
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"set\.tar is not a whole uncompressed tar"):
        downstream.from_classes(tar)
    with pytest.raises(ValueError, match="nowhere is no folder or tar of <class>/<image file>"):
        downstream.from_classes(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cow is no folder or tar of <class>/<image file>"):
        downstream.from_classes(folder / "cow")
    shutil.move(folder / "cow", folder / "train" / "cow")
    with pytest.raises(ValueError, match="all in one place"):
        downstream.from_classes(pack(folder, tmp_path / "both.tar"))


@pytest.fixture
def pairs(tmp_path):
    rows = [("b.png", "x", "dog"), ("a.png", "y", "cat"), ("b.png", "z", "dog"), ("c.png", "w", "dog")]
    for value, name in enumerate("abc"):
        grey(10 * value).save(tmp_path / f"{name}.png")
    text = "".join("\t".join(row) + "\n" for row in [("filepath", "title", "animal"), *rows])
    (tmp_path / "table.tsv").write_text(text)
    return prepare(tmp_path / "table.tsv", tmp_path / "pairs")


def test_table_gives_each_distinct_image_once(pairs):
    found = downstream.from_pairs(pairs, "animal")
    assert [brightness(image) for image in found.images] == [10, 0, 20]
    assert found.labels.tolist() == [1, 0, 1] and found.class_names == ["cat", "dog"]
    assert found.images.image_of_caption.tolist() == [0, 1, 0, 2]
    assert found.images.names == ["b.png", "a.png", "c.png"]
    with pytest.raises(ValueError, match=r"b\.png has two values of 'title': 'x' and 'z'"):
        downstream.from_pairs(pairs, "title")
    with pytest.raises(ValueError, match="nearest valid name is 'animal'"):
        downstream.from_pairs(pairs, "animals")


def test_fingerprint_of_a_table_tells_its_image_root(pairs, tmp_path):
    root = shutil.copytree(tmp_path, tmp_path / "sharper", ignore=shutil.ignore_patterns("pairs"))
    other = prepare(tmp_path / "table.tsv", tmp_path / "other", image_root=root)
    assert other.fingerprint == pairs.fingerprint
    assert downstream.PairImages(other).fingerprint != downstream.PairImages(pairs).fingerprint


def test_known_templates_are_given_and_faulty_ones_refused():
    assert "a photo of a {}." in downstream.listed("templates", "cifar10")
    for faulty, message in {"imagenets": "nearest valid name is 'imagenet1k'", ("a {}", "photo"): "'photo'", (): "at least"}.items():
        with pytest.raises(ValueError, match=message):
            EvaluationSet(name="animals", images="animals", templates=faulty if isinstance(faulty, str) else [*faulty])


def test_cifar10_tar_has_its_ten_classes(cifar10):
    found = downstream.from_classes(cifar10 / "test.tar", names := (cifar10 / "classes.txt").read_text().split())
    assert np.bincount(found.labels).tolist() == [500] * 10
    assert found.classes == names
    assert found.images[4999].size == (32, 32)
