"""Sets known by name, each laid out as it is on disk; a picture's colour tells its class."""

import json
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import struct
import tarfile
from importlib import resources
from itertools import count

import numpy as np
import open_clip
import pytest
import torch
import torchvision.datasets as tv
from PIL import Image
from scipy.io import savemat

from protoclip_lab import encoders
from protoclip_lab.data import downstream
from protoclip_lab.data.downstream import KNOWN, PairImages, captioned, known
from protoclip_lab.data.pairs import prepare
from protoclip_lab.evaluation import suite

# ISO 3166 codes of Country211 (and XK), as its folders are named: first letter, then the second ones.
COUNTRIES = """ADEFGILMOQRTUWXZ BABDEFGHJMNOQRSTWYZ CADFHIKLMNORUVWYZ DEKMOZ ECEGST FIJKOR GABDEFGHILMPRSTUY HKNRTU IDELMNQRST
JEMOP KEGHNPRWYZ LABCIKRTUVY MACDEFGKLMNOQRTUVWXYZ NACGILOPZ OM PAEFGHKLRSTWY QA REOSUW SABCDEGHIJKLMNOSVXYZ
TGHJLMNORTWZ UAGSYZ VAEGINU WS XK YE ZAMW"""
COUNTRIES = [word[0] + second for word in COUNTRIES.split() for second in word[1:]]
ACTIONS = ["ApplyEyeMakeup", "HandstandPushups", "TaiChi", "YoYo"]
CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura Integra Type R 2001", "smart fortwo 2012"]
RNG = np.random.default_rng(0)


def save(file, label, kind="JPEG"):
    file.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(16 * (label >> shift & 15) + 8 for shift in (8, 4, 0))
    Image.new("RGB", (4, 4), colour).save(file, kind, **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {}))


def shown(images):
    digits = [np.asarray(image)[0, 0].astype(int) // 16 for image in images]
    return [256 * high + 16 * middle + low for high, middle, low in digits]


def class_folders(folder, classes, copies=1):
    for label in RNG.permutation(len(classes)):
        for copy in range(copies):
            save(folder / classes[label] / f"{copy}.JPEG", int(label))


def cifar_file(file, labels, key="labels"):
    """A pickle as Python 2's cPickle wrote CIFAR's: every string is a BINSTRING, lists grow by batches of 1000."""
    memo, n = count(1), len(labels)

    def put(code):
        number = next(memo)
        return code + (b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<i", number))

    def text(value):
        return put((b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value)

    def items(codes):
        batches = (codes[start : start + 1000] for start in range(0, n, 1000))
        return put(b"]") + b"".join(b"(" + b"".join(batch) + b"e" for batch in batches)

    pixels = RNG.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    pixels[:, :, 0, 0] = [[8, 16 * (label >> 4) + 8, 16 * (label & 15) + 8] for label in labels]
    array = put(b"cnumpy.core.multiarray\n_reconstruct\n") + put(b"cnumpy\nndarray\n") + put(b"K\0\x85")
    array = put(array + text(b"b") + b"\x87") + b"R(K\x01" + put(b"M" + struct.pack("<H", n) + b"M\0\x0c\x86")
    array += put(put(b"cnumpy\ndtype\n") + text(b"u1") + b"K\0K\x01\x87") + b"R(K\x03" + text(b"|")
    array += b"NNN" + 2 * b"J\xff\xff\xff\xff" + put(b"K\0t") + b"b\x89" + put(text(pixels.tobytes()) + b"t") + b"b"
    names = items([text(f"a_picture_s_{index:06}.png".encode()) for index in range(n)])
    parts = {"batch_label": text(b"testing batch 1 of 1"), key: items([b"K" + bytes([label]) for label in labels])}
    if key == "fine_labels":
        parts = {"filenames": names, **parts, "coarse_labels": items([b"K\x13"] * n), "data": array}
    else:
        parts |= {"data": array, "filenames": names}
    file.parent.mkdir(parents=True, exist_ok=True)
    body = b"".join(text(name.encode()) + value for name, value in parts.items())
    file.write_bytes(b"\x80\x02" + put(b"}") + b"(" + body + b"u.")


def arrays(root):
    """CIFAR-10, CIFAR-100 and STL-10 as torchvision unpacks them; CIFAR-10's test file has more than 1000 images."""
    ten, hundred = root / "cifar-10-batches-py", root / "cifar-100-python"
    cifar_file(ten / "test_batch", RNG.integers(0, 10, 1030).tolist())
    for number in range(1, 6):
        cifar_file(ten / f"data_batch_{number}", [*range(10)] * 4)
    cifar_file(hundred / "test", RNG.permutation(100).tolist(), "fine_labels")
    cifar_file(hundred / "train", RNG.permutation(100).tolist(), "fine_labels")
    names = {ten / "batches.meta": "label_names", hundred / "meta": "fine_label_names"}
    for (file, key), name in zip(names.items(), ("cifar10", "cifar100"), strict=True):
        file.write_bytes(pickle.dumps({key: [c.replace(" ", "_") for c in KNOWN[name]["classes"]]}, protocol=2))
    stl = root / "stl10_binary"
    stl.mkdir()
    for part, labels in (("train", np.arange(10)), ("test", RNG.integers(0, 10, 13))):
        pixels = RNG.integers(0, 256, (len(labels), 3, 96, 96), dtype=np.uint8)
        pixels[:, :, 0, 0] = [[8, 8, 16 * label + 8] for label in labels]
        pixels.transpose(0, 1, 3, 2).tofile(stl / f"{part}_X.bin")  # column by column
        (labels + 1).astype(np.uint8).tofile(stl / f"{part}_y.bin")
    (stl / "class_names.txt").write_text("\n".join(KNOWN["stl10"]["classes"]))


@pytest.fixture(scope="module")
def authors(tmp_path_factory):
    """The layout of ProtoCLIP's authors."""
    root = tmp_path_factory.mktemp("authors")
    wnids = [f"n{number:08}" for number in range(1440764, 1440764 + 7 * 1000, 7)]
    class_folders(root / "imagenet" / "test", wnids)
    class_folders(root / "imagenet" / "train", wnids)
    class_folders(root / "birdsnap" / "test", ["Acadian_Flycatcher", "Baird's_Sparrow", "Blue_Jay"], 2)
    numbers = {"flowers102": map(str, range(102)), "gtsrb": map(str, range(43))}  # not padded with zeros
    for name, classes in {**numbers, "country211": COUNTRIES, "stanford_cars": sorted(CARS)}.items():
        class_folders(root / name / "test", list(classes))
    for number, copies in ((1, 1), (2, 2), (3, 3)):
        class_folders(root / "ucf101" / f"testlist0{number}", ACTIONS, copies)
    class_folders(root / "ucf101" / "trainlist01", ACTIONS)
    arrays(root)
    for number in (139, 285):
        save(root / "coco2017" / "val2017" / f"{number:012}.jpg", number)
    images = [{"id": n, "file_name": f"{n:012}.jpg", "height": 4} for n in (285, 139)]
    captions = [{"image_id": n, "id": k, "caption": f"{n}\n k{k} "} for k in range(5) for n in (139, 285)]
    (root / "coco2017" / "annotations").mkdir()
    content = json.dumps({"info": {}, "images": images, "annotations": captions})
    (root / "coco2017" / "annotations" / "captions_val2017.json").write_text(content)
    return root


@pytest.fixture(scope="module")
def other(tmp_path_factory, authors):
    """The layouts that torchvision's readers want, all under one root; CIFAR and STL each in a folder of its own."""
    root = tmp_path_factory.mktemp("torchvision")
    folders = {name: KNOWN[name]["train"][0].split("/")[0] for name in ("cifar10", "cifar100", "stl10")}
    for name, folder in {**folders, "imagenet": "val"}.items():
        (root / name).mkdir()
        (root / name / folder).symlink_to(authors / ("imagenet/test" if folder == "val" else folder))
    (root / "country211").symlink_to(authors / "country211")
    (root / "birdsnap").mkdir()
    with tarfile.open(root / "birdsnap" / "test.tar", "w") as tar:
        tar.add(authors / "birdsnap" / "test", "test")
    labels, flowers = RNG.permutation(np.repeat(np.arange(102), 2)), root / "flowers-102"
    for number, label in enumerate(labels, 1):
        save(flowers / "jpg" / f"image_{number:05}.jpg", int(label))
    savemat(flowers / "imagelabels.mat", {"labels": (labels + 1)[None].astype(np.uint8)})
    test, train, valid = np.split(RNG.permutation(204) + 1, [120, 160])
    savemat(flowers / "setid.mat", {"trnid": train[None], "valid": valid[None], "tstid": test[None]})
    signs, rows = root / "gtsrb", ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\r\n"]
    for number, label in enumerate(RNG.permutation(43).tolist()):
        save(signs / "GTSRB" / "Training" / f"{label:05}" / "00000_00000.ppm", label, "PPM")
        (signs / "GTSRB" / "Training" / f"{label:05}" / f"GT-{label:05}.csv").write_text("Filename;Width\n")
        save(signs / "GTSRB" / "Final_Test" / "Images" / f"{number:05}.ppm", label, "PPM")
        rows.append(f"{number:05}.ppm;4;4;0;0;3;3;{label}\r\n")
    (signs / "GT-final_test.csv").write_bytes("".join(rows).encode())
    cars = root / "stanford_cars"
    (cars / "devkit").mkdir(parents=True)
    savemat(cars / "devkit" / "cars_meta.mat", {"class_names": np.array([CARS], dtype=object)})
    for part, annotations in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        marks = [(1, 1, 4, 4, label + 1, f"{number:05}.jpg") for number, label in enumerate([2, 0, 3, 1, 2], 1)]
        for *_, label, name in marks:
            save(cars / f"cars_{part}" / name, label - 1)
        fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
        savemat(cars / annotations, {"annotations": np.array([marks], dtype=[(field, object) for field in fields])})
    return root


@pytest.mark.parametrize(
    "row",
    """authors imagenet 1000 1000 1000 80, authors cifar10 1030 200 10 18, authors cifar100 100 100 100 18,
    authors stl10 13 10 10 2, authors birdsnap 6 0 3 1, authors country211 211 0 211 5, authors flowers102 102 0 102 1,
    authors gtsrb 43 0 43 3, authors ucf101 4+8+12 0 4 48, authors stanford_cars 4 0 4 8,
    other imagenet 1000 0 1000 80, other cifar10 1030 200 10 18, other cifar100 100 100 100 18, other stl10 13 10 10 2,
    other birdsnap 6 0 3 1, other country211 211 0 211 5, other flowers102 120 40 102 1, other gtsrb 43 43 43 3,
    other stanford_cars 5 5 4 8""".split(","),
)
def test_each_image_has_the_label_it_shows(request, row):
    layout, name, sizes, *numbers = row.split()
    sizes, (train, classes, templates) = [int(size) for size in sizes.split("+")], map(int, numbers)
    root = request.getfixturevalue(layout)
    parts = known(name, root)
    assert [len(part.images) for part in parts] == sizes
    if train:
        parts += known(name, root, "train")
        assert len(parts[-1].images) == train
    else:
        with pytest.raises(FileNotFoundError, match="To get it: "):
            known(name, root, "train")
    for part in parts:
        assert shown(part.images) == part.labels.tolist() and part.labels.dtype == np.int64
        assert len(part.class_names) == len(part.classes) == classes
        assert part.classes == parts[0].classes
    assert len({part.images.fingerprint for part in parts}) == len(parts)
    assert len({image for part in parts for image in part.images.names}) == sum(sizes) + train
    assert len(downstream.templates(KNOWN[name]["templates"])) == templates


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:dtype")  # of CIFAR's pickles, in NumPy
@pytest.mark.parametrize("part", ["test", "train"])
@pytest.mark.parametrize("kind", [tv.CIFAR10, tv.CIFAR100, tv.STL10, tv.Flowers102, tv.GTSRB, tv.StanfordCars])
def test_torchvision_reads_the_same(other, monkeypatch, kind, part):
    for module in (tv.cifar, tv.stl10, tv.flowers102):
        monkeypatch.setattr(module, "check_integrity", lambda *_: True)
    name = "stanford_cars" if kind is tv.StanfordCars else kind.__name__.lower()
    root = other / name if name in ("cifar10", "cifar100", "stl10") else other
    which = {"train": part == "train"} if name.startswith("cifar") else {"split": part}
    (found,), theirs = known(name, other, part), kind(str(root), **which)
    assert [label for _, label in theirs] == found.labels.tolist()
    for (image, _), own in zip(theirs, found.images, strict=True):
        np.testing.assert_array_equal(own, image)
    if name != "gtsrb":  # it has no names there
        classes = [re.sub("[_-]", " ", name.casefold()) for name in (*found.class_names, *theirs.classes)]
        pairs = zip(classes[: len(found.classes)], classes[len(found.classes) :], strict=True)
        # CLIP calls two flowers otherwise.
        assert [own for own, other in pairs if own != other] in ([], ["pink and yellow dahlia", "air plant"])


def test_names_and_prompts_are_those_of_clip(authors):
    assert known("imagenet", authors)[0].class_names == list(open_clip.IMAGENET_CLASSNAMES)
    assert downstream.templates("imagenet") == [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    path = resources.files("clip_benchmark") / "datasets" / "en_zeroshot_classification_templates.json"
    theirs = json.loads(path.read_text("utf-8")) | {"flowers102": ["a photo of a {c}, a type of flower."]}
    for name in ("cifar10", "cifar100", "stl10", "country211", "gtsrb", "flowers102"):
        prompts = [prompt.replace("{c}", "{}") for prompt in theirs[name]]
        assert downstream.templates(KNOWN[name]["templates"]) == prompts
    assert downstream.templates(KNOWN["stanford_cars"]["templates"])[3] == "i love my {}!"
    assert downstream.templates(KNOWN["ucf101"]["templates"])[-1] == "a demonstration of the person practicing {}."
    country = dict(zip(COUNTRIES, known("country211", authors)[0].class_names, strict=True))
    few = {"AD": "Andorra", "CH": "Switzerland", "DE": "Germany", "KR": "South Korea", "XK": "Kosovo", "ZW": "Zimbabwe"}
    assert {code: country[code] for code in few} == few
    names = [known(name, authors)[0].class_names for name in ("birdsnap", "stanford_cars", "ucf101")]
    assert names[:2] == [["Acadian Flycatcher", "Baird's Sparrow", "Blue Jay"], sorted(CARS)]
    assert names[2] == ["Apply Eye Makeup", "Handstand Pushups", "Tai Chi", "Yo Yo"]


def test_pickle_is_never_run(tmp_path):
    file, canary = tmp_path / "cifar-10-batches-py" / "test_batch", tmp_path / "canary"
    cifar_file(file, [3, 1])
    code = b"cos\nmkdir\n(U" + bytes([len(str(canary))]) + str(canary).encode() + b"tR0"
    data = file.read_bytes()
    file.write_bytes(data[:2] + code + data[2:])
    assert known("cifar10", tmp_path)[0].labels.tolist() == [3, 1] and not canary.exists()
    pickle.loads(file.read_bytes()[: 2 + len(code)] + b"N.")
    assert canary.exists()  # it would have been


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_cut_short_files_are_named_with_the_remedy(tmp_path, authors, share):
    cifar_file(tmp_path / "cifar-10-batches-py" / "data_batch_1", [3, 1])
    for file in ("cifar-10-batches-py/test_batch", "stl10_binary/test_X.bin", "cifar-10-batches-py/data_batch_2"):
        data = (authors / file).read_bytes()
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(data[: int(share * len(data))])
    (tmp_path / "stl10_binary" / "test_y.bin").write_bytes(bytes(13))
    for part, file in (("test", "test_batch"), ("train", "data_batch_2")):
        with pytest.raises(ValueError, match=rf"{file} is cut short.*Get it again: .*CIFAR10\(root, download=True\)"):
            known("cifar10", tmp_path, part)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"test part of stl10 in .*Get it again: .*STL10\(root, download=True\)"):
            known("stl10", tmp_path)
        whole = (authors / "stl10_binary" / "test_X.bin").read_bytes()
        (tmp_path / "stl10_binary" / "test_X.bin").write_bytes(whole[: 12 * 3 * 96 * 96])  # 12 whole images of 13


@pytest.mark.parametrize("name", KNOWN)
def test_missing_set_names_each_place_and_how_to_get_it(tmp_path, name):
    with pytest.raises(FileNotFoundError) as raised:
        captioned(name, tmp_path, tmp_path) if "images" in KNOWN[name] else known(name, tmp_path)
    places = KNOWN[name]["test"] + ([] if "images" in KNOWN[name] else [f"{name}/test", f"{name}/test.tar"])
    assert all(str(tmp_path / place) in str(raised.value) for place in places)
    assert KNOWN[name]["get"] in str(raised.value)


def test_class_lists_that_do_not_fit_are_refused(tmp_path):
    class_folders(tmp_path / "gtsrb" / "test", [str(number) for number in range(42)])
    with pytest.raises(ValueError, match="43 class names are given for the 42 classes"):
        known("gtsrb", tmp_path)
    # In the order of its own index, not of the folders.
    class_folders(tmp_path / "flowers102" / "test", downstream.class_names("flowers"))
    with pytest.raises(ValueError, match="class name 0 is 'pink primrose', .* 'air plant': lists must agree"):
        known("flowers102", tmp_path)
    cifar_file(tmp_path / "cifar-10-batches-py" / "test_batch", [3, 10])
    with pytest.raises(ValueError, match="has label 10, cifar10 only 10 class names"):
        known("cifar10", tmp_path)
    class_folders(tmp_path / "birdsnap" / "test", ["000", "001", "003"])
    with pytest.raises(ValueError, match=r"are numbers: put the names, one a line, into .*birdsnap.classes\.txt"):
        known("birdsnap", tmp_path)
    (tmp_path / "birdsnap" / "classes.txt").write_text("Coopers Hawk\nNorthern Goshawk\nGolden Eagle\n")
    assert known("birdsnap", tmp_path)[0].class_names == ["Coopers Hawk", "Northern Goshawk", "Golden Eagle"]


def test_fingerprint_changes_with_a_file(tmp_path, authors):
    files = {"cifar10": "cifar-10-batches-py/test_batch", "stl10": "stl10_binary/test_X.bin"}
    for name, file in (files | {"birdsnap": "birdsnap/test/Blue_Jay/1.JPEG"}).items():
        shutil.copytree(authors / file.split("/")[0], tmp_path / file.split("/")[0])
        before = known(name, tmp_path)[0].images.fingerprint
        assert known(name, tmp_path)[0].images.fingerprint == before
        os.utime(tmp_path / file, ns=(0, 10**9))
        assert known(name, tmp_path)[0].images.fingerprint != before


def test_images_are_read_in_other_processes(other):
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        for name in ("stl10", "stanford_cars", "birdsnap"):
            (part,) = known(name, other)
            assert shown(pool.map(part.images.__getitem__, range(5))) == part.labels[:5].tolist()


def captions_of(root, name, out):
    given = captioned(name, root, out / "tables")
    return PairImages(prepare(given.pop("table"), out / name, **given, progress=False))


def test_coco_captions_go_with_their_images(authors, tmp_path):
    found = captions_of(authors, "coco2017", tmp_path / "out")
    assert len(found) == 2 and len(found.pairs) == 10
    values = shown(found.pairs.image(row) for row in range(10))
    assert [f"{value}" for value in values] == [caption.split()[0] for caption in found.pairs.captions]
    assert "139 k4" in found.pairs.captions
    shutil.copytree(authors / "coco2017", tmp_path / "coco2017")
    (tmp_path / "coco2017" / "annotations" / "captions_val2017.json").write_text('{"annotations": [], "info": {}}')
    with pytest.raises(ValueError, match=r"captions_val2017\.json holds no captions: KeyError\('images'\)"):
        captioned("coco2017", tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("form", "pictures"), [("captions.tsv", "test.tar"), ("dataset_{}.json", "Images"), ("dataset.json", "own folder")]
)
@pytest.mark.parametrize(("name", "own"), [("flickr8k", "Flicker8k_Dataset"), ("flickr30k", "flickr30k-images")])
def test_flickr_gives_its_test_part(tmp_path, name, own, form, pictures):
    folder = tmp_path / name
    folder.mkdir()
    rows = [(f"{7 * n}_a.jpg", f"{7 * n} k{k}", "test" if n % 2 else "train") for n in range(6) for k in range(5)]
    images = {file: {"filename": file, "split": split, "sentences": []} for file, _, split in rows}
    for file, caption, _ in rows:
        images[file]["sentences"].append({"raw": caption, "tokens": []})
    table = "\n".join(["filepath\ttitle\tsplit", *("\t".join(row) for row in rows)])
    content = table if form.endswith("tsv") else json.dumps({"dataset": name, "images": [*images.values()]})
    (folder / form.format(name)).write_text(content)
    for number in (7, 21, 35):  # the test part alone, as in a tar of it
        save(folder / own / f"{number}_a.jpg", number)
    if pictures == "test.tar":
        with tarfile.open(folder / pictures, "w") as tar:
            tar.add(folder / own, "./")
    if pictures != "own folder":
        (folder / own).rename(folder / ("Images" if pictures == "Images" else "elsewhere"))
    found = captions_of(tmp_path, name, tmp_path / "out")
    assert shown(found) == [7, 21, 35]
    assert found.pairs.captions == [caption for _, caption, split in rows if split == "test"]


@pytest.fixture
def encoded(monkeypatch):
    """Encoders that need no model: a picture's feature is its colour, a text's its letters."""

    def encode_images(model, images, **options):
        z = torch.tensor(np.array([np.asarray(image)[0, 0] for image in images]), dtype=torch.float32) - 120
        return encoders.Outputs(torch.nn.functional.normalize(z), None, torch.nn.functional.normalize(z), None)

    def encode_texts(model, texts, **options):
        z = np.array([(sum(text.encode()) % 97, len(text) % 13, ord(text[-2]) % 29) for text in texts], np.float32)
        return torch.nn.functional.normalize(torch.from_numpy(z - 11))

    monkeypatch.setattr(encoders, "encode_images", encode_images)
    monkeypatch.setattr(encoders, "encode_texts", encode_texts)


TEN = [name for name in KNOWN if "images" not in KNOWN[name]]


def test_ten_sets_in_one_call_and_those_that_cannot_be_are_reported(encoded, authors, tmp_path, caplog):
    assert len(TEN) == 10
    for entry in authors.iterdir():
        if entry.name not in ("birdsnap", "stanford_cars", "flowers102"):
            (tmp_path / entry.name).symlink_to(entry)
    class_folders(tmp_path / "flowers102" / "test", ["rose", "daisy"])
    sets = [{"name": name, "root": str(tmp_path), "measures": ["zero_shot"]} for name in [*TEN, "coco2017"]]
    sets[TEN.index("cifar10")]["measures"] = ["zero_shot", "knn"]
    sets[-1]["measures"] = ["retrieval"]
    with caplog.at_level(logging.WARNING):
        rows = suite.evaluate(None, sets, draws=5)
    assert {row["dataset"] for row in rows} == {*TEN, "coco2017"} - {"birdsnap", "stanford_cars", "flowers102"}
    values = {(row["dataset"], row["measure"]): row["value"] for row in rows}
    assert values["cifar10", "knn_accuracy"] > 99 and ("cifar100", "knn_accuracy") not in values
    reported = [record.getMessage() for record in caplog.records if record.name.startswith("protoclip_lab")]
    assert [message.split()[2] for message in reported] == ["birdsnap", "flowers102", "stanford_cars"]
    assert str(tmp_path / "birdsnap" / "test") in reported[0] and KNOWN["birdsnap"]["get"] in reported[0]
    assert "102 class names are given for the 2 classes" in reported[1]


def test_a_set_without_its_train_part_is_measured_all_the_same(encoded, other, tmp_path):
    for name in ("gtsrb", "stanford_cars"):
        shutil.copytree(other / name, tmp_path / name, ignore=lambda *_: ["Training", "cars_train"])
    rows = suite.evaluate(None, [{"name": name, "root": str(tmp_path)} for name in ("gtsrb", "stanford_cars")], draws=5)
    assert {row["dataset"] for row in rows if row["measure"] == "zero_shot_top1"} == {"gtsrb", "stanford_cars"}


def test_several_test_lists_give_their_mean(encoded, authors, tmp_path):
    def measured(*numbers):
        root = tmp_path / str(numbers)
        for number in numbers:
            class_folders(root / "ucf101" / f"testlist0{number}", ACTIONS[number - 1 :], number)
        rows = suite.evaluate(None, [{"name": "ucf101", "root": str(root), "measures": ["zero_shot"]}], draws=5)
        return {row["measure"]: np.array([row["value"], row["low"], row["high"]]) for row in rows}

    first, second, both = measured(1), measured(2), measured(1, 2)
    assert any((first[name] != second[name]).any() for name in first)
    for name, value in both.items():
        np.testing.assert_allclose(value, (first[name] + second[name]) / 2)
