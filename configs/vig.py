"""Vision GNN: An Image is Worth Graph of Nodes (Han et al., 2022), trained with labels.

None of these but `digits` has been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's
own training, which was another; its recipes are those of its ResNets.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| digits | `--config=configs/vig.py:digits` | 2 CPU cores | 3.8 CPU min | probe 97.3, trained 99.0; kNN 79.5, 99.3 |
| vig-tiny_3rdparty_in1k | `--config=configs/vig.py` | 8 GPUs | | 74.40 |
| vig-small_3rdparty_in1k | `--config=configs/vig.py:NAME` | 8 GPUs | | 80.61 |
| vig-base_3rdparty_in1k | | 8 GPUs | | 82.62 |
| pvig-tiny_3rdparty_in1k | | 8 GPUs | | 78.38 |
| pvig-small_3rdparty_in1k | | 8 GPUs | | 82.00 |
| pvig-medium_3rdparty_in1k | | 8 GPUs | | 83.12 |
| pvig-base_3rdparty_in1k | | 8 GPUs | | 83.59 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.followers import ACCURACY, CENTRED, strong_augmentation
from jaxpretrain.recipes import digits, frozen_feature_scores, on_digits, recipe, warmup_cosine

GREY = dict(fill=(127.5,) * 3, fill_std=(127.5,) * 3, pad=(128, 128, 128))
STEPS = [dict(type="MultiStepLR", by_epoch=True, milestones=(30, 60, 90), gamma=0.1)]


def supervised(kind: str, arch: str, width: int, resize: int = 248, **backbone: object) -> ConfigDict:
    """100 epochs of SGD, with strong augmentation."""
    data = strong_augmentation(**GREY)
    data["val"]["pipeline"][0]["scale"] = resize
    return recipe(
        method=dict(
            type="Supervised",
            model=dict(
                type="ImageClassifier",
                backbone=dict(
                    type=kind,
                    arch=arch,
                    k=9,
                    act_cfg=dict(type="GELU"),
                    norm_cfg=dict(type="BN", groups=8),
                    graph_conv_type="mr",
                    graph_conv_bias=True,
                    epsilon=0.2,
                    use_stochastic=False,
                    drop_path=0.1,
                    norm_eval=False,
                    frozen_stages=0,
                    **backbone,
                ),
                neck=dict(type="GlobalAveragePooling"),
                head=dict(
                    type="VigClsHead",
                    num_classes=1000,
                    in_channels=width,
                    hidden_dim=1024,
                    act_cfg=dict(type="GELU"),
                    dropout=0.0,
                    groups=8,
                    loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
                ),
                train_cfg=dict(augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)]),
            ),
        ),
        data=data,
        data_preprocessor=CENTRED,
        batch_size=1024,
        max_epochs=100,
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4)),
        param_scheduler=STEPS,
        auto_scale_lr=dict(base_batch_size=256),
        evaluators=ACCURACY,
        evaluation=dict(interval=1),
    )


def tiny() -> ConfigDict:
    """A small ViG on real handwritten digits: 96-pixel images, so that a graph has 36 nodes; 3 blocks of 64 channels."""
    epochs = 20
    model = dict(
        type="ImageClassifier",
        backbone=dict(type="Vig", arch=dict(num_blocks=3, channels=64), k=4),
        neck=dict(type="GlobalAveragePooling"),
        head=dict(type="VigClsHead", num_classes=10, in_channels=64, hidden_dim=128),
    )
    return on_digits(
        method=dict(type="Supervised", model=model),
        data=digits([dict(type="RandomResizedCrop", scale=96, crop_ratio_range=(0.6, 1.0))], [], size=96),
        max_epochs=epochs,
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.05)),
        param_scheduler=warmup_cosine(epochs, 3),
        evaluators=frozen_feature_scores(accuracy=dict(type="Accuracy", topk=(1, 5))),
    )


VIG = partial(supervised, "Vig", use_dilation=True, relative_pos=False)
PYRAMID = partial(supervised, "PyramidVig")

RECIPES = {
    "vig-tiny_3rdparty_in1k": partial(VIG, "tiny", 192),
    "vig-small_3rdparty_in1k": partial(VIG, "small", 320),
    "vig-base_3rdparty_in1k": partial(VIG, "base", 640),
    "pvig-tiny_3rdparty_in1k": partial(PYRAMID, "tiny", 384),
    "pvig-small_3rdparty_in1k": partial(PYRAMID, "small", 640),
    "pvig-medium_3rdparty_in1k": partial(PYRAMID, "medium", 768),
    "pvig-base_3rdparty_in1k": partial(PYRAMID, "base", 1024, resize=235),
    "digits": tiny,
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
