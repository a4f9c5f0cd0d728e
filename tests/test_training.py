"""The episode loop does what its settings say."""

import json
import math
import sys
import types
from itertools import pairwise

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


@pytest.fixture
def watched(monkeypatch):
    """What each step projected, and what each construction was given after how many steps."""
    steps, made = [], []
    backward, construct = training._Trainer._backward, training._Trainer._construct

    def step(self, images, tokens, part, records):
        outputs, parts = backward(self, images, tokens, part, records)
        steps.append((outputs.image_projection.detach(), outputs.text_projection.detach(), torch.from_numpy(self.ids[part])))
        return outputs, parts

    def making(self, features):
        made.append((self.step, {name: value.clone() for name, value in features.items()}))
        construct(self, features)
        self.seen = [record.carried for record in self.records]

    monkeypatch.setattr(training._Trainer, "_backward", step)
    monkeypatch.setattr(training._Trainer, "_construct", making)
    return steps, made


def test_rolling_prototypes_come_from_the_features_of_the_last_episodes_steps(run, teacher, watched, monkeypatch):
    steps, made = watched
    monkeypatch.setattr(training._Trainer, "_extract", lambda *a: pytest.fail("extracted"))
    found = run(prototypes="rolling", teachers=[teacher], k=[4, 6], episodes=4)
    stored = torch.from_numpy(training.teachers.load("", None))
    assert [step for step, _ in made] == [3, 6, 9, 12]
    for step, features in made:
        image, text, rows = (torch.cat(parts) for parts in zip(*steps[step - 3 : step], strict=True))
        assert torch.equal(features["image"], image) and torch.equal(features["text"], text)
        assert torch.equal(features["minilm"], stored[rows])
    assert "time/extract" not in found.metrics()
    assert found.metrics(kind="step")["loss/minilm_to_text_6"].notna().tolist() == 3 * [False] + 9 * [True]


def test_rolling_labels_are_the_nearest_centroids_of_the_present_features(run, teacher, monkeypatch):
    asked = []
    real = prototypes.Prototypes.labels_of

    def labels_of(self, positions, features=None):
        found = real(self, positions, features)
        asked.append((self, features, found))
        return found

    monkeypatch.setattr(prototypes.Prototypes, "labels_of", labels_of)
    run(prototypes="rolling", teachers=[teacher])
    assert len(asked) == 6 * 4  # steps, directions
    for record, features, labels in asked:
        away = torch.cdist(features, record.teacher_centroids).masked_fill(~record.occupied, torch.inf)
        assert torch.equal(labels, away.argmin(dim=1))
    assert {record.teacher: features.shape[1] for record, features, _ in asked} == {"image": 16, "text": 16, "minilm": 5}


def test_a_later_visit_learns_the_same_pairs_by_the_labels_of_their_own_clusters(run, watched, monkeypatch):
    steps, made = watched
    asked = []
    real = prototypes.Prototypes.labels_of

    def labels_of(self, positions, features=None):
        found = real(self, positions, features)
        if (self.teacher, self.student) == ("text", "image"):
            asked.append((self, found))
        return found

    monkeypatch.setattr(prototypes.Prototypes, "labels_of", labels_of)
    run(prototypes="rolling", visits=2, episodes=4, episode_size=50)
    rows = [torch.cat([rows for _, _, rows in steps[first : first + 3]]) for first in (0, 3, 6, 9)]
    assert [sorted(a.tolist()) == sorted(b.tolist()) for a, b in pairwise(rows)] == [True, False, True]
    assert not rows[0].equal(rows[1])
    assert [step for step, _ in made] == [3, 6, 9, 12]
    assert [record.carried for record, _ in asked] == 3 * [False] + 3 * [True] + 3 * [False]
    for first, clustered in ((3, rows[0]), (9, rows[2])):
        record = asked[first - 3][0]
        label_of_row = dict(zip(clustered.tolist(), record.labels.tolist(), strict=True))
        for (_, _, learnt), (_, labels) in zip(steps[first : first + 3], asked[first - 3 : first], strict=True):
            assert labels.tolist() == [label_of_row[row] for row in learnt.tolist()]


def test_a_later_visit_of_the_faithful_form_clusters_the_whole_episode_again(run, watched):
    steps, made = watched
    run(visits=2, episode_size=40, k=36, batch_size=16, episodes=4)
    assert [(step, len(features["image"])) for step, features in made] == [(2, 40), (4, 40), (6, 40)]
    learnt = [set(torch.cat([rows for _, _, rows in steps[first : first + 2]]).tolist()) for first in (0, 2)]
    assert len(learnt[0] | learnt[1]) <= 40 and learnt[0] != learnt[1]  # the tail of the first visit has its turn


def test_rolling_without_warm_up_extracts_once(run, watched):
    steps, made = watched
    rows = run(prototypes="rolling", infonce_warmup_episodes=0, episodes=2).metrics()
    assert rows["time/extract"].notna().tolist().count(True) == 1
    assert [step for step, _ in made] == [0, 3, 6]
    assert torch.equal(made[1][1]["text"], torch.cat([text for _, text, _ in steps[:3]]))


def test_rolling_prototypes_stop_where_the_image_tower_is_locked(run, watched):
    _, made = watched
    run(prototypes="rolling", model="RN-mini", episodes=4, lit_start_episode=3)
    assert [step for step, _ in made] == [3]


def test_warm_start_begins_from_the_last_centroids_and_reports_their_drift(run, monkeypatch):
    starts, ends = [], []
    real = prototypes.clustering.kmeans

    def kmeans(features, k, **how):
        found = real(features, k, **how)
        starts.append(how["init"])
        ends.append(found.centroids)
        return found

    monkeypatch.setattr(prototypes.clustering, "kmeans", kmeans)
    rows = run(kmeans_warm_start=True, kmeans_tolerance=0.01).metrics(kind="episode")
    assert starts[:2] == [None, None]  # image and text, first episode with prototypes
    assert torch.equal(starts[2], ends[0]) and torch.equal(starts[3], ends[1])
    drift = float((ends[2] - ends[0]).norm(dim=1).mean())
    assert rows["clusters/image_6/drift"].iloc[2] == pytest.approx(drift) and drift > 0
    assert rows["clusters/image_6/drift"].iloc[:2].isna().all()


def test_rarer_readings_of_the_metrics_change_none_of_them(run):
    often, seldom = run(), run(log_every=2)
    every, second = (found.metrics(kind="step").reset_index(drop=True) for found in (often, seldom))
    assert second.equals(every.iloc[::2].reset_index(drop=True)) and len(second) == 5
    whole, same = (found.metrics(kind="episode").filter(regex="^(?!time/)") for found in (often, seldom))
    assert same.equals(whole)


@pytest.mark.parametrize("changes", [{}, {"prototypes": "rolling"}, {"objective": "clip"}])
def test_a_step_whose_metrics_are_not_read_waits_for_nothing_on_the_device(run, monkeypatch, changes):
    """Each of these operations has a value read by the host, which on a GPU waits for all work before it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    reads = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero):
                reads.append(str(function))
            return function(*args, **(kwargs or {}))

    inside, steps = [], []
    enter, leave = training._Trainer._set_learning_rates, training.tqdm.update

    def begin(self, step):
        inside.append(Watch())
        inside[0].__enter__()
        return enter(self, step)

    def end(self, n=1):
        if inside:
            inside.pop().__exit__(None, None, None)
            steps.append(len(reads))
        return leave(self, n)

    monkeypatch.setattr(training._Trainer, "_set_learning_rates", begin)
    monkeypatch.setattr(training.tqdm, "update", end)
    run(**changes, log_every=5)
    assert steps == [0] * 9, reads
    # The watch sees what it is there to see.
    clamp = encoders.TwoTowers.clamp_scales
    monkeypatch.setattr(encoders.TwoTowers, "clamp_scales", lambda self: clamp(self) or self.clip.logit_scale.item())
    run(**changes, log_every=5)
    assert steps[9:] == [*range(1, 10)]


def test_compiled_towers_train_as_plain_ones(run, monkeypatch):
    compiled = []
    real = torch.nn.Module.compile

    def compile_eagerly(self):
        compiled.append(self)
        real(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    plain, fast = run(), run(compile=True)
    assert len(compiled) == 1
    np.testing.assert_allclose(fast.metrics(kind="step")["loss"], plain.metrics(kind="step")["loss"], rtol=1e-4)


def test_waiting_for_images_is_said(run, monkeypatch, capsys):
    begin = training._Trainer._begin

    def waited(self):
        begin(self)
        self.row["time/wait"] = 1e9

    monkeypatch.setattr(training._Trainer, "_begin", waited)
    run(objective="clip", workers=0)
    assert capsys.readouterr().out.count("waiting for images: more workers (now 0) would help") == 3


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
    where = {"where": {"split": "test"}, "image_root": str(table.with_name("images"))}
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
