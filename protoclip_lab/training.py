"""The episode loop: extract, construct prototypes, learn."""

import json
import logging
import math
import os
import shutil
import signal
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs, state, tracking, utils
from filelock import FileLock
from open_clip.loss import ClipLoss, SigLipLoss
from safetensors.torch import load_file, save_file
from torch import Tensor, multiprocessing, nn
from tqdm.auto import tqdm

from protoclip_lab import clustering, encoders, prototypes, teachers
from protoclip_lab.config import TrainConfig, require, require_known
from protoclip_lab.data.batches import Augmentation, Batches, Episodes, Reader
from protoclip_lab.data.pairs import BAD_ROWS, Stream
from protoclip_lab.evaluation import suite
from protoclip_lab.randomness import derive, numpy_generator
from protoclip_lab.runs import Run, checkpoint_name, keep, pairs_of, record_evaluations
from protoclip_lab.snapshot import Snapshot
from protoclip_lab.storage import reading, write_json

# Of open_clip's, at each step.
warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather is deprecated", FutureWarning)


class Interrupted(KeyboardInterrupt):
    """The training was asked to stop and has left a checkpoint."""


def train(config: TrainConfig | Mapping[str, Any], *, after_row: Callable[[Run], Any] | None = None) -> Run:
    """Train as the config says and return the run.

    A run that is there and unfinished is resumed from its last good checkpoint, to the same result (bit for bit
    on a CPU at the same thread count); one that is finished is returned as it is.

    Args:
        after_row: called with the run after each row of its metrics, to show how it goes; with ``processes``, each second.

    Raises:
        ValueError: the run folder holds a run with other settings, or data, teachers and settings do not fit.
        FloatingPointError: the loss or its gradient became NaN or infinite; names the step, the episode and the last good checkpoint.
        filelock.Timeout: another process trains this run.
        Interrupted: on SIGINT (Ctrl-C, a kernel's interrupt), once the step in progress is done and a checkpoint
            holds what was learnt; a second one stops at once, without.
    """
    config = TrainConfig.model_validate(config)
    if config.processes > 1 and "WORLD_SIZE" not in os.environ and not Path(config.run, "finished.json").exists():
        return _share_out(config, after_row)
    # accelerate keeps its state in a singleton that refuses a second run of another precision in one process.
    state.AcceleratorState._reset_state(reset_partial_state=True)
    # Processes wait for the first while it clusters, evaluates and saves; that one has died is seen by who started them.
    # On a CPU accelerate has to be told, or it leaves each process for itself.
    wait, cpu = InitProcessGroupKwargs(timeout=timedelta(hours=3)), config.device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision=config.precision.replace("fp32", "no"), cpu=cpu, kwargs_handlers=[wait])
    with accelerator.main_process_first():
        run = Run.create(config) if accelerator.is_main_process else Run(config.run)
    if not run.finished:
        lock = FileLock(run.path / "only_one_process_trains.lock", timeout=0)
        with lock if accelerator.is_main_process else nullcontext():
            _Trainer(config, run, accelerator, after_row).fit()
    return run


def _share_out(config: TrainConfig, after_row: Callable[[Run], Any] | None) -> Run:
    """Train in ``config.processes`` processes of this machine; the first that fails takes the others down."""
    run = Run.create(config)
    started = multiprocessing.start_processes(_one_of_many, (config, utils.other.get_free_port()), config.processes, join=False)
    with tqdm(total=config.episodes, desc=f"{run.path.name}, {config.processes} processes", unit="episode") as bar:
        try:
            while not started.join(timeout=1):
                if row := run.last_row():
                    bar.update(row["episode"] - (row["kind"] == "step") - bar.n)
                    if after_row:
                        after_row(run)
        except BaseException:
            for process in started.processes:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGINT)
            for process in started.processes:
                process.join()
            raise
    return run


def _one_of_many(rank: int, config: TrainConfig, port: int) -> None:
    # An interrupt reaches them by the process that started them, once.
    os.setsid()
    torch.set_num_threads(max(1, torch.get_num_threads() // config.processes))
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": config.processes, "LOCAL_WORLD_SIZE": config.processes}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": torch.get_num_threads()}
    os.environ |= {name: str(value) for name, value in place.items()}
    train(config)


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


def parameter_groups(model: encoders.TwoTowers, weight_decay: float) -> list[dict]:
    """AdamW groups: image tower and the rest, each with and without weight decay.

    Without: fewer than two dimensions, logit scales, projection heads.
    """
    groups: dict[tuple[str, float], list] = defaultdict(list)
    for name, parameter in model.named_parameters():
        tower = "image" if name.startswith("clip.visual.") else "rest"
        decayed = parameter.ndim >= 2 and "logit_" not in name and name.startswith("clip.")
        groups[tower, weight_decay if decayed else 0.0].append(parameter)
    return [{"params": own, "tower": tower, "weight_decay": decay} for (tower, decay), own in groups.items()]


class _Trainer:
    def __init__(self, config: TrainConfig, run: Run, accelerator: Accelerator, after_row: Callable[[Run], Any] | None) -> None:
        self.config, self.run, self.accelerator, self.after_row = config, run, accelerator, after_row
        self.main, self.rank, self.processes = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = accelerator.device
        require_known(config.device, ("auto", self.device.type), f"device = {config.device!r} is not there")
        require(config.precision != "fp16" or self.device.type != "cpu", "precision = 'fp16' needs a GPU; on a CPU take 'bf16'")
        require(not config.batch_size % self.processes, f"{self.processes} processes cannot share batch_size = {config.batch_size}")
        self.teachers = config.every_teacher() if config.objective == "protoclip" else []
        self.stream = Stream(config, run.path) if config.stream else None
        if not self.stream:
            self._open()
            if self.main:
                shutil.copyfile(self.pairs.folder / BAD_ROWS, run.path / BAD_ROWS)
        # A streamed episode is all there is, learnt in an order of its own.
        self.episodes = Episodes(config.episode_size if self.stream else len(self.pairs), config.episode_size, config.seed)
        size, self.width = self.episodes.size, config.batch_size * config.accumulation
        require(size >= self.width, f"an episode of {size} pairs is smaller than a step of {self.width}: lower batch_size")
        self.steps, rolling = size // self.width, config.prototypes == "rolling"
        self.rows = self.steps * self.width if rolling else size  # pairs of an episode that are clustered
        for k in [k for teacher in self.teachers for k in teacher.k]:
            require(k <= self.rows, f"k = {k} is more than the {self.rows} pairs of an episode that are clustered")
        self.records: list[prototypes.Prototypes] = []
        # Rolling prototypes are made of h_I and h_T as the steps of the episode before left them here.
        kept = prototypes.STUDENTS if self.teachers and rolling else ()
        self.buffer = {name: torch.zeros(self.rows, config.projection_dim, device=self.device) for name in kept}
        self.unread: list[tuple[dict[str, Any], dict[str, Tensor]]] = []  # metrics of steps that are still on the device
        # Steps done in all; the next one when this process was asked to stop, and when all know it.
        self.step, self.asked, self.interrupted, checkpoint = 0, 0, 0, run.latest
        # A resumed run takes towers, transform and tokenizer from its checkpoint, and fetches no pretrained weights.
        own = {} if checkpoint is None else {"model": f"local-dir:{checkpoint}", "pretrained": "", "text_model": ""}
        self.bare = model = encoders.create(config.model_copy(update=own))
        # The layout convolutions run fastest in, on CPUs and GPUs alike.
        model.to(self.device).clip.visual.to(memory_format=torch.channels_last)
        if config.grad_checkpointing:
            model.clip.set_grad_checkpointing()
        if self.processes > 1 and config.sync_batchnorm and self.device.type == "cuda":
            model = self.bare = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif self.processes > 1 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) and self.main:
            logging.getLogger(__name__).warning("each of the %d processes has BatchNorm statistics of its own", self.processes)
        betas, eps = ((0.9, 0.999), 1e-8) if hasattr(model.clip.visual, "layer1") else ((0.9, 0.98), 1e-6)
        optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=0.0, fused=True, betas=betas, eps=eps)
        # Not wrapped in DistributedDataParallel, which refuses what heads make and no loss asks for, as in warm-up: see _average.
        self.model = accelerator.prepare_model(model, evaluation_mode=True)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.scaler = accelerator.scaler or torch.amp.GradScaler(enabled=False)
        if config.compile:
            self.model.compile()
        world = {"rank": self.rank, "world_size": self.processes}
        clip_loss = ClipLoss(config.local_loss, config.gather_with_grad, **world)
        self.alignment = SigLipLoss(**world, dist_impl="gather") if config.alignment == "siglip" else clip_loss
        self.crop = Augmentation(config.augmentation, *(model.clip.visual.preprocess_cfg[key] for key in ("size", "mean", "std")))
        transforms = {"train": self.crop, "eval": model.eval_transform}
        # Read more than once: in several visits, or for extraction and learning.
        again = {"visits": config.visits, "cache": 256 if config.visits > 1 or (self.teachers and not rolling) else 0}
        batches = Batches(run.path if config.stream else self.pairs, transforms, model.tokenizer, config.seed, **again)
        self.reader = Reader(batches, workers=config.workers, pin_memory=self.device.type == "cuda")
        # Checked now: a mistyped set must not wait for the first evaluation to fail.
        self.sets = [suite.EvaluationSet.model_validate(s) for s in config.evaluation_sets]
        self._begin()
        if checkpoint is not None:
            with reading(checkpoint, "Delete it, and the one before is taken"):
                self._restore(checkpoint)
        if self.main:
            run.truncate(self.step, checkpoint.name if checkpoint else "")

    # --- the loop

    def fit(self) -> None:
        config, name = self.config, self.run.path.name
        total = config.episodes * self.steps
        trackers = [tracking.TensorBoardTracker("tensorboard", self.run.path, purge_step=self.step + 1)] if config.tensorboard else []
        if config.wandb:
            trackers.append(tracking.WandBTracker(config.wandb, name=name, id=name, resume="allow", config=config.model_dump()))
        self.accelerator.log_with = trackers
        self.accelerator.init_trackers(name)
        if config.tensorboard:
            # Written when TensorBoard sees fit: accelerate would at every step, which costs a twentieth of the time.
            self.accelerator.get_tracker("tensorboard", unwrap=True).flush = lambda: None
        before = signal.signal(signal.SIGINT, self._interrupt)
        hidden = not self.main or config.processes > 1  # who started several processes has a bar of its own
        with tqdm(total=total, initial=self.step, desc=name, unit="step", mininterval=1, disable=hidden) as self.bar:
            try:
                while self.step < total:
                    self._episode(self.step // self.steps + 1)
            except Interrupted:
                self._flush()
                if self.step:  # there already, at an episode's end: which each process would have to see alike
                    self._save(checkpoint_name(*divmod(self.step, self.steps)))
                raise
            finally:
                signal.signal(signal.SIGINT, before)
                # Not end_training: an error is told first, and only then the other processes lose this one.
                for tracker in trackers:
                    tracker.finish()
        if self.main:
            write_json(self.run.path / "finished.json", {"episodes": config.episodes, "steps": total})

    def _interrupt(self, signum: int, frame: Any) -> None:
        """Stop after the step in progress; asked again, at once."""
        if self.asked:
            raise KeyboardInterrupt(signum)
        self.asked = self.step + 1
        self.interrupted = self.interrupted or self.asked * (self.processes == 1)

    def _begin(self) -> None:
        """What an episode adds up, while none of its steps is done: its row of the metrics, and moments."""
        self.row: dict[str, float] = defaultdict(float)
        # First and second moments of z_I and z_T, for the modality gap and the features' spread.
        self.moments = torch.zeros(2, 2, self.bare.model_cfg["embed_dim"], device=self.device)

    def _episode(self, episode: int) -> None:
        config = self.config
        drawn, visit = divmod(episode - 1, config.visits)
        if self.stream:
            with self._timed("fetch"):
                self._open(drawn + 1)
        ids = self.episodes.ids(drawn + 1)[: self.rows]
        # Visited again, the same pairs come in other batches.
        order = numpy_generator(config.seed, "visit", episode).permutation(self.rows) if visit else np.arange(self.rows)
        # Of each pair in the order it is learnt: its row of the table, and its place among what is clustered.
        self.ids, self.places = ids[order], torch.from_numpy(order).to(self.device)
        # On the device once an episode: a step that fetched its own would wait for them.
        own = {"dtype": torch.float32, "device": self.device}
        self.outside = {name: torch.as_tensor(table[ids], **own) for name, table in self.external.items()}
        if episode >= (config.lit_start_episode or math.inf):
            self.bare.clip.visual.requires_grad_(False)
        teaching = self._teaching(episode)
        # Not where rolling prototypes are there, or this episode was interrupted after its own were made.
        if teaching and not (self.records and self.buffer) and not self.step % self.steps:
            with self._timed("extract"):
                features = self._extract(episode, ids)
            with self._timed("cluster"):
                self._construct(features)
        # Those made of other pairs find labels on the fly.
        self.records = [replace(record, carried=bool(self.buffer) and not visit) for record in self.records]
        with self._timed("learn"):
            self._learn(episode, teaching)
        if self.buffer and self._teaching(episode + 1):
            with self._timed("cluster"):
                self._construct(self.buffer | self.outside)
        if self.main and config.evaluate_every and episode % config.evaluate_every == 0:
            with self._timed("evaluate"):
                rows = suite.evaluate(self.bare, self.sets, records=self.records, seed=config.seed, folder=self.run.path)
                record_evaluations(self.run.path, [{"checkpoint": checkpoint_name(episode), **found} for found in rows])
        if self.main and config.draw_every and episode % config.draw_every == 0:
            self._draw(episode)
        mean, square = self.moments
        std = (square - mean.square()).clamp(min=0).sqrt().mean(dim=1)
        spread = {"gap": float((mean[0] - mean[1]).norm()), "image_std": float(std[0]), "text_std": float(std[1])}
        spread["time/images_per_second"] = self.steps * self.width / self.row["time/learn"]
        spread["time/share_waiting"] = waited = self.row["time/wait"] / (self.row["time/learn"] + self.row.get("time/extract", 0))
        if self.main and waited > 0.2:
            self.bar.write(f"{waited:.0%} of episode {episode} was waiting for images: more workers (now {config.workers}) would help")
        self._record({"kind": "episode", "episode": episode, "step": self.step, **self.row, **spread})
        self._begin()
        if episode % config.save_every == 0 or episode == config.episodes:
            self._save(checkpoint_name(episode))

    def _teaching(self, episode: int) -> bool:
        """Whether prototypes teach in an episode."""
        return bool(self.teachers) and self.config.infonce_warmup_episodes < episode < (self.config.lit_start_episode or math.inf)

    @torch.no_grad()
    def _extract(self, episode: int, ids: np.ndarray) -> dict[str, Tensor]:
        self.model.eval()
        utils.broadcast([*self.bare.buffers()])  # BatchNorm's statistics, which a resumed run has of the first process alone
        # Each process takes an equal part; some of the first pairs fill up the last, and go again.
        own = np.resize(ids, (self.processes, -(-len(ids) // self.processes)))[self.rank]
        size = self.config.batch_size // self.processes
        stretches = np.split(own, range(size, len(own), size))
        batches = self._read(stretches, transform=self.config.extraction_transform, purpose="extract", episode=episode)
        found, lower = [], self.config.extraction_precision == "bf16"
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=lower):
                found.append(self.model(*batch)[2:])  # of the four outputs the last two, h_I and h_T
        image, text = (self.accelerator.gather(torch.cat(parts))[: len(ids)] for parts in zip(*found, strict=True))
        return {"image": image, "text": text} | self.outside

    def _construct(self, features: dict[str, Tensor]) -> None:
        config = self.config
        before = {f"{r.teacher}_{len(r.centroids)}": r for r in self.records}
        init = {name: record.teacher_centroids for name, record in before.items() if config.kmeans_warm_start}
        self.records, clusters = prototypes.construct(features, config, derive(config.seed, "prototypes", self.step), init)
        for name, found in clusters.items():
            sizes = {"smallest": found.sizes.min(), "median_size": found.sizes.median(), "largest": found.sizes.max()}
            sizes |= {"empty": (found.sizes == 0).sum(), "objective": found.objective}
            self.row |= {f"clusters/{name}/{key}": float(value) for key, value in sizes.items()}
            if (old := before.get(name)) is not None:
                from sklearn.metrics import normalized_mutual_info_score

                # The last clustering is asked about this episode's samples, so that both speak of the same.
                then = clustering.nearest(features[old.teacher], old.teacher_centroids)
                self.row[f"clusters/{name}/nmi_to_previous"] = normalized_mutual_info_score(found.labels.cpu(), then.cpu())
                if config.kmeans_warm_start:
                    # The k-th centroid came from the k-th.
                    self.row[f"clusters/{name}/drift"] = float((found.centroids - old.teacher_centroids).norm(dim=1).mean())

    def _learn(self, episode: int, teaching: bool) -> None:
        self.model.train()
        # Locked means locked: BatchNorm statistics too.
        self.bare.clip.visual.train(any(parameter.requires_grad for parameter in self.bare.clip.visual.parameters()))
        # Of each forward pass of a step, the process's own part.
        shape = self.steps, self.config.accumulation, self.processes, -1
        own = np.arange(self.steps * self.width).reshape(shape)[:, :, self.rank].reshape(self.steps, -1)[self.step % self.steps :]
        batches = self._read([*self.ids[own]], transform="train", purpose="learn", episode=episode)
        for part, (images, tokens) in zip(torch.from_numpy(own).to(self.device), batches, strict=True):
            step = self.step
            rates = self._set_learning_rates(step)
            # For dropout and the like, if the towers have any; in each process another.
            torch.manual_seed(derive(self.config.seed, "step", step + self.rank * self.steps * self.config.episodes))
            outputs, parts = self._backward(images, tokens, part, self.records if teaching else [])
            self._average()
            # Without grad_clip too: the norm is a metric.
            parts["grad_norm"] = self.accelerator.clip_grad_norm_(self.bare.parameters(), self.config.grad_clip or math.inf)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.bare.clamp_scales()
            z = torch.stack([outputs.image, outputs.text]).detach()
            self.moments += torch.stack([z.mean(dim=1), z.square().mean(dim=1)]) / self.steps
            logs = {"scale": self.bare.clip.logit_scale, "scale_proto": self.bare.logit_scale_proto}
            parts |= {name: log.detach().exp() for name, log in logs.items() if log is not None}
            self.step += 1
            self.unread.append(({"kind": "step", "episode": episode, "step": self.step, **rates}, parts))
            if step % self.config.log_every == 0:
                self._record(self._flush())
            self.bar.update()
            for name, kept in self.buffer.items():
                feature = getattr(outputs, f"{name}_projection").detach()
                kept[self.accelerator.gather(self.places[part])] = self.accelerator.gather(feature)
        self._flush()

    def _flush(self) -> dict[str, Any]:
        """Read the metrics of the steps since the last reading, in one go: each reading waits for the device.

        Returns:
            The last step's.
        """
        row: dict[str, Any] = {}
        # Of all processes; what is the same in all stays as it is.
        self.moments = self.accelerator.reduce(self.moments, "mean")
        if self.processes > 1 and self.accelerator.reduce(torch.tensor(float(self.asked), device=self.device)) > 0:
            self.interrupted = self.step
        values = [torch.stack([*parts.values()]) for _, parts in self.unread]
        values = self.accelerator.reduce(torch.stack(values), "mean").tolist() if values else []
        for (about, parts), found in zip(self.unread, values, strict=True):
            row = about | dict(zip(parts, found, strict=True))
            # With a scaler an infinite norm is its everyday business: it skips the step and lowers the scale.
            if not math.isfinite(row["loss"] + (0 if self.scaler.is_enabled() else row["grad_norm"])):
                found = f"loss is {row['loss']}, gradient norm is {row['grad_norm']} at step {row['step']} of episode {row['episode']}"
                raise FloatingPointError(f"{found}: take a lower lr; last good checkpoint: {self.run.latest or 'none yet'}")
            for name in parts:
                self.row[name] += row[name] / self.steps
            self.bar.set_postfix_str(f"episode {row['episode']}: loss {row['loss']:.3f}", refresh=False)
        self.unread.clear()
        return row

    def _backward(self, images: Tensor, tokens: Tensor, part: Tensor, records: list) -> tuple[encoders.Outputs, dict[str, Tensor]]:
        """Gradient of one step's total loss; for the metrics the loss's parts and prototype accuracies.

        In one pass or in several whose negatives span them all, as open_clip's ``accum_freq``: then each keeps its features
        alone and is made again when the gradient gets to it, exact where the forward pass is (BatchNorm sees one pass at a time).
        """
        config, clip, passes = self.config, self.bare.clip, self.config.accumulation
        forward = partial(torch.utils.checkpoint.checkpoint, self.model, use_reentrant=False) if passes > 1 else self.model
        made = [forward(*chunk) for chunk in zip(images.chunk(passes), tokens.chunk(passes), strict=True)]
        outputs = encoders.Outputs(*map(torch.cat, zip(*made, strict=True)))
        # BatchNorm's running statistics move in the first pass; not when it is made again.
        buffers = {buffer: buffer.clone() for buffer in self.bare.buffers()} if passes > 1 else {}
        bias = {"logit_bias": clip.logit_bias} if config.alignment == "siglip" else {}
        align = self.alignment(outputs.image, outputs.text, clip.logit_scale.exp(), **bias)
        # Alone, in warm-up and in the locked stage, the alignment loss has weight 1.
        total = config.clip_weight * align if records else align
        parts = {"loss/clip": align.detach()}
        places, students = self.places[part], {"image": outputs.image_projection, "text": outputs.text_projection}
        known = {name: feature.detach() for name, feature in students.items()}
        known |= {name: found[places] for name, found in self.outside.items()}
        for record in records:
            labels = record.labels_of(places, known[record.teacher])
            loss = record.loss(students[record.student], labels, self.bare.logit_scale_proto.exp())
            total = total + record.weight * loss
            parts[f"loss/{record.name}"] = loss.detach()
            parts[f"accuracy/{record.name}"] = record.accuracy(known[record.student], labels)
        self.accelerator.backward(total)
        for buffer, value in buffers.items():
            buffer.copy_(value)
        return outputs, {"loss": total.detach(), **parts}

    # --- helpers of the loop

    def _open(self, number: int = 0) -> None:
        """The table's pairs, or those of a streamed episode, and their features of external teachers."""
        # One process fetches and makes what is missing; the others then find it there.
        with self.accelerator.main_process_first():
            self.pairs = self.stream.open(number) if self.stream else pairs_of(self.run)
            external = [teacher for teacher in self.teachers if teacher.name not in prototypes.STUDENTS]
            self.external = {teacher.name: teachers.of(teacher.features, self.pairs) for teacher in external}

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Show a stage and count its seconds; on a GPU it ends when its work has."""
        self.bar.set_postfix_str(stage)
        begin = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.row[f"time/{stage}"] += time.perf_counter() - begin

    def _read(self, rows: list[np.ndarray], **plan: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and tokens of these rows on the device, the time spent waiting for them counted."""
        reading = self.reader.read(rows, **plan)
        for _ in rows:
            # Not between clustering and the first step: the checkpoint would hold half of what the episode starts from.
            if self.interrupted and (self.step % self.steps or self.step >= self.interrupted or plan["purpose"] == "extract"):
                raise Interrupted(f"after step {self.step}; nothing is lost, the same call goes on from there")
            begin = time.perf_counter()
            batch = next(reading)
            self.row["time/wait"] += time.perf_counter() - begin
            images, tokens = (part.to(self.device, non_blocking=True) for part in batch[:2])
            yield self.crop.finish(images, batch[2]).contiguous(memory_format=torch.channels_last), tokens

    def _average(self) -> None:
        """The mean gradient over the processes, in one message."""
        if self.processes > 1:
            gradients = [p.grad for p in self.bare.parameters() if p.grad is not None]
            mean = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
            for gradient, values in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
                gradient.copy_(values.view_as(gradient))

    def _record(self, row: dict[str, Any]) -> None:
        if self.main:
            self.run.append("metrics.jsonl", row)
            prefix = "episode/" if row["kind"] == "episode" else ""
            self.accelerator.log({prefix + key: value for key, value in row.items() if key not in ("kind", "step")}, step=row["step"])
            if self.after_row:
                self.after_row(self.run)

    def _set_learning_rates(self, step: int) -> dict[str, float]:
        config = self.config
        image_end = config.lit_start_episode - 1 if config.lit_start_episode else config.episodes
        image = learning_rate(step, config.lr, 0, image_end * self.steps, config.warmup_steps)
        base = config.lr if config.text_lr is None else config.text_lr
        start, end = config.text_start_episode - 1, config.text_end_episode or config.episodes
        rest = learning_rate(step, base, start * self.steps, end * self.steps, config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = image if group["tower"] == "image" else rest
        return {"lr/image": image, "lr/rest": rest}

    def _draw(self, episode: int) -> None:
        # A thousand pairs show where the modalities lie.
        rows = np.arange(min(1000, len(self.pairs)))
        features = encoders.encode_pairs(self.bare, self.pairs, rows)
        seen = Snapshot(self.run, self.run.path, self.pairs, rows, features, self.config.seed, "pca", ())
        keep(seen.joint_map(), self.run.path, f"joint_episode_{episode:04d}")

    # --- state

    def _save(self, name: str) -> None:
        if self.main:
            self.run.save(name, self._write)
        self.accelerator.wait_for_everyone()

    def _write(self, folder: Path) -> None:
        encoders.save(self.bare, folder)
        prototypes.save(self.records, folder)
        save_file({"moments": self.moments, **self.buffer}, folder / "trainer.safetensors")
        slots = {name: self.optimizer.state.get(value, {}) for name, value in self.bare.named_parameters()}
        tensors = {f"{name}/{key}": value.detach().cpu().contiguous() for name, slot in slots.items() for key, value in slot.items()}
        save_file(tensors, str(folder / "optimizer.safetensors"))
        about = {"step": self.step, "row": self.row, "scaler": self.scaler.state_dict()}
        write_json(folder / "trainer.json", about | {"starts": self.stream and self.stream.starts})

    def _restore(self, checkpoint: Path) -> None:
        about = json.loads((checkpoint / "trainer.json").read_text())
        self.step = about["step"]
        self.row.update(about["row"])
        if self.stream:
            self.stream.starts = about["starts"]
        self.buffer = {name: value.to(self.device) for name, value in load_file(checkpoint / "trainer.safetensors").items()}
        self.moments = self.buffer.pop("moments")
        self.records = prototypes.load(checkpoint, self.device)
        encoders.restore(self.bare, checkpoint)
        for key, value in load_file(checkpoint / "optimizer.safetensors").items():
            name, slot = key.rsplit("/", 1)
            parameter = self.bare.get_parameter(name)
            # Laid out as the parameter, in an allocation of its own: fused AdamW walks both side by side.
            like = value.to(self.device) if slot == "step" else parameter
            self.optimizer.state[parameter][slot] = torch.empty_like(like).copy_(value)
        self.scaler.load_state_dict(about["scaler"])
