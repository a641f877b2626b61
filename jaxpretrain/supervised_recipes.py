"""Training classifiers with labels from the start, as most backbones of MMPretrain's zoo since Swin have it."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.followers import fine_tune, strong_augmentation
from jaxpretrain.recipes import FLIP, KINDS_NO_DECAY, SWIN_NO_DECAY, Cfg, imagenet, warmup_cosine

PILLOW: Cfg = dict(backend="pillow", interpolation="bicubic")
CROSS_ENTROPY: Cfg = dict(type="CrossEntropyLoss", loss_weight=1.0)


def smoothing(value: float = 0.1, **args: Any) -> Cfg:
    """The loss with smoothed labels; `mode='original'` shares the missing part out among all classes."""
    return dict(type="LabelSmoothLoss", label_smooth_val=value, **args)


def larger_images(size: int) -> Cfg:
    """`data` of training on at `size` pixels: crops and mirrors alone; evaluation on whole images, squeezed to a square."""
    data = imagenet([dict(type="RandomResizedCrop", scale=size, **PILLOW)], [FLIP])
    data["val"]["pipeline"] = [dict(type="Resize", scale=size, **PILLOW)]
    return data


def resized(size: int, **colours: Any) -> Cfg:
    """`data` with strong augmentation at 224 pixels; evaluation on the middle of images whose short edge is `size`."""
    data = strong_augmentation(**colours)
    data["val"]["pipeline"][0]["scale"] = size
    return data


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
    loss: Cfg | None = None,
    mixed: bool = True,
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
        loss: labels smoothed by 0.1 by default.
        mixed: whether there are Mixup and CutMix.
        no_decay: `paramwise_cfg`: that of Swin by default.
        head: what departs from a linear layer, such as its `init_cfg`.
        model: what else the classifier has, such as a neck.
        fields: others of the config.
    """
    head = dict(loss=loss or smoothing(mode="original")) | (head or {})
    optimizer = dict(type="AdamW", lr=lr, weight_decay=weight_decay)
    settings: Cfg = dict(
        data=strong_augmentation() if size == 224 else larger_images(size),
        ema=None if averaged is None else dict(momentum=averaged),
        optim_wrapper=dict(
            optimizer=optimizer,
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
        load_from=None,
        **settings | fields,
    )
    if not mixed:
        del config.method.model.train_cfg
    return config
