"""Towers from open_clip: made, locked, saved, and loaded by us and by open_clip alone."""

import json
import os

import numpy as np
import open_clip
import pytest
import torch
from helpers import TOWERS, authors_checkpoint, toy_settings, toy_table
from PIL import Image

from protoclip_lab import encoders
from protoclip_lab.config import TrainConfig
from protoclip_lab.data.shapes import open_pairs

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
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
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


def test_hugging_face_text_weights_are_loaded(bert):
    from transformers import BertModel

    name = "embeddings.word_embeddings.weight"
    loaded = make(model="ViT-mini", text_model=str(bert)).clip.text.transformer.state_dict()[name]
    assert torch.equal(loaded, BertModel.from_pretrained(bert).state_dict()[name])


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
    with pytest.raises(ValueError, match="'opnai' is no file.* 'openai'"):
        make(model="RN50", pretrained="opnai")
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json"):
        encoders.load(tmp_path)


def test_heads_that_do_not_fit_their_description_are_refused(tmp_path):
    folder = save(make(model="ViT-mini"), tmp_path / "checkpoint")
    about = json.loads((folder / "heads.json").read_text())
    about["heads"]["depth"] = 2
    (folder / "heads.json").write_text(json.dumps(about))
    with pytest.raises((ValueError, RuntimeError), match="heads|size mismatch"):
        encoders.load(folder)


@pytest.mark.parametrize("objective", ["clip", "protoclip"])
def test_a_checkpoint_without_its_towers_is_refused_not_drawn_at_random(objective, tmp_path):
    folder = save(make(model="ViT-mini", objective=objective), tmp_path / "checkpoint")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="(?s)checkpoint holds no weights of .* Name another"):
        encoders.load(folder)


def test_encoding_is_in_eval_mode_and_does_not_depend_on_the_batch_size(tmp_path):
    pairs = open_pairs(tmp_path, size=24, image_size=32)
    model = make(model="RN-mini").train()
    rows = np.array([3, 0, 7, 11, 2])
    whole = encoders.encode_pairs(model, pairs, rows)
    split = encoders.encode_pairs(model, pairs, rows, batch_size=2)
    assert not model.training
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    alone = encoders.encode_images(model, [pairs.image(r) for r in rows])
    torch.testing.assert_close(alone.image, whole.image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.image_projection, whole.image_projection, rtol=1e-4, atol=1e-5)
    assert alone.text is None and alone.text_projection is None
    texts = encoders.encode_texts(model, [pairs.caption(r) for r in rows])
    torch.testing.assert_close(texts, whole.text, rtol=1e-4, atol=1e-5)


def test_an_unreadable_image_has_nan_features_and_is_named(caplog):
    class Broken(list):
        def __getitem__(self, index):
            if index == 1:
                raise OSError("folder/1.png is not a readable image")
            return super().__getitem__(index)

    model = make(model="RN-micro")
    found = encoders.encode_images(model, Broken(images()), batch_size=2)
    whole = encoders.encode_images(model, images(), batch_size=2)
    for part, expected in ((found.image, whole.image), (found.image_projection, whole.image_projection)):
        assert part[1].isnan().all()
        torch.testing.assert_close(part[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-6)
    assert [record.getMessage() for record in caplog.records] == ["folder/1.png is not a readable image"]


def test_fingerprint_tells_one_bit_of_a_weight_and_the_preprocessing_and_not_a_reload(tmp_path):
    model = make(model="RN-micro")
    folder = save(model, tmp_path / "checkpoint")
    expected = encoders.fingerprint(encoders.load(folder))
    assert encoders.fingerprint(encoders.load(folder)) == expected == encoders.fingerprint(model)
    names = ["clip.visual.attnpool.c_proj.weight", "clip.visual.bn1.running_var", "image_head.0.bias"]
    seen = {expected}
    for name in names:
        changed = encoders.load(folder)
        changed.state_dict()[name].view(torch.int32).flatten()[-1] ^= 1
        seen.add(encoders.fingerprint(changed))
    about = json.loads((folder / "open_clip_config.json").read_text())
    about["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    seen.add(encoders.fingerprint(encoders.load(folder)))
    assert len(seen) == 5


# --- weights of open_clip, by name


def test_weights_of_a_named_open_clip_model_give_its_own_features(tmp_path):
    file = tmp_path / "weights.pt"
    torch.save(encoders.create(TrainConfig(model="RN-micro", seed=5)).clip.state_dict(), file)
    plain, _, preprocess = open_clip.create_model_and_transforms("RN-micro", pretrained=str(file))
    plain.eval()
    ours = encoders.load(f"open_clip:RN-micro/{file}")
    batch = torch.stack([ours.eval_transform(image) for image in images()])
    assert torch.equal(batch, torch.stack([preprocess(image) for image in images()]))
    tokens = open_clip.get_tokenizer("RN-micro")(CAPTIONS)
    assert torch.equal(ours.tokenizer(CAPTIONS), tokens)
    with torch.no_grad():
        found = ours(batch, tokens)
        assert torch.equal(found.image, plain.encode_image(batch, normalize=True))
        assert torch.equal(found.text, plain.encode_text(tokens, normalize=True))
    assert found.image_projection is found.image and found.text_projection is found.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:RN5O/openai", "'RN5O' is not known .* 'RN50'"),
        ("open_clip:RN50/opnai", "'opnai' is no file.* 'openai'"),
        ("open_clip:RN50", "write open_clip:NAME/TAG"),
    ],
)
def test_unknown_names_and_tags_of_open_clip_name_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        encoders.load(name)


# --- checkpoints of the ProtoCLIP authors' code


@pytest.mark.parametrize(
    ("tower", "depth", "prefix", "numpy_core"),
    [
        ("RN", 1, "module.", "core"),
        ("ViT", 0, "", "_core"),
        ("ViT", 2, "module.", "_core"),
        ("RN", None, "", "core"),
    ],
)
def test_checkpoint_of_the_authors_gives_the_six_outputs_of_its_weights(tower, depth, prefix, numpy_core, tmp_path):
    file = tmp_path / "epoch_2.pt"
    clip, *heads = authors_checkpoint(file, tower, depth=depth, prefix=prefix, numpy_core=numpy_core)
    model = encoders.load(file)
    generator = torch.Generator().manual_seed(0)
    size = TOWERS[tower]["image_size"]
    batch = torch.randn(3, 3, size, size, generator=generator)
    tokens = torch.randint(64, (3, 16), generator=generator)
    with torch.no_grad():
        raw = [clip.encode_image(batch), clip.encode_text(tokens)]
        projected = raw if depth is None else [head(x) for head, x in zip(heads, raw, strict=True)]
        expected = [torch.nn.functional.normalize(x, dim=1) for x in (*raw, *projected)]
        for mine, theirs in zip(model(batch, tokens), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert model.clip.logit_scale.item() == 3.25
    assert model.logit_scale_proto is None if depth is None else model.logit_scale_proto.item() == 2.5
    assert not model.training and model.eval_transform(images()[0]).shape == (3, size, size)
    assert model.tokenizer(CAPTIONS).shape == (2, 16)
    # Another activation would show: QuickGELU it is, whatever the tower.
    activations = {type(module).__name__ for module in model.modules() if "GELU" in type(module).__name__}
    assert activations == {"QuickGELU"}


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_checkpoint_with_other_python_objects_is_refused_and_none_of_them_runs(tmp_path):
    file = tmp_path / "epoch_1.pt"
    torch.save({"state_dict": {}, "name": Canary(tmp_path / "sung")}, file)
    with pytest.raises(ValueError, match=r"epoch_1.pt is no checkpoint of the ProtoCLIP authors' code \(UnpicklingError\)$"):
        encoders.load(file)
    assert not (tmp_path / "sung").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "sung").exists()


@pytest.mark.parametrize("content", [{}, {"state_dict": {"fc.weight": torch.zeros(2, 2)}}], ids=str)
def test_a_pt_file_of_something_else_is_refused_saying_what_was_expected(content, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt is no checkpoint of the ProtoCLIP authors' code"):
        encoders.load(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        encoders.load(tmp_path / "none.pt")
