"""A procedural captioned world: one shape on a backdrop, every latent factor known.

The zero-download default data and the ground truth for grouping. An image has one value of each factor, drawn
uniformly and independently; its caption names some of them and leaves the rest out, as captions on the web do.
Everything follows from (seed, index), so neither order nor number of processes changes a sample.
"""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from protoclip_lab.data.pairs import Pairs, prepare
from protoclip_lab.randomness import numpy_generator

_OVERSAMPLING = 4  # masks are drawn at 4 x and averaged: anti-aliasing that Pillow's polygons lack

_WORLD = yaml.safe_load(Path(__file__).with_name("shapes.yaml").read_text("utf-8"))
# What a zero-shot classifier of a factor asks.
PROMPTS: dict[str, list[str]] = _WORLD["prompts"]


def _outlines():
    """Names and outlines: complex numbers (x right, y down), the box around each centred, the farthest point at 1."""
    turn = np.exp(2j * np.pi * np.arange(72) / 72)
    # The crescent is the unit disc less a disc of radius 0.8 at 0.5: their rims meet at these angles.
    rim, bite = np.linspace((0.29, 1.54), (1.71, 0.46), 48).T * np.pi
    raw = {
        "circle": turn,
        "square": np.exp(2j * np.pi * (np.arange(4) + 0.5) / 4),
        "triangle": np.exp(2j * np.pi * (np.arange(3) / 3 - 0.25)),
        "star": np.tile([1, 0.42], 5) * np.exp(2j * np.pi * (np.arange(10) / 10 - 0.25)),
        "heart": 16 * turn.imag**3 - 1j * (13 * turn - 5 * turn**2 - 2 * turn**3 - turn**4).real,
        "cross": np.concatenate([np.array([1 + 0.36j, 0.36 + 0.36j, 0.36 + 1j]) * 1j**quarter for quarter in range(4)]),
        "ring": np.concatenate([turn, turn[:1], 0.58 * turn[:1], 0.58 * turn[::-1]]),
        "crescent": np.concatenate([np.exp(1j * rim), 0.5 + 0.8 * np.exp(1j * bite)]),
    }
    for name, z in raw.items():
        middle = (z.real.min() + z.real.max()) / 2 + 1j * (z.imag.min() + z.imag.max()) / 2
        yield name, (z - middle) / np.abs(z - middle).max()


# The values of each factor by name, and the names alone.
_VALUES = {"shape": dict(_outlines()), **_WORLD["factors"]}
FACTORS: dict[str, tuple[str, ...]] = {factor: tuple(values) for factor, values in _VALUES.items()}


def _share(mask: Image.Image) -> np.ndarray:
    """8-bit image -> (side, side, 1) in [0, 1]."""
    return np.asarray(mask, np.float32)[:, :, None] / 255


def _backdrop(background: str, image_size: int, rng: np.random.Generator) -> np.ndarray:
    """Share of the backdrop's second tone in each pixel, (image_size, image_size, 1) in [0, 1]."""
    if background == "plain":
        return np.zeros((image_size, image_size, 1), np.float32)
    if background == "cloudy":
        coarse = Image.fromarray(rng.integers(0, 2, (6, 6), np.uint8) * np.uint8(255))
        return _share(coarse.resize((image_size, image_size), Image.Resampling.BICUBIC))
    angle, periods, right, down = rng.uniform((0, 3.5, 0, 0), (np.pi, 5.5, 1, 1)).tolist()
    along = np.linspace(0, periods, image_size * _OVERSAMPLING, dtype=np.float32)
    cos, sin = np.float32([np.cos(angle), np.sin(angle)])
    u = (cos * along + sin * along[:, None] + right) % 1
    v = (cos * along[:, None] - sin * along + down) % 1
    mask = {"striped": u < 0.5, "checked": (u < 0.5) ^ (v < 0.5), "dotted": (u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.09}
    return _share(Image.fromarray(mask[background].view(np.uint8) * np.uint8(255)).reduce(_OVERSAMPLING))


def draw(seed: int, index: int, *, image_size: int = 64, difficulty: float = _WORLD["difficulty"]) -> tuple[Image.Image, dict]:
    """Sample ``index`` of the world ``seed``.

    Args:
        image_size: side in pixels; below 16 the shapes cannot be told apart. Factors and caption do not depend on it.
        difficulty: factor on the nuisances; beyond 2 colours and sizes run into each other. Factors and caption do not
            depend on it.

    Returns:
        RGB image, and a row with the caption ("title") and one value per factor of FACTORS.
    """
    rng = numpy_generator(seed, "shapes", index)
    row = {factor: values[rng.integers(len(values))] for factor, values in FACTORS.items()}
    words = {factor: str(rng.choice(_WORLD["synonyms"].get(value, [value]))) for factor, value in row.items()}
    title = re.sub(r"\ba (?=[aeiou])", "an ", str(rng.choice(_WORLD["templates"])).format(**words))

    radius = _VALUES["size"][row["size"]] * (1 + _WORLD["size_change"] * difficulty * rng.uniform(-1, 1))
    towards = np.array(_VALUES["position"][row["position"]]) * (rng.choice((-1, 1), 2) if row["position"] in ("corner", "side") else 1)
    # At the edge a small shape touches the frame, a large one is cut a little: both stay in sight of a random crop.
    x, y = 0.5 + towards * (0.45 - 0.7 * radius) + 0.05 * difficulty * rng.uniform(-1, 1, 2)
    # In radians; twice this is 29 degrees, not yet a diamond for a square.
    turn = np.exp(1j * (0.25 * difficulty * rng.uniform(-1, 1)))
    canvas = image_size * _OVERSAMPLING
    outline = (_VALUES["shape"][row["shape"]] * turn * radius + x + 1j * y) * canvas
    shape, clutter = (Image.new("L", (canvas, canvas)) for _ in range(2))
    ImageDraw.Draw(shape).polygon(outline.view(float).tolist(), fill=255)
    # Behind the shape, strokes of one random colour, 1.5 on average.
    for start in rng.uniform(0, 1, (rng.poisson(1.5 * difficulty), 2)):
        end = start + rng.uniform(-0.2, 0.2, 2)
        ImageDraw.Draw(clutter).line([*(start * canvas), *(end * canvas)], fill=255, width=canvas // 40)

    tone = rng.uniform(0.8, 0.95) + rng.uniform(-0.05, 0.05, 3)
    # Patterns are faint on purpose: with strong ones CLIP learned the background first and the shape hardly at all.
    pixels = tone - rng.uniform(0.1, 0.2) * _backdrop(row["background"], image_size, rng)
    stroke = _VALUES["colour"][rng.choice(FACTORS["colour"])]
    colour = _VALUES["colour"][row["colour"]] + _WORLD["colour_shift"] * difficulty * rng.uniform(-1, 1, 3)
    for mask, paint in ((clutter, stroke), (shape, colour)):
        pixels += _share(mask.reduce(_OVERSAMPLING)) * (paint - pixels)
    slope = rng.uniform(-0.25, 0.25, 2)
    ramp = np.linspace(-1, 1, image_size)
    # Light makes one side darker, never brighter, which would turn orange to yellow.
    pixels *= 1 - 0.3 * difficulty * (0.5 + slope[0] * ramp + slope[1] * ramp[:, None])[:, :, None]
    pixels += 0.04 * difficulty * rng.standard_normal((image_size, image_size, 1), np.float32)
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8)), {"title": title, **row}


def write(out: Path, size: int, *, seed: int = 0, image_size: int = 64, held_out: float = 1 / 6) -> Path:
    """Samples 0 … size - 1 of a world as a training table and a folder of JPEGs.

    Makes ``images/`` (``000000.jpg`` …), ``captions.tsv`` (filepath, title, one column per factor, split) and, last,
    ``shapes.json`` with the parameters. Where that note already says the same, nothing is drawn. The same parameters
    give the same bytes.

    Args:
        held_out: share of samples, the last indices, whose ``split`` is "test"; the others are "train".

    Returns:
        Path of ``captions.tsv``.

    Raises:
        ValueError: size below 1, image_size below 16, or held_out outside [0, 1).
    """
    if size < 1 or image_size < 16 or not 0 <= held_out < 1:
        raise ValueError(f"size = {size} must be at least 1, image_size = {image_size} at least 16, held_out = {held_out} in [0, 1)")
    table, images, note = out / "captions.tsv", out / "images", out / "shapes.json"
    made = json.dumps({"size": size, "seed": seed, "image_size": image_size, "held_out": held_out, "world": _WORLD}, indent=2)
    if table.is_file() and images.is_dir() and note.is_file() and note.read_text("utf-8") == made:
        return table
    note.unlink(missing_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in tqdm(range(size), desc="drawing shapes", unit="image", mininterval=2):
        image, row = draw(seed, index, image_size=image_size)
        image.save(images / f"{index:06d}.jpg", quality=90)
        rows.append({"filepath": f"{index:06d}.jpg", **row, "split": "train" if index < size - round(size * held_out) else "test"})
    pd.DataFrame(rows).to_csv(table, sep="\t", index=False, lineterminator="\n")
    note.write_text(made, "utf-8")
    return table


def open_pairs(output: str | Path, table: str = "shapes", *, size: int = 6000, image_size: int = 64, seed: int = 0, **options) -> Pairs:
    """The pairs of a table, prepared in ``output/pairs`` unless they are already.

    Args:
        output: folder for what has to be made.
        table: for :func:`protoclip_lab.data.pairs.prepare`; the word "shapes" draws the embedded world into
            ``output`` and takes its training split.
        size, image_size, seed: of that world.
        options: the other arguments of ``prepare``.
    """
    if table == "shapes":
        table = write(Path(output), size, seed=seed, image_size=image_size)
        options |= {"image_root": table.with_name("images"), "where": options.get("where") or {"split": "train"}}
    return prepare(table, Path(output) / "pairs", **options)
