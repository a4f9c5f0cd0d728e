"""Files that a reader sees whole or not at all."""

import json
from pathlib import Path


def write_json(path: Path, value: object) -> None:
    """Write JSON so that a reader sees the old file or the new, never half of one."""
    write_text(path, json.dumps(value, indent=2))


def write_text(path: Path, text: str) -> None:
    """Write text so that a reader sees the old file or the new, never half of one."""
    staging = path.with_name(f".{path.name}.partial")
    staging.write_text(text, "utf-8")
    staging.replace(path)
