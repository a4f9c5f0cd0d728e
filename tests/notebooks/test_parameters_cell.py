"""Notebook 03's parameters cell: a line for each setting of TrainConfig, as papermill reads it."""

import ast
from pathlib import Path

import nbformat
from papermill.inspection import inspect_notebook
from parameters_cell import parameters_cell, write_parameters_cell

from protoclip_lab.config import TrainConfig

ROOT = Path(__file__).parents[2]


def test_every_field_has_a_line_papermill_can_read(tmp_path):
    path = tmp_path / "n.ipynb"
    cell = nbformat.v4.new_code_cell("old = 1", metadata={"tags": ["parameters"]})
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=[cell], metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "Python"}}
        ),
        path,
    )
    write_parameters_cell(path)
    found = inspect_notebook(str(path))
    assert list(found) == list(TrainConfig.model_fields)
    for name, parameter in found.items():
        field = TrainConfig.model_fields[name]
        assert ast.literal_eval(parameter["default"]) == field.get_default(call_default_factory=True)
        assert parameter["help"].startswith(field.description)
        assert parameter["inferred_type_name"] in {"int", "float", "str", "bool", "list", "dict"}


def test_a_choice_lists_what_can_be_chosen():
    assert "one of fp32, bf16, fp16" in parameters_cell() and "one of infonce, siglip" in parameters_cell()


def test_parameter_lines_hold_one_equals_sign_and_one_hash():
    for line in parameters_cell().splitlines():
        assert line.count("=") == 1 and line.count("#") == 1, line


def test_the_committed_cell_is_that_of_trainconfig():
    notebook = nbformat.read(ROOT / "notebooks" / "03_train.ipynb", 4)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert cell.source == parameters_cell(), "run `make notebooks`"
