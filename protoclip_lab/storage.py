"""Files that a reader sees whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new, never half of one."""
    write_text(path, json.dumps(value, indent=2))


def write_text(path: Path, text: str) -> None:
    """Write text so that a reader sees the old file or the new, never half of one."""
    staging = path.with_name(f".{path.name}.partial")
    staging.write_text(text, "utf-8")
    sync(staging)
    staging.replace(path)


def sync(path: Path) -> None:
    """Have what was written to a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
