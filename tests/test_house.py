"""The shape of the house: rooms import downward only, the library stays thin, nothing unpickles."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "protoclip_lab"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the ground up; a room may import from lower floors, and within itself where it is a folder.
FLOORS = [
    {"", "storage", "randomness", "config"},
    {"data", "losses", "clustering", "plots"},
    {"prototypes", "encoders", "teachers", "runs", "batch"},
    {"evaluation"},
    {"snapshot"},
    {"training", "explorer"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py") if first != "__init__.py" else ""


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "protoclip_lab":
            inside = node.module.split(".")[1:]
            yield from [inside[0]] if inside else [a.name for a in node.names if a.name in FLOOR]
        elif isinstance(node, ast.Import):
            yield from [a.name.split(".")[1] for a in node.names if a.name.startswith("protoclip_lab.")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_import_from_lower_floors_only(path):
    room = room_of(path)
    for other in imported_rooms(path):
        within = other == room and path.parent != PACKAGE
        ground = FLOOR[other] == FLOOR[room] == 0
        assert within or ground or FLOOR[other] < FLOOR[room], f"{room} imports {other}"


def code_lines(path):
    """Lines that are neither blank, comment nor docstring."""
    source = path.read_text("utf-8")
    documented = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def test_the_library_is_under_3000_lines_of_code():
    assert sum(map(code_lines, FILES)) < 3000


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_is_unpickled(path):
    source = path.read_text("utf-8")
    assert not re.search(r"\bimport (c?[pP]ickle|dill|joblib)\b|allow_pickle=True|extractall", source)
    for call in re.findall(r"torch\.load\([^)]*\)", source):
        assert "weights_only=True" in call
    for call in re.findall(r"np\.load\([^)]*\)", source):
        assert "allow_pickle=False" in call
