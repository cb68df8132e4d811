"""A small model of every module of timm, the pools that its tokens allow, and the sizes of pictures that it takes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from nev.config.base import ConfigError
from nev.config.model import Vision
from nev.models.pools import build_pool
from nev.models.trunk import build_trunk

ALL = ("own", "map", "mean", "cls", "cls+mean", "nomic")
PATCHES = ("own", "map", "mean")  # of a trunk without a class token
VIT: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 2}


@dataclass(frozen=True, eq=False)
class Small:
    """A model of timm.

    args: arguments that make the model smaller, where that is cheap. pools: that its tokens allow.
    size: of the pictures, in pixels. sizes: what other sizes there are, in words. refused: a size that the model does not take.
    """

    model: str
    args: dict[str, Any] = field(default_factory=dict)
    pools: tuple[str, ...] = PATCHES
    size: int = 32
    sizes: str = "any"
    refused: int | None = None


SMALL: dict[str, Small] = {
    "beit": Small("beit_base_patch16_224", VIT, pools=ALL),
    "byoanet": Small("botnet26t_256", sizes="multiples of 32", refused=48),
    "byobnet": Small("test_byobnet"),
    "cait": Small("cait_xxs24_224", {**VIT, "depth_token_only": 1}, pools=ALL),
    "coat": Small("coat_lite_tiny", {"serial_depths": [1, 1, 1, 1]}, pools=ALL),
    "convit": Small("convit_tiny", {"depth": 3, "local_up_to_layer": 2}, pools=ALL),
    "convmixer": Small("convmixer_1024_20_ks9_p14"),
    "convnext": Small("test_convnext"),
    "cpubone": Small("cpubone_nano"),
    "crossvit": Small(
        "crossvit_tiny_240", {"depth": [[1, 1, 0]]}, pools=("own",), size=240, sizes="multiples of 240", refused=224
    ),
    "csatv2": Small("csatv2", size=64, sizes="64 and more", refused=48),
    "cspnet": Small("cs3darknet_focus_s"),
    "cspnext": Small("cspnext_tiny"),
    "davit": Small("davit_tiny", {"depths": [1, 1, 1, 1], "embed_dims": [12, 24, 48, 96], "num_heads": [1, 2, 2, 4]}),
    "deepseek_vit": Small("deepseek_vit_412m", VIT, size=42, sizes="multiples of 14", refused=40),
    "deit": Small("deit_tiny_distilled_patch16_224", VIT, pools=ALL),
    "densenet": Small("densenet121", {"growth_rate": 8, "block_config": [2, 2, 2, 2]}),
    "dla": Small("dla46x_c", sizes="multiples of 32", refused=48),
    "dpn": Small("dpn48b", {"k_sec": [1, 1, 1, 1]}),
    "edgenext": Small("edgenext_xx_small"),
    "efficientformer": Small("efficientformer_l1", {"depths": [1, 1, 1, 2]}, size=224, sizes="224", refused=192),
    "efficientformer_v2": Small("efficientformerv2_s0", sizes="multiples of 32", refused=48),
    "efficientnet": Small("test_efficientnet"),
    "efficientvim": Small("efficientvim_m1", {"depths": [1, 1, 1]}, pools=("own",)),
    "efficientvit_mit": Small("efficientvit_b0"),
    "efficientvit_msra": Small("efficientvit_m0"),
    "eva": Small("eva02_tiny_patch14_224", VIT, pools=ALL),
    "fasternet": Small("fasternet_t0"),
    "fastvit": Small("fastvit_t8"),
    "focalnet": Small("focalnet_tiny_srf"),
    "gcvit": Small("gcvit_xxtiny", sizes="multiples of 32", refused=48),
    "gemma4_vit": Small(
        "gemma4_vit_167m",
        {"embed_dim": 64, "depth": 2, "num_heads": 2, "head_dim": 32, "intermediate_size": 96},
        sizes="multiples of 16",
        refused=40,
    ),
    "ghostnet": Small("ghostnet_050"),
    "hardcorenas": Small("hardcorenas_b"),
    "hgnet": Small("hgnetv2_b0"),
    "hiera": Small("hiera_tiny_224", {"embed_dim": 24, "stages": [1, 1, 2, 1]}, sizes="multiples of 32", refused=48),
    "hieradet_sam2": Small(
        "hieradet_small",
        {"embed_dim": 24, "stages": [1, 1, 2, 1], "global_att_blocks": [3]},
        sizes="multiples of 32",
        refused=48,
    ),
    "hrnet": Small("hrnet_w18_small", sizes="multiples of 32", refused=48),
    "iformer": Small("iformer_t"),
    "inception_next": Small("inception_next_atto"),
    "inception_resnet_v2": Small("inception_resnet_v2", size=80, sizes="75 and more", refused=64),
    "inception_v3": Small("inception_v3", size=80, sizes="75 and more", refused=64),
    "inception_v4": Small("inception_v4", size=80, sizes="75 and more", refused=64),
    "lcnetv2": Small("lcnetv2_small"),
    "levit": Small("levit_128s", sizes="multiples of 16", refused=40),
    "lowformer": Small("lowformer_b0"),
    "mambaout": Small("test_mambaout"),
    "maxxvit": Small("test_coatnet", sizes="multiples of 32", refused=48),
    "metaformer": Small("poolformerv2_s12"),
    "mlp_mixer": Small("gmlp_ti16_224"),
    "mobilenetv3": Small("lcnet_035"),
    "mobilenetv5": Small("mobilenetv5_base"),
    "mobilevit": Small("mobilevit_xxs"),
    "mvitv2": Small("mvitv2_tiny"),
    "naflexvit": Small("naflexvit_base_patch16_gap", VIT, sizes="multiples of 16", refused=40),
    "nasnet": Small("nasnetalarge", {"stem_size": 12, "num_features": 288}),
    "nest": Small("nest_tiny", sizes="multiples of 16", refused=40),
    "nextvit": Small("nextvit_small"),
    "nfnet": Small("test_nfnet"),
    "pit": Small("pit_ti_224", pools=("own", "cls")),
    "pnasnet": Small("pnasnet5large"),
    "pvt_v2": Small("pvt_v2_b0", {"depths": [1, 1, 1, 1]}),
    "qwen3_vit": Small("qwen3_vit_88m", VIT, sizes="multiples of 16", refused=40),
    "rdnet": Small("rdnet_tiny"),
    "regnet": Small("regnetx_002"),
    "repghost": Small("repghostnet_050"),
    "repvit": Small("repvit_m1", {"depth": [1, 1, 1, 1]}),
    "res2net": Small("res2net50_14w_8s", {"layers": [1, 1, 1, 1]}),
    "resnest": Small("resnest14d"),
    "resnet": Small("test_resnet"),
    "resnetv2": Small("resnetv2_50", {"layers": [1, 1, 1, 1], "channels": [32, 32, 64, 64]}),
    "rexnet": Small("rexnet_100"),
    "selecsls": Small("selecsls42"),
    "senet": Small("legacy_seresnet18"),
    "sequencer": Small(
        "sequencer2d_s", {"layers": [1, 1, 1, 1], "embed_dims": [24, 48, 48, 48], "hidden_sizes": [8, 8, 8, 8]}
    ),
    "shvit": Small("shvit_s1"),
    "sknet": Small("skresnet18", {"layers": [1, 1, 1, 1]}),
    "starnet": Small("starnet_s050"),
    "swiftformer": Small("swiftformer_xs"),
    "swin_transformer": Small(
        "swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
    ),
    "swin_transformer_v2": Small(
        "swinv2_tiny_window8_256", {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
    ),
    "swin_transformer_v2_cr": Small(
        "swinv2_cr_tiny_224", {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
    ),
    "tiny_vit": Small("tiny_vit_5m_224", {"depths": [1, 1, 1, 1]}),
    "tnt": Small("tnt_s_patch16_224", {"depth": 2}, pools=ALL),
    "tresnet": Small("tresnet_m", {"layers": [1, 1, 2, 1]}, sizes="multiples of 4", refused=34),
    "twins": Small(
        "twins_svt_small", {"depths": [1, 1, 2, 1], "embed_dims": [16, 32, 64, 64], "num_heads": [1, 2, 4, 4]}
    ),
    "vgg": Small("vgg11", {"mlp_ratio": 0.02}),
    "visformer": Small("visformer_tiny", sizes="even", refused=33),
    "vision_transformer": Small("vit_tiny_patch16_224", VIT, pools=ALL),
    "vision_transformer_hybrid": Small("vit_tiny_r_s16_p8_224", VIT, pools=ALL, sizes="multiples of 32", refused=48),
    "vision_transformer_relpos": Small("vit_relpos_small_patch16_224", VIT),
    "vision_transformer_sam": Small(
        "samvit_base_patch16_224", {**VIT, "neck_chans": 32}, sizes="multiples of 16", refused=40
    ),
    "vitamin": Small("vitamin_small_224", {"depth": 2}),
    "volo": Small("volo_d1_224", pools=ALL),
    "vovnet": Small("ese_vovnet19b_slim_dw"),
    "xception": Small("legacy_xception"),
    "xception_aligned": Small("xception41"),
    "xcit": Small("xcit_nano_12_p16_224", {"depth": 2}, pools=ALL),
}
# Other models of these modules, where their class, their tokens or their arguments are other ones.
FOREIGN = (
    Small("beitv2_base_patch16_224", VIT, ALL),
    Small("coat_tiny", {"serial_depths": [1, 1, 1, 1], "parallel_depth": 1}, pools=("own",)),
    Small("convnext_tiny_hnf"),
    Small("caformer_s18"),
    Small("poolformer_s12"),
    Small("deepseek_vit_412m_enc", VIT, ("map", "mean"), 42),
    Small("deepseek_vit_412m_align", {**VIT, "out_features": 96}, size=42),
    Small("deit_tiny_patch16_224", VIT, ALL),
    Small("efficientvim_m1_dist", pools=("own",)),
    Small("efficientvit_l1"),
    Small("eva02_base_patch14_224", VIT, ALL),
    Small("vit_base_patch16_rope_reg1_gap_256", VIT),
    Small("vit_tiny_patch16_dinov3_qkvb", VIT, ALL),
    Small("gemma4_vit_167m_enc", pools=("map", "mean"), size=64),
    Small("levit_conv_128s"),
    Small("mobilenetv4_conv_small"),
    Small("mobilenetv5_300m_enc", pools=("map", "mean"), size=64),
    Small("mvitv2_small_cls", pools=ALL),
    Small("naflexvit_base_patch16_radio_v3", VIT, pools=ALL, size=64),
    Small("pit_ti_distilled_224", pools=("own", "cls")),
    Small("qwen3_vit_88m_enc", VIT, pools=("map", "mean")),
    Small("resnet50_clip"),
    Small("vit_base_patch16_siglip_224", VIT),
    Small("vit_relpos_base_patch32_plus_rpn_256", VIT),
    Small("volo_d1_384", pools=ALL),
    Small("vovnet39a"),
)


def allowed_pools(small: Small) -> tuple[str, ...]:
    """The pools that a model's output allows, found by its shapes."""
    return tuple(pool for pool in ALL if _is_allowed(small, pool))


def _is_allowed(small: Small, pool: str) -> bool:
    try:
        trunk = _build_without_weights(small, own=pool == "own")
        build_pool(Vision(trunk=small.model, trunk_args=small.args, pool=pool), trunk)
    except ConfigError:
        return False
    return True


@functools.lru_cache(maxsize=2)
def _build_without_weights(small: Small, own: bool) -> Any:
    """The trunk for its own pooling, or for its tokens, which all other pools share."""
    with torch.device("meta"):
        return build_trunk(Vision(trunk=small.model, trunk_args=small.args, pool="own" if own else "map"), small.size)


def print_table() -> str:
    """The table of `docs/trunks.md`."""
    rows = [
        f"| `{module}` | `{small.model}` | {', '.join(small.pools)} | {small.sizes} |"
        for module, small in SMALL.items()
    ]
    return "\n".join(["| module | a model of it | pools | sizes in pixels |", "|---|---|---|---|", *rows])
