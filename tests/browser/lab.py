"""JupyterLab in headless Chromium, for the tests here and for the README's picture."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from playwright.sync_api import Page, sync_playwright

from protoclip_lab.explorer import EDGES

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    # All cells are in the page, also those out of sight.
    "notebook-extension/tracker": {"windowingMode": "none"},
}
# WebGL without a GPU; a container's root has no sandbox.
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]


@contextmanager
def jupyterlab(folder: Path, state: Path) -> Iterator[Callable[[str], str]]:
    """JupyterLab over a folder, on a free port and with a token: tells a notebook's address.

    Args:
        state: folder for its settings, workspaces and whatever else it keeps.
    """
    for plugin, values in SETTINGS.items():
        file = state / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    places = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython"}
    places |= {f"JUPYTER_{name}_DIR": name.lower() for name in ("CONFIG", "DATA", "RUNTIME")}
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", f"--ServerApp.root_dir={folder}"]
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options],
        env=os.environ | {name: str(state / place) for name, place in places.items()},
        stderr=subprocess.PIPE,
        text=True,
    )
    with server:
        try:
            log = []
            while not (found := re.search(r"(http://127\.0\.0\.1:[1-9]\d*)/lab\?(token=\w+)", log[-1] if log else "")):
                log.append(server.stderr.readline())
                assert log[-1], f"JupyterLab did not start: {''.join(log)}"
            # It would stand still once nobody reads what it writes.
            reader = threading.Thread(target=server.stderr.read)
            reader.start()
            yield lambda notebook: f"{found[1]}/doc/tree/{notebook}?{found[2]}"
        finally:
            server.terminate()
            server.wait()
            reader.join()


@contextmanager
def chromium(width: int = 1280, height: int = 1600) -> Iterator[Page]:
    """A page of the Chromium that is installed."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield browser.new_page(viewport={"width": width, "height": height})
        browser.close()


def copy_notebook(name: str, folder: Path, **parameters: Any) -> str:
    """A notebook with its parameters set, put into a folder for JupyterLab: its name there."""
    notebook = parameterize_notebook(load_notebook_node(str(NOTEBOOKS / f"{name}.ipynb")), parameters)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return f"{name}.ipynb"


def run_all(page: Page, address: str) -> None:
    """Open a notebook and run all its cells."""
    page.goto(address)
    page.locator(".jp-CodeCell").first.click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def on_the_map(page: Page, xy: np.ndarray) -> np.ndarray:
    """Where the explorer's first map shows the rows of ``xy`` in the page: (n, 2) pixels."""
    canvas = page.locator("canvas").first
    canvas.scroll_into_view_if_needed()
    box, (low, high) = canvas.bounding_box(), (xy.min(axis=0), xy.max(axis=0))
    # the map's height is that of EDGES, upwards, and its middle 0
    pixels = (2 * xy - low - high) / (high - low) * box["height"] / (EDGES[1] - EDGES[0]) * [1, -1]
    return pixels + np.array([box["x"] + box["width"] / 2, box["y"] + box["height"] / 2])
