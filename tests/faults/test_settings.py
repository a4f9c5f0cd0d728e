"""Generated bad settings: the command line, a recipe and a notebook refuse each by name, and none reaches training."""

import math
import string
import sys
from types import NoneType, SimpleNamespace, UnionType
from typing import Literal, get_args, get_origin
from unittest import mock

import papermill
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import protoclip_lab
from protoclip_lab import __main__, batch
from protoclip_lab.config import TrainConfig, call

FIELDS = TrainConfig.model_fields
# The same ones each time.
THOROUGH = settings(max_examples=100, derandomize=True, database=None, deadline=None)
WRONG = {
    int: ["many", 1.5, [1], {"a": 1}, True, math.nan, ""],
    float: ["much", [0.1], {"a": 1}, False, math.nan, math.inf, -math.inf, ""],
    bool: ["perhaps", 2, [True], 0.5],
    str: [3, [""], {"a": 1}, True, 0.5],
    dict: ["text", 3, [1], True],
    list: ["text", 3, {"a": 1}, True],
}
TOGETHER = [
    {"k": 65, "episode_size": 64},
    {"k": []},
    {"k": [5, -1]},
    {"lit_start_episode": 1},
    {"text_start_episode": 5, "text_end_episode": 4},
    {"evaluate_every": 1},
    {"evaluation_sets": ["cifar10"]},
    {"teachers": [{"featuers": "x.npy"}]},
    {"teachers": [{"name": "without features"}]},
    {"teachers": [{"features": "x.npy", "weight": -1}]},
    {"teachers": [{"features": "x.npy", "k": 0}]},
    {"teachers": [{"features": "x.npy", "k": []}]},
    {"teachers": [{"features": "x.npy"}], "back_translation": False},
    {"teachers": [{"features": "a/x.npy"}, {"features": "a/x.npy"}]},
]


def kinds(name):
    """The types a setting takes, without what they hold."""
    annotation = FIELDS[name].annotation
    parts = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return [str if get_origin(part) is Literal else get_origin(part) or part for part in parts]


def values_of_the_wrong_kind(name):
    taken = kinds(name)
    wrong = WRONG[taken[0]]
    if list in taken and int in taken:
        wrong = [value for value in wrong if not isinstance(value, list)] + [["x"]]
    return st.sampled_from(wrong + ([] if NoneType in taken else [None]))


def values_out_of_range(name):
    (bound,) = [m for m in FIELDS[name].metadata if hasattr(m, "ge")]
    below = st.integers(bound.ge - 10**6, bound.ge - 1)
    above = [m.le for m in FIELDS[name].metadata if hasattr(m, "le")]
    return below | st.floats(above[0] + 0.01, 1e9) if above else below


def misspelt(names):
    """Names one letter away from these and none of them."""

    def changed(drawn):
        name, place, letter, how = drawn
        place %= len(name)
        return {"more": name[:place] + letter, "less": name[:place], "other": name[:place] + letter}[how] + name[
            place + (how != "more") :
        ]

    drawn = st.tuples(
        st.sampled_from(sorted(names)),
        st.integers(0, 99),
        st.sampled_from(string.ascii_lowercase),
        st.sampled_from("more less other".split()),
    )
    return drawn.map(changed).filter(
        lambda name: name.isidentifier() and name not in {*names, "In", "Out", "parameters", *batch.SECTIONS}
    )


BOUNDED = [name for name, field in FIELDS.items() if any(hasattr(m, "ge") for m in field.metadata)]
CHOICES = [name for name, field in FIELDS.items() if get_origin(field.annotation) is Literal]
# The run's folder is the recipe's to set.
OWN = sorted(FIELDS.keys() - {"run"})


def one(names, values):
    return st.sampled_from(names).flatmap(lambda name: values(name).map(lambda value: {name: value}))


BAD = st.one_of(
    one(OWN, values_of_the_wrong_kind),
    one(BOUNDED, values_out_of_range),
    one(CHOICES, lambda name: misspelt(get_args(FIELDS[name].annotation))),
    misspelt(FIELDS).map(lambda name: {name: 1}),
    st.sampled_from(TOGETHER),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("settings")


@THOROUGH
@given(bad=BAD)
def test_a_bad_setting_reaches_no_training(bad, folder):
    # An error may speak of one of several: "teacher names".
    named = "|".join([*(name.rstrip("s") for name in bad), "k = "])
    (folder / "train.yaml").write_text(yaml.safe_dump(bad))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"03_train": bad}))
    reached = []
    for command in ("train", "run"):
        arguments = ["protoclip_lab", command, str(folder / ("train.yaml" if command == "train" else "recipe.yaml"))]
        with (
            mock.patch.object(protoclip_lab, "training", SimpleNamespace(train=reached.append), create=True),
            mock.patch.object(batch, "_run_step", lambda *step: reached.append(step)),
            mock.patch.object(__main__.signal, "signal"),
            mock.patch.object(sys, "argv", [*arguments, "--out", str(folder / "report")] if command == "run" else arguments),
            pytest.raises(SystemExit, match=f"^error: (.|\n)*({named})"),
        ):
            __main__.main()
    with pytest.raises(ValueError, match=named):
        call(TrainConfig, dict(bad))
    assert not reached and not (folder / "report").exists()


PARAMETERS = {
    path.stem: [*papermill.inspect_notebook(path)] for path in sorted((batch.TEMPLATES.parents[1] / "notebooks").glob("0*.ipynb"))
}


@THOROUGH
@given(st.sampled_from(sorted(PARAMETERS)).flatmap(lambda notebook: st.tuples(st.just(notebook), misspelt(PARAMETERS[notebook]))))
def test_a_mistyped_parameter_of_a_notebook_is_refused_before_a_recipe_runs(folder, drawn):
    notebook, name = drawn
    (folder / "recipe.yaml").write_text(yaml.safe_dump({notebook: {name: 1}}))
    with (
        mock.patch.object(batch, "_run_step") as step,
        pytest.raises(ValueError, match=f"{notebook}: unknown name '{name}'; did you mean"),
    ):
        batch.run(folder / "recipe.yaml", out=folder / "report")
    assert not step.called and not (folder / "report").exists()


# What only the data, the folders or the libraries can tell, before the first step.
LATER = [
    ({"model": "ViT-minii"}, "'ViT-minii' is not known to open_clip; the nearest valid name is 'ViT-mini'"),
    ({"pretrained": "nowhere.pt"}, "'nowhere.pt' is no file"),
    ({"table": "nowhere.tsv"}, "nowhere.tsv is no table"),
    ({"image_root": "/nowhere"}, "there is no image_root /nowhere: name the folder"),
    ({"image_column": "filepaht"}, "no column 'filepaht'; the nearest valid name is 'filepath'"),
    ({"where": {"splt": "train"}}, "no column 'splt'; the nearest valid name is 'split'"),
    ({"where": {"split": "trian"}}, "no row of .* has {'split': 'trian'}; values there"),
    ({"where": {}}, "has 'split' .* say which"),
    ({"teachers": [{"features": "/nowhere/x.npy"}]}, "/nowhere/x.npy is broken, missing or .* Run 02_extract_teacher again"),
    ({"evaluation_sets": [{"nam": "x"}]}, "'nam' of EvaluationSet; the nearest valid name is 'name'"),
    ({"precision": "fp16"}, "take 'bf16'"),
    ({"episode_size": 500}, "episode_size = 500 does not fit a table of 80 usable pairs: take at most 80"),
    ({"dataset_size": 10}, "episode_size = 48 does not fit a table of 10 usable pairs: take at most 10"),
    ({"episode_size": 8, "k": 4}, "an episode of 8 pairs is smaller than a step of 16: lower batch_size"),
    ({"episode_size": None, "k": 81}, "k = 81 is more than the 80 pairs of an episode"),
    ({"episode_size": 47, "k": 40, "prototypes": "rolling"}, "k = 40 is more than the 32 pairs of an episode"),
]


@pytest.mark.parametrize("bad, message", LATER, ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_what_does_not_fit_the_data_is_refused_before_the_first_step(bad, message, table, tmp_path, monkeypatch):
    from helpers import toy_settings

    from protoclip_lab import training

    monkeypatch.setattr(training._Trainer, "_episode", lambda *a: pytest.fail("trains"))
    with pytest.raises((ValueError, OSError), match=message):
        training.train(toy_settings(table, tmp_path / "run") | bad)
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text()
