"""The explorer in a real browser: notebook 04 opened in JupyterLab, walked through with mouse and keyboard."""

import re
import shutil
from base64 import b64encode

import numpy as np
import pytest
from helpers import toy_settings, toy_table

from protoclip_lab import encoders, training
from protoclip_lab.explorer import PICTURES
from protoclip_lab.snapshot import open_snapshot

pytest.importorskip("playwright", reason="playwright is not installed: pip install 'protoclip_lab[test]'")
if not shutil.which("chromium"):
    pytest.skip("there is no chromium here: apt-get install chromium", allow_module_level=True)

from lab import chromium, copy_notebook, jupyterlab, on_the_map, run_all
from playwright.sync_api import expect

OPTIONS = {"samples": 60, "labels": ["shape"], "method": "pca"}
OWN = re.compile(r"(blob:)?http://127\.0\.0\.1:|data:")  # addresses of requests that go to no other host
PATIENCE = 60_000  # milliseconds, for a slow machine


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    table = toy_table(tmp_path_factory.mktemp("browser"))
    return training.train(toy_settings(table, table.with_name("protoclip"))).path


def data_urls(seen, rows):
    """The pictures of samples, as a browser is given them."""
    found = []
    for row in rows:
        image = seen.pairs.image(seen.rows[row])
        image.thumbnail((112, 112))
        found.append(f"data:image/png;base64,{b64encode(image._repr_png_()).decode()}")
    return found


def expect_pictures(page, seen, rows):
    """These samples and no others are on show, in this order, each really drawn and with its caption."""
    cards = page.locator(".protoclip-card:visible")
    expect(cards).to_have_count(min(PICTURES, len(rows)))
    for i, (row, url) in enumerate(zip(rows[:PICTURES], data_urls(seen, rows[:PICTURES]), strict=True)):
        expect(cards.nth(i).locator("img")).to_have_attribute("src", url)
        expect(cards.nth(i).get_by_role("button")).to_have_text(seen.pairs.caption(seen.rows[row]))
    assert page.evaluate("[...document.querySelectorAll('.protoclip-card img')].every(i => !i.offsetParent || i.naturalWidth > 0)")


def gap(values, low, high):
    """The middle of the widest gap between values, in some part of their range."""
    inside = np.sort(values[(values > np.quantile(values, low)) & (values < np.quantile(values, high))])
    widest = np.diff(inside).argmax()
    return float(inside[widest : widest + 2].mean())


def test_the_explorer_of_notebook_04_answers_mouse_and_keyboard(run, tmp_path):
    seen = open_snapshot(run, **OPTIONS)
    (tmp_path / "lab").mkdir()
    notebook = copy_notebook("04_gap_and_grouping", tmp_path / "lab", run=str(run), output=str(tmp_path / "seen"), **OPTIONS)
    problems = []
    with jupyterlab(tmp_path / "lab", tmp_path / "state") as address, chromium() as page:
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: problems.append(request.url) if not OWN.match(request.url) else None)
        run_all(page, address(notebook))
        prototype = page.get_by_label("Prototype")
        expect(prototype.locator("option").first).to_be_attached(timeout=PATIENCE)
        expect(page.locator(".jp-RenderedText[data-mime-type*=error]")).to_have_count(0)

        # a prototype
        labels, centroids, features = seen.prototypes("image")
        chosen = np.bincount(labels).argmax()
        distances = (features - centroids[chosen]).norm(dim=1).numpy()
        members = [row for row in distances.argsort(kind="stable") if labels[row] == chosen]
        prototype.select_option(label=f"{seen.names('image')[chosen]} ({len(members)})")
        expect_pictures(page, seen, members)

        # a caption, by keyboard
        page.get_by_label("Find images").fill("a red circle")
        page.keyboard.press("Enter")
        text = encoders.encode_texts(encoders.load(seen.checkpoint), ["a red circle"])[0]
        nearest = (seen.features.image @ text).argsort(descending=True).numpy()[:PICTURES]
        expect_pictures(page, seen, nearest)

        # one of the pictures found
        page.locator(".protoclip-card:visible").nth(1).click()
        expect_pictures(page, seen, nearest[1:2])
        closest = (seen.features.text @ seen.features.image[nearest[1]]).argmax()
        expect(page.locator(".protoclip-near li").first).to_contain_text(seen.pairs.caption(seen.rows[closest]))

        # a box on the map, drawn with the mouse
        x, y = on_the_map(page, seen.xy("image")).T
        (left, right), (top, bottom) = ((gap(values, 0.2, 0.5), gap(values, 0.6, 0.9)) for values in (x, y))
        inside = np.flatnonzero((x > left) & (x < right) & (y > top) & (y < bottom))
        assert 1 < len(inside) < 60
        page.mouse.move(left, top)
        page.mouse.down()
        # The box begins where the mouse first moves, and moves within 10 ms of the last wait.
        for corner in ((left + 1, top + 1), (right - 1, bottom - 1)):
            page.mouse.move(*corner)
            page.evaluate("() => new Promise(requestAnimationFrame)")
        page.mouse.up()
        expect_pictures(page, seen, inside)

        # the loneliest point of the middle, clicked
        distance = np.hypot(x[:, None] - x, y[:, None] - y) + np.diag(np.full(60, np.inf))
        middle = (abs(x - x.mean()) < np.ptp(x) / 3) & (abs(y - y.mean()) < np.ptp(y) / 3)
        lonely = np.where(middle, distance.min(axis=1), 0).argmax()
        page.mouse.click(float(x[lonely]), float(y[lonely]))
        expect_pictures(page, seen, [lonely])
    assert problems == []
