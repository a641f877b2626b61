"""Blocks that recipe files share: data and views, evaluators, schedules. Probes and fine-tuning are in `followers`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.config import base_config

Cfg = dict[str, Any]

FLIP: Cfg = dict(type="RandomFlip", prob=0.5, direction="horizontal")
NO_DECAY_OR_LARS: Cfg = dict(decay_mult=0.0, lars_exclude=True)
# LARS leaves biases and BatchNorm alone: neither weight decay nor a rate of its own (SimCLR, appendix B.8).
LARS_EXCLUDE: Cfg = {"bn": NO_DECAY_OR_LARS, "bias": NO_DECAY_OR_LARS, "downsample/1": NO_DECAY_OR_LARS}
NO_DECAY: Cfg = dict(decay_mult=0.0)
# Weight decay is for matrices only. MMPretrain's names with `/`, for a ConfigDict has no keys with dots.
VIT_NO_DECAY: Cfg = dict.fromkeys(("/ln", "/bias", "/cls_token", "/pos_embed"), NO_DECAY)
SWIN_NO_DECAY: Cfg = dict.fromkeys(("/absolute_pos_embed", "/relative_position_bias_table"), NO_DECAY)
KINDS_NO_DECAY: Cfg = dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0)
GRAYSCALE: Cfg = dict(type="RandomGrayscale", prob=0.2, keep_channels=True, channel_weights=(0.114, 0.587, 0.2989))


def recipe(**fields: Any) -> ConfigDict:
    """`base_config()` with some fields set; a dict sets only the keys that it has. An unknown field is an error."""
    config = base_config()
    with config.ignore_type(), config.unlocked():
        for name, value in copy.deepcopy(fields).items():  # so that overrides do not reach what recipes share
            if isinstance(value, dict) and isinstance(config.get(name), ConfigDict):
                config[name].update(value)
            elif name in config:
                config[name] = value
            else:
                raise KeyError(f"A config has no field {name!r}")
    return config


def imagenet(pipeline: list[Cfg], device_pipeline: list[Cfg], *, resize: Cfg | None = None, crop: int = 224) -> Cfg:
    """ImageNet-1k: training crops as given; evaluation on the central crop of the image with its short edge at 256."""
    resize = resize or dict(type="ResizeEdge", scale=256, edge="short")
    return dict(
        train=dict(
            dataset=dict(type="ImageNet", data_root="data/imagenet", split="train"),
            pipeline=pipeline,
            device_pipeline=device_pipeline,
        ),
        val=dict(
            dataset=dict(type="ImageNet", data_root="data/imagenet", split="val"),
            pipeline=[resize, dict(type="CenterCrop", crop_size=crop)],
        ),
        num_workers=8,
    )


def jitter(brightness: float, contrast: float, saturation: float, hue: float, prob: float = 0.8) -> Cfg:
    """Changes of colour, for `prob` of the images."""
    strengths = dict(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
    return dict(type="RandomApply", transforms=[dict(type="ColorJitter", **strengths)], prob=prob)


def blur(prob: float) -> Cfg:
    """SimCLR's blur: sigma evenly from 0.1 to 2.0 pixels."""
    return dict(type="GaussianBlur", magnitude_range=(0.1, 2.0), magnitude_std="inf", prob=prob)


def two_views(crop: Cfg, *views: list[Cfg]) -> tuple[list[Cfg], list[Cfg]]:
    """(host pipeline, device pipeline) of two views, each cropped alike: both changed by `views[0]`, or each by its own."""
    numbers = 2 if len(views) == 1 else (1, 1)
    return (
        [dict(type="MultiView", num_views=numbers, transforms=[[crop] for _ in views])],
        [dict(type="MultiView", num_views=numbers, transforms=list(views))],
    )


# The views of MoCo v2, SimSiam and DenseCL; and those of BYOL and Barlow Twins, of which only one is solarised.
MOCO_CROP: Cfg = dict(type="RandomResizedCrop", scale=224, crop_ratio_range=(0.2, 1.0), backend="pillow")
MOCO_VIEW = [jitter(0.4, 0.4, 0.4, 0.1), GRAYSCALE, blur(0.5), FLIP]
BYOL_CROP: Cfg = dict(type="RandomResizedCrop", scale=224, interpolation="bicubic", backend="pillow")
BYOL_VIEWS = [
    [FLIP, jitter(0.4, 0.4, 0.2, 0.1), GRAYSCALE, blur(blurred), dict(type="Solarize", thr=128, prob=solarized)]
    for blurred, solarized in ((1.0, 0.0), (0.1, 0.2))
]


def multi_crop(
    large: Sequence[float], small: Sequence[float], num_small: int, size: int = 224, small_size: int = 96
) -> tuple[list[Cfg], list[Cfg]]:
    """(host pipeline, device pipeline) of DINO's views: two large ones, changed as BYOL's, and many small ones.

    `large` and `small` are ranges of the part of the image's area that a view shows.
    """
    crops = [
        [dict(type="RandomResizedCrop", scale=n, crop_ratio_range=part, interpolation="bicubic", backend="pillow")]
        for n, part in ((size, tuple(large)), (small_size, tuple(small)))
    ]
    changed = [FLIP, jitter(0.4, 0.4, 0.2, 0.1), GRAYSCALE, blur(0.5)]
    return (
        [dict(type="MultiView", num_views=(2, num_small), transforms=crops)],
        [dict(type="MultiView", num_views=(1, 1, num_small), transforms=[*BYOL_VIEWS, changed])],
    )


IMAGENET_IMAGES = 1_281_167  # in ImageNet-1k's training set


def imagenet_steps(epochs: int, batch_size: int) -> int:
    """Optimizer steps of so many epochs of ImageNet-1k."""
    return epochs * (IMAGENET_IMAGES // batch_size)


def digits(pipeline: list[Cfg], device_pipeline: list[Cfg], size: int = 32) -> Cfg:
    """scikit-learn's handwritten digits: 1,500 real images to train on and 297 to test, 8x8 pixels enlarged to `size`."""
    return dict(
        train=dict(dataset=dict(type="Digits", split="train"), pipeline=pipeline, device_pipeline=device_pipeline),
        val=dict(dataset=dict(type="Digits", split="val"), pipeline=[dict(type="Resize", scale=(size, size))]),
        num_workers=0,
    )


def masked_digit_pairs() -> Cfg:
    """Handwritten digits of 24 pixels for BEiT and its kin: two pictures of one crop, and a mask of 14 of 6x6 patches."""
    pair = dict(
        type="RandomResizedCropAndInterpolationWithTwoPic",
        size=24,
        second_size=24,
        second_interpolation="bilinear",
        scale=(0.6, 1.0),
    )
    mask = dict(type="BEiTMaskGenerator", input_size=6, num_masking_patches=14, min_num_patches=4)
    return digits([pair, mask], [], size=24)


# How pre-training by masks initialises, MAE and its kin, BEiT and its.
MAE_INIT: list[Cfg] = [
    dict(type="Xavier", layer="Linear", distribution="uniform"),
    dict(type="Constant", layer="LayerNorm", val=1.0, bias=0.0),
]
BEIT_INIT: list[Cfg] = [
    dict(type="TruncNormal", std=0.02, layer="Linear"),
    dict(type="TruncNormal", std=0.02, layer="Conv2d"),
    dict(type="Constant", layer="LayerNorm", val=1.0, bias=0.0),
]

DIGITS_MEAN_STD: Cfg = dict(mean=(77.8, 77.8, 77.8), std=(95.9, 95.9, 95.9))


def warmup_cosine(
    epochs: int, warmup: int, start_factor: float = 1e-4, *, by_iter: bool = True, **cosine: Any
) -> list[Cfg]:
    """Linear warm-up per iteration, then a cosine to zero, per iteration or per epoch (`by_iter=False`)."""
    cosine.setdefault("T_max", epochs - warmup)
    tail: Cfg = dict(type="CosineAnnealingLR", by_epoch=True, begin=warmup, end=epochs, **cosine)
    return [
        dict(
            type="LinearLR",
            start_factor=start_factor,
            by_epoch=True,
            begin=0,
            end=warmup,
            convert_to_iter_based=True,
        ),
        dict(tail, convert_to_iter_based=True) if by_iter else tail,
    ]


def frozen_feature_scores(**extra: Cfg) -> Cfg:
    """kNN and linear probe of the frozen encoder, how its features spread, and a picture of nearest neighbours."""
    return dict(
        knn=dict(type="KNN", k=20, temperature=0.07),
        linear=dict(type="LinearProbe"),
        statistics=dict(type="FeatureStatistics"),
        neighbours=dict(type="NearestNeighbours"),
        **extra,
    )


def on_digits(**fields: Any) -> ConfigDict:
    """A `recipe` for handwritten digits: what it does not set is batches of 128, and scores of the frozen features before
    and after.
    """
    usual = dict(
        data_preprocessor=DIGITS_MEAN_STD,
        batch_size=128,
        evaluators=frozen_feature_scores(),
        evaluation=dict(interval=20, at_start=True),
        checkpoint=dict(interval=10),
        log_interval=20,
    )
    return recipe(**usual | fields)


def tiny_siamese(method: Callable[[Cfg, int], Cfg], lr: float, epochs: int = 20, **optim_wrapper: Any) -> ConfigDict:
    """Two views of real handwritten digits, crops with changes of contrast, through a narrow ResNet-18: a minute on a CPU.

    Args:
        method: (backbone, channels of its map) -> the method's description.
        lr: of SGD, for a batch of 128.
        epochs: how long.
        optim_wrapper: what else it has.
    """
    size = 16
    backbone = dict(
        type="ResNet_CIFAR",
        depth=18,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2,),
        stem_channels=16,
        base_channels=16,
    )
    crop = dict(type="RandomResizedCrop", scale=size, crop_ratio_range=(0.4, 1.0))
    return on_digits(
        method=method(backbone, 64),
        data=digits(*two_views(crop, [jitter(0.6, 0.6, 0.0, 0.0)]), size=size),
        max_epochs=epochs,
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=lr, momentum=0.9, weight_decay=1e-4), **optim_wrapper),
        param_scheduler=warmup_cosine(epochs, 2, by_iter=False),
        evaluation=dict(at_start=True),
        checkpoint=dict(interval=5),
    )


def tiny_multi_crop(method: Cfg, epochs: int = 20) -> ConfigDict:
    """DINO's views of real handwritten digits, two of 24 pixels and four of 12, for a small ViT: a minute or two on a CPU."""
    crops = [
        [dict(type="RandomResizedCrop", scale=size, crop_ratio_range=part)]
        for size, part in ((24, (0.5, 1.0)), (12, (0.2, 0.5)))
    ]
    return on_digits(
        method=method,
        data=digits(
            [dict(type="MultiView", num_views=(2, 4), transforms=crops)],
            [dict(type="MultiView", num_views=6, transforms=[[jitter(0.6, 0.6, 0.0, 0.0)]])],
            size=24,
        ),
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=5e-4, weight_decay=0.04),
            # The last layer stands still for an epoch of 11 steps.
            paramwise_cfg=dict(KINDS_NO_DECAY, custom_keys={"last_layer": dict(begin=11)}),
            clip_grad=dict(max_norm=3.0),
        ),
        param_scheduler=warmup_cosine(epochs, 2, eta_min=1e-5),
        evaluators=frozen_feature_scores(attention=dict(type="AttentionMaps", num_images=12)),
        evaluation=dict(at_start=True),
        checkpoint=dict(interval=5),
    )


TINY_VIT: Cfg = dict(
    arch=dict(embed_dims=64, num_layers=3, num_heads=4, feedforward_channels=256),
    img_size=24,
    patch_size=4,
    init_cfg=MAE_INIT,
)
