"""The prototype loss: pure functions of features. The alignment losses are open_clip's ClipLoss and SigLipLoss."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip_lab.config import require

# Logits held at once: 2**21 floats are 8 MiB, which still lie in a CPU's cache between the passes over them.
BLOCK_ELEMENTS = 2**21
# Which clusters take part, (K,) bool; None lets all.
Mask = Tensor | None


def prototype_loss(features: Tensor, centroids: Tensor, targets: Tensor, scale: Tensor, *, occupied: Mask = None) -> Tensor:
    """Cross-entropy of student features against soft prototype targets, in its contracted form.

    ``L = mean(logsumexp_k(s h·C_k) − s h·M[y])``. It equals the cross-entropy with the soft target
    ``p = softmax(T[y] Tᵀ/τ)`` because ``Σ_k p_k (s h·C_k) = s h·(Σ_k p_k C_k) = s h·M[y]``.

    Args:
        features: h, student features, (B, d); computed in float32 whatever their dtype (float64 stays).
        centroids: C, prototypes in the student's space, (K, d).
        targets: M[y], the expected prototype of each sample, (B, d); see :func:`expected_prototypes`.
        scale: s, the inverse temperature, a scalar tensor or a number.
        occupied: (K,) bool; clusters without members take no part. None lets every row compete.

    Returns:
        The mean over the batch, a scalar.

    Raises:
        ValueError: ``features`` and ``targets`` differ in shape, or ``centroids`` ask for a gradient.

    Source: ProtoCLIP (arXiv 2206.10996), eq. 5 and 6; the contraction is ours.
    """
    # Their product would broadcast.
    require(targets.shape == features.shape, f"features and targets differ in shape: {[*features.shape]} and {[*targets.shape]}")
    features, centroids, targets = (t if t.dtype == torch.float64 else t.float() for t in (features, centroids, targets))
    require(not centroids.requires_grad, "centroids are constants of a step and get no gradient: detach them")
    scale = torch.as_tensor(scale, dtype=features.dtype, device=features.device)
    return (_LogSumExp.apply(features, centroids, scale, occupied) - scale * (features * targets).sum(dim=1)).mean()


class _LogSumExp(torch.autograd.Function):
    """``logsumexp_k(s h·C_k)`` of each row, in blocks of rows.

    Its gradient ``s Σ_k softmax_k C_k`` is made on the way, while the block's softmax is at hand: a (B, K) tensor
    neither waits for the backward pass nor is made anew by it.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, centroids: Tensor, scale: Tensor, occupied: Mask) -> Tensor:
        sums, means = [], []
        for block in features.split(max(1, BLOCK_ELEMENTS // len(centroids))):
            logits = masked((scale * block) @ centroids.T, occupied)
            highest = logits.amax(dim=1, keepdim=True)
            weights = logits.sub_(highest).exp_()
            total = weights.sum(dim=1, keepdim=True)
            sums.append((highest + total.log()).squeeze(1))
            means.append(weights @ centroids / total)
        ctx.save_for_backward(features, scale, torch.cat(means))
        return torch.cat(sums)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, scale, means = ctx.saved_tensors
        weighted = gradient.unsqueeze(1) * means
        return scale * weighted, None, (features * weighted).sum(), None


def prototype_loss_reference(
    features: Tensor, centroids: Tensor, teacher_centroids: Tensor, labels: Tensor, scale: Tensor, temperature, *, occupied: Mask = None
) -> Tensor:
    """The prototype loss as the paper writes it: slow, and what the fast form is tested against.

    ``p = softmax(T[y] Tᵀ/τ)`` (one-hot at y for τ ≤ 0), ``L = −Σ_k p_k log softmax(s h Cᵀ)_k``, mean over the batch.

    Args:
        features: h, student features, (B, d).
        centroids: C, student prototypes, (K, d).
        teacher_centroids: T, (K, d_teacher).
        labels: y, the teacher's cluster of each sample, (B,) int64; must be occupied clusters.
        scale: s, the inverse temperature, a scalar tensor or a number.
        temperature: τ of the teacher's softmax, a number.
        occupied: (K,) bool; the other clusters leave both softmaxes.

    Source: ProtoCLIP (arXiv 2206.10996), eq. 5 and 6.
    """
    h, C, T, y = features, centroids, teacher_centroids, labels
    if occupied is not None:
        # Dropping the clusters, rather than masking them, leaves no -inf for 0 · -inf to turn into NaN.
        C, T, y = C[occupied], T[occupied], torch.cumsum(occupied, 0)[y] - 1
    p = F.softmax(T[y] @ T.T / temperature, dim=1) if temperature > 0 else F.one_hot(y, len(C)).to(h.dtype)
    return -(p * F.log_softmax(scale * h @ C.T, dim=1)).sum(dim=1).mean()


@torch.no_grad()
def expected_prototypes(teacher_centroids: Tensor, centroids: Tensor, temperature: float, *, occupied: Mask = None) -> Tensor:
    """Mean student prototype under the teacher's soft assignment, one row per cluster.

    ``M = softmax(T Tᵀ / τ) C``. A soft target depends on a sample only through its label, so a training
    step needs ``M[label]`` and never the (batch, K) teacher distribution. Made in blocks of rows: memory is
    O(K d), not O(K²).

    Args:
        teacher_centroids: T, (K, d_teacher).
        centroids: C, the same clusters in the student's space, (K, d).
        temperature: τ; at or below 0 the target is one-hot and M is C itself.
        occupied: (K,) bool; clusters without members take no part. Their own rows of M are never asked for.

    Returns:
        M, (K, d).

    Source: ProtoCLIP (arXiv 2206.10996), soft prototype targets; the contraction with C is ours.
    """
    if temperature <= 0:
        return centroids
    blocks = teacher_centroids.split(max(1, BLOCK_ELEMENTS // len(centroids)))
    return torch.cat([F.softmax(masked(block @ teacher_centroids.T / temperature, occupied), dim=1) @ centroids for block in blocks])


def masked(logits: Tensor, occupied: Mask) -> Tensor:
    """Logits (..., K) with -inf, in place, for clusters that are not ``occupied``; None masks nothing."""
    return logits if occupied is None else logits.masked_fill_(~occupied, -torch.inf)
