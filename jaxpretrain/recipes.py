"""Blocks that recipe files share: descriptions of data, evaluators and schedules."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.config import base_config

Cfg = dict[str, Any]

FLIP: Cfg = dict(type="RandomFlip", prob=0.5, direction="horizontal")
NO_DECAY_OR_LARS: Cfg = dict(decay_mult=0.0, lars_exclude=True)
# LARS leaves biases and BatchNorm alone: neither weight decay nor a rate of its own (SimCLR, appendix B.8).
LARS_EXCLUDE: Cfg = {"bn": NO_DECAY_OR_LARS, "bias": NO_DECAY_OR_LARS, "downsample/1": NO_DECAY_OR_LARS}


def recipe(**fields: Any) -> ConfigDict:
    """`base_config()` with some fields set; a dict sets only the keys that it has. An unknown field is an error."""
    config = base_config()
    for name, value in fields.items():
        if isinstance(value, dict) and isinstance(config.get(name), ConfigDict):
            with config.ignore_type(), config.unlocked():
                config[name].update(value)
        else:
            with config.ignore_type():
                config[name] = value
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


def digits(pipeline: list[Cfg], device_pipeline: list[Cfg], size: int = 32) -> Cfg:
    """scikit-learn's handwritten digits: 1,500 real images to train on and 297 to test, 8x8 pixels enlarged to `size`."""
    return dict(
        train=dict(dataset=dict(type="Digits", split="train"), pipeline=pipeline, device_pipeline=device_pipeline),
        val=dict(dataset=dict(type="Digits", split="val"), pipeline=[dict(type="Resize", scale=(size, size))]),
        num_workers=0,
    )


DIGITS_MEAN_STD: Cfg = dict(mean=(77.8, 77.8, 77.8), std=(95.9, 95.9, 95.9))


def warmup_cosine(
    epochs: int, warmup: int, start_factor: float = 1e-4, *, by_iter: bool = True, **cosine: Any
) -> list[Cfg]:
    """Linear warm-up per iteration, then a cosine to zero, per iteration or per epoch (`by_iter=False`)."""
    tail: Cfg = dict(type="CosineAnnealingLR", T_max=epochs - warmup, by_epoch=True, begin=warmup, end=epochs, **cosine)
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
    """kNN and linear probe of the frozen encoder."""
    return dict(knn=dict(type="KNN", k=20, temperature=0.07), linear=dict(type="LinearProbe"), **extra)
