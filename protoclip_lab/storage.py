"""Files that a reader sees whole or not at all."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Give the error of a full disk, which names no file, the file's name and the remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written ({error}): make room, then do it again") from error


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Give the error of a broken file, which names no file, the file's name and the remedy."""
    try:
        yield
    except (OSError, LookupError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is broken, missing or was never finished ({error}). {remedy}") from error


def write_json(path: Path, value: object) -> None:
    """Write JSON so that a reader sees the old file or the new, never half of one."""
    write_text(path, json.dumps(value, indent=2))


def write_text(path: Path, text: str) -> None:
    """Write text so that a reader sees the old file or the new, never half of one."""
    staging = path.with_name(f".{path.name}.partial")
    with writing(path):
        staging.write_text(text, "utf-8")
    staging.replace(path)
