"""Training classifiers with labels from the start: `from_scratch` as most backbones of MMPretrain's zoo since Swin have it,
`classic` as ResNet and those before and around it.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.followers import ACCURACY, fine_tune, strong_augmentation
from jaxpretrain.recipes import FLIP, KINDS_NO_DECAY, NO_DECAY, SWIN_NO_DECAY, Cfg, imagenet, recipe, warmup_cosine

PILLOW: Cfg = dict(backend="pillow", interpolation="bicubic")
CROSS_ENTROPY: Cfg = dict(type="CrossEntropyLoss", loss_weight=1.0)
TOKENS_NO_DECAY: Cfg = dict(custom_keys=dict.fromkeys(("/cls_token", "/pos_embed"), NO_DECAY))
# Linear layers from a narrow normal distribution: with biases of zero, and with those that layers have by default.
LINEAR_INIT: list[Cfg] = [
    dict(type="TruncNormal", layer="Linear", std=0.02, bias=0.0),
    dict(type="Constant", layer="LayerNorm", val=1.0, bias=0.0),
]
VIT_INIT: list[Cfg] = [
    dict(type="TruncNormal", layer="Linear", std=0.02),
    dict(type="Constant", layer="LayerNorm", val=1.0, bias=0.0),
]
# What else a ConvNeXt classifier has.
CONVNEXT_INIT: Cfg = dict(init_cfg=dict(type="TruncNormal", layer=["Conv2d", "Linear"], std=0.02, bias=0.0))
POOLFORMER_INIT: list[Cfg] = [
    dict(type="TruncNormal", layer=["Conv2d", "Linear"], std=0.02, bias=0.0),
    dict(type="Constant", layer=["GroupNorm"], val=1.0, bias=0.0),
]


def smoothing(value: float = 0.1, **args: Any) -> Cfg:
    """The loss with smoothed labels; `mode='original'` shares the missing part out among all classes."""
    return dict(type="LabelSmoothLoss", label_smooth_val=value, **args)


def larger_images(size: int) -> Cfg:
    """`data` of training on at `size` pixels: crops and mirrors alone; evaluation on whole images, squeezed to a square."""
    data = imagenet([dict(type="RandomResizedCrop", scale=size, **PILLOW)], [FLIP])
    data["val"]["pipeline"] = [dict(type="Resize", scale=size, **PILLOW)]
    return data


def resized(edge: int, **settings: Any) -> Cfg:
    """`data` of `strong_augmentation(**settings)`; evaluation on the middle of images whose short edge is `edge`."""
    data = strong_augmentation(**settings)
    data["val"]["pipeline"][0]["scale"] = edge
    return data


def birds(size: int, edge: int) -> Cfg:
    """`data` of CUB-200-2011 at `size` pixels, out of images of `edge` by `edge`: 200 classes of birds."""
    source = dict(type="CUB", data_root="data/CUB_200_2011")
    resize = dict(type="Resize", scale=edge)
    return dict(
        train=dict(
            dataset=dict(source, split="train"),
            pipeline=[resize, dict(type="RandomCrop", crop_size=size)],
            device_pipeline=[FLIP],
        ),
        val=dict(dataset=dict(source, split="test"), pipeline=[resize, dict(type="CenterCrop", crop_size=size)]),
        num_workers=8,
    )


def undecayed(*names: str) -> Cfg:
    """`paramwise_cfg`: no weight decay of norms, of biases, and of parameters with these names."""
    return dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys=dict.fromkeys(names, NO_DECAY))


def from_scratch(
    backbone: Cfg,
    width: int,
    *,
    lr: float,
    gpus: int,
    per_gpu: int,
    size: int = 224,
    epochs: int = 300,
    warmup: int = 20,
    weight_decay: float = 0.05,
    clip: float | None = None,
    averaged: float | None = None,
    optimizer: Cfg | None = None,
    loss: Cfg | None = None,
    mixed: bool | Cfg = True,
    no_decay: Cfg | None = None,
    head: Cfg | None = None,
    model: Cfg | None = None,
    **fields: Any,
) -> ConfigDict:
    """AdamW with warm-up and a cosine down to 1e-5, strong augmentation, Mixup or CutMix.

    Args:
        backbone: the network, its `drop_path_rate` among the arguments.
        width: channels of its features.
        lr, weight_decay: of AdamW, for this batch size.
        gpus, per_gpu: the batch is `gpus * per_gpu` images.
        size: edge of the images; augmentation is strong at 224 only (see `larger_images`).
        epochs, warmup: how long.
        clip: largest norm of the gradient.
        averaged: momentum of the averaged weights; None for none.
        optimizer: what else AdamW has, such as its `betas`.
        loss: labels smoothed by 0.1 by default.
        mixed: whether there are Mixup and CutMix; or what there is instead.
        no_decay: `paramwise_cfg`: that of Swin by default.
        head: what departs from a linear layer, such as its `init_cfg`.
        model: what else the classifier has, such as a neck.
        fields: others of the config.
    """
    head = dict(loss=loss or smoothing(mode="original")) | (head or {})
    settings: Cfg = dict(
        load_from=None,
        data=strong_augmentation() if size == 224 else larger_images(size),
        ema=None if averaged is None else dict(momentum=averaged),
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=lr, weight_decay=weight_decay) | (optimizer or {}),
            paramwise_cfg=no_decay or KINDS_NO_DECAY | dict(custom_keys=SWIN_NO_DECAY),
            clip_grad=None if clip is None else dict(max_norm=clip),
        ),
        param_scheduler=warmup_cosine(epochs, warmup, 1e-3, by_iter=False, eta_min=1e-5)
        if warmup
        else [dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=0, end=epochs)],
    )
    config = fine_tune(
        backbone,
        width,
        lr=lr,
        epochs=epochs,
        gpus=gpus,
        per_gpu=per_gpu,
        head=head,
        model=model,
        **settings | fields,
    )
    if mixed is False:
        del config.method.model.train_cfg
    elif mixed is not True:
        config.method.model.train_cfg.augments = mixed
    return config


def plain_crops(size: int = 224, edge: int = 256, tested: int | None = None, **filters: Any) -> Cfg:
    """`data` of crops and mirrors alone; evaluation on the middle of images.

    Args:
        size: of the crops, in pixels.
        edge: the short edge of images in evaluation.
        tested: size of their middle; `size` by default.
        filters: how all of them are resized, such as `backend` and `interpolation`.
    """
    return imagenet(
        [dict(type="RandomResizedCrop", scale=size, **filters)],
        [FLIP],
        resize=dict(type="ResizeEdge", scale=edge, edge="short", **filters),
        crop=tested or size,
    )


def step_schedule(*milestones: int, gamma: float = 0.1) -> list[Cfg]:
    """The rate times `gamma` after so many epochs each."""
    return [dict(type="MultiStepLR", by_epoch=True, milestones=milestones, gamma=gamma)]


def cosine_schedule(epochs: int, warmup: int = 0, **args: Any) -> list[Cfg]:
    """The rate down to zero on half a cosine, changed once an epoch; before it, in `warmup` epochs, up from a tenth."""
    rise: Cfg = dict(type="LinearLR", start_factor=0.1, by_epoch=True, begin=0, end=warmup)
    fall: Cfg = dict(type="CosineAnnealingLR", T_max=epochs - warmup, by_epoch=True, begin=warmup, end=epochs, **args)
    return [rise, fall] if warmup else [fall]


def rand_augment(level: int, **hparams: Any) -> Cfg:
    """RandAugment's transform, two operations at `level` of 10; what shifts and turns uncover is grey."""
    return dict(
        type="RandAugment",
        policies="timm_increasing",
        num_policies=2,
        total_level=10,
        magnitude_level=level,
        magnitude_std=0.5,
        hparams=dict(pad_val=[124, 116, 104], **hparams),
    )


def classic(
    backbone: Cfg,
    width: int | None,
    *,
    gpus: int = 8,
    per_gpu: int = 32,
    epochs: int = 100,
    optimizer: Cfg | None = None,
    schedule: list[Cfg] | None = None,
    loss: Cfg | None = None,
    augments: Any = None,
    no_decay: Cfg | None = None,
    head: Cfg | None = None,
    model: Cfg | None = None,
    **fields: Any,
) -> ConfigDict:
    """SGD with momentum, a rate that falls in steps or on a cosine, crops and mirrors.

    Args:
        backbone: the network.
        width: channels of its features; None if it ends in scores of classes itself.
        gpus, per_gpu: the batch is `gpus * per_gpu` images.
        epochs: how long.
        optimizer: what departs from SGD at a rate of 0.1, momentum 0.9 and weight decay 1e-4; with a `type`, all of it.
        schedule: `param_scheduler`; a tenth of the rate after 30, 60 and 90 epochs by default.
        loss: cross-entropy by default.
        augments: how images are mixed, such as `dict(type="Mixup", alpha=0.2)`.
        no_decay: `paramwise_cfg`.
        head: what departs from a linear layer.
        model: what departs from a classifier with averages over the map, such as its neck.
        fields: others of the config, such as `data`, which is `plain_crops()` by default.
    """
    loss = loss or CROSS_ENTROPY
    classifier: Cfg = dict(type="ImageClassifier", backbone=backbone)
    if width is None:
        classifier["head"] = dict(type="ClsHead", loss=loss) | (head or {})
    else:
        classifier["neck"] = dict(type="GlobalAveragePooling")
        linear = dict(type="LinearClsHead", num_classes=1000, in_channels=width, loss=loss)
        classifier["head"] = linear | (head or {})
    if augments:
        classifier["train_cfg"] = dict(augments=augments)
    optimizer = optimizer or {}
    if "type" not in optimizer:
        optimizer = dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4) | optimizer
    settings: Cfg = dict(
        method=dict(type="Supervised", model=classifier | (model or {})),
        data=plain_crops(),
        batch_size=gpus * per_gpu,
        max_epochs=epochs,
        optim_wrapper=dict(optimizer=optimizer, paramwise_cfg=no_decay),
        param_scheduler=schedule or step_schedule(30, 60, 90),
        auto_scale_lr=dict(base_batch_size=gpus * per_gpu),
        evaluators=ACCURACY,
        evaluation=dict(interval=1),
    )
    return recipe(**settings | fields)


def shufflenet(backbone: Cfg, width: int) -> ConfigDict:
    """Both ShuffleNets: 300 epochs at a batch of 1,024, whose rate falls on a straight line; no decay of norms."""
    schedule: list[Cfg] = [
        dict(type="ConstantLR", factor=0.1, by_epoch=False, begin=0, end=5000),
        dict(type="PolyLR", eta_min=0.0, by_epoch=False, begin=5000),
    ]
    return classic(
        backbone | dict(norm_cfg=dict(type="BN", groups=16)),
        width,
        gpus=16,
        per_gpu=64,
        epochs=300,
        optimizer=dict(lr=0.5, weight_decay=4e-5),
        schedule=schedule,
        no_decay=dict(norm_decay_mult=0.0),
        data=plain_crops(backend="pillow"),
    )
