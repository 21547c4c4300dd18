"""The networks that the tests know: all of torchvision's for classification and segmentation, a
member or more of each of timm's families, and transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.shim import torchvision

Inputs = tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class Network:
    """How to build a network, and what goes into it.

    `inputs(batch, scale)`: random arguments of its forward, in float32; at scale 1 those that it
    is compiled with, at scale 2 larger ones where it takes any size (`flexible`).
    """

    name: str
    suite: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    flexible: bool = True
    reduced: str = ""  # in which way it is smaller than the one of this name

    def usual(self) -> Inputs:
        """What a user would compile it with, for the clock: one image of 224, where it takes any
        size."""
        return images(224, 1, 1) if self.flexible else self.inputs(1, 1)


def images(size: int, batch: int, scale: int) -> Inputs:
    """A batch of RGB images, half as large again at scale 2."""
    side = size + (scale - 1) * size // 2
    return (torch.randn(batch, 3, side, side),)


# -- torchvision --------------------------------------------------------------------------------

_SIDE = {"inception_v3": 299, "maxvit_t": 224}  # 64 for all others
_FIXED = ("vit_", "maxvit_", "inception_")  # its auxiliary head takes 299 and little less
_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},  # its default takes most of a minute
    "inception_v3": {"init_weights": False},
    "vit_*_16": {"image_size": 64},
    "vit_b_32": {"image_size": 64},
    "vit_l_32": {"image_size": 64},
    "vit_h_14": {"image_size": 28},
}


def _torchvision_size(name: str) -> int:
    return 28 if name == "vit_h_14" else _SIDE.get(name, 64)


def _options(name: str) -> dict[str, Any]:
    return next((found for pattern, found in _OPTIONS.items() if fnmatch(name, pattern)), {})


def torchvision_names() -> list[str]:
    """All 80 for classification and all 6 for segmentation."""
    models = torchvision.models
    return [*models.list_models(module=models), *models.list_models(module=models.segmentation)]


def torchvision_network(name: str) -> Network:
    """A network of torchvision, for small images."""
    module, options = torchvision.models, _options(name) | {"weights": None}
    if not hasattr(module, name):
        module, options = module.segmentation, options | {"weights_backbone": None}
    return Network(
        name,
        "torchvision",
        functools.partial(getattr(module, name), **options),
        functools.partial(images, _torchvision_size(name)),
        flexible=not name.startswith(_FIXED),
    )


# -- timm ---------------------------------------------------------------------------------------

# Families that a wide zoo has to have, and then others, the smallest sensible members of each.
TIMM = """
convnext_atto test_convnext convnextv2_atto test_convnext2 convnext_zepto_rms
test_efficientnet efficientnet_lite0 tf_efficientnetv2_b0 efficientnet_es
mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium_075
repvgg_a0 hrnet_w18_small densenet121 densenetblur121d resnext26ts res2net50_48w_2s
ghostnet_050 ghostnetv2_100 ghostnetv3_050 mobilevit_xxs mobilevitv2_050
ese_vovnet19b_slim ese_vovnet19b_dw dla46_c dla46x_c test_nfnet nf_resnet26 nfnet_l0
mixer_s32_224 gmixer_12_224 resmlp_12_224 gmlp_ti16_224
deit_tiny_patch16_224 deit_tiny_distilled_patch16_224
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 swin_s3_tiny_224
coat_tiny coat_lite_tiny levit_128s levit_conv_128s xcit_nano_12_p16_224
pvt_v2_b0 pvt_v2_b2_li cspresnet50 cspresnext50 cs3darknet_s
regnetx_002 regnety_002 regnetz_b16 regnetv_040 fastvit_t8 fastvit_mci0 edgenext_xx_small
poolformer_s12 poolformerv2_s12 resnest14d skresnet18 rexnet_100 rexnetr_100 dpn48b dpn68b

beit_base_patch16_224 beit3_base_patch16_224 cait_xxs24_224 crossvit_9_240
eva02_tiny_patch14_224 test_maxvit maxxvit_rmlp_nano_rw_256 test_coatnet coatnet_nano_rw_224
gcvit_xxtiny focalnet_tiny_srf inception_next_atto repghostnet_050 selecsls42 tresnet_m
visformer_tiny volo_d1_224 tiny_vit_5m_224 efficientformer_l1 efficientformerv2_s0
efficientvit_b0 efficientvit_m0 test_mambaout hgnetv2_b0 hgnet_tiny hiera_tiny_224 sam2_hiera_tiny
test_vit test_vit2 test_vit3 test_vit4 test_vit_relpos vit_srelpos_small_patch16_224
test_resnet test_byobnet starnet_s050 shvit_s1 nest_tiny tnt_s_patch16_224
twins_svt_small twins_pcpvt_small mvitv2_tiny convmixer_768_32 convit_tiny davit_tiny
fasternet_t0 repvit_m0_9 mobileone_s0 hardcorenas_a inception_v4 inception_resnet_v2
legacy_seresnet18 xception41 darknet17 lcnet_035 tinynet_e mnasnet_small semnasnet_050
fbnetv3_b fbnetc_100 gernet_s lambda_resnet26t halonet26t botnet26t_256 sebotnet33ts_256
bat_resnext26ts eca_resnext26ts gcresnet33ts rdnet_tiny pit_ti_224 sequencer2d_s
vitamin_small_224 csatv2 mobilenetv3_small_050 mobilenetv5_base seresnet18 ecaresnet26t
resnet10t resnetv2_18 resnetv2_50d_gn resnetv2_50d_evos resnetaa34d resnetblur18 cspdarknet53
nasnetalarge samvit_base_patch16_224 naflexvit_base_patch16_gap
""".split()  # noqa: SIM905 (readable)

_TIMM_SIDE = {
    "crossvit_9_240": 240,
    "efficientformer_l1": 224,
    "halonet26t": 256,
    "bat_resnext26ts": 256,
    "inception_v4": 96,
    "inception_resnet_v2": 96,
}  # 64 for all others


def _timm_build(name: str, side: int | None) -> nn.Module:
    import timm

    return timm.create_model(name, **({"img_size": side} if side else {}))


def timm_network(name: str) -> Network:
    """Those that are built for one size of image are built for the small one."""
    import timm

    side = _TIMM_SIDE.get(name, 64)
    fixed = _built_for_a_size(timm.model_entrypoint(name))
    return Network(
        name,
        "timm",
        functools.partial(_timm_build, name, side if fixed else None),
        functools.partial(images, side),
        flexible=not fixed,
    )


def _built_for_a_size(entry_point: Callable[..., nn.Module]) -> bool:
    """Whether the model's constructor takes `img_size`."""
    try:
        with torch.device("meta"):
            entry_point(img_size=224)
    except TypeError:
        return False
    except Exception:  # it takes the argument, and then computes on data
        return True
    return True


# -- transformers -------------------------------------------------------------------------------


def transformer_names() -> list[str]:
    """Those of `tests/zoo/transformers_networks.py`."""
    from tests.zoo.transformers_networks import TRANSFORMERS

    return list(TRANSFORMERS)


def transformer_network(name: str) -> Network:
    """A network of transformers."""
    from tests.zoo.transformers_networks import TRANSFORMERS

    network = TRANSFORMERS[name]

    def inputs(batch: int, scale: int) -> Inputs:
        length = 7 if "pixel_values" in network.inputs else 5 + 2 * scale
        given = network.example(batch, length)
        return {k: v.float() if v.is_floating_point() else v for k, v in given.items()}

    return Network(name, "transformers", network.build, inputs, flexible=False, reduced="tiny")


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run the forward on its arguments, by place or by name."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def in_float64(inputs: Inputs) -> Inputs:
    """The arguments with every floating-point tensor in float64."""

    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    if isinstance(inputs, dict):
        return {name: double(value) for name, value in inputs.items()}
    return tuple(double(value) for value in inputs)
