"""Towers from open_clip: made, locked, saved, and loaded by us and by open_clip alone."""

import json

import numpy as np
import open_clip
import pytest
import torch
from helpers import toy_settings, toy_table
from PIL import Image

from protoclip_lab import encoders
from protoclip_lab.config import TrainConfig
from protoclip_lab.data.source import open_pairs

CAPTIONS = ["a red circle", "zwei blaue Dreiecke, und noch viel mehr Wörter als in den Kontext passen " * 3]


def make(**settings):
    return encoders.create(TrainConfig(image_size=32, context_length=16, projection_hidden=32, **settings)).eval()


def images(n=3):
    pixels = np.random.default_rng(0).integers(0, 255, (n, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


def save(model, folder):
    folder.mkdir(exist_ok=True)
    encoders.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A small random BERT with its tokenizer, as a local Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = "[PAD] [UNK] [CLS] [SEP] a red blue circle square dog".split()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "RN-mini"},
        {"model": "ViT-mini"},
        {"model": "ViT-mini", "alignment": "siglip"},
        {"model": "ViT-mini", "objective": "clip"},
        {"model": "RN-micro", "projection_depth": 0},
    ],
    ids=str,
)
def test_a_checkpoint_gives_identical_features_in_plain_open_clip_and_here(settings, tmp_path):
    model = make(**settings)
    folder = save(model, tmp_path / "checkpoint")
    plain, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    plain.eval()
    ours = encoders.load(folder)
    batch = torch.stack([preprocess(image) for image in images()])
    assert torch.equal(batch, torch.stack([model.eval_transform(image) for image in images()]))
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    assert torch.equal(tokens, model.tokenizer(CAPTIONS))
    with torch.no_grad():
        expected = model(batch, tokens[:2])
        assert torch.equal(plain.encode_image(batch, normalize=True), expected.image)
        assert torch.equal(plain.encode_text(tokens, normalize=True), expected.text)
        for mine, theirs in zip(ours(batch, tokens), expected, strict=True):
            assert torch.equal(mine, theirs)
    assert torch.equal(plain.logit_scale, model.clip.logit_scale)


def test_hugging_face_text_tower_trains_the_checkpoint_loads_in_open_clip(bert, tmp_path):
    model = make(model="ViT-mini", text_model=str(bert))
    folder = save(model, tmp_path / "checkpoint")
    plain, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    assert torch.equal(tokens, model.tokenizer(CAPTIONS)) and tokens.shape == (2, 16)
    with torch.no_grad():
        assert torch.equal(plain.eval().encode_text(tokens, normalize=True), model(tokens=tokens).text)
        assert torch.equal(encoders.load(folder)(tokens=tokens).text_projection, model(tokens=tokens).text_projection)


def test_hugging_face_text_weights_are_loaded_or_not_as_asked(bert):
    from transformers import BertModel

    there = BertModel.from_pretrained(bert).state_dict()["embeddings.word_embeddings.weight"]
    name = "embeddings.word_embeddings.weight"
    loaded, fresh = (
        make(model="ViT-mini", text_model=str(bert), text_pretrained=asked).clip.text.transformer.state_dict()[name]
        for asked in (True, False)
    )
    assert torch.equal(loaded, there) and not torch.equal(fresh, there)


def test_a_hugging_face_text_tower_trains(bert, tmp_path):
    from protoclip_lab.training import train

    table = toy_table(tmp_path)
    assert train(toy_settings(table, tmp_path / "run", text_model=str(bert), episodes=2)).finished


def test_over_long_captions_keep_their_end_token():
    tokenizer = make(model="ViT-mini").tokenizer
    tokens = tokenizer(CAPTIONS)
    end = tokenizer(["x"])[0].max()
    assert tokens[1, -1] == end  # the highest id, at which open_clip pools


def test_pretrained_weights_come_from_a_file_a_folder_and_for_the_image_tower_alone(tmp_path):
    source = make(model="ViT-mini", seed=5)
    folder = save(source, tmp_path / "source")
    there = source.clip.state_dict()
    for pretrained in (folder, folder / "open_clip_model.safetensors"):
        both = make(model="ViT-mini", pretrained=str(pretrained)).clip.state_dict()
        assert all(torch.equal(both[name], there[name]) for name in there)
    image = make(model="ViT-mini", pretrained=str(folder), pretrained_towers="image").clip.state_dict()
    assert all(torch.equal(image[name], there[name]) == True for name in there if name.startswith("visual."))  # noqa: E712
    assert not torch.equal(image["token_embedding.weight"], there["token_embedding.weight"])
    by_folder = encoders.create(TrainConfig(model=f"local-dir:{folder}")).clip.state_dict()
    assert all(torch.equal(by_folder[name], there[name]) for name in there)


def test_an_image_tower_alone_goes_with_a_hugging_face_text_tower(bert, tmp_path):
    folder = save(make(model="ViT-mini", seed=5), tmp_path / "source")
    model = make(model="ViT-mini", pretrained=str(folder), pretrained_towers="image", text_model=str(bert))
    assert torch.equal(model.clip.visual.proj, encoders.load(folder).clip.visual.proj)


def test_heads_start_equal_and_have_the_stated_shape():
    model = make(model="ViT-mini", projection_depth=2)
    kinds = [type(layer).__name__ for layer in model.image_head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    pairs = zip(model.image_head.parameters(), model.text_head.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert [type(layer).__name__ for layer in make(model="ViT-mini", projection_depth=0).image_head] == ["Linear"]


def test_heads_take_the_towers_output_before_normalisation():
    model = make(model="ViT-mini")
    batch = torch.stack([model.eval_transform(image) for image in images()])
    with torch.no_grad():
        raw = model.clip.encode_image(batch)
        expected = torch.nn.functional.normalize(model.image_head(raw), dim=1)
        assert torch.allclose(model(images=batch).image_projection, expected, atol=1e-6)
        assert torch.allclose(model(images=batch).image, torch.nn.functional.normalize(raw, dim=1), atol=1e-6)


def test_scales_start_at_one_over_007_and_stay_within_1_and_100():
    model = make(model="ViT-mini")
    assert model.clip.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert model.logit_scale_proto.exp().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.clip.logit_scale.fill_(9)
        model.logit_scale_proto.fill_(-3)
    model.clamp_scales()
    assert model.clip.logit_scale.exp().item() == pytest.approx(100)
    assert model.logit_scale_proto.exp().item() == pytest.approx(1)


def test_weights_follow_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = make(model="ViT-mini", seed=3)
    assert torch.equal(torch.rand(1), expected)
    again, other = make(model="ViT-mini", seed=3), make(model="ViT-mini", seed=4)
    assert torch.equal(first.clip.visual.proj, again.clip.visual.proj)
    assert not torch.equal(first.clip.visual.proj, other.clip.visual.proj)


def test_unknown_models_and_folders_name_the_nearest_or_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="'ViT-mni' is not known .* 'ViT-mini'"):
        make(model="ViT-mni")
    with pytest.raises(FileNotFoundError, match=r"no open_clip_config\.json"):
        encoders.load(tmp_path)


def test_heads_that_do_not_fit_their_description_are_refused(tmp_path):
    folder = save(make(model="ViT-mini"), tmp_path / "checkpoint")
    about = json.loads((folder / "heads.json").read_text())
    about["heads"]["depth"] = 2
    (folder / "heads.json").write_text(json.dumps(about))
    with pytest.raises((ValueError, RuntimeError), match="heads|size mismatch"):
        encoders.load(folder)


def test_encoding_leaves_the_mode_as_it_was_and_does_not_depend_on_the_batch_size(tmp_path):
    pairs = open_pairs(tmp_path, size=24, image_size=32)
    model = make(model="RN-mini").train()
    rows = np.array([3, 0, 7, 11, 2])
    whole = encoders.encode_pairs(model, pairs, rows)
    split = encoders.encode_pairs(model, pairs, rows, batch_size=2)
    assert model.training
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    alone = encoders.encode_images(model, [pairs.image(r) for r in rows], progress=False)
    torch.testing.assert_close(alone, whole.image, rtol=1e-4, atol=1e-5)
    texts = encoders.encode_texts(model, [pairs.caption(r) for r in rows], progress=False)
    torch.testing.assert_close(texts, whole.text, rtol=1e-4, atol=1e-5)
