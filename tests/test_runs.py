"""The run directory: what is compared, and what a table of runs says."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats

from protoclip_lab.config import TrainConfig
from protoclip_lab.runs import Comparison, Run, keep, record_evaluations


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
    values = Comparison([early, late], tmp_path / "out").values
    assert list(values["checkpoint"]) == ["episode_0002", "episode_0003"]
    assert list(values["shape: zero_shot_top1"]) == [20, 40]
    assert "shape: gap" not in values  # it was measured on an earlier checkpoint alone


def test_one_seed_shows_the_interval_of_the_measure_and_several_their_deviation(tmp_path):
    numbers = np.random.default_rng(0).uniform(0, 100, 3)
    arm = [evaluated(tmp_path / f"b_seed={i}", i, gap=[(x, x - 9, x + 9)]) for i, x in enumerate(numbers)]
    alone = evaluated(tmp_path / "a_seed=0", gap=[(41.237, 39.9, 43)], grouping_AMI=[(0.5, float("nan"), float("nan"))])
    found = Comparison([*arm, alone], tmp_path / "out")
    several = f"{numbers.mean():.2f} ± {numbers.std(ddof=1):.2f}"
    difference = f"{41.237 - numbers[0]:+.2f}"
    assert list(found.table.columns) == ["b", "a", "a − b (n = 1)"]
    assert list(found.table.loc["shape: gap"]) == [several, "41.24 [39.90, 43.00]", difference]
    assert list(found.table.loc["shape: grouping_AMI"]) == ["", "0.50", ""]
    written = (tmp_path / "out" / "comparison.csv").read_text("utf-8").splitlines()
    assert written[:2] == ["measure,b,a,a − b (n = 1)", f'shape: gap,{several},"41.24 [39.90, 43.00]",{difference}']
    assert len(pd.read_csv(tmp_path / "out" / "values.csv")) == 4


def test_paired_differences_are_those_of_a_paired_t_test_over_the_seeds_both_have(tmp_path):
    rng, runs, values = np.random.default_rng(1), [], {}
    for arm, seeds in {"other": range(1, 6), "clip": range(4), "third": (0,), "fourth": (7,)}.items():
        for seed in seeds:
            values[arm, seed] = rng.normal(50, 10, 2)
            gap, top1 = ([(x, x - 1, x + 1)] for x in values[arm, seed])
            runs.append(evaluated(tmp_path / f"{arm}_seed={seed}", seed, gap=gap, zero_shot_top1=top1))
    table = Comparison(runs, tmp_path / "out").table
    assert list(table.columns[4:]) == ["other − clip (n = 3)", "third − clip (n = 1)", "fourth − clip (n = 0)"]
    for row, measure in enumerate(["shape: gap", "shape: zero_shot_top1"]):
        pairs = [(values["other", seed][row], values["clip", seed][row]) for seed in (1, 2, 3)]
        test = stats.ttest_rel(*zip(*pairs, strict=True))
        low, high = test.confidence_interval(0.95)
        mean = np.mean([ours - theirs for ours, theirs in pairs])
        one = values["third", 0][row] - values["clip", 0][row]
        assert list(table.loc[measure])[4:] == [f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]", f"{one:+.2f}", ""]


def test_without_an_arm_of_that_name_the_first_is_the_baseline_and_alone_it_has_no_difference(tmp_path):
    runs = [evaluated(tmp_path / arm, gap=[(x, x, x)]) for arm, x in (("b", 1), ("a", 3))]
    assert list(Comparison(runs, tmp_path / "out").table.loc["shape: gap"]) == ["1.00 [1.00, 1.00]", "3.00 [3.00, 3.00]", "+2.00"]
    assert list(Comparison(runs[:1], tmp_path / "out").table.columns) == ["b"]


def test_only_the_measures_asked_for_are_shown_and_all_are_kept(tmp_path):
    run = evaluated(tmp_path / "run", gap=[(1, 0, 2)], knn_top1=[(2, 1, 3)], zero_shot_top1=[(3, 2, 4)])
    found = Comparison([run], tmp_path / "out", measures=["top1"])
    assert found.shown == list(found.table.index) == ["shape: knn_top1", "shape: zero_shot_top1"]
    assert "shape: gap" in found.values


def test_runs_of_one_name_in_two_folders_are_two_rows_of_one_arm(tmp_path):
    runs = [evaluated(tmp_path / folder / "clip", gap=[(x, x, x)]) for folder, x in (("a", 1), ("b", 3))]
    found = Comparison(runs, tmp_path / "out")
    assert len(found.values) == 2
    assert found.table.loc["shape: gap", "clip"] == "2.00 ± 1.41"


def test_settings_in_which_runs_differ_are_listed_and_marked(tmp_path):
    runs = [evaluated(tmp_path / f"clip_seed={seed}", seed, gap=[(1, 1, 1)]) for seed in (0, 1, 0)]
    settings = Comparison([*runs[:2], evaluated(tmp_path / "again", 0, gap=[(1, 1, 1)])], tmp_path / "out").settings()
    assert settings.data.to_dict("index") == {"seed": {"clip_seed=0": "0", "clip_seed=1": "1", "again": "0"}}
    html = settings.to_html(table_uuid="t")
    assert html.count("background: #fdf3c7") == 1 and "#T_t_row0_col1 {" in html


def test_a_run_without_evaluations_is_refused(tmp_path):
    run = evaluated(tmp_path / "run")
    with pytest.raises(ValueError, match="has no evaluations: run 05_evaluate"):
        Comparison([run], tmp_path)


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
        run.append("metrics.jsonl", {"kind": "episode", "episode": episode, "step": 10 * episode})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "epis')
    run.truncate(20, "episode_0002")
    assert list(run.metrics()["episode"]) == [1, 2]
    assert list(run.evaluations()["value"]) == [1, 2]


def test_a_measure_taken_again_replaces_its_value(tmp_path):
    run = Run(evaluated(tmp_path / "run", gap=[(1, 0, 2)]))
    evaluated(run.path, gap=[(5, 4, 6)])
    assert run.evaluations()[["value", "low", "high"]].values.tolist() == [[5, 4, 6]]


def test_the_environment_names_versions_commit_and_device(tmp_path, monkeypatch):
    def environment(name, **settings):
        run = Run.create(TrainConfig(run=str(tmp_path / name), **settings))
        return json.loads((run.path / "environment.json").read_text())

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    about = environment("run")
    assert about.keys() == {"python", "device", "packages", "commit"}
    assert {"torch", "numpy"} <= about["packages"].keys()
    assert (tmp_path / "run" / "uncommitted.diff").exists()
    assert about["device"] == f"cpu ({torch.get_num_threads()} threads)"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert environment("gpu")["device"] == "NVIDIA H200"
    assert environment("cpu", device="cpu")["device"] == about["device"]


def test_a_figure_is_kept_as_png_and_one_for_paper_as_vectors_too(tmp_path):
    figure = Figure()
    assert keep(figure, tmp_path, "a") is figure
    figure.paper = True
    keep(figure, tmp_path, "b")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["a.png", "b.pdf", "b.png"]
    assert (tmp_path / "figures" / "b.pdf").read_bytes().startswith(b"%PDF")


def test_an_emptied_checkpoint_file_is_damaged(tmp_path):
    run = Run(evaluated(tmp_path / "run"))
    folder = run.save("episode_0001", lambda folder: (folder / "weights").write_bytes(b"w" * 3_000_000))
    assert run.latest == folder
    (folder / "weights").write_bytes(b"")
    assert run.latest is None
