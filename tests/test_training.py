"""The episode loop does what its settings say."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from helpers import toy_settings, toy_table
from safetensors.torch import load_file

from protoclip_lab import encoders, prototypes, training
from protoclip_lab.config import TrainConfig
from protoclip_lab.runs import Run
from protoclip_lab.training import learning_rate, parameter_groups, train


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return toy_table(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(table, tmp_path):
    """Train with changed settings in a fresh run folder."""
    count = iter(range(100))
    return lambda **changes: train(toy_settings(table, tmp_path / f"run{next(count)}", **changes))


def weights(run, episode=-1):
    return load_file(run.checkpoints()[episode] / "open_clip_model.safetensors")


@pytest.fixture
def teacher(table, tmp_path, monkeypatch):
    """Features of an external teacher, as teachers.load gives them."""
    features = np.random.default_rng(0).standard_normal((80, 5)).astype(np.float32)
    monkeypatch.setattr(training.teachers, "load", lambda path, pairs: features)
    return {"features": str(tmp_path / "teacher.npy"), "name": "minilm"}


def test_metrics_hold_one_row_for_each_step_and_episode(run):
    found = run()
    steps, episodes = found.metrics(kind="step"), found.metrics(kind="episode")
    assert steps["step"].tolist() == list(range(1, 10)) and episodes["episode"].tolist() == [1, 2, 3]
    for column in ("loss", "loss/clip", "lr/image", "lr/rest", "grad_norm", "scale", "scale_proto"):
        assert steps[column].notna().all(), column
    for column in ("gap", "image_std", "text_std", "time/learn", "time/share_waiting", "time/images_per_second"):
        assert episodes[column].notna().all(), column
    proto = ["loss/image_to_text_6", "accuracy/text_to_image_6", "clusters/image_6/empty", "clusters/text_6/largest"]
    assert episodes.loc[1:, proto].notna().all().all() and episodes.loc[0, proto].isna().all()
    assert episodes["clusters/image_6/nmi_to_previous"].notna().tolist() == [False, False, True]


def test_logged_total_is_the_weighted_sum_of_logged_parts(run, teacher):
    steps = run(clip_weight=0.5, proto_weight=2.0, teachers=[teacher | {"weight": 3.0}]).metrics(kind="step")
    warm_up, steps = steps.iloc[:3], steps.iloc[3:]
    np.testing.assert_allclose(warm_up["loss"], warm_up["loss/clip"])
    internal = (steps["loss/image_to_text_6"] + steps["loss/text_to_image_6"]) / 2
    external = (steps["loss/minilm_to_image_6"] + steps["loss/minilm_to_text_6"]) / 2
    expected = 0.5 * steps["loss/clip"] + 2.0 * internal + 3.0 * external
    np.testing.assert_allclose(steps["loss"], expected, rtol=1e-5)


def test_plain_clip_has_no_heads_and_no_prototypes(run):
    found = run(objective="clip")
    assert "time/extract" not in found.metrics()
    model = encoders.load(found.latest)
    assert model.image_head is None and model.logit_scale_proto is None
    assert prototypes.load(found.latest) == []


def test_warm_up_spends_nothing_on_extraction_or_clustering(run, monkeypatch):
    monkeypatch.setattr(prototypes, "construct", lambda *a, **k: pytest.fail("clustered"))
    monkeypatch.setattr(training._Trainer, "_extract", lambda *a: pytest.fail("extracted"))
    run(infonce_warmup_episodes=3)


def test_locked_tail_moves_nothing_of_the_image_tower(run):
    found = run(model="RN-mini", lit_start_episode=3)
    before, after = weights(found, 1), weights(found, 2)
    for name in before:
        if name.startswith("visual."):
            assert torch.equal(before[name], after[name]), name  # BatchNorm statistics too
    assert not torch.equal(before["text_projection"], after["text_projection"])
    rates = found.metrics(kind="step")["lr/image"]
    assert (rates.iloc[:6] > 0).all() and (rates.iloc[6:] == 0).all()
    assert "loss/image_to_text_6" not in found.metrics(kind="step").iloc[6:].dropna(axis=1)


def test_image_tower_locked_from_the_start_learns_only_its_unlocked_groups(run):
    found = run(lock_image=True, lock_image_unlocked_groups=1)
    before = encoders.create(found.config).clip.state_dict()
    after = weights(found)
    moved = {name for name in after if name.startswith("visual.") and not torch.equal(before[name], after[name])}
    assert moved == {"visual.proj"}
    with pytest.raises(AssertionError, match="partial locking not currently supported"):
        run(model="RN-mini", lock_image=True, lock_image_unlocked_groups=1)


def test_locked_batchnorm_keeps_its_statistics(run):
    found = run(model="RN-mini", lock_image=True)
    before = encoders.create(found.config).clip.state_dict()
    after = weights(found)
    for name, value in before.items():
        if name.startswith("visual."):
            assert torch.equal(value, after[name]), name
    encoders.load(found.latest)


def test_accumulated_step_has_the_gradient_of_one_large_batch(run, monkeypatch):
    """Without BatchNorm: same negatives, same prototypes, so the same loss and gradient of every parameter."""
    gradients = []
    real = training.Accelerator.clip_grad_norm_

    def watch(self, parameters, norm):
        gradients.append([p.grad.clone() for p in parameters])
        return real(self, parameters, norm)

    monkeypatch.setattr(training.Accelerator, "clip_grad_norm_", watch)
    settings = {"projection_depth": 0, "episodes": 1, "infonce_warmup_episodes": 0}
    whole, parts = run(**settings), run(**settings, batch_size=4, accumulation=4)
    first, accumulated = gradients[0], gradients[3]
    assert len(first) == len(accumulated) > 30
    for one, other in zip(first, accumulated, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5 * float(one.abs().max()) + 1e-7)
    columns = ["loss", "loss/clip", "loss/image_to_text_6", "grad_norm"]
    one, other = (found.metrics(kind="step").loc[0, columns].astype(float) for found in (whole, parts))
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_accumulation_moves_batchnorm_statistics_once(run):
    found = run(model="RN-mini", objective="clip", batch_size=8, accumulation=2, episodes=1)
    assert found.metrics(kind="step")["loss"].notna().all()
    statistics = {k: v for k, v in weights(found).items() if k.endswith("bn1.running_var")}
    assert statistics and all(torch.isfinite(v).all() for v in statistics.values())


def test_nan_stops_with_step_episode_and_last_good_checkpoint(run, monkeypatch):
    real = training.ClipLoss.forward
    calls = iter(range(100))
    monkeypatch.setattr(training.ClipLoss, "forward", lambda *a, **k: real(*a, **k) * (math.nan if next(calls) == 4 else 1))
    with pytest.raises(match=r"loss is nan, .* at step 5 of episode 2: .*episode_0001"):
        run(objective="clip")


def test_infinite_gradient_stops_too(run, monkeypatch):
    monkeypatch.setattr(training.Accelerator, "clip_grad_norm_", lambda *a: torch.tensor(math.inf))
    with pytest.raises(match="gradient norm is inf at step 1 .* none yet"):
        run()


@pytest.mark.parametrize(
    "changes",
    [
        {"alignment": "siglip"},
        {"k": [4, 8]},
        {"cluster_every": 2},
        {"mask_empty": False},
        {"back_translation": False},
        {"extraction_transform": "eval"},
        {"kmeans_engine": "torch"},
        {"augmentation": "plain", "projection_depth": 2},
        {"precision": "bf16"},
        {"episode_size": None},
        {"dataset_size": 64},
        {"text_lr": 1e-4, "text_start_episode": 2, "text_end_episode": 2},
        {"temperature": -1.0, "grad_clip": 0},
    ],
    ids=str,
)
def test_every_option_trains_to_the_end(run, changes):
    found = run(**changes)
    assert found.finished
    steps = found.metrics(kind="step")
    assert np.isfinite(steps["loss"]).all()
    assert any(column.startswith("loss/image_to_text") for column in steps)


def test_siglip_starts_at_its_own_scale_and_bias_and_loads_in_open_clip(run):
    import open_clip

    found = run(alignment="siglip")
    fresh = encoders.create(found.config).clip
    assert fresh.logit_scale.exp().item() == pytest.approx(10) and fresh.logit_bias.item() == -10
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{found.latest}")
    assert torch.equal(loaded.logit_bias, weights(found)["logit_bias"])


def test_learning_teaches_something(run):
    losses = run(episodes=10, objective="clip", episode_size=80, lr=2e-3).metrics(kind="episode")["loss/clip"]
    assert losses.iloc[-1] < 0.9 * losses.iloc[0]


def test_external_teacher_teaches_both_towers_at_its_own_k(run, teacher):
    found = run(teachers=[teacher | {"k": [3, 5]}])
    names = [(r.teacher, r.student, len(r.centroids)) for r in prototypes.load(found.latest)]
    assert names[2:] == [("minilm", "image", 3), ("minilm", "text", 3), ("minilm", "image", 5), ("minilm", "text", 5)]


def test_two_external_teachers_teach_with_their_own_weights(run, teacher):
    second = teacher | {"name": "other", "weight": 0.25, "temperature": 10.0, "k": 4}
    found = run(teachers=[teacher, second], proto_weight=0)
    records = prototypes.load(found.latest)
    assert [(r.teacher, r.student, r.weight) for r in records] == [
        ("minilm", "image", 0.5),
        ("minilm", "text", 0.5),
        ("other", "image", 0.125),
        ("other", "text", 0.125),
    ]
    # The sharp teacher is one-hot: its targets are the prototypes themselves.
    assert torch.equal(records[0].targets, records[0].centroids)
    assert not torch.allclose(records[2].targets, records[2].centroids)


def test_evaluations_come_every_n_episodes_with_their_checkpoint(run, table):
    where = {"where": {"split": "test"}, "image_root": str(table.with_name("images.tar"))}
    held_out = {"name": "held out", "table": str(table), "measures": ["retrieval"], **where}
    rows = run(evaluate_every=2, evaluation_sets=[held_out], episodes=4).evaluations()
    assert rows["checkpoint"].unique().tolist() == ["episode_0002", "episode_0004"]
    assert set(rows["dataset"]) == {"held out"} and "retrieval_mean_recall" in set(rows["measure"])
    with pytest.raises(ValueError, match="'retreival'"):
        run(evaluate_every=2, evaluation_sets=[held_out | {"measures": ["retreival"]}])


def test_text_tower_rests_outside_its_episodes(run):
    found = run(objective="clip", text_start_episode=2, text_end_episode=2, weight_decay=0.0)
    first, second, third = (weights(found, i)["text_projection"] for i in range(3))
    start = encoders.create(found.config).clip.text_projection
    assert torch.equal(start, first) and not torch.equal(first, second) and torch.equal(second, third)


def test_a_last_incomplete_batch_is_clustered_but_not_learnt(run):
    found = run(episode_size=50)
    assert len(found.metrics(kind="step")) == 3 * (50 // 16)
    assert len(prototypes.load(found.latest)[0].labels) == 50


def test_features_of_another_table_are_refused_naming_both(run, tmp_path):
    path = tmp_path / "teacher.npy"
    np.save(path, np.zeros((80, 5), np.float32))
    about = {"fingerprint": "0123456789abcdef", "rows": 80, "dimension": 5, "table": "other.tsv"}
    path.with_suffix(".json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"teacher\.npy .*captions\.tsv.*0123.*Run 02_extract_teacher again"):
        run(teachers=[{"features": str(path), "name": "minilm"}])


def test_too_many_prototypes_for_a_whole_table_are_refused(run):
    with pytest.raises(ValueError, match="k = 500 is more than the 80 pairs"):
        run(k=500, episode_size=None)


def test_table_smaller_than_a_batch_is_refused(run):
    with pytest.raises(ValueError, match="episode of 10 pairs is smaller than a step of 16"):
        run(dataset_size=10, episode_size=None, k=2)


def test_fp16_on_a_cpu_is_refused(run):
    with pytest.raises(ValueError, match="'fp16' needs a GPU"):
        run(precision="fp16")


def test_bad_rows_are_listed_beside_the_run(table, tmp_path):
    broken = table.with_name("broken.tsv")
    text = table.read_text().splitlines(keepends=True)
    broken.write_text("".join([*text[:5], text[5].replace("000004.jpg", "gone.jpg"), *text[6:]]))
    found = train(toy_settings(broken, tmp_path / "run", episodes=1))
    assert "gone.jpg" in (found.path / "bad_rows.jsonl").read_text()


def test_tensorboard_and_drawings_are_written(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = run(tensorboard=True, draw_every=2)
    events = EventAccumulator(str(found.path / "tensorboard")).Reload()
    assert len(events.Scalars("loss")) == 9 and len(events.Scalars("episode/gap")) == 3
    assert [p.name for p in (found.path / "figures").iterdir()] == ["joint_episode_0002.png"]


def test_wandb_gets_every_row_when_asked_for(run, monkeypatch):
    logged, opened = [], {}
    fake = types.SimpleNamespace(log=lambda values, step: logged.append(step), finish=lambda: logged.append("end"))
    module = types.SimpleNamespace(init=lambda **k: opened.update(k) or fake)
    monkeypatch.setitem(sys.modules, "wandb", module)
    run(wandb="my-project")
    assert opened["project"] == "my-project" and logged == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, "end"]


def test_environment_is_kept(run):
    found = run(episodes=1)
    about = json.loads((found.path / "environment.json").read_text())
    assert about["packages"]["torch"] == torch.__version__.split("+")[0] or about["packages"]["torch"]
    assert about["python"] == sys.version
    assert Run(found.path).config == found.config


# --- schedules and groups


def test_learning_rate_warms_up_linearly_then_falls_as_a_cosine_to_zero():
    rates = [learning_rate(t, 2.0, 0, 110, 10) for t in range(110)]
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11))
    np.testing.assert_allclose(rates[10:], 1 + np.cos(np.pi * np.arange(100) / 100))
    assert learning_rate(110, 2.0, 0, 110, 10) == 0


@pytest.mark.parametrize("warmup", [5, 6, 50])
def test_a_schedule_that_ends_at_or_within_warm_up_does_not_divide_by_zero(warmup):
    rates = [learning_rate(t, 1.0, 0, 5, warmup) for t in range(7)]
    np.testing.assert_allclose(rates, [0.2, 0.4, 0.6, 0.8, 1.0, 0, 0])


def test_a_late_schedule_ends_on_time():
    assert [learning_rate(t, 1.0, 4, 8, 0) > 0 for t in range(10)] == [False] * 4 + [True] * 4 + [False] * 2


@pytest.mark.parametrize("name", ["RN-mini", "ViT-mini"])
def test_weight_decay_spares_vectors_scales_and_heads_only(name):
    model = encoders.create(TrainConfig(model=name, image_size=32, alignment="siglip"))
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for g in parameter_groups(model, 0.3) if g["weight_decay"] for p in g["params"]}
    spared = {names[id(p)] for g in parameter_groups(model, 0.3) if not g["weight_decay"] for p in g["params"]}
    assert decayed | spared == set(names.values())
    assert "clip.text_projection" in decayed and all(names_ndim >= 2 for names_ndim in _dims(model, decayed))
    assert all("_head" in n or "logit_" in n or model.get_parameter(n).ndim < 2 for n in spared)
    assert name == "RN-mini" or "clip.visual.proj" in decayed


def _dims(model, names):
    return [model.get_parameter(name).ndim for name in names]
