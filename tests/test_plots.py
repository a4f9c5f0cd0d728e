import io
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from protoclip_lab import plots


def words(figure):
    """Everything written in a figure once it is drawn."""
    figure.savefig(io.BytesIO())
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def dots(axes):
    """Number of points by label."""
    found = [c for c in axes.collections if isinstance(c, PathCollection)]
    return {c.get_label(): len(c.get_offsets()) for c in found}


def spots(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 2)).astype(np.float32)


def blobs(n, seed=0, d=16):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) + 6 * rng.normal(size=(3, d))[np.arange(n) % 3]


@pytest.fixture(autouse=True)
def no_pyplot():
    """Figures must not gather in pyplot, where a long notebook would keep them all."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize("method", ["umap", "tsne", "pca"])
def test_map_is_the_same_for_the_same_seed_and_keeps_groups_together(method):
    features = blobs(60)
    xy = plots.embed(features, method=method, seed=3)
    again = plots.embed(features, method=method, seed=3)
    np.testing.assert_array_equal(xy, again)
    assert xy.shape == (60, 2)
    assert xy.dtype == np.float32
    group = np.arange(60) % 3
    centres = np.stack([xy[group == g].mean(axis=0) for g in range(3)])
    nearest = np.linalg.norm(xy[:, None] - centres, axis=2).argmin(axis=1)
    np.testing.assert_array_equal(nearest, group)


def test_pca_map_keeps_the_two_largest_singular_values():
    features = blobs(50, d=8)
    xy = plots.embed(features, method="pca")
    singular = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(xy, axis=0), singular[:2], rtol=1e-5)


@pytest.mark.parametrize("method", ["umap", "tsne", "pca"])
def test_four_points_are_enough_and_three_are_refused(method):
    first = plots.embed(blobs(4), method=method)
    assert np.isfinite(first).all()
    assert np.isfinite(plots.embed(blobs(4, seed=1), method=method, like=first)).all()
    with pytest.raises(ValueError, match="got 3"):
        plots.embed(blobs(3), method=method)


@pytest.mark.parametrize("method", ["umap", "tsne", "pca"])
def test_a_map_made_like_another_lies_upon_it(method):
    features = blobs(60)
    moved = features + 0.1 * np.random.default_rng(1).normal(size=features.shape)
    first = plots.embed(features, method=method)
    # As another training would have it: the same features in another basis, the map turned about and elsewhere.
    basis = np.linalg.qr(np.random.default_rng(2).normal(size=(16, 16)))[0]
    turned = 3 * first @ np.array([[0.0, 1.0], [1.0, 0.0]], np.float32) + 50
    second = plots.embed(moved @ basis, method=method, like=turned)
    spread = np.linalg.norm(turned - turned.mean(axis=0), axis=1).mean()
    assert np.linalg.norm(second - turned, axis=1).mean() < 0.5 * spread
    alone = plots.embed(moved @ basis, method=method)
    assert np.linalg.norm(alone - turned, axis=1).mean() > spread


def test_unknown_method_is_named():
    with pytest.raises(ValueError, match="'som'"):
        plots.embed(blobs(9), method="som")


def test_joint_map_shows_all_points_some_links_the_gap_and_how_it_was_made():
    figure = plots.joint_map(spots(30), spots(30, seed=1), 0.7312, links=12, method="tsne", seed=5)
    (axes,) = figure.axes
    assert dots(axes) == {"image (30)": 30, "text (30)": 30}
    assert len(axes.lines) == 10  # every third, as every second would be 15
    for said in ("gap 0.731", "10 of 30 pairs", "60 points", "t-SNE", "seed 5"):
        assert said in words(figure)


def test_joint_map_joins_the_i_th_image_with_the_i_th_text():
    image, text = spots(3), spots(3, seed=1)
    (axes,) = plots.joint_map(image, text, 0.5).axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[list(i), list(t)] for i, t in zip(image, text, strict=True)]


def test_cluster_map_colours_up_to_eight_groups_apart():
    labels = np.arange(80) % 8
    (axes,) = plots.cluster_map({"Images": (spots(80), labels)}).axes
    assert dots(axes) == {f"{i} (10)": 10 for i in range(8)}
    assert len({tuple(c.get_facecolor()[0]) for c in axes.collections}) == 8
    assert axes.get_title() == "Images"


def looks(axes):
    """Colour and marker of each group."""
    return {(tuple(c.get_facecolor()[0]), len(c.get_paths()[0].vertices)) for c in axes.collections if isinstance(c, PathCollection)}


def test_what_is_called_red_is_not_drawn_in_blue():
    axes = plots.cluster_map({"": (np.zeros((4, 2)), ["blue", "blue", "red", "red"])}).axes[0]
    drawn = {points.get_label(): to_hex(points.get_facecolor()[0]).upper() for points in axes.collections}
    assert drawn == {"blue (2)": plots.HUES["blue"], "red (2)": plots.HUES["red"]}
    # In the other order, which took the first colour for the commonest.
    axes = plots.cluster_map({"": (np.zeros((3, 2)), ["red", "red", "blue"])}).axes[0]
    assert to_hex(axes.collections[0].get_facecolor()[0]).upper() == plots.HUES["red"]


@pytest.mark.parametrize("paper, most", [(False, 22), (True, 8)])
def test_cluster_map_greys_what_it_cannot_tell_apart_largest_first(paper, most):
    labels = np.repeat(np.arange(30), np.arange(1, 31))
    (axes,) = plots.cluster_map({"all": (spots(465), labels)}, paper=paper).axes
    left = 31 - most
    expected = [(f"{i} ({i + 1})", i + 1) for i in range(29, left - 1, -1)]
    assert list(dots(axes).items()) == [*expected, ("others", left * (left + 1) // 2)]
    assert len(looks(axes)) == most
    (axes,) = plots.cluster_map({"all": (spots(465), np.minimum(labels, most - 1))}, paper=paper).axes
    assert len(dots(axes)) == len(looks(axes)) == most


def test_several_colourings_are_panels_with_legends_of_their_own():
    xy = spots(6)
    figure = plots.cluster_map({"shape": (xy, list("aabbcc")), "disagreement": (xy, list("yyyyyn"))})
    assert [axes.get_title() for axes in figure.axes] == ["shape", "disagreement"]
    assert [dots(axes) for axes in figure.axes] == [{"a (2)": 2, "b (2)": 2, "c (2)": 2}, {"y (5)": 5, "n (1)": 1}]
    assert [len(axes.get_legend().get_texts()) for axes in figure.axes] == [3, 2] and not figure.legends
    np.testing.assert_array_equal(figure.axes[0].collections[0].get_offsets(), xy[:2])
    np.testing.assert_array_equal(figure.axes[1].collections[1].get_offsets(), xy[5:])


def test_several_moments_are_panels_on_common_axes_with_one_legend():
    maps, labels = {"episode 1": spots(8), "episode 2": 5 * spots(8, seed=1)}, [0, 1] * 4
    figure = plots.cluster_map({name: (xy, labels) for name, xy in maps.items()}, title="Through training", method="pca")
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    assert [axes.get_title() for axes in figure.axes] == [*maps]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0 (4)", "1 (4)"]
    for axes, xy in zip(figure.axes, maps.values(), strict=True):
        assert axes.get_legend() is None and axes.viewLim.count_contains(np.concatenate([*maps.values()])) == 16
        np.testing.assert_allclose(axes.collections[1].get_offsets(), xy[1::2])
    assert "Through training" in words(figure) and "principal components" in words(figure)


def test_the_gap_arrow_joins_the_two_means():
    image, text = spots(5), spots(5, seed=1)
    arrow, name = plots.joint_map(image, text, 0.25).axes[0].texts
    np.testing.assert_allclose([arrow.xyann, arrow.xy], [image.mean(axis=0), text.mean(axis=0)])
    np.testing.assert_allclose(name.xy, (image.mean(axis=0) + text.mean(axis=0)) / 2)
    assert name.get_text() == "gap 0.250"


def test_an_animation_carries_points_from_map_to_map_and_rests_at_each(tmp_path):
    places = [0.1, 0.9, 0.4]
    maps = {f"episode {i}": np.array([[0, 0], [1, 1], [x, 0.5]]) for i, x in enumerate(places)}
    found = plots.moving_map(maps, ["corner", "corner", "mover"], steps=4, method="pca")
    found.savefig(tmp_path / "moving.png")
    image = Image.open(io.BytesIO((tmp_path / "moving.gif").read_bytes()))
    across, stay = [], []
    for i in range(image.n_frames):
        image.seek(i)
        red, _, blue = np.asarray(image.convert("RGB"), int).transpose(2, 0, 1)
        across.append(np.nonzero((red - blue > 100)[:, :600])[1].mean())  # the legend is farther to the right
        stay.append(image.info["duration"])
    assert (image.format, stay) == ("GIF", [1500, 60, 60, 60, 1500, 60, 60, 60, 1500])
    rest = np.array(across)[[0, 4, 8]]
    np.testing.assert_allclose((rest - rest[0]) / (rest[1] - rest[0]), [0, 1, 0.3 / 0.8], atol=0.02)
    assert (np.diff(across[:5]) > 0).all() and (np.diff(across[4:]) < 0).all()
    assert found._repr_html_().startswith('<img alt="animation" src="data:image/gif;base64,R0lGOD')


def test_an_animation_of_one_map_stands_still():
    assert Image.open(io.BytesIO(plots.moving_map({"only": spots(9)}, [0] * 9))).n_frames == 1


def test_sizes_are_told_with_empties():
    figure = plots.cluster_sizes({"image": np.array([3, 0, 9, 0, 1]), "text": np.array([5, 5])})
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), [9, 3, 1, 0, 0])
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_ydata(), [5, 5])
    for said in ("image: 5 clusters, 2 empty, median 1, largest 9", "text: 2 clusters, 0 empty, median 5, largest 5"):
        assert said in words(figure)


def test_a_small_table_has_numbers_and_a_large_one_none():
    table = pd.DataFrame([[1.0, -0.001], [0.25, np.nan]], ["image", "text"], ["a", "b"])
    figure = plots.heat_map(table.rename_axis("rows"), title="AMI")
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.00", "0.00", "0.25", "nan"]
    np.testing.assert_array_equal(np.asarray(figure.axes[0].images[0].get_array())[:, 0], [1, 0.25])
    assert {"image", "text", "a", "b", "rows", "AMI"} <= set(words(figure).split("\n"))
    assert not plots.heat_map(pd.DataFrame(np.eye(13))).axes[0].texts


def test_soft_targets_show_both_over_the_five_heaviest_prototypes():
    teacher = np.array([[0.0, 0.7, 0.3, 0.0, 0.0, 0.0, 0.0]])
    student = np.array([[0.4, 0.1, 0.0, 0.0, 0.2, 0.29, 0.01]])
    names = [f"{i} · name" for i in range(7)]
    figure = plots.soft_targets([r"a $\nomath$ heart"], names, teacher, student, title="both")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [names[i] for i in (1, 0, 2, 5, 4)]
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert widths == {"teacher": [0.7, 0, 0.3, 0, 0], "student": [0.1, 0.4, 0, 0.29, 0.2]}
    said = words(figure)
    assert r"a $\nomath$ heart" in said and "both" in said and "student" in said


def test_gap_sweep_draws_each_measure_for_each_set():
    rows = []
    for dataset, name in (("shapes", "text_to_image_R@1"), ("shape", "top1"), ("colour", "top1")):
        for share in (0.5, -1.0, 0.0):
            value = share + len(dataset)
            rows.append(
                {"dataset": dataset, "measure": f"gap_sweep_{name}@{share:+.2f}", "value": value, "low": value - 1, "high": value + 2}
            )
    rows.append({"dataset": "shape", "measure": "gap", "value": 7.0, "low": 6.0, "high": 8.0})
    figure = plots.gap_sweep(pd.DataFrame(rows), paper=True)
    recall, top1 = figure.axes
    assert [recall.get_title(), top1.get_title()] == ["text to image R@1", "top1"]
    drawn = [line.get_xydata().tolist() for line in top1.lines if len(line.get_xdata()) == 3]
    assert drawn == [[[s, s + len(n)] for s in (-1.0, 0.0, 0.5)] for n in ("colour", "shape")]
    colours = dict(zip(("shapes", "colour", "shape"), (recall.lines[0], *top1.lines), strict=False))
    named = {text.get_text(): line for text, line in zip(figure.legends[0].get_texts(), figure.legends[0].get_lines(), strict=True)}
    assert {n: line.get_color() for n, line in named.items()} == {n: line.get_color() for n, line in colours.items()}


def training_rows():
    for episode in (1, 2, 3, 4):
        for step in (1, 2, 3):
            at = 3 * (episode - 1) + step
            yield {
                "kind": "step",
                "episode": episode,
                "step": at,
                "loss/clip": 10.0 - at,
                "loss/text_to_image_5": 1.0,
                "accuracy/a": at / 12,
            }
        yield {
            "kind": "episode",
            "episode": episode,
            "step": at,
            "loss/clip": 99.0,
            "accuracy/a": 7.0,
            "gap": 1 / episode,
            "image_std": 0.1,
        }


def lines_of(figure, axes):
    """Places of the curves of one panel by their name in the legend, where they have their colour and style."""
    names = {
        (line.get_color(), line.get_linestyle()): text.get_text()
        for text, line in zip(figure.legends[0].get_texts(), figure.legends[0].legend_handles, strict=True)
        if hasattr(line, "get_linestyle") and hasattr(line, "get_xydata")
    }
    return {names[line.get_color(), line.get_linestyle()]: line.get_xydata() for line in axes.lines if line.get_color() != plots.GREY}


def test_training_curves_mark_warm_up_episodes_and_the_locked_stage():
    figure = plots.training_curves(pd.DataFrame(training_rows()), 1, 4)
    loss, accuracy, gap = figure.axes
    assert {axes.get_title(): set(lines_of(figure, axes)) for axes in figure.axes} == {
        "loss": {"clip", "text to image 5"},
        "accuracy": {"a"},
        "gap and std": {"gap", "image std"},
    }
    np.testing.assert_array_equal(lines_of(figure, loss)["clip"], [[at, 10 - at] for at in range(1, 13)])
    np.testing.assert_array_equal(lines_of(figure, accuracy)["a"], [[at, at / 12] for at in range(1, 13)])
    np.testing.assert_array_equal(lines_of(figure, gap)["gap"], [[3, 1], [6, 1 / 2], [9, 1 / 3], [12, 1 / 4]])
    assert [line.get_xdata()[0] for line in gap.lines[-3:]] == [3, 6, 9]
    assert [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in gap.patches] == [(0, 3), (9, 12)]
    named = {text.get_text() for text in figure.legends[0].get_texts()}
    assert named == {"clip", "text to image 5", "a", "gap", "image std", "warm-up", "image tower locked"}


def test_training_curves_of_a_long_training_are_means():
    rows = [{"kind": "step", "episode": 1, "step": at, "loss": 5.0, "loss/clip": float(at)} for at in range(1, 6001)]
    figure = plots.training_curves(pd.DataFrame(rows))
    found = lines_of(figure, figure.axes[0])["clip"]
    assert len(found) == 60
    np.testing.assert_allclose(found[:, 0], found[:, 1])
    np.testing.assert_allclose(found.mean(), 3000, rtol=0.01)


def test_training_curves_of_a_training_that_has_just_begun():
    first = pd.DataFrame(list(training_rows())[:2])
    figure = plots.training_curves(first, 2, 4)
    assert [axes.get_title() for axes in figure.axes] == ["loss", "accuracy"]
    assert len(lines_of(figure, figure.axes[0])) == 2
    assert len(figure.axes[0].patches) == 1 and "warm-up" in words(figure) and "locked" not in words(figure)
    assert not plots.training_curves(first).axes[0].patches


PAPER = {
    "joint_map": lambda **o: plots.joint_map(spots(20), spots(20, seed=1), 0.5, **o),
    "cluster_map": lambda **o: plots.cluster_map({"all": (spots(40), [f"{i % 20} · a few long words" for i in range(40)])}, **o),
    "panels": lambda **o: plots.cluster_map({"shape": (spots(40), np.arange(40) % 8), "rest": (spots(40), np.arange(40) % 2)}, **o),
    "moments": lambda **o: plots.cluster_map(dict.fromkeys("ab", (spots(40), np.arange(40) % 8)), title="Through", **o),
    "sheet": lambda **o: plots.prototype_sheet(
        [[Image.new("RGB", (9, 9))] * 2], [["one", "two"]], ["17 · word\n3 of 9"], headings={"near": 0}, **o
    ),
    "sizes": lambda **o: plots.cluster_sizes({"image": np.arange(9)}, **o),
    "heat": lambda **o: plots.heat_map(pd.DataFrame(np.eye(7), list("abcdefg"), list("abcdefg")), **o),
    "soft": lambda **o: plots.soft_targets(["a", "b"], list("cdef"), np.eye(4)[:2], np.eye(4)[1:3], **o),
    "curves": lambda **o: plots.progress_curves(measurements(), ["gap", "loss_proto"], **o),
    "training": lambda **o: plots.training_curves(pd.DataFrame(training_rows()), 1, 3, **o),
}


@pytest.mark.parametrize("name", PAPER)
def test_for_paper_a_figure_is_a_column_wide_in_seven_points_and_a_vector_pdf_with_letters(name, tmp_path):
    figure = PAPER[name](paper=True)
    assert figure.paper and figure.get_figwidth() == 3.35
    figure.savefig(tmp_path / "figure.pdf")
    assert {text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()} == {7.0}
    pdf = (tmp_path / "figure.pdf").read_bytes()
    assert b"/Type /Font" in pdf and b"/Subtype /Type3" not in pdf and b"/CIDFontType2" in pdf
    inside = figure.get_tightbbox()
    assert -0.01 <= inside.x0 and inside.x1 <= 3.36 and -0.01 <= inside.y0 and inside.y1 <= figure.get_figheight() + 0.01


@pytest.mark.parametrize("name", PAPER)
def test_for_a_notebook_a_figure_is_at_most_a_cell_wide(name):
    figure = PAPER[name]()
    assert not figure.paper and figure.get_figwidth() <= 9
    assert figure._repr_png_().startswith(b"\x89PNG")
    inside = figure.get_tightbbox()
    assert -0.01 <= inside.x0 and inside.x1 <= 9.01 and -0.01 <= inside.y0 and inside.y1 <= figure.get_figheight() + 0.01


def test_cluster_map_takes_words_as_labels():
    (axes,) = plots.cluster_map({"all": (spots(4), ["red", "red", "blue", "red"])}).axes
    assert dots(axes) == {"red (3)": 3, "blue (1)": 1}


def test_sheet_shows_each_sample_with_its_caption():
    images = [Image.new("RGB", (20, 12), c) for c in ("red", "green", "blue")]
    long = "two children play on the grass near a house while an elderly couple watch them from the bench by the lake"
    captions = [["a red thing", r"costs $\nomath$", long * 2], ["日本 tea", ""]]
    names = ["prototype 17\n34 samples", "prototype 9"]
    figure = plots.prototype_sheet([images, images[:2]], captions, names, headings={"nearest": 0, "its twin": 2})
    under = [axes.get_xlabel() for axes in figure.axes if axes.images]
    assert [text.split(" ")[0] for text in under] == ["a", "costs", "two", "日本", ""]
    assert [axes.get_title(loc="left") for axes in figure.axes[:4]] == ["", "nearest", "", "its twin"]
    said = words(figure)
    for expected in (*names, "a red thing", r"costs $\nomath$", "two children", "…", "日本 tea"):
        assert expected in said
    assert (long * 2)[:180] not in said.replace("\n", " ")


def measurements():
    rows = []
    for run in ("clip", "protoclip"):
        for episode in range(1, 5):
            proto = np.nan if run == "clip" or episode == 1 else 5 - episode
            rows.append({"run": run, "episode": episode, "gap": 1 / episode, "loss_proto": proto, "nothing": np.nan})
    return pd.DataFrame(rows)


def test_curves_draw_a_panel_for_each_column_and_a_line_for_each_run():
    figure = plots.progress_curves(measurements()[::-1], ["gap", "loss_proto", "nothing"])
    gap, proto, _ = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["gap", "loss proto", "nothing"]
    assert all(axes.get_xlabel() == "episode" for axes in figure.axes)
    for line in gap.lines:
        np.testing.assert_array_equal(line.get_xydata(), [[1, 1], [2, 1 / 2], [3, 1 / 3], [4, 1 / 4]])
    assert {name: len(places) for name, places in lines_of(figure, proto).items()} == {"protoclip": 3}
    assert len({line.get_linestyle() for line in gap.lines}) == 2
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["clip", "protoclip"]


def test_curves_of_a_missing_column_or_of_none_are_refused():
    with pytest.raises(KeyError, match="gapp"):
        plots.progress_curves(measurements(), ["gapp"])
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.progress_curves(measurements(), [])


def test_a_notebook_shows_a_returned_figure_once_with_and_without_pyplot():
    import nbclient
    import nbformat

    draw = "plots.cluster_map({'two': (np.eye(2), [0, 1])})"
    cells = [
        "import numpy as np\nfrom protoclip_lab import plots\n" + draw,
        "import matplotlib.pyplot as plt\n" + draw,
        draw,
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=60).execute()
    for cell in notebook.cells:
        shown = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert len(shown) == len(cell.outputs) == 1
