"""protoclip_lab from the command line.

run RECIPE           execute a recipe of notebooks: a name in notebooks/recipes, such as demo, or a path;
                     finished steps are kept, unfinished ones continued
train CONFIG         train one run by settings of TrainConfig in YAML or JSON; an unfinished one is resumed
evaluate CHECKPOINT  evaluate a run, a checkpoint folder, open_clip:NAME/TAG, or a .pt file of the ProtoCLIP authors
watch RUN            evaluate each checkpoint of a run as it appears, until the run is finished
"""

import argparse
import sys
from pathlib import Path

from pydantic import ValidationError

from protoclip_lab import batch
from protoclip_lab.config import TrainConfig, call
from protoclip_lab.runs import headlines


def _run(arguments: argparse.Namespace) -> None:
    print(f"report: {batch.run(arguments.what, arguments.parameters, arguments.out or None)}")


def _train(arguments: argparse.Namespace) -> None:
    from protoclip_lab import training

    settings = batch.read_yaml(Path(arguments.what).read_text("utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{arguments.what} holds no lines of `name: value`")
    try:
        training.train(TrainConfig(**settings | dict(map(batch.read_parameter, arguments.parameters))))
    except training.NonFiniteLoss as error:
        sys.exit(f"error: {error}")


def _options(arguments: argparse.Namespace) -> dict:
    named = {name: getattr(arguments, name) for name in ("data_root", "datasets", "measures")}
    return named | dict(map(batch.read_parameter, arguments.parameters))


def _evaluate(arguments: argparse.Namespace) -> None:
    from protoclip_lab.evaluation import suite

    options = {"checkpoint": arguments.what, "output": arguments.out, **_options(arguments)}
    print(suite.summary(call(suite.evaluate_checkpoint, options, suite.evaluate)).to_string())


def _watch(arguments: argparse.Namespace) -> None:
    from protoclip_lab.evaluation import suite

    options = {"run": arguments.what, **_options(arguments)}
    for rows in call(suite.watch, options, suite.evaluate_checkpoint, suite.evaluate):
        if sys.stdout.isatty():
            print("\033[2J\033[H", end="")  # the table stands in its place
        print(f"{arguments.what}: {rows['checkpoint'].nunique()} checkpoints evaluated")
        print(headlines(rows).to_string() if len(rows) else "none yet", flush=True)


def main() -> None:
    """Parse the command line and go; exit status 1 on an error, 128 + signal when stopped."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m protoclip_lab", description=__doc__, formatter_class=as_written)
    parser.add_argument("command", choices=["run", "train", "evaluate", "watch"])
    parser.add_argument("what", metavar="WHAT", help="recipe, config, checkpoint or run, see above")
    parser.add_argument("--out", metavar="FOLDER", default="", help="where to write (reports/RECIPE; the run's folder)")
    parser.add_argument("--data-root", metavar="FOLDER", default="", help="folder of the sets known by name")
    names = {"metavar": "NAME", "nargs": "+", "default": []}
    parser.add_argument("--datasets", help="sets under it: cifar10 coco2017 ... (all)", **names)
    parser.add_argument("--measures", help="zero_shot retrieval ... (all)", **names)
    setting = "a setting: 03_train.episodes=2, episodes=2, draws=200; may be repeated"
    parser.add_argument("-p", action="append", default=[], dest="parameters", metavar="NAME=VALUE", help=setting)
    arguments = parser.parse_args()
    try:
        {"run": _run, "train": _train, "evaluate": _evaluate, "watch": _watch}[arguments.command](arguments)
    except ValidationError as error:
        sys.exit("error: " + "; ".join(found["msg"].removeprefix("Value error, ") for found in error.errors()))
    except (OSError, ValueError, batch.StepFailed) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        print("stopped; the same command continues from there", file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else 2))


if __name__ == "__main__":
    main()
