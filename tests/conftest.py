"""What all tests share: real data where it is at hand, and few threads."""

import os
from pathlib import Path

import pytest

# Tiny tensors gain nothing from more threads, and tests on a shared machine lose. Set before torch and faiss load, and
# for the kernels and processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "2")


def _folder(variable: str) -> Path:
    if not os.environ.get(variable):
        pytest.skip(f"set {variable}=<folder> to test on it")
    return Path(os.environ[variable])


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    """Folder of Flickr8k: captions.tsv, train.tar, val.tar, test.tar."""
    return _folder("FLICKR8K")


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """Folder of CIFAR-10: classes.txt, train.tar, test.tar."""
    return _folder("CIFAR10")
