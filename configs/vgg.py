"""VGG: Very Deep Convolutional Networks for Large-Scale Image Recognition (Simonyan & Zisserman, 2015), with labels.

None of these has been run by us; published by MMPretrain: top-1 on ImageNet-1k, of its own training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| vgg16_8xb32_in1k | `--config=configs/vgg.py` | 8 GPUs | | 71.62 |
| vgg11_8xb32_in1k | `--config=configs/vgg.py:NAME` | 8 GPUs | | 68.75 |
| vgg13_8xb32_in1k |  | 8 GPUs | | 70.02 |
| vgg19_8xb32_in1k |  | 8 GPUs | | 72.41 |
| vgg11bn_8xb32_in1k |  | 8 GPUs | | 70.67 |
| vgg13bn_8xb32_in1k |  | 8 GPUs | | 72.12 |
| vgg16bn_8xb32_in1k |  | 8 GPUs | | 73.74 |
| vgg19bn_8xb32_in1k |  | 8 GPUs | | 74.68 |
| vgg16_8xb16_voc |  | 8 GPUs | | |

`bn` has BatchNorm, in 8 groups, one for each GPU of the name. `voc` finds several classes in an image; it starts from a VGG-16
trained on ImageNet, given by `--config.load_from.path=RUN` or a file of weights, and its last layer starts anew.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import encoder
from jaxpretrain.supervised_recipes import classic, plain_crops

LAST_LAYER = [r"^backbone\.classifier\.6\."]


def vgg(depth: int, *, bn: bool = False) -> ConfigDict:
    """Without BatchNorm at a tenth of the rate."""
    norm = dict(norm_cfg=dict(type="BN", groups=8)) if bn else {}
    return classic(
        dict(type="VGG", depth=depth, num_classes=1000, **norm),
        None,
        optimizer={} if bn else dict(lr=0.01),
        data=plain_crops(backend="pillow"),
    )


def voc() -> ConfigDict:
    """Classes whose objects are all difficult do not count, neither in training nor in the scores."""
    data = plain_crops()
    for split, name in (("train", "trainval"), ("val", "test")):
        data[split]["dataset"] = dict(type="VOC", data_root="data/VOC2007", split=name)
    return classic(
        dict(type="VGG", depth=16, num_classes=20),
        None,
        per_gpu=16,
        epochs=40,
        optimizer=dict(lr=0.001, weight_decay=0.0),
        schedule=[dict(type="StepLR", by_epoch=True, step_size=20, gamma=0.1)],
        loss=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
        head=dict(type="MultiLabelClsHead"),
        data=data,
        load_from=encoder(drop=LAST_LAYER, fresh=LAST_LAYER),
        evaluators=dict(
            by_class=dict(type="VOCMultiLabelMetric"),
            overall=dict(type="VOCMultiLabelMetric", average="micro"),
            average_precision=dict(type="VOCAveragePrecision"),
        ),
    )


RECIPES = {
    "vgg16_8xb32_in1k": partial(vgg, 16),
    **{f"vgg{depth}_8xb32_in1k": partial(vgg, depth) for depth in (11, 13, 19)},
    **{f"vgg{depth}bn_8xb32_in1k": partial(vgg, depth, bn=True) for depth in (11, 13, 16, 19)},
    "vgg16_8xb16_voc": voc,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
