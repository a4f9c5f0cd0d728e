"""The explorer driven from Python: what its controls show, against references written out."""

import base64
import io
import re
from dataclasses import replace

import nbformat
import numpy as np
import pytest
import torch
from helpers import toy_settings, toy_table
from matplotlib.figure import Figure
from nbclient import NotebookClient
from PIL import Image

from protoclip_lab import encoders, explorer, training
from protoclip_lab.explorer import PICTURES, View, explore
from protoclip_lab.snapshot import open_snapshot

OPTIONS = {"samples": 60, "labels": ["shape"], "method": "pca"}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return toy_table(tmp_path_factory.mktemp("explorer"))


@pytest.fixture(scope="module")
def run(table):
    return training.train(toy_settings(table, table.with_name("protoclip"), objective="protoclip")).path


@pytest.fixture(scope="module")
def clip(table):
    return training.train(toy_settings(table, table.with_name("clip"), objective="clip", episodes=1)).path


@pytest.fixture(autouse=True)
def attended(monkeypatch):
    monkeypatch.setattr(explorer, "_attended", lambda: True)


@pytest.fixture
def view(run):
    return explore(run, **OPTIONS).children[1]


def pictures(view):
    """The pictures on show and what they are called: the image, its alternative text, the caption on its button."""
    shown = []
    for card in view.cards:
        if card.layout.display != "none":
            data = re.search('base64,(.*?)"', card.children[0].value)[1]
            shown.append((Image.open(io.BytesIO(base64.b64decode(data))), card.children[1].description))
    return shown


def assert_shows(view, rows):
    shown, seen = pictures(view), view.snapshot
    assert len(shown) == min(len(rows), PICTURES)
    for (image, caption), row in zip(shown, rows, strict=False):
        assert caption == seen.pairs.caption(seen.rows[row])
        np.testing.assert_array_equal(np.asarray(image), np.asarray(seen.pairs.image(seen.rows[row])))


def select(view, points):
    """What the map does when points are clicked or boxed in."""
    view.scatter.widget.selection = np.asarray(points, np.uint32)


def test_a_prototype_shows_its_samples_the_nearest_first(view):
    for modality in ("image", "text"):
        view.modality.value = modality
        labels, centroids, features = view.snapshot.prototypes(modality)
        for prototype in set(labels):
            view.prototype.value = prototype
            distances = np.linalg.norm(features.numpy() - centroids.numpy()[prototype], axis=1)
            members = [row for row in np.argsort(distances, kind="stable") if labels[row] == prototype]
            assert_shows(view, members)
            assert set(view.scatter.widget.selection) == set(members)
            assert f"{len(members)} samples" in view.title.value and view.snapshot.names(modality)[prototype] in view.title.value


def test_a_prototype_of_one_sample_shows_it(view):
    view.assigned = np.where(np.arange(60) == 7, 1, 0)
    view._show_prototype({"new": 1})
    assert_shows(view, [7])


def test_what_the_front_end_repeats_changes_nothing(view):
    view.prototype.value = chosen = next(iter(view.prototype.options.values()))
    members = set(np.flatnonzero(view.assigned == chosen))
    # The front end answers with the points it was told to select.
    select(view, sorted(members)[::-1])
    assert set(view.rows) == members and view.prototype.value == chosen


def test_a_caption_finds_the_images_of_highest_cosine(view):
    view.caption.value = "a red circle"
    model = encoders.load(view.checkpoint.value)
    with torch.no_grad():
        text = model.clip.encode_text(model.tokenizer(["a red circle"]))[0].double().numpy()
    images = view.snapshot.features.image.double().numpy()
    cosine = images @ text / np.linalg.norm(images, axis=1) / np.linalg.norm(text)
    assert_shows(view, np.argsort(-cosine)[:PICTURES])
    assert view.caption.value == "a red circle" and "a red circle" in view.title.value


def test_a_picked_image_shows_the_nearest_captions_and_prototypes(view):
    view.prototype.value = view.prototype.options[next(iter(view.prototype.options))]
    row = view.rows[2]
    view.cards[2].children[1].click()
    assert_shows(view, [row])
    seen = view.snapshot
    labels, centroids, features = (np.asarray(part) for part in seen.prototypes("image"))
    captions, prototypes = (re.findall("<li>(.*?)</li>", part) for part in view.near.value.split("Nearest prototypes"))
    cosine = seen.features.text.numpy() @ seen.features.image.numpy()[row]
    for item, nearest in zip(captions, np.argsort(-cosine)[:5], strict=True):
        own = ", its own" if nearest == row else ""
        assert item == f"{seen.pairs.caption(seen.rows[nearest])} ({cosine[nearest]:.2f}{own})"
    distance = np.linalg.norm(centroids - features[row], axis=1)
    for item, nearest in zip(prototypes, np.argsort(distance)[:5], strict=True):
        assert item == f"{seen.names('image')[nearest]} ({distance[nearest]:.2f})"
    assert view.prototype.value is None, "the control says what is shown"


def test_points_of_the_map_show_their_samples(view):
    select(view, [7, 3, 9])
    assert_shows(view, [7, 3, 9])
    assert view.near.value == "" and "3 samples" in view.title.value
    select(view, [41])
    assert_shows(view, [41])
    assert "Nearest captions" in view.near.value
    select(view, [])
    assert pictures(view) == [] and view.near.value == ""


def test_the_map_of_both_shows_a_pair_at_its_two_points(view):
    n = len(view.snapshot.rows)
    view.modality.value = "joint"
    assert "modality" in view.colouring.options and len(view.table) == 2 * n
    select(view, [n + 5])
    assert_shows(view, [5])
    assert list(view.scatter.widget.selection) == [5, n + 5]
    view.colouring.value = "modality"
    codes = view.scatter.widget.points[:, 2]
    assert (codes[:n] == codes[0]).all() and (codes[n:] == codes[-1]).all() and codes[0] != codes[-1]


def assert_mapped(view, xy):
    for axis, values in enumerate(xy.T):
        low, high = values.min(), values.max()
        np.testing.assert_allclose(view.scatter.widget.points[:, axis], (2 * (values - low) / (high - low) - 1) / 1.1, atol=1e-5)


def test_points_lie_where_the_map_says_and_bear_the_colour_of_their_group(view):
    widget = view.scatter.widget
    for modality in ("image", "text", "joint"):
        view.modality.value = modality
        assert_mapped(view, view.snapshot.xy(modality))
    view.modality.value = "image"
    for name, values in view.snapshot.colourings("image").items():
        view.colouring.value = name
        groups = {tuple(widget.color[int(code)]) for code in widget.points[:, 2]}
        found = {(str(value), tuple(widget.color[int(code)])) for value, code in zip(values, widget.points[:, 2], strict=True)}
        assert len(found) == len(groups) == len(set(values))


def test_many_groups_leave_colours_to_the_largest(view, monkeypatch):
    """More than there are colours."""
    values = np.repeat(np.arange(10), [15, 9, 8, 7, 6, 5, 4, 3, 2, 1])
    colourings = view.snapshot.colourings("image") | {"shape": values}
    monkeypatch.setattr(type(view.snapshot), "colourings", lambda *_: colourings)
    view.modality.value = "text"
    view.colouring.value = "shape"
    legend = view.table["shape"]
    assert [*legend.cat.categories][:2] == ["0 (15)", "1 (9)"] and len(legend.cat.categories) == 8
    assert (legend == "others").sum() == 6
    assert len(set(map(tuple, view.scatter.widget.color))) == 8


def test_another_checkpoint_shows_its_own_features(view, run):
    first = view.checkpoint.options[next(iter(view.checkpoint.options))]
    view.colouring.value = "shape"
    view.checkpoint.value = first
    expected = open_snapshot(run, checkpoint=first, **OPTIONS)
    assert torch.equal(view.snapshot.features.image, expected.features.image)
    assert_mapped(view, expected.xy("image"))
    assert {label.rpartition(" (")[0] for label in view.prototype.options} <= set(expected.names("image"))
    assert view.colouring.value == "shape"
    view.caption.value = "a red circle"
    text = encoders.encode_texts(encoders.load(first), ["a red circle"])[0]
    assert_shows(view, np.argsort(-(expected.features.image @ text).numpy())[:PICTURES])


def test_captions_are_text_not_markup(view, monkeypatch):
    evil = "<script>alert('x')</script> & \"quoted\""
    monkeypatch.setattr(type(view.snapshot.pairs), "caption", lambda *_: evil)
    view.caption.value = evil
    select(view, [4])
    picture, button = view.cards[0].children
    for html in (picture.value, view.near.value, view.title.value):
        assert "<script" not in html
    assert 'alt="&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;quoted&quot;"' in picture.value
    assert button.description == evil, "a button shows text as it is"


def test_two_runs_follow_each_other_on_the_same_samples(run, clip):
    one, two = views = explore(run, other=clip, **OPTIONS).children[1:]
    assert [view.snapshot.run.path for view in views] == [run, clip]
    assert (one.snapshot.rows == two.snapshot.rows).all()
    select(two, [11, 3])
    for view in views:
        assert_shows(view, [11, 3])
        assert list(view.scatter.widget.selection) == [3, 11] or view is two
    one.prototype.value = one.assigned[0]
    assert one.rows == two.rows and two.prototype.value is None
    two.modality.value, two.colouring.value = "text", "shape"
    assert (one.modality.value, one.colouring.value) == ("text", "shape")
    one.caption.value = "a blue square"
    for view in views:
        text = encoders.encode_texts(encoders.load(view.checkpoint.value), ["a blue square"])[0]
        assert_shows(view, np.argsort(-(view.snapshot.features.image @ text).numpy())[:PICTURES])
    assert one.rows != two.rows, "each run finds its own"


def test_runs_on_different_tables_are_refused(run, tmp_path):
    other = training.train(toy_settings(toy_table(tmp_path, size=60), tmp_path / "elsewhere", objective="clip", episodes=1))
    with pytest.raises(ValueError, match=r"protoclip, .*elsewhere need one table, not .*captions.tsv', 80, .*captions.tsv', 50, "):
        explore(run, other=other.path, **OPTIONS)


def test_without_anybody_in_front_it_is_figures(run, clip, monkeypatch):
    shown = []
    monkeypatch.undo()
    monkeypatch.setattr("IPython.display.display", lambda *figures: shown.extend(figures))
    assert explore(run, other=clip, **OPTIONS) is None
    assert len(shown) == 2 and all(isinstance(figure, Figure) for figure in shown)


def test_nobody_sits_in_front_of_a_notebook_that_nbclient_runs():
    source = "from protoclip_lab.explorer import _attended\n\n_attended()"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    (cell,) = NotebookClient(notebook).execute().cells
    assert cell.outputs[0].data["text/plain"] == "False"


def test_20000_points_are_shown_selected_and_recoloured(view):
    """As many points as asked for, each control answering; how fast stands in reports/LOG.md."""
    seen, n = view.snapshot, 20_000
    generator = torch.Generator().manual_seed(0)
    features = encoders.Outputs(*(torch.randn(n, part.shape[1], generator=generator) for part in seen.features))
    seen = replace(seen, rows=np.resize(seen.rows, n), features=features)
    big = View(seen, {})
    assert big.scatter.widget.points.shape == (n, 4)
    big.colouring.value = "shape"
    big.prototype.value = 0
    assert set(big.rows) == set(np.flatnonzero(seen.prototypes()[0] == 0))
    big.modality.value = "joint"
    assert len(big.table) == 40_000
    point = 12_345
    select(big, [point])
    assert_shows(big, [big.table.index[point]])
