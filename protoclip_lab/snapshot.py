"""A run seen at one checkpoint: features of a sample of pairs, and the prototypes they belong to."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from protoclip_lab import clustering, encoders, evaluation, losses, plots, prototypes, randomness, runs, teachers
from protoclip_lab.config import require
from protoclip_lab.data.pairs import Pairs

# Without prototypes of its own, a model's features are clustered with this many members in the mean.
MEMBERS = 25
MOMENTS = 9  # checkpoints looked at through training
# What typical words are not. The lists that come with libraries hold "top", "side" and "bottom" too.
FUNCTION_WORDS = "an and are as at by for from in is it its of on or that the this to with".split()


@dataclass(eq=False)
class Snapshot:
    """Features of the same pairs at one checkpoint.

    Attributes:
        run, checkpoint: what is looked at.
        pairs, rows: the table and the sampled row numbers, (n,).
        features: z and h of both modalities, (n, d) each.
        seed: of the sample and of whatever is drawn from it.
        method: how maps are made, see :func:`protoclip_lab.plots.embed`.
        labels: columns of the table with true labels.
        paper: figures are for a column of a paper.
    """

    run: runs.Run
    checkpoint: Path
    pairs: Pairs
    rows: np.ndarray
    features: encoders.Outputs
    seed: int
    method: str = "umap"
    labels: Sequence[str] = ()
    paper: bool = False

    def __post_init__(self) -> None:
        self._look = {"method": self.method, "seed": self.seed, "paper": self.paper}

    def gap(self) -> dict[str, float]:
        """:func:`protoclip_lab.evaluation.modality_gap` of the sample."""
        return evaluation.modality_gap(self.features.image, self.features.text)

    @cached_property
    def records(self) -> list[prototypes.Prototypes]:
        """The prototypes in force at the checkpoint; none for plain CLIP."""
        return prototypes.load(self.checkpoint)

    def through(self) -> dict[str, "Snapshot"]:
        """The same sample at up to ``MOMENTS`` checkpoints of the run, evenly chosen, and this one: oldest first, by name."""
        found, known = self.run.checkpoints(), {self.checkpoint.name: self}
        chosen = [found[i] for i in np.unique(np.linspace(0, len(found) - 1, MOMENTS).round().astype(int))]
        for checkpoint in tqdm([c for c in chosen if c.name not in known], desc="checkpoints", mininterval=2):
            known[checkpoint.name] = replace(self, checkpoint=checkpoint, features=_encode(checkpoint, self.pairs, self.rows))
        return {re.sub(r"_0*(?=\d)|_", " ", name): then for name, then in sorted(known.items())}

    @lru_cache(8)  # noqa: B019
    def prototypes(self, of: str = "image") -> tuple[np.ndarray, Tensor, Tensor]:
        """Each sample's prototype, the prototypes and the features they live among.

        A modality's own clusters where it is a teacher; else those of the first teacher that teaches it; without
        any, k-means on the sample.

        Args:
            of: "image", "text" or the name of an external teacher.

        Returns:
            labels (n,), centroids (K, d), features (n, d).
        """
        if of in prototypes.STUDENTS:
            features = getattr(self.features, f"{of}_projection")
        else:
            stored = next(teacher.features for teacher in self.run.config.every_teacher() if teacher.name == of)
            features = torch.from_numpy(teachers.of(stored, self.pairs)[self.rows])
        if record := prototypes.among(self.records, of):
            # The nearest occupied one: the place of an empty cluster means nothing.
            labels, centroids = record.labels_of(slice(None), features), record.teacher_centroids
        else:
            labels, centroids, *_ = clustering.kmeans(features, max(1, len(self.rows) // MEMBERS), restarts=3, seed=self.seed)
        return labels.numpy(), centroids, features

    def label(self, column: str) -> np.ndarray:
        """A column of the table for the sampled rows, (n,)."""
        return np.array(["" if value is None else value for value in self.pairs.column(column)])[self.rows]

    def groupings(self) -> dict[str, np.ndarray]:
        """The sample's groupings, (n,) each: image and text prototypes, external teachers' clusters, label columns."""
        names = dict.fromkeys([*prototypes.STUDENTS, *(record.teacher for record in self.records)])
        return {name: self.prototypes(name)[0] for name in names} | {column: self.label(column) for column in self.labels}

    @cached_property
    def agreement(self) -> pd.DataFrame:
        """AMI of each two of the groupings."""
        from sklearn.metrics import adjusted_mutual_info_score

        return pd.DataFrame({name: pd.factorize(found)[0] for name, found in self.groupings().items()}).corr(adjusted_mutual_info_score)

    def overlap(self) -> pd.DataFrame:
        """Samples shared by image and text clusters; the text clusters in the order of the image cluster that holds most of each."""
        labels = [self.prototypes(name)[0] for name in prototypes.STUDENTS]
        table = pd.crosstab(*labels, rownames=["image cluster"], colnames=["text cluster"])
        return table.iloc[:, table.to_numpy().argmax(axis=0).argsort(kind="stable")]

    def sizes(self) -> dict[str, np.ndarray]:
        """Members of each cluster in its episode, by teacher; without teachers, of the k-means clusters in the sample."""
        found = {f"{r.teacher} {len(r.centroids)}": np.bincount(r.labels, minlength=len(r.centroids)) for r in self.records}
        return found or {name: np.bincount(self.prototypes(name)[0]) for name in prototypes.STUDENTS}

    def xy(self, modality: str = "image") -> np.ndarray:
        """The map of a modality's features h, (n, 2) float32; "joint" maps z of images, then of texts, (2n, 2).

        Kept in the run's ``maps/``, by features, method and seed.
        """
        both = torch.cat([self.features.image, self.features.text])
        features = (both if modality == "joint" else getattr(self.features, f"{modality}_projection")).numpy()
        key = hashlib.sha256(features.tobytes() + f"{self.method} {self.seed}".encode()).hexdigest()[:16]
        kept = self.run.path / "maps" / f"{key}.npy"
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            partial = kept.with_suffix(".partial.npy")
            np.save(partial, plots.embed(features, method=self.method, seed=self.seed))
            partial.replace(kept)
        return np.load(kept, allow_pickle=False)

    def names(self, of: str = "image") -> list[str]:
        """What each of K prototypes is called: its number and the words typical of its captions in the sample."""
        assigned, centroids, _ = self.prototypes(of)
        words = typical_words([self.pairs.caption(row) for row in self.rows], assigned, len(centroids))
        return [f"{i} · {found}" if found else str(i) for i, found in enumerate(words)]

    def colourings(self, modality: str = "image") -> dict[str, np.ndarray]:
        """By what a modality's samples can be told apart, each (n,): prototype, label columns, disagreement with each.

        A sample disagrees where its label is not the commonest of its prototype.
        """
        assigned = self.prototypes(modality)[0]
        found = {"prototype": np.array(self.names(modality))[assigned]}
        for column in self.labels:
            label = pd.Series(self.label(column))
            commonest = label.groupby(assigned).transform(lambda members: members.mode()[0])
            found |= {column: label.to_numpy(), f"disagreement with {column}": np.where(label == commonest, "agrees", "disagrees")}
        return found

    def joint_map(self) -> plots.Figure:
        """Joint map of image and text features, the gap between their means."""
        return plots.joint_map(*np.split(self.xy("joint"), 2), self.gap()["gap"], **self._look)

    def cluster_maps(self, modality: str = "image") -> dict[str, plots.Figure]:
        """Maps of a modality's features: one coloured by prototype, and for each label column one by it and by disagreement."""
        xy, colours = self.xy(modality), self.colourings(modality)
        title = f"{modality}s by {'prototype' if self.records else 'k-means cluster'}"
        made = {"prototypes": plots.cluster_map({title: (xy, colours["prototype"])}, **self._look)}
        for label in self.labels:
            made[label] = plots.cluster_map({name: (xy, colours[name]) for name in (label, f"disagreement with {label}")}, **self._look)
        return made

    def maps_through(self) -> tuple[plots.Figure, plots.Animation]:
        """The images' maps at the moments of :meth:`through`, each resembling the next: side by side, and as an animation.

        Coloured by the label column that agrees best with the prototypes, else by prototype.
        """
        maps: dict[str, np.ndarray] = {}
        for moment, then in reversed(self.through().items()):
            how = {"method": self.method, "seed": self.seed, "like": next(iter(maps.values()), None)}
            maps = {moment: plots.embed(then.features.image_projection.numpy(), **how)} | maps
        by = max(self.labels, key=lambda label: self.agreement.loc["image", label], default="image")
        labels, how = self.groupings()[by], self._look | {"title": f"Images through training, coloured by {by}"}
        return plots.cluster_map({name: (xy, labels) for name, xy in maps.items()}, **how), plots.moving_map(maps, labels, **how)

    def sheet(self, count: int = 6, nearest: int = 4, modality: str = "image") -> plots.Figure:
        """Some prototypes, drawn at random among those with enough members: nearest samples, words, size, purity, twin.

        The twin is the prototype back-translated into the other modality: there stand the samples nearest to it.
        """
        (assigned, centroids, features), names = self.prototypes(modality), self.names(modality)
        sizes, nearest = np.bincount(assigned, minlength=len(centroids)), min(nearest, 2) if self.paper else nearest
        nearest = min(nearest, sizes.max())
        own, other = prototypes.among(self.records, modality), {"image": "text", "text": "image"}[modality]
        twin = next((r.centroids for r in self.records if (r.teacher, r.student) == (own.teacher, other)), None)
        headings = {f"nearest {modality}s": 0} | ({} if twin is None else {f"{other}s nearest to its twin": nearest})
        rows = []
        for chosen in randomness.numpy_generator(self.seed, "sheet").permutation(np.flatnonzero(sizes >= nearest))[:count]:
            members = np.flatnonzero(assigned == chosen)
            shown = [*members[by_distance(features[members], centroids[chosen])][:nearest]]
            if twin is not None:
                shown += [*by_distance(self.prototypes(other)[2], twin[chosen])[:nearest]]
            images, captions = zip(*(self.pairs[self.rows[i]] for i in shown), strict=True)
            shares = [pd.Series(self.label(label)[members]).value_counts(normalize=True) for label in self.labels]
            purity = [f"{share.iloc[0]:.0%} {share.index[0]}" for share in shares]
            rows.append((images, captions, "\n".join([names[chosen], f"{sizes[chosen]} of {len(assigned):,}", *purity])))
        return plots.prototype_sheet(*zip(*rows, strict=True), headings=headings, paper=self.paper)

    def soft_targets(self, samples: int = 6) -> plots.Figure:
        """For some samples, the soft target of the images' first teacher, and what the image feature makes of it.

        Raises:
            ValueError: nobody teaches the images at this checkpoint.
        """
        record = next((record for record in self.records if record.student == "image"), None)
        require(record, f"there are no prototypes at {self.checkpoint}")
        chosen = randomness.numpy_generator(self.seed, "soft").permutation(len(self.rows))[:samples]
        temperature = next(t.temperature for t in self.run.config.every_teacher() if t.name == record.teacher)
        T, C, y = record.teacher_centroids, record.centroids, torch.from_numpy(self.prototypes(record.teacher)[0][chosen])
        scale = encoders.load(self.checkpoint).logit_scale_proto.exp().item()
        p = losses.masked(T[y] @ T.T / temperature, record.occupied).softmax(1) if temperature > 0 else nn.functional.one_hot(y, len(T))
        q = losses.masked(scale * self.features.image_projection[chosen] @ C.T, record.occupied).softmax(1)
        captions = [self.pairs.caption(row) for row in self.rows[chosen]]
        title = f"Teacher: {record.teacher} (τ = {temperature:g}) · student: image (scale {scale:.1f})"
        return plots.soft_targets(captions, self.names(record.teacher), p.numpy(), q.numpy(), title=title, paper=self.paper)


def open_snapshot(run: str | Path, *, checkpoint: str | Path = "", samples: int = 1000, seed: int = 0, output="", **look) -> Snapshot:
    """Encode a sample of a run's training pairs with one of its checkpoints.

    Args:
        checkpoint: a checkpoint folder; empty takes the run's latest.
        samples: number of pairs, drawn at random from ``seed``, of each value of the first label column its share; all
            where the table has fewer.
        output: not used here: where 04 keeps its pictures.
        look: method, labels and paper of :class:`Snapshot`, for the pictures.

    Raises:
        FileNotFoundError: no such run, or it has no checkpoint yet.
    """
    run = runs.Run(run)
    checkpoint, pairs = run.checkpoint(checkpoint), runs.pairs_of(run)
    order = randomness.numpy_generator(seed, "snapshot").permutation(len(pairs))
    for label in look.get("labels", ())[:1]:
        order = order[pd.Categorical(pairs.column(label)).codes[order].argsort(kind="stable")]
    rows = np.sort(order[np.linspace(0, len(pairs) - 1, min(samples, len(pairs))).astype(int)])
    return Snapshot(run, checkpoint, pairs, rows, _encode(checkpoint, pairs, rows), seed, **look)


def typical_words(captions: Sequence[str], labels: Sequence[int], k: int, words: int = 3) -> list[str]:
    """The words most typical of each group's captions, by class-based TF-IDF: k strings, empty for an empty group.

    ``W[c, t] = tf[c, t] · log(1 + A / f[t])``: tf counts word t in group c, f[t] in all captions, A is the mean number of
    words in a group that has any. ``FUNCTION_WORDS`` and words of one letter are left out.

    Source: Grootendorst, "BERTopic" (arXiv 2203.05794).
    """
    found = [re.findall(r"\b\w\w+\b", caption.lower()) for caption in captions]
    table = pd.DataFrame({"group": labels, "word": found}).explode("word")
    counts = table[~table["word"].isin(FUNCTION_WORDS)].groupby(["group", "word"]).size()
    length = counts.groupby("group").sum().mean()
    weights = counts * np.log1p(length / counts.groupby("word").transform("sum"))
    typical = weights.sort_values(ascending=False, kind="stable").groupby("group").head(words).reset_index()
    return typical.groupby("group")["word"].agg(" ".join).reindex(range(k), fill_value="").tolist()


def _encode(checkpoint: Path, pairs: Pairs, rows: np.ndarray) -> encoders.Outputs:
    return encoders.encode_pairs(encoders.load(checkpoint).to(encoders.best_device()), pairs, rows)


def by_distance(features: Tensor, centroid: Tensor) -> np.ndarray:
    """Rows of features by their distance to a centroid."""
    return (features - centroid).norm(dim=1).argsort(stable=True).numpy()
