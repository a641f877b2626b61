"""MoCo: Momentum Contrast (He et al., 2019), and its second version (Chen et al., 2020).

Measured here: `digits`, on 2 CPU cores. The others have not been run by us; published, linear probe on ImageNet-1k: by
MMPretrain for v2, in the paper for v1.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/mocov2.py:digits` | 2 CPU cores | 2.0 CPU min | probe 80.1, trained 82.8; kNN 70.4, 74.7 |
| digits-mocov1 | `--config=configs/mocov2.py:NAME` | 2 CPU cores | 1.5 CPU min | probe 80.1, trained 92.6; kNN 70.4, 82.2 |
| mocov2_resnet50_8xb32-coslr-200e_in1k | `--config=configs/mocov2.py` | 8 GPUs | | 67.5 |
| mocov1_resnet50_8xb32-steplr-200e_in1k | `--config=configs/mocov2.py:NAME` | 8 GPUs | | 60.6 |
| resnet50_mocov2-pre_8xb32-linear-steplr-100e_in1k | | 8 GPUs | | 67.5 (linear probe) |

`8xb32` means 8 GPUs with 32 images each, normalised apart: BatchNorm in 8 groups, on any number of devices, and keys in
another order than queries. The first version (MMSelfSup's settings) has a linear projector, a temperature of 0.07, no blur,
and rates in steps.

The last recipes start from an encoder of the first: `--config.load_from.path=RUN`.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import probe_resnet50
from jaxpretrain.recipes import FLIP, MOCO_CROP, MOCO_VIEW, imagenet, recipe, tiny_siamese, two_views

V1_VIEW = [
    dict(type="RandomGrayscale", prob=0.2, keep_channels=True),
    dict(type="ColorJitter", brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4),
    FLIP,
]


def method(backbone: dict, neck: dict, temperature: float, out: int, **more: float) -> dict:
    head = dict(type="ContrastiveHead", loss=dict(type="CrossEntropyLoss"), temperature=temperature)
    neck = dict(neck, out_channels=out)
    return dict(type="MoCo", feat_dim=out, backbone=backbone, neck=neck, head=head, **more)


def mlp(channels: int) -> dict:
    return dict(type="MoCoV2Neck", in_channels=channels, hid_channels=channels, with_avg_pool=True)


def linear(channels: int, norm_cfg: dict | None = None) -> dict:
    return dict(type="LinearNeck", in_channels=channels, gap_dim=2, norm_cfg=norm_cfg)


def pretrain(neck: dict, temperature: float, view: list[dict], schedule: dict) -> ConfigDict:
    backbone = dict(type="ResNet", depth=50, norm_cfg=dict(type="BN", groups=8), zero_init_residual=False)
    return recipe(
        method=method(backbone, neck, temperature, 128, queue_len=65536, momentum=0.001),
        data=imagenet(*two_views(MOCO_CROP, view)),
        batch_size=256,
        max_epochs=200,
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.03, weight_decay=1e-4, momentum=0.9)),
        param_scheduler=[dict(schedule, by_epoch=True)],
        auto_scale_lr=dict(base_batch_size=256),
    )


def tiny(neck: str) -> ConfigDict:
    """A narrow ResNet-18 on real handwritten digits, a queue of 8 batches, normalised in 4 parts.

    The first version has BatchNorm after its projector and half the rate; it loses to the untrained encoder without.
    """

    def build(backbone: dict, width: int) -> dict:
        backbone = dict(backbone, norm_cfg=dict(type="BN", groups=4))
        projector = mlp(width) if neck == "mlp" else linear(width, dict(type="BN1d"))
        return method(backbone, projector, 0.2 if neck == "mlp" else 0.07, 64, queue_len=1024, momentum=0.05)

    return tiny_siamese(build, lr=0.1 if neck == "mlp" else 0.05)


RECIPES = {
    "mocov2_resnet50_8xb32-coslr-200e_in1k": partial(
        pretrain, mlp(2048), 0.2, MOCO_VIEW, dict(type="CosineAnnealingLR", T_max=200, begin=0, end=200)
    ),
    "mocov1_resnet50_8xb32-steplr-200e_in1k": partial(
        pretrain, linear(2048), 0.07, V1_VIEW, dict(type="MultiStepLR", milestones=[120, 160], gamma=0.1)
    ),
    "resnet50_mocov2-pre_8xb32-linear-steplr-100e_in1k": partial(
        probe_resnet50,
        dict(type="SGD", lr=30.0, weight_decay=0.0),
        100,
        32,
        [dict(type="MultiStepLR", by_epoch=True, milestones=[60, 80], gamma=0.1)],
    ),
    "digits": partial(tiny, "mlp"),
    "digits-mocov1": partial(tiny, "linear"),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
