"""Batches of pairs: the method's two augmentations, and crops that depend on nothing but what they are for."""

import signal
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from protoclip_lab.data.pairs import Pairs
from protoclip_lab.randomness import derive, torch_generator

Transform = Callable[[Image.Image], Tensor]


def augmentation(name: str, size: int | Sequence[int], mean: Sequence[float], std: Sequence[float]) -> Transform:
    """The training transform, PIL RGB -> (3, size, size) float32: "plain" (as CLIP) or "light" (as ProtoCLIP).

    Source: ProtoCLIP (arXiv 2206.10996), section on augmentation.
    """
    scale = {"plain": (0.9, 1.0), "light": (0.5, 1.0)}[name]
    random = [v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC)]
    if name == "light":
        random += [v2.RandomHorizontalFlip(), v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.2)]
        random += [v2.RandomGrayscale(p=0.2), v2.RandomApply([v2.GaussianBlur(21)], p=0.2)]
    return v2.Compose([*random, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


class Batches(Dataset):
    """``batches[transform, purpose, episode, rows]`` -> images (B, 3, H, W) float32 and tokens (B, L) int64.

    Each image's crop is drawn from a generator made on the spot from (seed, purpose, episode, row), so neither
    the order of the rows nor the process that reads them can change it.

    Args:
        pairs: the table.
        transforms: PIL image -> tensor, by name.
        tokenizer: captions -> tokens.
        seed: of the run.
    """

    def __init__(self, pairs: Pairs, transforms: dict[str, Transform], tokenizer: Callable, seed: int) -> None:
        self.pairs, self.transforms, self.tokenizer, self.seed = pairs, transforms, tokenizer, seed

    def __getitem__(self, wanted: tuple[str, str, int, np.ndarray]) -> tuple[Tensor, Tensor]:
        transform, purpose, episode, rows = wanted
        images = []
        with torch.random.fork_rng(devices=[]):
            for row in rows:
                # torchvision draws from the global generator: it is seeded for this one image, and put back after.
                torch.default_generator.manual_seed(derive(self.seed, purpose, episode, row))
                images.append(self.transforms[transform](self.pairs.image(row)))
        return torch.stack(images), self.tokenizer([self.pairs.caption(row) for row in rows])


class Reader:
    """Reads batches ahead in worker processes, which start once and serve every stage of every episode."""

    def __init__(self, batches: Batches, *, workers: int, pin_memory: bool = False) -> None:
        options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": pin_memory, "worker_init_fn": _deaf}
        # The sampler is the plan of a reading, filled in by `read`: a new loader would start the workers anew.
        # With a generator, or the loader would draw its workers' base seed from the global one.
        self._loader = DataLoader(batches, sampler=[], batch_size=None, generator=torch_generator(batches.seed, "workers"), **options)

    def read(self, rows: Sequence[np.ndarray], *, transform: str, purpose: str, episode: int) -> Iterator[list[Tensor]]:
        """The batches of these rows, in order; one reading at a time."""
        self._loader.sampler[:] = [(transform, purpose, episode, batch) for batch in rows]
        return iter(self._loader)


def _deaf(worker: int) -> None:
    """An interrupt is the trainer's business: it still needs the batches of the step it is in."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
