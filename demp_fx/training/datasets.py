"""Data to train on: digits, CIFAR-10, trees of images, or what a factory gives."""

from __future__ import annotations

import pickle
from collections.abc import Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from demp_fx.errors import UsageError
from demp_fx.loading import load_object, users
from demp_fx.training.config import DataConfig

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
_THREADS = 8
_MEMORY = 1 << 30  # bytes of images that are held decoded


class Split(Protocol):
    """A set of labelled images, by number."""

    def __len__(self) -> int: ...

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, c, h, w), uint8 or ready as they are, and labels (n)."""


@dataclass(frozen=True)
class Arrays:
    """Images in memory."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        index = index.to(self.labels.device)
        return self.images[index], self.labels[index]


@dataclass(frozen=True)
class Files:
    """Images in files, decoded when they are asked for and brought to `size` x `size`."""

    paths: list[Path]
    labels: Tensor
    size: int | None

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        with ThreadPoolExecutor(_THREADS) as pool:
            images = list(pool.map(lambda i: decode(self.paths[i], self.size), index.tolist()))
        if len({i.shape for i in images}) > 1:
            raise UsageError("the images are not of one size: set data.size in the recipe")
        return torch.stack(images), self.labels[index]


@dataclass(frozen=True)
class Items:
    """A dataset as torch has them: of (image, label), by number."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return users(lambda: self._take(index), "data.factory: taking images and labels")  # type: ignore[no-any-return]

    def _take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [self.dataset[i] for i in index.tolist()]
        images = torch.stack([torch.as_tensor(image) for image, _ in pairs])
        return images, torch.as_tensor([int(label) for _, label in pairs])


@dataclass(frozen=True)
class Subset:
    """Some of a split."""

    whole: Split
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.whole.take(self.index[index])


def load_data(config: DataConfig, seed: int = 0) -> tuple[Split, Split]:
    """The splits to train and to test on. Raises `UsageError` where they cannot be read."""
    if config.kind == "digits":
        train, test = _digits()
    elif config.kind == "factory":
        train, test = _made(str(config.factory))
    else:
        assert config.path is not None
        train, test = _read(config.path, config.kind, config.size)
    if not len(train) or not len(test):
        raise UsageError("the data is empty: nothing to train or to test on")
    return _some(train, config.limit, seed), _some(test, config.test_limit, seed)


def _some(split: Split, limit: int | None, seed: int) -> Split:
    """As many as asked for; in memory where they come from files and are small."""
    if limit is not None and limit < len(split):
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
        split = Subset(split, order[:limit].sort().values)
    inner = split.whole if isinstance(split, Subset) else split
    if isinstance(inner, Files):
        one = decode(inner.paths[0], inner.size)
        if len(split) * one.numel() <= _MEMORY:
            return Arrays(*split.take(torch.arange(len(split))))
    return split


def _digits() -> tuple[Split, Split]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError("digits come with scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    images = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    return Arrays(images[train], labels[train]), Arrays(images[test], labels[test])


def _made(spec: str) -> tuple[Split, Split]:
    made = load_object(spec)
    if not (isinstance(made, (tuple, list)) and len(made) == 2):
        raise UsageError(f"data.factory: {spec} must return two datasets, to train and to test on")
    for part in made:
        if not (isinstance(part, Sized) and hasattr(part, "__getitem__")):
            raise UsageError(f"data.factory: {spec} returns a {type(part).__name__}, no dataset")
    return Items(made[0]), Items(made[1])


def _read(root: Path, kind: str, size: int | None) -> tuple[Split, Split]:
    if not root.is_dir():
        raise UsageError(f"data.path: there is no folder {root}")
    inner = root / "cifar-10-batches-py"
    if kind == "cifar10" and size is None:
        for folder in (root, inner):
            if (folder / "data_batch_1").is_file():
                batches = [f"data_batch_{k}" for k in range(1, 6)]
                return _pickles(folder, batches), _pickles(folder, ["test_batch"])
    tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise UsageError(f"data.path: {root} holds no folders train and test (or val)")
    classes = sorted(d.name for d in (root / "train").iterdir() if d.is_dir())
    return _tree(root / "train", classes, size), _tree(tests[0], classes, size)


class _Plain(pickle.Unpickler):
    """Takes arrays of numbers; whatever else a pickle would run is refused."""

    _ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "_frombuffer", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if name in self._ALLOWED and module.split(".")[0] in ("numpy", "_codecs"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of images")


def _pickles(folder: Path, names: list[str]) -> Arrays:
    images, labels = [], []
    for name in names:
        try:
            with (folder / name).open("rb") as file:
                data = _Plain(file, encoding="bytes").load()
            images.append(torch.from_numpy(np.array(data[b"data"])).reshape(-1, 3, 32, 32))
            labels.append(torch.as_tensor(data[b"labels"]))
        except (OSError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError,
                RuntimeError) as error:  # fmt: skip
            raise UsageError(f"{folder / name} is no batch of CIFAR-10: {error}") from error
    return Arrays(torch.cat(images), torch.cat(labels).long())


def _tree(folder: Path, classes: list[str], size: int | None) -> Split:
    """All images under folder/<class>."""
    paths, labels = [], []
    for number, name in enumerate(classes):
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in _SUFFIXES)
        paths += found
        labels += [number] * len(found)
    if not paths:
        raise UsageError(f"{folder} holds no images")
    return Files(paths, torch.tensor(labels), size)


def decode(path: Path, size: int | None) -> Tensor:
    """An image file as RGB, (3, h, w) uint8; with `size` scaled and cropped to a square."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UsageError("reading images takes pillow: pip install pillow") from error
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise UsageError(f"{path} cannot be read as an image: {error}") from error
    if size is not None and picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
