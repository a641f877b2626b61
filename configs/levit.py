"""LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference (Graham et al., 2021), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training, with a
teacher. These recipes have none, and so not the head that learns from it; MMPretrain's have the head and cannot train. Those of
the fused form (`deploy`), in which trained weights are evaluated, keep it.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| levit-128s_3rdparty_in1k | `--config=configs/levit.py` | 8 GPUs | | 76.51 |
| levit-128_3rdparty_in1k | `--config=configs/levit.py:NAME` | 8 GPUs | | 78.58 |
| levit-192_3rdparty_in1k | | 8 GPUs | | 79.86 |
| levit-256_3rdparty_in1k | | 8 GPUs | | 81.59 |
| levit-384_3rdparty_in1k | | 8 GPUs | | 82.59 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.recipes import warmup_cosine
from jaxpretrain.supervised_recipes import from_scratch, smoothing, undecayed

WIDTHS = {"128s": 384, "128": 384, "192": 384, "256": 512, "384": 768}


def levit(arch: str, deploy: bool = False) -> ConfigDict:
    """`deploy`: the network whose norms are fused into its layers.

    BatchNorm is over the whole batch here; MMPretrain's is over each GPU's 256 images.
    """
    fused = dict(deploy=True) if deploy else {}
    return from_scratch(
        dict(type="LeViT", arch=arch, drop_path_rate=0.1 if arch == "384" else 0, out_indices=(2,), **fused),
        WIDTHS[arch],
        lr=2e-3,
        gpus=8,
        per_gpu=256,
        epochs=1000,
        weight_decay=0.025,
        loss=smoothing(loss_weight=1.0),
        no_decay=undecayed("/attention_biases"),
        head=dict(type="LeViTClsHead", distillation=deploy, **fused),
        model=dict(neck=dict(type="GlobalAveragePooling")),
        param_scheduler=warmup_cosine(1000, 5, 5e-4, by_iter=False, eta_min=1e-5),
        auto_scale_lr=dict(base_batch_size=2048),
    )


RECIPES = {
    f"levit-{arch}{name}_in1k": partial(levit, arch, deploy)
    for name, deploy in (("_3rdparty", False), ("-deploy_8xb256", True))
    for arch in WIDTHS
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
