"""Batches of a run: order, augmentation, normalisation.

Everything random in a batch follows from the seed and the number of the step, and from nothing
else: a run that is resumed in the middle of an epoch needs no state of any generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from demp_fx.training.config import DataConfig
from demp_fx.training.datasets import Split

_SAMPLE = 2048


def seed_of(seed: int, *numbers: int) -> int:
    """A seed for each combination of numbers."""
    mixed = seed
    for number in numbers:
        mixed = (mixed * 0x9E3779B97F4A7C15 + number + 1) % (1 << 63)
    return mixed


@dataclass(frozen=True)
class Pipeline:
    """From a split to batches on a device. `mean`, `std`: of each channel, None: of each image."""

    split: Split
    size: int
    seed: int
    device: torch.device
    pad: int
    flip: bool
    mean: Tensor | None
    std: Tensor | None

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch; what is left over is not trained on in it."""
        return max(1, len(self.split) // self.size)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The augmented batch of a step."""
        epoch, number = divmod(step, self.per_epoch)
        rng = torch.Generator().manual_seed(seed_of(self.seed, 1, epoch))
        order = torch.randperm(len(self.split), generator=rng)
        images, labels = self.split.take(order[number * self.size : (number + 1) * self.size])
        rng.manual_seed(seed_of(self.seed, 2, step))
        images = self._augmented(images.to(self.device), rng)
        return self._normalised(images), labels.to(self.device)

    def plain(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images as they are, but normalised."""
        images, labels = self.split.take(index)
        return self._normalised(images.to(self.device)), labels.to(self.device)

    def _augmented(self, images: Tensor, rng: torch.Generator) -> Tensor:
        n, _, h, w = images.shape
        if self.flip:
            mirrored = (torch.rand(n, generator=rng) < 0.5).to(images.device)
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        if self.pad:
            wide = F.pad(images.float(), [self.pad] * 4, mode="reflect")
            top, left = torch.randint(2 * self.pad + 1, (2, n), generator=rng).to(images.device)
            rows = top[:, None] + torch.arange(h, device=images.device)
            columns = left[:, None] + torch.arange(w, device=images.device)
            sample = torch.arange(n, device=images.device)[:, None, None]
            # indices apart from each other put the channels last
            images = wide[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return images

    def _normalised(self, images: Tensor) -> Tensor:
        images = images.float()
        if self.mean is not None and self.std is not None:
            return ((images - self.mean) / self.std).contiguous()
        mean = images.mean((1, 2, 3), keepdim=True)
        std = images.std((1, 2, 3), keepdim=True)
        floor = images[0].numel() ** -0.5
        return ((images - mean) / std.clamp(min=floor)).contiguous()


def pipelines(
    config: DataConfig, train: Split, test: Split, size: int, seed: int, device: torch.device
) -> tuple[Pipeline, Pipeline]:
    """For both splits; the test split is neither shuffled nor augmented."""
    mean = std = None
    if config.normalise == "dataset":
        index = torch.arange(0, len(train), max(1, len(train) // _SAMPLE))
        images = train.take(index)[0].double()
        mean = images.mean((0, 2, 3))[:, None, None].float().to(device)
        std = images.std((0, 2, 3)).clamp(min=1e-6)[:, None, None].float().to(device)
    natural = config.kind in ("cifar10", "images")
    pad = config.pad if config.pad is not None else 4 if natural else 0
    flip = config.flip if config.flip is not None else natural
    return (
        Pipeline(train, size, seed, device, pad, flip, mean, std),
        Pipeline(test, size, seed, device, 0, False, mean, std),
    )


class Probes:
    """The probe batches: training images, the same ones every time, not augmented."""

    def __init__(self, train: Pipeline, batches: int, size: int) -> None:
        self.train = train
        order = torch.Generator().manual_seed(seed_of(train.seed, 4))
        index = torch.randperm(len(train.split), generator=order)
        self.parts = index[: batches * size].split(size)

    def __iter__(self) -> Iterator[Tensor]:
        for part in self.parts:
            yield self.train.plain(part)[0]
