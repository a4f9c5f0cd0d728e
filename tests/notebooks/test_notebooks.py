"""Each notebook runs alone under papermill at tiny size, and refuses what it does not know in its first cells."""

import json
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError
from papermill.inspection import inspect_notebook

from protoclip_lab.runs import Run

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(name, folder, **parameters):
    executed = folder / f"{name}.ipynb"
    papermill.execute_notebook(
        ROOT / "notebooks" / f"{name}.ipynb",
        executed,
        parameters,
        cwd=ROOT,
        kernel_name="python3",
        progress_bar=False,
        log_output=False,
    )
    return "\n".join(str(output.get("text", "")) for cell in nbformat.read(executed, 4).cells for output in cell.get("outputs", []))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def data(folder):
    printed = execute("01_prepare_data", folder, output=str(folder / "data"), size=96, image_size=32)
    assert "80 pairs of 80 images; 0 rows left out" in printed
    return folder / "data" / "pairs"


@pytest.fixture(scope="module")
def teacher(folder, data):
    printed = execute("02_extract_teacher", folder, output=str(folder / "teacher"), table=str(data), dim=16)
    assert '"dim": 16' in printed.replace("dimension", "dim")
    return folder / "teacher" / "teacher.npy"


@pytest.fixture(scope="module")
def run(folder, data, teacher):
    settings = {
        "run": str(folder / "protoclip"),
        "table": str(data),
        "model": "ViT-mini",
        "image_size": 32,
        "context_length": 16,
        "episodes": 3,
        "episode_size": 48,
        "batch_size": 16,
        "k": 6,
        "projection_hidden": 32,
        "workers": 0,
        "tensorboard": False,
        "teachers": [{"features": str(teacher), "name": "minilm"}],
    }
    assert "3 checkpoints, latest episode_0003" in execute("03_train", folder, **settings)
    return folder / "protoclip"


@pytest.fixture(scope="module")
def evaluated(folder, run):
    printed = execute("05_evaluate", folder, checkpoint=str(run), output=str(folder / "evaluation"), draws=20)
    assert f"table: {folder / 'evaluation' / 'evaluation.csv'}" in printed
    return run


def test_01_shows_pairs(data):
    assert (data.parent / "figures" / "pairs.png").stat().st_size > 5000


def test_02_writes_features_and_shows_what_they_group(teacher):
    about = json.loads(teacher.with_suffix(".json").read_text())
    assert about["rows"] == 80 and "MiniLM" in about["model"]
    assert (teacher.parent / "figures" / "teacher_clusters.png").exists()


def test_03_trains_with_an_external_teacher(run):
    found = Run(run)
    assert found.finished and "loss/minilm_to_text_6" in found.metrics()
    assert (run / "figures" / "training.png").exists()


FIGURES = {"joint", "map_prototypes", "map_shape", "prototypes", "agreement", "overlap", "sizes", "soft_targets"}
FIGURES |= {"maps_through_training", "through_training"}


@pytest.mark.parametrize("paper", [False, True])
def test_04_draws_gap_and_grouping(folder, run, paper):
    output = folder / f"seen_{paper}"
    given = {"samples": 60, "method": "pca" if paper else "umap", "labels": ["shape"], "paper": paper}
    execute("04_gap_and_grouping", folder, run=str(run), output=str(output), **given)
    drawn = {picture.name for picture in (output / "figures").iterdir()}
    kinds = ("png", "pdf") if paper else ("png",)
    assert drawn == {f"{name}.{kind}" for name in FIGURES for kind in kinds} | {"moving_map.gif"}


def test_05_measures_every_factor_on_held_out_samples(folder, evaluated):
    rows = Run(evaluated).evaluations()
    assert {"shape", "colour", "size", "position", "background", "shapes"} == set(rows["dataset"])
    assert {"zero_shot_top1", "linear_probe_accuracy", "retrieval_mean_recall", "gap", "grouping_ARI"} <= set(rows["measure"])
    assert rows["checkpoint"].eq("episode_0003").all()
    pd.testing.assert_frame_equal(pd.read_csv(folder / "evaluation" / "evaluation.csv"), rows)
    assert {picture.name for picture in (folder / "evaluation" / "figures").iterdir()} == {"gap_sweep.png"}


def test_05_measures_what_is_asked_of_a_checkpoint_folder(folder, run, tmp_path):
    copy = shutil.copytree(Run(run).checkpoints()[0], tmp_path / "elsewhere")
    table = Path(json.loads((folder / "data" / "pairs" / "pairs.json").read_text())["source"])
    world = {"name": "held out", "table": str(table), "image_root": str(table.with_name("images"))}
    given = {"sets": [{**world, "where": {"split": "test"}}], "measures": ["retrieval"], "draws": 0}
    execute("05_evaluate", tmp_path, checkpoint=str(copy), output=str(tmp_path / "out"), **given)
    rows = pd.read_csv(tmp_path / "out" / "evaluation.csv")
    assert rows["checkpoint"].eq(str(copy)).all() and rows["dataset"].eq("held out").all()
    assert len(rows) == 7 and rows["measure"].str.startswith("retrieval_").all()


def test_06_compares_runs(folder, evaluated):
    execute("06_compare", folder, runs=[str(evaluated)], output=str(folder / "compared"))
    table = (folder / "compared" / "comparison.csv").read_text().splitlines()
    assert table[0] == "measure,protoclip" and any(line.startswith("shape: zero_shot_top1,") for line in table)
    assert {p.stem for p in (folder / "compared" / "figures").iterdir()} == {"curves"}


@pytest.mark.parametrize(
    "name, wrong, nearest",
    [
        ("01_prepare_data", {"siez": 10}, "'size'"),
        ("03_train", {"episodez": 1}, "'episodes'"),
        ("03_train", {"lr": -1}, "nearest valid value is 0"),
        ("05_evaluate", {"data_rot": "x"}, "'data_root'"),
    ],
)
def test_mistyped_and_out_of_range_parameters_fail_before_anything_runs(tmp_path, name, wrong, nearest):
    target = {"run": str(tmp_path / "run")} if name == "03_train" else {"output": str(tmp_path / "run")}
    with pytest.raises(PapermillExecutionError, match=nearest):
        execute(name, tmp_path, **target, **wrong)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_without_outputs_and_without_functions(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            assert "def " not in cell.source and "class " not in cell.source
            if "parameters" not in cell.metadata.get("tags", []):
                assert len(cell.source.splitlines()) <= 13


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_parameter_says_what_it_is(path):
    for name, parameter in inspect_notebook(str(path)).items():
        assert parameter["help"] and parameter["inferred_type_name"], name
