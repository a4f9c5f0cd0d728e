"""The recipes that come with the project fit their notebooks, and Flickr8k's trains on its training split alone."""

from pathlib import Path

import numpy as np
import pytest

from protoclip_lab import batch
from protoclip_lab.config import TrainConfig
from protoclip_lab.data.batches import Episodes
from protoclip_lab.data.pairs import index_tar
from protoclip_lab.data.shapes import open_pairs

RECIPES = sorted((Path(__file__).parents[1] / "notebooks" / "recipes").glob("*.yaml"))
FOLDERS = {"flickr8k": "F", "cifar10": "C", "table": "t.tsv", "image_root": "images", "data_root": "D"}


def plan(recipe, tmp_path, **own):
    needed = {name: value for name, value in (FOLDERS | own).items() if f"{name}: null" in recipe.read_text()}
    return batch.plan(recipe, needed, tmp_path)[0]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_can_be_planned(recipe, tmp_path):
    steps = plan(recipe, tmp_path)
    trained = [step for step in steps if step.name.startswith("03_train")]
    assert trained
    for step in trained:
        TrainConfig(**step.parameters)


def test_the_paper_recipes_hold_the_papers_settings(tmp_path):
    by_name = {recipe.stem: recipe for recipe in RECIPES}
    configs = {
        name: TrainConfig(**next(s for s in plan(by_name[name], tmp_path) if s.name[:8] == "03_train").parameters)
        for name in ("paper_clip_1gpu", "paper_clip_8gpu", "paper_protoclip_1gpu", "paper_protoclip_8gpu")
    }
    for name, config in configs.items():
        large = "8gpu" in name
        assert (config.model, config.weight_decay, config.grad_clip, config.batch_size) == ("RN50", 0.5, 10, 64)
        assert (config.lr, config.warmup_steps) == ((5e-4, 15625) if large else (5e-5, 2000))
        assert config.batch_size * config.accumulation == (512 if large else 64)
    for large in (False, True):
        clip, proto = (configs[f"paper_{kind}_{'8' if large else '1'}gpu"] for kind in ("clip", "protoclip"))
        assert (clip.episodes, clip.episode_size, clip.augmentation) == (32 if large else 8, None, "plain")
        assert clip.infonce_warmup_episodes == 0 and clip.lit_start_episode is None
        assert (proto.episodes, proto.lit_start_episode) == ((400, 399) if large else (100, 99))
        assert (proto.episode_size, proto.k, proto.kmeans_iterations, proto.kmeans_restarts) == (200_000, 20_000, 20, 3)
        assert (proto.temperature, proto.projection_dim, proto.augmentation) == (0.01, 128, "light")
        assert proto.back_translation and proto.infonce_warmup_episodes == 1
        assert (proto.clip_weight, proto.proto_weight, proto.teachers[0].weight) == (1, 1, 1)


def test_no_val_or_test_picture_enters_a_flickr8k_episode(flickr8k, tmp_path):
    recipe = next(r for r in RECIPES if r.stem == "flickr8k")
    steps = plan(recipe, tmp_path, flickr8k=str(flickr8k))
    prepare = next(step for step in steps if step.name == "01_prepare_data")
    config = TrainConfig(**next(step for step in steps if step.name.startswith("03_train")).parameters)
    pairs = open_pairs(**prepare.parameters)
    assert config.table == f"{prepare.parameters['output']}/pairs" and not config.where
    paths = np.array(pairs.column("filepath"))
    episodes = Episodes(len(pairs), config.episode_size, config.seed)
    used = set(np.concatenate([paths[episodes.ids(e)] for e in range(1, config.episodes + 1)]))
    rows = (line.split("\t") for line in (flickr8k / "captions.tsv").read_text().splitlines()[1:])
    held_out = {path for path, _, split in rows if split != "train"}
    assert len(held_out) == 2000 and len(used) == 6000
    assert not used & held_out and not used & set(index_tar(flickr8k / "test.tar"))
