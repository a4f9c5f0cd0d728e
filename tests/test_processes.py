"""Several processes learn what one learns, go on where another number of them stopped, and fall together."""

import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from accelerate.utils.other import get_free_port
from helpers import group_member, toy_settings, toy_table
from safetensors.torch import load_file

from protoclip_lab import clustering, encoders
from protoclip_lab.config import TrainConfig
from protoclip_lab.runs import Run
from protoclip_lab.training import train

# One clean server process holds the imports; each process of a group is forked from it in milliseconds.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["protoclip_lab.training"])
# What BatchNorm does not touch: a ViT tower and linear heads.
PLAIN = {"projection_depth": 0, "augmentation": "plain", "lr": 1e-3}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return toy_table(tmp_path_factory.mktemp("data"))


def together(number, settings, death=None):
    """Train in a gloo group of so many processes; their exit codes."""
    port = get_free_port()
    group = [SERVER.Process(target=group_member, args=(rank, number, port, settings, death)) for rank in range(number)]
    for process in group:
        process.start()
    for process in group:
        process.join()
    return [process.exitcode for process in group]


def assert_close(run, other, weights=1e-4, losses=2e-5):
    """Adam divides by the gradient's size, so that rounding where that is near 0 moves weights by parts of lr."""
    run, other = Run(run), Run(other)
    assert run.finished and other.finished
    mine, theirs = (r.metrics(kind="step") for r in (run, other))
    assert mine["step"].tolist() == theirs["step"].tolist()
    columns = [name for name in mine if name.startswith("loss") or name == "grad_norm"]
    np.testing.assert_allclose(mine[columns], theirs[columns], rtol=1e-4, atol=losses)
    episodes = [r.metrics(kind="episode")[["gap", "image_std", "text_std"]] for r in (run, other)]
    np.testing.assert_allclose(*episodes, atol=1e-4)
    for file in ("open_clip_model.safetensors", "heads.safetensors"):
        a, b = (load_file(r.latest / file) for r in (run, other))
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=weights, msg=name)


KINDS = {
    "episodes": {},
    "rolling": {"prototypes": "rolling", "visits": 2, "episodes": 4},
    "local loss": {"local_loss": True},
    "siglip": {"alignment": "siglip"},
    "accumulation": {"accumulation": 2, "batch_size": 8},
    "shared clustering": {"kmeans_share_above": 0, "k": [4, 6]},
    "uneven episode": {"episode_size": 53},
    "checkpointing": {"grad_checkpointing": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_learn_what_one_learns(kind, table, tmp_path):
    settings = PLAIN | {"kmeans_engine": "torch"} | KINDS[kind]
    train(toy_settings(table, tmp_path / "one", **settings))
    assert together(2, toy_settings(table, tmp_path / "two", **settings)) == [0, 0]
    assert_close(tmp_path / "two", tmp_path / "one")


def test_four_processes_learn_what_one_learns(table, tmp_path):
    train(toy_settings(table, tmp_path / "one", **PLAIN))
    assert together(4, toy_settings(table, tmp_path / "four", **PLAIN)) == [0] * 4
    assert_close(tmp_path / "four", tmp_path / "one")


def test_without_a_gradient_through_the_gather_towers_learn_something_else(table, tmp_path):
    settings = PLAIN | {"objective": "clip", "episodes": 1, "episode_size": 16, "warmup_steps": 0}
    train(toy_settings(table, tmp_path / "one", **settings))
    assert together(2, toy_settings(table, tmp_path / "two", gather_with_grad=False, **settings)) == [0, 0]
    one, two = (Run(tmp_path / name).metrics(kind="step").iloc[0] for name in ("one", "two"))
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    # Each process's half of it, averaged.
    assert two["grad_norm"] == pytest.approx(one["grad_norm"] / 2, rel=0.1)


@pytest.mark.parametrize("first, second", [(2, 1), (1, 2), (2, 4)])
def test_a_run_goes_on_in_another_number_of_processes(first, second, table, tmp_path):
    settings = PLAIN | {"prototypes": "rolling", "episodes": 4}
    train(toy_settings(table, tmp_path / "unbroken", **settings))
    broken = toy_settings(table, tmp_path / "broken", **settings)
    # Dies at the second step of the third episode: what the first two left in the buffer is needed.
    assert any(code != 0 for code in together(first, broken, death=("clamp_scales", 8)))
    assert [p.name for p in Run(tmp_path / "broken").checkpoints()][-1] == "episode_0002"
    assert together(second, broken) == [0] * second
    assert_close(tmp_path / "broken", tmp_path / "unbroken")


# The latter has BatchNorm in towers and heads, whose statistics a resumed run knows of the first process alone.
@pytest.mark.parametrize("model", ["ViT-mini", "RN-mini"])
def test_a_process_that_dies_takes_the_run_down_and_it_resumes_to_the_same_bits(model, table, tmp_path):
    settings = PLAIN | {"episodes": 4, "model": model, "projection_depth": int(model == "RN-mini")}
    for name, death in (("unbroken", None), ("broken", ("clamp_scales", 8))):
        codes = together(2, toy_settings(table, tmp_path / name, **settings), death)
        assert (codes == [0, 0]) == (death is None)
    assert not Run(tmp_path / "broken").finished
    assert together(2, toy_settings(table, tmp_path / "broken", **settings)) == [0, 0]
    a, b = (load_file(Run(tmp_path / name).latest / "open_clip_model.safetensors") for name in ("unbroken", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def script(tmp_path):
    def start(settings, *command):
        file = tmp_path / "train.yaml"
        file.write_text(yaml.safe_dump(settings))
        # The latter, or torchrun's restarts may meet addresses of the processes before (pytorch issue 135712).
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment, "start_new_session": True}
        return subprocess.Popen([sys.executable, "-m", *command, "protoclip_lab", "train", str(file)], **how)

    return start


def test_the_command_line_starts_processes_and_an_interrupt_reaches_them(table, tmp_path, script):
    settings = toy_settings(table, tmp_path / "run", **PLAIN, processes=2, episodes=200, save_every=100)
    settings["device"] = "cpu" if torch.cuda.is_available() else "auto"
    started = script(settings)
    run = tmp_path / "run"
    while started.poll() is None and not ((run / "config.json").exists() and Run(run).last_row()):
        pass
    os.kill(started.pid, signal.SIGINT)
    said, _ = started.communicate()
    assert started.returncode == 130, said
    assert "the same command continues from there" in said
    (left,) = Run(run).checkpoints()
    # In the middle of an episode: nothing that was learnt is lost.
    learnt = Run(run).metrics(kind="step")["step"].max()
    episode, _, step = left.name.removeprefix("episode_").partition("_step_")
    assert int(episode) * 3 + int(step or 0) == learnt


def test_the_error_of_one_process_is_shown(table, tmp_path, script):
    started = script(toy_settings(table, tmp_path / "run", **PLAIN | {"processes": 2, "lr": 1e30, "grad_clip": 0}))
    said, _ = started.communicate()
    assert started.returncode == 1, said
    assert "FloatingPointError: loss is" in said and "take a lower lr" in said


@pytest.mark.parametrize("launcher", ["torch.distributed.run", "accelerate.commands.launch"])
def test_torchrun_and_accelerate_start_it_and_torchrun_restarts_what_died(launcher, table, tmp_path, script):
    settings = toy_settings(table, tmp_path / "run", **PLAIN, episodes=12)
    if launcher.startswith("torch"):
        options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1", "-m"]
    else:
        options = ["--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "-m"]
    started = script(settings, launcher, *options)
    run = tmp_path / "run"
    if launcher.startswith("torch"):
        while started.poll() is None and not list((run / "checkpoints").glob("episode_*")):
            pass
        import psutil

        # The youngest of its children is a process of the group.
        os.kill(max(psutil.Process(started.pid).children(), key=lambda p: p.create_time()).pid, signal.SIGKILL)
    said, _ = started.communicate()
    assert started.returncode == 0, said
    assert Run(run).finished
    assert_close_to_one(table, tmp_path, settings)


def test_two_machines_learn_what_one_process_learns(table, tmp_path, script):
    # Two launchers that find each other by an address, as on two machines that share a disk.
    settings = toy_settings(table, tmp_path / "run", **PLAIN, kmeans_share_above=0)
    address = f"--rdzv-endpoint=127.0.0.1:{get_free_port()}"
    options = ["--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", address, "--local-addr=127.0.0.1", "-m"]
    machines = [script(settings, "torch.distributed.run", *options) for _ in range(2)]
    said = [machine.communicate()[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert_close_to_one(table, tmp_path, settings)


def assert_close_to_one(table, tmp_path, settings):
    train(settings | {"run": str(tmp_path / "one")})
    # A hundred steps of Adam let rounding grow.
    losses = [Run(tmp_path / name).metrics(kind="step")["loss"] for name in ("run", "one")]
    np.testing.assert_allclose(*losses, rtol=1e-2)


def test_a_batch_that_cannot_be_shared_out_is_refused(table, tmp_path):
    assert together(3, toy_settings(table, tmp_path / "run", **PLAIN)) != [0] * 3
    assert "3 processes cannot share batch_size = 16" in (tmp_path / "run.0.err").read_text()


def test_batchnorm_on_cpus_is_told_to_be_each_process_s_own(table, tmp_path):
    settings = toy_settings(table, tmp_path / "run", model="RN-mini", objective="clip", episodes=1)
    assert together(2, settings) == [0, 0]
    said = "".join((tmp_path / f"run.{rank}.err").read_text() for rank in (0, 1))
    assert said.count("each of the 2 processes has BatchNorm statistics of its own") == 1


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for _ in range(2):
        model = encoders.create(TrainConfig(model="ViT-mini", image_size=32, context_length=16)).train()
        if gradients:
            model.clip.set_grad_checkpointing()
        torch.manual_seed(0)
        found = model(torch.randn(4, 3, 32, 32), torch.randint(1, 1000, (4, 16)))
        (found.image_projection * found.text_projection).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name])


def test_one_process_alone_clusters_alike_whatever_it_is_told_of_others():
    torch.manual_seed(0)
    features = torch.randn(300, 8)
    alone = clustering.kmeans(features, 7, engine="torch", restarts=2)
    asked = clustering.kmeans(features, 7, engine="torch", restarts=2, share_above=0)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(alone, asked, strict=True))
