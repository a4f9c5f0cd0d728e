"""TrainConfig: every setting of a training, its meaning and its bounds."""

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, model_validator


def nearest_name(name: str, names: Iterable[str]) -> str:
    """The one of ``names`` spelt most like ``name``."""
    return max(names, key=lambda other: difflib.SequenceMatcher(None, str(name).lower(), str(other).lower()).ratio())


def require(holds: Any, message: str) -> None:
    """Raise ValueError with this message unless it holds."""
    if not holds:
        raise ValueError(message)


def require_known(name: str, names: Collection[str], message: str) -> None:
    """Raise ValueError with this message and the nearest of ``names`` unless ``name`` is one of them."""
    if name not in names:
        raise ValueError(f"{message}; the nearest valid name is {nearest_name(name, names)!r}")


class Settings(BaseModel, extra="forbid", allow_inf_nan=False, protected_namespaces=()):
    """A pydantic model whose errors name the nearest valid setting or value."""

    @model_validator(mode="before")
    @classmethod
    def _name_the_nearest(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            require_known(name, cls.model_fields, f"unknown setting {name!r} of {cls.__name__}")
            field = cls.model_fields[name]
            require(not isinstance(value, bool) or field.annotation is bool, f"{name} = {value} is no value of this setting")
            if get_origin(field.annotation) is Literal and isinstance(value, str):
                require_known(value, get_args(field.annotation), f"{name} = {value!r} is not in {list(get_args(field.annotation))}")
            for bound in field.metadata if isinstance(value, int | float) else ():
                near = min(max(getattr(bound, "ge", -math.inf), value), getattr(bound, "le", math.inf))
                require(near == value, f"{name} = {value} is out of range; the nearest valid value is {near}")
        return given


class TeacherConfig(Settings):
    """An external teacher: where its features are from, and how it teaches."""

    features: str = Field(description=".npy made by 02 for the same table, a column of vectors, or a text model as in 02")
    name: str = Field("", description="name in metrics; empty takes the file's folder and stem")
    weight: float = Field(1.0, ge=0, description="weight of its two directions together")
    temperature: float = Field(-1.0, description="softmax temperature of its soft targets; 0 or less is one-hot")
    k: int | list[int] | None = Field(None, description="its number of prototypes; None takes the run's k")


class TrainConfig(Settings):
    """Every setting of a training run. Unknown or out-of-range ones raise, naming the nearest valid one."""

    # --- run
    run: str = Field("runs/default", description="run folder; an unfinished run there is resumed")
    seed: int = Field(0, ge=0, description="every draw of the run derives from it")
    objective: Literal["protoclip", "clip"] = Field("protoclip", description="clip trains by the alignment loss alone")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where to train")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast precision of the towers")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch and faiss; None leaves torch's choice")
    workers: int = Field(1, ge=0, description="processes that read and augment images")
    processes: int = Field(1, ge=1, description="of this machine, which share each batch; torchrun brings its own")
    compile: bool = Field(False, description="torch.compile the towers; takes a minute, see reports/LOG.md")

    # --- data
    stream: bool = Field(False, description="read shards or hub as a stream: an episode is its next pairs, held while it lasts")
    table: str = Field("shapes", description="TSV, CSV, Parquet, shards, hf://datasets/NAME or made by 01; shapes draws its own")
    image_root: str = Field("", description="folder or tar of the images; empty takes the folder of the table")
    image_column: str = Field("filepath", description="column of image paths, or of images")
    caption_column: str = Field("title", description="column of captions")
    where: dict[str, Any] = Field(default_factory=dict, description="column to value; only these rows are taken")
    dataset_size: int | None = Field(None, ge=1, description="keep the first so many pairs; None keeps all")
    max_bad_share: float = Field(0.05, ge=0, le=1, description="stop above this share of unusable rows")
    augmentation: Literal["plain", "light"] = Field("light", description="plain crops little, light also jitters")

    # --- model
    model: str = Field("RN-mini", description="open_clip model name, or local-dir:<folder>")
    pretrained: str = Field("", description="open_clip tag, weights file or checkpoint folder; empty starts at random")
    pretrained_towers: Literal["both", "image"] = Field("both", description="which towers take the pretrained weights")
    image_size: int | None = Field(None, ge=16, description="pixels; None takes the model's own")
    context_length: int | None = Field(None, ge=4, description="tokens; None takes the model's own")
    text_model: str = Field("", description="Hugging Face text tower, hub name or folder; empty takes the model's own")
    projection_dim: int = Field(128, ge=1, description="width of the features that are clustered")
    projection_hidden: int = Field(2048, ge=1, description="hidden width of the projection heads")
    projection_depth: int = Field(1, ge=0, description="hidden layers of the projection heads; 0 is one Linear")
    lock_image: bool = Field(False, description="freeze the image tower from the start")
    lock_image_unlocked_groups: int = Field(0, ge=0, description="last groups of a locked image tower that still learn")

    # --- episodes
    episodes: int = Field(8, ge=1, description="number of episodes")
    episode_size: int | None = Field(3000, ge=1, description="pairs in an episode; None takes the whole table")
    visits: int = Field(1, ge=1, description="episodes in a row that learn the same pairs")
    infonce_warmup_episodes: int = Field(1, ge=0, description="first episodes by the alignment loss alone")
    lit_start_episode: int | None = Field(None, ge=1, description="from here on image tower locked, alignment alone")

    # --- losses
    alignment: Literal["infonce", "siglip"] = Field("infonce", description="loss between images and texts")
    clip_weight: float = Field(1.0, ge=0, description="weight of the alignment loss beside prototypes")
    proto_weight: float = Field(1.0, ge=0, description="weight of the two internal teachers together")
    teachers: list[TeacherConfig] = Field(default_factory=list, description="external teachers, each a dict")
    temperature: float = Field(0.01, description="softmax temperature of the internal teachers; 0 or less is one-hot")

    # --- prototypes
    prototypes: Literal["episode", "rolling"] = Field("episode", description="rolling needs no extraction pass")
    k: int | list[int] = Field(200, description="number of prototypes, or a list of numbers")
    kmeans_iterations: int = Field(20, ge=1, description="Lloyd iterations")
    kmeans_restarts: int = Field(3, ge=1, description="independent starts of which the best is kept")
    kmeans_engine: Literal["auto", "faiss", "torch"] = Field("auto", description="who computes k-means")
    kmeans_warm_start: bool = Field(False, description="begin from the last centroids, with one start")
    kmeans_share_above: int = Field(10**8, ge=0, description="pairs times k from which processes share a clustering")
    kmeans_tolerance: float = Field(0.0, ge=0, le=1, description="stop when an iteration gains less (torch, faiss 1.15)")
    kmeans_balanced: bool = Field(False, description="clusters of about one size, by Sinkhorn; labels on the fly are the nearest")
    back_translation: bool = Field(True, description="carry clusters into the student's space by PBT")
    mask_empty: bool = Field(True, description="keep empty clusters out of both softmaxes; False is the authors' way")
    extraction_transform: Literal["train", "eval"] = Field("train", description="image transform of the extraction")
    extraction_precision: Literal["as_trained", "bf16"] = Field("as_trained", description="autocast of the extraction")

    # --- optimisation
    batch_size: int = Field(64, ge=2, description="pairs in a forward pass, of all processes together")
    accumulation: int = Field(1, ge=1, description="forward passes in a step; the alignment loss spans all of them")
    lr: float = Field(1e-3, ge=0, description="base learning rate")
    warmup_steps: int = Field(50, ge=0, description="steps of linear warm-up")
    text_lr: float | None = Field(None, ge=0, description="base lr of all but the image tower; None takes lr")
    text_start_episode: int = Field(1, ge=1, description="first episode in which all but the image tower learns")
    text_end_episode: int | None = Field(None, ge=1, description="episode at whose end its rate is 0; None is the last")
    weight_decay: float = Field(0.1, ge=0, description="AdamW weight decay of matrices")
    grad_checkpointing: bool = Field(False, description="make activations again in the backward pass: less memory")
    sync_batchnorm: bool = Field(True, description="BatchNorm statistics over all processes; on GPUs")
    local_loss: bool = Field(False, description="each process compares its own samples with all, not all with all")
    gather_with_grad: bool = Field(True, description="gradient through features gathered from other processes")
    grad_clip: float = Field(10.0, ge=0, description="largest gradient norm; 0 does not clip")

    # --- watching
    save_every: int = Field(1, ge=1, description="episodes between checkpoints")
    evaluate_every: int = Field(0, ge=0, description="episodes between evaluations; 0 never")
    evaluation_sets: list[dict[str, Any]] = Field(default_factory=list, description="sets to evaluate on, each a dict")
    draw_every: int = Field(0, ge=0, description="episodes between drawings of the features; 0 never")
    log_every: int = Field(1, ge=1, description="steps between rows of metrics.jsonl")
    tensorboard: bool = Field(True, description="write TensorBoard files into the run folder")
    wandb: str = Field("", description="Weights & Biases project to log to; empty does not")

    @model_validator(mode="after")
    def _settings_fit_together(self) -> "TrainConfig":
        clip = self.objective == "clip"
        size, lit, end = (value or math.inf for value in (self.episode_size, self.lit_start_episode, self.text_end_episode))
        for k in [t.k for t in self.every_teacher()]:
            require(clip or max([*k, 1]) <= size, f"k = {k} is more than episode_size; the nearest valid value is {size}")
            require(k and min(k) > 0, f"k = {k} is out of range; the nearest valid value is {[max(1, x) for x in k] or [1]}")
        require(not self.stream or (self.episode_size and not self.dataset_size), "stream needs episode_size, and no dataset_size")
        require(self.back_translation or not self.teachers, "external teachers need back_translation: they know another space")
        require(clip or lit > self.infonce_warmup_episodes, f"lit_start_episode = {lit} leaves no episode for prototypes")
        require(self.text_start_episode <= end, f"text_end_episode = {end} lies before text_start_episode")
        require(self.evaluation_sets or not self.evaluate_every, "evaluate_every is set but evaluation_sets is empty: name some")
        names = [t.name for t in self.every_teacher() if t.features not in ("image", "text")]
        require(len({*names, "image", "text"}) == len(names) + 2, f"teacher names {names} must differ, and not be 'image' or 'text'")
        return self

    def every_teacher(self) -> list[TeacherConfig]:
        """The teachers "image" and "text" (with a positive proto_weight) and the external ones; each with its name, and k a list."""
        internal, found = ("image", "text") if self.proto_weight > 0 else (), []
        own = {"weight": self.proto_weight, "temperature": self.temperature}
        for t in [*(TeacherConfig(features=name, name=name, **own) for name in internal), *self.teachers]:
            path, k = Path(t.features), self.k if t.k is None else t.k
            path = path.resolve() if path.exists() else path  # it may name a model
            name = t.name or f"{path.parent.name}_{path.stem}".strip("_")
            found.append(t.model_copy(update={"name": name, "k": k if isinstance(k, list) else [k]}))
        return found


def call(function: Callable, namespace: dict[str, Any], *passed_to: Callable) -> Any:
    """Call ``function`` with a notebook's own variables; papermill itself only warns of unknown names.

    These are what its parameters cell and papermill have set, no imports, none of IPython's. Run again in a live
    notebook, only what was there the first time may be mistyped: the rest was made by later cells.

    Args:
        passed_to: functions that take what ``function`` does not name itself.

    Raises:
        ValueError: a variable is no argument of the function; the nearest one is named.
    """
    known = [name for taker in (function, *passed_to) for name in inspect.signature(taker).parameters]
    own = {name: value for name, value in namespace.items() if not name.startswith("_") and name not in ("In", "Out")}
    own = {name: value for name, value in own.items() if not callable(value) and not inspect.ismodule(value)}
    given = namespace.setdefault("_given", set(own))
    settings = {name: value for name, value in own.items() if name in known or name in given}
    for name in settings:
        require_known(name, known, f"unknown parameter {name!r}")
    return function(**settings)
