"""MoCo v3: An Empirical Study of Training Self-Supervised Vision Transformers (Chen et al., 2021).

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published by MMPretrain: linear probe on ImageNet-1k,
by the recipes at the end, whose names say on which encoder; they start from `--config.load_from.path=RUN`.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/mocov3.py:digits` | 2 CPU cores | 3 min | linear probe 93.9, trained 96.6; kNN 76.8, 91.2 |
| mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k | `--config=configs/mocov3.py` | 16 GPUs | | 73.6 |
| mocov3_vit-base-p16_16xb256-amp-coslr-300e_in1k | `--config=configs/mocov3.py:NAME` | 16 GPUs | | 76.9 |
| mocov3_vit-large-p16_64xb64-amp-coslr-300e_in1k | | 64 GPUs | | 83.7 (fine-tuned) |
| mocov3_resnet50_8xb512-amp-coslr-100e_in1k | | 8 GPUs | | 69.6 |
| mocov3_resnet50_8xb512-amp-coslr-300e_in1k | | 8 GPUs | | 72.8 |
| mocov3_resnet50_8xb512-amp-coslr-800e_in1k | | 8 GPUs | | 74.4 |
| vit-small-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k | | 8 GPUs | | 73.6 |
| vit-base-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k | | 8 GPUs | | 76.9 |
| vit-base-p16_mocov3-pre_8xb64-coslr-150e_in1k | | 8 GPUs | | 83.0 (fine-tuned) |
| vit-large-p16_mocov3-pre_8xb64-coslr-100e_in1k | | 8 GPUs | | 83.7 (fine-tuned) |
| resnet50_mocov3-100e-pre_8xb128-linear-coslr-90e_in1k (and 300e, 800e) | | 8 GPUs | | as above |
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import fine_tune, linear_probe, probe_resnet50
from jaxpretrain.recipes import (
    FLIP,
    GRAYSCALE,
    LARS_EXCLUDE,
    NO_DECAY,
    blur,
    digits,
    imagenet,
    jitter,
    on_digits,
    recipe,
    two_views,
    warmup_cosine,
)
from jaxpretrain.supervised_recipes import LINEAR_INIT


def view(blurred: float, solarized: float) -> list[dict]:
    """One of the two asymmetric views."""
    solarize = dict(type="Solarize", thr=128, prob=solarized)
    return [jitter(0.4, 0.4, 0.2, 0.1), GRAYSCALE, blur(blurred), solarize, FLIP]


def asymmetric(smallest_crop: float) -> dict:
    crop = dict(type="RandomResizedCrop", scale=224, crop_ratio_range=(smallest_crop, 1.0), backend="pillow")
    return imagenet(*two_views(crop, view(1.0, 0.0), view(0.1, 0.2)))


def mlp(in_channels: int, num_layers: int, hid_channels: int = 4096, out_channels: int = 256, **more: Any) -> dict:
    """Projector or predictor: Linear, BatchNorm, ReLU; the last BatchNorm without scale and bias."""
    return dict(
        type="NonLinearNeck",
        in_channels=in_channels,
        hid_channels=hid_channels,
        out_channels=out_channels,
        num_layers=num_layers,
        with_bias=False,
        with_last_bn=more.pop("with_last_bn", True),
        with_last_bn_affine=False,
        with_last_bias=False,
        with_avg_pool=more.pop("with_avg_pool", False),
        **more,
    )


def vit(arch: str, width: int, clip_grad: dict | None = None) -> ConfigDict:
    return recipe(
        method=dict(
            type="MoCoV3",
            base_momentum=0.01,
            backbone=dict(type="MoCoV3ViT", arch=arch, img_size=224, patch_size=16, stop_grad_conv1=True),
            neck=mlp(width, 3),
            head=dict(
                type="MoCoV3Head",
                predictor=mlp(256, 2),
                loss=dict(type="CrossEntropyLoss", loss_weight=2 * 0.2),
                temperature=0.2,
            ),
        ),
        data=asymmetric(0.08),
        batch_size=4096,
        max_epochs=300,
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=2.4e-3, weight_decay=0.1), clip_grad=clip_grad),
        param_scheduler=warmup_cosine(300, 40),
        auto_scale_lr=dict(base_batch_size=4096),
        dtype="bfloat16",
    )


def resnet(epochs: int, lr: float, weight_decay: float = 1e-6, base_momentum: float = 0.01) -> ConfigDict:
    return recipe(
        method=dict(
            type="MoCoV3",
            base_momentum=base_momentum,
            backbone=dict(type="ResNet", depth=50, norm_cfg=dict(type="SyncBN"), zero_init_residual=False),
            neck=mlp(2048, 2, with_avg_pool=True),
            head=dict(
                type="MoCoV3Head",
                predictor=mlp(256, 2, with_last_bn=False),
                loss=dict(type="CrossEntropyLoss", loss_weight=2 * 1.0),
                temperature=1.0,
            ),
        ),
        data=asymmetric(0.2),
        batch_size=4096,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=dict(type="LARS", lr=lr, weight_decay=weight_decay, momentum=0.9),
            paramwise_cfg=dict(custom_keys=LARS_EXCLUDE),
        ),
        param_scheduler=warmup_cosine(epochs, 10),
        auto_scale_lr=dict(base_batch_size=4096),
        dtype="bfloat16",
    )


TINY_VIT = dict(
    type="MoCoV3ViT",
    arch=dict(embed_dims=64, num_layers=3, num_heads=4, feedforward_channels=256),
    img_size=32,
    patch_size=4,
    stop_grad_conv1=True,
)


def tiny() -> ConfigDict:
    """A small ViT on real handwritten digits: crops and changes of contrast, a projector of 256 units."""
    epochs = 25
    crop = dict(type="RandomResizedCrop", scale=32, crop_ratio_range=(0.4, 1.0))
    return on_digits(
        method=dict(
            type="MoCoV3",
            base_momentum=0.01,
            backbone=TINY_VIT,
            neck=mlp(64, 2, 256, 64),
            head=dict(
                type="MoCoV3Head",
                predictor=mlp(64, 2, 256, 64),
                loss=dict(type="CrossEntropyLoss", loss_weight=2 * 0.2),
                temperature=0.2,
            ),
        ),
        data=digits(*two_views(crop, [jitter(0.6, 0.6, 0.0, 0.0)])),
        max_epochs=epochs,
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1.5e-3, weight_decay=0.1)),
        param_scheduler=warmup_cosine(epochs, 2),
        evaluation=dict(at_start=True),
        checkpoint=dict(interval=5),
    )


def probe_vit(arch: str, width: int) -> ConfigDict:
    """A linear layer on the frozen class token; SGD at a rate of 12."""
    model = dict(
        backbone=dict(
            type="MoCoV3ViT",
            arch=arch,
            img_size=224,
            patch_size=16,
            stop_grad_conv1=True,
            frozen_stages=12,
            norm_eval=True,
        ),
        head=dict(
            type="VisionTransformerClsHead",
            num_classes=1000,
            in_channels=width,
            loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
            init_cfg=dict(type="Normal", std=0.01, layer="Linear"),
        ),
    )
    cosine = [dict(type="CosineAnnealingLR", T_max=90, by_epoch=True, begin=0, end=90)]
    return linear_probe(model, dict(type="SGD", lr=12.0, momentum=0.9, weight_decay=0.0), 90, cosine, per_gpu=128)


def fine_tune_vit(arch: str, width: int, epochs: int, drop_path: float) -> ConfigDict:
    """All layers at one rate, gradients clipped, weights averaged."""
    custom_keys = {"/cls_token": NO_DECAY, "/pos_embed": NO_DECAY}
    return fine_tune(
        dict(type="VisionTransformer", arch=arch, img_size=224, patch_size=16, drop_path_rate=drop_path),
        width,
        lr=5e-4,
        epochs=epochs,
        per_gpu=64,
        no_decay=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys=custom_keys),
        head=dict(type="VisionTransformerClsHead", init_cfg=LINEAR_INIT),
        clip_grad=dict(max_norm=5.0),
        param_scheduler=warmup_cosine(epochs, 5, 1e-3, eta_min=1e-5),
        auto_scale_lr=dict(base_batch_size=None),
        ema=dict(momentum=4e-5),
    )


RECIPES = {
    "mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k": partial(vit, "mocov3-small", 384),
    "mocov3_vit-base-p16_16xb256-amp-coslr-300e_in1k": partial(vit, "base", 768),
    "mocov3_vit-large-p16_64xb64-amp-coslr-300e_in1k": partial(vit, "large", 1024, clip_grad=dict(max_norm=5.0)),
    "mocov3_resnet50_8xb512-amp-coslr-100e_in1k": partial(resnet, 100, 9.6),
    "mocov3_resnet50_8xb512-amp-coslr-300e_in1k": partial(resnet, 300, 4.8),
    "mocov3_resnet50_8xb512-amp-coslr-800e_in1k": partial(resnet, 800, 4.8, 1.5e-6, 0.004),
    "vit-small-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k": partial(probe_vit, "mocov3-small", 384),
    "vit-base-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k": partial(probe_vit, "base", 768),
    "vit-base-p16_mocov3-pre_8xb64-coslr-150e_in1k": partial(fine_tune_vit, "base", 768, 150, 0.1),
    "vit-large-p16_mocov3-pre_8xb64-coslr-100e_in1k": partial(fine_tune_vit, "large", 1024, 100, 0.5),
    **{
        f"resnet50_mocov3-{n}e-pre_8xb128-linear-coslr-90e_in1k": partial(
            probe_resnet50, dict(type="SGD", lr=0.4, weight_decay=0.0), 90, 128, norm_eval=True
        )
        for n in (100, 300, 800)
    },
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
