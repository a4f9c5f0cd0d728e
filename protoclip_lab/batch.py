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

``{step}`` is the output folder of an earlier step, as an absolute path. The runner sets ``output``, and ``run``,
``checkpoint`` or ``runs`` where a notebook has them. Names are checked before anything runs.
"""

import base64
import contextlib
import csv
import io
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import yaml
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from protoclip_lab.config import TrainConfig, nearest_name, require
from protoclip_lab.storage import write_json, write_text

TRAIN = "03_train"
TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = ["common", "arms", "grid"]


class StepFailed(RuntimeError):
    """A notebook raised, or its kernel died."""


@dataclass(eq=False)
class Step:
    """One notebook to execute once.

    Attributes:
        name: the recipe's step; where it is made for a run of 03_train, a slash and that run's name follow.
        notebook: the source notebook.
        output: the folder it writes to; for 03_train the run directory.
        parameters: what is injected, references resolved.
        upstream: the steps whose outputs it was given.
        executed: the notebook with its outputs; beside it lies the same as ``.html``.
    """

    name: str
    notebook: Path
    output: Path
    parameters: dict[str, Any]
    upstream: list["Step"]

    def __post_init__(self) -> None:
        self.executed = self.output / self.notebook.name

    def recorded(self, file: str = "step.json") -> dict[str, Any]:
        """What a JSON file of its folder says, empty where there is none; step.json says what was asked, and that it finished."""
        path = self.output / file
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    def figures(self) -> list[Path]:
        """Its pictures and animations, in the order they were drawn."""
        return sorted((self.output / "figures").glob("*.[pg][ni][gf]"), key=lambda path: path.stat().st_mtime)


# ---------------------------------------------------------------- reading a recipe


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 5e-4 is a number."""


# YAML 1.1 wants a dot in the mantissa and would read it as text
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def read_yaml(text: str) -> Any:
    """YAML or JSON; ValueError where it is neither."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file of ``name: value``; ValueError where it is no such thing."""
    if not isinstance(found := read_yaml(path.read_text("utf-8")), dict):
        raise ValueError(f"{path} holds no lines of `name: value`")
    return found


def _check(names: Iterable[str], valid: Collection[str], where: str) -> None:
    if wrong := [name for name in names if name not in valid]:
        raise ValueError(f"{where}: unknown name {wrong[0]!r}" + (f"; did you mean {nearest_name(wrong[0], valid)}?" if valid else ""))


def _cells(notebook: Path, kind: str) -> list[tuple[str, list[str]]]:
    """(source, tags) of each cell of a type, ``code`` or ``markdown``."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    return [("".join(c["source"]), c["metadata"].get("tags", [])) for c in cells if c["cell_type"] == kind]


def notebook_parameters(notebook: Path) -> list[str]:
    """Names assigned in the cell tagged ``parameters``, in order.

    Read without papermill, whose import alone takes the second in which a mistyped name should be refused.
    """
    sources = [source for source, tags in _cells(notebook, "code") if "parameters" in tags]
    return re.findall(r"^(\w+)\s*(?::[^=\n]*)?=", "\n".join(sources), re.MULTILINE)


def read_parameter(text: str) -> tuple[str, Any]:
    """``name=value`` as a name and a YAML value; ValueError where it is no such thing."""
    name, value = text.split("=", 1)
    return name, read_yaml(value)


def _resolve(parameters: dict[str, Any], known: Mapping[str, Any], where: str) -> tuple[dict[str, Any], set[str]]:
    """Parameters with each known ``{name}`` put in, and those names; other braces ("a photo of a {}.") stay."""
    text = json.dumps(parameters, default=str)
    used = set(re.findall(r"{([\w:.-]+)}", text))
    _check([name for name in used if re.match(r"\d\d_", name)], known, f"{where}: a parameter names no earlier step")
    for name in sorted(used.intersection(known)):
        # with its quotes where it is the whole text: a number stays one
        text = text.replace(f'"{{{name}}}"', json.dumps(known[name]))
        text = text.replace(f"{{{name}}}", json.dumps(str(known[name]))[1:-1])
    return json.loads(text), used


def _uses(common: dict, arms: dict, grid: dict, has: list[str], planned: list[Step]) -> Iterator[tuple[str, dict, list[Step]]]:
    """(name, parameters, steps read) for each time a notebook runs: arms x grid x, where it takes one run, runs."""
    runs = [s for s in planned if s.notebook.stem == TRAIN]
    for arm, *values in itertools.product(arms or [""], *(axis if isinstance(axis, list) else [axis] for axis in grid.values())):
        point = dict(zip(grid, values, strict=True))
        name = re.sub(r"[^\w.=,+-]+", "-", "_".join(filter(None, [str(arm), *(f"{axis}={value}" for axis, value in point.items())])))
        given = {**common, **(arms.get(arm) or {}), **point}
        one = next((n for n in ("run", "checkpoint") if n in has), "")
        if runs and one and one not in given:
            yield from ((f"{name}/{run.output.name}", {one: str(run.output), **given}, [run]) for run in runs)
        elif runs and "runs" in has and "runs" not in given:
            yield name, {"runs": [str(run.output) for run in runs], **given}, [s for s in planned if {s, *s.upstream} & {*runs}]
        else:
            yield name, given, []


def plan(recipe: str | Path, overrides: Mapping[str, Any] | None = None, out: str | Path | None = None) -> tuple[list[Step], Path]:
    """Every step of a recipe in order, parameters resolved, and the report folder; runs nothing.

    Args:
        recipe: a path, or a bare name in ``notebooks/recipes``.
        overrides: values of the recipe's own parameters.
        out: the report folder, by default ``reports/<recipe>``.

    Raises:
        ValueError: an unknown recipe, with those there are; an unknown notebook or parameter, with the nearest valid one; a
            recipe parameter left without a value; settings of 03_train that TrainConfig refuses.
    """
    # the current folder's notebooks, else those of the checkout this package belongs to
    home = (Path.cwd() if Path("notebooks").is_dir() else Path(__file__).resolve().parents[1]) / "notebooks"
    known_recipes = {p.stem: p for p in sorted((home / "recipes").glob("*.yaml"))}
    path = Path(recipe) if Path(recipe).is_file() else known_recipes.get(str(recipe))
    require(path, f"recipe {recipe!r} is neither a file nor one of {[*known_recipes]}")
    document = read_mapping(path)
    own = dict(document.pop("parameters", None) or {})
    _check(overrides or (), own, f"-p: parameter of {path.name}")
    own |= overrides or {}
    own = {name: os.environ.get(name.upper()) if value is None else value for name, value in own.items()}
    if missing := [name for name, value in own.items() if value is None]:
        raise ValueError(f"recipe {path.stem} needs {missing[0]}: add -p {missing[0]}=VALUE, or set {missing[0].upper()}=VALUE")

    notebooks = {p.stem: p for p in sorted(home.glob("[0-9]*.ipynb"))}
    out = Path(out or home.parent / "reports" / path.stem).resolve()
    known, planned = dict(own), []
    for step, given in document.items():
        source = step.partition(":")[0]
        _check([source], [*notebooks, "parameters"], path.name)
        folder = "run" if source == TRAIN else "output"
        has = [name for name in notebook_parameters(notebooks[source]) if name != folder]
        given = dict(given or {})
        common, arms, grid = (given.pop(section, None) or {} for section in SECTIONS)
        common = common | given
        grid = {axis: own.get(values.strip("{}"), values) if isinstance(values, str) else values for axis, values in grid.items()}
        for names in (common, grid, *arms.values()):
            _check(names or (), has + SECTIONS, f"{path.name}: {step}")
        for use, parameters, read in _uses(common, arms, grid, has, planned):
            use = use.strip("/") or ("run" if source == TRAIN else "")
            name, output = f"{step}/{use}".rstrip("/"), out / step.replace(":", "_") / use
            require(all(s.output != output for s in planned), f"{path.name}: two runs would both write to {output}; rename one")
            parameters, used = _resolve({folder: str(output), **parameters}, known, f"{path.name}: {name}")
            if source == TRAIN:
                TrainConfig(**parameters)  # refuses now, not after the steps before it
            upstream = [s for s in planned if s in read or s.name.partition("/")[0] in used]
            planned.append(Step(name, notebooks[source], output, parameters, upstream))
        known[step] = str(out / step.replace(":", "_"))
    return planned, out


# ---------------------------------------------------------------- running it


def _execute(step: Step, title: str) -> None:
    """Run the notebook in a kernel of this environment, under a live line."""
    import papermill

    started = []
    line = {"desc": title, "bar_format": "{desc}  {n}/{total} cells  {elapsed}", "leave": False, "disable": None}
    options = {"kernel_name": "python3", "language": "python", "cwd": step.notebook.parents[1], "progress_bar": line}
    # what a kernel logs would break the live line; what a notebook prints is in the executed notebook
    options |= {"extra_arguments": ["--log-level=50"], "on_cell_start": lambda **cell: started.append(cell)}
    try:
        papermill.execute_notebook(step.notebook, step.executed, step.parameters, **options)
    except (papermill.exceptions.PapermillExecutionError, RuntimeError) as error:  # the latter of a kernel that died
        why = f"{error.ename}: {error.evalue}" if hasattr(error, "ename") else f"{error}; was there enough memory?"
        where = f"\n  notebook: {step.notebook}\n  executed: {step.executed}\nThe same command continues from there."
        raise StepFailed(f"{step.name} failed in cell {len(started)}\n  {why}{where}") from None


def _write_page(step: Step) -> None:
    """The executed notebook as one HTML file: code folded, pictures inside, nothing fetched from anywhere."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(extra_template_paths=[str(TEMPLATES)], template_file="page.html.j2", embed_images=True)
    # paths as from the kernel's folder: those of this machine mean nothing to whom the page is sent
    write_text(step.executed.with_suffix(".html"), exporter.from_filename(step.executed)[0].replace(f"{step.notebook.parents[1]}/", ""))


def _run_step(step: Step, title: str) -> None:
    """Execute one step unless it stands finished; its record is written first and last.

    A folder made with other inputs (parameters, steps it reads from) is moved aside, never deleted: it may hold days of
    training. One whose notebook alone was edited is kept, so that 03_train takes up its run.
    """
    inputs = [step.parameters, [upstream.recorded()["finished"] for upstream in step.upstream]]
    record = {"step": step.name, "inputs": inputs, "code": [source for source, _ in _cells(step.notebook, "code")], "finished": None}
    if (found := step.recorded()) and found["inputs"] != inputs:
        step.output.rename(step.output.with_name(f"{step.output.name}.old-{datetime.now():%Y%m%d-%H%M%S-%f}"))
    elif found and found["code"] == record["code"] and found["finished"]:
        print(f"{title}  unchanged since {found['finished'][:19]}; delete its folder to run it again", file=sys.stderr)
        return
    step.output.mkdir(parents=True, exist_ok=True)
    write_json(step.output / "step.json", record)
    start = time.monotonic()
    _execute(step, title)
    _write_page(step)
    record |= {"finished": datetime.now().isoformat(" "), "seconds": round(time.monotonic() - start)}
    write_json(step.output / "step.json", record)
    print(f"{title}  done  {timedelta(seconds=record['seconds'])}", file=sys.stderr, flush=True)


def _embedded(path: Path) -> str:
    """A picture or animation as an address that holds it; WebP takes a quarter of the bytes of PNG."""
    buffer = io.BytesIO()
    # one that a kill cut off in mid-write is missing from the page, not the page
    with contextlib.suppress(OSError), Image.open(path) as picture:
        picture.save(buffer, "WEBP", quality=75, save_all=True, duration=picture.info.get("duration", 0))
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _write_index(recipe: str, steps: list[Step], out: Path) -> None:
    """One page over the whole recipe: headline table, pictures side by side over the runs, how it was run."""
    titles = {step.notebook.stem: _cells(step.notebook, "markdown")[0][0].partition("\n")[0].lstrip("# ") for step in steps}
    tables = [list(csv.reader(path.read_text("utf-8").splitlines())) for step in steps for path in step.output.glob("comparison.csv")]
    arms = {re.sub(r"_?seed=\d+", "", run.output.name): TrainConfig(**run.parameters) for run in steps if run.notebook.stem == TRAIN}
    about = {"recipe": recipe, "steps": steps, "titles": titles, "tables": tables, "arms": arms, "out": out, "embedded": _embedded}
    template = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True).get_template("index.html.j2")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "index.html", template.render(about, defaults=TrainConfig()).replace(f"{out}/", ""))


def stop(signum: int, frame: Any) -> None:
    """Handle SIGINT or SIGTERM while a recipe runs: leave no kernel nor child of one behind, then KeyboardInterrupt."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    raise KeyboardInterrupt


def run(recipe: str | Path, overrides: Mapping[str, Any] | None = None, out: str | Path | None = None) -> Path:
    """Execute a recipe's steps, skip those that stand finished, and return its ``index.html``.

    Arguments as for :func:`plan`. A step runs again when its parameters, its notebook's code or a step it reads from
    changed; a change in the library does not count: delete a step's folder to have it run again.

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
