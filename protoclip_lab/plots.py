"""Figures from arrays and tables: each function returns a matplotlib Figure, made without pyplot, and saves nothing.

Every one takes ``paper=True``: one column wide, 7 pt, for a vector PDF; without it, as wide as a notebook's cell.
"""

import base64
import functools
import io
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pandas as pd
import yaml

from protoclip_lab import randomness
from protoclip_lab.config import require

# Colours, matplotlib's settings for a notebook and for a paper, what methods of maps are called and take: see the file.
LOOK: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "templates" / "plots.yaml").read_text("utf-8"))
HUES, METHODS = LOOK["hues"], LOOK["methods"]
PALETTE = [*HUES.values()]
LOOKS = [{"c": colour, "marker": marker} for marker in "o^s" for colour in PALETTE]
LINES = matplotlib.cycler(color=PALETTE[:7] * 4, linestyle=("-", "--", "-.", ":") * 7)
OTHERS, GREY = "others", "#BBBBBB"  # what cannot be told apart


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook shows by itself: without pyplot nobody else tells the notebook how."""

    def savefig(self, *args: Any, **options: Any) -> None:
        # Letters stay letters in a PDF; one that the font lacks is an empty box, which needs no warning.
        with matplotlib.rc_context({"pdf.fonttype": 42}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")
            super().savefig(*args, **options)

    def _repr_png_(self) -> bytes:
        self.savefig(buffer := io.BytesIO(), format="png")
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
        with matplotlib.rc_context(LOOK["paper" if paper else "notebook"]):
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
    require(method in METHODS, f"method {method!r}: it is one of {', '.join(METHODS)}")
    require(len(features) >= 4, f"a map needs at least 4 points, got {len(features)}")
    from scipy.spatial import procrustes
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
        xy = UMAP(n_neighbors=min(15, len(features) - 1), **LOOK["umap"], **options).fit_transform(features)
    if like is not None:
        centre = like.mean(axis=0)
        xy = procrustes(like, xy)[1] * np.linalg.norm(like - centre) + centre  # procrustes gives both at unit size
    return xy.astype(np.float32)


def told_apart(labels: Sequence, most: int) -> pd.Categorical:
    """Labels with their numbers, the commonest first; of more than ``most``, the rest as one: ``OTHERS``."""
    labels = pd.Series(labels).astype(str)
    sizes = labels.groupby(labels).size().sort_values(ascending=False, kind="stable")
    names = {label: f"{label} ({size:,})" for label, size in sizes[: most if len(sizes) <= most else most - 1].items()}
    return pd.Categorical(labels.map(names).fillna(OTHERS), [*names.values(), *[OTHERS] * (len(names) < len(sizes))])


@_styled
def cluster_map(maps: Mapping[str, tuple], *, title: str = "", note: str = "", method: str = "umap", seed: int = 0) -> Figure:
    """Maps side by side, each coloured by a grouping of its points: by prototype, by true label, at several moments.

    Args:
        maps: by title (n, 2) coordinates and (n,) labels; as many labels are told apart as a legend has room for, the
            rest is grey. Axes are in common, and for maps with the very same labels the legend.
        note: what is to be said under the figure besides.
        method, seed: what made the coordinates, stated under the figure.
    """
    width, height = matplotlib.rcParams["figure.figsize"]
    (xy, first), *others = maps.values()
    shared = all(labels is first for _, labels in others)
    figure, grid = _panels(len(maps), height if len(maps) < 3 else 2.6)
    size = np.clip(20000 / len(xy), 4, 30) * (0.4 if others or width < 5 else 1)
    for axes, (panel, (xy, labels)) in zip(grid, maps.items(), strict=True):
        axes.sharex(grid[0])
        axes.sharey(grid[0])
        groups = told_apart(labels, int(2.5 * width))
        for name, look in zip(groups.categories, LOOKS, strict=False):
            # What is called red is not drawn in blue.
            look = {"c": GREY, "zorder": 0} if name == OTHERS else look | {"c": HUES.get(name.rpartition(" (")[0], look["c"])}
            axes.scatter(*xy[groups == name].T, label=name, s=size, alpha=0.7, linewidths=0, **look)
        axes.set(title=panel, xticks=[], yticks=[])
        if not shared:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, markerscale=2)
    if shared:
        place = "outside right center" if width > 5 else "outside lower center"
        figure.legend(*grid[0].get_legend_handles_labels(), loc=place, markerscale=2)
    figure.supxlabel(textwrap.fill(f"{note}{len(xy):,} points · {METHODS[method]}, seed {seed}", int(width * 18)), color="#555555")
    figure.suptitle(title)
    return figure


def joint_map(image: np.ndarray, text: np.ndarray, gap: float, *, links: int = 60, **options: Any) -> Figure:
    """Joint map of image and text features; lines join some of the pairs, an arrow the two means.

    Args:
        image, text: (n, 2) each, of n pairs: the halves of one map of both.
        gap: the modality gap, as :func:`protoclip_lab.evaluation.modality_gap` measures it on the features, written at
            the arrow.
        links: how many pairs are joined at most, evenly taken from all.
        options: method, seed and paper of :func:`cluster_map`.
    """
    pairs = np.stack([image, text], axis=1)
    joined, ends = pairs[:: -(-len(pairs) // links)], pairs.mean(axis=0)
    both = {"Image and text features": (np.concatenate([image, text]), np.repeat(["image", "text"], len(pairs)))}
    figure = cluster_map(both, note=f"{len(joined)} of {len(pairs):,} pairs joined by a line · ", **options)
    (axes,) = figure.axes
    axes.plot(*joined.T, "-", color="#666666", linewidth=0.6, alpha=0.6, zorder=1)
    axes.annotate("", ends[1], ends[0], arrowprops={"arrowstyle": "<->", "linewidth": 2, "shrinkA": 0, "shrinkB": 0})
    frame = {"facecolor": "white", "alpha": 0.85, "pad": 1.5}
    axes.annotate(f"gap {gap:.3f}", ends.mean(axis=0), (0, 9), textcoords="offset points", ha="center", fontsize=7, bbox=frame)
    return figure


def moving_map(maps: Mapping[str, np.ndarray], labels: Sequence, *, steps: int = 8, **options: Any) -> Animation:
    """An animation from map to map, each (n, 2) under its name, coloured as by :func:`cluster_map`, whose options it takes."""
    from PIL import Image

    names, places, frames = list(maps), np.stack([*maps.values()]), []
    moments = np.arange(steps * (len(maps) - 1) + 1) / steps
    for moment in moments:
        before, after = places[int(moment)], places[int(np.ceil(moment))]
        figure = cluster_map({names[round(moment)]: (before + moment % 1 * (after - before), labels)}, **options)
        figure.axes[0].update_datalim(places.reshape(-1, 2))
        figure.axes[0].autoscale_view()
        figure.savefig(frame := io.BytesIO(), format="png", dpi=80)
        frames.append(Image.open(frame).convert("RGB").quantize(64))
    file, stay = io.BytesIO(), np.where(moments % 1, 60, 1500).tolist()
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:], duration=stay, loop=0)
    return Animation(file.getvalue())


@_styled
def prototype_sheet(images: Sequence, captions: Sequence, names: Sequence[str], *, headings: Mapping[str, int] | None = None) -> Figure:
    """One row per prototype: samples with their captions.

    Args:
        images: for each prototype its images (PIL or (H, W, 3)).
        captions: for each prototype the captions of those images.
        names: for each prototype what stands left of its row, in lines.
        headings: what stands above the columns, by the column where it begins.
    """
    width, columns = matplotlib.rcParams["figure.figsize"][0], max(map(len, images))
    cell = 0.84 * width / columns
    figure = Figure(figsize=(width, (cell + 0.5) * len(images) + 0.3))
    bare = {"frame_on": False, "xticks": [], "yticks": []}
    grid = figure.subplots(len(images), columns + 1, squeeze=False, width_ratios=[0.16 * width, *[cell] * columns], subplot_kw=bare)
    for (left, *places), row, texts, name in zip(grid, images, captions, names, strict=True):
        lines = "\n".join(textwrap.fill(line, 24) for line in name.split("\n"))
        left.text(1, 1, lines, ha="right", va="top", fontsize=7, transform=left.transAxes)
        for axes, image, text in zip(places, row, texts, strict=False):
            axes.imshow(image)
            axes.set_xlabel(textwrap.fill(text, max(8, int(cell * 15)), max_lines=3, placeholder=" …"), fontsize=7)
    for heading, column in (headings or {}).items():
        grid[0, column + 1].set_title(heading, loc="left")
    return figure


def cluster_sizes(sizes: Mapping[str, np.ndarray], **options: Any) -> Figure:
    """Members of each cluster, largest first, a line for each grouping: by name (K,). Empty clusters are counted."""
    lines = {}
    for name, counts in sizes.items():
        about = f"{len(counts)} clusters, {(counts == 0).sum()} empty, median {np.median(counts):g}, largest {counts.max()}"
        lines[f"{name}: {about}"] = pd.Series(np.sort(counts)[::-1])
    return curves({"Cluster sizes": pd.DataFrame(lines).rename_axis("clusters by size")}, **options)


@_styled
def heat_map(table: pd.DataFrame, *, title: str = "") -> Figure:
    """A table as colours, 0 white; up to 12 rows and columns with names and numbers. The names of its axes are written."""
    width = min(5.5, matplotlib.rcParams["figure.figsize"][0])
    figure = Figure(figsize=(width, 0.8 * width))
    axes = figure.subplots()
    norm = matplotlib.colors.PowerNorm(0.5, 0, np.nanmax(table), clip=True)  # so that small values are seen beside large ones
    figure.colorbar(axes.imshow(table, cmap="Blues", norm=norm, alpha=0.7))  # pale enough for black numbers
    axes.set(title=title, xlabel=table.columns.name, ylabel=table.index.name)
    if max(table.shape) <= 12:
        axes.set_xticks(range(table.shape[1]), table.columns, rotation=30, ha="right")
        axes.set_yticks(range(table.shape[0]), table.index)
        for (row, column), value in np.ndenumerate(table.to_numpy()):
            axes.text(column, row, f"{round(value, 2) + 0:.2f}", ha="center", va="center", fontsize=7)
    return figure


@_styled
def soft_targets(captions: Sequence[str], names: Sequence[str], teacher: Any, student: Any, *, title: str = "") -> Figure:
    """For some samples the teacher's and the student's distribution over the prototypes that weigh most in either.

    Args:
        captions: of the m samples.
        names: of the K prototypes.
        teacher, student: (m, K), each row sums to 1.
    """
    figure, panels = _panels(len(captions), 2.2)
    figure.suptitle(title)
    for axes, caption, *shares in zip(panels, captions, teacher, student, strict=True):
        top = np.argsort(-np.maximum(*shares), kind="stable")[:5]
        for i, who in enumerate(("teacher", "student")):
            axes.barh(np.arange(len(top)) + 0.4 * i - 0.2, shares[i][top], 0.4, color=PALETTE[i], label=who)
        axes.set_yticks(range(len(top)), [textwrap.fill(names[k], 16) for k in top], fontsize=7)
        axes.set(xlim=(0, 1), ylim=(len(top) - 0.5, -0.5), title=textwrap.fill(caption, 28, max_lines=2, placeholder=" …"))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def gap_sweep(table: pd.DataFrame, **options: Any) -> Figure:
    """Measures against the share of the gap by which images and texts were moved together, a line for each data set.

    Args:
        table: rows of ``Run.evaluations()`` of one checkpoint; those whose measure is ``gap_sweep_NAME@SHARE`` are drawn.
    """
    swept = table["measure"].str.extract(r"^gap_sweep_(?P<name>.+)@(?P<share>.+)").dropna().join(table)
    swept["share of the gap closed"] = swept["share"].astype(float)
    panels = {name: rows.pivot_table("value", "share of the gap closed", "dataset") for name, rows in swept.groupby("name")}
    return curves(panels, marks=[0], **options)


def training_curves(metrics: pd.DataFrame, infonce_warmup_episodes=0, lit_start_episode: int | None = None, **options: Any) -> Figure:
    """Losses, prototype accuracies, gap and spread through training; ends of episodes and stages without prototypes marked.

    Args:
        metrics: ``Run.metrics()``; drawn are the means of up to 60 stretches of it.
        infonce_warmup_episodes, lit_start_episode: as in the run's config.
    """
    ends = metrics.groupby("episode")["step"].max()
    stages = {"warm-up": (0, ends.loc[:infonce_warmup_episodes].max())} if infonce_warmup_episodes else {}
    if lit_start_episode in ends:
        stages["image tower locked"] = (ends.loc[: lit_start_episode - 1].max(), ends.max())
    steps, episodes = (metrics[metrics["kind"] == kind] for kind in ("step", "episode"))
    means = steps.groupby(steps["step"] * 60 // (ends.max() + 1)).mean(numeric_only=True).set_index("step")
    panels = {"loss": means.filter(regex="^loss/"), "accuracy": means.filter(regex="^accuracy/")}
    panels["gap and std"] = episodes.set_index("step").filter(regex="^gap$|_std$").dropna(axis=1, how="all")
    panels = {panel: table.rename(columns=lambda name: name.rpartition("/")[2]) for panel, table in panels.items() if table.size}
    return curves(panels, stages=stages, marks=ends.iloc[:-1], **options)


def progress_curves(table: pd.DataFrame, columns: Sequence[str], **options: Any) -> Figure:
    """Metrics of runs against episodes: a panel for each column, a line for each run, which column "run" names."""
    return curves({column: table.pivot_table(column, "episode", "run") for column in columns}, **options)


@_styled
def curves(panels: Mapping[str, pd.DataFrame], *, stages: Mapping[str, tuple] | None = None, marks: Sequence[float] = ()) -> Figure:
    """Small multiples of curves.

    Args:
        panels: by title a table each, whose columns are drawn against its index; what is NaN is left out of its line.
            Columns of one name look the same in every panel.
        stages: stretches of the index to shade, by name.
        marks: where a thin line stands.
    """
    figure, grid = _panels(len(panels))
    looks = dict(zip(dict.fromkeys(name for table in panels.values() for name in table), LINES(), strict=False))
    shown = {}
    for axes, (title, table) in zip(grid, panels.items(), strict=True):
        for name in table:
            line = table[name].dropna()
            (shown[name],) = axes.plot(line, marker="o" if len(line) < 50 else "", markersize=3, linewidth=1.2, **looks[name])
        for stage, colour in zip(stages or {}, PALETTE[4:], strict=False):
            shown[stage] = axes.axvspan(*stages[stage], color=colour, alpha=0.2, linewidth=0)
        for mark in marks if len(marks) < 50 else ():
            axes.axvline(mark, color=GREY, linewidth=0.5, zorder=0)
        axes.set(title=title.replace("_", " "), xlabel=table.index.name)
        axes.locator_params("x", integer=True)
    names = [name.replace("_", " ") for name in shown]
    across = max(1, int(figure.get_figwidth() * 14 / (max(map(len, names)) + 8)))
    figure.legend(shown.values(), names, loc="outside upper center", ncols=across)
    return figure


def _panels(count: int, height: float = 2.5) -> tuple[Figure, list]:
    """Small multiples: at most three in a row, one in a column of a paper."""
    require(count, "nothing to draw: no column is named, or none holds numbers")
    width = matplotlib.rcParams["figure.figsize"][0]
    columns = min(count, int(width / 2.9))
    rows = -(-count // columns)
    figure = Figure(figsize=(width, max(width / 3, height * rows)))
    return figure, [figure.add_subplot(rows, columns, place) for place in range(1, count + 1)]
