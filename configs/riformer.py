"""RIFormer: Keep Your Vision Backbone Effective But Removing Token Mixer (Wang et al., 2023), with labels.

These have not been run by us; published by MMPretrain: top-1 on ImageNet-1k, of weights from the paper's own training, with a
teacher; the recipes are without one, as MMPretrain's.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| riformer-s12_in1k | `--config=configs/riformer.py` | 8 GPUs | | 76.90 |
| riformer-s24_in1k | `--config=configs/riformer.py:NAME` | 8 GPUs | | 80.28 |
| riformer-s36_in1k | | 8 GPUs | | 81.29 |
| riformer-m36_in1k | | 8 GPUs | | 82.57 |
| riformer-m48_in1k | | 8 GPUs | | 82.75 |
| riformer-s12_in1k-384 | | 8 GPUs | | 78.29 |
| riformer-s24_in1k-384 | | 8 GPUs | | 81.36 |
| riformer-s36_in1k-384 | | 8 GPUs | | 82.22 |
| riformer-m36_in1k-384 | | 8 GPUs | | 83.39 |
| riformer-m48_in1k-384 | | 8 GPUs | | 83.70 |
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import CROSS_ENTROPY, POOLFORMER_INIT, from_scratch, resized


def riformer(arch: str, size: int = 224, deploy: bool = False) -> ConfigDict:
    """`deploy`: the network whose affine maps, which stand in for a token mixer, are fused into its norms.

    Images are not mixed, and labels not smoothed.
    """
    small = arch.startswith("s")
    edge = {224: 248 if small else 236, 384: 426 if small else 404}[size]
    fused = dict(deploy=True) if deploy else {}
    return from_scratch(
        dict(type="RIFormer", arch=arch, drop_path_rate=0.1, init_cfg=POOLFORMER_INIT, **fused),
        512 if small else 768,
        lr=4e-3,
        gpus=8,
        per_gpu=128,
        clip=5.0,
        loss=CROSS_ENTROPY,
        mixed=False,
        model=dict(neck=dict(type="GlobalAveragePooling")),
        data=resized(edge, size=size),
        auto_scale_lr=dict(base_batch_size=4096),
    )


ARCHS = ("s12", "s24", "s36", "m36", "m48")
RECIPES = {
    **{f"riformer-{arch}_in1k": partial(riformer, arch) for arch in ARCHS},
    **{f"riformer-{arch}_in1k-384": partial(riformer, arch, 384) for arch in ARCHS},
    **{
        f"riformer-{arch}-deploy_8xb{per_gpu}_in1k{'' if size == 224 else '-384px'}": partial(
            riformer, arch, size, True
        )
        for size, sizes_of_batches in ((224, (128, 128, 128, 128, 64)), (384, (128, 128, 64, 64, 64)))
        for arch, per_gpu in zip(ARCHS, sizes_of_batches, strict=True)
    },
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
