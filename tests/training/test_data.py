"""Data: what is read, what is refused, and that everything random follows from seed and step."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from demp_fx.errors import UsageError
from demp_fx.training.batches import Pipeline, pipelines
from demp_fx.training.config import DataConfig
from demp_fx.training.datasets import Arrays, load_data

CPU = torch.device("cpu")


def cifar(folder: Path, each: int = 4) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        data = rng.integers(0, 256, (each, 3072), dtype=np.uint8)
        content = {b"data": data, b"labels": list(range(each)), b"batch_label": b"x"}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return folder


def tree(root: Path, size: tuple[int, int] = (8, 8), suffix: str = "png") -> Path:
    for split, many in (("train", 3), ("test", 2)):
        for number, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for k in range(many):
                color = (100 * number, 10 * k, 50)
                Image.new("RGB", size, color).save(root / split / name / f"{k}.{suffix}")
    return root


def test_digits_are_built_in() -> None:
    train, test = load_data(DataConfig(kind="digits"))
    assert (len(train), len(test)) == (1437, 360)
    images, labels = train.take(torch.arange(5))
    assert images.shape == (5, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_cifar_as_torchvision_has_it(inner: str, tmp_path: Path) -> None:
    folder = cifar(tmp_path / "data" / inner)
    train, test = load_data(DataConfig(kind="cifar10", path=tmp_path / "data"))
    assert (len(train), len(test)) == (20, 4)
    with (folder / "data_batch_2").open("rb") as file:
        expected = pickle.load(file, encoding="bytes")[b"data"][1].reshape(3, 32, 32)
    assert np.array_equal(train.take(torch.tensor([5]))[0][0].numpy(), expected)


@pytest.mark.parametrize("kind", ["cifar10", "images"])
def test_a_tree_of_images(kind: str, tmp_path: Path) -> None:
    train, test = load_data(DataConfig(kind=kind, path=tree(tmp_path / "t")))
    assert (len(train), len(test)) == (6, 4)
    images, labels = train.take(torch.tensor([1, 4]))
    assert labels.tolist() == [0, 1]
    assert images[:, :, 0, 0].tolist() == [[0, 10, 50], [100, 10, 50]]


def test_images_are_brought_to_one_size(tmp_path: Path) -> None:
    root = tree(tmp_path / "t", (20, 12), "bmp")
    Image.new("RGB", (30, 30)).save(root / "train" / "cat" / "other.bmp")
    train, _ = load_data(DataConfig(kind="images", path=root, size=10))
    assert train.take(torch.arange(len(train)))[0].shape == (7, 3, 10, 10)
    with pytest.raises(UsageError, match=r"set data\.size"):
        load_data(DataConfig(kind="images", path=root))


def test_a_limit_draws_by_the_seed() -> None:
    some = [load_data(DataConfig(kind="digits", limit=50), seed=s)[0] for s in (1, 1, 2)]
    a, b, c = (s.take(torch.arange(50))[0] for s in some)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code in a data file has run",)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1]), pickle.dumps(Evil())])
def test_an_unreadable_batch_is_named(content: bytes, tmp_path: Path, capsys: object) -> None:
    folder = cifar(tmp_path / "c")
    (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(UsageError, match=r"data_batch_3 is no batch of CIFAR-10"):
        load_data(DataConfig(kind="cifar10", path=folder))
    assert "has run" not in capsys.readouterr().out  # type: ignore[attr-defined]


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    root = tree(tmp_path / "t")
    (root / "train" / "dog" / "1.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"dog/1\.png cannot be read as an image"):
        load_data(DataConfig(kind="images", path=root))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "cifar10", "path": "nowhere"}, "there is no folder nowhere"),
        ({"kind": "images", "path": "tests"}, "no folders train and test"),
        ({"kind": "factory", "factory": "tests.training.tiny:Tiny"}, "must return two datasets"),
        ({"kind": "factory", "factory": "no.such:thing"}, "no package"),
    ],
)
def test_data_that_is_not_there(config: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_data(DataConfig.from_dict(config))


@pytest.mark.parametrize("config", [{"kind": "cifar10"}, {"kind": "factory"}, {"kind": "mnist"}])
def test_the_recipe_says_what_is_missing(config: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"path|factory|kind"):
        DataConfig.from_dict(config)


def pipeline(seed: int = 0, pad: int = 2, flip: bool = True, size: int = 4) -> Pipeline:
    images = torch.arange(10 * 3 * 6 * 6).reshape(10, 3, 6, 6).remainder(251).to(torch.uint8)
    split = Arrays(images, torch.arange(10))
    return Pipeline(split, size, seed, CPU, pad, flip, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_a_batch_follows_from_seed_and_step_alone() -> None:
    torch.manual_seed(1)
    first = pipeline().batch(5)
    torch.manual_seed(2)
    other = pipeline()
    other.batch(0)
    assert same(other.batch(5), first)
    assert not same(pipeline(seed=1).batch(5), first)
    assert not same(pipeline().batch(6), first)


def test_an_epoch_sees_every_image_once() -> None:
    data = pipeline(size=5)
    assert data.per_epoch == 2
    seen = torch.cat([data.batch(step)[1] for step in (4, 5)])
    assert seen.sort().values.tolist() == list(range(10))


def test_crops_come_from_the_padded_image() -> None:
    data = pipeline(pad=2, flip=False)
    images, labels = data.batch(0)
    wide = torch.nn.functional.pad(data.split.images.float(), [2] * 4, mode="reflect")
    for image, label in zip(images, labels, strict=True):
        crops = [wide[label, :, i : i + 6, j : j + 6] for i in range(5) for j in range(5)]
        assert any(torch.equal(image, crop) for crop in crops)


def test_images_are_normalised() -> None:
    train, test = load_data(DataConfig(kind="digits"))
    plain, _ = pipelines(DataConfig(kind="digits"), train, test, 64, 0, CPU)
    images = plain.plain(torch.arange(1437))[0]
    assert float(images.mean()) == pytest.approx(0, abs=1e-2)
    assert float(images.std()) == pytest.approx(1, abs=1e-2)
    each, _ = pipelines(DataConfig(kind="digits", normalise="image"), train, test, 64, 0, CPU)
    images = each.plain(torch.arange(9))[0]
    assert torch.allclose(images.mean((1, 2, 3)), torch.zeros(9), atol=1e-5)
    assert torch.allclose(images.std((1, 2, 3)), torch.ones(9), atol=1e-5)
