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
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import torchvision.datasets as tv
from PIL import Image
from scipy.io import savemat

from protoclip_lab import encoders
from protoclip_lab.data import downstream
from protoclip_lab.data.downstream import KNOWN, PairImages, captioned, known
from protoclip_lab.data.pairs import prepare
from protoclip_lab.evaluation import suite

# ISO 3166 codes of Country211 (and XK), as its folders are named: first letter, then the second ones.
CODES = """ADEFGILMOQRTUWXZ BABDEFGHJMNOQRSTWYZ CADFHIKLMNORUVWYZ DEKMOZ ECEGST FIJKOR GABDEFGHILMPRSTUY HKNRTU
IDELMNQRST JEMOP KEGHNPRWYZ LABCIKRTUVY MACDEFGKLMNOQRTUVWXYZ NACGILOPZ OM PAEFGHKLRSTWY QA REOSUW SABCDEGHIJKLMNOSVXYZ
TGHJLMNORTWZ UAGSYZ VAEGINU WS XK YE ZAMW"""
COUNTRIES = [word[0] + second for word in CODES.split() for second in word[1:]]
ACTIONS = ["ApplyEyeMakeup", "HandstandPushups", "TaiChi", "YoYo"]
CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura Integra Type R 2001", "smart fortwo 2012"]
RNG = np.random.default_rng(0)


def save(file, label):
    file.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(16 * (label >> shift & 15) + 8 for shift in (8, 4, 0))
    Image.new("RGB", (4, 4), colour).save(file, quality=100, subsampling=0)


def shown(images):
    digits = [np.asarray(image)[0, 0].astype(int) // 16 for image in images]
    return [256 * high + 16 * middle + low for high, middle, low in digits]


def class_folders(folder, classes, copies=1):
    for number in RNG.permutation(len(classes) * copies).tolist():
        save(folder / classes[number // copies] / f"{number % copies}.JPEG", number // copies)


def cifar_file(file, labels, key="labels"):
    """A pickle as Python 2's cPickle wrote CIFAR's: every string is a BINSTRING, lists grow by batches of 1000."""
    memo, n = iter(range(1, 10**6)), len(labels)

    def put(code):
        number = next(memo)
        return code + (b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<i", number))

    def text(value):
        return put((b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value)

    def items(codes):
        return put(b"]") + b"".join(b"(" + b"".join(codes[i : i + 1000]) + b"e" for i in range(0, n, 1000))

    pixels = RNG.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    pixels[:, :, 0, 0] = [[8, 16 * (label >> 4) + 8, 16 * (label & 15) + 8] for label in labels]
    array = put(b"cnumpy.core.multiarray\n_reconstruct\n") + put(b"cnumpy\nndarray\n") + put(b"K\0\x85")
    array = put(array + text(b"b") + b"\x87") + b"R(K\x01" + put(b"M" + struct.pack("<H", n) + b"M\0\x0c\x86")
    array += put(put(b"cnumpy\ndtype\n") + text(b"u1") + b"K\0K\x01\x87") + b"R(K\x03" + text(b"|")
    array += b"NNN" + 2 * b"J\xff\xff\xff\xff" + put(b"K\0t") + b"b\x89" + put(text(pixels.tobytes()) + b"t") + b"b"
    parts = {"batch_label": text(b"testing batch 1 of 1"), key: items([b"K" + bytes([label]) for label in labels])}
    parts |= {"coarse_labels": items([b"K\x13"] * n)} if key == "fine_labels" else {}
    parts |= {"data": array, "filenames": items([text(f"a_picture_s_{i:06}.png".encode()) for i in range(n)])}
    if key == "fine_labels":
        parts = {"filenames": parts.pop("filenames"), **parts}
    file.parent.mkdir(parents=True, exist_ok=True)
    body = b"".join(text(name.encode()) + value for name, value in parts.items())
    file.write_bytes(b"\x80\x02" + put(b"}") + b"(" + body + b"u.")


@pytest.fixture(scope="module")
def authors(tmp_path_factory):
    """The layout of ProtoCLIP's authors. CIFAR-10's test file has more than 1000 images."""
    root = tmp_path_factory.mktemp("authors")
    wnids = [f"n{number:08}" for number in range(1440764, 1440764 + 7 * 1000, 7)]
    for part in ("test", "train"):
        class_folders(root / "imagenet" / part, wnids)
    class_folders(root / "birdsnap" / "test", ["Acadian_Flycatcher", "Baird's_Sparrow", "Blue_Jay"], 2)
    numbers = {"flowers102": map(str, range(102)), "gtsrb": map(str, range(43))}  # not padded with zeros
    for name, classes in {**numbers, "country211": COUNTRIES, "stanford_cars": sorted(CARS)}.items():
        class_folders(root / name / "test", list(classes))
    for number in (1, 2, 3):
        class_folders(root / "ucf101" / f"testlist0{number}", ACTIONS, number)
    class_folders(root / "ucf101" / "trainlist01", ACTIONS)
    ten, hundred = root / "cifar-10-batches-py", root / "cifar-100-python"
    cifar_file(ten / "test_batch", RNG.integers(0, 10, 1030).tolist())
    for number in range(1, 6):
        cifar_file(ten / f"data_batch_{number}", [*range(10)] * 4)
    for part in ("test", "train"):
        cifar_file(hundred / part, RNG.permutation(100).tolist(), "fine_labels")
    (ten / "batches.meta").write_bytes(pickle.dumps({"label_names": sorted(KNOWN["cifar10"]["classes"])}, 2))
    (hundred / "meta").write_bytes(pickle.dumps({"fine_label_names": sorted(KNOWN["cifar100"]["classes"])}, 2))
    stl = root / "stl10_binary"
    stl.mkdir()
    for part, labels in (("train", np.arange(10)), ("test", RNG.integers(0, 10, 13))):
        pixels = RNG.integers(0, 256, (len(labels), 3, 96, 96), dtype=np.uint8)
        pixels[:, :, 0, 0] = [[8, 8, 16 * label + 8] for label in labels]
        pixels.transpose(0, 1, 3, 2).tofile(stl / f"{part}_X.bin")  # column by column
        (labels + 1).astype(np.uint8).tofile(stl / f"{part}_y.bin")
    (stl / "class_names.txt").write_text("\n".join(sorted(KNOWN["stl10"]["classes"])))
    return root


@pytest.fixture(scope="module")
def other(tmp_path_factory, authors):
    """The layouts that torchvision's readers want, all under one root; CIFAR and STL each in a folder of its own."""
    root = tmp_path_factory.mktemp("torchvision")
    folders = {name: KNOWN[name]["train"][0].split("/")[0] for name in ("cifar10", "cifar100", "stl10")}
    for name, folder in {**folders, "imagenet": "val"}.items():
        (root / name).mkdir()
        (root / name / folder).symlink_to(authors / ("imagenet/test" if folder == "val" else folder))
    (root / "birdsnap").mkdir()
    with tarfile.open(root / "birdsnap" / "test.tar", "w") as tar:
        tar.add(authors / "birdsnap" / "test", "test")
    labels, flowers = RNG.permutation(np.repeat(np.arange(102), 2)), root / "flowers-102"
    for number, label in enumerate(labels, 1):
        save(flowers / "jpg" / f"image_{number:05}.jpg", int(label))
    savemat(flowers / "imagelabels.mat", {"labels": (labels + 1)[None].astype(np.uint8)})
    test, train, valid = np.split(RNG.permutation(204) + 1, [120, 160])
    savemat(flowers / "setid.mat", {"trnid": train[None], "valid": valid[None], "tstid": test[None]})
    signs, rows = root / "gtsrb/GTSRB", ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\r\n"]
    for number, label in enumerate(RNG.permutation(43).tolist()):
        save(signs / f"Training/{label:05}/00000_00000.ppm", label)
        (signs / f"Training/{label:05}/GT-{label:05}.csv").write_text("Filename;Width\n")
        save(signs / f"Final_Test/Images/{number:05}.ppm", label)
        rows.append(f"{number:05}.ppm;4;4;0;0;3;3;{label}\r\n")
    (root / "gtsrb" / "GT-final_test.csv").write_bytes("".join(rows).encode())
    cars = root / "stanford_cars"
    (cars / "devkit").mkdir(parents=True)
    savemat(cars / "devkit" / "cars_meta.mat", {"class_names": np.array([CARS], dtype=object)})
    marks = [(1, 1, 4, 4, label + 1, f"{number:05}.jpg") for number, label in enumerate([2, 0, 3, 1, 2], 1)]
    fields = [(field, object) for field in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for part, annotations in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        savemat(cars / annotations, {"annotations": np.array([marks], dtype=fields)})
        for *_, label, name in marks:
            save(cars / f"cars_{part}" / name, label - 1)
    return root


@pytest.mark.parametrize(
    "row",
    """authors imagenet 1000 1000 1000 80, authors cifar10 1030 200 10 18, authors cifar100 100 100 100 18,
    authors stl10 13 10 10 2, authors birdsnap 6 0 3 1, authors country211 211 0 211 5, authors flowers102 102 0 102 1,
    authors gtsrb 43 0 43 3, authors ucf101 4+8+12 0 4 48, authors stanford_cars 4 0 4 8,
    other imagenet 1000 0 1000 80, other cifar10 1030 200 10 18, other birdsnap 6 0 3 1, other gtsrb 43 43 43 3,
    other flowers102 120 40 102 1, other stanford_cars 5 5 4 8""".replace("\n   ", "").split(", "),
)
def test_each_image_has_the_label_it_shows(request, row):
    layout, name, sizes, *numbers = row.split()
    sizes, (train, classes, templates) = [int(size) for size in sizes.split("+")], map(int, numbers)
    root = request.getfixturevalue(layout)
    parts = known(name, root)
    if train:
        parts += known(name, root, "train")
    else:
        with pytest.raises(FileNotFoundError, match="To get it: "):
            known(name, root, "train")
    assert [len(part.images) for part in parts] == sizes + [train] * (train > 0)
    for part in parts:
        assert shown(part.images) == part.labels.tolist() and part.labels.dtype == np.int64
        assert len(part.class_names) == len(part.classes) == classes
        assert part.classes == parts[0].classes
    assert len({part.images.fingerprint for part in parts}) == len(parts)
    assert len({image for part in parts for image in part.images.names}) == sum(sizes) + train
    assert len(downstream.listed("templates", KNOWN[name]["templates"])) == templates


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
        pairs = zip(found.class_names, theirs.classes, strict=True)
        differ = [own for own, other in pairs if own.casefold() != other.casefold().replace("globe-", "globe ")]
        assert differ in ([], ["pink and yellow dahlia", "air plant"])  # CLIP calls two flowers otherwise


def test_names_and_prompts_are_those_of_clip(authors):
    assert known("imagenet", authors)[0].class_names == list(open_clip.IMAGENET_CLASSNAMES)
    assert downstream.listed("templates", "imagenet1k") == [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    path = resources.files("clip_benchmark") / "datasets" / "en_zeroshot_classification_templates.json"
    theirs = json.loads(path.read_text("utf-8")) | {"flowers102": ["a photo of a {c}, a type of flower."]}
    for name in ("cifar10", "cifar100", "stl10", "country211", "gtsrb", "flowers102"):
        prompts = [prompt.replace("{c}", "{}") for prompt in theirs[name]]
        assert downstream.listed("templates", KNOWN[name]["templates"]) == prompts
    assert downstream.listed("templates", KNOWN["stanford_cars"]["templates"])[3] == "i love my {}!"
    assert downstream.listed("templates", KNOWN["ucf101"]["templates"])[-1] == "a demonstration of the person practicing {}."
    countries = known("country211", authors)[0].class_names
    for code, country in {"AD": "Andorra", "CH": "Switzerland", "KR": "South Korea", "XK": "Kosovo"}.items():
        assert countries[COUNTRIES.index(code)] == country
    assert known("stanford_cars", authors)[0].class_names == sorted(CARS)


def test_pickle_is_never_run(tmp_path):
    file, canary = tmp_path / "cifar-10-batches-py" / "test_batch", tmp_path / "canary"
    cifar_file(file, [3, 1])
    code = b"cos\nmkdir\n(U" + bytes([len(str(canary))]) + str(canary).encode() + b"tR0"
    file.write_bytes(b"\x80\x02" + code + file.read_bytes()[2:])
    assert known("cifar10", tmp_path)[0].labels.tolist() == [3, 1] and not canary.exists()
    pickle.loads(b"\x80\x02" + code + b"N.")
    assert canary.exists()  # it would have been


def test_changed_files_have_another_fingerprint_and_cut_ones_are_named_with_the_remedy(tmp_path, authors):
    files = "cifar-10-batches-py/test_batch", "cifar-10-batches-py/data_batch_2", "stl10_binary/test_X.bin"
    for name, part, file in zip(("cifar10", "cifar10", "stl10"), ("test", "train", "test"), files, strict=True):
        shutil.copytree(authors / file.split("/")[0], tmp_path / file.split("/")[0], dirs_exist_ok=True)
        before, data = known(name, tmp_path, part)[0].images.fingerprint, (authors / file).read_bytes()
        assert known(name, tmp_path, part)[0].images.fingerprint == before
        os.utime(tmp_path / file, ns=(0, 10**9))
        assert known(name, tmp_path, part)[0].images.fingerprint != before
        where = f"{part} part of {name} in .* is cut short"
        for share in (0, 0.3, 0.999, 12 / 13):  # the last leaves whole pictures of STL-10's 13
            (tmp_path / file).write_bytes(data[: int(share * len(data))])
            with pytest.raises(ValueError, match=rf"{where}.*{name.upper()}\(root, download=True\)"):
                known(name, tmp_path, part)


@pytest.mark.parametrize("name", KNOWN)
def test_missing_set_names_each_place_and_how_to_get_it(tmp_path, name):
    captions = "images" in KNOWN[name]
    with pytest.raises(FileNotFoundError, match=re.escape(KNOWN[name]["get"])) as raised:
        captioned(name, tmp_path, tmp_path) if captions else known(name, tmp_path)
    for place in KNOWN[name]["test"] + ([] if captions else [f"{name}/test", f"{name}/test.tar"]):
        assert str(tmp_path / place) in str(raised.value)


def test_class_lists_that_do_not_fit_are_refused(tmp_path):
    class_folders(tmp_path / "gtsrb" / "test", [str(number) for number in range(42)])
    with pytest.raises(ValueError, match="43 class names are given for the 42 classes"):
        known("gtsrb", tmp_path)
    # In the order of its own index, not of the folders.
    class_folders(tmp_path / "flowers102" / "test", downstream.listed("classes", "flowers"))
    with pytest.raises(ValueError, match="class name 0 is 'pink primrose', .* 'air plant': lists must agree"):
        known("flowers102", tmp_path)
    cifar_file(tmp_path / "cifar-10-batches-py" / "test_batch", [3, 10])
    with pytest.raises(ValueError, match="2 images, 2 labels of 10 classes do not fit"):
        known("cifar10", tmp_path)
    class_folders(tmp_path / "birdsnap" / "test", ["000", "001", "003"])
    with pytest.raises(ValueError, match=r"class folders of .*birdsnap.test are numbers: name them"):
        known("birdsnap", tmp_path)


def test_images_are_read_in_other_processes(other):
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        for name in ("stl10", "stanford_cars", "birdsnap"):
            (part,) = known(name, other)
            assert shown(pool.map(part.images.__getitem__, range(5))) == part.labels[:5].tolist()


@pytest.fixture
def encoded(monkeypatch):  # encoders that need no model: a picture's feature is its colour, a text's its letters
    def encode_images(model, images, **options):
        z = F.normalize(torch.tensor(np.array([np.asarray(image)[0, 0] for image in images])) - 120.0)
        return encoders.Outputs(z, None, z, None)

    def encode_texts(model, texts, **options):
        return F.normalize(torch.tensor([[sum(t.encode()) % 97, len(t) % 13, ord(t[-2]) % 29] for t in texts]) - 11.0)

    for function in (encode_images, encode_texts):
        monkeypatch.setattr(encoders, function.__name__, function)
    monkeypatch.setattr(encoders, "fingerprint", lambda model: "none")


@pytest.mark.parametrize(
    "files",
    """coco2017/annotations/captions_val2017.json coco2017/val2017, flickr8k/captions.tsv flickr8k/test.tar,
    flickr8k/dataset_flickr8k.json flickr8k/Flicker8k_Dataset, flickr30k/captions.tsv flickr30k/flickr30k-images,
    flickr30k/dataset.json flickr30k/test.tar""".replace("\n   ", "").split(", "),
)
def test_captions_of_the_test_part_go_with_their_images(encoded, tmp_path, files):
    file, pictures = (tmp_path / name for name in files.split())
    name, split = files.split("/")[0], {n: "test" if n % 2 else "train" for n in range(6)}
    for n in (1, 3, 5):  # the test part alone, as in a tar of it
        save(tmp_path / "some" / f"{7 * n}_a.jpg", 7 * n)
    file.parent.mkdir(parents=True)
    if pictures.suffix == ".tar":
        with tarfile.open(pictures, "w") as tar:
            tar.add(tmp_path / "some", "./")
    else:
        (tmp_path / "some").rename(pictures)
    rows = [f"{7 * n}_a.jpg\t{7 * n} k{k}\t{split[n]}" for n in range(6) for k in range(5)]
    said = {n: [{"raw": f"{7 * n}\n k{k} "} for k in range(5)] for n in range(6)}
    karpathy = [{"filename": f"{7 * n}_a.jpg", "split": split[n], "sentences": said[n]} for n in range(6)]
    coco = {"images": [{"id": n, "file_name": f"{7 * n}_a.jpg"} for n in (5, 3, 1)]}
    coco["annotations"] = [{"image_id": n, "caption": each["raw"]} for n in (1, 3, 5) for each in said[n]]
    table, content = "\n".join(["filepath\ttitle\tsplit", *rows]), coco if name == "coco2017" else {"images": karpathy}
    file.write_text(table if file.suffix == ".tsv" else json.dumps(content))
    given = captioned(name, tmp_path, tmp_path / "tables")
    made = Path(given["table"]).stat().st_mtime_ns
    # Written again, it would be prepared again.
    assert captioned(name, tmp_path, tmp_path / "tables") == given and Path(given["table"]).stat().st_mtime_ns == made
    found = PairImages(prepare(given.pop("table"), tmp_path / "out", **given))
    assert found.pairs.captions == [f"{7 * n} k{k}" for n in (1, 3, 5) for k in range(5)]
    assert shown(found) == [7, 21, 35] and found.image_of_caption.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    given = [{"name": name, "root": str(tmp_path)}]
    assert "retrieval_mean_recall" in {row["measure"] for row in suite.evaluate(None, given, tmp_path / "kept", draws=5)}
    file.write_text("filepath" if file.suffix == ".tsv" else '{"annotations": [], "info": {}}')
    assert suite.evaluate(None, given, tmp_path / "kept") == []


def test_ten_sets_in_one_call_and_those_that_cannot_be_are_reported(encoded, authors, other, tmp_path, caplog):
    ten = [name for name in KNOWN if "images" not in KNOWN[name]]
    for entry in authors.iterdir():
        if entry.name not in ("birdsnap", "country211", "stanford_cars", "gtsrb", "flowers102"):
            (tmp_path / entry.name).symlink_to(entry)
    for name in ("stanford_cars", "gtsrb"):  # without their train part, which torchvision's readers want
        shutil.copytree(other / name, tmp_path / name, ignore=lambda *_: ["Training", "cars_train"])
    class_folders(tmp_path / "flowers102" / "test", ["rose", "daisy"])
    sets = [{"name": name, "root": str(tmp_path), "measures": ["zero_shot"]} for name in ten]
    sets[ten.index("cifar10")]["measures"] = ["zero_shot", "knn"]
    with caplog.at_level(logging.WARNING):
        rows = suite.evaluate(None, sets, tmp_path / "kept", draws=5)
    assert {row["dataset"] for row in rows} == {*ten} - {"birdsnap", "country211", "flowers102"}
    values = {(row["dataset"], row["measure"]): row["value"] for row in rows}
    assert values["cifar10", "knn_accuracy"] > 99 and ("cifar100", "knn_accuracy") not in values
    reported = [record.getMessage() for record in caplog.records if record.name.startswith("protoclip_lab")]
    assert [message.split()[2] for message in reported] == ["birdsnap", "country211", "flowers102"]
    assert KNOWN["birdsnap"]["get"] in reported[0] and "102 class names are given for the 2 classes" in reported[2]


def test_several_test_lists_give_their_mean(encoded, tmp_path):
    def measured(*numbers):
        root = tmp_path / str(numbers)
        for number in numbers:
            class_folders(root / "ucf101" / f"testlist0{number}", ACTIONS[number - 1 :], number)
        rows = suite.evaluate(None, [{"name": "ucf101", "root": str(root)}], root / "kept", measures=["zero_shot"], draws=5)
        return {row["measure"]: np.array([row["value"], row["low"], row["high"]]) for row in rows}

    first, second, both = measured(1), measured(2), measured(1, 2)
    assert (first["zero_shot_top1"] != second["zero_shot_top1"]).any()
    for name in both:
        np.testing.assert_allclose(both[name], (first[name] + second[name]) / 2)
