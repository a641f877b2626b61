"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (Caron et al., 2020).

Measured here: `digits`, on 2 CPU cores. The other has not been run by us; published by MMPretrain: linear probe on ImageNet-1k.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/swav.py:digits` | 2 CPU cores | 4.9 CPU min | probe 80.1, trained 84.5; kNN 70.4, 74.4 |
| swav_resnet50_8xb32-mcrop-coslr-200e_in1k-224px-96px | `--config=configs/swav.py` | 8 GPUs | | 70.5 |
| resnet50_swav-pre_8xb32-linear-coslr-100e_in1k | | 8 GPUs | | 70.5 (linear probe) |

The last recipes start from an encoder of the first: `--config.load_from.path=RUN`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import probe_resnet50
from jaxpretrain.recipes import FLIP, GRAYSCALE, blur, digits, imagenet, jitter, recipe, tiny_siamese

VIEW = [jitter(0.8, 0.8, 0.8, 0.2), GRAYSCALE, blur(0.5), FLIP]


def method(backbone: dict, width: int, hidden: int, out: int, loss: dict, **more: int) -> dict:
    return dict(
        type="SwAV",
        backbone=backbone,
        neck=dict(type="SwAVNeck", in_channels=width, hid_channels=hidden, out_channels=out, with_avg_pool=True),
        head=dict(type="SwAVHead", loss=dict(type="SwAVLoss", feat_dim=out, epsilon=0.05, temperature=0.1, **loss)),
        **more,
    )


def crops(numbers: tuple[int, int], sizes: tuple[int, int], parts: Any, view: list[dict], **crop: str) -> Any:
    """(host pipeline, device pipeline): large crops, then small ones, each of its range of the image's area."""
    host = [
        [dict(type="RandomResizedCrop", scale=size, crop_ratio_range=part, **crop)]
        for size, part in zip(sizes, parts, strict=True)
    ]
    return (
        [dict(type="MultiView", num_views=numbers, transforms=host)],
        [dict(type="MultiView", num_views=sum(numbers), transforms=[view])],
    )


def pretrain() -> ConfigDict:
    """Prototypes stand still for an epoch; 15 epochs later a queue of 15 batches takes part in the codes."""
    backbone = dict(type="ResNet", depth=50, norm_cfg=dict(type="SyncBN"), zero_init_residual=True)
    return recipe(
        method=method(backbone, 2048, 2048, 128, dict(num_crops=(2, 6)), queue_length=3840, epoch_queue_starts=15),
        data=imagenet(*crops((2, 6), (224, 96), ((0.14, 1.0), (0.05, 0.14)), VIEW, backend="pillow")),
        batch_size=256,
        max_epochs=200,
        optim_wrapper=dict(
            optimizer=dict(type="LARS", lr=0.6, weight_decay=1e-6, momentum=0.9),
            paramwise_cfg=dict(custom_keys={"prototypes": dict(begin=5005)}),
        ),
        param_scheduler=[
            dict(
                type="CosineAnnealingLR",
                T_max=200,
                eta_min=6e-4,
                by_epoch=True,
                begin=0,
                end=200,
                convert_to_iter_based=True,
            )
        ],
        checkpoint=dict(interval=10),
    )


def tiny() -> ConfigDict:
    """A narrow ResNet-18 on real handwritten digits: two crops of 16 pixels and four of 8, 30 prototypes, a short queue."""

    def build(backbone: dict, width: int) -> dict:
        loss = dict(num_crops=(2, 4), num_prototypes=30)
        return method(backbone, width, 128, 32, loss, queue_length=384, epoch_queue_starts=5)

    config = tiny_siamese(build, lr=0.1)
    # With SGD the few steps end where all predictions are uniform.
    config.optim_wrapper.optimizer = ConfigDict(dict(type="AdamW", lr=2e-3, weight_decay=1e-4))
    # Prototypes stand still for an epoch of 11 steps.
    config.optim_wrapper.paramwise_cfg = ConfigDict(dict(custom_keys={"prototypes": dict(begin=11)}))
    config.data.update(
        digits(*crops((2, 4), (16, 8), ((0.4, 1.0), (0.15, 0.4)), [jitter(0.6, 0.6, 0.0, 0.0)]), size=16)
    )
    return config


RECIPES = {
    "swav_resnet50_8xb32-mcrop-coslr-200e_in1k-224px-96px": pretrain,
    # Its name says 8xb32 and 100 epochs; the zoo made it by the recipe for 8xb512 and 90.
    "resnet50_swav-pre_8xb32-linear-coslr-100e_in1k": partial(
        probe_resnet50, dict(type="LARS", lr=1.6, weight_decay=0.0), 90, 512
    ),
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
