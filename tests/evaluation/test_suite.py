"""The suite: which measures run on which set, by which numbers, and what it refuses."""

import json
import logging
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers import authors_checkpoint, toy_settings, toy_table
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from protoclip_lab import encoders, evaluation, prototypes
from protoclip_lab.config import TrainConfig
from protoclip_lab.data import downstream, shapes
from protoclip_lab.data.pairs import prepare
from protoclip_lab.evaluation import linear_probe, modality_gap, retrieval, suite, zero_shot
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
    monkeypatch.setattr(encoders, "fingerprint", lambda model: "none")
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
    *(f"grouping_{key}" for key in ("ARI", "AMI", "NMI", "purity")),
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


def test_labelled_images_get_the_measures_of_labels(encoded, folders, tmp_path):
    given = {"name": "colours", "images": str(folders / "test"), "train_images": str(folders / "train")}
    found = values(suite.evaluate(None, [given], tmp_path, draws=0), "colours")
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
        "image_root": str(table.with_name("images")),
        "where": {"split": "test"},
        "train_where": {"split": "train"},
        "label": "colour",
        "templates": shapes.PROMPTS["colour"],
    }
    found = values(suite.evaluate(None, [given], tmp_path, seed=4, draws=0), "world")
    test, train = (
        prepare(table, tmp_path / split, image_root=given["image_root"], where={"split": split}) for split in ("test", "train")
    )
    image, train_image = (encoders.encode_images(None, [p.image(i) for i in range(len(p))]).image for p in (test, train))
    text = encoders.encode_texts(None, test.captions)
    classes = sorted(set(test.column("colour")))
    weights = evaluation.classifier(lambda t: encoders.encode_texts(None, t), classes, shapes.PROMPTS["colour"])
    labels = [classes.index(value) for value in test.column("colour")]
    assert found["zero_shot_top1"] == pytest.approx(zero_shot(image, weights, labels)["top1"])
    probe = linear_probe(train_image, train.column("colour"), image, test.column("colour"), seed=4)
    assert found["linear_probe_accuracy"] == pytest.approx(probe["accuracy"])
    assert found["retrieval_mean_recall"] == pytest.approx(retrieval(image, text, range(30))["mean_recall"])
    expected = modality_gap(image, text)
    assert found["gap"] == pytest.approx(expected["gap"])
    assert found["gap_pair_similarity"] == pytest.approx(expected["pair_similarity"])


@pytest.mark.parametrize("count, cores, workers", [(1999, 16, 0), (5000, 16, 2), (50_000, 16, 8), (50_000, 2, 1), (50_000, 1, 0)])
def test_many_images_are_read_by_processes_of_their_own(tmp_path, monkeypatch, count, cores, workers):
    class Zeros(downstream.Images):
        fingerprint = "zeros"

        def __init__(self):
            self.names = range(count)

    asked, z = [], torch.zeros(1, 1)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr(encoders, "encode_images", lambda *_, **options: asked.append(options) or encoders.Outputs(z, None, z, None))
    suite._encoded(None, "none", tmp_path, Zeros())
    assert asked == [{"workers": workers}]


def test_image_with_several_captions_is_encoded_once(encoded, table, tmp_path):
    header, *rows = table.read_text().splitlines()
    (tmp_path / "twice.tsv").write_text("\n".join([header, *rows[:5], *rows[:5]]) + "\n")
    root = str(table.with_name("images"))
    given = {"name": "twice", "table": str(tmp_path / "twice.tsv"), "image_root": root, "where": {"split": "train"}}
    found = values(suite.evaluate(None, [given], tmp_path, draws=0), "twice")
    assert encoded == [("images", 5), ("texts", 10)]
    # Of two equal captions either will do for their image.
    assert found["retrieval_text_to_image_R@5"] == 100
    swept = {name for name in found if name.startswith("gap_sweep_")}
    recalls = {f"retrieval_{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert set(found) - swept == {*GAP, *recalls, "retrieval_mean_recall"}
    assert {name.removeprefix("gap_sweep_").partition("@+0.50")[0] for name in swept if "+0.50" in name} == set(SWEPT)
    assert len(swept) == 9 * len(SWEPT)


def test_sets_on_the_same_images_share_their_features(encoded, table, tmp_path):
    common = {"table": str(table), "image_root": str(table.with_name("images")), "where": {"split": "test"}}
    sets = [{"name": label, "label": label, **common} for label in ("colour", "shape", "size")]
    suite.evaluate(None, sets, tmp_path, draws=0)
    assert encoded.count(("images", 30)) == 1
    assert encoded.count(("texts", 30)) == 1


def test_asked_measures_alone_are_taken(encoded, folders, tmp_path):
    given = suite.EvaluationSet(name="c", images=str(folders / "test"), measures=["grouping"])
    rows = suite.evaluate(None, [given], tmp_path, draws=0)
    assert {row["measure"] for row in rows} == GROUPING
    sets = [{"name": "c", "images": str(folders / "test")}]
    assert {row["measure"] for row in suite.evaluate(None, sets, tmp_path, measures=["grouping", "retrieval"], draws=0)} == GROUPING


def test_missing_path_is_reported_and_the_rest_goes_on(encoded, folders, tmp_path, caplog):
    sets = [
        {"name": "gone", "images": str(tmp_path / "gone.tar")},
        {"name": "there", "images": str(folders / "test"), "measures": ["grouping"]},
    ]
    with caplog.at_level(logging.WARNING):
        rows = suite.evaluate(None, sets, tmp_path, draws=0)
    assert {row["dataset"] for row in rows} == {"there"}
    reported = [record.getMessage() for record in caplog.records]
    assert len(reported) == 1
    assert "set gone is" in reported[0] and str(tmp_path / "gone.tar") in reported[0]


def test_measures_that_do_not_apply_give_nothing(encoded, folders, table, tmp_path):
    sets = [
        {"name": "c", "images": str(folders / "test"), "measures": ["retrieval", "gap", "knn"]},
        {"name": "t", "table": str(table), "where": {"split": "test"}, "measures": ["zero_shot", "grouping"]},
    ]
    sets[1]["image_root"] = str(table.with_name("images"))
    assert suite.evaluate(None, sets, tmp_path, draws=0) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": "x"}, "nearest valid name is 'images'"),
        ({"images": "x", "measures": ["zeroshot"]}, "'zeroshot' .* nearest valid name is 'zero_shot'"),
        ({"images": "x", "table": "y"}, "one of images, table, root"),
        ({"images": "x", "root": "y"}, "one of images, table, root|no set is known as 's'"),
        ({}, "one of images, table, root"),
        ({"images": "x", "templates": "imagenets"}, "nearest valid name is 'imagenet1k'"),
        ({"images": "x", "templates": ["photo"]}, "'photo'"),
        ({"images": "x", "scaling": "l1"}, "nearest valid name is 'l2'"),
        ({"images": "x", "classes": "imagenets"}, "nearest valid name is 'imagenet1k'"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValidationError, match=message):
        suite.EvaluationSet(name="s", **settings)


def test_settings_survive_being_written_down(folders):
    given = suite.EvaluationSet(name="s", images=str(folders / "test"), templates="imagenet1k", classes=["a", "b", "c"])
    assert suite.EvaluationSet(**given.model_dump()) == given


def test_sets_that_do_not_fit_are_reported_before_anything_is_encoded(encoded, folders, table, tmp_path, caplog):
    good = {"name": "good", "images": str(folders / "test")}
    world = {"name": "world", "table": str(table), "image_root": str(table.with_name("images")), "label": "size"}
    both = {"where": {"split": "test"}, "train_where": {"split": ["train", "test"]}}
    wrong = [{**good, "classes": ["white", "green", "red"]}, {**good, "train_images": good["images"]}, {**world, **both}]
    for given in wrong:
        assert suite.evaluate(None, [given], tmp_path) == []
    messages = [record.getMessage() for record in caplog.records]
    assert "class name 0 is 'white'" in messages[0]
    assert all("fit its probes on images it tests them on" in message for message in messages[1:]) and len(messages) == 3
    with pytest.raises(ValueError, match="need a name each"):
        suite.evaluate(None, [good, good], tmp_path)
    assert encoded == []


def test_model_of_the_workbench_is_evaluated(folders, table, tmp_path):
    model = encoders.create(TrainConfig(model="ViT-mini", image_size=32, context_length=16, objective="clip"))
    root = str(table.with_name("images"))
    sets = [
        {"name": "colours", "images": str(folders / "test"), "train_images": str(folders / "train")},
        {"name": "world", "table": str(table), "image_root": root, "where": {"split": "test"}},
    ]
    rows = suite.evaluate(model, sets, tmp_path, draws=20)
    assert all(np.isfinite(row["value"]) for row in rows)
    measures = {row["measure"].partition("@")[0] for row in rows}
    assert {"zero_shot_top1", "knn_accuracy", "retrieval_mean_recall", "gap", "gap_sweep_mean_recall"} <= measures
    spread = [row for row in rows if row["low"] is not None]
    assert len(spread) > 50 and all(row["low"] <= row["high"] for row in spread)


# --- a checkpoint


def toy_run(folder, **settings):
    return train(toy_settings(toy_table(folder), folder / "run", **settings))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny CLIP run on the shapes world, with a checkpoint for each of its two episodes."""
    return toy_run(tmp_path_factory.mktemp("finished"), model="RN-micro", objective="clip", episodes=2)


@pytest.fixture
def colours(folders, tmp_path):
    """Settings of a set of 24 images of its own, to be changed at will."""
    for name in ("dark_red", "green", "white"):
        (tmp_path / "colours" / name).mkdir(parents=True)
        for number in range(8):
            shutil.copyfile(folders / "train" / name / f"{number}.png", tmp_path / "colours" / name / f"{number}.png")
    return {"name": "colours", "images": str(tmp_path / "colours"), "measures": ["zero_shot", "grouping"]}


@pytest.fixture
def counted(monkeypatch):
    """How many batches the encoders were asked for, by kind."""
    calls = []
    for name in ("encode_images", "encode_texts"):
        real = getattr(encoders, name)
        monkeypatch.setattr(encoders, name, lambda *a, _real=real, _name=name, **k: calls.append(_name) or _real(*a, **k))
    return calls


def test_run_without_named_sets_is_evaluated_on_the_held_out_shapes(finished, tmp_path):
    rows = suite.evaluate_checkpoint(finished.path, tmp_path, draws=20)
    assert set(rows["dataset"]) == {*shapes.FACTORS, "shapes"} and rows["checkpoint"].eq("episode_0002").all()
    per_factor = rows[rows["dataset"] == "shape"]["measure"]
    assert {"zero_shot_top1", "linear_probe_accuracy", "grouping_AMI"} <= set(per_factor)
    assert not rows["measure"].str.contains("prototypes").any()
    assert not rows.duplicated(["dataset", "measure"]).any() and np.isfinite(rows["value"]).all()
    assert list(rows.columns) == ["checkpoint", "dataset", "measure", "value", "low", "high"]
    kept = finished.evaluations()
    assert list(kept.columns) == list(rows.columns)
    pd.testing.assert_frame_equal(kept[kept["checkpoint"] == "episode_0002"].reset_index(drop=True), rows)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "evaluation.csv"), kept)
    # Recall by hand, on the 16 held-out pictures of the 96.
    model = encoders.load(finished.latest)
    table = finished.path.parent / "shapes" / "captions.tsv"
    root = table.with_name("images")
    held_out = prepare(table, tmp_path / "held_out", image_root=root, where={"split": "test"})
    image, text, _, _ = encoders.encode_pairs(model, held_out, np.arange(16))
    assert len(held_out) == 16
    expected = retrieval(image, text, range(16), draws=20)["mean_recall"]
    row = rows.set_index(["dataset", "measure"]).loc[("shapes", "retrieval_mean_recall")]
    assert (row["value"], row["low"], row["high"]) == pytest.approx((expected, expected.low, expected.high))


def test_checkpoint_folder_keeps_its_rows_in_its_run_and_replaces_them(finished, folders, tmp_path):
    given = {"name": "other colours", "images": str(folders / "test"), "measures": ["grouping"]}
    first = finished.checkpoints()[0]
    for _ in range(2):
        rows = suite.evaluate_checkpoint(first, tmp_path / "new" / "folder", sets=[given], draws=0)
    assert set(rows["dataset"]) == {"other colours"} and rows["checkpoint"].eq("episode_0001").all()
    assert set(rows["measure"]) == GROUPING and rows[["low", "high"]].isna().all().all()
    kept = finished.evaluations()
    assert len(kept[kept["dataset"] == "other colours"]) == len(GROUPING)
    assert (tmp_path / "new" / "folder" / "evaluation.csv").exists()


def test_checkpoint_of_the_authors_is_evaluated_into_its_own_folder(colours, tmp_path):
    file, output = tmp_path / "epoch_2.pt", tmp_path / "output"
    authors_checkpoint(file, vocabulary=49408)
    rows = suite.evaluate_checkpoint(file, output, sets=[colours], draws=20)
    assert rows["checkpoint"].eq(str(file)).all() and rows["value"].notna().all()
    lines = [json.loads(line) for line in (output / "evaluation.jsonl").read_text().splitlines()]
    written = pd.DataFrame(lines).astype({"value": float, "low": float, "high": float})
    pd.testing.assert_frame_equal(pd.read_csv(output / "evaluation.csv"), written)
    pd.testing.assert_frame_equal(written, rows)
    with pytest.raises(ValueError, match="belongs to no run: .*--out"):
        suite.evaluate_checkpoint(file, sets=[colours])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": ["zeroshot"]}, "'zeroshot' .* nearest valid name is 'zero_shot'"),
        ({"datasets": ["cifar11"], "data_root": "."}, "'cifar11'; the nearest valid name is 'cifar10'"),
        ({"datasets": ["cifar10"]}, "'cifar10' needs one of images, table, root"),
        ({"sets": [{"nam": "x"}]}, "'nam' of EvaluationSet; the nearest valid name is 'name'"),
    ],
    ids=str,
)
def test_wrong_names_are_refused_before_a_model_is_loaded(finished, monkeypatch, options, message):
    monkeypatch.setattr(encoders, "load", lambda path: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        suite.evaluate_checkpoint(finished.path, **options)


def test_missing_sets_are_left_out_and_none_at_all_is_an_error(finished, colours, tmp_path, caplog):
    gone = {"name": "gone", "images": str(tmp_path / "gone")}
    known = {"datasets": ["cifar10"], "data_root": str(tmp_path)}
    rows = suite.evaluate_checkpoint(finished.path, tmp_path / "out", sets=[gone, colours], draws=0, **known)
    assert set(rows["dataset"]) == {"colours"}
    about = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(about) == 2 and "set cifar10 is" in about[0] and "cifar-10-batches-py" in about[0]
    assert "torchvision.datasets.CIFAR10" in about[0] and str(tmp_path / "gone") in about[1]
    with pytest.raises(ValueError, match=r"none of \['cifar10', 'gone'\] is there"):
        suite.evaluate_checkpoint(finished.path, tmp_path / "out", sets=[gone], **known)


def test_unreadable_images_are_left_out_by_name(colours, finished, tmp_path, caplog):
    whole = encoders.load(finished.latest)
    files = sorted((tmp_path / "colours").glob("*/*.png"))
    assert len(files) == 24
    expected_files = files[:1] + files[2:]
    files[1].write_bytes(files[1].read_bytes()[:60])
    found = values(suite.evaluate(whole, [colours], tmp_path / "kept", draws=0), "colours")
    named = [record.getMessage() for record in caplog.records]
    assert any(str(files[1]) in message for message in named)
    assert any("1 of 24 images of colours" in message for message in named)
    images = [Image.open(file).convert("RGB") for file in expected_files]
    z = encoders.encode_images(whole, images).image
    weights = evaluation.classifier(lambda t: encoders.encode_texts(whole, t), ["dark red", "green", "white"], ["a photo of a {}."])
    labels = [sorted({f.parent.name for f in files}).index(f.parent.name) for f in expected_files]
    assert found["zero_shot_top1"] == pytest.approx(zero_shot(z, weights, labels)["top1"])


def test_prototypes_of_a_protoclip_checkpoint_are_compared_with_the_classes(tmp_path):
    from sklearn import metrics

    # Without BatchNorm and with hardly a step, features still lie where they were clustered.
    run = toy_run(tmp_path, episodes=2, projection_depth=0, lr=1e-5)
    table = tmp_path / "shapes" / "captions.tsv"
    world = {"table": str(table), "image_root": str(table.with_name("images")), "where": {"split": "test"}}
    given = {"name": "colour", "label": "colour", "measures": ["grouping"], **world}
    found = values(suite.evaluate_checkpoint(run.path, sets=[given], draws=20).to_dict("records"), "colour")
    held_out = prepare(table, tmp_path / "held_out", image_root=world["image_root"], where=world["where"])
    h = encoders.encode_pairs(encoders.load(run.latest), held_out, np.arange(16)).image_projection.double()
    (own,) = [r.teacher_centroids.double() for r in prototypes.load(run.latest) if r.teacher == "image"]
    nearest = ((h[:, None] - own) ** 2).sum(dim=2).argmin(dim=1).numpy()
    scores = {"ARI": metrics.adjusted_rand_score, "AMI": metrics.adjusted_mutual_info_score}
    scores["NMI"] = metrics.normalized_mutual_info_score
    for name, score in scores.items():
        assert found[f"grouping_prototypes_{name}"] == pytest.approx(score(held_out.column("colour"), nearest)), name
    assert len(set(nearest)) > 1 and found["grouping_prototypes_ARI"] != found["grouping_ARI"]
    # In the warm-up there are none yet.
    first = suite.evaluate_checkpoint(run.checkpoints()[0], sets=[given], draws=0)
    assert set(first["measure"]) == GROUPING


# --- features kept for the next call


@pytest.fixture
def evaluated(finished, colours, counted, tmp_path):
    """Evaluate a checkpoint of no run; the rows, and what was encoded for them."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(finished.latest, checkpoint)

    def evaluate():
        counted.clear()
        rows = suite.evaluate_checkpoint(checkpoint, tmp_path / "out", sets=[colours], draws=20)
        return rows, counted.count("encode_images"), counted.count("encode_texts")

    return evaluate


def test_second_evaluation_encodes_nothing_and_gives_the_same_rows(evaluated, counted):
    first, images, texts = evaluated()
    again, *none = evaluated()
    assert (images, texts) == (1, 1) and none == [0, 0]
    pd.testing.assert_frame_equal(first, again, check_exact=True)


def test_a_changed_weight_or_image_is_encoded_anew(evaluated, colours, tmp_path):
    evaluated()
    weights = tmp_path / "checkpoint" / "open_clip_model.safetensors"
    state = load_file(weights)
    state["visual.attnpool.c_proj.weight"].mul_(-1)
    save_file(state, weights, metadata={"format": "pt"})
    _, images, texts = evaluated()
    assert images == texts == 1
    changed = sorted((tmp_path / "colours").glob("*/*.png"))[0]
    Image.new("RGB", (8, 8), "blue").save(changed)
    _, images, texts = evaluated()
    assert images == 1 and texts == 0


def test_changed_pictures_of_a_table_are_encoded_anew(finished, counted, tmp_path):
    """The same names and captions, other pictures."""
    table = shapes.write(tmp_path / "world", 12, image_size=32, held_out=0)
    world = {"name": "world", "table": str(table), "image_root": str(table.with_name("images"))}
    given = world | {"where": {"split": "train"}, "measures": ["gap"]}
    arguments = (finished.latest, tmp_path / "out")
    first = suite.evaluate_checkpoint(*arguments, sets=[given], draws=0)
    shapes.write(tmp_path / "world", 12, image_size=48, held_out=0)
    counted.clear()
    again = suite.evaluate_checkpoint(*arguments, sets=[given], draws=0)
    assert counted == ["encode_images"] and not first["value"].equals(again["value"])


def test_a_cache_file_half_written_by_a_killed_evaluation_is_never_read(evaluated, monkeypatch, tmp_path):
    def dies(tensors, file):
        save_file(tensors, file)
        file.write_bytes(file.read_bytes()[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(suite, "save_file", dies)
        evaluated()
    (half,) = (tmp_path / "out" / "features").iterdir()
    assert half.stat().st_size == 100
    rows, images, texts = evaluated()
    assert (images, texts) == (1, 1) and rows["value"].notna().all()
    assert all(load_file(file) for file in (tmp_path / "out" / "features").glob("*.safetensors"))


def test_default_sets_are_refused_for_a_run_on_another_table(finished, tmp_path):
    world = finished.path.parent / "shapes"
    shutil.copytree(world / "images", tmp_path / "images")
    shutil.copy(world / "captions.tsv", tmp_path)
    other = train(toy_settings(tmp_path / "captions.tsv", tmp_path / "run", objective="clip", episodes=1))
    with pytest.raises(ValueError, match="run was not trained on the shapes world: name what to evaluate on"):
        suite.default_sets(other)
