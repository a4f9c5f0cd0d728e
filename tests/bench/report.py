"""From measurements to the table and the pictures; no figure here is a constant but what was asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from protoclip_lab.plots import HUES, LOOK

from .measure import Spread, ratios, spread


@dataclass
class Row:
    """A line of the table: what was measured and every value of it; the bound, such as "≤ 1.06", where one was asked for."""

    what: str
    values: list[float]
    unit: str = ""
    asked: str = ""
    note: str = ""

    @property
    def reached(self) -> str:
        """Whether the median keeps the bound."""
        if not self.values:
            return "not measured"
        if not self.asked:
            return ""
        sign, bound = self.asked.split()
        median = spread(self.values).median
        return "reached" if (median <= float(bound) if sign == "≤" else median >= float(bound)) else "not reached"

    def __str__(self) -> str:
        found = f"{_shown(spread(self.values))} {self.unit}".rstrip() if self.values else ""
        return f"| {self.what} | {self.asked} | {found} | {self.reached} | {self.note} |"


def rows(name: str, measured: dict[str, Any] | None) -> list[Row]:
    """The lines of one section; one that was skipped or not run gives a single line that says so."""
    if measured is None or "skipped" in measured:
        return [Row(f"{name}: {'not run' if measured is None else 'skipped, ' + measured['skipped']}", [])]
    return list(SECTIONS[name](measured))


def _arms(measured: dict[str, Any], asked: bool = True) -> Iterator[Row]:
    about, seconds = measured["settings"], measured["seconds_per_sample"]
    size = f"N {about['episode_size']:,}, K {about['k']:,}, {about['model']}, batch {about['batch_size']}, {about['device']}"
    for name in seconds:
        if name != "clip":
            bound = "≤ 1.06" if name.startswith("rolling") else "≤ 1.40"
            ratio = ratios(seconds[name], seconds["clip"])
            yield Row(f"{name} ProtoCLIP ÷ CLIP, wall-clock per sample", ratio, "×", bound if asked else "", f"{size}; round by round")
    for name, times in seconds.items():
        yield Row(f"{name}: samples per second", [1 / t for t in times])
    for name, rounds in measured["stages"].items():
        for stage, label in STAGES.items():
            yield Row(f"{name}: {label}", [1e3 * found[stage] for found in rounds], "ms a sample")
        waiting = [found["wait"] / (found["extract"] + found["learn"]) for found in rounds]
        yield Row(f"{name}: share of extraction and learning spent waiting for input", waiting)


def _paper_k(measured: dict[str, Any]) -> Iterator[Row]:
    yield from _arms(measured, asked=False)


def _open_clip(measured: dict[str, Any]) -> Iterator[Row]:
    about, seconds = measured["settings"], measured["seconds_per_sample"]
    size = f"{about['model']}, batch {about['batch_size']}, plain augmentation; round by round"
    yield Row("our CLIP ÷ open_clip's script, samples per second", ratios(seconds["open_clip"], seconds["ours"]), "×", "≥ 1.0", size)
    for name, times in seconds.items():
        yield Row(f"{name}: samples per second", [1 / t for t in times])


def _back_translation(measured: dict[str, Any]) -> Iterator[Row]:
    about, seconds = measured["settings"], measured["seconds"]
    size = f"N {about['n']:,}, K {about['k']:,}, d {about['d']}, one thread"
    yield Row("back translation over the textbook loop", ratios(seconds["textbook"], seconds["ours"]), "× faster", "≥ 60", size)
    yield Row("back translation ÷ reading the features once (their sum)", ratios(seconds["ours"], seconds["read"]), "×", note=size)
    for name, times in seconds.items():
        yield Row(name, [1e3 * t for t in times], "ms")
    yield Row("largest difference to the textbook", [measured["largest_difference"]])


def _loss(measured: dict[str, Any]) -> Iterator[Row]:
    about, seconds, peaks = measured["settings"], measured["seconds"], measured["peak_bytes"]
    size = f"K {about['k']:,}, d {about['d']}, {about['threads']} threads, {about['device']}"
    counted = "tensors' bytes, by torch.profiler" if about["device"] == "cpu" else "max_memory_allocated"
    for batch, times in seconds.items():
        what, asked = f"prototype loss ÷ textbook, forward + backward, B {batch}", batch == "512"
        yield Row(f"{what}: time", ratios(times["ours"], times["textbook"]), "×", "≤ 0.35" * asked, size)
        memory = peaks[batch]["ours"] / peaks[batch]["textbook"]
        yield Row(f"{what}: peak memory", [memory], "×", "≤ 0.4" * asked, f"{size}; {counted}")
    if {"512", "4096"} <= peaks.keys():
        memory = peaks["4096"]["ours"] / peaks["512"]["textbook"]
        yield Row("peak memory of the prototype loss at B 4096 ÷ the textbook's at B 512", [memory], "×", "≤ 1.0", f"{size}; {counted}")
    for batch, times in seconds.items():
        for name in times:
            yield Row(f"{name}, B {batch}: time", [1e3 * t for t in times[name]], "ms")
            yield Row(f"{name}, B {batch}: peak memory", [peaks[batch][name] / 2**20], "MiB")
    yield Row("largest difference of the loss to the textbook's", list(measured["differences"].values()))


def _kmeans(measured: dict[str, Any]) -> Iterator[Row]:
    for case, episodes in measured["cases"].items():
        seconds = {name: [t for e in episodes for t in e["seconds"][name]] for name in ("faithful", "warm")}
        worse = [e["objective"]["warm"] / e["objective"]["faithful"] for e in episodes]
        yield Row("warm-started k-means over faithful", ratios(seconds["faithful"], seconds["warm"]), "× faster", "≥ 5", case)
        yield Row("objective of warm-started k-means ÷ faithful's", worse, "×", "≤ 1.01", f"{case}; a chain of warm starts")
        for name, times in seconds.items():
            yield Row(name, [1e3 * t for t in times], "ms", note=case)
        moved = [e["moved_by_radii"] for e in episodes]
        yield Row("centroids moved", moved, note=f"{case}; median centroid, in rms distances of rows to theirs")
    n, k = measured["settings"]["huge"]
    for engine, times in measured["engines"].items():
        yield Row(f"{engine}: one iteration and the assignment", times, "s", note=f"N {n:,}, K {k:,}, random directions")


def _growth(measured: dict[str, Any]) -> Iterator[Row]:
    about = measured["settings"]
    for curve, points in measured["curves"].items():
        times = [spread(seconds).median for seconds in points["seconds"]]
        slope = float(np.polyfit(np.log(points["x"]), np.log(times), 1)[0])
        ends = f"{times[0]:.3g} s at {points['x'][0]:,} to {times[-1]:.3g} s at {points['x'][-1]:,}"
        yield Row(f"growth with {curve}: exponent", [slope], note=f"1 is proportional; {ends}")
    # One iteration and the last assignment are two passes; 20 iterations and it, three times, are 61 or more.
    once = measured["curves"][f"N: {measured['kmeans']}"]["seconds"][-1]
    size = f"N {about['n']:,}, K {about['k']:,}; extrapolated: 61 assignments, where two were measured"
    yield Row("faithful k-means at the largest size", [61 / 2 * t for t in once], "s", note=size)


def _input(measured: dict[str, Any]) -> Iterator[Row]:
    images = measured["settings"]["images"]
    for table, seconds in measured["seconds"].items():
        for name, times in seconds.items():
            yield Row(f"{name}: images per second", [images / t for t in times], note=table)
            if name != "decode":
                yield Row(f"{name} ÷ decoding alone, images per second", ratios(seconds["decode"], times), "×", note=table)


def _umap(measured: dict[str, Any]) -> Iterator[Row]:
    about = measured["settings"]
    yield Row(f"UMAP of {about['points']:,} points", measured["seconds"]["umap"], "s", note=f"d {about['d']}, compiled before")


def _scale(measured: dict[str, Any]) -> Iterator[Row]:
    for name, by_rows in measured["found"].items():
        rows, values = [int(n) for n in by_rows], [*by_rows.values()]
        asked = "≤ 400" if name.startswith("a reader") else ""
        slope = float(np.polyfit(np.log(rows), np.log(np.maximum(values, 1e-9)), 1)[0])
        note = f"{rows[-1]:,} rows; {values[0]:.3g} at {rows[0]:,}; exponent {slope:.2f}"
        yield Row(f"{name}{'' if 'MiB' in name else ': seconds'}", values[-1:], "", asked, note)


def _gpu(measured: dict[str, Any]) -> Iterator[Row]:
    for found in measured["arms"].values():
        yield from _arms(found)
    yield from _loss(measured["loss"])


SECTIONS = {"training": _arms, "open_clip": _open_clip, "back_translation": _back_translation, "loss": _loss, "kmeans": _kmeans}
SECTIONS |= {"paper_k": _paper_k, "growth": _growth, "input": _input, "umap": _umap, "scale": _scale, "gpu": _gpu}
QUALITY = Row("quality: rolling − faithful, linear probe and mean recall", [], "", "≥ −1.0, ≥ −0.5", "takes hours: reports/LOG.md")
STAGES = {"extract": "extract", "cluster": "cluster", "learn": "learn", "rest": "rest (checkpoint)"}
HEAD = ["| what | asked | measured: median (min – max; n) | | |", "|---|---|---|---|---|"]


def table(results: dict[str, Any]) -> str:
    """Markdown: the figures to reach first, then each section whole, with its settings and what it was taken on."""
    found = {name: rows(name, results.get(name)) for name in SECTIONS}
    asked = [row for every in found.values() for row in every if row.asked or not row.values]
    lines = ["# Benchmarks", "", "Written by `make bench`; every figure comes from the measurements in `results.json`.", ""]
    lines += ["## Figures to reach", "", *HEAD, *map(str, [*asked, QUALITY])]
    for name, measured in results.items():
        made = measured["made"]
        machine = [made["cpu"], f"{made['cores']} cores", f"{made['memory_gib']} GiB", f"GPU: {made['gpu'] or 'none'}", made["os"]]
        versions = [f"Python {made['python']}", *(f"{package} {version}" for package, version in made["versions"].items())]
        taken = f"Taken {made['when']}, commit {made['commit']}, in {measured['took']:.0f} s, load {made['load']} before"
        about = ", ".join([taken, *machine, f"{made['torch_threads']} threads", *versions])
        given = {key: value for key, value in measured.get("settings", {}).items() if value not in ("", None, [], {})}
        settings = ", ".join(f"{key} {value}" for key, value in given.items())
        lines += ["", f"## {name}", "", *HEAD, *map(str, found[name]), "", f"{about}.", "", f"Settings: {settings or '–'}."]
    return "\n".join(lines) + "\n"


def _shown(found: Spread) -> str:
    middle, low, high = (f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}" for value in found[:3])
    return middle if found.count == 1 else f"{middle} ({low} – {high}; {found.count})"


def pictures(results: dict[str, Any], folder: Path) -> list[Path]:
    """Growth curves and where a sample's time goes, as PNGs, of the sections that are there."""
    made = []
    for section, draw in (("growth", _draw_growth), ("training", _draw_training)):
        if "skipped" not in results.get(section, {"skipped": ""}):
            with matplotlib.rc_context(LOOK["notebook"]):
                draw(results[section]).savefig(folder / f"{section}.png", dpi=110)
            made.append(folder / f"{section}.png")
    return made


def _draw_growth(measured: dict[str, Any]) -> Figure:
    about = measured["settings"]
    figure = Figure(figsize=(9, 4.2))
    others = {"N": f"K {about['k']:,}", "K": f"N {about['n']:,}", "B": f"K {about['k']:,}"}
    names = {"N": "samples N", "K": "prototypes K", "B": "batch B"}
    curves: dict[str, list] = {axis: [] for axis in names}
    for curve, points in measured["curves"].items():
        axis, _, label = curve.partition(": ")
        curves[axis].append((label, points))
    labels = list(dict.fromkeys(label for found in curves.values() for label, _ in found))
    looks = dict(zip(labels, zip(HUES.values(), "os^Dvx", strict=False), strict=False))
    every = [t for points in measured["curves"].values() for times in points["seconds"] for t in times]
    for place, (axis, found) in zip(figure.subplots(1, 3, sharey=True), curves.items(), strict=True):
        for label, points in found:
            colour, marker = looks[label]
            middle = [spread(times) for times in points["seconds"]]
            place.plot(points["x"], [m.median for m in middle], color=colour, marker=marker, label=label)
            place.fill_between(points["x"], [m.low for m in middle], [m.high for m in middle], color=colour, alpha=0.2, lw=0)
        x = found[0][1]["x"]
        # what doubling would cost if it doubled the time
        place.plot(x, np.array(x) / x[-1] * min(every) * 4, color="#999999", ls=":", label="in proportion")
        place.set(xscale="log", yscale="log", xlabel=names[axis], title=others[axis], xticks=x)
        place.set_xticks([], minor=True)
        place.set_xticklabels([f"{v / 1000:g}k" if v >= 10_000 else f"{v:,}" for v in x])
    figure.axes[0].set_ylabel("seconds")
    figure.axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    handles = {label: line for place in figure.axes for line, label in zip(*place.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3)
    figure.suptitle(f"How cost grows (d {about['d']}, {about['threads']} threads)")
    return figure


def _draw_training(measured: dict[str, Any]) -> Figure:
    about, seconds = measured["settings"], measured["seconds_per_sample"]
    figure = Figure(figsize=(9, 3.6))
    place = figure.subplots()
    colours = {"extract": HUES["orange"], "cluster": HUES["red"], "learn": HUES["blue"], "rest": "#999999"}
    height = 0.0
    for position, name in enumerate(seconds):
        left = 0.0
        for stage, colour in colours.items():
            width = 1e3 * spread([found[stage] for found in measured["stages"][name]]).median
            place.barh(position, width, left=left, color=colour, height=0.5, label=STAGES[stage] if not position else None)
            left += width
        wait = 1e3 * spread([found["wait"] for found in measured["stages"][name]]).median
        label = "waiting for input, within extract and learn" if not position else None
        place.barh(position + 0.34, wait, color=HUES["black"], height=0.1, label=label)
        total = spread([1e3 * t for t in seconds[name]])
        bars = [[total.median - total.low], [total.high - total.median]]
        label = "lowest to highest round" if not position else None
        place.errorbar(total.median, position, xerr=bars, color=HUES["black"], capsize=4, label=label)
        share = spread(ratios(seconds[name], seconds["clip"])).median
        place.text(total.high, position, f"   {total.median:.2f} ms, {share:.2f} × CLIP", va="center")
        height = max(height, total.high)
    place.set(yticks=range(len(seconds)), yticklabels=seconds, xlabel="milliseconds of wall-clock per sample", xlim=(0, 1.35 * height))
    place.invert_yaxis()
    size = f"{about['model']}, batch {about['batch_size']}, N {about['episode_size']:,}, K {about['k']:,}"
    place.set_title(f"Where the time goes: {size}, {about['augmentation']} augmentation")
    figure.legend(loc="outside lower center", ncols=3)
    return figure
