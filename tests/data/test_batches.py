"""Crops depend on what they are for, and on nothing else."""

import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from protoclip_lab.data.batches import Batches, Reader, augmentation
from protoclip_lab.data.source import open_pairs


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    pairs = open_pairs(tmp_path_factory.mktemp("data"), size=48, image_size=32)
    transforms = {"train": augmentation("light", 32, [0.5] * 3, [0.5] * 3)}
    return Batches(pairs, transforms, lambda captions: torch.tensor([len(c) for c in captions]), seed=0)


def test_neither_order_nor_company_changes_a_crop(batches):
    whole, lengths = batches["train", "learn", 1, np.arange(8)]
    for rows in ([7, 2], [2], [5, 2, 7]):
        images, tokens = batches["train", "learn", 1, np.array(rows)]
        assert torch.equal(images, whole[rows]) and torch.equal(tokens, lengths[rows])


def test_purpose_episode_and_seed_change_every_crop(batches):
    rows = np.arange(6)
    base, _ = batches["train", "learn", 1, rows]
    for other in (("train", "extract", 1, rows), ("train", "learn", 2, rows)):
        assert (batches[other][0] != base).flatten(1).any(1).all()


def test_reading_leaves_the_global_generator_alone(batches):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    batches["train", "learn", 1, np.arange(4)]
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_worker_processes_read_the_same_and_serve_every_stage(batches, workers):
    reader = Reader(batches, workers=workers)
    for purpose, episode, plan in [
        ("extract", 1, [[0, 1], [2]]),
        ("learn", 1, [[3, 4]]),
        ("learn", 2, [[1], [0], [5]]),
    ]:
        rows = [np.array(p) for p in plan]
        found = list(reader.read(rows, transform="train", purpose=purpose, episode=episode))
        assert len(found) == len(rows)
        for (images, tokens), wanted in zip(found, rows, strict=True):
            direct = batches["train", purpose, episode, wanted]
            assert torch.equal(images, direct[0]) and torch.equal(tokens, direct[1])


def test_an_interrupt_leaves_the_workers_reading(batches):
    reading = Reader(batches, workers=1).read([np.array([row]) for row in range(8)], transform="train", purpose="learn", episode=1)
    next(reading)
    for worker in reading._workers:
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(reading)) == 7 and all(worker.is_alive() for worker in reading._workers)


def test_light_augmentation_has_the_papers_rates():
    """Flip half of the time, grey a fifth: counted on a picture whose halves differ in colour."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32, 0] = 200
    pixels[:, 32:, 2] = 200
    picture = Image.fromarray(pixels)
    transform = augmentation("light", 32, [0.0] * 3, [1.0] * 3)
    torch.manual_seed(0)
    flipped = grey = 0
    for _ in range(600):
        image = transform(picture)
        if (image.std(dim=0) < 1e-3).all():
            grey += 1
        elif image[0, :, :4].mean() < image[0, :, -4:].mean():
            flipped += 1
    assert 0.15 < grey / 600 < 0.26  # 0.2, and jitter of saturation to nearly nothing
    assert 0.43 < flipped / (600 - grey) < 0.57


def test_plain_augmentation_keeps_nine_tenths_of_the_picture_upright():
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 1, 3)))
    transform = augmentation("plain", 64, [0.0] * 3, [1.0] * 3)
    torch.manual_seed(0)
    for _ in range(50):
        columns = transform(ramp)[0].mean(0)
        assert columns[0] < 0.2 and columns[-1] > 0.8


def test_unknown_augmentation_is_refused():
    with pytest.raises(KeyError, match="strong"):
        augmentation("strong", 32, [0.5] * 3, [0.5] * 3)
