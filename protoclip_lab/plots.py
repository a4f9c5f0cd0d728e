"""Figures from arrays and tables: each function returns a matplotlib Figure, made without pyplot, and saves nothing.

Every one takes ``paper=True``: one column wide, 7 pt, for a vector PDF; without it, as wide as a notebook's cell.
"""

import base64
import functools
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure

from protoclip_lab import randomness
from protoclip_lab.config import require

# Colours, matplotlib's settings for a notebook and for a paper, and what methods of maps are called: see the file.
LOOK: dict[str, dict] = yaml.safe_load((Path(__file__).parent / "templates" / "plots.yaml").read_text("utf-8"))
HUES, METHODS = LOOK["hues"], LOOK["methods"]
PALETTE = tuple(HUES.values())
LOOKS = [{"c": colour, "marker": marker} for marker in "o^s" for colour in PALETTE]
LINES = matplotlib.cycler(color=PALETTE[:7] * 4, linestyle=("-", "--", "-.", ":") * 7)
GREY, OTHERS = "#555555", {"c": "#CCCCCC", "zorder": 0}
MAX_POINTS = 20_000  # of a map


class _Figure(Figure):
    """A figure that a notebook shows by itself: without pyplot nobody else tells the notebook how."""

    def savefig(self, *args: Any, **options: Any) -> None:
        with matplotlib.rc_context({"pdf.fonttype": 42}):  # letters stay letters in a PDF
            super().savefig(*args, **options)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


class Animation(bytes):
    """A GIF that a notebook shows by itself, embedded; saved as ``.gif`` whatever ending a figure would get."""

    def savefig(self, path: str | Path) -> None:
        Path(path).with_suffix(".gif").write_bytes(self)

    def _repr_html_(self) -> str:
        return f'<img alt="animation" src="data:image/gif;base64,{base64.b64encode(self).decode()}">'


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @functools.wraps(draw)
    def drawn(*args: Any, paper: bool = False, **options: Any) -> Figure:
        with matplotlib.rc_context(LOOK["paper" if paper else "notebook"] | {"axes.prop_cycle": LINES}):
            figure = draw(*args, **options)
        figure.paper = paper
        return figure

    return drawn


def embed(features: np.ndarray, *, method: str = "umap", seed: int = 0, like: np.ndarray | None = None) -> np.ndarray:
    """Two coordinates for each row: (N, d) -> (N, 2) float32.

    Args:
        method: "umap" | "tsne" | "pca", with the parameters of ``METHODS``.
        like: a map of the same rows, (N, 2), that this one is to resemble, so that points move between the two and do
            not jump: UMAP and t-SNE start from it, and every map is turned, mirrored and scaled onto it (Procrustes).

    Raises:
        ValueError: unknown method, or fewer than four rows.
    """
    features = np.asarray(features, dtype=np.float32)
    require(method in METHODS, f"method {method!r}: it is one of {', '.join(METHODS)}")
    require(len(features) >= 4, f"a map needs at least 4 points, got {len(features)}")
    from sklearn import decomposition, manifold

    options = {"metric": "cosine", "random_state": randomness.derive(seed, "map") % 2**32}
    if method == "pca":
        xy = decomposition.PCA(2, svd_solver="full").fit_transform(features)
    elif method == "tsne":
        few = min(30.0, (len(features) - 1) / 3)
        xy = manifold.TSNE(perplexity=few, init="random" if like is None else like, **options).fit_transform(features)
    else:
        from umap import UMAP

        # From a map that is there already, in small steps: neighbours come out as well, and points stay where they can.
        options |= {"init": "pca"} if like is None else {"init": like, "n_epochs": 100, "learning_rate": 0.1}
        bar = {"disable": False, "desc": "UMAP", "mininterval": 2, "leave": False}
        xy = UMAP(n_neighbors=min(15, len(features) - 1), n_jobs=1, tqdm_kwds=bar, **options).fit_transform(features)
    return (xy if like is None else _onto(xy, like)).astype(np.float32)


def stratified(labels: Sequence, most: int, *, seed: int = 0) -> np.ndarray:
    """Row numbers of a sample, ascending, that holds of each label its share: (n,) -> (min(n, most),)."""
    order = randomness.numpy_generator(seed, "stratified").permutation(len(labels))
    groups = pd.Series(order).groupby(np.asarray(labels)[order])
    # Each label's rows spread evenly over (0, 1): any beginning holds of each label its share.
    places = (groups.cumcount() + 0.5) / groups.transform("size")
    return np.sort(order[np.argsort(places, kind="stable")[:most]])


@_styled
def joint_map(xy: np.ndarray, is_text: Sequence, *, gap: float | None = None, links: int = 60, method="umap", seed=0) -> Figure:
    """Joint map of image and text features; lines join some of the pairs, an arrow the two means.

    Args:
        xy: (n, 2) from :func:`embed` over both modalities; rows of NaN are not drawn.
        is_text: (n,) bool.
        gap: the modality gap, as :func:`protoclip_lab.evaluation.modality_gap` measures it on the features, written at
            the arrow; None leaves both out.
        links: how many lines join the i-th image with the i-th text, evenly taken from all; none if there are not
            as many of each.
        method, seed: what made ``xy``, stated under the figure.
    """
    is_text = np.asarray(is_text, dtype=bool)
    images, texts = np.flatnonzero(~is_text), np.flatnonzero(is_text)
    pairs = np.column_stack([images, texts]) if len(images) == len(texts) else np.zeros((0, 2), int)
    pairs = pairs[np.isfinite(xy[pairs]).all(axis=(1, 2))]
    drawn = pairs[np.unique(np.linspace(0, len(pairs) - 1, min(links, len(pairs))).astype(int))]
    groups = [("image", ~is_text, LOOKS[0]), ("text", is_text, LOOKS[len(PALETTE) + 1])]
    title = "Image and text features" + ("" if gap is None else f" · modality gap {gap:.3f}")
    figure, (axes,) = _maps({title: (xy, groups)}, method, seed, f"{len(drawn)} of {len(pairs):,} pairs joined by a line · ")
    axes.plot(*xy[drawn].T, "-", color="#666666", linewidth=0.6, alpha=0.6, zorder=1)
    if gap is not None:
        ends = [np.nanmean(xy[rows], axis=0) for rows in (images, texts)]
        axes.annotate("", ends[1], ends[0], arrowprops={"arrowstyle": "<->", "linewidth": 2, "shrinkA": 0, "shrinkB": 0})
        _name(axes, f"gap {gap:.3f}", np.mean(ends, axis=0), "black")
    return figure


@_styled
def cluster_map(xy: Any, labels: Any, *, names: Sequence | None = None, title: str = "", method="umap", seed=0) -> Figure:
    """Maps of one modality coloured by prototype, by true label, or at several moments.

    Args:
        xy: (n, 2); rows of NaN are not drawn. A dict of several by title draws a panel for each, on common axes.
        labels: (n,) integers or words; of more than 24, the 23 largest are told apart and the rest is grey. A dict of
            several by title draws a panel for each.
        names: what integer label i is called; the seven largest then bear their number on the map too.
        method, seed: what made ``xy``, stated under the figure.
    """
    if isinstance(labels, Mapping):
        return _maps({name: (xy, _groups(found, names)) for name, found in labels.items()}, method, seed)[0]
    groups = _groups(labels, names)
    if isinstance(xy, Mapping):
        figure, _ = _maps({name: (then, groups) for name, then in xy.items()}, method, seed, common=True)
        figure.suptitle(title)
        return figure
    count = f"{len(np.unique(labels))} groups"
    figure, (axes,) = _maps({f"{title} ({count})" if title else count: (xy, groups)}, method, seed)
    for name, rows, look in groups[:7] if names is not None else []:
        _name(axes, name.split(" ")[0], np.nanmedian(xy[rows], axis=0), look["c"])
    return figure


def moving_map(maps: Mapping[str, Any], labels: Sequence, *, title: str = "", method="umap", seed=0, steps: int = 8) -> Animation:
    """An animation from map to map, each (n, 2) under its name, coloured as by :func:`cluster_map`."""
    from PIL import Image

    groups, names, places, frames = _groups(labels, None), list(maps), np.stack([*maps.values()]), []
    with matplotlib.rc_context(LOOK["notebook"] | {"figure.figsize": (6.5, 4.2)}):
        figure, (axes,) = _maps({names[0]: (places[0], groups)}, method, seed)
        figure.suptitle(title)
    axes.update_datalim(places[np.isfinite(places).all(axis=2)])
    axes.autoscale_view()
    eased = 0.5 - 0.5 * np.cos(np.pi * np.arange(1, steps + 1) / steps)
    moments = np.append(0, np.add.outer(np.arange(len(maps) - 1), eased))
    for moment in moments:
        before, after = places[int(moment)], places[int(np.ceil(moment))]
        for points, (_, rows, _) in zip(axes.collections, groups, strict=True):
            points.set_offsets((before + moment % 1 * (after - before))[rows])
        axes.set_title(names[round(moment)])
        frames.append(Image.open(io.BytesIO(figure._repr_png_())).convert("RGB").quantize(64))
    file, stay = io.BytesIO(), np.where(moments % 1, 60, 1500).tolist()
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:], duration=stay, loop=0)
    return Animation(file.getvalue())


@_styled
def prototype_sheet(images: Sequence, captions: Sequence, names: Sequence[str], *, headings: Mapping[str, int] | None = None) -> Figure:
    """One row per prototype: the samples nearest to it with their captions.

    Args:
        images: for each prototype its nearest images (PIL or (H, W, 3)). None leaves a place free.
        captions: for each prototype the captions of those images.
        names: for each prototype what stands left of its row, in lines.
        headings: what stands above the columns, by the column where it begins.
    """
    width = matplotlib.rcParams["figure.figsize"][0]
    widths = np.array([0.3 if image is None else 1 for image in max(images, key=len)])
    cell = 0.84 * width / widths.sum()
    names = ["\n".join(textwrap.fill(_legible(line), 24) for line in name.split("\n")) for name in names]
    heights = [max(cell + 0.4, 0.13 * name.count("\n") + 0.3) for name in names]
    figure = _Figure(figsize=(width, sum(heights) + 0.3))
    shape = {"squeeze": False, "height_ratios": heights, "width_ratios": [0.16 * width, *(cell * widths)]}
    grid = figure.subplots(len(images), len(widths) + 1, subplot_kw={"frame_on": False, "xticks": [], "yticks": []}, **shape)
    for axes, row, texts, name in zip(grid, images, captions, names, strict=True):
        axes[0].text(1, 1, name, ha="right", va="top", fontsize=7, transform=axes[0].transAxes)
        for place, image, text in zip(axes[1:], row, texts, strict=False):
            if image is not None:
                place.imshow(image)
            lines = textwrap.fill(_legible(text), max(8, int(cell * 15)), max_lines=3, placeholder=" …")
            place.text(0.5, -0.03, lines, ha="center", va="top", fontsize=7, transform=place.transAxes)
    for heading, column in (headings or {}).items():
        grid[0, column + 1].set_title(heading, loc="left")
    return figure


@_styled
def cluster_sizes(sizes: Mapping[str, np.ndarray]) -> Figure:
    """Members of each cluster, largest first, a line for each grouping: by name (K,). Empty clusters are counted."""
    figure, (axes,) = _panels(1, 3.2)
    for name, counts in sizes.items():
        label = f"{name}: {len(counts)} clusters, {(counts == 0).sum()} empty, median {np.median(counts):g}, largest {counts.max()}"
        axes.step(np.arange(1, len(counts) + 1), np.sort(counts)[::-1], where="mid", label=label)
    axes.set(title="Cluster sizes", xlabel="clusters by size", ylabel="members", ylim=(0, None))
    axes.legend()
    return figure


@_styled
def heat_map(table: pd.DataFrame, *, title: str = "") -> Figure:
    """A table as colours, 0 white; up to 12 rows and columns with names and numbers. The names of its axes are written."""
    width = min(5.5, matplotlib.rcParams["figure.figsize"][0])
    figure = _Figure(figsize=(width, 0.8 * width))
    axes = figure.subplots()
    norm = matplotlib.colors.PowerNorm(0.5, 0, np.nanmax(table), clip=True)  # so that small values are seen beside large ones
    figure.colorbar(axes.imshow(table, cmap="Blues", norm=norm, interpolation="nearest"))
    axes.set(title=title, xlabel=table.columns.name, ylabel=table.index.name)
    if max(table.shape) <= 12:
        axes.set_xticks(range(table.shape[1]), table.columns, rotation=30, ha="right")
        axes.set_yticks(range(table.shape[0]), table.index)
        for (row, column), value in np.ndenumerate(table.to_numpy()):
            colour = "white" if value > 0.3 * np.nanmax(table) else "black"
            axes.text(column, row, f"{round(value, 2) + 0:.2f}", ha="center", va="center", fontsize=7, color=colour)
    return figure


def on_the_diagonal(table: pd.DataFrame) -> pd.DataFrame:
    """A contingency table with rows and columns in the order that brings the most onto its diagonal, largest first."""
    from scipy.optimize import linear_sum_assignment

    counts = table.to_numpy()
    matched = np.array(linear_sum_assignment(-counts))
    matched = matched[:, np.argsort(-counts[tuple(matched)], kind="stable")]
    rows, columns = (np.append(found, np.setdiff1d(range(n), found)) for found, n in zip(matched, counts.shape, strict=True))
    return table.iloc[rows, columns]


@_styled
def soft_targets(images: Sequence, captions: Sequence, names: Sequence, teacher: Any, student: Any, *, title: str = "") -> Figure:
    """For some samples the teacher's and the student's distribution over the prototypes that weigh most in either.

    Args:
        images, captions: the m samples; none draws an empty figure that says so.
        names: of the K prototypes.
        teacher, student: (m, K), each row sums to 1.
    """
    if not len(images):
        (figure := _Figure(figsize=(matplotlib.rcParams["figure.figsize"][0], 0.5))).suptitle("No prototypes at this checkpoint")
        return figure
    figure, panels = _panels(len(images), 2.2)
    figure.suptitle(title)
    for axes, image, caption, *shares in zip(panels, images, captions, teacher, student, strict=False):
        top = np.argsort(-np.maximum(*shares), kind="stable")[:5]
        for i, who in enumerate(("teacher", "student")):
            axes.barh(np.arange(len(top)) + 0.4 * i - 0.2, shares[i][top], 0.4, color=PALETTE[i], label=who)
        axes.set_yticks(range(len(top)), [textwrap.fill(_legible(names[k]), 16) for k in top], fontsize=7)
        axes.set(xlim=(0, 1), ylim=(len(top) - 0.5, -0.5), title=textwrap.fill(_legible(caption), 28, max_lines=2, placeholder=" …"))
        corner = axes.inset_axes([0.55, 0.03, 0.45, 0.55], anchor="SE")
        corner.imshow(image)
        corner.set_axis_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def gap_sweep(table: pd.DataFrame, **options: Any) -> Figure:
    """Measures against the share of the gap by which images and texts were moved together, with their intervals.

    Args:
        table: rows of ``Run.evaluations()`` of one checkpoint; those whose measure is ``gap_sweep_NAME@SHARE`` are drawn.
    """
    x = "share of the gap closed"
    swept = table["measure"].str.extract(r"^gap_sweep_(.+)@(.+)").set_axis(["name", x], axis=1).dropna().astype({x: float}).join(table)
    kinds = {"value": "", "low": "/low", "high": "/high"}
    parts = [swept.pivot(index=["dataset", x], columns="name", values=kind).add_suffix(kinds[kind]) for kind in kinds]
    return progress_curves(pd.concat(parts, axis=1).reset_index(), swept["name"].unique(), x=x, by="dataset", marks=[0], **options)


def training_curves(metrics: pd.DataFrame, infonce_warmup_episodes=0, lit_start_episode: int | None = None, **options: Any) -> Figure:
    """Losses, prototype accuracies, gap and spread through training; ends of episodes and stages without prototypes marked.

    Args:
        metrics: ``Run.metrics()``; drawn are the means of up to 60 stretches of it.
        infonce_warmup_episodes, lit_start_episode: as in the run's config.
    """
    ends = metrics.groupby("episode")["step"].max()
    stages = {"warm-up": (0, ends.loc[:infonce_warmup_episodes].max())} if infonce_warmup_episodes else {}
    if lit_start_episode is not None and lit_start_episode in ends:
        stages["image tower locked"] = (ends.loc[: lit_start_episode - 1].max(), ends.max())
    steps, episodes = (metrics[metrics["kind"] == kind] for kind in ("step", "episode"))
    means = steps.groupby(steps["step"] * 60 // (ends.max() + 1)).mean(numeric_only=True)
    panels = {"loss": (means, "loss/"), "accuracy": (means, "accuracy/"), "gap and std": (episodes, ("gap", "image_", "text_"))}
    parts = []
    for panel, (rows, kind) in panels.items():
        own = rows[["step", *(name for name in rows if name.startswith(kind))]]
        parts.append(own.rename(columns=lambda name: name.rpartition("/")[2].replace("_", " ")).melt("step", None, "run", panel))
    table = pd.concat(parts).dropna(axis=1, how="all")
    return progress_curves(table, table.columns.drop(["step", "run"]), x="step", stages=stages, marks=ends.iloc[:-1], **options)


@_styled
def progress_curves(
    table: pd.DataFrame, columns: Sequence[str], *, x="episode", by="run", stages: Mapping | None = None, marks: Sequence[float] = ()
) -> Figure:
    """Metrics against episodes: a panel for each column, a line for each run.

    Args:
        table: a row per measurement, e.g. ``Run.metrics()``; several runs concatenated, told apart by column ``by``,
            which may be missing when there is one.
        columns: what to draw; values that are NaN are left out of their line. Columns ``NAME/low`` and ``NAME/high``
            are drawn as the interval of ``NAME``.
        x, by: columns.
        stages: stretches of x to shade, by name.
        marks: where on x a thin line stands.
    """
    table = table if by in table else table.assign(**{by: ""})
    figure, panels = _panels(len(columns))
    for axes, column in zip(panels, columns, strict=True):
        for run, rows in table.groupby(by, sort=False):
            line = rows.dropna(subset=column).sort_values(x)
            (drawn,) = axes.plot(
                line[x], line[column], marker="o" if len(line) < 50 else "", markersize=3, linewidth=1.2, label=str(run)
            )
            if f"{column}/low" in line:
                ends = line[f"{column}/low"], line[f"{column}/high"]
                axes.fill_between(line[x], *ends, color=drawn.get_color(), alpha=0.15, linewidth=0)
        for stage, colour in zip(stages or {}, PALETTE[4:], strict=False):
            axes.axvspan(*stages[stage], color=colour, alpha=0.2, linewidth=0, label=stage)
        for mark in marks if len(marks) < 50 else ():
            axes.axvline(mark, color=OTHERS["c"], linewidth=0.5, zorder=0)
        axes.set(title=textwrap.fill(column.replace("_", " "), 26), xlabel=x)
        axes.locator_params("x", integer=True)
    if known := panels[0].get_legend_handles_labels()[0]:
        figure.legend(handles=known, loc="outside upper center", ncols=4 if figure.get_figwidth() > 5 else 2)
    return figure


def _onto(xy: np.ndarray, other: np.ndarray) -> np.ndarray:
    """``xy`` turned, mirrored, scaled and moved to lie as near as can be to ``other``."""
    from scipy.linalg import orthogonal_procrustes

    centred = xy - xy.mean(axis=0)
    turn, overlap = orthogonal_procrustes(centred, other - other.mean(axis=0))
    return centred @ turn * overlap / max(np.square(centred).sum(), 1e-12) + other.mean(axis=0)


def _groups(labels: Sequence, names: Sequence[str] | None) -> list[tuple[str, np.ndarray, dict]]:
    """Rows of each label with a name and a look: (name, rows, look). Few labels in their order, many by size."""
    labels = np.asarray(labels)
    values, counts = np.unique(labels, return_counts=True)
    looks = LOOKS if matplotlib.rcParams["figure.figsize"][0] > 5 else LOOKS[: len(PALETTE)]
    # Few labels have their looks in every figure; and what is called red is not drawn in blue.
    order = np.arange(len(values)) if len(values) <= len(PALETTE) else np.argsort(-counts, kind="stable")
    shown = order[: len(looks) if len(values) <= len(looks) else len(looks) - 1]
    if set(values.tolist()) <= set(HUES):
        looks = [LOOKS[0] | {"c": HUES[value]} for value in values]
    texts = [str(values[i] if names is None else names[values[i]]) for i in shown]
    texts = [textwrap.shorten(_legible(text), 32, placeholder="…") for text in texts]
    groups = [(text, labels == values[i], look) for text, i, look in zip(texts, shown, looks, strict=False)]
    rest = ~np.isin(labels, values[shown])
    return groups + ([(f"{len(values) - len(shown)} others", rest, OTHERS)] if rest.any() else [])


def _maps(maps: Mapping[str, tuple], method: str, seed: int, note: str = "", *, common: bool = False) -> tuple[Figure, list]:
    """Maps by title, each (xy, groups): points whose coordinates mean nothing by themselves; ``common`` axes and legend."""
    (xy, _), *others = maps.values()
    width, height = matplotlib.rcParams["figure.figsize"]
    figure, grid = _panels(len(maps), 2.6 if common else min(height, 3.9) if others else height, sharex=common, sharey=common)
    points = int(np.isfinite(xy).all(axis=1).sum())
    made = f"{points:,} points" + (f" of {len(xy):,}, stratified" if points < len(xy) else "") + f" · {METHODS[method]}"
    figure.supxlabel(textwrap.fill(note + made + ("" if method == "pca" else f", seed {seed}"), int(width * 18)), color=GREY)
    size = np.clip(20000 / max(points, 1), 4, 30) * (0.4 if others or width < 5 else 1)
    for axes, (title, (xy, groups)) in zip(grid, maps.items(), strict=True):
        axes.set(title=title, xticks=[], yticks=[])
        for name, rows, look in groups:
            axes.scatter(*xy[rows].T, label=f"{name} ({rows.sum():,})", s=size, alpha=0.7, linewidths=0, **look)
    columns = grid[0].get_gridspec().ncols
    across = int(width / columns * 14 / (max(len(name) for name, *_ in groups) + 8))
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": max(1, across)}
    if width > 5 and (common or not others):
        place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    bearers = [grid[columns - 1] if width > 5 else grid[-1]] if common else grid
    for handle in [handle for axes in bearers for handle in axes.legend(columnspacing=1, handletextpad=0.2, **place).legend_handles]:
        handle.set(sizes=[30], alpha=1)
    return figure, grid


def _panels(count: int, height: float = 2.5, **shared) -> tuple[Figure, list]:
    """Small multiples: at most three in a row, one in a column of a paper."""
    require(count, "nothing to draw: no column is named, or none holds numbers")
    width = matplotlib.rcParams["figure.figsize"][0]
    columns = min(2 if count == 4 else count, int(width / 2.9))
    rows = -(-count // columns)
    figure = _Figure(figsize=(width, max(width / 3, height * rows)))
    grid = figure.subplots(rows, columns, squeeze=False, **shared).ravel()
    for spare in grid[count:]:
        spare.remove()
    return figure, list(grid[:count])


def _name(axes: Any, text: str, place: Sequence[float], colour: str) -> None:
    """A word in a frame on a map."""
    frame = {"facecolor": "white", "edgecolor": colour, "alpha": 0.85, "pad": 1.5, "linewidth": 0.8}
    axes.annotate(text, place, (0, 9), textcoords="offset points", ha="center", va="center", fontsize=7, bbox=frame)


def _legible(text: str) -> str:
    """Letters that the figure's font lacks as empty boxes, without a warning for each."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    return "".join(c if ord(c) in known or c.isspace() else "□" for c in text)
