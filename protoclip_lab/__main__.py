"""``python -m protoclip_lab``: run a recipe of notebooks, train a run, evaluate a checkpoint, watch a run."""

import argparse
import sys
from pathlib import Path

from pydantic import ValidationError

from protoclip_lab import batch
from protoclip_lab.config import TrainConfig, call
from protoclip_lab.runs import headlines


def _run(arguments: argparse.Namespace) -> None:
    try:
        index = batch.run(arguments.recipe, arguments.parameters, arguments.out)
    except batch.StepFailed as error:
        sys.exit(f"error: {error}\nThe same command continues from there.")
    print(f"report: {index}")


def _parameters(arguments: argparse.Namespace) -> dict:
    given = [parameter.partition("=") for parameter in arguments.parameters]
    for name, equals, _ in given:
        if not equals:
            raise ValueError(f"-p {name}: write it as name=value")
    return {name: batch.read_yaml(value) for name, _, value in given}


def _train(arguments: argparse.Namespace) -> None:
    from protoclip_lab import training

    settings = batch.read_yaml(Path(arguments.config).read_text("utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{arguments.config} holds no lines of `name: value`")
    try:
        training.train(TrainConfig(**settings | _parameters(arguments)))
    except training.NonFiniteLoss as error:
        sys.exit(f"error: {error}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from protoclip_lab.evaluation import suite

    options = {name: getattr(arguments, name) for name in ("data_root", "datasets", "measures")}
    options |= _parameters(arguments)
    if arguments.command == "evaluate":
        options |= {"checkpoint": arguments.checkpoint, "output": arguments.out}
        print(suite.summary(call(suite.evaluate_checkpoint, options, suite.evaluate)).to_string())
        return
    for rows in call(suite.watch, {"run": arguments.run, **options}, suite.evaluate_checkpoint, suite.evaluate):
        if sys.stdout.isatty():
            print("\033[2J\033[H", end="")  # the table stands in its place
        print(f"{arguments.run}: {rows['checkpoint'].nunique()} checkpoints evaluated")
        print(headlines(rows).to_string() if len(rows) else "none yet", flush=True)


def main() -> None:
    """Parse the command line and go; exit status 1 on an error, 128 + signal when stopped."""
    parser = argparse.ArgumentParser(prog="python -m protoclip_lab", description=__doc__.replace("``", ""))
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | train | evaluate | watch")
    added = {name: commands.add_parser(name, help=text, description=text) for name, text in HELP.items()}
    added["run"].add_argument("recipe", help="a name in notebooks/recipes, such as demo, or a path")
    added["run"].add_argument("--out", metavar="FOLDER", help="report folder (default: reports/RECIPE)")
    added["train"].add_argument("config", help="settings of TrainConfig as YAML or JSON")
    what = "a run, a checkpoint folder, open_clip:NAME/TAG, or a .pt file of the ProtoCLIP authors"
    added["evaluate"].add_argument("checkpoint", help=what)
    out = "folder for evaluation.csv (default: the run's)"
    added["evaluate"].add_argument("--out", metavar="FOLDER", default="", help=out)
    added["watch"].add_argument("run", help="run folder of a training")
    for name in ("evaluate", "watch"):
        root, sets, measures = "folder of the sets known by name", "cifar10 coco2017 ...", "zero_shot retrieval ..."
        added[name].add_argument("--data-root", metavar="FOLDER", default="", help=root)
        added[name].add_argument("--datasets", nargs="+", default=[], metavar="NAME", help=f"{sets} (default: all)")
        added[name].add_argument("--measures", nargs="+", default=[], metavar="NAME", help=f"{measures} (default: all)")
    samples = {"run": "03_train.episodes=2", "train": "episodes=2", "evaluate": "draws=200", "watch": "batch_size=64"}
    for name, sample in samples.items():
        text = f"a further setting: {sample}; may be repeated"
        added[name].add_argument("-p", action="append", default=[], dest="parameters", metavar="NAME=VALUE", help=text)
    arguments = parser.parse_args()
    try:
        {"run": _run, "train": _train}.get(arguments.command, _evaluate)(arguments)
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
