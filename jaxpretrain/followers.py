"""What follows pre-training: linear probes of frozen encoders, and fine-tuning, as MMPretrain's zoo has them.

All of these recipes start from `--config.load_from.path=RUN`, the workdir of a pre-training run, or a file of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxpretrain.config import IMAGENET_MEAN, IMAGENET_STD
from jaxpretrain.recipes import (
    FLIP,
    KINDS_NO_DECAY,
    NO_DECAY,
    SWIN_NO_DECAY,
    VIT_NO_DECAY,
    Cfg,
    imagenet,
    recipe,
    warmup_cosine,
)

ACCURACY: Cfg = dict(accuracy=dict(type="Accuracy", topk=(1, 5)))


def encoder(*, drop: Sequence[str] = (), fresh: Sequence[str] = ()) -> Cfg:
    """`load_from` of a recipe that starts from a pre-trained encoder. Training stops at once while `path` is not set.

    Args:
        drop: names in the file that the classifier's encoder has not, as regular expressions.
        fresh: names in the encoder that start anew.
    """
    return dict(path=None, part="backbone", drop=list(drop), fresh=list(fresh))


# What only pre-training by masks has; the norm of the class token makes way for one of the mean.
MASKING = (r"^backbone\.mask_token$",)
ENCODER = encoder()
MASKED_ENCODER = encoder(drop=MASKING)
AVERAGED_ENCODER = encoder(drop=[*MASKING, r"^backbone\.ln1\."], fresh=[r"^backbone\.ln2\."])


def linear_probe(
    model: Cfg,
    optimizer: Cfg,
    epochs: int,
    param_scheduler: list[Cfg],
    *,
    gpus: int = 8,
    per_gpu: int,
    load_from: Cfg | None = ENCODER,
    **fields: Any,
) -> ConfigDict:
    """A linear classifier trained on a frozen encoder, on crops and flips alone.

    Args:
        model: of type ImageClassifier; its backbone is frozen as its `frozen_stages` say.
        optimizer: with its learning rate for this batch size.
        epochs, param_scheduler: how long, and the course of the rate.
        gpus, per_gpu: the batch is `gpus * per_gpu` images.
        load_from: the encoder's weights.
        fields: others of the config.
    """
    crop = dict(type="RandomResizedCrop", scale=224, backend="pillow")
    resize = dict(type="ResizeEdge", scale=256, edge="short", backend="pillow")
    settings: Cfg = dict(
        method=dict(type="Supervised", model=dict(type="ImageClassifier") | model),
        load_from=load_from,
        data=imagenet([crop], [FLIP], resize=resize),
        batch_size=gpus * per_gpu,
        max_epochs=epochs,
        optim_wrapper=dict(optimizer=optimizer),
        param_scheduler=param_scheduler,
        evaluators=ACCURACY,
        evaluation=dict(interval=1),
    )
    return recipe(**settings | fields)


def probe_resnet50(
    optimizer: Cfg, epochs: int, per_gpu: int, param_scheduler: list[Cfg] | None = None, **backbone: Any
) -> ConfigDict:
    """ResNet-50, frozen, and a linear layer on its pooled features; the rate falls on a cosine by default."""
    cosine = [dict(type="CosineAnnealingLR", T_max=epochs, by_epoch=True, begin=0, end=epochs)]
    model = dict(
        backbone=dict(
            type="ResNet", depth=50, num_stages=4, out_indices=(3,), style="pytorch", frozen_stages=4, **backbone
        ),
        neck=dict(type="GlobalAveragePooling"),
        head=dict(
            type="LinearClsHead",
            num_classes=1000,
            in_channels=2048,
            loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
        ),
    )
    return linear_probe(model, dict(momentum=0.9) | optimizer, epochs, param_scheduler or cosine, per_gpu=per_gpu)


VIT_SIZES = {"base": (768, 12), "large": (1024, 24), "huge": (1280, 32)}  # width, layers


def probe_vit(arch: str, lr: float, epochs: int, **fields: Any) -> ConfigDict:
    """MAE's probe: the class token of a frozen ViT, batch-normalised, and a linear layer; LARS at a batch of 16,384."""
    width, layers = VIT_SIZES[arch]
    model = dict(
        backbone=dict(
            type="VisionTransformer",
            arch=arch,
            img_size=224,
            patch_size=16,
            frozen_stages=layers,
            out_type="cls_token",
            final_norm=True,
        ),
        neck=dict(type="ClsBatchNormNeck", input_features=width, groups=8),
        head=dict(
            type="VisionTransformerClsHead",
            num_classes=1000,
            in_channels=width,
            loss=dict(type="CrossEntropyLoss"),
            init_cfg=[dict(type="TruncNormal", layer="Linear", std=0.01)],
        ),
    )
    settings: Cfg = dict(load_from=MASKED_ENCODER, auto_scale_lr=dict(base_batch_size=1024), dtype="bfloat16")
    optimizer = dict(type="LARS", lr=lr, weight_decay=0.0, momentum=0.9)
    schedule = warmup_cosine(epochs, 10, eta_min=0.0)
    return linear_probe(model, optimizer, epochs, schedule, per_gpu=2048, **settings | fields)


def strong_augmentation(
    size: int = 224,
    *,
    fill: Sequence[float] = IMAGENET_MEAN,
    fill_std: Sequence[float] = IMAGENET_STD,
    pad: Sequence[int] = (124, 116, 104),
    magnitude: int = 9,
) -> Cfg:
    """`data` of fine-tuning: RandAugment and erased rectangles; evaluation on the central 7/8 of the image.

    Args:
        size: edge of the images.
        fill, fill_std: of the noise in erased rectangles, R, G, B in grey levels.
        pad: colour of what RandAugment's shifts and turns uncover.
        magnitude: how strongly it changes images, of 10.
    """
    pillow = dict(backend="pillow", interpolation="bicubic")
    return imagenet(
        [
            dict(type="RandomResizedCrop", scale=size, **pillow),
            FLIP,
            dict(
                type="RandAugment",
                policies="timm_increasing",
                num_policies=2,
                total_level=10,
                magnitude_level=magnitude,
                magnitude_std=0.5,
                hparams=dict(pad_val=list(pad), interpolation="bicubic"),
            ),
            dict(
                type="RandomErasing",
                erase_prob=0.25,
                mode="rand",
                min_area_ratio=0.02,
                max_area_ratio=1 / 3,
                fill_color=list(fill),
                fill_std=list(fill_std),
            ),
        ],
        [],
        resize=dict(type="ResizeEdge", scale=size * 256 // 224, edge="short", **pillow),
        crop=size,
    )


def jittered(data: Cfg) -> Cfg:
    """`data` of `strong_augmentation` with changes of colour, which run on the device; and so does erasing, which follows."""
    jitter = dict(type="ColorJitter", brightness=0.4, contrast=0.4, saturation=0.4)
    *pipeline, erasing = data["train"]["pipeline"]
    return data | dict(train=data["train"] | dict(pipeline=pipeline, device_pipeline=[jitter, erasing]))


def fine_tune(
    backbone: Cfg,
    width: int,
    *,
    lr: float,
    epochs: int,
    gpus: int = 8,
    per_gpu: int = 128,
    warmup: int = 5,
    layer_decay: float | None = None,
    no_decay: Cfg | None = None,
    head: Cfg | None = None,
    model: Cfg | None = None,
    load_from: Cfg | None = ENCODER,
    **fields: Any,
) -> ConfigDict:
    """All of an encoder trained on with labels: AdamW with layer-wise rates, RandAugment, Mixup or CutMix, label smoothing.

    Args:
        backbone: the encoder, its `drop_path_rate` among the arguments.
        width: channels of its features.
        lr: for this batch size.
        epochs, warmup: how long; a warm-up of some epochs, then a cosine down to 1e-6.
        gpus, per_gpu: the batch is `gpus * per_gpu` images.
        layer_decay: `layer_decay_rate`.
        no_decay: `paramwise_cfg` but for that: ViT's by default.
        head: what departs from a linear layer, such as its `init_cfg`.
        model: what else the classifier has, such as a neck.
        load_from: the encoder's weights.
        fields: others of the config.
    """
    classifier = dict(
        type="ImageClassifier",
        backbone=backbone,
        head=dict(
            type="LinearClsHead",
            num_classes=1000,
            in_channels=width,
            loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
        )
        | (head or {}),
        train_cfg=dict(augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)]),
        **(model or {}),
    )
    paramwise = no_decay or KINDS_NO_DECAY | dict(custom_keys=SWIN_NO_DECAY | VIT_NO_DECAY)
    wrapper: Cfg = dict(optimizer=dict(type="AdamW", lr=lr, weight_decay=0.05), paramwise_cfg=paramwise)
    if layer_decay is not None:
        wrapper["constructor"] = "LearningRateDecayOptimWrapperConstructor"
        wrapper["paramwise_cfg"] = paramwise | dict(layer_decay_rate=layer_decay)
    wrapper["clip_grad"] = fields.pop("clip_grad", None)
    settings: Cfg = dict(
        method=dict(type="Supervised", model=classifier),
        load_from=load_from,
        data=strong_augmentation(),
        batch_size=gpus * per_gpu,
        max_epochs=epochs,
        optim_wrapper=wrapper,
        param_scheduler=warmup_cosine(epochs, warmup, eta_min=1e-6),
        auto_scale_lr=dict(base_batch_size=1024),
        evaluators=ACCURACY,
        evaluation=dict(interval=1),
    )
    return recipe(**settings | fields)


def fine_tune_vit(
    arch: str = "base",
    *,
    lr: float,
    epochs: int = 100,
    layer_decay: float = 0.65,
    drop_path: float = 0.1,
    head_std: float = 2e-5,
    patch_size: int = 16,
    size: int = 224,
    **settings: Any,
) -> ConfigDict:
    """MAE's fine-tuning: a ViT whose patches' mean, normalised, is classified.

    Args:
        arch, patch_size, size: the encoder and its images.
        lr, epochs, layer_decay: as of `fine_tune`.
        drop_path: stochastic depth.
        head_std: of the head's initial weights.
        settings: others of `fine_tune`.
    """
    backbone = dict(
        type="VisionTransformer",
        arch=arch,
        img_size=size,
        patch_size=patch_size,
        drop_path_rate=drop_path,
        out_type="avg_featmap",
        final_norm=False,
    )
    defaults: Cfg = dict(
        head=dict(init_cfg=[dict(type="TruncNormal", layer="Linear", std=head_std)]),
        load_from=AVERAGED_ENCODER,
        data=strong_augmentation(size),
    )
    return fine_tune(backbone, VIT_SIZES[arch][0], lr=lr, epochs=epochs, layer_decay=layer_decay, **defaults | settings)


# Grey levels as -1 to 1, and colours that fit: of BEiT and CAE.
CENTRED: Cfg = dict(mean=(127.5,) * 3, std=(127.5,) * 3)
BEIT_NO_DECAY: Cfg = dict(
    custom_keys=dict.fromkeys(
        ("/ln", "/bias", "q_bias", "v_bias", "/cls_token", "/pos_embed", "/gamma"),
        NO_DECAY,
    )
)


def fine_tune_beit(
    *, lr: float, drop_path: float = 0.1, backbone: Cfg | None = None, head_std: float = 0.02, **settings: Any
) -> ConfigDict:
    """BEiT's fine-tuning: the layers have biases for relative positions of their own, copied from the shared ones.

    Args:
        lr: as of `fine_tune`.
        drop_path: stochastic depth.
        backbone: what departs from BEiT's.
        head_std: of the head's initial weights.
        settings: others of `fine_tune`.
    """
    network = dict(
        type="BEiTViT",
        arch="base",
        img_size=224,
        patch_size=16,
        drop_path_rate=drop_path,
        out_type="avg_featmap",
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        use_shared_rel_pos_bias=False,
    )
    defaults: Cfg = dict(
        epochs=100,
        warmup=20,
        layer_decay=0.65,
        no_decay=BEIT_NO_DECAY,
        head=dict(init_cfg=[dict(type="TruncNormal", layer="Linear", std=head_std)]),
        load_from=dict(AVERAGED_ENCODER, drop=[*AVERAGED_ENCODER["drop"], r"^backbone\.rel_pos_bias\..*_index$"]),
    )
    return fine_tune(network | (backbone or {}), 768, lr=lr, **defaults | settings)


def beit_from_in21k(**settings: Any) -> ConfigDict:
    """A BEiT-B that was trained with labels of ImageNet-21k too; MMPretrain's recipe, which it gave weights of others."""
    init = [
        dict(type="TruncNormal", layer="Linear", std=0.02),
        dict(type="Constant", layer="LayerNorm", val=1.0, bias=0.0),
    ]
    return fine_tune_beit(
        lr=1e-3,
        drop_path=0.0,
        epochs=300,
        per_gpu=64,
        layer_decay=None,
        no_decay=KINDS_NO_DECAY | dict(custom_keys=SWIN_NO_DECAY),
        head={},
        model=dict(init_cfg=init),
        load_from=None,
        param_scheduler=warmup_cosine(300, 20, 1e-3, by_iter=False, eta_min=1e-5),
        **settings,
    )
