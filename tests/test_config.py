"""Unknown and out-of-range settings raise and name the nearest valid one."""

import ast
import json

import nbformat
import pytest
from pydantic import ValidationError

from protoclip_lab.config import TrainConfig, parameters_cell, write_parameters_cell


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"episodez": 3}, "'episodez'.*'episodes'"),
        ({"lit_start": 3}, "'lit_start'.*'lit_start_episode'"),
        ({"episodes": 0}, "episodes = 0 .* nearest valid value is 1"),
        ({"max_bad_share": 1.5}, "max_bad_share = 1.5 .* nearest valid value is 1"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"weight_decay": -1}, "weight_decay = -1 .* nearest valid value is 0"),
        ({"objective": "protclip"}, "'protclip'.*'protoclip'"),
        ({"precision": "bf32"}, "'bf32'"),
        ({"k": 0}, "k = 0"),
        ({"k": [50, 0]}, r"nearest valid value is \[50, 1\]"),
        ({"k": 4000}, "k = 4000 is more than episode_size = 3000; the nearest valid value is 3000"),
        ({"episode_size": 32}, "smaller than a step of 64"),
        ({"teachers": [{"featuers": "x.npy"}]}, "'featuers' of TeacherConfig.*'features'"),
        ({"teachers": [{"features": "x.npy"}], "back_translation": False}, "need back_translation"),
        ({"teachers": [{"features": "x.npy", "name": "image"}]}, "must differ"),
        ({"lit_start_episode": 1}, "leaves no episode for prototypes"),
        ({"text_start_episode": 5, "text_end_episode": 4}, "lies before text_start_episode"),
        ({"evaluate_every": 1}, "evaluation_sets is empty"),
        ({"episodes": "many"}, "episodes"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValidationError, match=message):
        TrainConfig(**settings)


def test_numbers_from_the_command_line_may_be_text():
    assert TrainConfig(lr="1e-4", k="50").lr == 1e-4


def test_config_survives_json():
    config = TrainConfig(k=[10, 20], teachers=[{"features": "a/b.npy", "k": 5}])
    assert TrainConfig(**json.loads(json.dumps(config.model_dump(mode="json")))) == config
    assert config.teacher_ks() == {"image": [10, 20], "text": [10, 20], "a_b": [5]}


def test_without_prototype_weight_there_are_no_internal_teachers():
    assert TrainConfig(proto_weight=0, teachers=[{"features": "x.npy", "name": "t"}]).teacher_ks() == {"t": [200]}


def test_every_field_has_a_line_papermill_can_read(tmp_path):
    from papermill.inspection import inspect_notebook

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


def test_every_setting_says_what_it_means():
    assert all(field.description for field in TrainConfig.model_fields.values())
