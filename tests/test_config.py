"""Unknown and out-of-range settings raise and name the nearest valid one."""

import json

import pytest
from pydantic import ValidationError

from protoclip_lab.config import TrainConfig


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


def test_every_setting_says_what_it_means():
    assert all(field.description for field in TrainConfig.model_fields.values())
