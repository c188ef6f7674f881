"""Data: what specifications mean, and how pixels are turned to a network's size."""

import gzip
import hashlib
import io
import struct
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from covcli.core.errors import CovcliError
from covcli.core.specs import YES, extended
from covcli.data.datasets import DATASETS, load
from covcli.data.images import adapt, batches, in_memory
from covcli.data.named import SCENES
from covcli.training.epoch import augment, draw_moves

SHAPE = (3, 32, 32)


def write_npz(path: Path, images: np.ndarray, labels: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"images": images} if labels is None else {"images": images, "labels": labels}
    np.savez(path, **arrays)
    return path


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def make_mnist(root: Path, name: str, parts: tuple[str, str] = ("train", "t10k")) -> None:
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for split, n in zip(parts, (12, 6), strict=True):
        labels = np.arange(n, dtype=np.uint8) % 10 + (name == "EMNIST")  # whose letters begin at 1
        (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(random_images(n, 28, 28)))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))


def make_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, cls: str, keys: list[str]) -> None:
    import pickle

    from torchvision import datasets

    kind = getattr(datasets, cls)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    lists = {"train_list": ["train_file"], "test_list": ["test_file"]}
    for attribute, files in lists.items():
        entries = []
        for file in files:
            entry = {"data": random_images(8, 3072)} | {key: list(range(8)) for key in keys}
            content = pickle.dumps(entry)
            (folder / file).write_bytes(content)
            entries.append([file, hashlib.md5(content).hexdigest()])
        monkeypatch.setattr(kind, attribute, entries)
    names = pickle.dumps({kind.meta["key"]: [f"class {i}" for i in range(8)]})
    (folder / "names").write_bytes(names)
    meta = {**kind.meta, "filename": "names", "md5": hashlib.md5(names).hexdigest()}
    monkeypatch.setattr(kind, "meta", meta)


def make_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat
    from torchvision import datasets

    entries = {}
    for split in ("train", "test"):
        path = root / f"{split}.mat"
        savemat(path, {"X": random_images(32, 32, 3, 9), "y": np.arange(1, 10)[:, None]})
        entries[split] = ["http://unused", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", entries)


def put_image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random_images(20, 24, 3, seed=seed)).save(path)


def make_textures(root: Path) -> None:
    """DTD as its archive unpacks: images by class, and lists of partitions."""
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    for number, split in enumerate(("train", "val", "test")):
        names = [f"{kind}/{kind}_{number}{i}.jpg" for kind in ("banded", "woven") for i in (0, 1)]
        (folder / "labels" / f"{split}1.txt").write_text("\n".join(names) + "\n")
        for name in names:
            put_image(folder / "images" / name)


def make_places(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places365 as its archives unpack; its checksums are of other lists."""
    from torchvision import datasets

    monkeypatch.setattr(datasets.Places365, "_check_integrity", lambda *_: True)
    (root / "categories_places365.txt").write_text("/a/airfield 0\n/z/zoo 1\n")
    parts = {"train_standard": "data_256_standard", "val": "val_256"}
    for split, folder in parts.items():
        names = [f"/z/zoo/{i}.jpg" if i % 2 else f"/a/airfield/{i}.jpg" for i in range(6)]
        lines = [f"{name} {i % 2}\n" for i, name in enumerate(names)]
        (root / f"places365_{split}.txt").write_text("".join(lines))
        for i, name in enumerate(names):
            put_image(root / folder / name[1:], i)


def make_inaturalist(root: Path) -> None:
    ranks = "{:05}_Plantae_Tracheophyta_Liliopsida_Poales_Poaceae_Poa_{}"
    for version in ("2021_train_mini", "2021_valid"):
        for k, species in enumerate(("annua", "pratensis")):
            for i in range(3):
                put_image(root / version / ranks.format(k, species) / f"{i}.jpg", i)


def make_lsun(root: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    for k, scene in enumerate(SCENES):
        for split in ("train", "val"):
            buffer = io.BytesIO()
            Image.fromarray(random_images(20, 24, 3, seed=k)).save(buffer, "WEBP")
            with (
                lmdb.open(str(root / f"{scene}_{split}_lmdb"), map_size=1 << 20) as database,
                database.begin(write=True) as transaction,
            ):
                transaction.put(f"{scene}{k}".encode(), buffer.getvalue())


def make_openood(root: Path) -> None:
    """OpenOOD's list of one set, and its images, as the download script puts them."""
    names = [f"tin/test/{i}.png" for i in range(6)]
    lists = root / "benchmark_imglist" / "cifar10"
    lists.mkdir(parents=True)
    (lists / "test_tin.txt").write_text("".join(f"{name} -1\n" for name in names))
    for i, name in enumerate(names):
        put_image(root / "images_classic" / name, i)


@pytest.fixture
def specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """One loadable specification for every registered dataset, on files made here."""
    make_mnist(tmp_path, "MNIST")
    make_mnist(tmp_path, "FashionMNIST")
    make_cifar(tmp_path, monkeypatch, "CIFAR10", ["labels"])
    make_cifar(tmp_path, monkeypatch, "CIFAR100", ["fine_labels"])
    make_svhn(tmp_path, monkeypatch)
    make_mnist(tmp_path, "KMNIST")
    make_mnist(tmp_path, "EMNIST", ("emnist-letters-train", "emnist-letters-test"))
    make_textures(tmp_path)
    make_places(tmp_path, monkeypatch)
    make_inaturalist(tmp_path)
    make_lsun(tmp_path)
    make_openood(tmp_path)
    for split in ("train", "test"):
        write_npz(tmp_path / "npz" / f"{split}.npz", random_images(9, 40, 30, 4), np.arange(9))
        for i in range(6):
            path = tmp_path / "folder" / split / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random_images(20 + i, 33, 3)).save(path)
    rows = "".join(f"folder/test/class{i % 2}/{i}.png,{'ab'[i % 2]}\n" for i in range(6))
    (tmp_path / "list.csv").write_text(f"path,label\n{rows}")
    arguments = {
        "npz": f":{tmp_path}/npz", "folder": f":{tmp_path}/folder", "noise": ":gaussian",
        "csv": f":{tmp_path}/list.csv", "openood": ":cifar10/near/tin",
        "corrupt": ":contrast?severity=1&of=digits",
    }  # fmt: skip
    return {name: name + arguments.get(name, "") for name in DATASETS}


@pytest.mark.parametrize("name", list(DATASETS))
def test_every_dataset_keeps_the_contract(name: str, specs: dict[str, str], tmp_path: Path) -> None:
    whole = load(specs[name], "test", tmp_path)
    assert load(specs[name], "train", tmp_path).batch(torch.arange(2), SHAPE).shape == (2, *SHAPE)
    rows = torch.tensor([3, 1])
    pixels = whole.batch(rows, SHAPE)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (2, *SHAPE)
    text = specs[name]
    for parameter in ("first", "limit=3", "offset=1", "split=test"):
        key, _, value = parameter.partition("=")
        text = extended(text, key, value or YES)
    part = load(text, "train", tmp_path)
    assert len(part) == 3
    assert torch.equal(part.batch(torch.tensor([2, 0]), SHAPE), pixels)
    if whole.labels is not None:
        assert part.labels is not None
        assert torch.equal(part.labels, whole.labels[1:4])
        assert not whole.classes or int(whole.labels.max()) < len(whole.classes)
    assert load(specs[name], "test", tmp_path).fingerprint == whole.fingerprint
    assert part.fingerprint != whole.fingerprint
    with pytest.raises(CovcliError, match="unknown parameter 'limits'"):
        load(extended(specs[name], "limits", "3"), "test", tmp_path)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of MNIST's files that a server on this machine hands out."""
    from torchvision import datasets

    served = tmp_path / "served"
    served.mkdir()
    make_mnist(tmp_path / "made", "MNIST")
    resources = []
    for file in sorted((tmp_path / "made" / "MNIST" / "raw").iterdir()):
        content = gzip.compress(file.read_bytes())
        (served / f"{file.name}.gz").write_bytes(content)
        resources.append((f"{file.name}.gz", hashlib.md5(content).hexdigest()))

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=served)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(datasets.MNIST, "resources", resources)
        yield served
        server.shutdown()


def test_a_missing_set_is_downloaded_from_where_torchvision_says(
    tmp_path: Path, mirror: Path
) -> None:
    loaded = load("mnist", "test", tmp_path / "cache")
    assert loaded.fingerprint == load("mnist", "test", tmp_path / "made").fingerprint
    for file in mirror.iterdir():
        file.unlink()
    assert load("mnist", "test", tmp_path / "cache").fingerprint == loaded.fingerprint
    with pytest.raises(CovcliError, match=r"could not be downloaded.*--data-dir"):
        load("mnist", "test", tmp_path / "elsewhere")


def test_half_a_download_is_refused_and_the_next_one_mends_it(tmp_path: Path, mirror: Path) -> None:
    file = mirror / "t10k-images-idx3-ubyte.gz"
    content = file.read_bytes()
    for wrong in (content[: len(content) // 2], content[:-9] + b"9" + content[-8:]):
        file.write_bytes(wrong)
        with pytest.raises(CovcliError, match="could not be downloaded"):
            load("mnist", "test", tmp_path / "cache")
    file.write_bytes(content)
    assert len(load("mnist", "test", tmp_path / "cache")) == 6


def test_a_damaged_set_on_disk_is_named(tmp_path: Path) -> None:
    make_mnist(tmp_path, "MNIST")
    file = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CovcliError, match="is incomplete in"):
        load("mnist", "test", tmp_path)


def test_npz_images_arrive_unchanged(tmp_path: Path) -> None:
    images, labels = random_images(5, 32, 32, 3), np.array([4, 3, 2, 1, 0], np.uint8)
    loaded = load(f"npz:{write_npz(tmp_path / 'x.npz', images, labels)}", "train")
    pixels = loaded.batch(torch.arange(5), SHAPE)
    np.testing.assert_array_equal(pixels.numpy(), images.transpose(0, 3, 1, 2))
    assert loaded.labels is not None
    assert loaded.labels.tolist() == [4, 3, 2, 1, 0]


def test_folder_images_arrive_as_pil_reads_them(tmp_path: Path) -> None:
    for name, shape in (("b/1.png", (32, 32, 3)), ("a/2.png", (32, 32)), ("a/1.png", (32, 32, 4))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(random_images(*shape)).save(tmp_path / name)
    loaded = load(f"folder:{tmp_path}", "train")
    assert loaded.classes == ("a", "b")
    assert loaded.labels is not None
    assert loaded.labels.tolist() == [0, 0, 1]
    for row, name in enumerate(("a/1.png", "a/2.png", "b/1.png")):
        image = Image.open(tmp_path / name).convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image)
        expected = np.array(ground.convert("RGB")).transpose(2, 0, 1)
        pixels = loaded.batch(torch.tensor([row]), SHAPE)[0].numpy()
        assert np.abs(pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(28, 28), (100, 60), (31, 64), (8, 8)])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_adapting_resizes_like_pil_and_cuts_out_the_middle(
    size: tuple[int, int], channels: int
) -> None:
    image = random_images(*size, channels)
    adapted = adapt(torch.from_numpy(image).permute(2, 0, 1)[None], SHAPE)[0].numpy()
    colour = image[..., :1].repeat(3, 2) if channels < 3 else image[..., :3]
    if channels in (2, 4):  # on white
        alpha = image[..., -1:] / 255
        colour = np.rint(colour * alpha + 255 * (1 - alpha)).astype(np.uint8)
    scale = 32 / min(size)
    height, width = (max(round(side * scale), 32) for side in size)
    resized = np.array(Image.fromarray(colour).resize((width, height), Image.Resampling.BILINEAR))
    top, left = round((height - 32) / 2), round((width - 32) / 2)
    expected = resized[top : top + 32, left : left + 32].transpose(2, 0, 1)
    assert np.abs(adapted.astype(int) - expected).max() <= 1


def test_colours_become_grey_by_luma() -> None:
    image = random_images(16, 16, 3)
    grey = adapt(torch.from_numpy(image).permute(2, 0, 1)[None], (1, 16, 16))
    expected = np.array(Image.fromarray(image).convert("L"))
    assert np.abs(grey[0, 0].numpy().astype(int) - expected).max() <= 1


def test_augmented_images_are_shifted_and_mirrored_originals() -> None:
    images = torch.from_numpy(random_images(64, 3, 16, 16)) // 2 + 100
    moves = draw_moves("crop-flip", 64, (3, 16, 16), torch.Generator().manual_seed(0))
    augmented = augment(images, moves)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for original, result in zip(padded, augmented, strict=True):
        places = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            for cut in [original[:, top : top + 16, left : left + 16]]
            if torch.equal(cut.flip(2) if flip else cut, result)
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 25
    assert {flip for *_, flip in seen} == {False, True}
    still = draw_moves("none", 64, (3, 16, 16), torch.Generator())
    assert torch.equal(augment(images, still), images)
    assert torch.equal(
        torch.cat([augment(images[:9], moves[:9]), augment(images[9:], moves[9:])]), augmented
    )


def test_noise_is_the_same_in_any_batch_and_has_its_law() -> None:
    for kind, mean, deviation in (("uniform", 127.5, 73.9), ("gaussian", 127.5, 62.0)):
        noise = load(f"noise:{kind}?limit=50", "test")
        whole = noise.batch(torch.arange(50), SHAPE)
        assert torch.equal(noise.batch(torch.tensor([7]), SHAPE)[0], whole[7])
        assert whole.double().mean().item() == pytest.approx(mean, abs=0.5)
        assert whole.double().std().item() == pytest.approx(deviation, abs=1)
    other = load("noise:gaussian?seed=1", "test").batch(torch.arange(2), SHAPE)
    assert not torch.equal(other, whole[:2])


def test_batches_come_in_order() -> None:
    images = in_memory("x", torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1), None)
    parts = torch.arange(7).split(3)
    read = [
        (rows.tolist(), pixels[:, 0, 0, 0].tolist())
        for rows, pixels in batches(images, parts, (1, 1, 1))
    ]
    assert read == [([0, 1, 2], [0, 1, 2]), ([3, 4, 5], [3, 4, 5]), ([6], [6])]
    assert list(batches(images, [], (1, 1, 1))) == []


def test_bad_data_is_refused_in_one_line(tmp_path: Path) -> None:
    files = {
        "float.npz": {"images": np.zeros((2, 4, 4, 3), np.float32)},
        "flat.npz": {"images": np.zeros((2, 4), np.uint8)},
        "many.npz": {"images": np.zeros((2, 4, 4, 7), np.uint8)},
        "labels.npz": {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, np.int64)},
        "none.npz": {"pictures": np.zeros(3)},
        "object.npz": {"images": np.array([{}, []], dtype=object)},
    }
    for name, arrays in files.items():
        np.savez(tmp_path / name, **arrays)
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "1.png").write_bytes(b"\x89PNG not really")
    buffer = io.BytesIO()
    tarfile.open(fileobj=buffer, mode="w").close()
    (tmp_path / "tar.npz").write_bytes(buffer.getvalue())
    bad = [
        f"npz:{tmp_path}/{name}" for name in [*files, "text.npz", "tar.npz", "missing.npz", "empty"]
    ]
    bad += [f"folder:{tmp_path}/empty", f"folder:{tmp_path}/broken", f"folder:{tmp_path}/text.npz"]
    bad += ["npz", "folder:/no/such", "mnits", "noise:pink", "digits:x", "digits?offset=9999"]
    bad += ["digits?limit=0", "digits?limit=x", "digits?split=val", "digits?limit=1&limit=2", ":x"]
    for spec in bad:
        with pytest.raises(CovcliError) as caught:
            load(spec, "test", tmp_path).batch(torch.tensor([0]), SHAPE)
        assert "\n" not in str(caught.value)
    with pytest.raises(CovcliError, match="did you mean 'mnist'"):
        load("mnits", "test")
