"""Who teaches whom, with which labels and centroids."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from protoclip_lab import prototypes
from protoclip_lab.config import TrainConfig
from protoclip_lab.losses import prototype_loss_reference
from protoclip_lab.prototypes import construct


def features(n=120, d=8, d_external=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda width: F.normalize(torch.randn(n, width, generator=generator), dim=1)  # noqa: E731
    return {"image": draw(d), "text": draw(d), "minilm": draw(d_external)}


OWN = TrainConfig(k=10)
ALL = TrainConfig(k=10, teachers=[{"features": "x.npy", "name": "minilm", "k": [6, 12]}])


def test_internal_teachers_teach_the_other_tower_and_external_ones_both():
    records, _ = construct(features(), ALL, 0, {})
    assert [(r.teacher, r.student, len(r.centroids)) for r in records] == [
        ("image", "text", 10),
        ("text", "image", 10),
        ("minilm", "image", 6),
        ("minilm", "text", 6),
        ("minilm", "image", 12),
        ("minilm", "text", 12),
    ]


def test_prototypes_are_means_of_student_features_under_teacher_labels():
    x = features()
    for record in construct(x, ALL, 0, {})[0]:
        for k in range(len(record.centroids)):
            members = record.labels == k
            torch.testing.assert_close(record.centroids[k], x[record.student][members].mean(0), rtol=1e-4, atol=1e-6)


def test_total_equals_the_formula_written_out():
    """w_proto/2 (text→image + image→text) + Σ_j w_j/2 (j→image + j→text), each direction the mean over its k."""
    x = features()
    records, clusters = construct(x, ALL, 3, {})
    scale = torch.tensor(7.0)
    rows = torch.arange(40)
    total = sum(r.weight * r.loss(x[r.student][rows], r.labels_of(rows), scale) for r in records)

    def direction(teacher, student, k, temperature):
        found = clusters[f"{teacher}_{k}"]
        c = torch.stack([x[student][found.labels == j].mean(0) for j in range(k)])
        return prototype_loss_reference(x[student][rows], c, found.centroids, found.labels[rows], scale, temperature)

    expected = 0.5 * (direction("image", "text", 10, 0.01) + direction("text", "image", 10, 0.01))
    for student in ("image", "text"):
        expected = expected + 0.5 * (direction("minilm", student, 6, -1) + direction("minilm", student, 12, -1)) / 2
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)


def test_without_back_translation_prototypes_are_the_teachers_centroids():
    records, _ = construct(features(), TrainConfig(k=10, back_translation=False), 0, {})
    for record in records:
        assert torch.equal(record.centroids, record.teacher_centroids)


def test_carried_labels_are_the_nearest_occupied_teacher_centroid():
    x = features()
    record = construct(x, OWN, 0, {})[0][0]
    record.occupied[2] = False
    old = replace(record, carried=True)
    new = features(seed=9)["image"]
    distance = ((new[:, None] - record.teacher_centroids[None]) ** 2).sum(-1)
    distance[:, 2] = torch.inf
    assert torch.equal(old.labels_of(torch.arange(len(new)), new), distance.argmin(1))


def test_fresh_labels_are_stored_labels_by_position():
    record = construct(features(), OWN, 0, {})[0][0]
    assert torch.equal(record.labels_of(torch.tensor([5, 0])), record.labels[[5, 0]])


def test_accuracy_counts_the_nearest_prototype():
    record = construct(features(), OWN, 0, {})[0][0]
    students = F.normalize(record.centroids, dim=1)
    nearest = (students @ record.centroids.T).argmax(1)
    labels = nearest.clone()
    labels[:3] = (labels[:3] + 1) % 10
    assert record.accuracy(students, labels) == pytest.approx(0.7)


def test_mask_empty_false_lets_empty_clusters_compete():
    x = {name: torch.ones(30, 4) for name in ("image", "text")}
    masked = construct(x, OWN, 0, {})[0][0]
    assert masked.occupied.sum() < 10
    competing = construct(x, TrainConfig(k=10, mask_empty=False), 0, {})[0][0]
    assert competing.occupied.all() and competing.accuracy(x["text"], competing.labels) == 1
    h, labels = x["text"], competing.labels
    assert competing.loss(h, labels, torch.tensor(9.0)) > masked.loss(h, labels, torch.tensor(9.0)) + 1e-5


def test_saved_prototypes_are_read_as_they_were(tmp_path):
    records = construct(features(), ALL, 0, {})[0]
    prototypes.save(records, tmp_path)
    for found, record in zip(prototypes.load(tmp_path), records, strict=True):
        for name, value in vars(record).items():
            same = torch.equal(getattr(found, name), value) if isinstance(value, torch.Tensor) else getattr(found, name) == value
            assert same or name == "carried"
        assert found.carried
