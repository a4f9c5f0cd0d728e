"""The README's picture of the explorer: ``python tests/browser/screenshot.py RUN OUT.png [LABEL ...]``."""

import sys
import tempfile
from pathlib import Path

import nbformat
from lab import chromium, jupyterlab, run_all
from playwright.sync_api import expect


def screenshot(run: str, out: str, *labels: str) -> None:
    """The explorer on a run with its largest prototype chosen."""
    run = str(Path(run).absolute())
    source = f"from protoclip_lab.explorer import explore\n\nexplore({run!r}, labels={labels!r})"
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata=kernel)
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(notebook, Path(folder) / "explorer.ipynb")
        with jupyterlab(Path(folder), Path(folder) / "state") as address, chromium(1180, 900) as page:
            run_all(page, address("explorer.ipynb"))
            prototype = page.get_by_label("Prototype")
            expect(prototype.locator("option").first).to_be_attached(timeout=120_000)
            prototype.select_option(index=0)
            expect(page.locator(".protoclip-card:visible").nth(3)).to_be_visible()
            page.locator(".jp-OutputArea-executeResult .jp-OutputArea-output").screenshot(path=out)


if __name__ == "__main__":
    screenshot(*sys.argv[1:])
