"""Recipes: what they expand to, what is refused, what runs again, what a failure or a signal leaves behind."""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
from nbformat import v4
from PIL import Image

import protoclip_lab
from protoclip_lab import __main__, batch

PYTHON_PATH = str(Path(batch.__file__).resolve().parents[1])
LOG = 'from pathlib import Path\nwith open("log.txt", "a") as log:\n    log.write(Path({folder}).name + "\\n")\n'
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
NOTEBOOKS = {
    "01_prepare_data": ('output = "x"\nsize = 10  # type: int pairs', LOG.format(folder="output")),
    "02_extract_teacher": (
        'output = "x"\ntable = ""\nmodel = "m"\ntemplates = []\nrate = 0.1',
        LOG.format(folder="output"),
    ),
    "03_train": (
        'run = "x"\nseed = 0\nobjective = "clip"\nepisodes = 3\nk = 200\nlr = 0.1\nteachers = []',
        LOG.format(folder="run"),
    ),
    "04_gap": ('output = "x"\nrun = ""', LOG.format(folder="output")),
    "05_evaluate": ('output = "x"\ncheckpoint = ""', LOG.format(folder="output")),
    "06_compare": (
        'output = "x"\nruns = []',
        'Path(output, "comparison.csv").write_text("measure,clip,protoclip\\nshape <top-1>,41.2 ± 0.8,55.0 ± 1.2\\n")',
    ),
}
RECIPE = """
parameters: {size: 100, name: null, seeds: [0, 1], episodes: 2, k: 50, rate: 0.1}
01_prepare_data: {size: "{size}"}
02_extract_teacher:minilm: {table: "{01_prepare_data}/pairs.tsv", model: "{name}"}
02_extract_teacher:other: {templates: ["a {}.", "a {size} {colour} thing"], rate: "{rate}"}
03_train:
  common: {episodes: "{episodes}"}
  lr: 5e-4
  arms:
    clip: {objective: clip}
    protoclip: {objective: protoclip, k: "{k}", teachers: [{features: "{02_extract_teacher:minilm}/teacher.npy"}]}
  grid: {seed: "{seeds}"}
05_evaluate: {}
06_compare: {}
"""


def write_notebook(root: Path, name: str, parameters: str, *code: str) -> Path:
    cells = [
        v4.new_markdown_cell(f"# About {name}\n\nText."),
        v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *[v4.new_code_cell(source) for source in code],
    ]
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=cells, metadata=KERNEL), path)
    return path


def write_recipe(root: Path, text: str, name: str = "tiny") -> None:
    (root / "notebooks" / "recipes").mkdir(parents=True, exist_ok=True)
    (root / "notebooks" / "recipes" / f"{name}.yaml").write_text(text)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of tiny notebooks with the recipe above, as the current folder."""
    for name, sources in NOTEBOOKS.items():
        write_notebook(tmp_path, name, *sources)
    write_recipe(tmp_path, RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(*parameters: str) -> dict[str, object]:
    return dict(map(__main__._parameter, parameters))


def plan(*overrides: str) -> dict[str, batch.Step]:
    steps, _ = batch.plan("tiny", given("name=m", *overrides))
    return {step.name: step for step in steps}


# ---------------------------------------------------------------- what a recipe expands to


def test_recipe_expands_to_every_arm_at_every_point_of_the_grid_in_order(lab: Path) -> None:
    runs = [f"{arm}_seed={seed}" for arm in ("clip", "protoclip") for seed in (0, 1)]
    assert list(plan()) == [
        "01_prepare_data",
        "02_extract_teacher:minilm",
        "02_extract_teacher:other",
        *[f"03_train/{run}" for run in runs],
        *[f"05_evaluate/{run}" for run in runs],
        "06_compare",
    ]


def test_parameters_are_resolved_to_absolute_paths_and_typed_values(lab: Path) -> None:
    steps, reports = plan(), lab / "reports" / "tiny"
    assert steps["01_prepare_data"].parameters == {"output": str(reports / "01_prepare_data"), "size": 100}
    assert steps["02_extract_teacher:minilm"].parameters == {
        "output": str(reports / "02_extract_teacher_minilm"),
        "table": str(reports / "01_prepare_data" / "pairs.tsv"),
        "model": "m",
    }
    assert steps["03_train/protoclip_seed=1"].parameters == {
        "run": str(reports / "03_train" / "protoclip_seed=1"),
        "episodes": 2,
        "lr": 0.0005,
        "objective": "protoclip",
        "k": 50,
        "teachers": [{"features": str(reports / "02_extract_teacher_minilm" / "teacher.npy")}],
        "seed": 1,
    }


def test_notebooks_with_a_run_or_checkpoint_get_each_run_and_those_with_runs_get_all(lab: Path) -> None:
    write_recipe(lab, RECIPE.replace("05_evaluate: {}", "04_gap: {}\n05_evaluate: {}"))
    steps = plan()
    runs = [step.parameters["run"] for name, step in steps.items() if name.startswith("03_train/")]
    evaluated = [step for name, step in steps.items() if name.startswith("05_evaluate/")]
    assert [step.parameters["checkpoint"] for step in evaluated] == runs
    assert [step.parameters["run"] for name, step in steps.items() if name.startswith("04_gap/")] == runs
    assert [step.output.name for step in evaluated] == [Path(run).name for run in runs]
    assert steps["06_compare"].parameters["runs"] == runs
    assert steps["06_compare"].upstream == list(steps.values())[:-1]


def test_a_run_named_in_the_recipe_is_taken_instead(lab: Path) -> None:
    named = '04_gap: {run: "elsewhere/clip"}\n05_evaluate: {checkpoint: "elsewhere/clip"}'
    write_recipe(lab, named + "\n06_compare: {runs: [a, b]}")
    gap, evaluate, compare = batch.plan("tiny")[0]
    assert gap.parameters["run"] == evaluate.parameters["checkpoint"] == "elsewhere/clip"
    assert compare.parameters["runs"] == ["a", "b"]


def test_a_training_without_arms_and_grid_is_one_run(lab: Path) -> None:
    write_recipe(lab, "03_train: {episodes: 2}")
    (step,) = batch.plan("tiny")[0]
    assert step.name == "03_train/run" and step.parameters["episodes"] == 2


def test_a_list_is_an_axis_only_under_grid(lab: Path) -> None:
    write_recipe(lab, "03_train: {common: {k: [10, 20]}, grid: {k: [[10, 20], 30], seed: 0}}")
    steps = batch.plan("tiny")[0]
    assert [(s.output.name, s.parameters["k"]) for s in steps] == [("k=-10,-20-_seed=0", [10, 20]), ("k=30_seed=0", 30)]


def test_braces_that_name_nothing_stay_as_they_are(lab: Path) -> None:
    templates = plan()["02_extract_teacher:other"].parameters["templates"]
    assert templates == ["a {}.", "a 100 {colour} thing"]


def test_overrides_reach_step_arm_and_grid(lab: Path) -> None:
    steps = plan("size=7", "episodes=5", "k=[8, 9]", "seeds=[3]")
    assert steps["01_prepare_data"].parameters["size"] == 7
    assert {name for name in steps if name.startswith("03")} == {"03_train/clip_seed=3", "03_train/protoclip_seed=3"}
    assert {s.parameters["episodes"] for name, s in steps.items() if name.startswith("03")} == {5}
    assert steps["03_train/protoclip_seed=3"].parameters["k"] == [8, 9]
    assert "k" not in steps["03_train/clip_seed=3"].parameters
    assert plan("rate=1e-3")["02_extract_teacher:other"].parameters["rate"] == 0.001


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sise=7", "unknown name 'sise'; did you mean size?"),
        ("03_train.episodes=7", "unknown name '03_train.episodes'; did you mean episodes?"),
        ("episodes=-1", "episodes = -1 is out of range"),
    ],
)
def test_a_wrong_override_is_refused_with_the_remedy(lab: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(override)
    assert not (lab / "reports").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("01_prepare_dat: {}", "unknown name '01_prepare_dat'; did you mean 01_prepare_data?"),
        ("01_prepare_data: {sizes: 3}", "01_prepare_data: unknown name 'sizes'; did you mean size?"),
        ("03_train: {arms: {clip: {episods: 3}}}", "03_train: unknown name 'episods'; did you mean episodes?"),
        ("03_train: {grid: {sed: [0]}}", "03_train: unknown name 'sed'; did you mean seed?"),
        ("03_train: {run: x}", "03_train: unknown name 'run'"),
        ("01_prepare_data: {output: x}", "01_prepare_data: unknown name 'output'"),
        ("03_train: {arms: {clip: {teachers: [{feature: x}]}}}", "nearest valid name is 'features'"),
        ("03_train: {arm: {clip: {}}}", "unknown name 'arm'; did you mean arms?"),
        ("parameters: {flickr8k: null}", "recipe tiny needs ['flickr8k']: add -p NAME=VALUE for each"),
        ("- 01_prepare_data", "tiny.yaml holds no lines of `name: value`"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_remedy(lab: Path, recipe: str, message: str) -> None:
    write_recipe(lab, recipe)
    with pytest.raises(ValueError, match=re.escape(message)):
        batch.plan("tiny")


def test_a_step_named_in_a_grid_is_one_it_reads_from_and_shared_settings_stay_as_they_are(lab: Path) -> None:
    write_recipe(
        lab,
        """
01_prepare_data: {size: 3}
02_extract_teacher: {grid: {table: ["{01_prepare_data}/pairs"]}}
03_train:one: {common: &shared {episodes: 2}, lr: 0.5}
03_train:two: {common: *shared}
""",
    )
    _, teacher, one, two = batch.plan("tiny")[0]
    assert [step.name for step in teacher.upstream] == ["01_prepare_data"] and teacher.parameters["table"].endswith(
        "01_prepare_data/pairs"
    )
    assert one.parameters["lr"] == 0.5 and "lr" not in two.parameters


def test_an_unknown_recipe_is_refused_with_where_it_was_looked_for(lab: Path) -> None:
    with pytest.raises(FileNotFoundError, match="notebooks/recipes/tyni.yaml"):
        batch.plan("tyni")


# ---------------------------------------------------------------- what runs, and what runs again


@pytest.fixture
def executed(lab: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the recipe with notebooks executed in this process; returns the names of the folders written to."""

    def execute_notebook(notebook: Path, executed: Path, parameters: dict, **_: object) -> None:
        names: dict[str, object] = {}
        for cell in nbformat.read(notebook, as_version=4).cells:
            if cell.cell_type == "code":
                exec(cell.source, names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= {**parameters, "Path": Path}
        shutil.copy(notebook, executed)

    monkeypatch.setattr(batch.papermill, "execute_notebook", execute_notebook)

    def run(*overrides: str) -> list[str]:
        (lab / "log.txt").write_text("")
        batch.run("tiny", given("name=m", "seeds=[0]", *overrides))
        return (lab / "log.txt").read_text().split()

    return run


TRAININGS = ["clip_seed=0", "protoclip_seed=0"]
TEACHERS = ["02_extract_teacher_minilm", "02_extract_teacher_other"]


def test_finished_steps_are_not_run_again(executed) -> None:
    assert executed() == ["01_prepare_data", *TEACHERS, *TRAININGS, *TRAININGS]
    assert executed() == []


def test_a_changed_parameter_runs_its_step_and_those_that_read_from_it(executed) -> None:
    executed()
    assert executed("rate=2") == ["02_extract_teacher_other"]
    assert executed("rate=2", "name=n") == [
        "02_extract_teacher_minilm",
        "protoclip_seed=0",
        "protoclip_seed=0",
    ]


def test_a_step_made_again_makes_those_that_read_from_it_again(executed, lab: Path) -> None:
    executed()
    shutil.rmtree(lab / "reports/tiny/02_extract_teacher_minilm")
    assert executed() == ["02_extract_teacher_minilm", "protoclip_seed=0", "protoclip_seed=0"]


def test_an_unfinished_training_is_taken_up_in_its_folder(executed, lab: Path) -> None:
    executed()
    run = lab / "reports/tiny/03_train/clip_seed=0"
    (run / "checkpoint").touch()
    (run / "03_train.html").unlink()
    assert executed()[0] == "clip_seed=0"
    assert (run / "checkpoint").exists() and not list(run.parent.glob("*.old-*"))


def test_a_training_with_other_parameters_starts_anew_and_keeps_the_old_one_aside(executed, lab: Path) -> None:
    executed()
    run = lab / "reports/tiny/03_train/clip_seed=0"
    for episodes in (7, 8):
        (run / "checkpoint").write_text(str(episodes))
        assert "clip_seed=0" in executed(f"episodes={episodes}")
        assert not (run / "checkpoint").exists()
    assert [(old / "checkpoint").read_text() for old in sorted(run.parent.glob(f"{run.name}.old-*"))] == ["7", "8"]


# ---------------------------------------------------------------- with real kernels


class Requests(HTMLParser):
    """Addresses a browser would load by itself, and the text of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.html, self.scripts, self.in_script = html, "", False
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.in_script = tag == "script"
        loads = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}
        self.addresses += [value or "" for name, value in attributes if name == loads.get(tag)]

    def handle_endtag(self, tag: str) -> None:
        self.in_script = False

    def handle_data(self, data: str) -> None:
        self.scripts += data if self.in_script else ""

    def hosts(self) -> list[str]:
        called = re.findall(r"https?:[^\s\"']+", self.scripts) + re.findall(r"@import.*|url\([\"']?https?:.*", self.html)
        return called + [a for a in self.addresses if re.match(r"(https?:)?//", a)]


def test_recipe_leaves_executed_notebooks_pages_and_an_index_that_ask_no_host(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    picture = "from IPython.display import Image\nimport sys\nfrom PIL import Image as Drawing\n"
    picture += 'Path(output, "figures").mkdir()\npng = Path(output, "figures", "umap_gap.png")\n'
    picture += 'Drawing.new("RGB", (8, 8)).save(png)\nprint(size, sys.executable, Path.cwd())\nImage(png)'
    write_notebook(lab, "01_prepare_data", NOTEBOOKS["01_prepare_data"][0], "from pathlib import Path\n" + picture)
    write_notebook(lab, "06_compare", NOTEBOOKS["06_compare"][0], "from pathlib import Path", NOTEBOOKS["06_compare"][1])
    write_recipe(lab, "01_prepare_data: {size: 77}\n06_compare: {}")

    monkeypatch.setattr(sys, "argv", ["protoclip_lab", "run", "tiny", "--out", "out"])
    __main__.main()
    shown = capsys.readouterr()
    assert shown.out == f"report: {lab}/out/index.html\n"
    # one live line a step
    lines = shown.err.strip().split("\n")
    assert [line.split("\r")[-1].partition("|")[0] for line in lines] == ["[1/2] 01_prepare_data: 100%", "[2/2] 06_compare: 100%"]

    notebook = nbformat.read(lab / "out/01_prepare_data/01_prepare_data.ipynb", as_version=4)
    assert f'output = "{lab}/out/01_prepare_data"' in notebook.cells[2].source
    assert notebook.cells[3].outputs[0].text == f"77 {sys.executable} {lab}\n"

    page = (lab / "out/01_prepare_data/01_prepare_data.html").read_text()
    assert Requests(page).addresses and Requests(page).hosts() == []
    assert page.count("<details") == 3

    index = (lab / "out/index.html").read_text()
    assert Requests(index).hosts() == []
    assert [drawn(address) for address in Requests(index).addresses] == [((8, 8), 1)]
    links = re.findall(r'href="([^"#]+)"', index)
    assert {*links} == {"01_prepare_data/01_prepare_data.html", "06_compare/06_compare.html", "01_prepare_data/figures/umap_gap.png"}
    assert all((lab / "out" / link).is_file() for link in links)
    assert str(lab) not in index and f"{lab}/" not in page
    assert "<td>shape &lt;top-1&gt;</td><td>41.2 ± 0.8</td><td>55.0 ± 1.2</td>" in index


def drawn(address: str) -> tuple[tuple[int, int], int]:
    """Size and number of frames of a picture that stands in its own address."""
    kind, _, data = address.partition(",")
    assert kind == "data:image/webp;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    return picture.size, picture.n_frames


def rows(html: str) -> list[list[str]]:
    """The texts of each table row's cells."""
    found = re.findall(r"<tr.*?</tr>", html, re.DOTALL)
    return [[re.sub(r"<.*?>", "", cell).strip() for cell in re.findall(r"<t[dh].*?</t[dh]>", row, re.DOTALL)] for row in found]


def test_index_says_what_was_run_with_what_and_shows_what_it_drew(lab: Path) -> None:
    steps, out = batch.plan("tiny", given("name=m", "seeds=[1, 0]"))
    runs = [step for step in steps if step.name.startswith("03_train/")]
    for number, run in enumerate(runs):
        (run.output / "figures").mkdir(parents=True)
        packages = {"torch": f"2.{number % 2}", "scipy": "1.0"}
        about = {"python": "3.10.4 (main)", "device": "cuda: NVIDIA H200", "commit": "c0ffee", "packages": packages}
        (run.output / "environment.json").write_text(json.dumps(about))
        (run.output / "uncommitted.diff").write_text("changed" if number == 3 else "")
        for order, name in enumerate(["z.png", "a.gif", "b.png"]):
            path = run.output / "figures" / name
            frames = [Image.new("RGB", (9, 9), (40 * shade, number, 0)) for shade in range(3 if order == 1 else 1)]
            frames[0].save(path, save_all=order == 1, append_images=frames[1:])
            os.utime(path, (order, order))
        (run.output / "figures" / "b.pdf").touch()
        run.page.touch()
    (steps[0].output / "figures").mkdir(parents=True)
    for cut in (0, 50):  # by a kill in mid-write
        (steps[0].output / "figures" / f"cut-{cut}.png").write_bytes((run.output / "figures" / "b.png").read_bytes()[:cut])
    batch._write_index("tiny", steps, out)
    index = (out / "index.html").read_text()
    table = rows(index)
    for row in [
        ["recipe", "tiny"],
        ["seeds", "0, 1"],
        ["device", "cuda: NVIDIA H200"],
        ["commit", "c0ffee with uncommitted changes"],
        ["versions", "python 3.10.4, torch 2.0, 2.1"],
        ["setting", "default", "clip", "protoclip"],
        ["objective", "protoclip", "clip", "protoclip"],
        ["lr", "0.001", "0.0005", "0.0005"],
        ["k", "200", "200", "50"],
        ["teachers", "[]", "[]", '[{"features": "02_extract_teacher_minilm/teacher.npy"}]'],
    ]:
        assert row in table, row
    assert not [row for row in table if row[0] in ("seed", "run", "batch_size")]
    assert '<td class="default">200</td>' in index and '<td class=" other">50</td>' in index
    assert f"{len(steps) - len(runs)} of {len(steps)} steps are not finished" in index
    assert 'href="03_train/protoclip_seed%3D0/uncommitted.diff"' in index and 'href="03_train/clip_seed%3D1/figures/b.pdf"' in index
    assert [drawn(address) for address in Requests(index).addresses] == [((9, 9), n) for n in (1, 3, 1) for _ in runs]
    assert str(lab) not in index


def test_page_of_a_notebook_with_widgets_formulas_and_diagrams_asks_no_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def view(model: str) -> nbformat.NotebookNode:
        widget = {"application/vnd.jupyter.widget-view+json": {"model_id": model, "version_major": 2, "version_minor": 0}}
        return v4.new_output("display_data", data={**widget, "text/plain": f"{model} <at first>"})

    def bar(style: str) -> dict:
        parts = {"text": ("HTMLModel", {"value": f"{style} 7/9"}), "done": ("FloatProgressModel", {"bar_style": style})}
        models = {f"{style}-{name}": {"model_name": kind, "state": state} for name, (kind, state) in parts.items()}
        return {f"{style}-bar": {"model_name": "HBoxModel", "state": {"children": [f"IPY_MODEL_{name}" for name in models]}}, **models}

    outputs = [
        view("slider"),
        view("success-bar"),
        view("-bar"),
        v4.new_output("display_data", data={"text/vnd.mermaid": "graph LR; a-->b"}),
    ]
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell("$x$"), v4.new_code_cell("1", outputs=outputs)])
    state = {"slider": {"model_name": "IntSliderModel", "state": {}}, **bar("success"), **bar("")}
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": state}}
    step = batch.Step("01_prepare_data", tmp_path / "notebooks" / "01_prepare_data.ipynb", tmp_path, {}, [])
    monkeypatch.setattr(batch.papermill, "execute_notebook", lambda *_, **__: nbformat.write(notebook, step.executed))
    batch._run_step(step, "")
    page = step.page.read_text()
    assert Requests(page).hosts() == []
    # a widget as its text, a bar that was left standing as it stood, one that was taken away not at all
    assert re.findall(r'<pre class="quiet">(.*)</pre>', page) == ["slider &lt;at first&gt;", "success 7/9"]


def test_failure_names_notebook_cell_error_and_where_the_executed_notebook_is(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_notebook(lab, "01_prepare_data", 'output = "x"', "1 + 1", 'rows = 3\nraise ValueError("row 3: no image")')
    write_recipe(lab, "01_prepare_data: {}\n06_compare: {}")
    monkeypatch.setattr(sys, "argv", ["protoclip_lab", "run", "tiny"])
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    executed = lab / "reports/tiny/01_prepare_data/01_prepare_data.ipynb"
    message = str(stopped.value.code)
    for part in (
        "01_prepare_data failed in cell 5\n",
        "ValueError: row 3: no image",
        f"notebook: {source}",
        f"executed: {executed}\nThe same command continues from there.",
    ):
        assert part in message
    assert "row 3: no image" in executed.read_text()
    assert not (lab / "reports/tiny/06_compare").exists()
    assert "not finished" in (lab / "reports/tiny/index.html").read_text()


def test_a_kernel_that_dies_is_a_failure_of_its_cell(lab: Path) -> None:
    write_notebook(lab, "01_prepare_data", 'output = "x"', "import os\nos._exit(1)")
    write_recipe(lab, "01_prepare_data: {}")
    with pytest.raises(batch.StepFailed, match=r"01_prepare_data failed in cell 4\n.*Kernel died"):
        batch.run("tiny")


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_no_kernel_nor_child_of_one(lab: Path, stop: signal.Signals) -> None:
    child = "import subprocess, time\nsubprocess.Popen(['sleep', '600'])\nopen('started', 'w')\ntime.sleep(600)"
    write_notebook(lab, "01_prepare_data", 'output = "x"', child)
    write_recipe(lab, "01_prepare_data: {}")
    runner = psutil.Popen(
        [sys.executable, "-m", "protoclip_lab", "run", "tiny"],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (lab / "started").exists():
        assert runner.poll() is None, runner.stderr.read()
        time.sleep(0.02)
    children = runner.children(recursive=True)
    assert len(children) == 2
    runner.send_signal(stop)
    _, messages = runner.communicate()
    assert runner.returncode == 130
    # an orphan that was killed may wait as a zombie for init to collect it
    assert [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE] == []
    assert messages.endswith("stopped; the same command continues from there\n")
    assert "Traceback" not in messages


# ---------------------------------------------------------------- python -m protoclip_lab train


def test_train_takes_yaml_or_json_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    seen = []
    monkeypatch.setattr(protoclip_lab, "training", SimpleNamespace(train=seen.append), raising=False)
    for name, text in (("c.yaml", "{episodes: 2, lr: 5e-4}"), ("c.json", '{"episodes": 2, "lr": 0.0005}')):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(sys, "argv", ["protoclip_lab", "train", str(tmp_path / name), "-p", "k=[5, 6]"])
        __main__.main()
    assert [(c.episodes, c.lr, c.k) for c in seen] == [(2, 0.0005, [5, 6])] * 2
    monkeypatch.setattr(sys, "argv", ["protoclip_lab", "train", str(tmp_path / "c.yaml"), "-p", "episods=3"])
    with pytest.raises(SystemExit, match="nearest valid name is 'episodes'"):
        __main__.main()
    for wrong, message in (("k", "2"), ("k=[", "error: while parsing")):
        monkeypatch.setattr(sys, "argv", ["protoclip_lab", "train", str(tmp_path / "c.yaml"), "-p", wrong])
        with pytest.raises(SystemExit, match=message):
            __main__.main()
    assert "argument -p: invalid" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("- k")
    monkeypatch.setattr(sys, "argv", ["protoclip_lab", "train", str(tmp_path / "c.yaml")])
    with pytest.raises(SystemExit, match="holds no lines of `name: value`"):
        __main__.main()
