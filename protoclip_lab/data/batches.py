"""Which pairs make up an episode, and batches of them: two augmentations, crops that depend on nothing but what they are for."""

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from kornia import enhance, filters
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from protoclip_lab.config import require
from protoclip_lab.data.pairs import Pairs, folder_of
from protoclip_lab.randomness import derive, numpy_generator, torch_generator


class Episodes:
    """The sample ids of each episode, a function of (seed, episode) alone.

    Passes over the table are shuffled one by one and laid end to end; episode e (from 1) is the e-th
    stretch of ``size`` ids. Every sample is thus seen once before any is seen twice. Where an episode
    begins in one pass and ends in the next, ids that it already holds are moved behind its end, so no
    episode holds a sample twice.

    Args:
        rows: pairs in the table.
        size: pairs in an episode; None takes the whole table.
        seed: of the run.

    Raises:
        ValueError: the table is empty, or the episode is larger than the table.
    """

    def __init__(self, rows: int, size: int | None, seed: int) -> None:
        size = rows if size is None else size
        require(1 <= size <= rows, f"episode_size = {size} does not fit a table of {rows} usable pairs: take at most {rows}, or None")
        self.rows, self.size, self.seed = rows, size, seed

    def ids(self, episode: int) -> np.ndarray:
        """Row numbers of the episode's pairs, (size,) int64, in the order they are learnt."""
        first_pass, offset = divmod((episode - 1) * self.size, self.rows)
        # The beginning of a pass depends on the end of the one before, unless an episode begins with it.
        free_of_others = max(number for number in range(first_pass + 1) if number * self.rows % self.size == 0)
        order = np.arange(0)
        for number in range(free_of_others, first_pass + 2):
            shuffled = numpy_generator(self.seed, "pass", number).permutation(self.rows)
            taken = number * self.rows % self.size  # of this pass's first episode, by the pass before
            free = np.flatnonzero(~np.isin(shuffled, order[self.rows - taken :]))[: self.size - taken]
            # First what fills that episode without repeating itself, then the rest; both as shuffled.
            before, order = order, np.concatenate([shuffled[free], np.delete(shuffled, free)])
        return np.concatenate([before, order])[offset : offset + self.size]


class Augmentation:
    """A training transform in two halves: crop and flip of an image, where it is read; colours and blur of a batch, on the device.

    Torchvision draws for each image it is called on, so one of its transforms called on a batch would treat all alike.

    Args:
        name: "plain" (as CLIP) or "light" (as ProtoCLIP).

    Source: ProtoCLIP (arXiv 2206.10996), section on augmentation.
    """

    def __init__(self, name: str, size: int | Sequence[int], mean: Sequence[float], std: Sequence[float]) -> None:
        scale = {"plain": (0.9, 1.0), "light": (0.5, 1.0)}[name]
        self.crop = v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC)
        self.distort = name == "light"
        self.jitter, self.blur = v2.ColorJitter(0.8, 0.8, 0.8, 0.2), v2.GaussianBlur(21)
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        # At 1.155, the root of 4/3, no side of a crop is enlarged from a reduced picture; at 1.2 it differs by a grey level or so.
        self.at_least = math.ceil(1.2 * max(self.crop.size) / math.sqrt(scale[0]))

    def __call__(self, image: Image.Image) -> tuple[Tensor, list[float]]:
        """PIL RGB -> (3, H, W) uint8, and what is left to do to it: the order of OPERATIONS, then the value of each."""
        image = v2.functional.pil_to_tensor(self.crop(image))
        if not self.distort:
            return image, []
        if torch.rand(1) < 0.5:
            image = image.flip(-1)
        order, values = range(4), list(UNTOUCHED)
        if torch.rand(1) < 0.2:
            drawn = self.jitter.make_params([])
            order = drawn["fn_idx"].tolist()
            values[:4] = (drawn[f"{name}_factor"] for name in ("brightness", "contrast", "saturation", "hue"))
        if torch.rand(1) < 0.2:
            values[4] = 0.0  # grey
        if torch.rand(1) < 0.2:
            values[5] = self.blur.make_params([])["sigma"][0]
        return image, [*order, 4, 5, *values]

    def finish(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 -> float32, distorted and normalised; float images stay as they are.

        Leave parameters on the CPU: which images are concerned is decided there, so that no step waits for the GPU.
        """
        if images.is_floating_point():
            return images
        there = {"device": images.device, "non_blocking": True}
        images = images / 255
        order, values = parameters.cpu().chunk(2, dim=1)
        due = values != torch.tensor(UNTOUCHED[: values.shape[1]])
        for place, kind in product(range(due.shape[1]), repeat=2):
            rows = (due[:, kind] & (order[:, place] == kind)).nonzero()[:, 0]
            if len(rows):
                value, rows = values[rows, kind].to(**there), rows.to(**there)
                images[rows] = OPERATIONS[kind](images[rows], value)
        return images.sub_(self.mean.to(**there)).div_(self.std.to(**there))


# Brightness, contrast, saturation, hue, grey, blur: (n, 3, H, W) in [0, 1] and (n,) -> (n, 3, H, W), as torchvision's for one image.
OPERATIONS = (
    enhance.adjust_brightness_accumulative,
    enhance.adjust_contrast_with_mean_subtraction,
    enhance.adjust_saturation_with_gray_subtraction,
    lambda images, turns: enhance.adjust_hue(images, 2 * math.pi * turns),
    enhance.adjust_saturation_with_gray_subtraction,
    lambda images, sigma: filters.gaussian_blur2d(images, 21, sigma[:, None].expand(-1, 2)),
)
UNTOUCHED = (1.0, 1.0, 1.0, 0.0, 1.0, 0.0)  # the value of each that leaves an image as it is


class Batches(torch.utils.data.Dataset):
    """``batches[transform, purpose, episode, rows]`` -> images (B, 3, H, W), tokens (B, L) int64 and parameters (B, P).

    Images and parameters are those of an :class:`Augmentation`; or finished float32, and P is 0.
    Each image's draws come from a generator made on the spot from (seed, purpose, episode, row), so neither
    the order of the rows nor the process that reads them can change it.

    Args:
        pairs: the table; or a run's folder whose pairs are streamed, see :class:`protoclip_lab.data.pairs.Stream`.
        transforms: an augmentation, or PIL image -> tensor, by name.
        tokenizer: captions -> tokens.
        seed: of the run.
        visits: episodes in a row that are of the same pairs.
        cache: MiB of decoded images, which each process remembers until other pairs come, for a second pass over these.
    """

    def __init__(self, pairs: Pairs | Path, transforms: dict, tokenizer: Callable, seed: int, visits: int = 1, cache: int = 0) -> None:
        self.source = self.pairs = pairs
        self.transforms, self.tokenizer, self.seed = transforms, tokenizer, seed
        self.cache, self.visits, self.drawn = cache * 2**20, visits, None

    def __getitem__(self, wanted: tuple[str, str, int, np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        name, purpose, episode, rows = wanted
        transform, found = self.transforms[name], []
        if (drawn := (episode - 1) // self.visits) != self.drawn:
            self.images, self.drawn, self.room = {}, drawn, self.cache
            if isinstance(self.source, Path):
                self.pairs = Pairs(folder_of(self.source, drawn + 1))
        with torch.random.fork_rng(devices=[]):
            for row in rows:
                image = self._image(row, getattr(transform, "at_least", 0))
                # torchvision draws from the global generator: it is seeded for this one image, and put back after.
                torch.default_generator.manual_seed(derive(self.seed, purpose, episode, row))
                found.append(transform(image) if isinstance(transform, Augmentation) else (transform(image), []))
        images, parameters = zip(*found, strict=True)
        tokens = [_tokens(self.tokenizer, self.pairs.caption(row)) for row in rows]
        return torch.stack(images), torch.stack(tokens), torch.tensor(parameters)

    def _image(self, row: int, at_least: int) -> Image.Image:
        if (image := self.images.get((row, at_least))) is None:
            image = self.pairs.image(row, at_least)
            self.room -= 4 * image.width * image.height  # as Pillow holds them
            if self.room >= 0:
                self.images[row, at_least] = image
        return image


# A fifth of what reading a small image costs. By caption: 40 MB in each process at 77 tokens, whatever the table's size.
@lru_cache(1 << 15)
def _tokens(tokenizer: Callable, caption: str) -> Tensor:
    return tokenizer([caption])[0]


class Reader:
    """Reads batches ahead in worker processes, which start once and serve every stage of every episode."""

    def __init__(self, batches: Batches, *, workers: int, pin_memory: bool = False) -> None:
        options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": pin_memory, "worker_init_fn": _deaf}
        # The sampler is the plan of a reading, filled in by `read`: a new loader would start the workers anew.
        # With a generator, or the loader would draw its workers' base seed from the global one.
        own = torch_generator(batches.seed, "workers")
        self._loader = torch.utils.data.DataLoader(batches, None, sampler=[], generator=own, **options)

    def read(self, rows: Sequence[np.ndarray], *, transform: str, purpose: str, episode: int) -> Iterator[Sequence[Tensor]]:
        """The batches of these rows, in order; one reading at a time."""
        self._loader.sampler[:] = [(transform, purpose, episode, batch) for batch in rows]
        return iter(self._loader)


def _deaf(worker: int) -> None:
    """An interrupt is the trainer's business: it still needs the batches of the step it is in."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
