"""Two towers from open_clip with projection heads: made, run over data, saved and loaded."""

import copy
import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import safetensors.torch
import torch
from accelerate.utils import send_to_device
from open_clip.push_to_hf_hub import save_config_for_hf
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from protoclip_lab.config import TrainConfig, require, require_known
from protoclip_lab.data.batches import Batches
from protoclip_lab.data.pairs import Pairs
from protoclip_lab.randomness import derive

WEIGHTS = "open_clip_model.safetensors"
HEADS = "heads.safetensors"
# Our own small configurations, known to open_clip by name.
open_clip.add_model_config(Path(__file__).parent / "model_configs")
# open_clip warns, through the root logger, of random weights, which are what was asked for.
logging.root.addFilter(lambda record: not str(record.msg).endswith(("initialized randomly.", "initialized partially.")))


class Outputs(NamedTuple):
    """What the towers and heads make of a batch; None for what was not asked for. All L2-normalised, float32."""

    image: Tensor | None  # z_I (B, embed)
    text: Tensor | None  # z_T (B, embed)
    image_projection: Tensor | None  # h_I (B, projection_dim)
    text_projection: Tensor | None  # h_T (B, projection_dim)


class TwoTowers(nn.Module):
    """An open_clip model with a projection head on each tower and the prototype loss's own scale.

    Attributes:
        clip: the open_clip model; saved so that open_clip loads it as is.
        image_head, text_head: heads on the towers' outputs before normalisation; None without prototypes,
            and then h is z.
        logit_scale_proto: log of the inverse temperature of the prototype loss.
        tokenizer: captions -> (B, context_length) int64.
        eval_transform: PIL image -> (3, H, W) float32.
    """

    def __init__(self, clip: nn.Module, model_cfg: dict, tokenizer: Callable, heads: dict | None) -> None:
        super().__init__()
        self.clip, self.model_cfg, self.tokenizer, self.head_cfg = clip, model_cfg, tokenizer, heads
        self.eval_transform = image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)
        self.image_head = projection_head(**heads) if heads else None
        # Both heads start from the same weights: the two spaces begin comparable.
        self.text_head = copy.deepcopy(self.image_head)
        self.logit_scale_proto = nn.Parameter(torch.tensor(math.log(1 / 0.07))) if heads else None

    def forward(self, images: Tensor | None = None, tokens: Tensor | None = None) -> Outputs:
        """Images (B, 3, H, W) float32 and tokens (B, L) int64 -> :class:`Outputs`."""
        z_image, h_image = (None, None) if images is None else _features(self.clip.encode_image(images), self.image_head)
        z_text, h_text = (None, None) if tokens is None else _features(self.clip.encode_text(tokens), self.text_head)
        return Outputs(z_image, z_text, h_image, h_text)

    def clamp_scales(self) -> None:
        """Keep exp(scale) in [1, 100], after each step."""
        for scale in (self.clip.logit_scale, self.logit_scale_proto):
            if scale is not None:
                scale.data.clamp_(0, math.log(100))


def _features(embedding: Tensor, head: nn.Module | None) -> tuple[Tensor, Tensor]:
    z = nn.functional.normalize(embedding.float(), dim=-1)
    return z, z if head is None else nn.functional.normalize(head(embedding).float(), dim=-1)


def projection_head(width: int, hidden: int, out: int, depth: int) -> nn.Sequential:
    """Linear → BatchNorm → ReLU, ``depth`` times, then Linear: (B, width) -> (B, out). Depth 0 is one Linear."""
    widths = [width, *[hidden] * depth]
    layers = [layer for before in widths[:-1] for layer in (nn.Linear(before, hidden), nn.BatchNorm1d(hidden), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], out))


def create(config: TrainConfig) -> TwoTowers:
    """The model of a training run at its start: random or pretrained towers, fresh heads, drawn from the run's seed.

    Raises:
        ValueError: unknown model or pretrained tag (the nearest name is given).
        AssertionError: an image tower that cannot be partly locked.
    """
    cfg = open_clip.get_model_config(config.model)
    if cfg is None:
        require_known(config.model, open_clip.list_models(), f"model {config.model!r} is not known to open_clip")
    if config.pretrained and not Path(config.pretrained).exists():
        tags = open_clip.list_pretrained_tags_by_model(config.model) or ["none"]
        require_known(config.pretrained, tags, f"pretrained {config.pretrained!r} is no file, and open_clip has none of that name")
    cfg["vision_cfg"] |= {"image_size": config.image_size} if config.image_size else {}
    tokenizer = partial(open_clip.get_tokenizer, config.model)
    if config.text_model:
        name = str(Path(config.text_model).absolute()) if Path(config.text_model).is_dir() else config.text_model
        text = {"hf_model_name": name, "hf_tokenizer_name": name, "hf_pooler_type": "mean_pooler", "context_length": 77}
        cfg |= {"text_cfg": {**text, "hf_model_pretrained": True}, "custom_text": True}
        tokenizer = partial(open_clip.tokenizer.HFTokenizer, name)
    cfg["text_cfg"] |= {"context_length": config.context_length} if config.context_length else {}
    cfg |= {"init_logit_scale": math.log(10), "init_logit_bias": -10.0} if config.alignment == "siglip" else {}
    with torch.random.fork_rng():
        torch.manual_seed(derive(config.seed, "weights"))
        clip = _create_clip(config.model, config.pretrained if config.pretrained_towers == "both" else None, **cfg)
        if config.pretrained and config.pretrained_towers == "image":
            whole = open_clip.get_model_config(config.model) | {"vision_cfg": cfg["vision_cfg"]}
            clip.visual.load_state_dict(_create_clip(config.model, config.pretrained, **whole).visual.state_dict())
        sizes = {"hidden": config.projection_hidden, "out": config.projection_dim, "depth": config.projection_depth}
        heads = {"width": cfg["embed_dim"], **sizes} if config.objective == "protoclip" else None
        model = TwoTowers(clip, cfg, tokenizer(context_length=cfg["text_cfg"].get("context_length")), heads)
    if config.lock_image:
        clip.lock_image_tower(unlocked_groups=config.lock_image_unlocked_groups, freeze_bn_stats=True)
    return model


def save(model: TwoTowers, folder: Path) -> None:
    """Write towers (as open_clip reads them), tokenizer and heads into ``folder``; :func:`load` reads them back."""
    save_config_for_hf(model.clip, folder / "open_clip_config.json", model.model_cfg)
    safetensors.torch.save_model(model.clip, str(folder / WEIGHTS))
    if "hf_model_name" in model.model_cfg["text_cfg"]:
        # open_clip looks for a Hugging Face tokenizer in the checkpoint's own folder.
        model.tokenizer.tokenizer.save_pretrained(folder)
        model.clip.text.config.save_pretrained(folder)
    (folder / "heads.json").write_text(json.dumps({"heads": model.head_cfg}))
    if model.head_cfg:
        heads = {name: value for name, value in model.state_dict().items() if not name.startswith("clip.")}
        safetensors.torch.save_file(heads, folder / HEADS)


def best_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(path: str | Path) -> TwoTowers:
    """A checkpoint -> the model with towers and heads, in eval mode on the CPU; without heads h is z.

    Args:
        path: a checkpoint folder, ours or any that open_clip's ``local-dir:`` reads; ``open_clip:NAME/TAG`` with a
            pretrained tag or weights file of open_clip, such as "open_clip:RN50/openai"; or a ``.pt`` file of the
            ProtoCLIP authors' code, which :func:`save` cannot write again.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: an unknown open_clip name or tag (the nearest is named), or a ``.pt`` file of something else.
    """
    if str(path).startswith("open_clip:"):
        name, _, tag = str(path).removeprefix("open_clip:").partition("/")
        require(tag, f"{path} names no weights: write open_clip:NAME/TAG")
        if open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"):
            name = name.removesuffix("-quickgelu") + "-quickgelu"  # the same towers with the weights' own activation
        return create(TrainConfig(model=name, pretrained=tag, objective="clip")).eval()
    folder = Path(path)
    if folder.suffix == ".pt" and folder.is_file():
        return _load_authors(folder)
    plain = create(TrainConfig(model=f"local-dir:{folder}", objective="clip"))
    about = folder / "heads.json"
    heads = json.loads(about.read_text())["heads"] if about.exists() else None
    model = TwoTowers(plain.clip, plain.model_cfg, plain.tokenizer, heads).eval()
    restore(model, folder)
    return model


def fingerprint(model: TwoTowers) -> str:
    """SHA-256 over weights, configuration and image preprocessing: equal ones give equal features."""
    about = json.dumps([model.model_cfg, model.clip.visual.preprocess_cfg], sort_keys=True, default=str)
    weights = {name: value.clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}
    return hashlib.sha256(about.encode() + safetensors.torch.save(weights)).hexdigest()


def restore(model: TwoTowers, folder: Path) -> None:
    """Put a checkpoint's heads and their scale into a model whose towers were made from it, ``local-dir:<folder>``."""
    if model.head_cfg:
        model.load_state_dict(model.clip.state_dict(prefix="clip.") | safetensors.torch.load_file(folder / HEADS))


def encode_images(model: TwoTowers, images: Sequence, *, batch_size: int = 256, workers: int = 0) -> Outputs:
    """Image features z_I and h_I of an indexable of PIL images, (N, d) float32 on the CPU, in eval mode.

    The features of an image that cannot be read are NaN; a warning is logged that names it.
    """
    return _encode(model, "images", range(len(images)), partial(_transformed, images, model.eval_transform), batch_size, workers)


def encode_texts(model: TwoTowers, captions: Sequence[str], *, batch_size: int = 256) -> Tensor:
    """Text features z_T of captions, (N, embed) float32 on the CPU, in eval mode."""
    return _encode(model, "captions", captions, lambda texts: (None, model.tokenizer(texts)), batch_size).text


def encode_pairs(model: TwoTowers, pairs: Pairs, rows: np.ndarray, *, batch_size: int = 256) -> Outputs:
    """All four features of some rows of a table, (n, d) float32 on the CPU, under the eval transform."""
    batches = Batches(pairs, {"eval": model.eval_transform}, model.tokenizer, seed=0)
    return _encode(model, "pairs", rows, lambda part: batches["eval", "encode", 0, part][:2], batch_size)


@torch.no_grad()
def _encode(model: TwoTowers, what: str, rows: Sequence, read: Callable, size: int, workers: int = 0) -> Outputs:
    """Features of rows that ``read`` makes into images and tokens, batch by batch; None for what is not asked for."""
    # With a generator of its own: the loader would draw from the global one.
    loader = torch.utils.data.DataLoader(rows, size, num_workers=workers, collate_fn=read, generator=torch.Generator())
    bar = tqdm(loader, desc=f"encoding {what}", delay=2, mininterval=2, leave=False)
    # A model in training may carry accelerate's autocast: what it is measured by must not depend on that.
    forward = getattr(model, "_original_forward", model)
    model.eval()
    found = [send_to_device(forward(*send_to_device(batch, model.clip.logit_scale.device)), "cpu") for batch in bar]
    return Outputs(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*found, strict=True)))


def _transformed(images: Sequence[Image.Image], transform: Callable, rows: Sequence[int]) -> tuple[Tensor, None]:
    def read(row: int) -> Tensor:
        try:
            return transform(images[row])
        except OSError as error:
            logging.getLogger(__name__).warning("%s", error)
            return torch.full_like(transform(Image.new("RGB", (8, 8))), torch.nan)

    return torch.stack([read(row) for row in rows]), None


def _load_authors(file: Path) -> TwoTowers:
    """A checkpoint of the ProtoCLIP authors' training code, which is open_clip 1.2 with heads."""
    # Their optimizer's state holds NumPy float64 scalars, whose module has moved since.
    names = [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    with torch.serialization.safe_globals([*names, np.dtype, type(np.dtype(np.float64))]):
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        except Exception as error:  # it may hold anything; without torch's advice to unpickle it all the same
            raise ValueError(f"{file} is no checkpoint of the ProtoCLIP authors' code ({type(error).__name__})") from None
    state = {name.removeprefix("module.").replace("_projection_head", "_head"): value for name, value in found.items()}
    require("positional_embedding" in state, f"{file} is no checkpoint of the ProtoCLIP authors' code: it has no towers of CLIP")
    own = {name: value for name, value in state.items() if name.startswith(("image_head", "text_head", "logit_scale_proto"))}
    towers = {name: value for name, value in state.items() if name not in own}
    # open_clip's reader of OpenAI's weights, which bear the same names, with QuickGELU as theirs. It halves the precision.
    clip = open_clip.model.build_model_from_openai_state_dict(dict(towers), cast_dtype=torch.float32).float()
    clip.visual.preprocess_cfg = vars(PreprocessCfg(size=clip.visual.image_size))
    # Linear layers of the head; BatchNorms between them have weights of one dimension.
    dense = [w for name, w in own.items() if name.startswith("image_head") and w.ndim == 2]
    heads = {"width": dense[0].shape[1], "hidden": len(dense[0]), "out": len(dense[-1]), "depth": len(dense) - 1} if dense else None
    model = TwoTowers(clip, {}, open_clip.SimpleTokenizer(context_length=clip.context_length), heads).eval()
    model.load_state_dict({f"clip.{name}": value for name, value in towers.items()} | own)
    return model


def _create_clip(name: str, pretrained: str | None, *, custom_text: bool = False, **cfg: Any) -> nn.Module:
    if pretrained and Path(pretrained).is_dir():
        pretrained = str(Path(pretrained) / WEIGHTS)
    # The whole configuration goes in as overrides: what is saved is then what was built.
    try:
        return open_clip.create_model(name, pretrained, require_pretrained=":" in name, force_custom_text=custom_text, **cfg)
    except Exception as error:  # a file may hold anything; without torch's advice to unpickle it all the same
        file, why = (pretrained or name).removeprefix("local-dir:"), str(error).partition(". ")[0]
        require(isinstance(error, OSError) or not Path(file).exists(), f"{file} holds no weights of {name}: {why}. Name another")
        raise
