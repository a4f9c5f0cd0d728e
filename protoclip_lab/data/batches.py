"""Batches of pairs: the method's two augmentations, and crops that depend on nothing but what they are for."""

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from protoclip_lab.data.pairs import Pairs
from protoclip_lab.randomness import derive, torch_generator


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
                images[rows] = OPERATIONS[kind](images[rows], value.view(-1, 1, 1, 1))
        return images.sub_(self.mean.to(**there)).div_(self.std.to(**there))


def _brighten(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(v2.functional.rgb_to_grayscale(images).mean(dim=(1, 2, 3), keepdim=True), images, factor).clamp_(0, 1)


def _saturate(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(v2.functional.rgb_to_grayscale(images), images, factor).clamp_(0, 1)


def _turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    value, top = images.max(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    after, before = (images.gather(1, (top + k) % 3) for k in (1, 2))
    # In sixths of the circle, from red; each channel is full within one sixth of its own place, and nought from two on.
    hue = 2 * top + (after - before) / chroma.clamp(min=1e-12) + 6 * turns
    beyond = (hue + torch.arange(5, 0, -2, device=images.device).view(3, 1, 1)) % 6
    return value - chroma * torch.minimum(beyond, 4 - beyond).clamp_(0, 1)


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of 21 taps, reflected at the borders: a matrix per image and axis, which beats convolution at 64 pixels."""
    taps = torch.softmax(-((torch.arange(-10, 11, device=images.device) / sigma[:, 0, 0]) ** 2) / 2, dim=1)
    for _ in range(2):
        unit = torch.eye(images.shape[3], device=images.device)
        windows = F.pad(unit[None], (10, 10), mode="reflect")[0].unfold(1, 21, 1)
        images = (images.flatten(1, 2) @ torch.einsum("iot,bt->bio", windows, taps)).view(images.shape).mT
    return images


OPERATIONS = (_brighten, _contrast, _saturate, _turn_hue, _saturate, _blur)
UNTOUCHED = (1.0, 1.0, 1.0, 0.0, 1.0, 0.0)  # the value of each that leaves an image as it is


class Batches(Dataset):
    """``batches[transform, purpose, episode, rows]`` -> images (B, 3, H, W), tokens (B, L) int64 and parameters (B, P).

    Images and parameters are those of an :class:`Augmentation`; or finished float32, and P is 0.
    Each image's draws come from a generator made on the spot from (seed, purpose, episode, row), so neither
    the order of the rows nor the process that reads them can change it.

    Args:
        pairs: the table.
        transforms: an augmentation, or PIL image -> tensor, by name.
        tokenizer: captions -> tokens.
        seed: of the run.
        keep: remember decoded images until the next episode, for a second pass over this one.
        cache_mib: how much of them each process remembers.
    """

    def __init__(
        self, pairs: Pairs, transforms: dict[str, Callable], tokenizer: Callable, seed: int, *, keep: bool = False, cache_mib: int = 512
    ) -> None:
        self.pairs, self.transforms, self.tokenizer, self.seed = pairs, transforms, tokenizer, seed
        self.cache, self.episode = keep * cache_mib * 2**20, None

    def __getitem__(self, wanted: tuple[str, str, int, np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        name, purpose, episode, rows = wanted
        transform, found = self.transforms[name], []
        if episode != self.episode:
            self.images, self.episode, self.room = {}, episode, self.cache
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
        if (row, at_least) not in self.images:
            image = self.pairs.image(row, at_least)
            self.room -= 3 * image.width * image.height
            if self.room < 0:
                return image
            self.images[row, at_least] = image
        return self.images[row, at_least]


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
        self._loader = DataLoader(batches, sampler=[], batch_size=None, generator=torch_generator(batches.seed, "workers"), **options)

    def read(self, rows: Sequence[np.ndarray], *, transform: str, purpose: str, episode: int) -> Iterator[Sequence[Tensor]]:
        """The batches of these rows, in order; one reading at a time."""
        self._loader.sampler[:] = [(transform, purpose, episode, batch) for batch in rows]
        return iter(self._loader)


def _deaf(worker: int) -> None:
    """An interrupt is the trainer's business: it still needs the batches of the step it is in."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
