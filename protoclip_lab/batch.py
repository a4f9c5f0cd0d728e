"""Recipes to papermill: a YAML file of notebook steps, arms and a grid becomes executed notebooks and pages.

A recipe maps steps, in the order they run, to the parameters of their notebooks::

    parameters: {size: 6000, flickr8k: null}    # the recipe's own, used as "{size}"; null has to be given
    01_prepare_data: {source: shapes, size: "{size}"}
    02_extract_teacher:minilm: {table: "{01_prepare_data}/pairs.tsv"}    # ":minilm" tells two uses of a notebook apart
    03_train:
      common: {episodes: 8}
      arms: {clip: {objective: clip}, protoclip: {objective: protoclip}}
      grid: {seed: [0, 1]}                      # the only place where a list is an axis
    05_evaluate: {}                             # has a parameter `run`: once for each run of 03_train
    06_compare: {}                              # has a parameter `runs`: once, over all of them

``{step}`` is the output folder of an earlier step, as an absolute path. The runner sets ``output``, and ``run`` or
``runs`` where a notebook has them. Names are checked before anything runs.
"""

import ast
import contextlib
import csv
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader

from protoclip_lab import __version__
from protoclip_lab.config import TrainConfig, nearest_name

TRAIN = "03_train"
TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = ["common", "arms", "grid"]
REFERENCE = re.compile(r"{([\w:.-]+)}")


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
    """

    name: str
    notebook: Path
    output: Path
    parameters: dict[str, Any] = field(default_factory=dict)
    upstream: list["Step"] = field(default_factory=list)

    @property
    def record(self) -> Path:
        """step.json: what was asked of this step, written first; that it finished, written last."""
        return self.output / "step.json"

    @property
    def executed(self) -> Path:
        """The notebook with its outputs."""
        return self.output / self.notebook.name

    @property
    def page(self) -> Path:
        """The executed notebook as HTML."""
        return self.executed.with_suffix(".html")


# ---------------------------------------------------------------- reading a recipe


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 5e-4 is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
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


def _check(names: Sequence[str], valid: Sequence[str], where: str) -> None:
    for name in names:
        if name in valid:
            continue
        same_ending = [v for v in valid if v.endswith(f".{name}")]
        hint = f"; did you mean {nearest_name(name, same_ending or valid)}?" if valid else ""
        raise RecipeError(f"{where}: unknown name {name!r}{hint}")


def _cells(notebook: Path, kind: str) -> list[tuple[str, list[str]]]:
    """(source, tags) of each cell of one type: ``code`` or ``markdown``."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    return [("".join(c["source"]), c["metadata"].get("tags", [])) for c in cells if c["cell_type"] == kind]


def notebook_parameters(notebook: Path) -> list[str]:
    """Names assigned in the cell tagged ``parameters``, in order.

    Read without papermill, whose import alone takes the second in which a mistyped name should be refused.
    """
    bodies = [ast.parse(source).body for source, tags in _cells(notebook, "code") if "parameters" in tags]
    statements = itertools.chain.from_iterable(bodies)
    targets = [t for s in statements for t in getattr(s, "targets", [getattr(s, "target", None)])]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def project_root() -> Path:
    """The folder that holds ``notebooks/``: the current one, else the checkout this package belongs to."""
    return Path.cwd() if Path("notebooks").is_dir() else Path(__file__).resolve().parents[1]


def find_recipe(recipe: str | Path, root: Path) -> Path:
    """A path as given, or the bare name of a recipe in ``notebooks/recipes``."""
    known = {p.stem: p for p in sorted((root / "notebooks" / "recipes").glob("*.yaml"))}
    if Path(recipe).is_file():
        return Path(recipe)
    _check([str(recipe)], list(known), "recipe")
    return known[str(recipe)]


def _sections(step: str, given: Any) -> dict[str, dict[str, Any]]:
    """A step's entry as common, arms and grid; only 03_train has the last two."""
    given = dict(given or {})
    if step.partition(":")[0] != TRAIN:
        return {"common": given, "arms": {"": {}}, "grid": {}}
    arms = {str(arm): dict(values or {}) for arm, values in (given.pop("arms", None) or {"": {}}).items()}
    grid = dict(given.pop("grid", None) or {})
    for axis, values in grid.items():
        if not isinstance(values, list) or not values:
            raise RecipeError(f"{step}: grid.{axis} is {values!r}; an axis is a list of values, such as [{values}]")
    return {"common": {**(given.pop("common", None) or {}), **given}, "arms": arms, "grid": grid}


def _override(override: str, own: dict[str, Any], steps: dict[str, dict], names: dict[str, list[str]]) -> None:
    """Put one ``name=value`` where it belongs: the recipe's own parameters, a step's, an arm's or the grid's."""
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"-p {override}: write it as name=value")
    places = {
        ".".join(filter(None, place)): place
        for step, section in steps.items()
        for place in itertools.product([step], ["", *section["arms"]], names[step])
    }
    _check([key], [*own, *places], "-p")
    value = read_yaml(text)
    if key in own:
        own[key] = value
        return
    step, arm, name = places[key]
    section = steps[step]
    taken = [a for a, values in section["arms"].items() if name in values]
    if name in section["grid"]:
        section["grid"][name] = value if isinstance(value, list) else [value]
    elif arm:
        section["arms"][arm][name] = value
    elif taken:
        raise RecipeError(f"-p {override}: arm {taken[0]} sets {name} itself; write -p {step}.{taken[0]}.{name}={text}")
    else:
        section["common"][name] = value


def _resolve(value: Any, known: Mapping[str, Any], used: set[str]) -> Any:
    """``value`` with each known ``{name}`` put in and noted in ``used``; other braces ("a photo of a {}.") stay."""
    if isinstance(value, dict):
        return {key: _resolve(v, known, used) for key, v in value.items()}
    if isinstance(value, list):
        return [_resolve(v, known, used) for v in value]
    if not isinstance(value, str):
        return value
    references = REFERENCE.findall(value)
    _check([r for r in references if re.match(r"\d\d_", r)], list(known), f"{value!r} names no earlier step")
    used.update(r for r in references if r in known)
    whole = REFERENCE.fullmatch(value)
    if whole and whole[1] in known:
        return known[whole[1]]
    return REFERENCE.sub(lambda match: str(known.get(match[1], match[0])), value)


def _own_parameters(own: dict[str, Any], recipe: str) -> dict[str, Any]:
    """The recipe's own parameters; those left null come from the environment variable of the same name."""
    known: dict[str, Any] = {}
    for name, value in own.items():
        value = os.environ.get(name.upper()) if value is None else value
        if value is None:
            raise RecipeError(f"recipe {recipe} needs {name}: add -p {name}=FOLDER, or set {name.upper()}=FOLDER")
        known[name] = _resolve(value, known, set())
    return known


def _variants(section: dict[str, dict]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, parameters) of each arm at each point of the grid."""
    for arm, values in section["arms"].items():
        for point in itertools.product(*section["grid"].values()):
            axes = dict(zip(section["grid"], point, strict=True))
            name = "_".join([arm, *(f"{axis}={value}" for axis, value in axes.items())]).strip("_")
            yield re.sub(r"[^\w.=,+-]+", "-", name) or "run", {**section["common"], **values, **axes}


def _check_settings(parameters: dict[str, Any], where: str) -> None:
    """Refuse out-of-range settings of a training now, not after the steps before it."""
    try:
        TrainConfig(**{name: value for name, value in parameters.items() if name in TrainConfig.model_fields})
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


def _uses(common: dict, has: list[str], planned: list[Step]) -> list[tuple[str, dict, list[Step]]]:
    """(run's name, parameters, steps read) for each time a step other than 03_train is executed."""
    runs = [s for s in planned if s.notebook.stem == TRAIN]
    if runs and "run" in has and "run" not in common:
        return [(run.output.name, {"run": str(run.output), **common}, [run]) for run in runs]
    if runs and "runs" in has and "runs" not in common:
        made_from_runs = [s for s in planned if s in runs or set(runs) & set(s.upstream)]
        return [("", {"runs": [str(run.output) for run in runs], **common}, made_from_runs)]
    return [("", common, [])]


def plan(recipe: str | Path, overrides: Sequence[str] = (), out: str | Path | None = None) -> tuple[list[Step], Path]:
    """Every step of a recipe in order, parameters resolved, and the report folder; runs nothing.

    Args:
        recipe: a path, or a bare name in ``notebooks/recipes``.
        overrides: ``name=value`` for a recipe's own parameter, ``step.name=value``, ``03_train.arm.name=value``;
            values are YAML.
        out: the report folder, by default ``reports/<recipe>``.

    Raises:
        RecipeError: an unknown recipe, notebook, step, arm or parameter, with the nearest valid one; a recipe
            parameter left without a value.
    """
    root = project_root()
    path = find_recipe(recipe, root)
    document = read_yaml(path.read_text("utf-8"))
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: a recipe is a mapping from steps to their parameters")
    own = dict(document.pop("parameters", None) or {})
    notebooks = {p.stem: p for p in sorted((root / "notebooks").glob("[0-9]*.ipynb"))}
    _check([step.partition(":")[0] for step in document], [*notebooks, "parameters"], path.name)

    steps = {step: _sections(step, given) for step, given in document.items()}
    sources = {step: notebooks[step.partition(":")[0]] for step in steps}
    has = {step: notebook_parameters(source) for step, source in sources.items()}
    settable = {s: [n for n in has[s] if n != "output" and (n != "run" or sources[s].stem != TRAIN)] for s in steps}
    for step, section in steps.items():
        for part, given in {"common": section["common"], "grid": section["grid"], **section["arms"]}.items():
            _check(list(given), [*settable[step], *SECTIONS], f"{path.name}: {step}.{part}".removesuffix(".common"))
    for override in overrides:
        _override(override, own, steps, settable)
    known = _own_parameters(own, path.stem)

    out = Path(out or root / "reports" / path.stem).resolve()
    planned: list[Step] = []
    for step, section in steps.items():
        folder = out / step.replace(":", "_")
        if sources[step].stem == TRAIN:
            uses = [(run, {"run": str(folder / run), **given}, []) for run, given in _variants(section)]
        else:
            uses = _uses(section["common"], has[step], planned)
        for run, given, read in uses:
            name = f"{step}/{run}".rstrip("/")
            if any(s.output == folder / run for s in planned):
                raise RecipeError(f"{path.name}: two runs would both write to {folder / run}; rename one")
            used: set[str] = set()
            parameters = {"output": str(folder / run), **_resolve(given, known, used)}
            parameters = {n: value for n, value in parameters.items() if n in has[step]}
            if sources[step].stem == TRAIN:
                _check_settings(parameters, f"{path.name}: {name}")
            upstream = [s for s in planned if s in read or s.name.partition("/")[0] in used]
            planned.append(Step(name, sources[step], folder / run, parameters, upstream))
        known[step] = str(folder)
    return planned, out


# ---------------------------------------------------------------- running it


def _digests(step: Step) -> tuple[str, str]:
    """What a step is given (parameters, upstream records), and that together with its notebook's code."""
    given = [step.parameters, [upstream.record.read_text("utf-8") for upstream in step.upstream]]
    texts = [json.dumps(given, sort_keys=True, default=str), json.dumps(_cells(step.notebook, "code"))]
    return tuple(hashlib.sha256("".join(texts[:n]).encode()).hexdigest() for n in (1, 2))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, "utf-8")
    part.replace(path)


def _finished(step: Step, inputs: str, code: str) -> str | None:
    """When the step was finished as it is asked for now, if it was.

    A folder made with other inputs is moved aside, never deleted: it may hold days of training. One whose notebook
    alone was edited is kept, so that 03_train takes up its run.
    """
    if not step.record.exists():
        return None
    record = json.loads(step.record.read_text("utf-8"))
    if record["inputs"] == inputs:
        return record["finished"] if record["code"] == code else None
    aside = (step.output.with_name(f"{step.output.name}.old-{n}") for n in itertools.count(1))
    step.output.rename(next(path for path in aside if not path.exists()))
    return None


class _Line:
    """``[2/7] 03_train/clip  cell 4/9  0:01:23``: redrawn each second on a terminal, begun and ended in a log."""

    def __init__(self, title: str, cells: int) -> None:
        self.title, self.cells, self.cell, self.start = title, cells, 0, time.monotonic()
        self.live, self.over = sys.stderr.isatty(), threading.Event()
        self.thread = threading.Thread(target=self._tick, daemon=True)

    def _tick(self) -> None:
        while self.live and not self.over.wait(1):
            self.draw(f"cell {self.cell}/{self.cells}")

    def seconds(self) -> int:
        return round(time.monotonic() - self.start)

    def draw(self, state: str, end: str = "") -> None:
        text = f"{self.title}  {state}  {timedelta(seconds=self.seconds())}"
        columns = shutil.get_terminal_size().columns - 1 if self.live else None
        print("\r\x1b[K" * self.live + text[:columns], end=end, file=sys.stderr, flush=True)

    def on_cell(self, cell: Any, cell_index: int) -> None:
        """nbclient's hook."""
        self.cell = cell_index + 1

    def __enter__(self) -> "_Line":
        self.draw("starts", end="" if self.live else "\n")
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.draw("done" if kind is None else f"stopped in cell {self.cell}/{self.cells}", end="\n")


def _execute(step: Step, line: _Line) -> None:
    """Run the notebook in a kernel of this interpreter, whatever kernels are registered under its name."""
    import papermill
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    class Kernel(AsyncKernelManager):
        # what a kernel logs would break the live line; what a notebook prints is in the executed notebook
        kernel_spec = KernelSpec(**get_kernel_dict(extra_arguments=["--log-level=50"]))

    where = f"\n  notebook: {step.notebook}\n  executed: {step.executed}"
    try:
        papermill.execute_notebook(
            step.notebook,
            step.executed,
            step.parameters,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            cwd=step.notebook.parents[1],
            kernel_manager_class=Kernel,
            on_cell_start=line.on_cell,
        )
    except PapermillExecutionError as error:
        first = error.source.strip().partition("\n")[0]
        cell = f"cell {error.cell_index + 1} of {line.cells} (In [{error.exec_count}]: {first})"
        raise StepFailed(f"{step.name} failed in {cell}\n  {error.ename}: {error.evalue}{where}") from None
    except DeadKernelError:
        cell = f"cell {line.cell} of {line.cells}"
        raise StepFailed(f"{step.name}: the kernel died in {cell}; was there enough memory?{where}") from None


def _write_page(step: Step) -> None:
    """The executed notebook as one HTML file: code folded, pictures inside, nothing fetched from anywhere."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(extra_template_paths=[str(TEMPLATES)], template_file="page.html.j2", embed_images=True)
    _write(step.page, exporter.from_filename(step.executed)[0])


def _run_step(step: Step, count: str) -> None:
    """Execute one step unless it stands finished; its record is written first and last."""
    inputs, code = _digests(step)
    done = _finished(step, inputs, code)
    if done:
        print(f"{count} {step.name}  unchanged since {done[:19]}; delete its folder to run it again", file=sys.stderr)
        return
    record = {"step": step.name, "inputs": inputs, "code": code, "version": __version__, "finished": None}
    _write(step.record, json.dumps(record, indent=1))
    cells = len(json.loads(step.notebook.read_text("utf-8"))["cells"]) + bool(step.parameters)
    with _Line(f"{count} {step.name}", cells) as line:
        _execute(step, line)
        _write_page(step)
        record |= {"finished": datetime.now().isoformat(" "), "seconds": line.seconds()}
        _write(step.record, json.dumps(record, indent=1))


def _write_index(name: str, steps: list[Step], out: Path) -> Path:
    """One page over the whole recipe: headline table, pictures side by side over the runs, links to the steps."""
    groups, table = [], []
    for key, group in itertools.groupby(steps, key=lambda s: s.name.partition("/")[0]):
        uses, pictures = [], {}
        for step in group:
            record = json.loads(step.record.read_text("utf-8")) if step.record.exists() else {}
            label, where = step.name[len(key) + 1 :], step.output.relative_to(out)
            page = where / step.page.name if step.page.exists() else None
            uses.append({"label": label, "page": page, "parameters": step.parameters, **record})
            for picture in sorted((step.output / "figures").glob("*.png")):
                pictures.setdefault(picture.stem, []).append((label, where / "figures" / picture.name))
            comparison = step.output / "comparison.csv"
            if comparison.exists():
                table = list(csv.reader(comparison.read_text("utf-8").splitlines()))
        headings = [source for source, _ in _cells(step.notebook, "markdown") if source.startswith("# ")]
        title = headings[0].partition("\n")[0].lstrip("# ") if headings else key
        groups.append({"key": key, "title": title, "uses": uses, "pictures": pictures})
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)
    _write(out / "index.html", environment.get_template("index.html.j2").render(name=name, groups=groups, table=table))
    return out / "index.html"


@contextlib.contextmanager
def _no_orphans() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into KeyboardInterrupt(signal); leave no kernel nor child of one behind."""
    import psutil

    children: list[psutil.Process] = []

    def stop(signum: int, frame: Any) -> None:
        for caught in previous:
            signal.signal(caught, signal.SIG_IGN)  # an impatient second Ctrl-C must not cut the clean-up short
        logging.getLogger("asyncio").disabled = True  # it would report each task that waited for the kernel
        children.extend(psutil.Process().children(recursive=True))
        raise KeyboardInterrupt(signum)

    previous = {caught: signal.getsignal(caught) for caught in (signal.SIGINT, signal.SIGTERM)}
    for caught in previous:
        signal.signal(caught, stop)
    try:
        yield
    finally:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        for caught, handler in previous.items():
            signal.signal(caught, handler)


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
    with _no_orphans():
        try:
            for number, step in enumerate(steps, 1):
                _run_step(step, f"[{number}/{len(steps)}]")
        finally:
            index = _write_index(Path(recipe).stem, steps, out)
    return index
