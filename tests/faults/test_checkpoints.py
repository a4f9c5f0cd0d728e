"""Damaged checkpoints, run folders that are taken or of another time, and pickles in the place of weights."""

import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
import yaml
from filelock import Timeout
from helpers import train_in_steps
from safetensors import SafetensorError

from faults.children import SERVER, again, assert_same, command, replace
from protoclip_lab import encoders
from protoclip_lab.evaluation.suite import evaluate_checkpoint
from protoclip_lab.runs import Run, _sha256
from protoclip_lab.training import train

FILES = ["open_clip_model", "heads", "prototypes", "optimizer", "trainer"]
FILES = [f"{name}.safetensors" for name in FILES] + ["trainer.json", "prototypes.json", "open_clip_config.json", "checksums.json"]


def flipped(data, place=-20):
    found = bytearray(data)
    found[place] ^= 1
    return bytes(found)


DAMAGE = {"bit flipped": flipped, "cut in half": lambda data: data[: len(data) // 2], "emptied": lambda data: b""}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_it_is_said(file, damage, settings, unbroken, tmp_path, caplog):
    again(unbroken, tmp_path / "run", settings(unbroken))
    run = Run(tmp_path / "run")
    broken = run.checkpoints()[-1]
    replace(broken / file, DAMAGE[damage]((broken / file).read_bytes()))
    assert run.latest.name == "episode_0002"
    assert f"{broken} is damaged (" in caplog.text and "it is passed over" in caplog.text
    with pytest.raises(ValueError, match=f"{broken} is damaged: take the one before"):
        evaluate_checkpoint(broken)


def test_a_run_whose_checksums_are_damaged_ends_as_the_unbroken_one(settings, unbroken, tmp_path):
    config = again(unbroken, tmp_path / "run", settings(unbroken))
    replace(tmp_path / "run" / "checkpoints" / "episode_0003" / "checksums.json", b'{"heads.safe')
    train(config)
    assert_same(tmp_path / "run", unbroken)


def test_of_two_trainings_of_one_run_the_second_is_refused_and_the_first_ends_as_if_alone(settings, unbroken, tmp_path):
    config = settings(tmp_path / "run")
    permits = multiprocessing.get_context("forkserver").Semaphore(0)
    first = SERVER.Process(target=train_in_steps, args=(config, permits))
    first.start()
    # Written under the lock, before the first episode.
    while first.is_alive() and not (tmp_path / "run" / "bad_rows.jsonl").exists():
        pass
    lock = tmp_path / "run" / "only_one_process_trains.lock"
    with pytest.raises(Timeout, match=str(lock)):
        train(config)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    status, said = command("train", tmp_path / "train.yaml")
    assert status == 1 and said.startswith("error: ") and str(lock) in said
    for _ in range(3):
        permits.release()
    first.join()
    assert first.exitcode == 0
    assert_same(tmp_path / "run", unbroken)


def test_settings_that_an_older_version_did_not_know_take_their_defaults(settings, unbroken, tmp_path):
    config = again(unbroken, tmp_path / "run", settings(unbroken))
    file = tmp_path / "run" / "config.json"
    older = {name: value for name, value in json.loads(file.read_text()).items() if name not in ("visits", "kmeans_balanced", "wandb")}
    file.write_text(json.dumps(older))
    train(config)
    assert_same(tmp_path / "run", unbroken)


@pytest.mark.parametrize("content, why", [({"queue_size": 3}, "'queue_size' of TrainConfig"), (None, "line "), ({"k": 0}, "k = ")])
def test_a_config_that_cannot_be_read_names_its_file(content, why, settings, unbroken, tmp_path, capsys):
    config = again(unbroken, tmp_path / "run", settings(unbroken))
    file = tmp_path / "run" / "config.json"
    text = file.read_text()
    file.write_text(json.dumps(json.loads(text) | content) if content else text[: len(text) // 2])
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    for arguments in (("train", tmp_path / "train.yaml"), ("evaluate", tmp_path / "run")):
        status, said = command(*arguments)
        assert status == 1 and said.startswith(f"error: {file} is broken, missing or was never finished ("), said
        assert why in said and said.strip().endswith("Take another folder") and "Traceback" not in said
    assert [p.name for p in Run(tmp_path / "run").checkpoints()] == ["episode_0001", "episode_0002", "episode_0003"]


class Canary:
    """Who unpickles it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def canary(tmp_path):
    bird = Canary(tmp_path / "sung")
    yield bird
    assert not os.path.exists(bird.folder)
    pickle.loads(pickle.dumps(bird))
    assert os.path.exists(bird.folder)


@pytest.mark.parametrize("file", [name for name in FILES if name.endswith("safetensors")])
def test_a_pickle_in_a_checkpoint_is_not_run_whatever_the_checksums_say(file, canary, settings, unbroken, tmp_path, caplog):
    config = again(unbroken, tmp_path / "run", settings(unbroken))
    last = tmp_path / "run" / "checkpoints" / "episode_0003"
    replace(last / file, pickle.dumps(canary))
    assert Run(tmp_path / "run").latest.name == "episode_0002" and file in caplog.text
    sums = json.loads((last / "checksums.json").read_text()) | {file: _sha256(last / file)}
    replace(last / "checksums.json", json.dumps(sums).encode())
    # The towers' weights are asked for by name; the rest is safetensors' own error.
    with pytest.raises((ValueError, SafetensorError), match="header too large"):
        train(config)


@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.npz", "w.safetensors"])
@pytest.mark.parametrize("how", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_pickle_as_pretrained_weights_is_refused_naming_it(name, how, canary, settings, tmp_path):
    with (tmp_path / name).open("wb") as file:
        how(canary, file)
    with pytest.raises(ValueError, match=f"{name} holds no weights of RN-mini: .* Name another"):
        encoders.create(settings_of(settings, tmp_path, pretrained=str(tmp_path / name)))


def settings_of(settings, tmp_path, **changes):
    from protoclip_lab.config import TrainConfig

    return TrainConfig(**settings(tmp_path / "run", **changes))


def test_a_pickle_as_a_checkpoint_of_the_authors_is_refused(canary, tmp_path):
    (tmp_path / "authors.pt").write_bytes(pickle.dumps(canary))
    with pytest.raises(ValueError, match=r"authors\.pt is no checkpoint of the ProtoCLIP authors' code"):
        encoders.load(tmp_path / "authors.pt")


@pytest.mark.parametrize("kind", ["pickle", "objects"])
def test_a_pickle_as_teacher_features_is_refused(kind, canary, tmp_path):
    from protoclip_lab import teachers

    path = tmp_path / "teacher.npy"
    path.with_suffix(".json").write_text('{"fingerprint": "f", "table": "t"}')
    if kind == "pickle":
        path.write_bytes(pickle.dumps(canary))
    else:
        np.save(path, np.array([canary, canary], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"teacher\.npy is broken.*Run 02_extract_teacher again"):
        teachers.load(path, [0, 0])


def test_a_damaged_row_of_the_metrics_is_named(settings, unbroken, tmp_path):
    config = again(unbroken, tmp_path / "run", settings(unbroken))
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"loss"', b'"lo\0s"', 1))
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        train(config)


def test_a_pickle_with_forged_checksums_is_named(settings, unbroken, tmp_path):
    config = again(unbroken, tmp_path / "run", settings(unbroken))
    last = tmp_path / "run" / "checkpoints" / "episode_0003"
    replace(last / "optimizer.safetensors", pickle.dumps("x" * 99))
    sums = json.loads((last / "checksums.json").read_text())
    sums["optimizer.safetensors"] = _sha256(last / "optimizer.safetensors")
    replace(last / "checksums.json", json.dumps(sums).encode())
    with pytest.raises(ValueError, match="episode_0003 is broken.*Delete it, and the one before is taken"):
        train(config)
