"""Whole trainings, run in turn: ProtoCLIP beside CLIP, and our CLIP beside open_clip's own script."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from . import data, measure

# What tells the arms apart; all else they share, the augmentation too.
ARMS = {
    "clip": {"objective": "clip"},
    "rolling": {"objective": "protoclip", "prototypes": "rolling", "visits": 2},
    # Twice as wide as the towers' embedding, 256 of RN-mini, as the paper's 2,048 are to RN50's 1,024.
    "rolling, heads of 512": {"objective": "protoclip", "prototypes": "rolling", "visits": 2, "projection_hidden": 512},
    "faithful": {"objective": "protoclip", "prototypes": "episode"},
    "faithful, heads of 512": {"objective": "protoclip", "prototypes": "episode", "projection_hidden": 512},
    "faithful, extraction in bf16": {"objective": "protoclip", "prototypes": "episode", "extraction_precision": "bf16"},
}
WARM_UP = 2  # the first episode is InfoNCE alone in every arm; the second, the first with prototypes, warms up


def one_training(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a process of its own finds: see :mod:`tests.bench.one_training`."""
    asked, found = folder / "asked.json", folder / "found.json"
    asked.write_text(json.dumps(task))
    found.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.bench.one_training", str(asked), str(found)]
    environment = os.environ | {"OMP_NUM_THREADS": str(task["threads"])}
    done = subprocess.run(command, cwd=measure.ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a training of the bench failed: {done.stderr[-3000:]}")
    return json.loads(found.read_text())


def seconds_per_sample(found: dict[str, Any], warm_up: int) -> float:
    """Wall-clock from the end of the last warm-up episode to the end of the last, over the samples learnt in between."""
    ends = found["ends"]
    return (ends[-1] - ends[warm_up - 1]) / ((len(ends) - warm_up) * found["samples"])


def stages(found: dict[str, Any], warm_up: int) -> dict[str, float]:
    """Seconds of a sample by stage, "rest" for what none counts (checkpoints), "wait" for input within extract and learn."""
    rows, each = found["stages"][warm_up:], (len(found["ends"]) - warm_up) * found["samples"]
    spent = {name: sum(row.get(f"time/{name}", 0.0) for row in rows) / each for name in ("extract", "cluster", "learn", "wait")}
    rest = seconds_per_sample(found, warm_up) - spent["extract"] - spent["cluster"] - spent["learn"]
    return spent | {"rest": max(0.0, rest)}


def _compare(tasks: dict[str, dict[str, Any]], folder: Path, rounds: int, warm_up: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    spent: dict[str, list[dict]] = {name: [] for name in tasks}
    for turn in range(rounds):
        for name, task in tasks.items():
            print(f"  round {turn + 1} of {rounds}: {name}", flush=True)
            found = one_training(task, folder)
            for made in ("run", "logs"):
                shutil.rmtree(folder / made, ignore_errors=True)
            seconds[name].append(seconds_per_sample(found, warm_up))
            if "stages" in found:
                spent[name].append(stages(found, warm_up))
    return {"seconds_per_sample": seconds, "stages": spent}


def arms(
    *,
    episode_size: int = 1500,
    k: int = 200,
    timed: int = 4,
    rounds: int = 3,
    seed: int = 0,
    synthetic: bool = False,
    images: int = 0,
    names: tuple[str, ...] = tuple(ARMS),
    **changes: Any,
) -> dict[str, Any]:
    """Wall-clock per sample of CLIP and of ProtoCLIP, rolling and faithful, in turn.

    An even number of timed episodes holds both visits of the rolling arm's pairs alike.
    Counted: all between the ends of episodes, so extraction, clustering, learning, waiting and the checkpoint of each.
    Not counted: the start, episode 1 (InfoNCE alone in all arms) and episode 2 (warm-up), the external teacher's features.
    """
    episodes, threads = WARM_UP + timed, torch.get_num_threads()
    with data.work_folder() as folder:
        table = data.pairs(folder, episodes * episode_size, synthetic=synthetic, images=images)
        external = data.teacher(folder, table)
        common = data.settings(folder, table, seed=seed, threads=threads, augmentation="light", episodes=episodes) | changes
        common |= {"episode_size": episode_size, "infonce_warmup_episodes": 1}
        own = {"clip": ARMS["clip"]} | {name: ARMS[name] | {"k": k, "teachers": external} for name in ARMS if name != "clip"}
        tasks = {name: {"settings": common | own[name], "threads": threads} for name in names}
        found = _compare(tasks, folder, rounds, WARM_UP)
        about = {"data": data.about(folder), "external_teachers": [t["name"] for t in external], "arms": {n: ARMS[n] for n in names}}
    kept = {name: value for name, value in common.items() if name not in ("table", "run")}
    return {"settings": kept | about | {"k": k, "timed_episodes": timed, "rounds": rounds}, **found}


def open_clip(*, samples: int = 3000, timed: int = 2, rounds: int = 3, seed: int = 0, model: str = "RN-mini") -> dict[str, Any]:
    """Our CLIP and open_clip's own script: same table, model, augmentation (its own: "plain"), batch, workers, threads, rates.

    An epoch, which for ours is an episode of the whole table, is timed from the end of the one before, its checkpoint in it.
    """
    threads, epochs = torch.get_num_threads(), 1 + timed
    with data.work_folder() as folder:
        table = data.pairs(folder, samples)
        common = data.settings(folder, table, seed=seed, threads=threads, model=model, objective="clip", augmentation="plain")
        settings = common | {"episodes": epochs, "episode_size": None, "grad_clip": 10.0, "weight_decay": 0.1}
        options = {"train-data": data.as_files(table, folder / "files"), "dataset-type": "csv", "model": model, "epochs": epochs}
        options |= {"batch-size": settings["batch_size"], "workers": settings["workers"], "precision": "fp32", "device": "cpu"}
        options |= {"lr": settings["lr"], "warmup": settings["warmup_steps"], "wd": 0.1, "grad-clip-norm": 10.0, "seed": seed}
        options |= {"logs": folder / "logs", "name": "bench"}
        arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        learnt = len(table) // settings["batch_size"] * settings["batch_size"]
        script = {"arguments": arguments, "samples": learnt, "threads": threads}
        found = _compare({"ours": {"settings": settings, "threads": threads}, "open_clip": script}, folder, rounds, warm_up=1)
        about = {"data": data.about(folder), "timed_epochs": timed, "rounds": rounds}
    kept = {name: value for name, value in settings.items() if name not in ("table", "run")}
    return {"settings": kept | about, **found}


def gpu(
    *, model: str = "RN50", batches: tuple[int, ...] = (64, 512), k: int = 20_000, n: int = 200_000, rounds: int = 1
) -> dict[str, Any]:
    """The same three arms at the paper's size on a GPU, synthetic JPEGs; loss and k-means there too."""
    from . import functions

    if not torch.cuda.is_available():
        return {"skipped": "no CUDA device here"}
    workers = max(1, measure.cores() - 2)
    found = {}
    for batch in batches:
        changes = {"model": model, "device": "cuda", "precision": "bf16", "batch_size": batch, "workers": workers}
        found[str(batch)] = arms(episode_size=n, k=k, rounds=rounds, synthetic=True, images=2000, **changes)
    loss = functions.prototype_loss(k=k, device="cuda")
    return {"settings": {"model": model, "batches": batches, "k": k, "n": n}, "arms": found, "loss": loss}
