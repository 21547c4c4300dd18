"""Collections that nothing here was written for: packages of other people's networks, which
`make others` adds.

`SPECS` says how to build each network, and what goes into it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.networks import Inputs, Network, images

Build = Callable[[], nn.Module]

# -- pytorchcv: a member or more of each of its families ----------------------------------------

PYTORCHCV = """
alexnet zfnet vgg11 bn_vgg11b bninception resnet10 resnetbc14b preresnet10 preresnetbc14b
resnext14_16x4d seresnet10 seresnetbc26b sepreresnet10 sepreresnetbc26b senet16 resnestabc14
resnesta18 ibn_resnet50 ibnb_resnet50 ibn_resnext50_32x4d airnet50_1x64d_r2 airnext50_32x4d_r2
bam_resnet18 cbam_resnet18 resattnet56 sknet50 scnet50 regnetx002 regnety002 diaresnet10
diracnet18v2 sharesnet18 densenet121 condensenet74_c4_g4 sparsenet121 peleenet wrn50_2 drnc26
drnd22 dpn68 darknet_ref darknet_tiny darknet53 channelnet bagnet9 dla34 dla46xc msdnet22 fishnet99
espnetv2_wd2 hrnet_w18_small_v1 vovnet27s selecsls42 hardnet39ds hardnet68 xdensenet121_2
squeezenet_v1_0 squeezeresnet_v1_1 sqnxt23_w1 sqnxt23v5_w1 shufflenet_g1_wd4 shufflenet_g3_wd4
shufflenetv2_wd2 shufflenetv2b_wd2 menet108_8x1_g3 mobilenet_wd4 mobilenetb_wd4 fdmobilenet_wd4
mobilenetv2_wd4 mobilenetv2b_wd4 mobilenetv3_small_w7d20 mobilenetv3_large_w7d20 igcv3_wd4 ghostnet
mnasnet_b1 mnasnet_a1 darts proxylessnas_cpu fbnet_cb spnasnet efficientnet_b0
efficientnet_edge_small_b mixnet_s isqrtcovresnet18 resneta10 octresnet10_ad2 tresnet_m inceptionv3
nin_cifar10 resnet20_cifar10 preresnet20_cifar10 resnext20_16x4d_cifar10
seresnet20_cifar10 pyramidnet110_a48_cifar10 densenet40_k12_cifar10 wrn16_10_cifar10 ror3_56_cifar10
rir_cifar10 diapreresnet20_cifar10 fcn8sd_resnetd50b_voc pspnet_resnetd50b_voc
deeplabv3_resnetd50b_voc danet_resnetd50b_cityscapes icnet_resnetd50b_cityscapes fastscnn_cityscapes
cgnet_cityscapes dabnet_cityscapes sinet_cityscapes fpenet_cityscapes ctxnet_cityscapes
lednet_cityscapes esnet_cityscapes edanet_cityscapes enet_cityscapes erfnet_cityscapes
linknet_cityscapes segnet_cityscapes unet_cityscapes sqnet_cityscapes espcnet_cityscapes
alphapose_fastseresnet101b_coco simplepose_resnet18_coco simplepose_mobile_mobilenet_w1_coco
lwopenpose2d_mobilenet_cmupan_coco ibppose_coco centernet_resnet18_voc
""".split()  # noqa: SIM905 (readable)
SIDES = (64, 96, 128, 224)  # the first that the network takes


def _pytorchcv_build(name: str, side: int) -> nn.Module:
    """A network for images of a size; its last pool, often made for one map, for any."""
    make = importlib.import_module("pytorchcv.model_provider").get_model
    try:
        model: nn.Module = make(name, in_size=(side, side))
    except (TypeError, AssertionError):  # no such argument, or for one size only
        model = make(name)
    for parent in list(model.modules()):
        if isinstance(getattr(parent, "final_pool", None), nn.AvgPool2d):
            parent.final_pool = nn.AdaptiveAvgPool2d(1)
    return model


def _takes(model: nn.Module, side: int) -> bool:
    with contextlib.suppress(Exception), torch.no_grad():
        model(*images(side, 2, 1))
        return True
    return False


def pytorchcv_network(name: str) -> Network:
    """A network of pytorchcv, for the smallest images that it takes."""
    sides = (32,) if name.endswith("_cifar10") else SIDES
    for side in sides:
        model = _pytorchcv_build(name, side).eval()
        if _takes(model, side):
            break
    build = functools.partial(_pytorchcv_build, name, side)
    takes_any = _takes(model, side + side // 2)
    inputs = functools.partial(images, side)
    return Network(name, "pytorchcv", build, inputs, takes_any, reduced=f"for images of {side}")


# -- segmentation_models_pytorch: decoders on encoders ------------------------------------------

SEGMENTATION = {
    "Unet": ("resnet18", "densenet121", "dpn68", "efficientnet-b0", "inceptionv4", "mit_b0",
             "se_resnet50", "timm-skresnet18", "timm-res2net50_26w_4s", "timm-gernet_s", "xception",
             "tu-hrnet_w18_small", "tu-caformer_s18", "tu-mambaout_femto",
             "tu-pvt_v2_b0", "tu-fastvit_t8", "tu-edgenext_xx_small"),
    "UnetPlusPlus": ("resnet18",), "MAnet": ("mobilenet_v2", "mit_b0"), "Linknet": ("resnet18",),
    "FPN": ("resnet18",), "PSPNet": ("resnet18",), "DeepLabV3": ("resnet18",),
    "DeepLabV3Plus": ("mobilenet_v2",), "PAN": ("mobilenet_v2",), "UPerNet": ("resnet18", "mit_b0"),
    "Segformer": ("resnet18", "mit_b0"),
}  # fmt: skip


def _segmentation_build(decoder: str, encoder: str) -> nn.Module:
    make = getattr(importlib.import_module("segmentation_models_pytorch"), decoder)
    model: nn.Module = make(encoder, encoder_weights=None, classes=3)
    return model


def segmentation_names() -> list[str]:
    """Decoder and encoder."""
    return [f"{decoder}-{e}" for decoder, encoders in SEGMENTATION.items() for e in encoders]


def segmentation_network(name: str) -> Network:
    """A network of segmentation_models_pytorch."""
    build = functools.partial(_segmentation_build, *name.split("-", 1))
    inputs = functools.partial(images, 128 if name.startswith("PAN") else 64)
    return Network(name, "segmentation-models", build, inputs, flexible=False)


# -- vit_pytorch: its architectures, small -------------------------------------------------------

_BASE = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 64, "depth": 2, "heads": 4,
         "mlp_dim": 96, "dim_head": 16}  # fmt: skip
_STAGES: dict[str, Any] = {"num_classes": 10, "dim": (32, 32, 64, 64), "depth": (1, 1, 1, 1)}
_LEVIT = {"image_size": 64, "num_classes": 10, "dim": (32, 48, 64), "depth": 1, "heads": (2, 3, 4),
          "mlp_mult": 2, "dim_key": 8, "dim_value": 16}  # fmt: skip
_CCT = {"img_size": 32, "embedding_dim": 64, "num_layers": 2, "num_heads": 4, "mlp_ratio": 2,
        "num_classes": 10}  # fmt: skip
_MAXVIT = {"num_classes": 10, "dim": 16, "depth": (1, 1), "dim_head": 8, "dim_conv_stem": 16,
           "window_size": 4}  # fmt: skip
# By name: the module and its class, the side of an image, and the arguments.
VIT_PYTORCH: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    **{m: (m, c, 32, _BASE) for m, c in {
        "vit": "ViT", "simple_vit": "SimpleViT", "simple_flash_attn_vit": "SimpleViT",
        "simple_uvit": "SimpleUViT", "simple_vit_with_qk_norm": "SimpleViT",
        "simple_vit_with_register_tokens": "SimpleViT", "simple_vit_with_value_residual":
        "SimpleViT", "simple_vit_with_patch_dropout": "SimpleViT", "deepvit": "DeepViT",
        "parallel_vit": "ViT", "vit_for_small_dataset": "ViT",
        "rvt": "RvT", "vit_with_patch_merger": "ViT", "vit_with_patch_dropout": "ViT",
        "normalized_vit": "nViT",
    }.items()},
    "cait": ("cait", "CaiT", 32, {**_BASE, "cls_depth": 1}),
    "xcit": ("xcit", "XCiT", 32, {**_BASE, "cls_depth": 1}),
    "pit": ("pit", "PiT", 32, {**_BASE, "depth": (1, 1, 1)}),
    "vit_nd": ("vit_nd", "ViTND", 32, {k: v for k, v in _BASE.items() if k != "image_size"}
               | {"ndim": 2, "input_shape": 32}),
    "t2t": ("t2t", "T2TViT", 64, {k: v for k, v in _BASE.items() if k != "patch_size"}
            | {"image_size": 64}),
    "levit": ("levit", "LeViT", 64, _LEVIT),
    "levit_distilled": ("levit", "LeViT", 64, {**_LEVIT, "num_distill_classes": 5}),
    "crossformer": ("crossformer", "CrossFormer", 224, _STAGES),
    "regionvit": ("regionvit", "RegionViT", 224, _STAGES),
    "sep_vit": ("sep_vit", "SepViT", 224, {"num_classes": 10, "dim": 32, "depth": (1, 1, 1, 1),
                                           "heads": (1, 2, 2, 4), "dim_head": 16}),
    "max_vit": ("max_vit", "MaxViT", 32, _MAXVIT),
    "max_vit_with_registers": ("max_vit_with_registers", "MaxViT", 32, _MAXVIT),
    "cct": ("cct", "CCT", 32, {**_CCT, "n_conv_layers": 2, "positional_embedding": "learnable"}),
    "cct_sine": ("cct", "CCT", 32, {**_CCT, "n_conv_layers": 1, "positional_embedding": "sine"}),
    "nest": ("nest", "NesT", 32, {"image_size": 32, "patch_size": 4, "dim": 32, "heads": 2,
                                  "num_hierarchies": 3, "block_repeats": (1, 1, 1),
                                  "num_classes": 10, "dim_head": 16}),
    "mobile_vit": ("mobile_vit", "MobileViT", 64, {
        "image_size": (64, 64), "dims": [32, 48, 64], "num_classes": 10,
        "channels": [8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 64]}),
    "cvt": ("cvt", "CvT", 64, {"num_classes": 10, "s1_emb_dim": 32, "s2_emb_dim": 48, "s2_heads": 2,
                               "s2_depth": 1, "s3_emb_dim": 64, "s3_heads": 2, "s3_depth": 1}),
}  # fmt: skip


def _vit_pytorch_build(name: str) -> nn.Module:
    module, kind, _, options = VIT_PYTORCH[name]
    make = getattr(importlib.import_module(f"vit_pytorch.{module}"), kind)
    model: nn.Module = make(**options)
    return model


def vit_pytorch_network(name: str) -> Network:
    """A network of vit_pytorch."""
    build = functools.partial(_vit_pytorch_build, name)
    inputs: Callable[[int, int], Inputs] = functools.partial(images, VIT_PYTORCH[name][2])
    return Network(name, "vit-pytorch", build, inputs, flexible=False, reduced="small")
