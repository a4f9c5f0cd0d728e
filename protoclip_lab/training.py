"""The episode loop: extract, construct prototypes, learn."""

import functools
import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from open_clip.loss import ClipLoss, SigLipLoss
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from protoclip_lab import clustering, encoders, prototypes, teachers
from protoclip_lab.config import TrainConfig
from protoclip_lab.data.batches import Batches, Reader, augmentation
from protoclip_lab.data.episodes import Episodes
from protoclip_lab.data.pairs import BAD_ROWS
from protoclip_lab.encoders import Outputs, TwoTowers
from protoclip_lab.evaluation import suite
from protoclip_lab.prototypes import Prototypes, Teacher
from protoclip_lab.randomness import derive
from protoclip_lab.runs import Run, keep, pairs_of
from protoclip_lab.snapshot import Snapshot
from protoclip_lab.storage import write_json

# Pairs in the picture that `draw_every` makes.
DRAWN = 1000


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite."""


def train(config: TrainConfig | Mapping[str, Any]) -> Run:
    """Train as the config says and return the run.

    A run that is there and unfinished is resumed from its last good checkpoint, to the same result (bit for bit
    on a CPU at the same thread count); one that is finished is returned as it is.

    Raises:
        ValueError: the run folder holds a run with other settings, or data, teachers and settings do not fit.
        NonFiniteLoss: names the step, the episode and the last good checkpoint.
    """
    config = TrainConfig.model_validate(config)
    run = Run.create(config)
    if not run.finished:
        with run.locked():
            _Trainer(config, run).fit()
    return run


def learning_rate(step: int, base: float, start: int, end: int, warmup: int) -> float:
    """Linear warm-up, then cosine to 0 at ``end``; 0 outside [start, end).

    Args:
        step: optimiser steps done, from 0.
        start, end: the schedule's span in steps.
        warmup: steps of warm-up, cut to the span.
    """
    if not start <= step < end:
        return 0.0
    warmup = min(warmup, end - start)
    if step - start < warmup:
        return base * (step - start + 1) / warmup
    return base * 0.5 * (1 + math.cos(math.pi * (step - start - warmup) / (end - start - warmup)))


def parameter_groups(model: TwoTowers, weight_decay: float) -> list[dict]:
    """AdamW groups: image tower and the rest, each with and without weight decay.

    Without: fewer than two dimensions, logit scales, projection heads.
    """
    groups: dict[tuple[str, bool], list] = defaultdict(list)
    for name, parameter in model.named_parameters():
        tower = "image" if name.startswith("clip.visual.") else "rest"
        decayed = parameter.ndim >= 2 and "logit_" not in name and name.startswith("clip.")
        groups[tower, decayed].append(parameter)
    return [
        {"params": params, "tower": tower, "weight_decay": weight_decay if decayed else 0.0}
        for (tower, decayed), params in groups.items()
    ]


class _Trainer:
    def __init__(self, config: TrainConfig, run: Run) -> None:
        self.config = config
        self.run = run
        if config.threads:
            torch.set_num_threads(config.threads)
        self.accelerator = _accelerator(config)
        self.device = self.accelerator.device
        self.pairs = pairs_of(run)
        shutil.copyfile(self.pairs.folder / BAD_ROWS, run.path / BAD_ROWS)
        self.episodes = Episodes(len(self.pairs), config.episode_size, config.seed)
        self.steps = self.episodes.size // (config.batch_size * config.accumulation)
        if not self.steps:
            raise ValueError(
                f"an episode of {self.episodes.size} pairs is smaller than a step of "
                f"{config.batch_size * config.accumulation}: nothing would be learnt. Lower batch_size."
            )
        self.teachers, self.external = self._teachers()
        self.records: list[Prototypes] = []
        self.first = 1
        checkpoint = run.latest
        # A resumed run fetches no pretrained weights: its own replace them.
        fresh = {} if checkpoint is None else {"pretrained": "", "text_pretrained": False}
        model = encoders.create(config.model_copy(update=fresh))
        if checkpoint is not None:
            encoders.restore(model, checkpoint)
        vit = not hasattr(model.clip.visual, "layer1")
        betas = config.betas or ((0.9, 0.98) if vit else (0.9, 0.999))
        eps = config.eps if config.eps is not None else (1e-6 if vit else 1e-8)
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.fused = self.device.type in ("cpu", "cuda")
        model.to(self.device)
        # The layout convolutions run fastest in, on CPUs and GPUs alike.
        model.clip.visual.to(memory_format=torch.channels_last)
        groups = parameter_groups(model, config.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=tuple(betas), eps=eps, fused=self.fused)
        self.bare = model
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.alignment = SigLipLoss() if config.alignment == "siglip" else ClipLoss()
        preprocess = model.clip.visual.preprocess_cfg
        crop = augmentation(config.augmentation, preprocess["size"], preprocess["mean"], preprocess["std"])
        transforms = {"train": crop, "eval": model.eval_transform}
        batches = Batches(self.pairs, transforms, model.tokenizer, config.seed)
        self.reader = Reader(batches, workers=config.workers, pin_memory=self.device.type == "cuda")
        # Checked now: a mistyped set must not wait for the first evaluation to fail.
        self.sets = [suite.EvaluationSet.model_validate(s) for s in config.evaluation_sets]
        if checkpoint is not None:
            self._restore(checkpoint)
        run.truncate(self.first - 1)

    # --- the loop

    def fit(self) -> None:
        done, total = (self.first - 1) * self.steps, self.config.episodes * self.steps
        self.loggers = _Loggers(self.config, self.run, purge_step=done)
        self.bar = tqdm(total=total, initial=done, desc=self.run.path.name, unit="step", mininterval=1)
        try:
            for episode in range(self.first, self.config.episodes + 1):
                self._episode(episode)
        finally:
            self.bar.close()
            self.loggers.close()
        write_json(self.run.path / "finished.json", {"episodes": self.config.episodes, "steps": total})

    def _episode(self, episode: int) -> None:
        config = self.config
        ids = self.episodes.ids(episode)
        row: dict[str, Any] = {"kind": "episode", "episode": episode, "step": episode * self.steps}
        self.timer = timer = _Timer(self.device)
        lit = config.lit_start_episode is not None and episode >= config.lit_start_episode
        if lit:
            self.bare.clip.visual.requires_grad_(False)
        teaching = config.objective == "protoclip" and episode > config.infonce_warmup_episodes and not lit
        if teaching:
            if self.records and (episode - config.infonce_warmup_episodes - 1) % config.cluster_every:
                self.records = prototypes.carry(self.records)
            else:
                self.bar.set_postfix_str(f"episode {episode}: extracting")
                with timer("extract"):
                    features = self._extract(episode, ids)
                self.bar.set_postfix_str(f"episode {episode}: clustering")
                with timer("cluster"):
                    row |= self._construct(episode, features)
        with timer("learn"):
            row |= self._learn(episode, ids, self.records if teaching else [])
        if config.evaluate_every and episode % config.evaluate_every == 0:
            with timer("evaluate"):
                self._evaluate(episode)
        if config.draw_every and episode % config.draw_every == 0:
            self._draw(episode)
        seconds = timer.seconds
        row |= {f"time/{stage}": spent for stage, spent in seconds.items()}
        row["time/images_per_second"] = self.steps * config.batch_size * config.accumulation / seconds["learn"]
        row["time/share_waiting"] = seconds["wait"] / (seconds["learn"] + seconds.get("extract", 0))
        self._record(row)
        if episode % config.save_every == 0 or episode == config.episodes:
            self.run.save(episode, functools.partial(self._write, episode))

    @torch.no_grad()
    def _extract(self, episode: int, ids: np.ndarray) -> dict[str, Tensor]:
        config = self.config
        self.model.eval()
        stretches = np.split(ids, range(config.batch_size, len(ids), config.batch_size))
        image, text = [], []
        plan = {"transform": config.extraction_transform, "purpose": "extract", "episode": episode}
        for images, tokens in self._on_device(self.reader.read(stretches, **plan)):
            outputs = self.model(images, tokens)
            image.append(outputs.image_projection)
            text.append(outputs.text_projection)
        own = {"image": torch.cat(image), "text": torch.cat(text)}
        return own | {name: self._stored(name, ids) for name in self.external}

    def _construct(self, episode: int, features: dict[str, Tensor]) -> dict[str, Any]:
        config = self.config
        before = {(r.teacher, len(r.centroids)): r for r in self.records}
        self.records, clusters = prototypes.construct(
            features,
            self.teachers,
            seed=derive(config.seed, "prototypes", episode),
            iterations=config.kmeans_iterations,
            restarts=config.kmeans_restarts,
            engine=config.kmeans_engine,
            back_translation=config.back_translation,
            mask_empty=config.mask_empty,
        )
        row: dict[str, Any] = {}
        for name, found in clusters.items():
            sizes = {"smallest": found.sizes.min(), "median_size": found.sizes.median(), "largest": found.sizes.max()}
            sizes |= {"empty": (found.sizes == 0).sum(), "objective": found.objective}
            row |= {f"clusters/{name}/{key}": float(value) for key, value in sizes.items()}
            teacher, k = name.rsplit("_", 1)
            if (old := before.get((teacher, int(k)))) is not None:
                from sklearn.metrics import normalized_mutual_info_score

                # The last clustering is asked about this episode's samples, so that both speak of the same.
                then = clustering.nearest(features[teacher], old.teacher_centroids)
                nmi = normalized_mutual_info_score(found.labels.cpu(), then.cpu())
                row[f"clusters/{name}/nmi_to_previous"] = float(nmi)
        return row

    def _learn(self, episode: int, ids: np.ndarray, records: list[Prototypes]) -> dict[str, Any]:
        config = self.config
        width = config.batch_size * config.accumulation
        stretches = [ids[i * width : (i + 1) * width] for i in range(self.steps)]
        self.model.train()
        visual = self.bare.clip.visual
        if not any(p.requires_grad for p in visual.parameters()):
            visual.eval()  # locked means locked: BatchNorm statistics too
        moments = torch.zeros(2, 2, self.bare.model_cfg["embed_dim"], device=self.device)
        losses: dict[str, float] = defaultdict(float)
        reading = self.reader.read(stretches, transform="train", purpose="learn", episode=episode)
        for index, (images, tokens) in enumerate(self._on_device(reading)):
            step = (episode - 1) * self.steps + index
            rates = self._set_learning_rates(step)
            # For dropout and the like, if the towers have any.
            torch.manual_seed(derive(config.seed, "step", step))
            positions = torch.arange(index * width, (index + 1) * width, device=self.device)
            batch = _Batch(images, tokens, stretches[index], positions, step)
            outputs, parts, norm = self._step(batch, records)
            z = torch.stack([outputs.image, outputs.text]).detach()
            moments += torch.stack([z.mean(dim=1), z.square().mean(dim=1)]) / self.steps
            parts = {name: float(value) for name, value in parts.items()}
            for name, value in parts.items():
                losses[name] += value / self.steps
            self.bar.update()
            self.bar.set_postfix_str(f"episode {episode}: loss {parts['loss']:.3f}", refresh=False)
            if step % config.log_every == 0:
                row = {"kind": "step", "episode": episode, "step": step + 1, **parts, **rates}
                row |= {"grad_norm": float(norm), "scale": float(self.bare.clip.logit_scale.detach().exp())}
                if self.bare.logit_scale_proto is not None:
                    row["scale_proto"] = float(self.bare.logit_scale_proto.detach().exp())
                self._record(row)
        return losses | _spread(moments)

    def _step(self, batch: "_Batch", records: list[Prototypes]) -> tuple[Outputs, dict[str, Tensor], Tensor]:
        config = self.config
        self.optimizer.zero_grad()
        if config.accumulation == 1:
            outputs = self.model(batch.images, batch.tokens)
            loss, parts = self._losses(outputs, batch, records)
            self._check(loss, batch.step)
            self.accelerator.backward(loss)
        else:
            outputs, parts = self._accumulate(batch, records)
        parameters = [p for p in self.bare.parameters() if p.grad is not None]
        norm = self.accelerator.clip_grad_norm_(parameters, config.grad_clip or math.inf)
        if self.accelerator.scaler is None:
            # With a scaler an infinite norm is its everyday business: it skips the step and lowers the scale.
            self._check(norm, batch.step, "gradient norm")
        self.optimizer.step()
        self.bare.clamp_scales()
        return outputs, parts, norm

    def _losses(self, outputs: Outputs, batch: "_Batch", records: list[Prototypes]) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss, and its parts with prototype accuracies for the metrics."""
        config, clip = self.config, self.bare.clip
        bias = {"logit_bias": clip.logit_bias} if config.alignment == "siglip" else {}
        align = self.alignment(outputs.image, outputs.text, clip.logit_scale.exp(), **bias)
        # Alone, in warm-up and in the locked stage, the alignment loss has weight 1.
        total = config.clip_weight * align if records else align
        parts = {"loss/clip": align.detach()}
        students = {"image": outputs.image_projection, "text": outputs.text_projection}
        for record in records:
            known = None
            if record.carried:
                stored = record.teacher in self.external
                known = self._stored(record.teacher, batch.rows) if stored else students[record.teacher].detach()
            labels = record.labels_of(batch.positions, known)
            loss = record.loss(students[record.student], labels, self.bare.logit_scale_proto.exp())
            total = total + record.weight * loss
            parts[f"loss/{record.name}"] = loss.detach()
            parts[f"accuracy/{record.name}"] = record.accuracy(students[record.student].detach(), labels)
        return total, {"loss": total.detach(), **parts}

    def _accumulate(self, batch: "_Batch", records: list[Prototypes]) -> tuple[Outputs, dict[str, Tensor]]:
        """One step over several forward passes whose negatives span them all, as open_clip's ``accum_freq``.

        The loss is differentiated once with respect to cached features, and each pass is made again to carry its
        part of that gradient to the weights: exact where the forward pass is (no dropout; BatchNorm sees one
        pass at a time). Source: GradCache (arXiv 2101.06983).
        """
        passes = self.config.accumulation
        chunks = list(zip(batch.images.chunk(passes), batch.tokens.chunk(passes), strict=True))
        with torch.no_grad(), _still_statistics(self.bare):
            cached = [self.model(*chunk) for chunk in chunks]
        leaves = Outputs(*(torch.cat(parts).requires_grad_() for parts in zip(*cached, strict=True)))
        loss, parts = self._losses(leaves, batch, records)
        self._check(loss, batch.step)
        self.accelerator.backward(loss)
        # Without heads or records some features, or both names of one, take no part in the loss.
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        for chunk, *parts_of in zip(chunks, *(g.chunk(passes) for g in gradients), strict=True):
            outputs = self.model(*chunk)
            pairs = [(o, g) for o, g in zip(outputs, parts_of, strict=True) if o.requires_grad]
            torch.autograd.backward(*zip(*pairs, strict=True))
        return leaves, parts

    # --- helpers of the loop

    def _teachers(self) -> tuple[list[Teacher], dict[str, np.ndarray]]:
        config = self.config
        if config.objective != "protoclip":
            return [], {}
        found, external, ks = [], {}, config.teacher_ks()
        for name in ("image", "text"):
            if name in ks:
                found.append(Teacher(name, ks[name], config.temperature, config.proto_weight / 2))
        for name, teacher in zip(config.teacher_names(), config.teachers, strict=True):
            external[name] = teachers.load(teacher.features, self.pairs)
            found.append(Teacher(name, ks[name], teacher.temperature, teacher.weight / 2))
        too_many = max((k for teacher in found for k in teacher.ks), default=0)
        if too_many > self.episodes.size:
            raise ValueError(f"k = {too_many} is more than the {self.episodes.size} pairs of an episode")
        return found, external

    def _on_device(self, reading: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            with self.timer("wait"):
                batch = next(reading, None)
            if batch is None:
                return
            images, tokens = (part.to(self.device, non_blocking=True) for part in batch)
            yield images.contiguous(memory_format=torch.channels_last), tokens

    def _stored(self, teacher: str, rows: np.ndarray) -> Tensor:
        """External teacher features of some rows of the table."""
        return torch.from_numpy(np.asarray(self.external[teacher][rows], dtype=np.float32)).to(self.device)

    def _record(self, row: dict[str, Any]) -> None:
        self.run.append("metrics.jsonl", row)
        self.loggers.log(row)

    def _set_learning_rates(self, step: int) -> dict[str, float]:
        config = self.config
        image_end = config.lit_start_episode - 1 if config.lit_start_episode is not None else config.episodes
        image = learning_rate(step, config.lr, 0, image_end * self.steps, config.warmup_steps)
        base = config.lr if config.text_lr is None else config.text_lr
        start, end = config.text_start_episode - 1, config.text_end_episode or config.episodes
        rest = learning_rate(step, base, start * self.steps, end * self.steps, config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = image if group["tower"] == "image" else rest
        return {"lr/image": image, "lr/rest": rest}

    def _check(self, value: Tensor, step: int, what: str = "loss") -> None:
        found = float(value.detach())
        if not math.isfinite(found):
            raise NonFiniteLoss(
                f"{what} is {found} at step {step + 1} of episode {step // self.steps + 1}; last good checkpoint: "
                f"{self.run.latest or 'none yet'}. A lower lr, a longer warm-up or precision fp32 usually helps."
            )

    def _evaluate(self, episode: int) -> None:
        for row in suite.evaluate(self.bare, self.sets, seed=self.config.seed, folder=self.run.path / "sets"):
            self.run.append("evaluation.jsonl", {"episode": episode, **row})

    def _draw(self, episode: int) -> None:
        rows = np.arange(min(DRAWN, len(self.pairs)))
        features = encoders.encode_pairs(self.bare, self.pairs, rows)
        seen = Snapshot(self.run, self.run.path, self.pairs, rows, features, self.config.seed, "pca", ())
        keep(seen.joint_map(), self.run.path, f"joint_episode_{episode:04d}")

    # --- state

    def _write(self, episode: int, folder: Path) -> None:
        encoders.save(self.bare, folder)
        prototypes.save(self.records, folder)
        state = {}
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                state[f"{self.names[parameter]}/{key}"] = value.detach().cpu().contiguous().clone()
        save_file(state, str(folder / "optimizer.safetensors"))
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        write_json(folder / "trainer.json", {"episode": episode, "step": episode * self.steps, "scaler": scaler})

    def _restore(self, checkpoint: Path) -> None:
        about = json.loads((checkpoint / "trainer.json").read_text())
        self.first = about["episode"] + 1
        self.records = prototypes.load(checkpoint, self.device)
        by_name = {name: parameter for parameter, name in self.names.items()}
        for key, value in load_file(checkpoint / "optimizer.safetensors").items():
            name, slot = key.rsplit("/", 1)
            parameter = by_name[name]
            if slot == "step":
                state = value.clone().to(self.device if self.fused else "cpu")
            else:
                # Laid out as the parameter, in an allocation of its own: fused AdamW walks both side by side.
                state = torch.empty_like(parameter).copy_(value)
            self.optimizer.state[parameter][slot] = state
        if about["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(about["scaler"])


def _accelerator(config: TrainConfig) -> Accelerator:
    # accelerate keeps its state in a singleton that refuses a second run of another precision in one process.
    AcceleratorState._reset_state(reset_partial_state=True)
    precision = "no" if config.precision == "fp32" else config.precision
    accelerator = Accelerator(mixed_precision=precision, cpu=config.device == "cpu")
    found = accelerator.device.type
    if config.device not in ("auto", found):
        raise ValueError(f"device = {config.device!r} is not there; the nearest valid value is {found!r}")
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("precision = 'fp16' needs a GPU; on a CPU the nearest valid value is 'bf16'")
    return accelerator


@dataclass
class _Batch:
    """What one step learns from."""

    images: Tensor
    tokens: Tensor
    rows: np.ndarray  # of the table
    positions: Tensor  # in the episode
    step: int  # from 0


@contextmanager
def _still_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm uses batch statistics, as in training, but does not move its running ones."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _spread(moments: Tensor) -> dict[str, float]:
    """Modality gap and feature std from first and second moments of z_I and z_T, (2, 2, embed)."""
    mean, square = moments
    std = (square - mean.square()).clamp(min=0).sqrt().mean(dim=1)
    return {"gap": float((mean[0] - mean[1]).norm()), "image_std": float(std[0]), "text_std": float(std[1])}


class _Timer:
    """Seconds for each stage; on a GPU a stage ends when its work has."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self.device.type == "cuda" and stage != "wait":
            torch.cuda.synchronize()
        self.seconds[stage] += time.perf_counter() - begin


class _Loggers:
    """TensorBoard and Weights & Biases, where asked for."""

    def __init__(self, config: TrainConfig, run: Run, purge_step: int) -> None:
        self.writer = self.wandb = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=purge_step or None)
        if config.wandb:
            import wandb

            self.wandb = wandb.init(
                project=config.wandb, name=run.path.name, id=run.path.name, resume="allow", config=config.model_dump()
            )

    def log(self, row: dict[str, Any]) -> None:
        prefix = "episode/" if row["kind"] == "episode" else ""
        values = {prefix + key: value for key, value in row.items() if key not in ("kind", "step")}
        if self.writer is not None:
            for key, value in values.items():
                self.writer.add_scalar(key, value, row["step"])
        if self.wandb is not None:
            self.wandb.log(values, step=row["step"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()
