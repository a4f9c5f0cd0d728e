"""The embedded world: what a person or a pixel count sees must be what the labels and captions say."""

import csv
import hashlib
import itertools
import json
import os
import re
import shutil
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageColor, ImageOps
from scipy.stats import chi2_contingency, chisquare

from protoclip_lab.data import shapes

# What every caption is made from.
TEMPLATES = yaml.safe_load(Path(shapes.__file__).with_suffix(".yaml").read_text("utf-8"))["templates"]
# Written out here, not taken from the module: what each word may mean.
WORDS = {factor: {value: {value} for value in values} for factor, values in shapes.FACTORS.items()}
WORDS["size"]["small"].add("little")
WORDS["size"]["large"].add("big")
# CSS colours that a person would give the same name.
CSS = {name: name for name in ("red", "orange", "yellow", "green", "blue", "black")}
CSS |= {"purple": "darkviolet", "pink": "hotpink"}


def digest(seed, index, **settings):
    image, row = shapes.draw(seed, index, **settings)
    return hashlib.sha256(image.tobytes() + json.dumps(row).encode()).hexdigest()


def fields(template):
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def painted(image):
    """Pixels that are no backdrop: strongly coloured, or nearly black. The backdrop is pale and greyish."""
    pixels = np.asarray(image, float) / 255
    return (np.ptp(pixels, axis=2) > 0.3) | (pixels.max(2) < 0.25)


def bounding_box(image):
    """Centre x, centre y and longer side of the painted pixels' box, in image widths."""
    y, x = np.nonzero(painted(image))
    sides = np.ptp(x) + 1, np.ptp(y) + 1
    return (x.min() + sides[0] / 2) / image.width, (y.min() + sides[1] / 2) / image.width, max(sides) / image.width


def place(image):
    """Position word read off the pixels."""
    x, y, _ = bounding_box(image)
    if abs(x - 0.5) > 0.12:
        return "corner" if abs(y - 0.5) > 0.12 else "side"
    return "centre" if abs(y - 0.5) <= 0.12 else "top" if y < 0.5 else "bottom"


def find(wanted, seed=0):
    """First index of a world whose row has the wanted values."""
    for index in itertools.count():
        if wanted.items() <= shapes.draw(seed, index, image_size=16)[1].items():
            return index


@pytest.fixture(scope="module")
def rows():
    return [shapes.draw(7, index, image_size=16)[1] for index in range(4000)]


def test_a_sample_depends_on_seed_and_index_alone_in_any_order_and_process():
    forward = [digest(3, index) for index in range(12)]
    assert [digest(3, index) for index in reversed(range(12))][::-1] == forward
    assert len(set(forward)) == 12
    code = (
        "import hashlib, json\n"
        "from protoclip_lab.data import shapes\n"
        "for index in (11, 0, 5):\n"
        "    image, row = shapes.draw(3, index)\n"
        "    print(hashlib.sha256(image.tobytes() + json.dumps(row).encode()).hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.split() == [forward[11], forward[0], forward[5]]


def test_another_seed_is_another_world():
    assert not {digest(0, index) for index in range(20)} & {digest(1, index) for index in range(20)}
    assert [shapes.draw(0, i)[1] for i in range(20)] != [shapes.draw(1, i)[1] for i in range(20)]


def test_size_and_difficulty_of_the_image_leave_factors_and_caption_alone():
    for index in range(20):
        row = shapes.draw(0, index)[1]
        image, larger = shapes.draw(0, index, image_size=96, difficulty=0.5)
        assert larger == row
        assert image.size == (96, 96) and image.mode == "RGB"


def test_every_value_of_a_factor_is_equally_likely(rows):
    for factor, values in shapes.FACTORS.items():
        counts = Counter(row[factor] for row in rows)
        assert set(counts) == set(values)
        assert chisquare([counts[value] for value in values]).pvalue > 1e-3, (factor, counts)


def test_factors_are_independent_of_each_other_and_of_what_the_caption_names(rows):
    columns = {factor: [values.index(row[factor]) for row in rows] for factor, values in shapes.FACTORS.items()}
    named = [frozenset(f for f in WORDS if WORDS[f][row[f]] & set(re.findall(r"\w+", row["title"]))) for row in rows]
    columns["named"] = np.unique([sorted(n).__repr__() for n in named], return_inverse=True)[1]
    for one, other in itertools.combinations(columns, 2):
        table = np.zeros((max(columns[one]) + 1, max(columns[other]) + 1))
        np.add.at(table, (columns[one], columns[other]), 1)
        assert chi2_contingency(table).pvalue > 1e-3, (one, other)


def test_each_template_omits_a_factor_and_each_factor_is_named_by_a_quarter_of_them():
    for template in TEMPLATES:
        assert fields(template) < set(shapes.FACTORS), template
    for factor in shapes.FACTORS:
        assert sum(factor in fields(template) for template in TEMPLATES) >= len(TEMPLATES) / 4, factor


def test_a_caption_names_the_true_values_of_its_template_and_nothing_else(rows):
    patterns = {
        re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\w+)", re.escape(template)).replace(r"a\ (", r"an?\ (")): template
        for template in TEMPLATES
    }
    seen = Counter()
    for row in rows:
        said = set(re.findall(r"\w+", row["title"]))
        named = {factor for factor in WORDS if any(said & words for words in WORDS[factor].values())}
        matching = [p for p in patterns if p.fullmatch(row["title"]) and set(p.groupindex) == named]
        assert len(matching) == 1, row
        for factor, word in matching[0].fullmatch(row["title"]).groupdict().items():
            assert word in WORDS[factor][row[factor]], row
        for factor in WORDS:
            wrong = {word for value, words in WORDS[factor].items() if value != row[factor] for word in words}
            assert not said & wrong, row
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", row["title"]), row
        seen[patterns[matching[0]]] += 1
    assert set(seen) == set(TEMPLATES)


def test_prompts_exist_for_every_factor_and_take_one_class_name():
    assert shapes.PROMPTS.keys() == shapes.FACTORS.keys()
    for prompts in shapes.PROMPTS.values():
        assert prompts and all(prompt.count("{}") == 1 and prompt.format("word") for prompt in prompts)


def test_the_named_colour_is_that_of_most_painted_pixels():
    names = list(shapes.FACTORS["colour"])
    references = np.array([ImageColor.getrgb(CSS[name]) for name in names], float)
    references /= np.maximum(references.max(1, keepdims=True), 1)
    for index in range(300):
        image, row = shapes.draw(1, index)
        pixels = np.asarray(image, float)[painted(image)]
        # Shade darkens every channel alike, so brightness is divided out, except where nothing is left to divide.
        bright = pixels.max(1, keepdims=True)
        pixels = np.where(bright < 0.25 * 255, 0, pixels / np.maximum(bright, 1))
        nearest = np.linalg.norm(pixels[:, None] - references, axis=2).argmin(1)
        counts = np.bincount(nearest, minlength=len(names))
        assert names[counts.argmax()] == row["colour"], (index, row, counts)
        assert counts.max() > counts.sum() / 2, (index, row, counts)


def test_the_strongest_colour_jitter_keeps_every_colour_nearest_to_its_own_name():
    colours = np.array(list(shapes._VALUES["colour"].values()))
    corners = np.array(list(itertools.product((-1, 1), repeat=3))) * 2 * shapes._WORLD["colour_shift"]
    for own, colour in enumerate(colours):
        distance = np.linalg.norm((colour + corners)[:, None] - colours, axis=2)
        assert (distance.argmin(1) == own).all(), list(shapes._VALUES["colour"])[own]


def test_position_and_size_can_be_read_off_the_pixels_also_after_a_horizontal_flip():
    seen = set()
    for index in range(150):
        image, row = shapes.draw(2, index, difficulty=0)
        assert place(image) == row["position"], (index, row)
        assert place(ImageOps.mirror(image)) == row["position"], (index, row)
        assert (bounding_box(image)[2] > 0.44) == (row["size"] == "large"), (index, row)
        seen.add((row["position"], row["size"]))
    assert len(seen) == 10


def test_corners_are_all_four_and_sides_are_both():
    seen = Counter()
    for index in range(150):
        image, row = shapes.draw(2, index, difficulty=0)
        if row["position"] in ("corner", "side"):
            x, y, _ = bounding_box(image)
            seen[row["position"], x < 0.5, row["position"] == "corner" and y < 0.5] += 1
    assert len(seen) == 6 and min(seen.values()) >= 3, seen


def test_shapes_are_turned_by_difficulty_alone():
    """An upright square fills its box; turned by a it fills 1 / (cos a + sin a) squared of it."""
    filled = {0: [], 1: []}
    squares = [i for i in range(300) if shapes.draw(0, i, image_size=16)[1]["shape"] == "square"]
    for index, difficulty in itertools.product(squares, filled):
        image, row = shapes.draw(0, index, difficulty=difficulty)
        if (row["size"], row["position"]) == ("small", "centre"):
            pixels = painted(image)[14:50, 14:50]  # a stroke elsewhere would stretch the box
            box = np.ptp(np.nonzero(pixels), axis=1) + 1
            filled[difficulty].append(pixels.sum() / box.prod())
    assert len(filled[0]) >= 3
    assert min(filled[0]) > 0.95
    assert min(filled[1]) < 0.85


def test_every_small_shape_is_smaller_than_every_large_one_at_the_highest_difficulty():
    spread, radii = 2 * shapes._WORLD["size_change"], shapes._VALUES["size"]
    assert radii["small"] * (1 + spread) < radii["large"] * (1 - spread)


@pytest.mark.parametrize(
    ("name", "area"),
    [
        ("circle", np.pi),
        ("square", 2),
        ("ring", np.pi * (1 - 0.58**2)),
        ("cross", (4 * 0.72 * 0.64 + 0.72**2) / (1 + 0.36**2)),
        ("triangle", 3 * np.sqrt(3) / 4 / (0.75**2 + 0.75)),
    ],
)
def test_a_shape_covers_the_area_of_its_geometry(name, area):
    index = find({"shape": name, "size": "large", "position": "centre", "background": "plain"})
    image, _ = shapes.draw(0, index, image_size=256, difficulty=0)
    assert painted(image).mean() == pytest.approx(area * shapes._VALUES["size"]["large"] ** 2, rel=0.03)


def test_no_two_shapes_cover_nearly_the_same_pixels():
    masks = {}
    for name in shapes.FACTORS["shape"]:
        index = find({"shape": name, "size": "large", "position": "centre"})
        masks[name] = painted(shapes.draw(0, index, difficulty=0)[0])
    for one, other in itertools.combinations(masks, 2):
        overlap = (masks[one] & masks[other]).sum() / (masks[one] | masks[other]).sum()
        assert overlap < 0.8, (one, other, overlap)


def test_backgrounds_differ_in_how_the_backdrop_varies():
    """Without a shape: plain is flat, stripes are constant along one direction, the others along none."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        backdrops = {name: shapes._backdrop(name, 64, rng)[:, :, 0] for name in shapes.FACTORS["background"]}
        # Structure tensor: its eigenvalues are the energy of change along the two main directions.
        energy = {}
        for name, backdrop in backdrops.items():
            assert backdrop.min() >= 0 and backdrop.max() <= 1
            change = np.stack(np.gradient(backdrop)).reshape(2, -1)
            energy[name] = np.linalg.eigvalsh(change @ change.T)
        assert energy["plain"].max() == 0
        assert energy["striped"][0] < 0.05 * energy["striped"][1]
        for name in ("dotted", "checked"):
            assert energy[name][0] > 0.5 * energy[name][1], name
        assert 0 < energy["cloudy"].sum() < 0.5 * energy["dotted"].sum()
        dots = backdrops["dotted"].mean()
        assert dots == pytest.approx(np.pi * 0.09, abs=0.05)
        assert backdrops["checked"].mean() == pytest.approx(0.5, abs=0.05)


def test_difficulty_adds_noise_and_strokes():
    def other_pixels(index, difficulty):
        easy = np.asarray(shapes.draw(0, index, difficulty=0)[0], float)
        return np.abs(np.asarray(shapes.draw(0, index, difficulty=difficulty)[0], float) - easy).mean()

    small, full, twice = (np.mean([other_pixels(i, d) for i in range(20)]) for d in (0.1, 1, 2))
    assert 0 < small < full < twice


def test_the_table_and_the_pictures_agree_with_draw(tmp_path):
    table = shapes.write(tmp_path, 20, seed=5, image_size=32, held_out=0.25)
    assert table == tmp_path / "captions.tsv"
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert list(rows[0]) == ["filepath", "title", *shapes.FACTORS, "split"]
    assert [row.pop("split") for row in rows] == ["train"] * 15 + ["test"] * 5
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert [row["filepath"] for row in rows] == [f"{i:06d}.jpg" for i in range(20)] == names
    for index, row in enumerate(rows):
        image, truth = shapes.draw(5, index, image_size=32)
        stored = Image.open(tmp_path / "images" / row.pop("filepath"))
        assert row == truth and stored.format == "JPEG" and stored.size == (32, 32)
        # JPEG averages colour over 2 x 2 pixels, so edges differ; another sample differs by far more.
        assert np.abs(np.asarray(stored, float) - np.asarray(image, float)).mean() < 12
        assert np.abs(np.asarray(stored, float) - np.asarray(shapes.draw(5, index + 1, image_size=32)[0])).mean() > 14


def contents_of(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_same_parameters_give_the_same_bytes_and_another_seed_gives_others(tmp_path):
    def contents(name, seed):
        shapes.write(tmp_path / name, 6, seed=seed, image_size=16)
        return contents_of(tmp_path / name)

    one = contents("one", 0)
    assert list(one) == ["captions.tsv", *(f"images/00000{i}.jpg" for i in range(6)), "shapes.json"]
    assert contents("again", 0) == one
    other = contents("other", 1)
    assert list(other) == list(one) and all(other[name] != one[name] for name in one)


def test_complete_output_is_not_made_again(tmp_path, monkeypatch):
    table = shapes.write(tmp_path, 6, image_size=16)
    before = contents_of(tmp_path), [file.stat().st_mtime_ns for file in sorted(tmp_path.rglob("*"))]
    monkeypatch.setattr(shapes, "draw", None)
    assert shapes.write(tmp_path, 6, image_size=16) == table
    assert (contents_of(tmp_path), [file.stat().st_mtime_ns for file in sorted(tmp_path.rglob("*"))]) == before


@pytest.mark.parametrize("change", [{"size": 7}, {"seed": 1}, {"image_size": 17}, {"held_out": 0.5}, "world", "images"])
def test_output_of_other_parameters_or_without_its_images_is_made_again(tmp_path, monkeypatch, change):
    settings = {"size": 6, "seed": 0, "image_size": 16, "held_out": 1 / 6}
    shapes.write(tmp_path / "out", **settings)
    before = (tmp_path / "out" / "shapes.json").read_bytes()
    if change == "world":
        monkeypatch.setitem(shapes._WORLD, "version", -1)
    elif change == "images":
        shutil.rmtree(tmp_path / "out" / "images")
    else:
        settings |= change
    shapes.write(tmp_path / "out", **settings)
    shapes.write(tmp_path / "fresh", **settings)
    assert contents_of(tmp_path / "out") == contents_of(tmp_path / "fresh")
    assert ((tmp_path / "out" / "shapes.json").read_bytes() == before) == (change == "images")


def test_a_write_that_stops_half_way_leaves_nothing_that_counts_as_complete(tmp_path, monkeypatch):
    shapes.write(tmp_path, 4, image_size=16)
    draw = shapes.draw

    def stops(seed, index, **settings):
        if index == 3:
            raise KeyboardInterrupt
        return draw(seed, index, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shapes, "draw", stops)
        shapes.write(tmp_path, 6, image_size=16)
    assert not (tmp_path / "shapes.json").exists()
    shapes.write(tmp_path, 6, image_size=16)
    assert len([*(tmp_path / "images").iterdir()]) == 6


def test_the_smallest_world_has_one_training_row(tmp_path):
    lines = shapes.write(tmp_path, 1).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and lines[1].split("\t")[-1] == "train"


@pytest.mark.parametrize(("size", "image_size", "held_out"), [(0, 64, 0.1), (-3, 64, 0.1), (5, 15, 0.1), (5, 64, 1.0), (5, 64, -0.1)])
def test_write_refuses_values_out_of_range_and_makes_nothing(tmp_path, size, image_size, held_out):
    with pytest.raises(ValueError, match=f"size = {size} .*image_size = {image_size} .*held_out = {held_out} "):
        shapes.write(tmp_path / "out", size, image_size=image_size, held_out=held_out)
    assert not (tmp_path / "out").exists()
