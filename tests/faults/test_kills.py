"""Killed at a random moment and started again, a run ends with the weights of one that never was."""

import signal

import numpy as np
import pytest
import yaml

from faults.children import ALL, assert_same, command, together

# Moments are shares of all calls that functions of the package make or receive in a run; one in each twentieth of it.
DRAWS = np.random.default_rng(2206)
MOMENTS = DRAWS.permutation((np.arange(20) + DRAWS.uniform(0.02, 0.98, 20)) / 20).round(3).tolist()
# What BatchNorm does not touch: of its statistics on CPUs each process has its own, and those of the first are kept.
TWO = {"model": "ViT-mini", "projection_depth": 0, "augmentation": "plain"}


def calls(run, rank):
    return int(run.with_name(f"{run.name}.{rank}.calls").read_text())


@pytest.mark.parametrize("moment", MOMENTS if ALL else MOMENTS[:3])
def test_one_process_killed_at_a_random_moment(moment, settings, unbroken, tmp_path):
    config = settings(tmp_path / "run")
    assert together(config, kill=(0, int(moment * calls(unbroken, 0)))) == [-signal.SIGKILL]
    assert together(config) == [0]
    assert_same(tmp_path / "run", unbroken)


@pytest.fixture(scope="module")
def two_unbroken(settings, tmp_path_factory):
    run = tmp_path_factory.mktemp("two") / "run"
    assert together(settings(run, **TWO), processes=2) == [0, 0]
    return run


@pytest.mark.parametrize("moment", MOMENTS if ALL else MOMENTS[2:3])
def test_one_of_two_processes_killed_at_a_random_moment(moment, settings, two_unbroken, tmp_path):
    config, rank = settings(tmp_path / "run", **TWO), int(moment * 1000) % 2
    codes = together(config, kill=(rank, int(moment * calls(two_unbroken, rank))), processes=2)
    assert codes[rank] == -signal.SIGKILL and all(codes)
    assert together(config, processes=2) == [0, 0]
    assert_same(tmp_path / "run", two_unbroken)


@pytest.mark.skipif(not ALL, reason="make faults: full disks in test_disk end writes there too")
@pytest.mark.parametrize("bytes_written", [0, 100, 3_000_000])
def test_killed_in_the_middle_of_writing_a_file(bytes_written, settings, unbroken, tmp_path):
    config = settings(tmp_path / "run")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    full = "protoclip_lab.encoders", "save", 2, bytes_written
    status, said = command("train", tmp_path / "train.yaml", full=full, blow=signal.SIG_DFL)
    assert status == -signal.SIGXFSZ, said
    assert list((tmp_path / "run" / "checkpoints").glob(".episode_0002.partial/*"))
    assert together(config) == [0]
    assert_same(tmp_path / "run", unbroken)
