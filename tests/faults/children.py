"""Trainings and command lines in processes of their own, which are killed or run out of disk at a stated moment."""

import multiprocessing
import os
import resource
import shutil
import signal
import sys
from multiprocessing import connection
from pathlib import Path
from typing import Any

# Every moment and case, or a part of them; see the package's docstring.
ALL = bool(os.environ.get("ALL_FAULTS"))
# One clean server process holds the imports; each child is forked from it in milliseconds.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["protoclip_lab.training"])


def together(settings: dict[str, Any], kill: tuple[int, int] | None = None, processes: int = 1) -> list[int]:
    """Train in so many processes, of which one may be killed; exit codes. As a launcher does, the dead take the others down."""
    from accelerate.utils.other import get_free_port

    rank_of_death, last = kill or (-1, 0)
    place = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": get_free_port()}
    group = []
    for rank in range(processes):
        own = place | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
        group.append(SERVER.Process(target=_train, args=(settings, own, last if rank == rank_of_death else 0)))
        group[-1].start()
    running = list(group)
    while running:
        connection.wait([process.sentinel for process in running])
        running = [process for process in running if process.is_alive()]
        if any(process.exitcode for process in group):
            for process in running:
                process.kill()
    for process in group:
        process.join()
    return [process.exitcode for process in group]


def _train(settings: dict[str, Any], place: dict[str, Any], last: int) -> None:
    """Train; SIGKILL to this process when functions of the package have been called, or have called others, ``last`` times."""
    from protoclip_lab import training

    os.environ |= {name: str(value) for name, value in place.items()}
    package, calls = str(Path(training.__file__).parent), 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(package):
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    training.train(settings)
    sys.setprofile(None)
    Path(f"{settings['run']}.{place.get('RANK', 0)}.calls").write_text(str(calls))


def command(*arguments: Any, full: tuple[str, str, int, int] | None = None, blow: Any = signal.SIG_IGN) -> tuple[int, str]:
    """``python -m protoclip_lab ARGUMENTS``: exit status and all that was said.

    Args:
        full: (module, name, call, size): at that call of a function no file can be written beyond that size any more.
        blow: what SIGXFSZ does then; SIG_IGN gives an OSError, SIG_DFL kills in the middle of the write.
    """
    ours, theirs = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_command, args=(theirs, [str(a) for a in arguments], full, blow))
    process.start()
    theirs.close()
    said = b""
    while piece := os.read(ours.fileno(), 2**16):
        said += piece
    process.join()
    return process.exitcode, said.decode()


def _command(pipe: Any, arguments: list[str], full: tuple[str, str, int, int] | None, blow: Any) -> None:
    import importlib
    from unittest import mock

    from protoclip_lab import __main__

    for stream in (1, 2):
        os.dup2(pipe.fileno(), stream)
    pipe.close()
    sys.argv = ["protoclip_lab", *arguments]
    if full is None:
        return __main__.main()
    place, name, call, size = full
    module, _, within = place.partition(":")
    owner = importlib.import_module(module)
    owner = getattr(owner, within) if within else owner
    real, calls = getattr(owner, name), iter(range(1, 10**6))
    signal.signal(signal.SIGXFSZ, blow)

    def fatal(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return real(*args, **kwargs)

    with mock.patch.object(owner, name, fatal):
        return __main__.main()


def untimed(run: Any) -> Any:
    """A run's metrics without seconds."""
    frame = run.metrics()
    return frame.drop(columns=[name for name in frame.columns if name.startswith("time/")])


def assert_same(run: Any, other: Any) -> None:
    """Both finished, with the same metrics, checkpoints and weights to the bit."""
    from safetensors.torch import load_file

    from protoclip_lab.runs import Run, damaged_files

    run, other = Run(run), Run(other)
    assert run.finished and other.finished
    assert untimed(run).equals(untimed(other))
    assert [p.name for p in run.checkpoints()] == [p.name for p in other.checkpoints()]
    assert not damaged_files(run.latest)
    for file in ("open_clip_model.safetensors", "heads.safetensors", "prototypes.safetensors", "optimizer.safetensors"):
        a, b = load_file(run.latest / file), load_file(other.latest / file)
        assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a), file


def again(run: Path, copy: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an unfinished copy of a finished run; its files are links, to be replaced and not written into."""
    shutil.copytree(run, copy, copy_function=os.link)
    for name in ("finished.json", "config.json", "metrics.jsonl"):
        (copy / name).unlink()
    (copy / "config.json").write_text((run / "config.json").read_text().replace(str(run), str(copy)))
    shutil.copyfile(run / "metrics.jsonl", copy / "metrics.jsonl")
    return settings | {"run": str(copy)}


def replace(path: Path, data: bytes) -> None:
    """Other content under this name, whatever else links to the old."""
    path.unlink()
    path.write_bytes(data)
