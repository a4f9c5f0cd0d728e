"""Figures from arrays and tables: each function returns a matplotlib Figure, made without pyplot, and saves nothing."""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from protoclip_lab import randomness

# Okabe and Ito's colours, told apart with every common colour vision; the palest last.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
NOTE = {"fontsize": 8, "color": "#555555"}
WIDTH = 9.0  # inches: the width of a notebook's cell
STYLE = {"figure.dpi": 110, "font.size": 9, "axes.titlesize": 10, "legend.frameon": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}  # a caption may hold dollar signs
METHODS = {
    "umap": "UMAP, cosine distance, 15 neighbours, minimum distance 0.1",
    "tsne": "t-SNE, cosine distance, perplexity 30 or fewer",
    "pca": "first two principal components",
}


class _Figure(Figure):
    """A figure that a notebook shows by itself: without pyplot nobody else tells the notebook how."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def embed(features: np.ndarray, *, method: str = "umap", seed: int = 0) -> np.ndarray:
    """Two coordinates for each row: (N, d) -> (N, 2) float32.

    Args:
        method: "umap" | "tsne" | "pca", with the parameters of ``METHODS``.

    Raises:
        ValueError: unknown method, or fewer than four rows.
    """
    features = np.asarray(features, dtype=np.float32)
    if method not in METHODS:
        raise ValueError(f"method {method!r}: it is one of {', '.join(METHODS)}")
    if len(features) < 4:
        raise ValueError(f"a map needs at least 4 points, got {len(features)}")
    from sklearn import decomposition, manifold

    seed = randomness.derive(seed, "map") % 2**32
    if method == "pca":
        return decomposition.PCA(2, svd_solver="full").fit_transform(features).astype(np.float32)
    if method == "tsne":
        few = min(30.0, (len(features) - 1) / 3)
        return manifold.TSNE(perplexity=few, metric="cosine", init="random", random_state=seed).fit_transform(features)
    from umap import UMAP

    return UMAP(n_neighbors=min(15, len(features) - 1), metric="cosine", n_jobs=1, random_state=seed).fit_transform(features)


@matplotlib.rc_context(STYLE)
def joint_map(
    xy: np.ndarray, is_text: np.ndarray, *, gap: float | None = None, links: int = 60, method: str = "umap", seed: int = 0
) -> Figure:
    """Joint map of image and text features; lines join some of the pairs, the title tells the gap.

    Args:
        xy: (n, 2) from :func:`embed` over both modalities.
        is_text: (n,) bool.
        gap: the modality gap, as :func:`protoclip_lab.evaluation.modality_gap` measures it on the features; None
            leaves it out.
        links: how many lines join the i-th image with the i-th text, evenly taken from all; none if there are not
            as many of each.
        method, seed: what made ``xy``, stated under the figure.
    """
    is_text = np.asarray(is_text, dtype=bool)
    images, texts = np.flatnonzero(~is_text), np.flatnonzero(is_text)
    pairs = np.column_stack([images, texts]) if len(images) == len(texts) else np.zeros((0, 2), int)
    drawn = pairs[np.unique(np.linspace(0, len(pairs) - 1, min(links, len(pairs))).astype(int))]
    title = "Image and text features" + ("" if gap is None else f" · modality gap {gap:.3f}")
    groups = [("image", ~is_text, {"c": PALETTE[0], "marker": "o"}), ("text", is_text, {"c": PALETTE[1], "marker": "^"})]
    figure = _map(xy, groups, title, method, seed, f"{len(drawn)} of {len(pairs):,} pairs joined by a line · ")
    figure.axes[0].plot(*xy[drawn].T, color="#666666", linewidth=0.6, alpha=0.6, zorder=1)
    return figure


@matplotlib.rc_context(STYLE)
def cluster_map(xy: np.ndarray, labels: Sequence, *, names: Any = None, title: str = "", method: str = "umap", seed: int = 0) -> Figure:
    """Map of one modality coloured by prototype or by true label.

    Args:
        xy: (n, 2).
        labels: (n,) integers or words; of more than eight, the seven largest are coloured and the rest is grey.
        names: what integer label i is called; None writes the labels themselves.
        method, seed: what made ``xy``, stated under the figure.
    """
    labels = np.asarray(labels)
    values, counts = np.unique(labels, return_counts=True)
    shown = np.argsort(-counts, kind="stable")[: len(PALETTE) if len(values) <= len(PALETTE) else len(PALETTE) - 1]
    groups = []
    for colour, i in zip(PALETTE, shown, strict=False):
        name = _legible(str(values[i] if names is None else names[values[i]]))
        groups.append((textwrap.shorten(name, 32, placeholder="…"), labels == values[i], {"c": colour}))
    if (rest := ~np.isin(labels, values[shown])).any():
        groups.append((f"{len(values) - len(shown)} others", rest, {"c": "#BBBBBB", "zorder": 0}))
    return _map(xy, groups, f"{title} ({len(values)} groups)" if title else f"{len(values)} groups", method, seed)


@matplotlib.rc_context(STYLE)
def prototype_sheet(images: Sequence[Sequence[Any]], captions: Sequence[Sequence[str]], names: Sequence[str]) -> Figure:
    """One row per prototype: the samples nearest to it with their captions.

    Args:
        images: for each prototype its nearest images (PIL or (H, W, 3)); none for an empty one.
        captions: for each prototype the captions of those images.
        names: for each prototype what stands left of its row, e.g. ``"prototype 17\n34 samples"``.
    """
    columns = max([1, *map(len, images)])
    heights = [1.8 if len(row) else 0.5 for row in images]
    figure = _Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    shape = {"squeeze": False, "height_ratios": heights, "width_ratios": [1.2] + [(WIDTH - 1.2) / columns] * columns}
    grid = figure.subplots(len(images), columns + 1, subplot_kw={"frame_on": False, "xticks": [], "yticks": []}, **shape)
    for axes, row, texts, name in zip(grid, images, captions, names, strict=True):
        axes[0].text(1, 0.5, name, ha="right", va="center", fontweight="bold", transform=axes[0].transAxes)
        if not len(row):
            axes[1].text(0, 0.5, "no members", va="center", color=NOTE["color"], transform=axes[1].transAxes)
        for cell, image, text in zip(axes[1:], row, texts, strict=False):
            cell.imshow(image)
            lines = textwrap.fill(_legible(text), int(WIDTH / columns * 12), max_lines=3, placeholder=" …")
            cell.text(0.5, -0.03, lines, ha="center", va="top", fontsize=7, transform=cell.transAxes)
    return figure


@matplotlib.rc_context(STYLE)
def progress_curves(table: pd.DataFrame, columns: Sequence[str], *, x: str = "episode", by: str = "run") -> Figure:
    """Metrics against episodes: a panel for each column, a line for each run.

    Args:
        table: a row per measurement, e.g. ``Run.metrics()``; several runs concatenated, told apart by column ``by``,
            which may be missing when there is one.
        columns: what to draw; values that are NaN are left out of their line.
    """
    runs = list(dict.fromkeys(table[by])) if by in table else [None]
    figure, panels = _panels(len(columns))
    for axes, column in zip(panels, columns, strict=True):
        for i, run in enumerate(runs):
            line = (table if run is None else table[table[by] == run])[[x, column]].dropna().sort_values(x)
            axes.plot(line[x], line[column], "o" + ("-", "--", "-.", ":")[i % 4], color=PALETTE[i % 7], markersize=3, label=str(run))
        if not table[column].notna().any():
            axes.text(0.5, 0.5, "no values", ha="center", transform=axes.transAxes)
        axes.set(title=textwrap.fill(column.replace("_", " "), 26), xlabel=x)
        axes.locator_params("x", integer=True)
    if len(runs) > 1:
        figure.legend(handles=panels[0].lines, loc="outside upper center", ncols=min(4, len(runs)))
    return figure


@matplotlib.rc_context(STYLE)
def comparison(table: pd.DataFrame, measures: Sequence[str] | None = None, *, by: str = "arm") -> Figure:
    """Arms side by side, a panel for each measure: mean ± standard deviation over seeds, and each seed as a dot.

    Args:
        table: a row per run with its arm in column ``by``.
        measures: columns to draw; None draws all numeric ones but ``seed``.
    """
    measures = [name for name in table.select_dtypes("number") if name not in (by, "seed")] if measures is None else measures
    arms = list(dict.fromkeys(table[by]))
    figure, panels = _panels(len(measures), height=0.9 + 0.4 * len(arms), sharey=True)
    for axes, measure in zip(panels, measures, strict=True):
        for arm, found in table.dropna(subset=[measure]).groupby(by, sort=False)[measure]:
            i, values = arms.index(arm), found.to_numpy(dtype=float)
            mean, spread = values.mean(), values.std(ddof=1) if len(values) > 1 else None
            axes.errorbar(mean, i, xerr=spread, fmt="o", color=PALETTE[i % 7], capsize=3)
            axes.scatter(values, np.full(len(values), i + 0.2), s=8, color=PALETTE[i % 7], alpha=0.6, linewidths=0)
            digits = 1 if abs(mean) >= 10 else 2 if abs(mean) >= 1 else 3
            text = f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
            axes.annotate(text, (mean, i), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        axes.set(title=measure.replace("_", " "), xmargin=0.35, ylim=(len(arms) - 0.4, -0.7))
        axes.set_yticks(range(len(arms)), [f"{arm} (n = {(table[by] == arm).sum()})" for arm in arms])
    figure.supxlabel("mean ± standard deviation where there are several seeds; small dots are single runs", **NOTE)
    return figure


def _map(xy, groups, title, method, seed, note="") -> Figure:
    """Points whose coordinates mean nothing by themselves, in groups of (label, rows, how they look)."""
    figure = _Figure(figsize=(WIDTH, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel="first coordinate", ylabel="second coordinate", xticks=[], yticks=[])
    made = f"{len(xy):,} points · {METHODS[method]}" + ("" if method == "pca" else f", seed {seed}")
    figure.supxlabel(note + made, **NOTE)
    size = np.clip(20000 / max(len(xy), 1), 4, 30)
    for label, rows, look in groups:
        axes.scatter(*xy[rows].T, label=f"{label} ({rows.sum():,})", s=size, alpha=0.7, linewidths=0, **look)
    for handle in axes.legend(loc="center left", bbox_to_anchor=(1, 0.5)).legend_handles:
        handle.set(sizes=[30], alpha=1)
    return figure


def _panels(count: int, height: float = 2.5, **shared) -> tuple[Figure, list]:
    """Small multiples, at most three in a row."""
    if not count:
        raise ValueError("nothing to draw: no column is named, or none holds numbers")
    columns = 2 if count == 4 else min(3, count)
    rows = -(-count // columns)
    figure = _Figure(figsize=(WIDTH, max(3.0, height * rows)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **shared).ravel()
    for spare in grid[count:]:
        spare.remove()
    return figure, list(grid[:count])


def _legible(text: str) -> str:
    """Letters that the figure's font lacks as empty boxes, without a warning for each."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    return "".join(c if ord(c) in known or c.isspace() else "□" for c in text)
