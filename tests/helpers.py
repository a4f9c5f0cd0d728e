"""Small data and settings that several tests train on."""

from pathlib import Path
from typing import Any

from protoclip_lab.data import shapes


def toy_table(folder: Path, size: int = 96) -> Path:
    """A table of small shapes pictures under ``folder``; five sixths are split train."""
    return shapes.write(folder / "shapes", size, image_size=32)


def toy_settings(table: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a training of a few seconds: three episodes, the last two with prototypes."""
    settings = {
        "run": str(run),
        "table": str(table),
        "image_root": str(table.with_name("images.tar")),
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


def train_and_die(settings: dict[str, Any], where: str, call: int) -> None:
    """Train in this process and SIGKILL it at the ``call``-th time that ``where`` is reached."""
    import os
    import signal
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
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    with mock.patch.object(owner, name, fatal):
        training.train(settings)


def run_training(settings: dict[str, Any]) -> None:
    """Train in this process."""
    from protoclip_lab import training

    training.train(settings)
