"""DINOv2: Learning Robust Visual Features without Supervision (Oquab et al., 2023; registers: Darcet et al., 2024).

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published by the authors: kNN / linear probe on
ImageNet-1k. `vitl16_short`, `vitl14` and `vitg14` are the release's configurations of these names. The released ViT-g was
trained on LVD-142M, which is not public: its scores (83.5 / 86.5) are not this recipe's. Of the high-resolution stage the paper
says: all as before, schedules compressed to 10,000 steps, a smaller learning rate; a tenth is our choice.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/dinov2.py:digits` | 2 CPU cores | 5.9 CPU min | probe 86.5, trained 85.2; kNN 71.0, 79.8 |
| vitl16_short (ImageNet-1k) | `--config=configs/dinov2.py` | 32 GPUs | 1 day (theirs) | 81.6 / 82.9 |
| vitl14 (ImageNet-22k) | `--config=configs/dinov2.py:vitl14` | 96 GPUs | 3.3 days (theirs) | 82.0 / 84.5 |
| vitg14 (ImageNet-22k) | `--config=configs/dinov2.py:vitg14` | 256 GPUs | | |
| vitg14_reg4 (ImageNet-22k) | | 256 GPUs | | |
| vitl14_highres-518px | `--config=configs/dinov2.py:NAME --config.load_from.path=RUN` | 96 GPUs | | |
| vitg14_highres-518px | likewise | 256 GPUs | | |
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import (
    KINDS_NO_DECAY,
    TINY_VIT,
    imagenet,
    multi_crop,
    recipe,
    tiny_multi_crop,
)

EPOCH = 1250  # steps that the release calls an epoch, whatever the data


def backbone(arch: str, layers: int, patch_size: int, drop_path_rate: float, swiglu: bool, **more: Any) -> dict:
    """LayerScale, and the same drop path in all layers."""
    layer = dict(drop_path_rate=drop_path_rate, ffn_type="swiglu_fused" if swiglu else "origin")
    return dict(
        type="IBOTViT",
        arch=arch,
        patch_size=patch_size,
        layer_scale_init_value=1e-5,
        layer_cfgs=[layer] * layers,
        **{"img_size": 224, **more},
    )


def pretrain(
    backbone: dict,
    width: int,
    *,
    prototypes: int,
    bottleneck: int,
    separate_head: bool,
    centering: str,
    gpus: int,
    batch_size: int,
    base_lr: float,
    base_momentum: float,
    layer_decay: float,
    weight_decay_end: float,
    small_size: int,
    epochs: int = 100,
    warmup_epochs: int = 10,
    large_size: int = 224,
    data_root: str | None = None,
    shrink: float = 1.0,
    **fields: Any,
) -> ConfigDict:
    """One of the release's configurations; `shrink` compresses all its schedules. `base_lr` is for a batch of 1,024."""

    def steps(epochs: int) -> int:
        return max(1, round(epochs * EPOCH * shrink))

    lr, total, layers = base_lr * (batch_size / 1024) ** 0.5, steps(epochs), len(backbone["layer_cfgs"])
    head = dict(out_channels=prototypes, bottleneck_channels=bottleneck)
    data = imagenet(*multi_crop((0.32, 1.0), (0.05, 0.32), 8, large_size, small_size))
    if data_root:
        data["train"]["dataset"] = dict(type="CustomDataset", data_root=data_root, with_label=False)
    stem = layer_decay ** (layers + 1)  # of tokens that paths do not tell as the stem's
    return recipe(
        method=dict(
            type="DINOv2",
            backbone=backbone,
            neck=dict(
                type="DINOv2Neck", in_channels=width, dino_head=head, ibot_head=dict(head) if separate_head else None
            ),
            head=dict(
                type="DINOv2Head",
                out_channels=prototypes,
                centering=centering,
                teacher_temp=0.07,
                warmup_teacher_temp_steps=steps(30),
            ),
            base_momentum=base_momentum,
            groups=gpus,
        ),
        data=data,
        batch_size=batch_size,
        max_steps=total,
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=lr, betas=(0.9, 0.999), weight_decay=0.04),
            paramwise_cfg=dict(
                KINDS_NO_DECAY,
                layer_decay_rate=layer_decay,
                custom_keys={
                    "last_layer": dict(begin=steps(1)),
                    "patch_embed": dict(lr_mult=0.2),
                    "patch_embed/projection/bias": dict(lr_mult=0.2, decay_mult=0.0),
                    "mask_token": dict(lr_mult=stem),
                    "register_tokens": dict(lr_mult=stem),
                },
            ),
            clip_grad=dict(max_norm=3.0),
        ),
        param_scheduler=[
            dict(type="LinearLR", start_factor=1e-9, by_epoch=False, begin=0, end=steps(warmup_epochs)),
            # As a part of lr, so that layers that learn more slowly end lower too.
            dict(
                type="CosineAnnealingLR",
                by_epoch=False,
                begin=steps(warmup_epochs),
                end=total,
                eta_min_ratio=1e-6 / lr,
            ),
            dict(type="CosineAnnealingWeightDecay", by_epoch=False, begin=0, end=total, eta_min=weight_decay_end),
        ],
        auto_scale_lr=dict(base_batch_size=batch_size),
        dtype="bfloat16",
        scan_layers=True,
        evaluators=dict(attention=dict(type="AttentionMaps")),
        evaluation=dict(interval=10 * EPOCH, by_epoch=False),
        checkpoint=dict(interval=3 * EPOCH, by_epoch=False),
        **fields,
    )


def short() -> ConfigDict:
    """vitl16_short: ViT-L on ImageNet-1k."""
    return pretrain(
        backbone("large", 24, 16, 0.3, swiglu=False),
        1024,
        prototypes=65536,
        bottleneck=256,
        separate_head=False,
        centering="centering",
        gpus=32,
        batch_size=2048,
        base_lr=4e-3,
        base_momentum=0.008,
        layer_decay=0.9,
        weight_decay_end=0.4,
        small_size=96,
    )


def long(arch: str, layers: int, width: int, gpus: int, size: int = 224, registers: int = 0, **more: Any) -> ConfigDict:
    """vitl14 and vitg14: a batch of 3,072 for 625,000 steps of ImageNet-22k."""
    network = backbone(arch, layers, 14, 0.4, swiglu=True, img_size=size, num_registers=registers)
    settings = dict(base_lr=2e-4, epochs=500, warmup_epochs=80, data_root="data/imagenet22k")
    return pretrain(
        network,
        width,
        prototypes=131072,
        bottleneck=384,
        separate_head=True,
        centering="sinkhorn_knopp",
        gpus=gpus,
        batch_size=3072,
        base_momentum=0.006,
        layer_decay=1.0,
        weight_decay_end=0.2,
        small_size=98,
        large_size=size,
        remat="dots",
        mesh=dict(data=-1, fsdp=8),
        **{**settings, **more},
    )


def high_resolution(arch: str, layers: int, width: int, gpus: int) -> ConfigDict:
    """10,000 steps at 518 pixels, from the end of the first stage; positions are interpolated on loading."""
    return long(arch, layers, width, gpus, 518, shrink=10_000 / 625_000, base_lr=2e-5, load_from=dict(path=None))


def tiny() -> ConfigDict:
    """A small ViT with registers on real handwritten digits, with 512 prototypes of images and as many of patches.

    BatchNorm in the projectors: see configs/dino.py.
    """
    head = dict(out_channels=512, hidden_channels=128, bottleneck_channels=64, use_bn=True)
    temperature = dict(warmup_teacher_temp=0.03, teacher_temp=0.03)
    return tiny_multi_crop(
        dict(
            type="DINOv2",
            base_momentum=0.03,
            backbone=dict(type="IBOTViT", layer_scale_init_value=1.0, num_registers=2, **TINY_VIT),
            neck=dict(type="DINOv2Neck", in_channels=64, dino_head=head, ibot_head=dict(head)),
            head=dict(type="DINOv2Head", out_channels=512, centering="sinkhorn_knopp", **temperature),
        )
    )


VIT_L, VIT_G = ("large", 24, 1024, 96), ("dinov2-giant", 40, 1536, 256)

RECIPES = {
    "vitl16_short": short,
    "vitl14": partial(long, *VIT_L),
    "vitg14": partial(long, *VIT_G),
    "vitg14_reg4": partial(long, *VIT_G, registers=4),
    "vitl14_highres-518px": partial(high_resolution, *VIT_L),
    "vitg14_highres-518px": partial(high_resolution, *VIT_G),
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
