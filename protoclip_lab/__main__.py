"""``python -m protoclip_lab run RECIPE`` executes a recipe of notebooks; ``train CONFIG`` trains one run."""

import argparse
import sys
from pathlib import Path

from protoclip_lab import batch
from protoclip_lab.config import TrainConfig


def _run(arguments: argparse.Namespace) -> None:
    try:
        index = batch.run(arguments.what, arguments.parameters, arguments.out)
    except (batch.RecipeError, batch.StepFailed) as error:
        again = "\nThe same command continues from there." if isinstance(error, batch.StepFailed) else ""
        sys.exit(f"error: {error}{again}")
    print(f"report: {index}")


def _train(arguments: argparse.Namespace) -> None:
    from protoclip_lab import training

    try:
        settings = batch.read_yaml(Path(arguments.what).read_text("utf-8"))
        if not isinstance(settings, dict) or any("=" not in given for given in arguments.parameters):
            raise ValueError(f"{arguments.what} holds lines of `name: value`, and -p takes name=value")
        given = (parameter.partition("=") for parameter in arguments.parameters)
        training.train(TrainConfig(**settings | {name: batch.read_yaml(value) for name, _, value in given}))
    except (OSError, ValueError, training.NonFiniteLoss) as error:
        sys.exit(f"error: {error}")


def main() -> None:
    """Parse the command line and go; exit status 1 on an error, 128 + signal when stopped."""
    parser = argparse.ArgumentParser(prog="python -m protoclip_lab", description=__doc__.replace("``", ""))
    parser.add_argument("command", choices=["run", "train"], help="unfinished work is continued, finished work kept")
    what = "a name in notebooks/recipes, such as demo, or a path; settings of TrainConfig as YAML or JSON"
    parser.add_argument("what", metavar="RECIPE|CONFIG", help=what)
    parser.add_argument("--out", metavar="FOLDER", help="report folder of a recipe (default: reports/RECIPE)")
    sample = "override a setting: 03_train.episodes=2 of a recipe, episodes=2 of a config; may be repeated"
    parser.add_argument("-p", action="append", default=[], dest="parameters", metavar="NAME=VALUE", help=sample)
    arguments = parser.parse_args()
    try:
        {"run": _run, "train": _train}[arguments.command](arguments)
    except KeyboardInterrupt as stop:
        print("stopped; the same command continues from there", file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else 2))


if __name__ == "__main__":
    main()
