"""Typical words, maps kept on disk, and what a snapshot tells of a small trained run."""

import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import toy_settings, toy_table
from sklearn.metrics import adjusted_mutual_info_score

from protoclip_lab import losses, plots, snapshot, teachers, training
from protoclip_lab.snapshot import open_snapshot, typical_words

LABELS = ["shape", "colour"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("snapshot")


@pytest.fixture(scope="module")
def run(folder):
    """ProtoCLIP on shapes with an external teacher: the true factors in a random basis, so that it groups by them."""
    settings = toy_settings(toy_table(folder), folder / "run", episodes=3)
    pairs = training.train(settings | {"run": str(folder / "first"), "episodes": 1, "objective": "clip"})
    pairs = snapshot.runs.pairs_of(pairs)
    factors = pd.get_dummies(pd.DataFrame({name: pairs.column(name) for name in LABELS})).to_numpy(np.float32)
    about = {"rows": len(pairs), "dimension": factors.shape[1], "fingerprint": pairs.fingerprint, "table": "x"}
    np.save(folder / "factors.npy", factors)
    teachers.write_json(folder / "factors.json", about)
    external = {"features": str(folder / "factors.npy"), "name": "factors", "k": 5, "temperature": 0.5}
    return training.train(settings | {"teachers": [external]}).path


@pytest.fixture
def seen(run):
    return open_snapshot(run, samples=60, method="pca", labels=LABELS)


def written_out(captions, labels, k, words):
    """Class-based TF-IDF as BERTopic's paper has it, in loops."""
    groups = [Counter() for _ in range(k)]
    for caption, label in zip(captions, labels, strict=True):
        groups[label] += Counter(w for w in re.findall(r"\b\w\w+\b", caption.lower()) if w not in snapshot.FUNCTION_WORDS)
    everywhere = sum(groups, Counter())
    filled = [group for group in groups if group]
    mean = sum(everywhere.values()) / len(filled) if filled else 0
    found = []
    for group in groups:
        weight = {w: n / sum(group.values()) * math.log(1 + mean / everywhere[w]) for w, n in group.items()}
        found.append(" ".join(sorted(weight, key=lambda w: (-round(weight[w], 12), w))[:words]))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_typical_words_are_those_of_the_written_out_formula(seed):
    rng = np.random.default_rng(seed)
    vocabulary = ["red", "Blue", "the", "circle", "top", "Große", "x", "is", "42", "dog"]
    captions = [" ".join(rng.choice(vocabulary, rng.integers(0, 6), p=rng.dirichlet(np.ones(10)))) for _ in range(40)]
    labels = rng.integers(0, 6, 40)
    assert typical_words(captions, labels, 7, 2) == written_out(captions, labels, 7, 2)
    assert typical_words(captions, labels, 7)[6] == ""


def test_a_word_that_all_groups_share_names_none():
    captions = ["a picture of a dog", "a picture of a cat", "picture dog", "picture cat"]
    assert typical_words(captions, [0, 1, 0, 1], 2, 1) == ["dog", "cat"]


@pytest.mark.parametrize("captions", [["", "", ""], ["a", "the", "🙂"]])
def test_without_words_there_are_no_names(captions):
    assert typical_words(captions, [0, 1, 1], 2) == ["", ""]


def test_maps_are_made_once_and_kept_apart(seen, monkeypatch):
    made = []
    shutil.rmtree(seen.run.path / "maps", ignore_errors=True)
    seen = replace(seen)  # remembers nothing
    real = plots.embed
    monkeypatch.setattr(plots, "embed", lambda features, **options: made.append(options) or real(features, **options))
    first, again = seen.xy(), seen.xy()
    np.testing.assert_array_equal(first, again)
    assert len(made) == 1 and first.shape == (60, 2) and first.dtype == np.float32
    np.testing.assert_array_equal(first, real(seen.features.image_projection.numpy(), method="pca"))
    for other in (seen.xy("text"), replace(seen, seed=1).xy(), replace(seen, method="tsne").xy()):
        assert other.shape == (60, 2)
    assert [(options["method"], options["seed"]) for options in made] == [("pca", 0), ("pca", 0), ("pca", 1), ("tsne", 0)]
    # The next to look reads them from the run's folder, where nothing half written is left.
    np.testing.assert_array_equal(replace(seen).xy(), first)
    assert len(made) == 4 == len([*(seen.run.path / "maps").iterdir()])


def test_joint_map_has_images_then_texts(seen):
    both = torch.cat([seen.features.image, seen.features.text]).numpy()
    np.testing.assert_array_equal(seen.xy("joint"), plots.embed(both, method="pca"))


@pytest.mark.parametrize("samples", [7, 24, 59])
def test_of_a_larger_table_a_stratified_sample_is_seen(run, samples):
    rows = [open_snapshot(run, samples=samples, seed=seed, labels=LABELS).rows for seed in (0, 0, 1)]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2]) and (np.diff(rows[0]) > 0).all() and len(rows[0]) == samples
    pairs = snapshot.runs.pairs_of(snapshot.runs.Run(run))
    shares = pd.crosstab(np.array(pairs.column("shape")), np.isin(np.arange(len(pairs)), rows[0]))
    np.testing.assert_allclose(shares[True], samples / len(pairs) * shares.sum(axis=1), atol=1)


def test_prototypes_are_the_nearest_occupied_ones(seen):
    for record in seen.records:
        record.occupied[0] = False
    for of, features in (("image", seen.features.image_projection), ("text", seen.features.text_projection)):
        labels, centroids, own = seen.prototypes(of)
        assert own is features
        teaching = next(record for record in seen.records if record.teacher == of)
        assert centroids is teaching.teacher_centroids and len(centroids) == 6
        np.testing.assert_array_equal(labels, 1 + torch.cdist(features, centroids[1:]).argmin(dim=1))


def test_names_are_a_number_and_typical_words(seen):
    labels, centroids, _ = seen.prototypes("text")
    words = typical_words([seen.pairs.caption(row) for row in seen.rows], labels, 6)
    assert seen.names("text") == [f"{i} · {found}" if found else str(i) for i, found in enumerate(words)]
    assert len(seen.names()) == 6 and any(" · " in name for name in seen.names())


def test_a_sample_disagrees_whose_label_is_not_the_commonest_of_its_prototype(seen):
    found, prototypes = seen.colourings("text"), seen.prototypes("text")[0]
    assert [*found] == ["prototype", "shape", "disagreement with shape", "colour", "disagreement with colour"]
    np.testing.assert_array_equal(found["shape"], seen.label("shape"))
    np.testing.assert_array_equal(found["prototype"], np.array(seen.names("text"))[prototypes])
    for i, prototype in enumerate(prototypes):
        fellows = Counter(found["shape"][prototypes == prototype])
        most = min(label for label, count in fellows.items() if count == max(fellows.values()))
        assert found["disagreement with shape"][i] == ("agrees" if found["shape"][i] == most else "disagrees")


def test_agreement_is_scikit_learns_of_all_groupings(seen):
    table = seen.agreement
    assert [*table] == [*table.index] == ["image", "text", "factors", *LABELS]
    labels = {name: seen.prototypes(name)[0] for name in ("image", "text", "factors")} | {name: seen.label(name) for name in LABELS}
    for a in labels:
        for b in labels:
            assert table.loc[a, b] == pytest.approx(adjusted_mutual_info_score(labels[a], labels[b]), abs=1e-9)
    assert table.loc["factors", "colour"] + table.loc["factors", "shape"] > 0.5


def test_external_clusters_are_those_of_the_stored_features(seen):
    record = next(record for record in seen.records if record.teacher == "factors")
    labels, centroids, features = seen.prototypes("factors")
    np.testing.assert_array_equal(features, np.load(seen.run.config.teachers[0].features, allow_pickle=False)[seen.rows])
    kept = record.occupied.nonzero()[:, 0]
    np.testing.assert_array_equal(labels, kept[torch.cdist(features, centroids[kept]).argmin(dim=1)])


def test_sizes_are_of_the_episode_and_overlap_of_the_sample(seen):
    assert {name: len(sizes) for name, sizes in seen.sizes().items()} == {"image 6": 6, "text 6": 6, "factors 5": 5}
    assert all(sizes.sum() == 48 for sizes in seen.sizes().values())
    image, text = (seen.prototypes(name)[0] for name in ("image", "text"))
    table = seen.overlap()
    assert table.to_numpy().sum() == 60
    for (row, column), count in table.stack().items():
        assert count == ((image == row) & (text == column)).sum()
    heaviest = table.to_numpy().argmax(axis=0)
    assert (np.diff(heaviest) >= 0).all() and heaviest[-1] > 0


def test_without_internal_teachers_soft_targets_are_of_the_external_one(seen, monkeypatch):
    seen.records[:] = [record for record in seen.records if record.teacher == "factors"]
    drawn = {}
    monkeypatch.setattr(plots, "soft_targets", lambda *given, **options: drawn.update(given=given, **options))
    seen.soft_targets()
    assert drawn["title"].startswith("Teacher: factors (τ = 0.5) · student: image")
    assert drawn["given"][2].shape == (6, 5)


def test_a_missing_label_is_a_label_of_its_own(seen, monkeypatch):
    monkeypatch.setattr(type(seen.pairs), "column", lambda self, name: [None if i % 3 == 0 else "red" for i in range(len(self))])
    assert set(seen.label("colour")) == {"", "red"}
    assert set(seen.colourings()["disagreement with colour"]) <= {"agrees", "disagrees"}


def test_a_run_interrupted_in_its_first_episode_has_one_moment(seen):
    assert seen.records  # read before the folder has its other name
    seen.checkpoint = seen.checkpoint.with_name("episode_0000_step_000010")
    seen.run = SimpleNamespace(checkpoints=lambda: [seen.checkpoint], config=seen.run.config)
    assert [*seen.through()] == ["episode 0 step 10"]


@pytest.mark.parametrize("teacher, temperature", [("text", 0.01), ("factors", 0.5), ("factors", -1.0)])
def test_drawn_soft_targets_have_the_prototype_loss_as_their_cross_entropy(seen, monkeypatch, teacher, temperature):
    record = next(r for r in seen.records if (r.teacher, r.student) == (teacher, "image"))
    config = seen.run.config
    config.teachers[0].temperature = temperature
    monkeypatch.setattr(type(seen.run), "config", config)
    for empty in [r for r in seen.records if r.teacher == teacher]:
        empty.occupied[2] = False  # what has no members leaves both
    drawn = {}
    monkeypatch.setattr(plots, "soft_targets", lambda *given, **options: drawn.update(given=given, **options))
    seen.records.sort(key=lambda r: r.teacher != teacher)
    seen.soft_targets(samples=60)
    captions, names, p, q = drawn["given"]
    assert names == seen.names(teacher)
    np.testing.assert_allclose([p.sum(axis=1), q.sum(axis=1)], 1, rtol=1e-5)
    assert not p[:, 2].any() and not q[:, 2].any()
    scale = snapshot.encoders.load(seen.checkpoint).logit_scale_proto.exp()
    order = snapshot.randomness.numpy_generator(seen.seed, "soft").permutation(60)
    assert [*captions] == [seen.pairs.caption(row) for row in seen.rows[order]]
    h, y = seen.features.image_projection[order], torch.from_numpy(seen.prototypes(teacher)[0][order])
    expected = losses.prototype_loss_reference(
        h, record.centroids, record.teacher_centroids, y, scale, temperature, occupied=record.occupied
    )
    kept = record.occupied.numpy()
    assert -(p * np.log(np.where(kept, q, 1))).sum(axis=1).mean() == pytest.approx(expected.item(), rel=1e-4)


def test_sheet_shows_the_nearest_members_their_purity_and_what_is_nearest_to_the_twin(seen, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "prototype_sheet", lambda *given, **options: drawn.update(given=given, **options))
    seen.records.reverse()  # the twin is the same teacher's, wherever it stands
    seen.sheet(count=2, nearest=3)
    assert drawn["headings"] == {"nearest images": 0, "texts nearest to its twin": 3}
    record = next(record for record in seen.records if record.teacher == "image")
    labels, centroids, features = seen.prototypes()
    captions = np.array([seen.pairs.caption(row) for row in seen.rows])
    for images, texts, about in zip(*drawn["given"], strict=True):
        name, size, *purity = about.split("\n")
        k = seen.names().index(name)
        members = np.flatnonzero(labels == k)
        assert size == f"{len(members)} of 60"
        for line, column in zip(purity, LABELS, strict=True):
            share, label = line.split("% ")
            counts = Counter(seen.label(column)[members])
            assert counts[label] == max(counts.values()) and int(share) == round(100 * counts[label] / len(members))
        near = members[torch.cdist(features[members], centroids[k : k + 1])[:, 0].argsort(stable=True).numpy()][:3]
        twin = torch.cdist(seen.features.text_projection, record.centroids[k : k + 1])[:, 0].argsort(stable=True)[:3]
        assert [*texts] == [*captions[near], *captions[twin]] and len(images) == 6
    drawn["given"] = None
    replace(seen, paper=True).sheet(modality="text")
    assert drawn["paper"] and drawn["headings"] == {"nearest texts": 0, "images nearest to its twin": 2}


def test_through_training_are_the_same_rows_at_evenly_chosen_checkpoints(seen, monkeypatch):
    assert [*seen.through()] == ["episode 1", "episode 2", "episode 3"] and seen.through()["episode 3"] is seen
    for then in seen.through().values():
        np.testing.assert_array_equal(then.rows, seen.rows)
    first = open_snapshot(seen.run.path, checkpoint=seen.run.checkpoints()[0], samples=60, labels=LABELS)
    torch.testing.assert_close(seen.through()["episode 1"].features.image, first.features.image)
    monkeypatch.setattr(snapshot, "MOMENTS", 2)
    assert [*replace(seen).through()] == ["episode 1", "episode 3"]


def test_maps_through_training_resemble_each_the_next_and_the_last_is_the_usual_one(seen, monkeypatch):
    drawn = {}
    real = plots.cluster_map
    monkeypatch.setattr(
        plots, "cluster_map", lambda given, **options: drawn.setdefault("given", (given, options)) and real(given, **options)
    )
    _, animation = seen.maps_through()
    given, options = drawn["given"]
    maps = {name: xy for name, (xy, _) in given.items()}
    assert [*maps] == ["episode 1", "episode 2", "episode 3"]
    np.testing.assert_array_equal(maps["episode 3"], seen.xy())
    for one, after in (("episode 1", "episode 2"), ("episode 2", "episode 3")):
        features = seen.through()[one].features.image_projection.numpy()
        np.testing.assert_array_equal(maps[one], plots.embed(features, method="pca", like=maps[after]))
    best = max(LABELS, key=lambda label: seen.agreement.loc["image", label])
    for _, labels in given.values():
        np.testing.assert_array_equal(labels, seen.label(best))
    assert isinstance(animation, plots.Animation) and best in options["title"]


def test_plain_clip_has_k_means_clusters_and_no_soft_targets(folder):
    seen = open_snapshot(folder / "first", samples=60, method="pca", labels=["shape"])
    labels, centroids, _ = seen.prototypes()
    assert len(centroids) == 60 // snapshot.MEMBERS and set(labels) == {0, 1}
    assert {name: sizes.sum() for name, sizes in seen.sizes().items()} == {"image": 60, "text": 60}
    with pytest.raises(ValueError, match="no prototypes at .*episode_0001"):
        seen.soft_targets()
    for figure in (seen.sheet(), plots.heat_map(seen.overlap()), *seen.cluster_maps().values()):
        assert figure._repr_png_().startswith(b"\x89PNG")
    assert "k-means" in seen.cluster_maps()["prototypes"].axes[0].get_title()
