"""Measuring: seconds in turn, peak memory, and on which machine."""

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "torchvision", "faiss-cpu", "faiss-gpu", "open_clip_torch", "numpy", "umap-learn", "pillow")


class Spread(NamedTuple):
    """The median of some repetitions, the lowest and the highest of them, and how many there were."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Median, minimum, maximum and number of some values."""
    return Spread(median(values), min(values), max(values), len(values))


def ratios(upper: Sequence[float], lower: Sequence[float]) -> list[float]:
    """Ratio round by round: both were measured in turn."""
    return [a / b for a, b in zip(upper, lower, strict=True)]


def in_turn(functions: Mapping[str, Callable[[], Any]], rounds: int, *, warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds of each function, A B C A B C …, so that what slows the machine down slows all of them.

    Args:
        warm_up: call each once before, uncounted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-warm_up, rounds):
        for name, function in functions.items():
            _finish()
            begin = time.perf_counter()
            function()
            _finish()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(function: Callable[[], Any], device: str = "cpu") -> int:
    """Most bytes of tensors that a call holds at once beyond what was there before.

    On the CPU by torch.profiler, which sees every allocation of torch's allocator inside operators too (what a BLAS
    library takes for itself is not torch's); on a GPU by ``torch.cuda.max_memory_allocated``.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """So many threads of torch, inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def circumstances() -> dict[str, Any]:
    """Machine, versions, threads, commit and hour: what a figure says nothing without."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    versions = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "torch_threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "commit": _git("rev-parse", "--short", "HEAD") + (" and uncommitted changes" if _git("status", "--porcelain", "-uno") else ""),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if not done.returncode else "unknown"
