"""The recipe of a whole run: model, data, optimizer, schedule, and what the demon does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from demp_fx.recipe import Config, Percent, Recipe, Seed

Steps = Annotated[int, Field(gt=0)] | Percent


class DataConfig(Config):
    """Where images and labels come from.

    digits: scikit-learn's, 8 x 8. cifar10: torchvision's folder of pickles, or one of images.
    images: a tree of folders train/<class>/... and test/<class>/... (or val). factory: a function
    that returns two datasets, to train and to test on, of (image, label).
    """

    kind: Literal["digits", "cifar10", "images", "factory"]
    path: Path | None = Field(None, description="the folder of cifar10 or images")
    factory: str | None = Field(None, description="module:function, or file.py:function")
    size: int | None = Field(None, gt=0, description="images are resized and cropped to this")
    limit: int | None = Field(None, gt=0, description="train on so many images, drawn by the seed")
    test_limit: int | None = Field(None, gt=0, description="test on so many")
    pad: int | None = Field(None, ge=0, description="random crops out of an image padded by this")
    flip: bool | None = Field(None, description="mirror every other image")
    normalise: Literal["dataset", "image"] = Field(
        "dataset", description="to the mean and deviation of the training set, or of every image"
    )

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Self:
        if self.kind in ("cifar10", "images") and self.path is None:
            raise ValueError(f"path: where are the {self.kind}?")
        if self.kind == "factory" and self.factory is None:
            raise ValueError("factory: name the function, as module:function")
        return self


class OptimizerConfig(Config):
    """SGD with momentum, or AdamW. Weight decay is on all parameters, and decoupled in both: a
    step shrinks them by lr * weight_decay, whatever the gradient, as in the paper."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    nesterov: bool = Field(False, description="of sgd")
    betas: tuple[float, float] = Field((0.9, 0.999), description="of adamw")
    weight_decay: float = Field(5e-4, ge=0)


class ScheduleConfig(Config):
    """The learning rate over the run, as a factor of the optimizer's.

    step: times `factor` every `every` steps. cosine: down to zero. onecycle: up to the full rate
    at 30 %, from a 25th of it, then down to nearly zero.
    """

    name: Literal["constant", "step", "cosine", "onecycle"] = "constant"
    warmup: Steps | Literal[0] = Field(0, description="steps of linear growth from zero")
    every: Steps = Field("31%", description="of step")
    factor: float = Field(0.2, gt=0, description="of step")


class ProbeConfig(Config):
    """The probe batches of the death test: training images, not augmented."""

    batches: int = Field(3, gt=0)
    size: int = Field(512, gt=0)


class RunConfig(Config):
    """A run of `demp-fx train`."""

    model: str = Field(description="as for compile: model.py, model.py:factory, package:factory")
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    demon: Recipe | None = Field(None, description="none: train the dense network")
    probe: ProbeConfig = ProbeConfig()
    batch: int = Field(128, gt=0)
    epochs: int = Field(gt=0)
    accumulate: int = Field(1, ge=1, description="parts that a batch is worked through in")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    clip: float | None = Field(None, gt=0, description="largest norm of the gradient")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of averaged weights, to test")
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    channels_last: bool = False
    device: str = Field("auto", description="auto: the GPU where there is one")
    threads: int | None = Field(None, gt=0, description="of the CPU; none: as many as it has")
    compile: bool = Field(False, description="torch.compile the module")
    checkpoint_every: Steps | None = Field(None, description="steps; none: every epoch")
    log_every: int = Field(10, gt=0, description="steps between lines of metrics")
    seed: Seed = 0
    out: Path | None = Field(None, description="folder of the run; none: runs/<recipe's name>")

    @model_validator(mode="after")
    def _accumulates_in_one_place(self) -> Self:
        if self.demon is not None and self.demon.accumulate != 1:
            raise ValueError("demon.accumulate: here it follows from accumulate of the run")
        return self


def steps(value: int | str, total: int) -> int:
    """A number of steps, or a percentage of all."""
    return value if isinstance(value, int) else max(1, round(float(value[:-1]) / 100 * total))
