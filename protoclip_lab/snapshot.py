"""A run seen at one checkpoint: features of a sample of pairs, and the prototypes they belong to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from protoclip_lab import clustering, encoders, evaluation, plots, prototypes, randomness, runs
from protoclip_lab.data.pairs import Pairs

# Without prototypes of its own, a model's features are clustered with this many members in the mean.
MEMBERS = 25


@dataclass
class Snapshot:
    """Features of the same pairs at one checkpoint.

    Attributes:
        run, checkpoint: what is looked at.
        pairs, rows: the table and the sampled row numbers, (n,).
        features: z and h of both modalities, (n, d) each.
        seed: of the sample and of whatever is drawn from it.
        method: how maps are made, see :func:`protoclip_lab.plots.embed`.
        labels: columns of the table with true labels.
    """

    run: runs.Run
    checkpoint: Path
    pairs: Pairs
    rows: np.ndarray
    features: encoders.Outputs
    seed: int
    method: str
    labels: Sequence[str]

    @property
    def gap(self) -> dict[str, float]:
        """:func:`protoclip_lab.evaluation.modality_gap` of the sample."""
        return evaluation.modality_gap(self.features.image, self.features.text)

    def prototypes(self, modality: str = "image") -> tuple[np.ndarray, Tensor, Tensor]:
        """Each sample's prototype in one modality, the prototypes and the features they live among.

        The modality's own clusters where it is a teacher; else those of the first teacher that teaches it; without
        any, k-means on the sample.

        Returns:
            labels (n,), centroids (K, d), features (n, d).
        """
        projected = getattr(self.features, f"{modality}_projection")
        if (centroids := prototypes.of_modality(prototypes.load(self.checkpoint), modality)) is not None:
            return clustering.nearest(projected, centroids).numpy(), centroids, projected
        found = clustering.kmeans(projected, max(1, len(self.rows) // MEMBERS), restarts=3, seed=self.seed)
        return found.labels.numpy(), found.centroids, projected

    def label(self, column: str) -> np.ndarray:
        """A column of the table for the sampled rows, (n,)."""
        return np.array(self.pairs.column(column))[self.rows]

    def joint_map(self) -> Figure:
        """Joint map of image and text features, the gap in its title."""
        both = torch.cat([self.features.image, self.features.text]).numpy()
        xy = plots.embed(both, method=self.method, seed=self.seed)
        return plots.joint_map(xy, np.arange(len(both)) >= len(self.rows), gap=self.gap["gap"], method=self.method, seed=self.seed)

    def cluster_maps(self, modality: str = "image") -> dict[str, Figure]:
        """One map of a modality's features, coloured by prototype and by each label column."""
        assigned, centroids, features = self.prototypes(modality)
        options = {"method": self.method, "seed": self.seed}
        xy = plots.embed(features.numpy(), **options)
        kind = "prototype" if prototypes.load(self.checkpoint) else "k-means cluster"
        names = [f"{kind} {i}" for i in range(len(centroids))]
        maps = {"prototypes": plots.cluster_map(xy, assigned, names=names, title=f"{modality}s by {kind}", **options)}
        maps |= {label: plots.cluster_map(xy, self.label(label), title=f"{modality}s by {label}", **options) for label in self.labels}
        return maps

    def sheet(self, prototypes: int = 6, nearest: int = 6, modality: str = "image") -> Figure:
        """The samples nearest to some prototypes, drawn at random among those with enough members."""
        assigned, centroids, features = self.prototypes(modality)
        sizes = np.bincount(assigned, minlength=len(centroids))
        large = np.flatnonzero(sizes >= min(nearest, sizes.max()))
        chosen = randomness.numpy_generator(self.seed, "sheet").permutation(large)[:prototypes]
        images, captions = [], []
        for prototype in chosen:
            members = np.flatnonzero(assigned == prototype)
            distance = (features[members] - centroids[prototype]).norm(dim=1).numpy()
            shown = self.rows[members[np.argsort(distance, kind="stable")[:nearest]]]
            images.append([self.pairs.image(row) for row in shown])
            captions.append([self.pairs.caption(row) for row in shown])
        return plots.prototype_sheet(images, captions, [f"prototype {p}\n{sizes[p]} of {len(assigned):,}" for p in chosen])


def open_snapshot(
    run: str | Path,
    *,
    checkpoint: str | Path = "",
    samples: int = 1000,
    seed: int = 0,
    method: str = "umap",
    labels: Sequence[str] = (),
    output: str | Path = "",
) -> Snapshot:
    """Encode a sample of a run's training pairs with one of its checkpoints.

    Args:
        checkpoint: a checkpoint folder; empty takes the run's latest.
        samples: number of pairs, drawn at random from ``seed``; all where the table has fewer.
        method, labels: kept for the pictures.
        output: not used here: where 04 keeps its pictures.

    Raises:
        FileNotFoundError: no such run, or it has no checkpoint yet.
    """
    run = runs.Run(run)
    checkpoint = run.checkpoint(checkpoint)
    pairs = runs.pairs_of(run)
    rows = np.sort(randomness.numpy_generator(seed, "snapshot").permutation(len(pairs))[:samples])
    return Snapshot(run, checkpoint, pairs, rows, _encode(checkpoint, pairs, rows), seed, method, labels)


def history(snapshot: Snapshot) -> pd.DataFrame:
    """Gap and grouping of the same sample at every checkpoint of its run.

    Returns:
        A row for each checkpoint: episode, gap, agreement (AMI) of image prototypes with text prototypes and with each
        label column.
    """
    rows = []
    for checkpoint in tqdm(snapshot.run.checkpoints(), desc="checkpoints", mininterval=2):
        then = snapshot
        if checkpoint != snapshot.checkpoint:
            then = replace(snapshot, checkpoint=checkpoint, features=_encode(checkpoint, snapshot.pairs, snapshot.rows))
        groups = then.prototypes("image")[0]
        row = {"episode": int(checkpoint.name.removeprefix("episode_")), "gap": then.gap["gap"]}
        row["AMI of image and text groups"] = evaluation.agreement(groups, then.prototypes("text")[0])["AMI"]
        row |= {f"AMI of image groups and {label}": evaluation.agreement(groups, then.label(label))["AMI"] for label in snapshot.labels}
        rows.append(row)
    return pd.DataFrame(rows)


def _encode(checkpoint: Path, pairs: Pairs, rows: np.ndarray) -> encoders.Outputs:
    return encoders.encode_pairs(encoders.load(checkpoint).to(encoders.best_device()), pairs, rows)
