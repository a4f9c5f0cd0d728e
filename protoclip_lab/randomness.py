"""Seeds made on the spot from what a draw is for, so that no generator state needs saving."""

import hashlib

import numpy as np
import torch


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that depends on nothing but ``seed`` and the words and numbers given.

    A restart, another number of workers or of processes asks with the same words and so draws the same
    crop, order or centroid.
    """
    text = repr((int(seed), *(p if isinstance(p, str) else int(p) for p in purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A NumPy generator seeded by :func:`derive`."""
    return np.random.default_rng(derive(seed, *purpose))


def torch_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU torch generator seeded by :func:`derive`."""
    return torch.Generator().manual_seed(derive(seed, *purpose))
