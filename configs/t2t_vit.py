"""Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet (Yuan et al., 2021), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights that it trained so.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| t2t-vit-t-14_8xb64_in1k | `--config=configs/t2t_vit.py` | 8 GPUs | | 81.83 |
| t2t-vit-t-19_8xb64_in1k | `--config=configs/t2t_vit.py:NAME` | 8 GPUs | | 82.63 |
| t2t-vit-t-24_8xb64_in1k | | 8 GPUs | | 82.71 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import warmup_cosine
from jaxpretrain.supervised_recipes import VIT_INIT, from_scratch, resized, undecayed


def t2t(layers: int, width: int, heads: int, weight_decay: float = 0.065) -> ConfigDict:
    """300 epochs on a cosine and ten at a tenth of the rate, with averaged weights."""
    return from_scratch(
        dict(
            type="T2T_ViT",
            img_size=224,
            embed_dims=width,
            t2t_cfg=dict(token_dims=64, use_performer=False),
            num_layers=layers,
            layer_cfgs=dict(num_heads=heads, feedforward_channels=3 * width),
            drop_path_rate=0.1,
            init_cfg=VIT_INIT,
        ),
        width,
        lr=5e-4,
        gpus=8,
        per_gpu=64,
        epochs=310,
        weight_decay=weight_decay,
        averaged=4e-5,
        no_decay=undecayed("cls_token"),
        head=dict(type="VisionTransformerClsHead", init_cfg=VIT_INIT[0]),
        data=resized(248),
        param_scheduler=[
            *warmup_cosine(300, 10, 1e-6, by_iter=False, eta_min=1e-5),
            dict(type="ConstantLR", factor=0.1, by_epoch=True, begin=300, end=310),
        ],
        auto_scale_lr=dict(base_batch_size=512),
    )


RECIPES = {
    "t2t-vit-t-14_8xb64_in1k": partial(t2t, 14, 384, 6, 0.05),
    "t2t-vit-t-19_8xb64_in1k": partial(t2t, 19, 448, 7),
    "t2t-vit-t-24_8xb64_in1k": partial(t2t, 24, 512, 8),
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
