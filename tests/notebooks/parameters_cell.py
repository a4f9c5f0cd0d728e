"""Write the settings of TrainConfig into the parameters cell of notebook 03: ``make notebooks``."""

import sys
import types
from pathlib import Path
from typing import Literal, get_args, get_origin

import nbformat

from protoclip_lab.config import TrainConfig


def parameters_cell() -> str:
    """The source of notebook 03's parameters cell: one line a setting, as papermill's ``--help-notebook`` reads it."""
    lines = []
    for name, field in TrainConfig.model_fields.items():
        kind = field.annotation.__args__[0] if isinstance(field.annotation, types.UnionType) else field.annotation
        # Strings in double quotes, as ruff formats them.
        default = repr(field.get_default(call_default_factory=True)).replace("'", '"')
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        meaning = "; one of ".join(filter(None, [field.description, ", ".join(choices)]))
        lines.append(f"{name} = {default}  # type: {'str' if choices else kind.__name__} {meaning}")
    return "\n".join(lines)


def write_parameters_cell(notebook: str | Path) -> None:
    """Replace the source of the one cell tagged ``parameters`` by :func:`parameters_cell`."""
    document = nbformat.read(notebook, as_version=4)
    (cell,) = [c for c in document.cells if "parameters" in c.metadata.get("tags", [])]
    cell.source = parameters_cell()
    nbformat.write(document, notebook)


if __name__ == "__main__":
    write_parameters_cell(sys.argv[1])
