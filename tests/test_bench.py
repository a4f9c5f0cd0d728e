"""The bench at toy sizes: it measures what it says, and its table says what it measured. Its figures are no tests."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from bench import __main__ as bench
from bench import data, functions, measure, one_training, report, training
from helpers import toy_settings, toy_table
from PIL import Image

CHEAP = ["back_translation", "loss", "growth"]


@pytest.fixture
def no_real_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLICKR8K", raising=False)
    monkeypatch.setattr(data, "teacher", lambda folder, table: [])


def pretend_training(task: dict, folder: Path) -> dict:
    """A training whose episodes of 10 samples take 1 s (CLIP), 1.05 s (rolling) or 1.5 s (faithful), the first two ten times that."""
    wanted = task["settings"]
    each = 1.0 if wanted["objective"] == "clip" else {"rolling": 1.05, "episode": 1.5}[wanted["prototypes"]]
    seconds = [10 * each] * training.WARM_UP + [each] * (wanted["episodes"] - training.WARM_UP)
    stages = [{"time/extract": 0.1 * s, "time/learn": 0.6 * s, "time/cluster": 0.2 * s, "time/wait": 0.07 * s} for s in seconds]
    return {"ends": list(itertools.accumulate(seconds)), "samples": 10, "stages": stages}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_real_data: None) -> dict:
    threads = torch.get_num_threads()
    monkeypatch.setattr(training, "one_training", pretend_training)
    monkeypatch.setitem(bench.TOY, "training", {"episode_size": 16, "k": 2, "rounds": 2, "images": 2})
    found = bench.run(tmp_path, [*CHEAP, "training"], toy=True, threads=1)
    torch.set_num_threads(threads)
    # As their sections leave them, which train and compile for longer than a test may.
    about = {"made": found["loss"]["made"], "took": 1.0}
    chain = [{"seconds": {"faithful": [3.0], "warm": [0.5]}, "objective": {"faithful": 9.0, "warm": 9.05}, "moved_by_radii": 0.3}]
    found["kmeans"] = about | {"settings": {"huge": (9, 3)}, "cases": {"N 8, K 2": chain}, "engines": {"faiss": [2.0]}}
    found["input"] = about | {"settings": {"images": 8}, "seconds": {"drawn": {"decode": [1.0], "light": [2.0]}}}
    found["umap"] = about | {"settings": {"points": 9, "d": 2}, "seconds": {"umap": [4.0]}}
    found["open_clip"] = about | {
        "settings": {"model": "m", "batch_size": 4},
        "seconds_per_sample": {"ours": [1.0], "open_clip": [1.5]},
    }
    return found


def scaled(found: object, factors: itertools.count) -> object:
    """The same with every number but settings multiplied, each by another factor."""
    if isinstance(found, dict):
        return {key: value if key in ("settings", "made", "x") else scaled(value, factors) for key, value in found.items()}
    if isinstance(found, list):
        return [scaled(value, factors) for value in found]
    return found * 1.01 ** next(factors) if isinstance(found, int | float) else found


def test_every_line_of_the_table_changes_with_the_measurements(results: dict) -> None:
    changed = scaled(copy.deepcopy(results), itertools.count(1))
    for name in results:
        before, after = report.rows(name, results[name]), report.rows(name, changed[name])
        assert before and [row.what for row in before] == [row.what for row in after]
        for one, other in zip(before, after, strict=True):
            assert one.values and (one.values != other.values or set(one.values) == {0.0}), one.what


def test_the_table_holds_every_figure_to_reach(results: dict) -> None:
    asked = {row.what: row for name in results for row in report.rows(name, results[name]) if row.asked}
    assert asked["rolling ProtoCLIP ÷ CLIP, wall-clock per sample"].values == pytest.approx([1.05, 1.05])
    assert asked["faithful ProtoCLIP ÷ CLIP, wall-clock per sample"].values == pytest.approx([1.5, 1.5])
    assert asked["our CLIP ÷ open_clip's script, samples per second"].values == [1.5]
    assert asked["warm-started k-means over faithful"].values == [6.0]
    assert {row.asked for row in asked.values()} == {"≤ 1.06", "≤ 1.40", "≥ 1.0", "≥ 60", "≤ 0.35", "≤ 0.4", "≤ 1.0", "≥ 5", "≤ 1.01"}
    verdicts = {what: row.reached for what, row in asked.items() if "ProtoCLIP" in what}
    assert [*verdicts.values()] == ["reached"] * 2 + ["not reached"] * 3


def test_stages_add_up_to_the_wall_clock(results: dict) -> None:
    measured = results["training"]
    for name, rounds in measured["stages"].items():
        for spent, seconds in zip(rounds, measured["seconds_per_sample"][name], strict=True):
            assert sum(value for stage, value in spent.items() if stage != "wait") == pytest.approx(seconds)
            assert spent["rest"] == pytest.approx(0.1 * seconds)


def test_results_table_and_pictures_are_written_and_merged(results: dict, tmp_path: Path, no_real_data: None) -> None:
    kept = json.loads((tmp_path / "results.json").read_text())
    assert set(kept) == {*CHEAP, "training"}
    assert kept["loss"]["made"].keys() >= {"cpu", "cores", "memory_gib", "gpu", "os", "python", "versions", "torch_threads", "commit"}
    for name in ("growth", "training"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 800
    again = bench.run(tmp_path, ["gpu"], toy=True, threads=torch.get_num_threads())
    assert again["loss"] == kept["loss"]
    table = (tmp_path / "table.md").read_text()
    assert torch.cuda.is_available() or "gpu: skipped, no CUDA device here" in table
    assert "kmeans: not run" in table


def test_ours_and_textbook_compute_the_same(results: dict) -> None:
    assert results["back_translation"]["largest_difference"] < 1e-6
    assert max(results["loss"]["differences"].values()) < 1e-4


@pytest.mark.parametrize(
    ("values", "asked", "verdict"), [([9, 1.0, 1.06], "≤ 1.06", "reached"), ([1.1, 1.0, 1.07], "≤ 1.06", "not reached")]
)
def test_the_median_decides_at_most(values: list[float], asked: str, verdict: str) -> None:
    assert report.Row("", values, asked=asked).reached == verdict


@pytest.mark.parametrize(("values", "verdict"), [([60, 60, 1], "reached"), ([59, 99, 2], "not reached"), ([], "not measured")])
def test_the_median_decides_at_least(values: list[float], verdict: str) -> None:
    assert report.Row("", values, asked="≥ 60").reached == verdict


def test_peak_memory_counts_what_is_held_at_once_inside_operators_too() -> None:
    def two_then_one() -> None:
        first = torch.ones(1000, 1000)
        second = first + 1  # 8 MB
        del first
        torch.stack([second])

    assert measure.peak_memory(two_then_one) == pytest.approx(8e6, rel=1e-3)
    # The (B, K) matrix of logits, at the least.
    losses = functions.loss_cases(64, 5000, 8, seed=0)
    assert measure.peak_memory(losses["textbook"]) > 64 * 5000 * 4


def test_functions_are_called_in_turn_and_the_first_time_is_not_counted() -> None:
    calls: list[str] = []
    seconds = measure.in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_a_chain_of_warm_starts_is_compared_with_faithful_k_means_on_the_same_features() -> None:
    episodes = functions.drifting(200, 5, 8, 3, drift=0.1, seed=0)
    for found in functions.kmeans_chain(episodes, 5, rounds=1, tolerance=1e-3, seed=0):
        assert found["objective"]["faithful"] == pytest.approx(found["objective"]["warm"], rel=0.2)
        assert 0 < found["moved_by_radii"] < 1


def test_a_training_is_timed_at_the_ends_of_its_episodes_and_goes_on_until_then(tmp_path: Path) -> None:
    settings = toy_settings(toy_table(tmp_path), tmp_path / "run", episodes=2)
    found = one_training.ours(settings)
    assert len(found["ends"]) == len(found["stages"]) == 2
    assert found["ends"][1] - found["ends"][0] >= found["stages"][1]["time/learn"] > 0
    assert found["samples"] > 0 and not (tmp_path / "run" / "finished.json").exists()


def test_open_clips_own_script_trains_on_the_same_table(no_real_data: None) -> None:
    found = training.open_clip(samples=64, timed=1, rounds=1, model="RN-micro")
    assert {name: len(seconds) for name, seconds in found["seconds_per_sample"].items()} == {"ours": 1, "open_clip": 1}
    assert all(seconds[0] > 0 for seconds in found["seconds_per_sample"].values())
