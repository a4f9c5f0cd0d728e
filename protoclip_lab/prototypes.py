"""An episode's prototypes: who teaches whom, with which labels, centroids and targets."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from protoclip_lab import clustering, losses
from protoclip_lab.randomness import derive

STUDENTS = ("image", "text")
TENSORS = ("labels", "teacher_centroids", "centroids", "targets", "occupied")  # of Prototypes


class Teacher(NamedTuple):
    """How one teacher teaches: its name, how finely it clusters, how softly, and how much it counts."""

    name: str  # "image" | "text" | name of an external teacher
    ks: Sequence[int]  # prototypes at several granularities: each direction is the mean over them
    temperature: float  # τ of the soft target; ≤ 0 means one-hot
    weight: float  # of each of its directions, before the mean over ks


@dataclass
class Prototypes:
    """What one teacher's clustering asks of one student tower."""

    student: str  # "image" | "text"
    teacher: str  # "text" | "image" | name of an external teacher
    labels: Tensor  # (N,) the teacher's cluster of each sample of the episode
    teacher_centroids: Tensor  # (K, d_t) T
    centroids: Tensor  # (K, d) C, back-translated
    targets: Tensor  # (K, d) M, expected prototypes
    occupied: Tensor  # (K,) bool: takes part in both softmaxes, because it has a member or all are to
    weight: float
    carried: bool = False  # made in an earlier episode: the stored labels are of other samples

    @property
    def name(self) -> str:
        """For metrics: teacher, student and number of prototypes."""
        return f"{self.teacher}_to_{self.student}_{len(self.centroids)}"

    def labels_of(self, positions: Tensor | slice, teacher_features: Tensor | None = None) -> Tensor:
        """The teacher's cluster of the samples at these positions of the episode, (B,).

        Stored labels; where the prototypes come from an earlier episode, the nearest occupied teacher centroid
        of ``teacher_features``, (B, d_t), the teacher's present features of these samples.
        """
        if not self.carried:
            return self.labels[positions]
        empty = torch.zeros_like(self.teacher_centroids[:, 0]).masked_fill_(~self.occupied, torch.inf)
        return clustering.nearest(teacher_features, self.teacher_centroids, empty)

    def loss(self, features: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        """The prototype loss of student ``features`` (B, d) whose teacher labels are ``labels`` (B,)."""
        return losses.prototype_loss(features, self.centroids, self.targets[labels], scale, occupied=self.occupied)

    def accuracy(self, features: Tensor, labels: Tensor) -> Tensor:
        """Share of features whose nearest prototype (by inner product) is the teacher's."""
        return (losses.masked(features @ self.centroids.T, self.occupied).argmax(dim=1) == labels).float().mean()


def construct(
    features: dict[str, Tensor], teachers: list[Teacher], seed: int, back_translation: bool = True, mask_empty: bool = True, **how: Any
) -> tuple[list[Prototypes], dict[str, clustering.Clusters]]:
    """Cluster each teacher's features and carry the clusters into the space of each student it teaches.

    Internal teachers ("image", "text") teach the other tower; external ones teach both.

    Args:
        features: by name: "image" and "text" hold the students' (N, d) projected features h, other names an
            external teacher's (N, d_t) stored features, all of the same N samples.
        teachers: who teaches.
        seed: of the episode; each teacher and k draws its own from it.
        back_translation: C from PBT; False takes ``C = T``, which only internal teachers can do.
        mask_empty: keep empty clusters out of both softmaxes; False lets them compete, as the authors' code does.
        how: iterations, restarts and the like of :func:`protoclip_lab.clustering.kmeans`; ``init`` by the name of the
            clusters that it becomes.

    Returns:
        One record for each direction and k, and the clusters by ``f"{teacher}_{k}"``.
    """
    records, clusters, init = [], {}, how.pop("init", {})
    for teacher in teachers:
        for k in teacher.ks:
            name = f"{teacher.name}_{k}"
            start = {"seed": derive(seed, "clusters of", teacher.name, k), "init": init.get(name)}
            clusters[name] = found = clustering.kmeans(features[teacher.name], k, **start, **how)
            occupied = (found.sizes > 0) | (not mask_empty)
            for student in [s for s in STUDENTS if s != teacher.name]:
                centroids = clustering.back_translate(found.labels, features[student], k) if back_translation else found.centroids
                targets = losses.expected_prototypes(found.centroids, centroids, teacher.temperature, occupied=occupied)
                made = (found.labels, found.centroids, centroids, targets, occupied)
                records.append(Prototypes(student, teacher.name, *made, teacher.weight / len(teacher.ks)))
    return records, clusters


def of_modality(records: Sequence[Prototypes], modality: str) -> Tensor | None:
    """The prototypes that live among one modality's features h, (K, d), None where there are none.

    The modality's own clusters where it is a teacher; else those of the first teacher that teaches it.
    """
    own = [record.teacher_centroids for record in records if record.teacher == modality]
    return next(iter(own + [record.centroids for record in records if record.student == modality]), None)


def save(records: Sequence[Prototypes], folder: Path) -> None:
    """Write the prototypes in force into a checkpoint folder."""
    # Clones: records share labels and centroids, which safetensors refuses to write twice.
    tensors = {f"{i}/{key}": getattr(record, key).clone() for i, record in enumerate(records) for key in TENSORS}
    save_file(tensors, str(folder / "prototypes.safetensors"))
    about = [{"student": r.student, "teacher": r.teacher, "weight": r.weight} for r in records]
    (folder / "prototypes.json").write_text(json.dumps(about))


def load(checkpoint: str | Path, device: torch.device | str = "cpu") -> list[Prototypes]:
    """The prototypes in force when a checkpoint was written; none for plain CLIP."""
    tensors = {name: value.to(device) for name, value in load_file(Path(checkpoint, "prototypes.safetensors")).items()}
    about = json.loads(Path(checkpoint, "prototypes.json").read_text())
    return [Prototypes(**{key: tensors[f"{i}/{key}"] for key in TENSORS}, **named, carried=True) for i, named in enumerate(about)]
