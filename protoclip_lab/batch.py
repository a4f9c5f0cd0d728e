"""Recipes to papermill: a YAML file of notebook steps, arms and a grid becomes executed notebooks and pages.

A recipe maps steps, in the order they run, to the parameters of their notebooks::

    parameters: {size: 6000, flickr8k: null}    # the recipe's own, used as "{size}"; null has to be given
    01_prepare_data: {source: shapes, size: "{size}"}
    02_extract_teacher:minilm: {table: "{01_prepare_data}/pairs.tsv"}    # ":minilm" tells two uses of a notebook apart
    03_train:
      common: {episodes: 8}
      arms: {clip: {objective: clip}, protoclip: {objective: protoclip}}
      grid: {seed: [0, 1]}                      # the only place where a list is an axis
    05_evaluate: {}                             # has a `run` or `checkpoint`: once for each run of 03_train
    06_compare: {}                              # has a parameter `runs`: once, over all of them

``{step}`` is the output folder of an earlier step, as an absolute path. The runner sets ``output``, and ``run``,
``checkpoint`` or ``runs`` where a notebook has them. Names are checked before anything runs.
"""

import base64
import contextlib
import csv
import hashlib
import io
import itertools
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import yaml
from jinja2 import Environment, FileSystemLoader
from PIL import Image
from tqdm import tqdm

from protoclip_lab.config import TrainConfig, nearest_name
from protoclip_lab.storage import write_json, write_text

TRAIN = "03_train"
TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = ["common", "arms", "grid"]
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RecipeError(ValueError):
    """Recipe, overrides and notebooks don't fit together; nothing has run yet."""


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
        record: step.json: what was asked of this step, written first; that it finished, written last.
        executed: the notebook with its outputs; beside it lies the same as ``.html``.
    """

    name: str
    notebook: Path
    output: Path
    parameters: dict[str, Any] = field(default_factory=dict)
    upstream: list["Step"] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.record = self.output / "step.json"
        self.executed = self.output / self.notebook.name

    def recorded(self, file: str = "step.json") -> dict[str, Any]:
        """What a JSON file of its folder says, empty where there is none."""
        path = self.output / file
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    def figures(self) -> list[Path]:
        """Its pictures and animations, in the order they were drawn."""
        return sorted((self.output / "figures").glob("*.[pg][ni][gf]"), key=os.path.getmtime)


# ---------------------------------------------------------------- reading a recipe


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 5e-4 is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if key := next((key for key in keys if keys.count(key) > 1), None):
            raise RecipeError(f"{key!r} stands twice{node.start_mark}; two uses of a step are {key}:a and {key}:b")
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 wants a dot in the mantissa and would read 5e-4 as text
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def read_yaml(text: str) -> Any:
    """YAML or JSON; RecipeError where it is neither."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"not YAML: {error}") from error


def _check(names: Iterable[str], valid: Collection[str], where: str) -> None:
    if wrong := [name for name in names if name not in valid]:
        raise RecipeError(f"{where}: unknown name {wrong[0]!r}" + (f"; did you mean {nearest_name(wrong[0], valid)}?" if valid else ""))


def _cells(notebook: Path, *kinds: str) -> list[tuple[str, list[str]]]:
    """(source, tags) of each cell of these types: ``code``, ``markdown``."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    return [("".join(c["source"]), c["metadata"].get("tags", [])) for c in cells if c["cell_type"] in kinds]


def notebook_parameters(notebook: Path) -> list[str]:
    """Names assigned in the cell tagged ``parameters``, in order.

    Read without papermill, whose import alone takes the second in which a mistyped name should be refused.
    """
    sources = [source for source, tags in _cells(notebook, "code") if "parameters" in tags]
    return re.findall(r"^(\w+)\s*(?::[^=\n]*)?=", "\n".join(sources), re.MULTILINE)


def _sections(step: str, given: Any) -> tuple[dict, dict, dict]:
    """A step's entry as common, arms and grid."""
    given = dict(given or {})
    common, arms, grid = (dict(given.pop(section, None) or {}) for section in SECTIONS)
    for axis, values in grid.items():
        if not isinstance(values, list) or not values:
            raise RecipeError(f"{step}: grid.{axis} is {values!r}; an axis is a list of values, such as [{values}]")
    return common | given, {str(arm): dict(arms[arm] or {}) for arm in arms}, grid


def read_parameter(text: str) -> tuple[str, Any]:
    """``name=value`` as a name and a YAML value; RecipeError where it is no such thing."""
    name, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"-p {text}: write it as name=value")
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


def _uses(section: tuple, has: list[str], planned: list[Step]) -> Iterator[tuple[str, dict, list[Step]]]:
    """(name, parameters, steps read) for each time a notebook runs: arms x grid x, where it takes one run, runs."""
    common, arms, grid = section
    runs = [s for s in planned if s.notebook.stem == TRAIN]
    for arm, *values in itertools.product(arms or [""], *(axis if isinstance(axis, list) else [axis] for axis in grid.values())):
        point = dict(zip(grid, values, strict=True))
        name = re.sub(r"[^\w.=,+-]+", "-", "_".join(filter(None, [arm, *(f"{axis}={value}" for axis, value in point.items())])))
        given = {**common, **arms.get(arm, {}), **point}
        one = next((n for n in ("run", "checkpoint") if n in has), "")
        if runs and one and one not in given:
            yield from ((f"{name}/{run.output.name}", {one: str(run.output), **given}, [run]) for run in runs)
        elif runs and "runs" in has and "runs" not in given:
            yield name, {"runs": [str(run.output) for run in runs], **given}, [s for s in planned if {s, *s.upstream} & {*runs}]
        else:
            yield name, given, []


def plan(recipe: str | Path, overrides: Sequence[str] = (), out: str | Path | None = None) -> tuple[list[Step], Path]:
    """Every step of a recipe in order, parameters resolved, and the report folder; runs nothing.

    Args:
        recipe: a path, or a bare name in ``notebooks/recipes``.
        overrides: ``name=value`` for a recipe's own parameter, ``step.name=value``, ``03_train.arm.name=value``,
            ``03_train.grid.name=[value, value]``; values are YAML.
        out: the report folder, by default ``reports/<recipe>``.

    Raises:
        RecipeError: an unknown recipe, notebook, step, arm or parameter, with the nearest valid one; a recipe
            parameter left without a value.
    """
    # the current folder's notebooks, else those of the checkout this package belongs to
    home = (Path.cwd() if Path("notebooks").is_dir() else Path(__file__).resolve().parents[1]) / "notebooks"
    known_recipes = {p.stem: p for p in sorted((home / "recipes").glob("*.yaml"))}
    if not Path(recipe).is_file():
        _check([str(recipe)], known_recipes, "recipe")
    path = known_recipes.get(str(recipe), Path(recipe))
    document = read_yaml(path.read_text("utf-8"))
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: a recipe is a mapping from steps to their parameters")
    own = dict(document.pop("parameters", None) or {})
    notebooks = {p.stem: p for p in sorted(home.glob("[0-9]*.ipynb"))}
    _check([step.partition(":")[0] for step in document], [*notebooks, "parameters"], path.name)

    steps = {step: _sections(step, given) for step, given in document.items()}
    sources = {step: notebooks[step.partition(":")[0]] for step in steps}
    folder_of = {step: "run" if source.stem == TRAIN else "output" for step, source in sources.items()}
    has = {step: [n for n in notebook_parameters(sources[step]) if n != folder_of[step]] for step in steps}
    places = dict.fromkeys(own, own)
    for step, (common, arms, grid) in steps.items():
        for part, given in {step: common, f"{step}.grid": grid, **{f"{step}.{arm}": arms[arm] for arm in arms}}.items():
            _check(given, has[step] + SECTIONS, f"{path.name}: {part}")
            places |= {f"{part}.{name}": given for name in has[step] if name not in grid}
        places |= {f"{step}.{name}": grid for name in grid}
    for key, value in map(read_parameter, overrides):
        _check([key], places, "-p")
        step, _, name = key.rpartition(".")
        if arm := next((arm for arm, given in steps.get(step, ({}, {}))[1].items() if name in given), None):
            raise RecipeError(f"-p {key}: arm {arm} sets {name} itself; write -p {step}.{arm}.{name}={value}")
        places[key][name] = value
    known = {name: os.environ.get(name.upper()) if value is None else value for name, value in own.items()}
    if name := next((name for name, value in known.items() if value is None), None):
        raise RecipeError(f"recipe {path.stem} needs {name}: add -p {name}=FOLDER, or set {name.upper()}=FOLDER")

    out = Path(out or home.parent / "reports" / path.stem).resolve()
    planned: list[Step] = []
    for step, section in steps.items():
        for use, given, read in _uses(section, has[step], planned):
            use = use.strip("/") or ("run" if folder_of[step] == "run" else "")
            name, output = f"{step}/{use}".rstrip("/"), out / step.replace(":", "_") / use
            if any(s.output == output for s in planned):
                raise RecipeError(f"{path.name}: two runs would both write to {output}; rename one")
            parameters, used = _resolve({folder_of[step]: str(output), **given}, known, f"{path.name}: {name}")
            if folder_of[step] == "run":
                try:  # now, not after the steps before it
                    TrainConfig(**parameters)
                except ValueError as error:
                    raise RecipeError(f"{path.name}: {name}: {error}") from error
            upstream = [s for s in planned if s in read or s.name.partition("/")[0] in used]
            planned.append(Step(name, sources[step], output, parameters, upstream))
        known[step] = str(out / step.replace(":", "_"))
    return planned, out


# ---------------------------------------------------------------- running it


def _tick(bar: tqdm) -> None:
    """Redraw each second, so that the clock of a long cell runs."""
    while not bar.disable:
        time.sleep(1)
        bar.refresh()


def _execute(step: Step, bar: tqdm) -> None:
    """Run the notebook in a kernel of this interpreter, whatever kernels are registered under its name."""
    import papermill
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager, kernelspec
    from nbclient.exceptions import DeadKernelError

    class Kernel(AsyncKernelManager):
        # what a kernel logs would break the live line; what a notebook prints is in the executed notebook
        kernel_spec = kernelspec.KernelSpec(**get_kernel_dict(extra_arguments=["--log-level=50"]))

    def on_cell(cell: Any, cell_index: int) -> None:
        bar.n = cell_index + 1

    options = dict(kernel_name="python3", language="python", kernel_manager_class=Kernel, on_cell_start=on_cell, progress_bar=False)
    where = f"\n  notebook: {step.notebook}\n  executed: {step.executed}\nThe same command continues from there."
    try:
        papermill.execute_notebook(step.notebook, step.executed, step.parameters, cwd=step.notebook.parents[1], **options)
    except papermill.exceptions.PapermillExecutionError as error:
        what = f"(In [{error.exec_count}]: {error.source.strip().splitlines()[0]})\n  {error.ename}: {error.evalue}"
        raise StepFailed(f"{step.name} failed in cell {bar.n} of {bar.total} {what}{where}") from None
    except DeadKernelError:
        raise StepFailed(f"{step.name}: the kernel died in cell {bar.n} of {bar.total}; was there enough memory?{where}") from None


def _write_page(step: Step) -> None:
    """The executed notebook as one HTML file: code folded, pictures inside, nothing fetched from anywhere."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(extra_template_paths=[str(TEMPLATES)], template_file="page.html.j2", embed_images=True)
    # paths as from the kernel's folder: those of this machine mean nothing to whom the page is sent
    write_text(step.executed.with_suffix(".html"), exporter.from_filename(step.executed)[0].replace(f"{step.notebook.parents[1]}/", ""))


def _run_step(step: Step, title: str) -> None:
    """Execute one step unless it stands finished; its record is written first and last.

    A folder made with other inputs (parameters, upstream records) is moved aside, never deleted: it may hold days of
    training. One whose notebook alone was edited is kept, so that 03_train takes up its run.
    """
    given = [step.parameters, [upstream.record.read_text("utf-8") for upstream in step.upstream]]
    texts = [json.dumps(given, sort_keys=True, default=str), json.dumps(_cells(step.notebook, "code"))]
    inputs, code = (hashlib.sha256("".join(texts[:n]).encode()).hexdigest() for n in (1, 2))
    record, found = {"step": step.name, "inputs": inputs, "code": code, "finished": None}, step.recorded()
    if found and found["inputs"] != inputs:
        aside = (step.output.with_name(f"{step.output.name}.old-{n}") for n in itertools.count(1))
        step.output.rename(next(path for path in aside if not path.exists()))
    elif found and found["code"] == code and found["finished"]:
        print(f"{title}  unchanged since {found['finished'][:19]}; delete its folder to run it again", file=sys.stderr)
        return
    step.output.mkdir(parents=True, exist_ok=True)
    write_json(step.record, record)
    start, total = time.monotonic(), len(_cells(step.notebook, "code", "markdown")) + 1
    with tqdm(desc=title, total=total, bar_format="{desc}  cell {n}/{total}  {elapsed}", dynamic_ncols=True, disable=None) as bar:
        threading.Thread(target=_tick, args=[bar], daemon=True).start()
        if bar.disable:  # a log
            print(f"{title}  starts  0:00:00", file=sys.stderr, flush=True)
        _execute(step, bar)
        _write_page(step)
        record |= {"finished": datetime.now().isoformat(" "), "seconds": round(time.monotonic() - start)}
        write_json(step.record, record)
        if bar.disable:
            print(f"{title}  done  {timedelta(seconds=record['seconds'])}", file=sys.stderr, flush=True)


def _embedded(path: Path) -> str:
    """A picture or animation as an address that holds it; WebP takes a quarter of the bytes of PNG."""
    buffer = io.BytesIO()
    # one that a kill cut off in mid-write is missing from the page, not the page
    with contextlib.suppress(OSError), Image.open(path) as picture:
        picture.save(buffer, "WEBP", quality=88, save_all=True, duration=picture.info.get("duration", 0))
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


def _stop(signum: int, frame: Any) -> None:
    """On SIGINT or SIGTERM: leave no kernel nor child of one behind, then KeyboardInterrupt(signal)."""
    for caught in SIGNALS:
        signal.signal(caught, signal.SIG_IGN)  # an impatient second Ctrl-C must not cut the clean-up short
    logging.getLogger("asyncio").disabled = True  # it would report each task that waited for the kernel
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    raise KeyboardInterrupt(signum)


def run(recipe: str | Path, overrides: Sequence[str] = (), out: str | Path | None = None) -> Path:
    """Execute a recipe's steps, skip those that stand finished, and return its ``index.html``.

    Arguments as for :func:`plan`. A step runs again when its parameters, its notebook's code or a step it reads from
    changed; a change in the library does not count: delete a step's folder to have it run again.

    Raises:
        RecipeError: see :func:`plan`.
        StepFailed: with the notebook, the cell, the error and the executed notebook.
        KeyboardInterrupt: on SIGINT or SIGTERM, with the signal's number; kernels are gone by then.
    """
    steps, out = plan(recipe, overrides, out)
    with contextlib.ExitStack() as at_the_end:
        for caught in SIGNALS:
            at_the_end.callback(signal.signal, caught, signal.signal(caught, _stop))
        at_the_end.callback(_write_index, Path(recipe).stem, steps, out)
        for number, step in enumerate(steps, 1):
            _run_step(step, f"[{number}/{len(steps)}] {step.name}")
    return out / "index.html"
