import io
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
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
    assert np.isfinite(plots.embed(blobs(4), method=method)).all()
    with pytest.raises(ValueError, match="got 3"):
        plots.embed(blobs(3), method=method)


def test_unknown_method_is_named():
    with pytest.raises(ValueError, match="'som'"):
        plots.embed(blobs(9), method="som")


def test_joint_map_shows_all_points_some_links_the_gap_and_how_it_was_made():
    figure = plots.joint_map(spots(60), np.arange(60) >= 30, gap=0.7312, links=12, method="tsne", seed=5)
    (axes,) = figure.axes
    assert dots(axes) == {"image (30)": 30, "text (30)": 30}
    assert len(axes.lines) == 12
    for said in ("gap 0.731", "12 of 30 pairs", "60 points", "t-SNE", "seed 5"):
        assert said in words(figure)


def test_joint_map_joins_the_i_th_image_with_the_i_th_text():
    xy = spots(6)
    figure = plots.joint_map(xy, np.array([False, True] * 3))
    found = sorted(line.get_xydata().tolist() for line in figure.axes[0].lines)
    assert found == sorted(xy[[i, i + 1]].tolist() for i in (0, 2, 4))


def test_joint_map_joins_nothing_where_it_cannot_know_the_pairs():
    uneven = np.array([False, False, True, True, True])
    assert len(plots.joint_map(spots(5), uneven).axes[0].lines) == 0


def test_cluster_map_colours_up_to_eight_groups_apart():
    labels = np.arange(80) % 8
    (axes,) = plots.cluster_map(spots(80), labels, title="Images").axes
    assert dots(axes) == {f"{i} (10)": 10 for i in range(8)}
    assert len({tuple(c.get_facecolor()[0]) for c in axes.collections}) == 8
    assert axes.get_title() == "Images (8 groups)"


def test_cluster_map_greys_all_but_the_seven_largest():
    labels = np.repeat(np.arange(12), np.arange(1, 13))
    (axes,) = plots.cluster_map(spots(78), labels).axes
    expected = [(f"{i} ({i + 1})", i + 1) for i in range(11, 4, -1)]
    assert list(dots(axes).items()) == [*expected, ("5 others (15)", 15)]


@pytest.mark.parametrize(("names", "label"), [(None, "2 (9)"), (["zero", "one", "two"], "two (9)")])
def test_cluster_map_of_one_group_names_it(names, label):
    figure = plots.cluster_map(spots(9), np.full(9, 2), names=names, method="pca")
    assert dots(figure.axes[0]) == {label: 9}
    assert "principal components" in words(figure)


def test_cluster_map_takes_words_as_labels():
    (axes,) = plots.cluster_map(spots(4), ["red", "red", "blue", "red"]).axes
    assert dots(axes) == {"red (3)": 3, "blue (1)": 1}


def test_sheet_shows_each_sample_with_its_caption_and_says_which_prototype_is_empty():
    images = [Image.new("RGB", (20, 12), c) for c in ("red", "green", "blue")]
    long = "two children play on the grass near a house while an elderly couple watch them from the bench by the lake"
    captions = [["a red thing", r"costs $\nomath$", long * 2], [], ["日本 tea"]]
    names = ["prototype 17\n34 samples", "prototype 3\n0 samples", "prototype 9"]
    figure = plots.prototype_sheet([images, [], images[:1]], captions, names)
    under = [axes.texts[0].get_text() for axes in figure.axes if axes.images]
    assert [text.split()[0] for text in under] == ["a", "costs", "two", "□□"]
    said = words(figure)
    for expected in (*names, "a red thing", r"costs $\nomath$", "two children", "…", "no members", "□□ tea"):
        assert expected in said
    assert long[-20:] not in said.replace("\n", " ")


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
    lengths = {line.get_label(): len(line.get_xdata()) for line in proto.lines}
    assert lengths == {"clip": 0, "protoclip": 3}
    assert len({line.get_linestyle() for line in gap.lines}) == 2
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["protoclip", "clip"]
    assert "no values" in words(figure)


def test_curves_of_one_run_need_no_column_that_names_it_and_no_legend():
    table = measurements().query("run == 'clip'").drop(columns="run")
    figure = plots.progress_curves(table, ["gap"])
    assert len(figure.axes) == 1
    assert len(figure.axes[0].lines) == 1
    assert not figure.legends


def test_curves_of_a_missing_column_or_of_none_are_refused():
    with pytest.raises(KeyError, match="gapp"):
        plots.progress_curves(measurements(), ["gapp"])
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.progress_curves(measurements(), [])


def test_comparison_shows_mean_and_sample_deviation_of_each_arm():
    table = pd.DataFrame(
        {
            "arm": ["clip", "clip", "proto", "proto", "alone"],
            "seed": [0, 1, 0, 1, 0],
            "mean_recall": [7.1, 7.5, 9.7, 9.4, 8.0],
            "ARI": [0.1, 0.3, 0.4, 0.4, np.nan],
        }
    )
    figure = plots.comparison(table)
    recall, ari = figure.axes
    assert [recall.get_title(), ari.get_title()] == ["mean recall", "ARI"]
    assert [t.get_text() for t in recall.get_yticklabels()] == ["clip (n = 2)", "proto (n = 2)", "alone (n = 1)"]
    said = words(figure)
    for expected in ("7.30 ± 0.28", "9.55 ± 0.21", "8.00", "0.200 ± 0.141", "0.400 ± 0.000", "standard deviation"):
        assert expected in said
    assert "8.00 ±" not in said
    bar = recall.containers[0].lines[2][0].get_segments()[0]
    np.testing.assert_allclose(bar[:, 0], [7.3 - np.std([7.1, 7.5], ddof=1), 7.3 + np.std([7.1, 7.5], ddof=1)])
    assert len(recall.containers) == 3
    assert len(ari.containers) == 2
    assert recall.get_ylim()[0] > recall.get_ylim()[1]  # first arm on top


def test_comparison_draws_the_measures_named():
    table = pd.DataFrame({"run": ["a", "b"], "x": [1.0, 2.0], "y": [3.0, 4.0]})
    assert [axes.get_title() for axes in plots.comparison(table, ["y"], by="run").axes] == ["y"]


def test_a_notebook_shows_a_returned_figure_once_with_and_without_pyplot():
    import nbclient
    import nbformat

    draw = "plots.cluster_map(np.eye(2), [0, 1])"
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
