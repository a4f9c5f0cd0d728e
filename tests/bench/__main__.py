"""``python -m tests.bench [--only SECTION …]``: measure, merge into results.json, write and print the table, draw."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import functions, inputs, measure, report, scale, training


def paper_k(*, rounds: int = 1, **changes: Any) -> dict[str, Any]:
    """The arms with longer episodes and more prototypes than a desk needs, at least on the way to the paper's 20,000."""
    return training.arms(
        **{"episode_size": 4000, "k": 2000, "timed": 2, "names": ("clip", "rolling", "faithful")} | changes, rounds=rounds
    )


SECTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "back_translation": functions.back_translation,
    "loss": functions.prototype_loss,
    "kmeans": functions.kmeans,
    "growth": functions.growth,
    "input": inputs.pipeline,
    "umap": inputs.umap,
    "training": training.arms,
    "paper_k": paper_k,
    "open_clip": training.open_clip,
    "scale": scale.scale,
    "gpu": training.gpu,
}
# To see in a minute that all of it works; the figures mean nothing.
TOY: dict[str, dict[str, Any]] = {
    "back_translation": {"n": 2000, "k": 50, "d": 8, "rounds": 2},
    "loss": {"batches": (64, 512, 4096), "k": 50, "d": 8, "rounds": 2},
    "kmeans": {"size": 128, "ks": (8,), "episodes": 4, "early": 3, "large": (400, 20), "huge": (800, 40), "d": 8, "rounds": 1},
    "growth": {"n": 1600, "k": 80, "batch": 64, "d": 8, "rounds": 2},
    "input": {"images": 16, "batch": 8, "model": "RN-micro", "rounds": 2},
    "umap": {"points": 600, "d": 8, "rounds": 1},
    "training": {"episode_size": 128, "k": 8, "timed": 1, "rounds": 1, "model": "RN-micro"},
    "paper_k": {"episode_size": 128, "k": 16, "rounds": 1, "model": "RN-micro"},
    "open_clip": {"samples": 128, "timed": 1, "rounds": 1, "model": "RN-micro"},
    "scale": {"rows": (1000, 2000)},
    "gpu": {"model": "RN-micro", "batches": (32, 64), "k": 16, "n": 256},
}


def run(output: Path, only: list[str], toy: bool = False, rounds: int | None = None, threads: int | None = None) -> dict[str, Any]:
    """Measure some sections, keep what others left in ``output``, and write results, table and pictures there."""
    output.mkdir(parents=True, exist_ok=True)
    kept = output / "results.json"
    results = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    torch.set_num_threads(threads or measure.cores())
    for name in only:
        print(f"{name} …", flush=True)
        options = dict(TOY[name]) if toy else {}
        if rounds and name in ("training", "open_clip"):
            options["rounds"] = rounds
        made, begin = measure.circumstances(), time.perf_counter()
        measured = SECTIONS[name](**options)
        measured = {"made": made, "took": time.perf_counter() - begin, **measured}
        results[name] = json.loads(json.dumps(measured, default=str))
        # After each: what is measured is not lost to what comes after.
        kept.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
        print(f"  {measured['took']:.0f} s" + (f", skipped: {measured['skipped']}" if "skipped" in measured else ""), flush=True)
    results = {name: results[name] for name in SECTIONS if name in results}
    table = report.table(results)
    (output / "table.md").write_text(table, "utf-8")
    report.pictures(results, output)
    print(table)
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS, "none"], default=list(SECTIONS), help="sections; none only draws anew")
    parser.add_argument("--output", type=Path, default=measure.ROOT / "reports" / "benchmarks")
    parser.add_argument("--rounds", type=int, help="of the trainings; 3 unless told")
    parser.add_argument("--threads", type=int, help="of torch and faiss; all cores unless told")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that it works")
    asked = parser.parse_args()
    run(asked.output, [name for name in asked.only if name != "none"], asked.toy, asked.rounds, asked.threads)


if __name__ == "__main__":
    main()
