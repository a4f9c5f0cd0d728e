"""Unknown and out-of-range settings raise and name the nearest valid one."""

import json

import pytest
from pydantic import ValidationError

from protoclip_lab.config import TrainConfig, call


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
        ({"k": 0}, r"k = \[0\] .* nearest valid value is \[1\]"),
        ({"k": [50, 0]}, r"nearest valid value is \[50, 1\]"),
        ({"teachers": [{"featuers": "x.npy"}]}, "'featuers' of TeacherConfig.*'features'"),
        ({"teachers": [{"features": "x.npy"}], "back_translation": False}, "need back_translation"),
        ({"teachers": [{"features": "x.npy", "name": "image"}]}, "must differ"),
        ({"text_start_episode": 5, "text_end_episode": 4}, "lies before text_start_episode"),
        ({"evaluate_every": 1}, "evaluation_sets is empty"),
        ({"k": 4000}, "more than episode_size; the nearest valid value is 3000"),
        ({"lit_start_episode": 1}, "lit_start_episode = 1 leaves no episode for prototypes"),
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
    assert [(t.name, t.k) for t in config.every_teacher()] == [("image", [10, 20]), ("text", [10, 20]), ("a_b", [5])]


def test_without_prototype_weight_there_are_no_internal_teachers():
    (only,) = TrainConfig(proto_weight=0, teachers=[{"features": "x.npy", "name": "t"}]).every_teacher()
    assert (only.name, only.k) == ("t", [200])


def open_table(table, *, size=3, where=None, **more):
    return table, size, where, more


def test_a_notebooks_variables_are_the_arguments_and_what_its_cells_made_since_is_not(tmp_path):
    namespace = {"table": "a.tsv", "size": 5, "where": None, "_": 1, "In": ["x"], "Out": {}, "json": json, "TrainConfig": TrainConfig}
    assert call(open_table, namespace) == ("a.tsv", 5, None, {})
    # The cell run again after the rest, and a parameter changed by hand in between.
    namespace |= {"figure": object(), "name": "map", "run": tmp_path, "shown": ["a"], "size": 7}
    assert call(open_table, namespace) == ("a.tsv", 7, None, {})


@pytest.mark.parametrize("value", ["x", 3, 0.5, True, None, [1], (1,), {"a": 1}])
def test_a_mistyped_parameter_is_refused_with_the_nearest(value):
    with pytest.raises(ValueError, match="'szie'.*'size'"):
        call(open_table, {"table": "a.tsv", "szie": value})
    with pytest.raises(ValueError, match="'episodez'.*'episodes'"):
        call(TrainConfig, {"episodez": value})


def test_every_setting_says_what_it_means():
    assert all(field.description for field in TrainConfig.model_fields.values())
