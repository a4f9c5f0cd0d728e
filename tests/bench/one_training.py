"""One training in a process of its own: ``python -m tests.bench.one_training ASKED.json FOUND.json``.

Notes the wall-clock at the end of every episode (ours) or epoch (open_clip's script) by a hook at the same place of both.
"""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from .measure import ROOT


class Enough(Exception):
    """The last episode that is timed has ended."""


def ours(settings: dict[str, Any]) -> dict[str, Any]:
    """Train as ``settings`` say: {"ends": seconds, "samples": of an episode, "stages": the times in the episodes' metrics}.

    The training is told of one episode more and stopped before it: at the end of its very last one it would make no
    prototypes for a next, and so leave out a cost.
    """
    from protoclip_lab.runs import Run
    from protoclip_lab.training import train

    ends = []

    def note(run: Run) -> None:
        last = (run.path / "metrics.jsonl").read_text().rstrip().rpartition("\n")[2]
        if json.loads(last)["kind"] == "episode":
            ends.append(time.perf_counter())
        if len(ends) == settings["episodes"]:
            raise Enough

    with suppress(Enough):
        train(settings | {"episodes": settings["episodes"] + 1}, after_row=note)
    run = Run(settings["run"])
    rows = run.metrics(kind="episode")
    stages = [{name: value for name, value in row.items() if name.startswith("time/")} for row in rows.fillna(0.0).to_dict("records")]
    width = run.config.batch_size * run.config.accumulation
    return {"ends": ends, "samples": int(rows["step"].iloc[0]) * width, "stages": stages}


def open_clip_script(arguments: list[str], samples: int) -> dict[str, Any]:
    """Run ``open_clip_train.main`` with these arguments."""
    import open_clip
    import open_clip_train.main as script

    open_clip.add_model_config(ROOT / "protoclip_lab" / "model_configs")
    ends, one_epoch = [], script.train_one_epoch

    def noted(*arguments: Any, **options: Any) -> None:
        one_epoch(*arguments, **options)
        ends.append(time.perf_counter())

    script.train_one_epoch = noted
    script.main(arguments)
    return {"ends": ends, "samples": samples}


def main(asked: Path, found: Path) -> None:
    """Train as the first file asks and write what was found to the second."""
    import torch

    task = json.loads(asked.read_text())
    torch.set_num_threads(task["threads"])
    result = ours(task["settings"]) if "settings" in task else open_clip_script(task["arguments"], task["samples"])
    found.write_text(json.dumps(result))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
