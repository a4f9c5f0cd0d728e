"""An episode's prototypes: who teaches whom, with which labels, centroids and targets."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from protoclip_lab import clustering, losses
from protoclip_lab.config import TrainConfig
from protoclip_lab.randomness import derive

STUDENTS = ("image", "text")
TENSORS = ("labels", "teacher_centroids", "centroids", "targets", "occupied")  # of Prototypes


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


def construct(features: dict[str, Tensor], config: TrainConfig, seed: int, init: dict[str, Tensor]) -> tuple[list[Prototypes], dict]:
    """Cluster each teacher's features and carry the clusters into the space of each student it teaches.

    Internal teachers ("image", "text") teach the other tower; external ones teach both.

    Args:
        features: by name: "image" and "text" hold the students' (N, d) projected features h, other names an
            external teacher's (N, d_t) stored features, all of the same N samples.
        config: who teaches and how. Half a teacher's weight is that of each direction, which is the mean over its k.
            Without ``back_translation`` ``C = T``, which only internal teachers can do; without ``mask_empty`` empty
            clusters compete in both softmaxes, as in the authors' code.
        seed: of the episode; each teacher and k draws its own from it.
        init: centroids to begin from, by the name of the clusters that they become.

    Returns:
        One record for each direction and k, and the :class:`~protoclip_lab.clustering.Clusters` by ``f"{teacher}_{k}"``.
    """
    records, clusters = [], {}
    how = {name: getattr(config, f"kmeans_{name}") for name in "iterations restarts engine tolerance balanced share_above".split()}
    for teacher in config.every_teacher():
        for k in teacher.k:
            name = f"{teacher.name}_{k}"
            start = {"seed": derive(seed, "clusters of", teacher.name, k), "init": init.get(name)}
            labels, teacher_centroids, sizes, _ = clusters[name] = clustering.kmeans(features[teacher.name], k, **start, **how)
            occupied = (sizes > 0) | (not config.mask_empty)
            for student in [s for s in STUDENTS if s != teacher.name]:
                centroids = clustering.back_translate(labels, features[student], k) if config.back_translation else teacher_centroids
                targets = losses.expected_prototypes(teacher_centroids, centroids, teacher.temperature, occupied=occupied)
                made = (labels, teacher_centroids, centroids, targets, occupied)
                records.append(Prototypes(student, teacher.name, *made, teacher.weight / 2 / len(teacher.k)))
    return records, clusters


def among(records: Sequence[Prototypes], name: str) -> Prototypes | None:
    """The prototypes that live among one teacher's or student's features, as its ``teacher_centroids``; None where none do.

    Its own clusters where it is a teacher; else those of the first teacher that teaches it. Labels are found on the fly.
    """
    own = [replace(record, carried=True) for record in records if record.teacher == name]
    taught = [replace(record, teacher_centroids=record.centroids, carried=True) for record in records if record.student == name]
    return next(iter(own + taught), None)


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
