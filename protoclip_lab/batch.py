"""Recipes to papermill: a YAML file of notebook steps, arms and a grid becomes executed notebooks and pages.

A recipe maps steps, in the order they run, to the parameters of their notebooks::

    parameters: {seeds: [0, 1], flickr8k: null} # the recipe's own, used as "{seeds}"; null has to be given
    01_prepare_data: {table: "{flickr8k}/captions.tsv"}
    02_extract_teacher:minilm: {table: "{01_prepare_data}/pairs"}    # ":minilm" tells two uses of a notebook apart
    03_train:
      common: {episodes: 8}
      arms: {clip: {objective: clip}, protoclip: {objective: protoclip}}
      grid: {seed: "{seeds}"}                   # the only place where a list is an axis
    05_evaluate: {}                             # has a `run` or `checkpoint`: once for each run of 03_train
    06_compare: {}                              # has a parameter `runs`: once, over all of them

``{step}`` is the output folder of a step, as an absolute path. The runner sets ``output``, and ``run``,
``checkpoint`` or ``runs`` where a notebook has them. Names are checked before anything runs.
"""

import base64
import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import papermill
import yaml
from jinja2 import Environment, FileSystemLoader
from nbconvert import HTMLExporter
from PIL import Image

from protoclip_lab.config import TrainConfig, nearest_name, require
from protoclip_lab.storage import write_text

TRAIN = "03_train"
TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = ["common", "arms", "grid"]

# YAML 1.1 wants a dot in the mantissa and would read 5e-4 as text
yaml.SafeLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


class StepFailed(RuntimeError):
    """A notebook raised, or its kernel died."""


@dataclass
class Step:
    """One notebook to execute once.

    Attributes:
        name: the recipe's step; where it is made more than once, a slash and what tells the times apart follow.
        notebook: the source notebook.
        output: the folder it writes to; for 03_train the run directory.
        parameters: what is injected, references resolved.
        upstream: the steps whose outputs it reads.
        executed: the notebook with its outputs.
        page: the same as HTML, written last: a step that has one is finished.
    """

    name: str
    notebook: Path
    output: Path
    parameters: dict[str, Any]
    upstream: list["Step"]

    def __post_init__(self) -> None:
        self.executed = self.output / self.notebook.name
        self.page = self.executed.with_suffix(".html")

    def figures(self) -> list[Path]:
        """Its pictures and animations, in the order they were drawn."""
        return sorted((self.output / "figures").glob("*.[pg][ni][gf]"), key=lambda path: path.stat().st_mtime)


# ---------------------------------------------------------------- reading a recipe


def read_settings(path: Path) -> dict[str, Any]:
    """A YAML or JSON file of ``name: value``; ValueError or YAMLError where it is no such thing."""
    found = yaml.safe_load(path.read_text("utf-8"))
    require(isinstance(found, dict), f"{path} holds no lines of `name: value`")
    return found


def _check(names: Iterable[str], valid: Collection[str], where: str) -> None:
    if wrong := [name for name in names if name not in valid]:
        raise ValueError(f"{where}: unknown name {wrong[0]!r}" + (f"; did you mean {nearest_name(wrong[0], valid)}?" if valid else ""))


def plan(recipe: str | Path, overrides: Mapping[str, Any] | None = None, out: str | Path | None = None) -> tuple[list[Step], Path]:
    """Every step of a recipe in order, parameters resolved, and the report folder; runs nothing.

    Args:
        recipe: a path, or a bare name in ``notebooks/recipes`` of the current folder.
        overrides: values of the recipe's own parameters.
        out: the report folder, by default ``reports/<recipe>``.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: an unknown notebook or parameter, with the nearest valid one; a recipe parameter left without a value;
            settings of 03_train that TrainConfig refuses.
    """
    home = Path("notebooks").resolve()
    path = Path(recipe) if Path(recipe).is_file() else home / "recipes" / f"{recipe}.yaml"
    out = Path(out or Path("reports", path.stem)).resolve()
    text, document = path.read_text("utf-8"), read_settings(path)
    own = dict(document.get("parameters") or {})
    _check(overrides or (), own, f"-p: parameter of {path.name}")
    own |= overrides or {}
    missing = [name for name, value in own.items() if value is None]
    require(not missing, f"recipe {path.stem} needs {missing}: add -p NAME=VALUE for each")
    known = own | {name: str(out / name.replace(":", "_")) for name in document}
    for name, value in known.items():
        # with its quotes where it is the whole text: a number stays one
        text = text.replace(f'"{{{name}}}"', json.dumps(value))
        text = text.replace(f"{{{name}}}", json.dumps(str(value))[1:-1])
    document = yaml.safe_load(text)
    document.pop("parameters", None)

    steps, notebooks = [], {notebook.stem: notebook for notebook in home.glob("[0-9]*.ipynb")}
    for name, given in document.items():
        source, given = name.partition(":")[0], dict(given or {})
        _check([source], [*notebooks, "parameters"], path.name)
        folder = "run" if source == TRAIN else "output"
        has = [parameter for parameter in papermill.inspect_notebook(notebooks[source]) if parameter != folder]
        common, arms, grid = (given.pop(section, None) or {} for section in SECTIONS)
        common = common | given
        for names in (common, grid, *arms.values()):
            _check(names or (), has + SECTIONS, f"{path.name}: {name}")
        # A notebook is executed at each point of arms x grid x, where it takes one run, runs: (label, parameters) on each axis.
        axes = [[(str(arm), settings or {}) for arm, settings in arms.items()]] if arms else []
        for axis, values in grid.items():
            axes.append([(f"{axis}={value}", {axis: value}) for value in (values if isinstance(values, list) else [values])])
        runs = [str(step.output) for step in steps if step.notebook.stem == TRAIN]
        one = next((parameter for parameter in ("run", "checkpoint", "runs") if parameter in has), "")
        if runs and one and one not in common:
            axes.append([(Path(run).name, {one: run}) for run in runs] if one != "runs" else [("", {one: runs})])
        for point in itertools.product(*axes):
            label = re.sub(r"[^\w.=,+-]+", "-", "_".join(part for part, _ in point)) or ("run" if source == TRAIN else "")
            output = out / name.replace(":", "_") / label
            parameters = {folder: str(output)} | common | {key: value for _, settings in point for key, value in settings.items()}
            if source == TRAIN:
                TrainConfig(**parameters)  # refuses now, not after the steps before it
            # what compares runs reads what the steps before it left in them too
            reads = [s for s in steps if one == "runs" or re.search(rf"{re.escape(str(s.output))}(?![\w.=,+-])", str(parameters))]
            steps.append(Step(f"{name}/{label}".rstrip("/"), notebooks[source], output, parameters, reads))
    return steps, out


# ---------------------------------------------------------------- running it


def _run_step(step: Step, title: str) -> None:
    """Execute one step under a live line and write its page, unless it stands finished and was made of the same inputs.

    A folder made with other inputs (parameters, steps it reads from) is moved aside, never deleted: it may hold days of
    training. In an unfinished one 03_train takes up its run.
    """
    inputs = json.dumps([step.parameters, [read.page.stat().st_mtime_ns for read in step.upstream]])
    note, started = step.output / "inputs.json", []
    if note.exists() and note.read_text("utf-8") != inputs:
        step.output.rename(step.output.with_name(f"{step.output.name}.old-{datetime.now():%Y%m%d-%H%M%S-%f}"))
    if step.page.exists():
        print(f"{title}: unchanged; delete its folder to run it again", file=sys.stderr)
        return
    step.output.mkdir(parents=True, exist_ok=True)
    write_text(note, inputs)
    options = {"progress_bar": {"desc": title}, "on_cell_start": lambda **cell: started.append(cell)}
    try:
        # what a kernel logs would break the live line; what a notebook prints is in the executed notebook
        papermill.execute_notebook(step.notebook, step.executed, step.parameters, extra_arguments=["--log-level=50"], **options)
    except (papermill.exceptions.PapermillExecutionError, RuntimeError) as error:  # the latter of a kernel that died
        why = str(error).strip().splitlines()[-1]
        where = f"notebook: {step.notebook}\n  executed: {step.executed}\nThe same command continues from there."
        raise StepFailed(f"{step.name} failed in cell {len(started)}\n  {why}\n  {where}") from None
    # code folded, pictures inside, nothing fetched from anywhere
    exporter = HTMLExporter(extra_template_paths=[str(TEMPLATES)], template_file="page.html.j2", embed_images=True)
    # paths as from the current folder: those of this machine mean nothing to whom the page is sent
    write_text(step.page, exporter.from_filename(step.executed)[0].replace(f"{Path.cwd()}/", ""))


def _embedded(path: Path) -> str:
    """A picture or animation as an address that holds it; WebP takes a quarter of the bytes of PNG."""
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.save(buffer, "WEBP", quality=75, save_all=True, duration=picture.info.get("duration", 0))
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _write_index(recipe: str, steps: list[Step], out: Path) -> None:
    """One page over the whole recipe: headline table, pictures side by side over the runs, how it was run."""
    tables = [list(csv.reader(path.read_text("utf-8").splitlines())) for step in steps for path in step.output.glob("comparison.csv")]
    environments = [json.loads(path.read_text("utf-8")) for step in steps for path in step.output.glob("environment.json")]
    arms = {re.sub(r"_?seed=\d+", "", run.output.name): TrainConfig(**run.parameters) for run in steps if run.notebook.stem == TRAIN}
    about = {"recipe": recipe, "steps": steps, "tables": tables, "environments": environments, "arms": arms}
    template = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True).get_template("index.html.j2")
    page = template.render(about, out=out, embedded=_embedded, defaults=TrainConfig())
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "index.html", page.replace(f"{out}/", ""))


def run(recipe: str | Path, overrides: Mapping[str, Any] | None = None, out: str | Path | None = None) -> Path:
    """Execute a recipe's steps, skip those that stand finished, and return its ``index.html``.

    Arguments as for :func:`plan`. A step runs again when its parameters or a step it reads from changed; a change of its
    notebook or of the library does not count: delete a step's folder to have it run again.

    Raises:
        ValueError: see :func:`plan`; nothing has run then.
        StepFailed: with the notebook, the cell, the error and the executed notebook.
    """
    steps, out = plan(recipe, overrides, out)
    try:
        for number, step in enumerate(steps, 1):
            _run_step(step, f"[{number}/{len(steps)}] {step.name}")
    finally:
        _write_index(Path(recipe).stem, steps, out)
    return out / "index.html"
