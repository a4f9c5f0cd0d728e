"""The suite: which measures run on which set, by which numbers, and what it refuses."""

import logging

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers import toy_settings, toy_table
from PIL import Image
from pydantic import ValidationError

from protoclip_lab import encoders
from protoclip_lab.config import TrainConfig
from protoclip_lab.data import shapes
from protoclip_lab.data.pairs import prepare
from protoclip_lab.evaluation import linear_probe, modality_gap, prompts, retrieval, suite, zero_shot
from protoclip_lab.training import train


def image_feature(image):
    return torch.from_numpy(np.asarray(image.resize((4, 4))).astype(np.float32).ravel() - 127)


def text_feature(text):
    return torch.bincount(torch.tensor(list(text.encode())), minlength=128)[:48].float() + len(text) % 7


@pytest.fixture
def encoded(monkeypatch):
    """Encoders that need no model; lists what they were asked for."""
    calls = []

    def encode_images(model, images, **options):
        calls.append(("images", len(images)))
        z = F.normalize(torch.stack([image_feature(images[i]) for i in range(len(images))]), dim=1)
        return encoders.Outputs(z, None, z, None)

    def encode_texts(model, captions, **options):
        calls.append(("texts", len(captions)))
        return F.normalize(torch.stack([text_feature(text) for text in captions]), dim=1)

    monkeypatch.setattr(encoders, "encode_images", encode_images)
    monkeypatch.setattr(encoders, "encode_texts", encode_texts)
    return calls


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return shapes.write(tmp_path_factory.mktemp("world"), 90, image_size=32, held_out=1 / 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, centre in (("dark_red", (90, 0, 0)), ("green", (0, 160, 0)), ("white", (230, 230, 230))):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = (np.array(centre) + rng.normal(size=(8, 8, 3)) * 60).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


GROUPING = {
    *(f"grouping_{key}{of}" for key in ("ARI", "AMI", "NMI", "purity") for of in ("", "_sd")),
    *(f"grouping_{key}" for key in ("silhouette", "davies_bouldin", "calinski_harabasz")),
    *(f"grouping_{key}" for key in ("within_similarity", "between_similarity", "similarity_ratio")),
}
GAP = {
    "gap",
    *(f"gap_{of}_{key}" for of in ("image", "text") for key in ("self_similarity", "std")),
    *("gap_pair_similarity", "gap_separability"),
}
SWEPT = ("mean_recall", "image_to_text_R@1", "text_to_image_R@1")


def values(rows, dataset):
    return {row["measure"]: row["value"] for row in rows if row["dataset"] == dataset}


def test_labelled_images_get_the_measures_of_labels(encoded, folders):
    given = {"name": "colours", "images": str(folders / "test"), "train_images": str(folders / "train")}
    found = values(suite.evaluate(None, [given]), "colours")
    assert set(found) == {
        *(f"zero_shot_{key}" for key in ("top1", "top5", "mean_per_class")),
        *(f"linear_probe_{key}" for key in ("accuracy", "mean_per_class", "strength")),
        *(f"knn_{key}" for key in ("accuracy", "mean_per_class")),
        *GROUPING,
        *(f"gap_sweep_top1@{share:+.2f}" for share in np.arange(-1, 1.25, 0.25)),
    }
    assert found["linear_probe_accuracy"] > 90
    assert encoded.count(("images", 18)) == 1 and encoded.count(("images", 36)) == 1


def test_table_gives_the_same_numbers_as_the_functions(encoded, table, tmp_path):
    given = {
        "name": "world",
        "table": str(table),
        "image_root": str(table.with_name("images.tar")),
        "where": {"split": "test"},
        "train_where": {"split": "train"},
        "label": "colour",
        "templates": "shapes/colour",
    }
    found = values(suite.evaluate(None, [given], seed=4, folder=tmp_path), "world")
    test, train = (
        prepare(table, tmp_path / split, image_root=given["image_root"], where={"split": split}, progress=False)
        for split in ("test", "train")
    )
    image, train_image = (encoders.encode_images(None, [p.image(i) for i in range(len(p))]).image for p in (test, train))
    text = encoders.encode_texts(None, test.captions)
    classes = sorted(set(test.column("colour")))
    weights = prompts.classifier(lambda t: encoders.encode_texts(None, t), classes, shapes.PROMPTS["colour"])
    labels = [classes.index(value) for value in test.column("colour")]
    assert found["zero_shot_top1"] == pytest.approx(zero_shot(image, weights, labels)["top1"])
    probe = linear_probe(train_image, train.column("colour"), image, test.column("colour"), seed=4)
    assert found["linear_probe_accuracy"] == pytest.approx(probe["accuracy"])
    assert found["retrieval_mean_recall"] == pytest.approx(retrieval(image, text, range(30))["mean_recall"])
    expected = modality_gap(image, text)
    assert found["gap"] == pytest.approx(expected["gap"])
    assert found["gap_pair_similarity"] == pytest.approx(expected["pair_similarity"])


def test_image_with_several_captions_is_encoded_once(encoded, table, tmp_path):
    header, *rows = table.read_text().splitlines()
    (tmp_path / "twice.tsv").write_text("\n".join([header, *rows[:5], *rows[:5]]) + "\n")
    root = str(table.with_name("images.tar"))
    given = {"name": "twice", "table": str(tmp_path / "twice.tsv"), "image_root": root, "where": {"split": "train"}}
    found = values(suite.evaluate(None, [given]), "twice")
    assert encoded == [("images", 5), ("texts", 10)]
    # Of two equal captions either will do for their image.
    assert found["retrieval_text_to_image_R@5"] == 100
    swept = {name for name in found if name.startswith("gap_sweep_")}
    recalls = {f"retrieval_{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert set(found) - swept == {*GAP, *recalls, "retrieval_mean_recall"}
    assert {name.removeprefix("gap_sweep_").partition("@+0.50")[0] for name in swept if "+0.50" in name} == set(SWEPT)
    assert len(swept) == 9 * len(SWEPT)


def test_sets_on_the_same_images_share_their_features(encoded, table):
    common = {"table": str(table), "image_root": str(table.with_name("images.tar")), "where": {"split": "test"}}
    sets = [{"name": label, "label": label, **common} for label in ("colour", "shape", "size")]
    suite.evaluate(None, sets)
    assert encoded.count(("images", 30)) == 1
    assert encoded.count(("texts", 30)) == 1


def test_asked_measures_alone_are_taken(encoded, folders):
    given = suite.EvaluationSet(name="c", images=str(folders / "test"), measures=["grouping"])
    rows = suite.evaluate(None, [given])
    assert {row["measure"] for row in rows} == GROUPING
    sets = [{"name": "c", "images": str(folders / "test")}]
    assert {row["measure"] for row in suite.evaluate(None, sets, measures=["grouping", "retrieval"])} == GROUPING


def test_missing_path_is_reported_and_the_rest_goes_on(encoded, folders, tmp_path, caplog):
    sets = [
        {"name": "gone", "images": str(tmp_path / "gone.tar")},
        {"name": "no list", "images": str(folders / "test"), "classes": str(tmp_path / "classes.txt")},
        {"name": "there", "images": str(folders / "test"), "measures": ["grouping"]},
    ]
    with caplog.at_level(logging.WARNING):
        rows = suite.evaluate(None, sets)
    assert {row["dataset"] for row in rows} == {"there"}
    reported = [record.getMessage() for record in caplog.records]
    assert len(reported) == 2
    assert "set gone is" in reported[0] and str(tmp_path / "gone.tar") in reported[0]
    assert "set no list is" in reported[1] and str(tmp_path / "classes.txt") in reported[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": "x"}, "nearest valid name is 'images'"),
        ({"images": "x", "measures": ["zeroshot"]}, "nearest valid name is 'zero_shot'"),
        ({"images": "x", "measures": ["retrieval"]}, "'retrieval' .* needs a table of captions"),
        ({"images": "x", "measures": ["knn"]}, "needs train_images or train_where"),
        ({"table": "x", "measures": ["zero_shot"]}, r"needs classes \(images, or a table with label\)"),
        ({"images": "x", "table": "y"}, "one of the two"),
        ({}, "one of the two"),
        ({"images": "x", "where": {"split": "test"}}, r"\['where'\] .* are for a set with a table"),
        ({"images": "x", "templates": "imagenets"}, "nearest is 'imagenet'"),
        ({"images": "x", "templates": ["photo"]}, "'photo'"),
        ({"images": "x", "classes": "imagenets"}, "nearest is 'imagenet'"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValidationError, match=message):
        suite.EvaluationSet(name="s", **settings)


def test_settings_survive_being_written_down(folders):
    given = suite.EvaluationSet(name="s", images=str(folders / "test"), templates="imagenet", classes=["a", "b", "c"])
    assert suite.EvaluationSet(**given.model_dump()) == given


def test_data_that_do_not_fit_stop_before_anything_is_encoded(encoded, folders, table):
    good = {"name": "good", "images": str(folders / "test")}
    with pytest.raises(ValueError, match="class name 0 is 'white'"):
        suite.evaluate(None, [good, {**good, "name": "bad", "classes": ["white", "green", "red"]}])
    with pytest.raises(ValueError, match="fit its probes on images it tests them on"):
        suite.evaluate(None, [{**good, "train_images": good["images"]}])
    world = {"name": "world", "table": str(table), "image_root": str(table.with_name("images.tar")), "label": "size"}
    with pytest.raises(ValueError, match="fit its probes on images it tests them on"):
        both = {"where": {"split": "test"}, "train_where": {"split": ["train", "test"]}}
        suite.evaluate(None, [{**world, **both}])
    with pytest.raises(ValueError, match="need a name each"):
        suite.evaluate(None, [good, good])
    assert encoded == []


def test_model_of_the_workbench_is_evaluated(folders, table):
    model = encoders.create(TrainConfig(model="ViT-mini", image_size=32, context_length=16, objective="clip"))
    root = str(table.with_name("images.tar"))
    sets = [
        {"name": "colours", "images": str(folders / "test"), "train_images": str(folders / "train")},
        {"name": "world", "table": str(table), "image_root": root, "where": {"split": "test"}},
    ]
    rows = suite.evaluate(model, sets, batch_size=16)
    assert all(np.isfinite(row["value"]) for row in rows) and len(rows) == 12 + 13


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny CLIP run on the shapes world, with a checkpoint for each of its two episodes."""
    folder = tmp_path_factory.mktemp("finished")
    return train(toy_settings(toy_table(folder), folder / "run", objective="clip", episodes=2))


def test_run_without_named_sets_is_evaluated_on_the_held_out_shapes(finished, tmp_path):
    rows = suite.evaluate_run(finished.path, tmp_path)
    assert set(rows["dataset"]) == {*shapes.FACTORS, "shapes"} and rows["episode"].eq(2).all()
    per_factor = rows[rows["dataset"] == "shape"]["measure"]
    assert {"zero_shot_top1", "linear_probe_accuracy", "grouping_AMI"} <= set(per_factor)
    assert not rows.duplicated(["dataset", "measure"]).any() and np.isfinite(rows["value"]).all()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "evaluation.csv"), rows)
    pd.testing.assert_frame_equal(finished.evaluations()[rows.columns], rows)
    # Recall by hand, on the 16 held-out pictures of the 96.
    model = encoders.load(finished.latest)
    table = finished.path.parent / "shapes" / "captions.tsv"
    root = table.with_name("images.tar")
    held_out = prepare(table, tmp_path / "held_out", image_root=root, where={"split": "test"}, progress=False)
    image, text, _, _ = encoders.encode_pairs(model, held_out, np.arange(16))
    assert len(held_out) == 16
    value = rows.set_index(["dataset", "measure"]).loc[("shapes", "retrieval_mean_recall"), "value"]
    assert value == pytest.approx(retrieval(image, text, range(16))["mean_recall"])


def test_named_checkpoint_and_sets_are_evaluated_and_rows_taken_again_replaced(finished, folders, tmp_path):
    given = {"name": "colours", "images": str(folders / "test"), "measures": ["grouping"]}
    first = finished.checkpoints()[0]
    for _ in range(2):
        rows = suite.evaluate_run(finished.path, tmp_path / "new" / "folder", checkpoint=first, sets=[given])
    assert set(rows["dataset"]) == {"colours"} and rows["episode"].eq(1).all() and len(rows) == 4
    kept = finished.evaluations()
    assert len(kept[kept["dataset"] == "colours"]) == 4


def test_default_sets_are_refused_for_a_run_on_another_table(finished, tmp_path):
    for file in ("captions.tsv", "images.tar"):
        (tmp_path / file).write_bytes((finished.path.parent / "shapes" / file).read_bytes())
    other = train(toy_settings(tmp_path / "captions.tsv", tmp_path / "run", objective="clip", episodes=1))
    with pytest.raises(ValueError, match="run was not trained on the shapes world: .* `sets`"):
        suite.default_sets(other)
