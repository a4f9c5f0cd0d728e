"""Two towers from open_clip with projection heads: made, run over data, saved and loaded."""

import copy
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.push_to_hf_hub import save_config_for_hf
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from tqdm.auto import tqdm

from protoclip_lab.config import TrainConfig, nearest_name
from protoclip_lab.data.batches import Batches
from protoclip_lab.data.pairs import Pairs
from protoclip_lab.randomness import derive

WEIGHTS = "open_clip_model.safetensors"
HEADS = "heads.safetensors"
# Our own small configurations, known to open_clip by name.
open_clip.add_model_config(Path(__file__).parent / "model_configs")

log = logging.getLogger(__name__)


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
        self.clip = clip
        self.model_cfg = model_cfg
        self.tokenizer = tokenizer
        self.eval_transform = image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)
        self.head_cfg = heads
        self.image_head = projection_head(**heads) if heads else None
        # Both heads start from the same weights: the two spaces begin comparable.
        self.text_head = copy.deepcopy(self.image_head)
        self.logit_scale_proto = nn.Parameter(torch.tensor(math.log(1 / 0.07))) if heads else None

    def forward(self, images: Tensor | None = None, tokens: Tensor | None = None) -> Outputs:
        """Images (B, 3, H, W) float32 and tokens (B, L) int64 -> :class:`Outputs`."""
        z_image, h_image = (None, None) if images is None else self._features(self.clip.encode_image(images), self.image_head)
        z_text, h_text = (None, None) if tokens is None else self._features(self.clip.encode_text(tokens), self.text_head)
        return Outputs(z_image, z_text, h_image, h_text)

    @staticmethod
    def _features(embedding: Tensor, head: nn.Module | None) -> tuple[Tensor, Tensor]:
        z = F.normalize(embedding.float(), dim=-1)
        return z, z if head is None else F.normalize(head(embedding).float(), dim=-1)

    def clamp_scales(self) -> None:
        """Keep exp(scale) in [1, 100], after each step."""
        with torch.no_grad():
            for scale in (self.clip.logit_scale, self.logit_scale_proto):
                if scale is not None:
                    scale.clamp_(0, math.log(100))


def projection_head(width: int, hidden: int, out: int, depth: int) -> nn.Sequential:
    """Linear → BatchNorm → ReLU, ``depth`` times, then Linear: (B, width) -> (B, out). Depth 0 is one Linear."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, out))


def create(config: TrainConfig) -> TwoTowers:
    """The model of a training run at its start: random or pretrained towers, fresh heads, drawn from the run's seed.

    Raises:
        ValueError: unknown model (the nearest name is given), or an image tower that cannot be partly locked.
    """
    cfg = open_clip.get_model_config(config.model)
    if cfg is None:
        near = nearest_name(config.model, open_clip.list_models())
        raise ValueError(f"model {config.model!r} is not known to open_clip; the nearest name is {near!r}")
    if config.image_size:
        cfg["vision_cfg"]["image_size"] = config.image_size
    if config.text_model:
        name = str(Path(config.text_model).absolute()) if Path(config.text_model).is_dir() else config.text_model
        text = {"hf_model_name": name, "hf_tokenizer_name": name, "hf_pooler_type": "mean_pooler", "context_length": 77}
        cfg |= {"text_cfg": {**text, "hf_model_pretrained": config.text_pretrained}, "custom_text": True}
    if config.context_length:
        cfg["text_cfg"]["context_length"] = config.context_length
    if config.alignment == "siglip":
        cfg |= {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
    with torch.random.fork_rng():
        torch.manual_seed(derive(config.seed, "weights"))
        clip = _create_clip(config.model, cfg, config.pretrained if config.pretrained_towers == "both" else None)
        if config.pretrained and config.pretrained_towers == "image":
            whole = open_clip.get_model_config(config.model) | {"vision_cfg": cfg["vision_cfg"]}
            clip.visual.load_state_dict(_create_clip(config.model, whole, config.pretrained).visual.state_dict())
        sizes = {"hidden": config.projection_hidden, "out": config.projection_dim, "depth": config.projection_depth}
        heads = {"width": cfg["embed_dim"], **sizes} if config.objective == "protoclip" else None
        model = TwoTowers(clip, cfg, _tokenizer(cfg, config.model), heads)
    if config.lock_image:
        groups = config.lock_image_unlocked_groups
        if groups and isinstance(clip.visual, open_clip.modified_resnet.ModifiedResNet):
            raise ValueError(f"lock_image_unlocked_groups = {groups}: {config.model!r} can be locked only as a whole; take 0, or a ViT")
        clip.lock_image_tower(unlocked_groups=groups, freeze_bn_stats=config.lock_image_freeze_bn)
    return model


def save(model: TwoTowers, folder: Path) -> None:
    """Write towers (as open_clip reads them), tokenizer and heads into ``folder``; :func:`load` reads them back."""
    save_config_for_hf(model.clip, folder / "open_clip_config.json", model.model_cfg)
    save_model(model.clip, str(folder / WEIGHTS))
    if "hf_model_name" in model.model_cfg["text_cfg"]:
        # open_clip looks for a Hugging Face tokenizer in the checkpoint's own folder.
        model.tokenizer.tokenizer.save_pretrained(folder)
        model.clip.text.config.save_pretrained(folder)
    (folder / "heads.json").write_text(json.dumps({"heads": model.head_cfg}))
    if model.head_cfg:
        heads = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if not k.startswith("clip.")}
        save_file(heads, str(folder / HEADS))


def best_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(path: str | Path) -> TwoTowers:
    """A checkpoint -> the model with towers and heads, in eval mode on the CPU; without heads h is z.

    Args:
        path: a checkpoint folder, ours or any that open_clip's ``local-dir:`` reads; ``open_clip:NAME/TAG`` with a
            pretrained tag or weights file of open_clip, such as "open_clip:RN50/openai"; or a ``.pt`` file of the
            ProtoCLIP authors' code.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: an unknown open_clip name or tag (the nearest is named), or a ``.pt`` file with other content.
    """
    if str(path).startswith("open_clip:"):
        return _load_pretrained(*str(path).removeprefix("open_clip:").partition("/")[::2])
    folder = Path(path)
    if folder.suffix == ".pt" and folder.is_file():
        try:
            return _load_authors(folder)
        except Exception as error:  # the file may hold anything
            # Without torch's advice to unpickle it all the same.
            why = " ".join(line for line in str(error).splitlines() if line and "weights_only" not in line)[:300]
            what = f"no checkpoint of the ProtoCLIP authors' code with CLIP's own towers: {type(error).__name__}: {why}"
            raise ValueError(f"{folder} is {what}") from error
    if not (folder / "open_clip_config.json").exists():
        raise FileNotFoundError(f"{folder.absolute()} is not a checkpoint folder: it has no open_clip_config.json")
    cfg = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    about = folder / "heads.json"
    heads = json.loads(about.read_text())["heads"] if about.exists() else None
    return _load_heads(_assemble(f"local-dir:{folder}", cfg, heads), folder)


def fingerprint(model: TwoTowers) -> str:
    """SHA-256 over weights, configuration and image preprocessing: equal ones give equal features."""
    digest = hashlib.sha256(json.dumps([model.model_cfg, model.clip.visual.preprocess_cfg], sort_keys=True, default=str).encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def restore(model: TwoTowers, folder: Path) -> None:
    """Put a checkpoint's weights into a model made by :func:`create` with the same settings."""
    load_model(model.clip, str(folder / WEIGHTS))
    _load_heads(model, folder)


def encode_images(model: TwoTowers, images: Sequence, *, batch_size: int = 256, workers: int = 0, progress: bool = True) -> Outputs:
    """Image features z_I and h_I of an indexable of PIL images, (N, d) float32 on the CPU, in eval mode.

    The features of an image that cannot be read are NaN; a warning is logged that names it.
    """
    read = partial(_transformed, images, model.eval_transform)
    loader = torch.utils.data.DataLoader(range(len(images)), batch_size, num_workers=workers, collate_fn=read)
    bar = tqdm(loader, desc="encoding images", disable=not progress, mininterval=2, leave=False)
    return _encode(model, ((batch, None) for batch in bar))


def encode_texts(model: TwoTowers, captions: Sequence[str], *, batch_size: int = 256, progress: bool = True) -> Tensor:
    """Text features z_T of captions, (N, embed) float32 on the CPU, in eval mode."""
    bar = tqdm(range(0, len(captions), batch_size), desc="encoding captions", disable=not progress, mininterval=2, leave=False)
    return _encode(model, ((None, model.tokenizer(list(captions[start : start + batch_size]))) for start in bar)).text


def encode_pairs(model: TwoTowers, pairs: Pairs, rows: np.ndarray, *, batch_size: int = 256) -> Outputs:
    """All four features of some rows of a table, (n, d) float32 on the CPU, under the eval transform."""
    batches = Batches(pairs, {"eval": model.eval_transform}, model.tokenizer, seed=0)
    starts = tqdm(range(0, len(rows), batch_size), desc="encoding pairs", mininterval=2, leave=False)
    return _encode(model, (batches["eval", "encode", 0, rows[start : start + batch_size]] for start in starts))


@torch.no_grad()
def _encode(model: TwoTowers, batches: Iterable[tuple[Tensor | None, Tensor | None]]) -> Outputs:
    training, device = model.training, next(model.parameters()).device
    # A model in training may carry accelerate's autocast: what it is measured by must not depend on that.
    forward = getattr(model, "_original_forward", model)
    model.eval()
    try:
        asked = ([part if part is None else part.to(device) for part in batch] for batch in batches)
        found = [[part if part is None else part.cpu() for part in forward(*batch)] for batch in asked]
    finally:
        model.train(training)
    if not found:
        return Outputs(*[torch.empty(0, model.model_cfg["embed_dim"])] * 4)
    return Outputs(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*found, strict=True)))


def _transformed(images: Sequence[Image.Image], transform: Callable, rows: Sequence[int]) -> Tensor:
    batch = []
    for row in rows:
        try:
            batch.append(transform(images[row]))
        except OSError as error:
            log.warning("%s", error)
            batch.append(torch.full_like(transform(Image.new("RGB", (8, 8))), torch.nan))
    return torch.stack(batch)


def _assemble(name: str, cfg: dict, heads: dict | None, pretrained: str | None = None) -> TwoTowers:
    with torch.random.fork_rng():
        return TwoTowers(_create_clip(name, cfg, pretrained), cfg, _tokenizer(cfg, name), heads).eval()


def _load_pretrained(name: str, tag: str) -> TwoTowers:
    for key, known in ((name, open_clip.list_models()), (tag, open_clip.list_pretrained_tags_by_model(name))):
        if key not in known and not Path(key).is_file():
            near = f"; the nearest is {nearest_name(key, known)!r}" if known else ""
            raise ValueError(f"open_clip:{name}/{tag}: open_clip does not know {key!r}{near}; write open_clip:NAME/TAG")
    cfg = open_clip.get_model_config(name)
    if (open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu"):
        cfg["quick_gelu"] = True
    return _assemble(name, cfg, None, tag)


def _load_authors(file: Path) -> TwoTowers:
    """A checkpoint of the ProtoCLIP authors' training code, which is open_clip 1.2 with heads."""
    # Their optimizer's state holds NumPy float64 scalars, whose module has moved since.
    names = [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    with torch.serialization.safe_globals([*names, np.dtype, type(np.dtype(np.float64))]):
        content = torch.load(file, map_location="cpu", weights_only=True)
    state = {name.removeprefix("module."): value for name, value in content["state_dict"].items()}
    # Linear layers of the head; BatchNorms between them have weights of one dimension.
    dense = [w for name, w in state.items() if name.startswith("image_projection_head") and w.ndim == 2]
    heads = {"width": dense[0].shape[1], "hidden": len(dense[0]), "out": len(dense[-1]), "depth": len(dense) - 1} if dense else None
    model = _assemble("RN50", _authors_config(state), heads)
    # Heads have their names; all the rest belongs to the towers.
    own = {name.replace("_projection_head", "_head"): value for name, value in state.items()}
    ours = model.state_dict()
    model.load_state_dict({name if name in ours else f"clip.{name}": value for name, value in own.items()})
    return model


def _authors_config(state: dict[str, Tensor]) -> dict:
    """open_clip's configuration of the towers in a flat state dict."""

    def count(prefix: str) -> int:
        return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})

    length, width = state["positional_embedding"].shape
    text = {"context_length": length, "vocab_size": len(state["token_embedding.weight"]), "width": width}
    text |= {"heads": max(1, width // 64), "layers": count("transformer.resblocks.")}
    if "visual.proj" in state:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        vision = {"layers": count("visual.transformer.resblocks."), "width": width, "patch_size": patch}
        vision["image_size"] = patch * math.isqrt(len(state["visual.positional_embedding"]) - 1)
    else:
        vision = {"layers": [count(f"visual.layer{n}.") for n in range(1, 5)], "width": len(state["visual.layer1.0.conv1.weight"])}
        vision |= {"patch_size": None, "image_size": 32 * math.isqrt(len(state["visual.attnpool.positional_embedding"]) - 1)}
    # QuickGELU, whatever their settings said.
    return {"embed_dim": state["text_projection"].shape[1], "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}


def _create_clip(name: str, cfg: dict, pretrained: str | None) -> nn.Module:
    if pretrained and Path(pretrained).is_dir():
        pretrained = str(Path(pretrained) / WEIGHTS)
    # The whole configuration goes in as overrides: what is saved is then what was built.
    options = cfg | {"pretrained": pretrained or None, "force_custom_text": cfg.get("custom_text", False)}
    options.pop("custom_text", None)
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # open_clip warns of random weights, which are what was asked for
    try:
        return open_clip.create_model(name, **options)
    finally:
        logging.disable(previous)


def _tokenizer(cfg: dict, name: str) -> Callable:
    text = cfg["text_cfg"]
    length = text.get("context_length", 77)
    if "hf_tokenizer_name" in text and not name.startswith("local-dir:"):
        return open_clip.tokenizer.HFTokenizer(text["hf_tokenizer_name"], context_length=length)
    return open_clip.get_tokenizer(name, context_length=length)


def _load_heads(model: TwoTowers, folder: Path) -> TwoTowers:
    if model.head_cfg:
        towers = {f"clip.{name}": value for name, value in model.clip.state_dict().items()}
        model.load_state_dict(towers | load_file(folder / HEADS))
    return model
