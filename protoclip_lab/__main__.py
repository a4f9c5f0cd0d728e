"""``python -m protoclip_lab run RECIPE`` executes a recipe of notebooks; ``train CONFIG`` trains one run."""

import argparse
import sys
from pathlib import Path


def _run(arguments: argparse.Namespace) -> None:
    from protoclip_lab import batch

    try:
        index = batch.run(arguments.recipe, arguments.parameters, arguments.out)
    except batch.RecipeError as error:
        sys.exit(f"error: {error}")
    except batch.StepFailed as error:
        sys.exit(f"error: {error}\nThe same command continues from there.")
    print(f"report: {index}")


def _train(arguments: argparse.Namespace) -> None:
    from protoclip_lab import training
    from protoclip_lab.batch import read_yaml
    from protoclip_lab.config import TrainConfig

    try:
        settings = read_yaml(Path(arguments.config).read_text("utf-8"))
        given = (parameter.partition("=") for parameter in arguments.parameters)
        config = TrainConfig(**settings | {name: read_yaml(value) for name, _, value in given})
    except ValueError as error:
        sys.exit(f"error: {error}")
    training.train(config)


def main() -> None:
    """Parse the command line and go; exit status 1 on an error, 128 + signal when stopped."""
    parser = argparse.ArgumentParser(prog="python -m protoclip_lab", description=__doc__.replace("``", ""))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="execute a recipe's notebooks; finished steps are not run again")
    run.add_argument("recipe", metavar="RECIPE", help="a name in notebooks/recipes, such as demo, or a path")
    run.add_argument("--out", metavar="FOLDER", help="report folder (default: reports/RECIPE)")
    run.set_defaults(act=_run)
    train = commands.add_parser("train", help="train one run; an unfinished one is continued")
    train.add_argument("config", metavar="CONFIG", help="settings of TrainConfig as YAML or JSON")
    train.set_defaults(act=_train)
    for command, example in ((run, "03_train.episodes=2"), (train, "episodes=2")):
        command.add_argument(
            "-p",
            action="append",
            default=[],
            dest="parameters",
            metavar="NAME=VALUE",
            help=f"override a setting, for example {example}; may be repeated",
        )
    arguments = parser.parse_args()
    try:
        arguments.act(arguments)
    except KeyboardInterrupt as stop:
        print("stopped; the same command continues from there", file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else 2))


if __name__ == "__main__":
    main()
