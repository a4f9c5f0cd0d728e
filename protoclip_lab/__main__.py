"""``python -m protoclip_lab``: run a recipe of notebooks, train a run, evaluate a checkpoint, watch a run."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from protoclip_lab import batch
from protoclip_lab.config import TrainConfig

if TYPE_CHECKING:
    from pandas import DataFrame


def _run(arguments: argparse.Namespace) -> None:
    try:
        index = batch.run(arguments.recipe, arguments.parameters, arguments.out)
    except batch.StepFailed as error:
        sys.exit(f"error: {error}\nThe same command continues from there.")
    print(f"report: {index}")


def _train(arguments: argparse.Namespace) -> None:
    from protoclip_lab import training

    settings = batch.read_yaml(Path(arguments.config).read_text("utf-8"))
    if not isinstance(settings, dict) or any("=" not in given for given in arguments.parameters):
        raise ValueError(f"{arguments.config} holds lines of `name: value`, and -p takes name=value")
    given = (parameter.partition("=") for parameter in arguments.parameters)
    try:
        training.train(TrainConfig(**settings | {name: batch.read_yaml(value) for name, _, value in given}))
    except training.NonFiniteLoss as error:
        sys.exit(f"error: {error}")


def _evaluation(arguments: argparse.Namespace) -> dict:
    names = ("datasets", "measures", "data_root", "batch_size", "workers", "seed", "draws")
    return {name: getattr(arguments, name) for name in names}


def _evaluate(arguments: argparse.Namespace) -> None:
    from protoclip_lab.evaluation import suite

    rows = suite.evaluate_checkpoint(arguments.checkpoint, arguments.out, **_evaluation(arguments))
    print(suite.summary(rows).to_string())


def _watch(arguments: argparse.Namespace) -> None:
    from protoclip_lab.evaluation import suite
    from protoclip_lab.runs import headlines

    def show(rows: "DataFrame") -> None:
        if sys.stdout.isatty():
            print("\033[2J\033[H", end="")  # the table stands in its place
        print(f"{arguments.run}: {rows['checkpoint'].nunique()} checkpoints evaluated")
        print(headlines(rows).to_string() if len(rows) else "none yet", flush=True)

    suite.watch(arguments.run, show, **_evaluation(arguments))


def main() -> None:
    """Parse the command line and go; exit status 1 on an error, 128 + signal when stopped."""
    parser = argparse.ArgumentParser(prog="python -m protoclip_lab", description=__doc__.replace("``", ""))
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | train | evaluate | watch")
    added = {name: commands.add_parser(name, help=text, description=text) for name, text in HELP.items()}
    added["run"].add_argument("recipe", help="a name in notebooks/recipes, such as demo, or a path")
    added["run"].add_argument("--out", metavar="FOLDER", help="report folder (default: reports/RECIPE)")
    added["train"].add_argument("config", help="settings of TrainConfig as YAML or JSON")
    for name, sample in (("run", "03_train.episodes=2"), ("train", "episodes=2")):
        text = f"override a setting: {sample}; may be repeated"
        added[name].add_argument("-p", action="append", default=[], dest="parameters", metavar="NAME=VALUE", help=text)
    what = "a run, a checkpoint folder, open_clip:NAME/TAG, or a .pt file of the ProtoCLIP authors"
    added["evaluate"].add_argument("checkpoint", help=what)
    out = "folder for evaluation.csv (default: the run's)"
    added["evaluate"].add_argument("--out", metavar="FOLDER", default="", help=out)
    added["watch"].add_argument("run", help="run folder of a training")
    for name in ("evaluate", "watch"):
        given = added[name].add_argument
        given("--data-root", metavar="FOLDER", default="", help="folder of the sets known by name")
        given(
            "--datasets",
            nargs="+",
            default=[],
            metavar="NAME",
            help="some of them: cifar10 coco2017 ... (default: all)",
        )
        given("--measures", nargs="+", default=[], metavar="NAME", help="zero_shot retrieval ... (default: all)")
        given("--batch-size", type=int, default=256, metavar="N", help="images at a time (default: %(default)s)")
        given("--workers", type=int, default=0, metavar="N", help="processes that read images (default: %(default)s)")
        given("--seed", type=int, default=0, metavar="N", help="of probe, k-means, resamples (default: %(default)s)")
        given("--draws", type=int, default=1000, metavar="N", help="resamples of intervals (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        {"run": _run, "train": _train, "evaluate": _evaluate, "watch": _watch}[arguments.command](arguments)
    except ValidationError as error:
        sys.exit("error: " + "; ".join(found["msg"].removeprefix("Value error, ") for found in error.errors()))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        print("stopped; the same command continues from there", file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else 2))


HELP = {
    "run": "execute a recipe of notebooks; finished steps are kept, unfinished ones continued",
    "train": "train one run; an unfinished one is resumed",
    "evaluate": "evaluate one checkpoint",
    "watch": "evaluate each checkpoint of a run as it appears",
}

if __name__ == "__main__":
    main()
