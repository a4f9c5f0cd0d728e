"""Files that a reader sees whole or not at all."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def reading(path: Path, remedy: str, problem="is broken, missing or was never finished", kind=ValueError) -> Iterator[None]:
    """Give the error of a broken file, which names no file, the file's name and the remedy."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise kind(f"{path} {problem} ({error}). {remedy}") from error


def writing(path: Path) -> AbstractContextManager:
    """Give the error of a full disk, which names no file, the file's name and the remedy."""
    return reading(path, "Make room, then do it again", "could not be written", OSError)


def write_json(path: Path, value: object) -> None:
    """Write JSON so that a reader sees the old file or the new, never half of one."""
    write_text(path, json.dumps(value, indent=2))


def write_text(path: Path, text: str) -> None:
    """Write text so that a reader sees the old file or the new, never half of one."""
    staging = path.with_name(f".{path.name}.partial")
    with writing(path):
        staging.write_text(text, "utf-8")
    staging.replace(path)
