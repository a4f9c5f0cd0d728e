"""Set-up files agree with each other and with what the library imports."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CONDA_NAME = {"faiss-cpu": "faiss-gpu", "torch": "pytorch-gpu"}


def bounds(requirements: list[str]) -> dict[str, str]:
    """{normalised name: lower bound}; a package's reference to its own extras is left out."""
    pairs = (re.fullmatch(r"([\w-]+)(?:\[.*\])?(?:>=([\d.]+))?", r).groups() for r in requirements)
    named = {re.sub(r"[-_]+", "-", name).lower(): bound for name, bound in pairs}
    return {name: bound for name, bound in named.items() if name != "protoclip-lab"}


def declared() -> dict[str, str]:
    extras = PROJECT["optional-dependencies"].values()
    return bounds([*PROJECT["dependencies"], *(r for extra in extras for r in extra)])


def test_conda_and_pip_ask_for_the_same_packages_and_versions() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))["dependencies"]
    conda = bounds([d for d in environment if isinstance(d, str)])
    conda |= bounds(next(d["pip"] for d in environment if isinstance(d, dict)))
    python = conda.pop("python")
    conda.pop("pip")
    assert conda == {CONDA_NAME.get(name, name): bound for name, bound in declared().items()}
    assert PROJECT["requires-python"] == f">={python}"


def test_every_package_the_library_imports_is_declared() -> None:
    distributions = packages_distributions()
    missing = set()
    for path in (ROOT / "protoclip_lab").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {n.partition(".")[0] for n in names} - sys.stdlib_module_names - {"protoclip_lab"}:
                installed = [re.sub("^faiss.*", "faiss-cpu", d) for d in distributions.get(name, [name])]
                if not bounds(installed).keys() & declared().keys():
                    missing.add(f"{path.name}: {name}")
    assert not missing


def test_every_file_the_library_reads_is_packaged() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    packaged = {p for pattern in patterns["protoclip_lab"] for p in (ROOT / "protoclip_lab").glob(pattern)}
    files = {p for p in (ROOT / "protoclip_lab").rglob("*") if p.is_file() and p.suffix not in {".py", ".pyc"}}
    assert files and files <= packaged


def test_version_is_the_same_in_code_and_citation() -> None:
    import protoclip_lab

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == protoclip_lab.__version__
    assert citation["preferred-citation"]["doi"] == "10.1109/TNNLS.2023.3335859"


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The Makefile beside a Python that only notes what it is asked for."""
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text("utf-8"))
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$@" >> asked\n'
        'if [ "$2" = venv ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi\n'
        'case "$*" in *pip*) test ! -e no-network;; esac\n'
    )
    python.chmod(0o755)
    return tmp_path


def test_make_sets_up_the_environment_once_and_again_when_requirements_change(clone: Path) -> None:
    def installs() -> int:
        done = make(clone, "demo", "PYTHON=./python")
        assert done.returncode == 0, done.stderr
        return (clone / "asked").read_text().count("pip install")

    assert [installs(), installs()] == [1, 1]
    stamp = (clone / ".venv" / ".installed").stat().st_mtime
    later = stamp + 10
    os.utime(clone / "pyproject.toml", (later, later))
    assert installs() == 2
    assert (clone / "asked").read_text().count("venv .venv") == 1


def test_make_takes_up_a_set_up_that_was_cut_short(clone: Path) -> None:
    (clone / "no-network").touch()
    assert make(clone, "test", "PYTHON=./python").returncode != 0
    (clone / "no-network").unlink()
    assert make(clone, "test", "PYTHON=./python").returncode == 0
    assert (clone / "asked").read_text().splitlines()[-1] == "-m pytest"


def test_make_uses_the_environment_it_is_given(clone: Path) -> None:
    assert make(clone, "demo", "PY=./python").returncode == 0
    assert (clone / "asked").read_text() == "-m protoclip_lab run demo\n"


def test_make_notebooks_calls_a_script_that_is_there(clone: Path) -> None:
    assert make(clone, "notebooks", "PY=./python").returncode == 0
    script, notebook = (clone / "asked").read_text().split()
    assert (ROOT / script).is_file() and (ROOT / notebook).is_file()


def test_make_refuses_an_old_or_missing_python_with_the_remedy(clone: Path) -> None:
    missing = make(clone, "demo", "PYTHON=./no-such-python")
    assert missing.returncode != 0 and "PYTHON=/path/to/python" in missing.stdout
    old = clone / "python"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 9); $2"\n')
    refused = make(clone, "demo", "PYTHON=./python")
    assert refused.returncode != 0 and "Python 3.9; 3.10 or later is needed" in refused.stderr
