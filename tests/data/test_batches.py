"""Crops depend on what they are for, and on nothing else."""

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare, kstest
from torchvision.transforms import v2

from protoclip_lab.data.batches import OPERATIONS, UNTOUCHED, Augmentation, Batches, Reader
from protoclip_lab.data.pairs import Pairs
from protoclip_lab.data.shapes import open_pairs


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    pairs = open_pairs(tmp_path_factory.mktemp("data"), size=48, image_size=32)
    evaluation = v2.Compose([v2.PILToTensor(), v2.Resize((32, 32)), v2.ToDtype(torch.float32, scale=True)])
    transforms = {"train": Augmentation("light", 32, [0.5] * 3, [0.5] * 3), "eval": evaluation}
    return Batches(pairs, transforms, lambda captions: torch.tensor([len(c) for c in captions]), seed=0)


def test_neither_order_nor_company_changes_a_crop(batches):
    whole = batches["train", "learn", 1, np.arange(8)]
    for rows in ([7, 2], [2], [5, 2, 7]):
        found = batches["train", "learn", 1, np.array(rows)]
        assert all(torch.equal(part, all_parts[rows]) for part, all_parts in zip(found, whole, strict=True))


def test_purpose_episode_and_seed_change_every_crop(batches):
    rows = np.arange(6)
    base = batches["train", "learn", 1, rows][0]
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
        for batch, wanted in zip(found, rows, strict=True):
            assert all(map(torch.equal, batch, batches["train", purpose, episode, wanted]))


def test_an_interrupt_leaves_the_workers_reading(batches):
    reading = Reader(batches, workers=1).read([np.array([row]) for row in range(8)], transform="train", purpose="learn", episode=1)
    next(reading)
    for worker in reading._workers:
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(reading)) == 7 and all(worker.is_alive() for worker in reading._workers)


BICUBIC = v2.InterpolationMode.BICUBIC


def textbook(size, mean, std) -> v2.Compose:
    """Light augmentation image by image, drawn and computed by torchvision alone, in float from the crop on."""
    random = [v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.2), v2.RandomGrayscale(p=0.2)]
    crop = [v2.RandomResizedCrop(size, (0.5, 1.0), interpolation=BICUBIC), v2.RandomHorizontalFlip()]
    as_float = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*crop, *as_float, *random, v2.RandomApply([v2.GaussianBlur(21)], p=0.2), v2.Normalize(mean, std)])


def noise(seed: int, width: int, height: int) -> Image.Image:
    """Random colours, coarse and fine, with grey and saturated stretches."""
    rng = np.random.default_rng(seed)
    pixels = (
        rng.integers(0, 256, (height, width, 3)) // 2
        + 128 * rng.integers(0, 2, (height // 8 + 1, width // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)[:height, :width]
    )
    pixels[: height // 4] = pixels[: height // 4, :, :1]
    pixels[-4:] = rng.choice([0, 255], (4, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [32, (24, 40)])
def test_light_augmentation_equals_torchvisions_image_by_image(size):
    """The same seed gives the same draws and pixels: to an eighth of a grey level, as kornia rounds the weights of grey."""
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    ours, theirs = Augmentation("light", size, mean, std), textbook(size, mean, std)
    images, parameters, expected = [], [], []
    for seed in range(300):
        picture = noise(seed, 48, 40)
        torch.manual_seed(seed)
        image, drawn = ours(picture)
        torch.manual_seed(seed)
        expected.append(theirs(picture))
        images.append(image)
        parameters.append(drawn)
    assert images[0].dtype == torch.uint8
    found = ours.finish(torch.stack(images), torch.tensor(parameters))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=5e-4 / min(std))
    assert (torch.tensor(parameters)[:, 6:] != torch.tensor(UNTOUCHED)).any(1).float().mean() > 0.3


def test_plain_augmentation_equals_torchvisions_image_by_image():
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    ours = Augmentation("plain", 32, mean, std)
    crop = v2.RandomResizedCrop(32, (0.9, 1.0), interpolation=BICUBIC)
    theirs = v2.Compose([crop, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    for seed in range(20):
        torch.manual_seed(seed)
        image, drawn = ours(noise(seed, 48, 40))
        torch.manual_seed(seed)
        expected = theirs(noise(seed, 48, 40))
        torch.testing.assert_close(ours.finish(image[None], torch.tensor([drawn]))[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [16, 64])
def test_each_operation_equals_torchvisions_with_the_same_value(size):
    """One batch, a value of its own for every image; 0 and the ends of each range among them."""
    images = torch.rand(9, 3, size, size + 4, generator=torch.Generator().manual_seed(size))
    images[0, :, :4] = images[0, :1, :4]  # grey: no hue
    images[1] = (images[1] > 0.5).float()
    factors, turns, sigmas = torch.linspace(0, 1.8, 9), torch.linspace(-0.2, 0.2, 9), torch.linspace(0.1, 2, 9)
    f = v2.functional
    for operation, values, textbook in [
        (0, factors, f.adjust_brightness),
        (1, factors, f.adjust_contrast),
        (2, factors, f.adjust_saturation),
        (3, turns, f.adjust_hue),
        (4, torch.zeros(9), lambda image, _: f.rgb_to_grayscale(image, 3)),
        (5, sigmas, lambda image, sigma: f.gaussian_blur(image, [21, 21], [sigma, sigma])),
    ]:
        found = OPERATIONS[operation](images, values)
        expected = torch.stack([textbook(image, float(value)) for image, value in zip(images, values, strict=True)])
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)  # kornia rounds the weights of grey


@pytest.fixture(scope="module")
def drawn():
    """Flips and parameters of 4,000 images, each from a seed of its own."""
    transform = Augmentation("light", 32, [0.0] * 3, [1.0] * 3)
    picture = Image.fromarray(np.tile(np.linspace(0, 255, 48, dtype=np.uint8)[None, :, None], (48, 1, 3)))
    flips, parameters = [], []
    for seed in range(4000):
        torch.manual_seed(seed)
        image, values = transform(picture)
        flips.append(bool(image[0, :, 0].sum() > image[0, :, -1].sum()))
        parameters.append(values)
    return np.array(flips), np.array(parameters, np.float32)


def test_light_augmentation_has_the_papers_rates(drawn):
    """Flip half of the time; jitter, grey and blur each a fifth, of one another's draws independent."""
    flips, parameters = drawn
    values = parameters[:, 6:]
    due = {"flip": flips, "jitter": values[:, 3] != 0, "grey": values[:, 4] != 1, "blur": values[:, 5] != 0}
    for name, rate in {"flip": 0.5, "jitter": 0.2, "grey": 0.2, "blur": 0.2}.items():
        # Four standard deviations of a count of 4,000.
        assert abs(due[name].mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / len(flips)), name
    correlations = np.corrcoef(np.array(list(due.values()), float)) - np.eye(4)
    assert np.abs(correlations).max() < 4 / np.sqrt(len(flips))


def test_parameters_are_distributed_as_torchvisions(drawn):
    parameters = drawn[1]
    jittered, blurred = parameters[parameters[:, 9] != 0], parameters[parameters[:, 11] != 0]
    jitter, blur = v2.ColorJitter(0.8, 0.8, 0.8, 0.2), v2.GaussianBlur(21)
    torch.manual_seed(0)
    theirs = [jitter.make_params([]) for _ in range(2000)]
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue"), 6):
        assert kstest(jittered[:, column], [t[f"{name}_factor"] for t in theirs]).pvalue > 0.01, name
    assert kstest(blurred[:, 11], [blur.make_params([])["sigma"][0] for _ in range(2000)]).pvalue > 0.01
    orders, counts = np.unique(jittered[:, :4], axis=0, return_counts=True)
    assert len(orders) == 24 and chisquare(counts).pvalue > 0.01
    # Whom chance passed over keeps torchvision's identity.
    rest = parameters[parameters[:, 9] == 0]
    assert (rest[:, 6:10] == [1, 1, 1, 0]).all()


def test_within_a_batch_every_image_has_its_own_draws(batches):
    """A v2 transform called on a batch would give all images the same jitter, flip and blur."""
    _, _, parameters = batches["train", "learn", 1, np.arange(len(batches.pairs))]
    for column in (6, 7, 8, 9, 11):
        concerned = parameters[parameters[:, column] != UNTOUCHED[column - 6], column]
        assert 1 < len(concerned) < len(parameters) / 2 and len(concerned.unique()) == len(concerned)
    # One picture throughout: finished, no two crops are alike, and some are flipped.
    picture = np.asarray(noise(0, 64, 64)) // 2
    picture[:, :32] += 127
    same = SimpleNamespace(image=lambda row, at_least: Image.fromarray(picture), caption=lambda row: "")
    images, _, parameters = Batches(same, batches.transforms, batches.tokenizer, 0)["train", "learn", 1, np.arange(32)]
    halves = images.float().mean((1, 2)).view(32, 2, 16).mean(2)
    assert 8 < (halves[:, 0] < halves[:, 1]).sum() < 24
    finished = batches.transforms["train"].finish(images, parameters)
    assert len(finished.flatten(1).unique(dim=0)) == 32


def test_only_the_images_concerned_are_touched(batches):
    images, _, parameters = batches["train", "learn", 1, np.arange(40)]
    finished = batches.transforms["train"].finish(images, parameters)
    spared = (parameters[:, 6:] == torch.tensor(UNTOUCHED)).all(1)
    plain = (images / 255 - 0.5) / 0.5
    same = (finished - plain).flatten(1).abs().amax(1) < 1e-6
    # A blur may be too narrow, and a picture too grey, to change anything.
    assert 5 < spared.sum() < 35 and same[spared].all() and same[~spared].float().mean() < 0.3
    assert images.dtype == torch.uint8  # and the batch itself is not written to
    again = batches["train", "learn", 1, np.arange(40)]
    assert torch.equal(images, again[0])


def test_finished_images_stay_as_they_are(batches):
    images, tokens, parameters = batches["eval", "encode", 0, np.arange(3)]
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.float32 and parameters.shape == (3, 0)
    assert batches.transforms["train"].finish(images, parameters) is images


@pytest.mark.parametrize("cache_mib", [512, 0.02, 0])
def test_what_is_kept_changes_nothing_but_the_decoding(batches, monkeypatch, cache_mib):
    """Two passes over an episode, then the next: with room for all images, for some or for none."""
    decoded = []
    monkeypatch.setattr(
        Pairs, "image", lambda self, row, at_least=0, image=Pairs.image: decoded.append(row) or image(self, row, at_least)
    )
    kept = Batches(batches.pairs, batches.transforms, batches.tokenizer, 0, cache=cache_mib)
    rows, count = [np.arange(10), np.arange(10, 14)], {}
    for purpose, episode in (("extract", 1), ("learn", 1), ("learn", 2)):
        for part in rows:
            before = len(decoded)
            found = kept["train", purpose, episode, part]
            count[purpose, episode] = count.get((purpose, episode), 0) + len(decoded) - before
            assert all(map(torch.equal, found, batches["train", purpose, episode, part]))
        assert sum(4 * image.width * image.height for image in kept.images.values()) <= cache_mib * 2**20
    # 3 kB an image: six of them fit into 0.02 MiB.
    assert count == {("extract", 1): 14, ("learn", 1): {512: 0, 0.02: 9, 0: 14}[cache_mib], ("learn", 2): 14}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_pass_finds_its_images_in_the_process_that_decoded_them(batches, tmp_path, workers):
    def image(row, at_least):
        with (tmp_path / "decoded").open("a") as file:
            file.write(f"{row}\n")
        return batches.pairs.image(row, at_least)

    counted = SimpleNamespace(image=image, caption=batches.pairs.caption)
    reader = Reader(Batches(counted, batches.transforms, batches.tokenizer, 0, cache=512), workers=workers)
    rows = np.split(np.arange(20), [4, 8, 12, 16])
    for purpose, part in (("extract", rows), ("learn", rows[:4])):
        assert len(list(reader.read(part, transform="train", purpose=purpose, episode=1))) == len(part)
    assert sorted(map(int, (tmp_path / "decoded").read_text().split())) == list(range(20))


def test_without_keep_no_image_is_kept(batches):
    batches["train", "learn", 1, np.arange(4)]
    assert not batches.images


def test_two_transforms_never_share_a_kept_image(batches):
    """The training transform may take a reduced picture, which the evaluation's must not see."""
    kept = Batches(batches.pairs, batches.transforms, batches.tokenizer, 0, cache=512)
    kept["train", "learn", 1, np.arange(4)]
    assert torch.equal(kept["eval", "learn", 1, np.arange(4)][0], batches["eval", "learn", 1, np.arange(4)][0])


def test_the_smallest_crop_is_not_made_from_fewer_pixels():
    for name, scale in {"light": 0.5, "plain": 0.9}.items():
        for size in (64, (64, 48)):
            crop = Augmentation(name, size, [0.5] * 3, [0.5] * 3)
            # The thinnest crop of a square of this side: scale of its area, three to four.
            assert crop.at_least * np.sqrt(scale * 3 / 4) >= 64


def test_plain_augmentation_keeps_nine_tenths_of_the_picture_upright():
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 1, 3)))
    transform = Augmentation("plain", 64, [0.0] * 3, [1.0] * 3)
    torch.manual_seed(0)
    for _ in range(50):
        columns = transform(ramp)[0][0].float().mean(0) / 255
        assert columns[0] < 0.2 and columns[-1] > 0.8


def test_a_caption_is_tokenized_once(batches):
    asked = []
    tokenizer = lambda captions: asked.extend(captions) or batches.tokenizer(captions)  # noqa: E731
    counting = Batches(batches.pairs, batches.transforms, tokenizer, 0)
    first = counting["train", "learn", 1, np.arange(6)][1]
    assert torch.equal(counting["train", "learn", 2, np.arange(6)][1], first)
    assert len(asked) == len(set(asked)) and set(asked) == {batches.pairs.caption(row) for row in range(6)}


def test_unknown_augmentation_is_refused():
    with pytest.raises(KeyError, match="strong"):
        Augmentation("strong", 32, [0.5] * 3, [0.5] * 3)
