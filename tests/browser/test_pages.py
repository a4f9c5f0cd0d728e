"""Pages of a report in a real browser: no error, no request to any host, every picture there, every link leads somewhere."""

import shutil
import urllib.parse
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from protoclip_lab import batch

DEMO = Path(__file__).parents[2] / "reports" / "demo"
NOTEBOOK = [
    v4.new_markdown_cell("# About pages\n\n$x^2$ and\n\n```mermaid\ngraph LR; a-->b\n```"),
    v4.new_code_cell('output = "x"', metadata={"tags": ["parameters"]}),
    v4.new_code_cell("from tqdm.auto import tqdm\n\nfor _ in tqdm(range(3), desc='counting'):\n    pass"),
    v4.new_code_cell("import ipywidgets\n\nipywidgets.IntSlider(description='slide')"),
    v4.new_code_cell(
        "from matplotlib.figure import Figure\n\nfrom protoclip_lab.runs import keep\n\n"
        "figure = Figure()\nfigure.subplots().plot([1, 2])\nfigure.paper = True\nkeep(figure, output, 'curve #1')"
    ),
    v4.new_code_cell(
        "from pathlib import Path\n\nfrom IPython.display import Image as Show\nfrom PIL import Image\n\n"
        "gif = Path(output) / 'figures' / 'moving.gif'\nframes = [Image.new('L', (40, 30), shade) for shade in (0, 99, 200)]\n"
        "frames[0].save(gif, save_all=True, append_images=frames[1:], duration=50)\nShow(gif.read_bytes(), format='gif')"
    ),
    v4.new_code_cell("import pandas\n\npandas.DataFrame({'a': [1, 2]}).style.highlight_max()"),
]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install 'protoclip_lab[test]'")
    if not (chromium := shutil.which("chromium")):
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as started:
        # a container's root has no sandbox
        with started.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]) as opened:
            yield opened


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The index of a recipe of two notebooks, run."""
    root = tmp_path_factory.mktemp("pages")
    (root / "notebooks" / "recipes").mkdir(parents=True)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    for name in ("01_prepare_data", "04_gap & more"):
        nbformat.write(v4.new_notebook(cells=NOTEBOOK, metadata={"kernelspec": kernel}), root / "notebooks" / f"{name}.ipynb")
    (root / "notebooks" / "recipes" / "tiny.yaml").write_text("01_prepare_data: {}\n04_gap & more:second use: {}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return batch.run("tiny")


def looked_at(browser, path: Path) -> list[str]:
    """Open a page, complain of what is wrong with it, and return the addresses it links to."""
    page, wrong = browser.new_page(), []
    page.on("console", lambda said: wrong.append(f"{said.type}: {said.text}") if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else wrong.append(f"asks {asked.url}"))
    page.on("requestfailed", lambda asked: wrong.append(f"failed {asked.url[:200]}"))
    page.goto(path.as_uri(), wait_until="load")
    page.wait_for_load_state("networkidle")
    missing = "images => images.filter(i => !(i.complete && i.naturalWidth)).map(i => `no picture: ${i.src.slice(0, 200)}`)"
    wrong += page.eval_on_selector_all("img", missing)
    links = page.eval_on_selector_all("a[href]", "all => all.map(a => a.href)")
    page.close()
    assert not wrong, f"{path}: {wrong}"
    return links


def report_is_sound(browser, index: Path) -> list[Path]:
    """Look at an index and at every page it links to; the files it links to."""
    links = [urllib.parse.urlsplit(link) for link in looked_at(browser, index)]
    assert {link.scheme for link in links} == {"file"}
    files = list(dict.fromkeys(Path(urllib.parse.unquote(link.path)) for link in links))
    assert not [file for file in files if not file.is_file()]
    for page in files:
        if page.suffix == ".html" and page != index:
            for link in map(urllib.parse.urlsplit, looked_at(browser, page)):
                assert link.scheme != "file" or Path(urllib.parse.unquote(link.path)).exists(), (page, link)
    return files


def test_a_report_asks_no_host_and_shows_every_picture(browser, tiny):
    files = report_is_sound(browser, tiny)
    drawn = [file.name for file in files if file.suffix != ".html"]
    assert drawn == ["curve #1.png", "curve #1.pdf", "moving.gif"] * 2
    assert sum(file.suffix == ".html" for file in files) == 3  # with the index, which names its own sections


def test_a_page_shows_what_widgets_said_and_folds_code(browser, tiny):
    page = browser.new_page()
    page.goto((tiny.parent / "01_prepare_data" / "01_prepare_data.html").as_uri())
    shown = page.inner_text("body").replace("\u2007", " ")  # tqdm's space as wide as a figure
    assert "counting: 100%" in shown and "3/3" in shown and "IntSlider(" in shown
    assert "tqdm.auto" not in shown
    page.click("text=code >> nth=0")
    assert "tqdm.auto" in page.inner_text("body")
    page.close()


@pytest.mark.parametrize("width", [1200, 700])
def test_the_index_needs_no_sideways_scrolling_and_a_picture_is_enlarged_by_a_click(browser, tiny, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(tiny.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    picture = page.locator("img").first
    small = picture.bounding_box()
    picture.click()
    assert picture.bounding_box()["width"] > small["width"]
    page.keyboard.press("Tab")
    assert picture.bounding_box()["width"] == small["width"]
    page.close()


def test_the_demo_asks_no_host_and_shows_every_picture(browser):
    if not (DEMO / "index.html").exists():
        pytest.skip("no report here: run `make demo` first")
    files = report_is_sound(browser, DEMO / "index.html")
    assert sum(file.suffix == ".html" for file in files) >= 9


def test_the_committed_sample_asks_no_host_and_shows_every_picture(browser):
    looked_at(browser, DEMO / "sample.html")
