"""Small data and settings that several tests train on, and a checkpoint in the authors' format."""

import io
import multiprocessing
import signal
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from protoclip_lab.data import shapes


def toy_table(folder: Path, size: int = 96) -> Path:
    """A table of small shapes pictures under ``folder``; five sixths are split train."""
    return shapes.write(folder / "shapes", size, image_size=32)


def toy_settings(table: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a training of a few seconds: three episodes, the last two with prototypes."""
    settings = {
        "run": str(run),
        "table": str(table),
        "image_root": str(table.with_name("images")),
        "where": {"split": "train"},
        "model": "ViT-mini",
        "image_size": 32,
        "context_length": 16,
        "projection_hidden": 32,
        "projection_dim": 16,
        "episodes": 3,
        "episode_size": 48,
        "batch_size": 16,
        "k": 6,
        "kmeans_iterations": 5,
        "kmeans_restarts": 1,
        "warmup_steps": 2,
        "workers": 0,
        "threads": 1,
        "tensorboard": False,
        "device": "cpu",
    }
    return settings | changes


def train_and_die(settings: dict[str, Any], where: str, call: int, blow: int = signal.SIGKILL) -> None:
    """Train in this process; it and its workers get the signal at the ``call``-th time that ``where`` is reached."""
    import os
    from unittest import mock

    from protoclip_lab import clustering, encoders, runs, training
    from protoclip_lab.data import batches

    places = {
        "extraction": (batches.Batches, "__getitem__"),
        "clustering": (clustering, "back_translate"),
        "learning": (encoders.TwoTowers, "clamp_scales"),
        "saving": (runs, "_sha256"),
        "logging": (runs.Run, "append"),
    }
    owner, name = places[where]
    real, calls = getattr(owner, name), iter(range(1, 10**6))

    def fatal(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), blow)
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, blow)
        return real(*args, **kwargs)

    with mock.patch.object(owner, name, fatal):
        training.train(settings)


def run_training(settings: dict[str, Any]) -> None:
    """Train in this process."""
    from protoclip_lab import training

    training.train(settings)


def train_in_steps(settings: dict[str, Any], permits: Any) -> None:
    """Train in this process; each episode waits for a permit of a semaphore."""
    from unittest import mock

    from protoclip_lab import training

    real = training._Trainer._episode

    def episode(*args: Any) -> None:
        permits.acquire()
        real(*args)

    with mock.patch.object(training._Trainer, "_episode", episode):
        training.train(settings)


def record_rows(folder: Path, checkpoint: str, count: int) -> None:
    """Record so many rows of one checkpoint, one after the other."""
    from protoclip_lab.runs import record_evaluations

    for index in range(count):
        row = {"checkpoint": checkpoint, "dataset": "d", "measure": f"m{index}", "value": index / 7}
        record_evaluations(folder, [row | {"low": None, "high": None}])


TOWERS = {
    "RN": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None},
    "ViT": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8},
}


def authors_checkpoint(
    file: Path,
    tower: str = "ViT",
    *,
    depth: int | None = 1,
    prefix: str = "module.",
    numpy_core: str = "_core",
    vocabulary: int = 64,
) -> tuple[nn.Module, nn.Sequential | None, nn.Sequential | None]:
    """Write a checkpoint as the ProtoCLIP authors' code does; the CLIP model and heads whose weights it holds.

    Args:
        depth: hidden layers of the heads; None makes none.
        prefix: of the weights' names; "module." is what DistributedDataParallel puts there.
        numpy_core: the folder of NumPy that pickles name, "core" before NumPy 2.
    """
    from open_clip.model import CLIP

    torch.manual_seed(3)
    text = {"context_length": 16, "vocab_size": vocabulary, "width": 128, "heads": 2, "layers": 2}
    clip, heads = CLIP(24, TOWERS[tower], text, quick_gelu=True), []
    for _ in range(0 if depth is None else 2):
        layers, width = [], 24
        for _ in range(depth):
            layers += [nn.Linear(width, 20), nn.BatchNorm1d(20), nn.ReLU()]
            width = 20
        heads.append(nn.Sequential(*layers, nn.Linear(width, 12)))
    for module in nn.ModuleList([clip, *heads]).modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
    nn.init.constant_(clip.logit_scale, 3.25)
    state = dict(clip.state_dict())
    if heads:
        state["logit_scale_proto"] = torch.tensor(2.5)
        for name, head in zip(("image", "text"), heads, strict=True):
            state |= {f"{name}_projection_head.{key}": value for key, value in head.state_dict().items()}
    optimizer = {"state": {0: {"step": 7}}, "param_groups": [{"lr": np.float64(1e-3) / 3, "params": [0]}]}
    content = {"epoch": 2, "name": "tiny", "state_dict": {prefix + name: value for name, value in state.items()}}
    torch.save({**content, "optimizer": optimizer, "scaler": {"scale": 65536.0}}, file)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(
                name,
                data.replace(b"numpy._core.", b"numpy.core.").replace(
                    b"numpy.core.multiarray", f"numpy.{numpy_core}.multiarray".encode()
                ),
            )
    assert f"numpy.{numpy_core}.multiarray\nscalar".encode() in file.read_bytes()
    image_head, text_head = heads or (None, None)
    for module in (clip, *heads):
        module.eval()
    return clip, image_head, text_head


def group_member(rank: int, size: int, port: int, settings: dict[str, Any], death: tuple[str, int] | None) -> None:
    """Train as one of a gloo group; with ``death`` the last member kills itself the n-th time that TwoTowers does so."""
    import os
    from unittest import mock

    from protoclip_lab import encoders, training

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ |= {name: str(value) for name, value in place.items()}
    # The server that forks them has long had its own.
    os.dup2(os.open(f"{settings['run']}.{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    name, last = death or ("clamp_scales", 0)
    real, calls = getattr(encoders.TwoTowers, name), iter(range(1, 10**6))

    def fatal(*args: Any) -> Any:
        if next(calls) == last and rank == size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    with mock.patch.object(encoders.TwoTowers, name, fatal):
        training.train(settings)


def picture(number: int) -> Image.Image:
    """A small picture of noise."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (12, 10, 3), np.uint8))


def encoded(number: int, kind: str = "PNG") -> bytes:
    """The file of a picture."""
    stream = io.BytesIO()
    picture(number).save(stream, kind)
    return stream.getvalue()


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """A tar of these members."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
