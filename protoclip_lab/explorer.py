"""A run walked through by hand in JupyterLab: a map of its samples, their pictures, and what lies near what."""

import time
from base64 import b64encode
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from IPython import display, get_ipython
from ipywidgets import HTML, Box, Button, Dropdown, Output, Text, VBox, link

from protoclip_lab import encoders, plots
from protoclip_lab.runs import Run
from protoclip_lab.snapshot import Snapshot, by_distance, open_snapshot

PICTURES = 12  # at a time
NEAREST = 5  # captions and prototypes
EDGES = (-1.1, 1.1)  # of the map, whose points lie within -1 and 1
HINT = "Click a point, drag a box, choose a prototype or type a caption"
COLOURS = [*plots.PALETTE[:7], plots.GREY]  # of as many groups; the eighth may be all others

_load = lru_cache(2)(encoders.load)


def explore(run: str | Path, *, other: str | Path = "", checkpoint: str | Path = "", **options: Any) -> Box | None:
    """Walk through a run by hand: a map to click and select on, pictures with captions, search by caption.

    Where nobody sits in front of the notebook, figures are displayed instead.

    Args:
        other: a second run, shown beside the first on the same samples.
        checkpoint: of the first run, to begin with; empty takes the latest.
        options: samples, seed, labels and method, as in :func:`protoclip_lab.snapshot.open_snapshot`.

    Raises:
        ValueError: the two runs have different tables.
    """
    shown = [open_snapshot(run, checkpoint=checkpoint, **options)] + ([open_snapshot(other, **options)] if other else [])
    if shown[0].pairs.fingerprint != shown[-1].pairs.fingerprint:
        raise ValueError(f"{run}, {other} need one table, not {[(s.pairs.source, len(s.pairs), s.pairs.fingerprint) for s in shown]}")
    if not _attended():
        return display.display(*(snapshot.sheet(modality="text") for snapshot in shown))
    views = [View(snapshot, options) for snapshot in shown]
    for view in views:
        view.views = views
        for name in ("modality", "colouring", "caption"):
            link((getattr(views[0], name), "value"), (getattr(view, name), "value"))
    return Box([HTML(f"<style>{(Path(__file__).parent / 'templates' / 'explorer.css').read_text('utf-8')}</style>"), *views])


class View(VBox):
    """One run in the explorer; ``options`` are those of :func:`protoclip_lab.snapshot.open_snapshot`.

    Attributes:
        checkpoint, modality, colouring, prototype, caption: the controls.
        rows: what is shown, places in the sample; first the nearest, where there is an order.
        views: those that follow what is chosen here, itself among them.
    """

    def __init__(self, snapshot: Snapshot, options: dict[str, Any]) -> None:
        from jscatter import Scatter

        self.snapshot, self.options, self.rows, self.views = snapshot, options, [], [self]
        checkpoints = {folder.name: folder for folder in [*snapshot.run.checkpoints(), snapshot.checkpoint]}
        self.checkpoint = Dropdown(description="Checkpoint", options=checkpoints, value=snapshot.checkpoint)
        self.modality = Dropdown(description="Map of", options={"images": "image", "texts": "text", "both": "joint"})
        self.prototype = Dropdown(description="Prototype")
        self.caption = Text(description="Find images", placeholder="a caption, then Enter", continuous_update=False)
        self.title, self.near, problems = HTML(), HTML().add_class("protoclip-near"), Output()
        self.cards = [VBox([HTML(), Button()]).add_class("protoclip-card") for _ in range(PICTURES)]
        self._read()
        self.colouring = Dropdown(description="Colour by", options=self.table.select_dtypes("category"))
        look = {"axes": False, "legend": True, "height": 480, "size": 5, "opacity_unselected": 0.3, "color_map": COLOURS}
        mouse = {"x_scale": EDGES, "y_scale": EDGES, "lasso_type": "rectangle", "mouse_mode": "lasso"}
        self.scatter = Scatter("x", "y", self.table, color_by="prototype", **look, **mouse)
        self.show([], HINT)

        reactions = {self.checkpoint: self._draw, self.modality: self._draw, self.prototype: self._show_prototype}
        reactions |= {self.colouring: lambda change: self.scatter.color(by=change["new"]), self.caption: self._find}
        # JupyterLab hides what a callback prints or raises: here it stands under the controls.
        reporting = problems.capture(clear_output=True)
        for control, react in reactions.items():
            control.observe(reporting(react), "value")
        self.scatter.widget.observe(reporting(self._show_selected), "selection")
        for place, card in enumerate(self.cards):
            card.children[1].on_click(reporting(lambda _, place=place: self._share([self.rows[place]], "1 sample picked")))

        wrap, half = {"flex_flow": "row wrap"}, {"flex": "1 1 400px", "min_width": "0"}
        found = VBox([self.title, Box(self.cards, layout=wrap), self.near], layout=half)
        row = Box([VBox([self.scatter.widget], layout=half), found], layout=wrap)
        super().__init__([HTML(f"<b>{escape(snapshot.run.path.name)}</b>"), Box([*reactions], layout=wrap), problems, row], layout=half)

    def show(self, rows: Sequence[int], title: str, source: Any = None) -> None:
        """Show samples on the map and the first as pictures with captions; of a single one, what lies near it."""
        self.rows, self.title.value = list(rows), f"<b>{escape(title)}</b>"
        for control, nothing in ((self.prototype, None), (self.caption, "")):
            if control is not source:
                control.value = nothing
        self.scatter.selection(np.flatnonzero(self.table.index.isin(self.rows)))
        for card, row in zip_longest(self.cards, self.rows[:PICTURES]):
            card.layout.display = "none" if row is None else None
            if row is not None:
                image, caption = self.snapshot.pairs[self.snapshot.rows[row]]
                image.thumbnail((112, 112))
                picture, button = card.children
                picture.value = f'<img alt="{escape(caption)}" src="data:image/png;base64,{b64encode(image._repr_png_()).decode()}">'
                button.description = button.tooltip = caption
        self.near.value = self._neighbours(self.rows[0]) if len(self.rows) == 1 else ""

    def _share(self, rows: Sequence[int], title: str, source: Any = None) -> None:
        for view in self.views:
            view.show(rows, title, source)

    def _read(self) -> None:
        kinds = ["image", "text"] if self.modality.value == "joint" else [self.modality.value]
        snapshot, modality = self.snapshot, kinds[0]
        (self.assigned, self.centroids, self.features), self.names = snapshot.prototypes(modality), snapshot.names(modality)
        table = pd.DataFrame({name: plots.told_apart(values, len(COLOURS)) for name, values in snapshot.colourings(modality).items()})
        # By number of the sample: "both" has each twice.
        self.table = pd.concat([table] * len(kinds)).assign(modality=plots.told_apart(np.repeat(kinds, len(table)), 2))
        xy = snapshot.xy(self.modality.value)
        self.table[["x", "y"]] = 2 * (xy - xy.min(axis=0)) / np.ptp(xy, axis=0) - 1
        self.prototype.options = {f"{self.names[p]} ({size:,})": p for p, size in pd.Series(self.assigned).value_counts().items()}

    def _draw(self, change: dict) -> None:
        if change["owner"] is self.checkpoint:
            self.snapshot = open_snapshot(self.snapshot.run.path, checkpoint=change["new"], **self.options)
        self._read()
        self.scatter.data(self.table).widget.reset_view()
        self.show([], HINT)

    def _show_prototype(self, change: dict) -> None:
        if (prototype := change["new"]) is not None:
            members = np.flatnonzero(self.assigned == prototype)
            nearest = by_distance(self.features[members], self.centroids[prototype])
            self._share(members[nearest], f"Prototype {self.names[prototype]}: {len(members):,} samples, nearest first", self.prototype)

    def _show_selected(self, change: dict) -> None:
        rows = self.table.index[change["new"]].unique()
        if set(rows) != set(self.rows):  # the front end may repeat what it was told
            self._share(rows, f"{len(rows):,} samples selected")

    def _find(self, change: dict) -> None:
        if caption := change["new"].strip():
            text = encoders.encode_texts(_load(self.snapshot.checkpoint), [caption])[0]
            nearest = (self.snapshot.features.image @ text).argsort(descending=True)[:PICTURES]
            self.show(nearest.tolist(), f"Images nearest to “{caption}”", self.caption)

    def _neighbours(self, row: int) -> str:
        """What lies near one image, as HTML."""
        cosine = self.snapshot.features.text @ self.snapshot.features.image[row]
        distance = (self.centroids - self.features[row]).norm(dim=1)
        near = {i: self.snapshot.pairs.caption(self.snapshot.rows[i]) for i in cosine.argsort(descending=True)[:NEAREST].tolist()}
        captions = [f"{escape(caption)} ({cosine[i]:.2f}{', its own' if i == row else ''})" for i, caption in near.items()]
        prototypes = [f"{escape(self.names[p])} ({distance[p]:.2f})" for p in distance.argsort()[:NEAREST].tolist()]
        lists = {"Nearest captions (cosine)": captions, "Nearest prototypes (distance)": prototypes}
        return "".join(f"<b>{title}</b><ol><li>{'</li><li>'.join(found)}</li></ol>" for title, found in lists.items())


class Live:
    """A figure of a training that is drawn anew in its place: hand it to :func:`protoclip_lab.training.train` as ``after_row``.

    Under papermill the last one stays.
    """

    def __init__(self) -> None:
        self._next, self._place = 0.0, display.display(display.HTML(), display_id=True)

    def __call__(self, run: Run) -> None:
        """Draw anew, unless that was done just now: a fiftieth of the time is spent on it, however long the run."""
        begin = time.monotonic()
        if begin >= self._next:
            self.draw(run)
            self._next = begin + max(2.0, 50 * (time.monotonic() - begin))

    def draw(self, run: Run) -> plots.Figure:
        """Losses, prototype accuracies and gap so far, shown in the figure's place."""
        figure = plots.training_curves(run.metrics(), run.config.infonce_warmup_episodes, run.config.lit_start_episode)
        self._place.update(figure)
        return figure


def _attended() -> bool:
    """Whether someone could answer this kernel: nbclient, and so papermill, lets it ask nothing."""
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and kernel.get_parent()["content"].get("allow_stdin", False)
