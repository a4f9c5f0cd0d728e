"""protoclip_lab from the command line.

run RECIPE           execute a recipe of notebooks: a name in notebooks/recipes, such as demo, or a path;
                     finished steps are kept, unfinished ones continued
train CONFIG         train one run by settings of TrainConfig in YAML or JSON; an unfinished one is resumed
evaluate CHECKPOINT  evaluate a run, a checkpoint folder, open_clip:NAME/TAG, or a .pt file of the ProtoCLIP authors
collect URLS OUT     download a list of captions and URLs into shards, see protoclip_lab.data.collect
watch RUN            evaluate each checkpoint of a run as it appears, until the run is finished

-p gives a setting and may be repeated: a recipe's own parameters to run, episodes=2 to train, draws=200 to evaluate and watch.
"""

import logging
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import yaml

from protoclip_lab import batch
from protoclip_lab.config import TrainConfig, call


def _run(recipe: str, given: dict) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: papermill interrupts its kernel and takes it down
    logging.getLogger("asyncio").disabled = True  # would tell of the task that was interrupted
    print(f"report: {batch.run(recipe, out=given.pop('output', None), overrides=given)}")


def _train(config: str, given: dict) -> None:
    from protoclip_lab import training

    training.train(TrainConfig(**batch.read_settings(Path(config)) | given))


def _evaluate(checkpoint: str, given: dict) -> None:
    from protoclip_lab.evaluation import suite

    print(suite.summary(call(suite.evaluate_checkpoint, {"checkpoint": checkpoint, **given}, suite.evaluate)).to_string())


def _watch(run: str, given: dict) -> None:
    from protoclip_lab.evaluation import suite
    from protoclip_lab.runs import headlines

    for rows in call(suite.watch, {"run": run, **given}, suite.evaluate_checkpoint, suite.evaluate):
        home = "\033[2J\033[H" if sys.stdout.isatty() else ""  # the table stands in its place
        print(f"{home}{run}: {rows['checkpoint'].nunique()} checkpoints evaluated")
        print(headlines(rows).to_string() if len(rows) else "none yet", flush=True)


def _collect(urls: str, given: dict) -> None:
    from protoclip_lab.data.collect import collect

    print(collect(urls, **given).to_string())


COMMANDS = {"run": _run, "train": _train, "evaluate": _evaluate, "watch": _watch, "collect": _collect}


def _parameter(text: str) -> tuple[str, object]:
    """``name=value`` as a name and a YAML value."""
    name, value = text.split("=", 1)
    return name, yaml.safe_load(value)


def main() -> None:
    """Parse the command line and go; exit status 1 on an error, 130 when stopped."""
    parser = ArgumentParser("python -m protoclip_lab", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("what", metavar="WHAT", help="recipe, config, checkpoint or run, see above")
    parser.add_argument("output", metavar="OUT", nargs="?", help="where collect writes (beside URLS)")
    parser.add_argument("--out", dest="output", metavar="FOLDER", help="where to write (reports/RECIPE; the run's folder)")
    parser.add_argument("--data-root", metavar="FOLDER", help="folder of the sets known by name")
    parser.add_argument("--datasets", metavar="NAME", nargs="+", help="sets under it: cifar10 coco2017 ... (all)")
    parser.add_argument("-p", action="append", default=[], metavar="NAME=VALUE", type=_parameter, help="see above")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell's background has it ignored
    try:
        given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
        command, what, settings = (given.pop(name) for name in ("command", "what", "p"))
        COMMANDS[command](what, given | dict(settings))
    except (OSError, ValueError, ArithmeticError, yaml.YAMLError, batch.StepFailed) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command continues from there", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
