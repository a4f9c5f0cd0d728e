"""The run directory: what is compared, and what a table of runs says."""

import json

import numpy as np
import pandas as pd
import pytest

from protoclip_lab.config import TrainConfig
from protoclip_lab.runs import Run, compare, locked, record_evaluations


def evaluated(folder, seed=0, **measures):
    """A run with evaluations: {measure: a (value, low, high) for each checkpoint}."""
    run = Run.create(TrainConfig(run=str(folder), seed=seed))
    for measure, found in measures.items():
        rows = [
            {"checkpoint": f"episode_{episode:04d}", "dataset": "shape", "measure": measure}
            | dict(zip(("value", "low", "high"), numbers, strict=True))
            for episode, numbers in enumerate(found, 1)
        ]
        record_evaluations(run.path, rows)
    return run.path


def test_runs_are_compared_by_their_last_evaluated_checkpoint(tmp_path):
    early = evaluated(tmp_path / "early", zero_shot_top1=[(10, 9, 11), (20, 19, 21)], gap=[(0.5, 0.4, 0.6)])
    late = evaluated(tmp_path / "late", zero_shot_top1=[(30, 29, 31), (25, 24, 26), (40, 39, 41)])
    values = compare([early, late]).values
    assert list(values["checkpoint"]) == ["episode_0002", "episode_0003"]
    assert list(values["shape: zero_shot_top1"]) == [20, 40]
    assert "shape: gap" not in values  # it was measured on an earlier checkpoint alone


def test_one_seed_shows_the_interval_of_the_measure_and_several_their_deviation(tmp_path):
    numbers = np.random.default_rng(0).uniform(0, 100, 3)
    arm = [evaluated(tmp_path / f"b_seed={i}", i, gap=[(x, x - 9, x + 9)]) for i, x in enumerate(numbers)]
    alone = evaluated(tmp_path / "a_seed=0", gap=[(41.237, 39.9, 43)], grouping_AMI=[(0.5, float("nan"), float("nan"))])
    found = compare([*arm, alone], tmp_path / "out")
    several = f"{numbers.mean():.2f} ± {numbers.std(ddof=1):.2f}"
    assert list(found.table.columns) == ["b", "a"]
    assert list(found.table.loc["shape: gap"]) == [several, "41.24 [39.90, 43.00]"]
    assert list(found.table.loc["shape: grouping_AMI"]) == ["", "0.50"]
    written = (tmp_path / "out" / "comparison.csv").read_text("utf-8").splitlines()
    assert written[:2] == ["measure,b,a", f'shape: gap,{several},"41.24 [39.90, 43.00]"']
    assert len(pd.read_csv(tmp_path / "out" / "values.csv")) == 4


def test_only_the_measures_asked_for_are_shown_and_all_are_kept(tmp_path):
    run = evaluated(tmp_path / "run", gap=[(1, 0, 2)], knn_top1=[(2, 1, 3)], zero_shot_top1=[(3, 2, 4)])
    found = compare([run], measures=["top1"])
    assert found.shown == list(found.table.index) == ["shape: knn_top1", "shape: zero_shot_top1"]
    assert "shape: gap" in found.values


def test_runs_of_one_name_in_two_folders_are_two_rows_of_one_arm(tmp_path):
    runs = [evaluated(tmp_path / folder / "clip", gap=[(x, x, x)]) for folder, x in (("a", 1), ("b", 3))]
    found = compare(runs)
    assert len(found.values) == 2
    assert found.table.loc["shape: gap", "clip"] == "2.00 ± 1.41"


def test_settings_in_which_runs_differ_are_listed(tmp_path):
    runs = [evaluated(tmp_path / f"clip_seed={seed}", seed, gap=[(1, 1, 1)]) for seed in (0, 1)]
    assert compare(runs).settings().to_dict("index") == {"seed": {"clip_seed=0": "0", "clip_seed=1": "1"}}


def test_a_run_without_evaluations_is_refused(tmp_path):
    run = evaluated(tmp_path / "run")
    with pytest.raises(ValueError, match="has no evaluations: run 05_evaluate"):
        compare([run])


def test_a_folder_without_config_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run"):
        Run(tmp_path)


def test_other_settings_in_the_same_folder_are_refused_with_both_values(tmp_path):
    run = Run.create(TrainConfig(run=str(tmp_path / "run"), k=50))
    with pytest.raises(ValueError, match="k = 50 there, 60 asked for"):
        Run.create(TrainConfig(run=str(run.path), k=60))
    assert Run.create(TrainConfig(run=str(run.path), k=50, workers=0)).config.workers == 0


def test_what_is_logged_after_an_episode_is_dropped_and_a_half_written_row_with_it(tmp_path):
    run = Run(evaluated(tmp_path / "run", gap=[(1, 1, 1), (2, 2, 2), (3, 3, 3)]))
    for episode in (1, 2, 3):
        run.append("metrics.jsonl", {"kind": "episode", "episode": episode})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "epis')
    run.truncate(2)
    assert list(run.metrics()["episode"]) == [1, 2]
    assert list(run.evaluations()["value"]) == [1, 2]


def test_a_measure_taken_again_replaces_its_value(tmp_path):
    run = Run(evaluated(tmp_path / "run", gap=[(1, 0, 2)]))
    evaluated(run.path, gap=[(5, 4, 6)])
    assert run.evaluations()[["value", "low", "high"]].values.tolist() == [[5, 4, 6]]


def test_an_error_while_a_run_is_locked_is_not_taken_for_the_lock(tmp_path):
    run = Run.create(TrainConfig(run=str(tmp_path / "run")))
    with pytest.raises(BlockingIOError), run.locked():
        raise BlockingIOError
    with run.locked(), pytest.raises(RuntimeError, match="being trained by another process"):
        with locked(run.path / "lock", wait=False):
            pass


def test_the_environment_names_versions_and_commit(tmp_path):
    run = Run.create(TrainConfig(run=str(tmp_path / "run")))
    about = json.loads((run.path / "environment.json").read_text())
    assert about.keys() == {"python", "platform", "packages", "commit", "command"}
    assert {"torch", "numpy"} <= about["packages"].keys()
    assert (about["commit"] is None) == (not (run.path / "uncommitted.diff").exists())
