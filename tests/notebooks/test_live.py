"""Notebook 03 in a live kernel: a figure that redraws itself in place, an interrupt, and the cell run again."""

from pathlib import Path

import nbformat
import pytest
from helpers import toy_settings, toy_table
from jupyter_client.manager import start_new_kernel

from protoclip_lab.runs import Run

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "03_train.ipynb"


class Frontend:
    """Runs cells and keeps what they show, as JupyterLab would."""

    def __init__(self, client):
        self.client = client

    def run(self, source, on_message=lambda message: None):
        """The messages of a cell by type, and its reply."""
        asked = self.client.execute(source)
        shown = {}
        while True:
            message = self.client.get_iopub_msg(timeout=120)
            if message["parent_header"].get("msg_id") != asked:
                continue
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return shown, self.client.get_shell_msg(timeout=120)["content"]
            shown.setdefault(message["msg_type"], []).append(message["content"])
            on_message(message)


@pytest.fixture
def kernel(tmp_path):
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path), extra_arguments=["--log-level=50"])
    yield manager, Frontend(client)
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_an_interrupted_cell_leaves_a_checkpoint_and_goes_on_when_run_again(kernel, tmp_path):
    manager, frontend = kernel
    cells = [cell.source for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    settings = toy_settings(toy_table(tmp_path), tmp_path / "run", episodes=4, workers=1)
    given = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    for source in (cells[0], given, cells[1]):
        assert frontend.run(source)[1]["status"] == "ok"

    def interrupt(message):
        if message["msg_type"] == "update_display_data" and "image/png" in message["content"]["data"]:
            manager.interrupt_kernel()

    shown, reply = frontend.run(cells[2], interrupt)
    assert (reply["status"], reply["ename"]) == ("error", "Interrupted")
    assert "the same call goes on from there" in reply["evalue"]
    run = Run(tmp_path / "run")
    assert not run.finished
    steps = run.metrics(kind="step")["step"].max()
    assert 0 < steps < 12
    assert run.latest is not None

    # All cells again, as "Run All" does: the first library cell must not mind what later ones have made.
    assert frontend.run(cells[1])[1]["status"] == "ok"
    shown, reply = frontend.run(cells[2])
    assert reply["status"] == "ok"
    assert not [content for content in shown["display_data"] if "image/png" in content["data"]]
    figures = [content for content in shown["display_data"] if content["transient"].get("display_id")]
    assert len(figures) == 1  # one place, however often it is drawn anew
    updates = [content for content in shown["update_display_data"] if "image/png" in content["data"]]
    assert {content["transient"]["display_id"] for content in updates} == {figures[0]["transient"]["display_id"]}
    assert run.finished
    rows = run.metrics(kind="step")
    assert rows["step"].tolist() == list(range(1, 13))
    assert (run.path / "figures" / "training.png").exists()
