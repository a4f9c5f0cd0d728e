"""The fast prototype loss against the textbook form, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from protoclip_lab import losses
from protoclip_lab.losses import expected_prototypes, prototype_loss, prototype_loss_reference


def problem(seed=0, batch=17, k=11, d=6, d_teacher=4, empty=()):
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(batch, d, generator=generator, dtype=torch.float64), dim=1)
    centroids = torch.randn(k, d, generator=generator, dtype=torch.float64)
    teacher = torch.randn(k, d_teacher, generator=generator, dtype=torch.float64)
    occupied = torch.ones(k, dtype=torch.bool)
    occupied[list(empty)] = False
    centroids[list(empty)] = 0
    members = occupied.nonzero()[:, 0]
    labels = members[torch.randint(len(members), (batch,), generator=generator)]
    scale = torch.tensor(9.0, dtype=torch.float64)
    return features, centroids, teacher, labels, scale, occupied


@pytest.mark.parametrize("temperature", [0.01, 0.3, 5.0, 0.0, -1.0])
@pytest.mark.parametrize("empty", [(), (0,), (2, 3, 10)])
def test_fast_loss_equals_textbook_in_value_and_gradient(temperature, empty):
    features, centroids, teacher, labels, scale, occupied = problem(empty=empty)
    grads = []
    for fast in (True, False):
        h, s = features.clone().requires_grad_(), scale.clone().requires_grad_()
        if fast:
            targets = expected_prototypes(teacher, centroids, temperature, occupied=occupied)
            loss = prototype_loss(h, centroids, targets[labels], s, occupied=occupied)
        else:
            loss = prototype_loss_reference(h, centroids, teacher, labels, s, temperature, occupied=occupied)
        loss.backward()
        grads.append((loss.detach(), h.grad, s.grad))
    for fast, slow in zip(*grads, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 5, 17])
def test_blocks_change_neither_value_nor_gradient_and_keep_nothing_of_size_batch_times_k(monkeypatch, rows):
    features, centroids, teacher, labels, scale, occupied = problem(empty=(3,))
    monkeypatch.setattr(losses, "BLOCK_ELEMENTS", rows * len(centroids))
    h, s = features.clone().requires_grad_(), scale.clone().requires_grad_()
    targets = expected_prototypes(teacher, centroids, 0.3, occupied=occupied)[labels].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = prototype_loss(h, centroids, targets, s, occupied=occupied)
    assert max(kept) == features.numel() < len(features) * len(centroids)
    found = torch.autograd.grad(loss, (h, s, targets))
    plain = torch.logsumexp((s * h @ centroids.T).masked_fill(~occupied, -torch.inf), dim=1) - s * (h * targets).sum(dim=1)
    for mine, theirs in zip(found, torch.autograd.grad(plain.mean(), (h, s, targets)), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradcheck(
        lambda *given: prototype_loss(given[0], centroids, given[1], given[2], occupied=occupied), (h, targets, s)
    )


def test_centroids_that_ask_for_a_gradient_are_refused():
    features, centroids, _, labels, scale, _ = problem()
    with pytest.raises(ValueError, match="detach them"):
        prototype_loss(features, centroids.requires_grad_(), centroids.detach()[labels], scale)


def test_large_logits_do_not_overflow():
    features, centroids, _, labels, _, _ = problem()
    loss = prototype_loss(features.float(), 40 * centroids.float(), 40 * centroids.float()[labels], torch.tensor(100.0))
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss.double(), F.cross_entropy(4000 * features @ centroids.T, labels), rtol=1e-4, atol=0)


def test_one_hot_loss_is_torch_cross_entropy():
    features, centroids, _, labels, scale, _ = problem()
    expected = F.cross_entropy(scale * features @ centroids.T, labels)
    torch.testing.assert_close(prototype_loss(features, centroids, centroids[labels], scale), expected)


def test_reference_is_torch_cross_entropy_with_soft_target():
    features, centroids, teacher, labels, scale, _ = problem()
    target = F.softmax(teacher[labels] @ teacher.T / 0.2, dim=1)
    expected = F.cross_entropy(scale * features @ centroids.T, target)
    torch.testing.assert_close(prototype_loss_reference(features, centroids, teacher, labels, scale, 0.2), expected)


def test_empty_clusters_leave_both_softmaxes():
    features, centroids, teacher, labels, scale, occupied = problem(empty=(1, 5))
    column = torch.cumsum(occupied, 0) - 1
    without = prototype_loss_reference(features, centroids[occupied], teacher[occupied], column[labels], scale, 0.5)
    targets = expected_prototypes(teacher, centroids, 0.5, occupied=occupied)
    masked = prototype_loss(features, centroids, targets[labels], scale, occupied=occupied)
    torch.testing.assert_close(masked, without)
    # The authors' behaviour, zero centroids that compete, is another loss.
    competing = prototype_loss(features, centroids, expected_prototypes(teacher, centroids, 0.5)[labels], scale)
    assert abs(competing - without) > 1e-3


def test_expected_prototypes_in_blocks_equal_one_block(monkeypatch):
    _, centroids, teacher, _, _, occupied = problem(k=23, empty=(4,))
    whole = expected_prototypes(teacher, centroids, 0.1, occupied=occupied)
    monkeypatch.setattr(losses, "BLOCK_ELEMENTS", 50)
    torch.testing.assert_close(expected_prototypes(teacher, centroids, 0.1, occupied=occupied), whole)
    logits = (teacher @ teacher.T / 0.1).masked_fill(~occupied, -torch.inf)
    torch.testing.assert_close(whole, logits.softmax(1) @ centroids)


def test_half_precision_features_are_computed_in_float32():
    features, centroids, _, labels, scale, _ = problem()
    half = features.bfloat16()
    loss = prototype_loss(half, centroids.bfloat16(), centroids.bfloat16()[labels], scale.float())
    assert loss.dtype == torch.float32
    exact = prototype_loss(half.double(), centroids.bfloat16().double(), centroids.bfloat16().double()[labels], scale)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


def test_large_scale_does_not_overflow():
    features, centroids, _, labels, _, _ = problem()
    loss = prototype_loss(features.float(), 100 * centroids.float(), 100 * centroids.float()[labels], torch.tensor(100.0))
    assert torch.isfinite(loss)


def test_one_cluster_costs_nothing():
    features, centroids, teacher, _, scale, _ = problem(k=1)
    labels = torch.zeros(len(features), dtype=torch.long)
    targets = expected_prototypes(teacher, centroids, 0.1)
    assert prototype_loss(features, centroids, targets[labels], scale).abs() < 1e-12


def test_shapes_that_do_not_fit_are_named():
    features, centroids, teacher, labels, scale, _ = problem()
    with pytest.raises(ValueError, match=r"\[17, 6\] and \[11, 6\]"):
        prototype_loss(features, centroids, centroids, scale)
    with pytest.raises(RuntimeError, match="shape"):
        expected_prototypes(teacher[:10], centroids, 0.1)
