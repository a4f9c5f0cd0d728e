"""Images per second through the input pipeline, and seconds of a map."""

from typing import Any

import numpy as np
import torch

from protoclip_lab import encoders, plots
from protoclip_lab.config import TrainConfig
from protoclip_lab.data.batches import Augmentation, Batches, Reader

from . import data, functions, measure


def pipeline(*, images: int = 512, batch: int = 64, model: str = "RN-mini", rounds: int = 3, seed: int = 0) -> dict[str, Any]:
    """Pictures of 500 × 375 (and Flickr8k's, where it is at hand): decoded alone, and through the reader with each augmentation.

    The reader crops in one worker while the batch before is finished here; tokens are remembered from the warm-up on, as in
    a training's second pass over its table. Decoding alone reads and decodes each picture whole, in this process, no more.
    """
    seconds: dict[str, dict[str, list[float]]] = {}
    tower = encoders.create(TrainConfig(model=model, objective="clip"))
    expected = [tower.clip.visual.preprocess_cfg[key] for key in ("size", "mean", "std")]
    crops = {name: Augmentation(name, *expected) for name in ("plain", "light")}
    for synthetic in (True, False):
        with data.work_folder() as folder:
            table = data.pairs(folder, images, synthetic=synthetic)
            name = data.about(folder)
            if name in seconds:
                continue
            reader = Reader(Batches(table, crops, tower.tokenizer, seed), workers=1)
            stretches = np.split(np.arange(len(table)), range(batch, len(table), batch))

            def read(crop: str, reader: Reader = reader, stretches: list = stretches) -> None:
                for batch in reader.read(stretches, transform=crop, purpose="learn", episode=1):
                    crops[crop].finish(batch[0], batch[2])

            cases = {"decode": lambda table=table: [table.image(row) for row in range(len(table))]}
            cases |= {crop: lambda crop=crop, read=read: read(crop) for crop in crops}
            with measure.torch_threads(1):
                seconds[name] = measure.in_turn(cases, rounds)
    about = {"images": images, "batch": batch, "workers": 1, "model": model, "rounds": rounds, "seed": seed}
    return {"settings": about, "seconds": seconds}


def umap(*, points: int = 10_000, d: int = 128, rounds: int = 3, seed: int = 0) -> dict[str, Any]:
    """Seconds of ``plots.embed`` on clustered features; compiling, which the first call does, is left out."""
    features = functions.drifting(points, 100, d, 1, 0.0, seed)[0].numpy()
    plots.embed(features[:500], seed=seed)
    seconds = measure.in_turn({"umap": lambda: plots.embed(features, seed=seed)}, rounds, warm_up=False)
    about = {"points": points, "d": d, "threads": torch.get_num_threads(), "rounds": rounds, "seed": seed}
    return {"settings": about, "seconds": seconds}
