"""RegNetX: Designing Network Design Spaces (Radosavovic et al., 2020), trained with labels.

None of these has been run by us; published by MMPretrain: top-1 on ImageNet-1k, of its own training.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| regnetx-400mf_8xb128_in1k | `--config=configs/regnet.py` | 8 GPUs | | 72.56 |
| regnetx-800mf_8xb128_in1k | `--config=configs/regnet.py:NAME` | 8 GPUs | | 74.76 |
| regnetx-1.6gf_8xb128_in1k |  | 8 GPUs | | 76.84 |
| regnetx-3.2gf_8xb64_in1k |  | 8 GPUs | | 78.09 |
| regnetx-4.0gf_8xb64_in1k |  | 8 GPUs | | 78.60 |
| regnetx-6.4gf_8xb64_in1k |  | 8 GPUs | | 79.38 |
| regnetx-8.0gf_8xb64_in1k |  | 8 GPUs | | 79.12 |
| regnetx-12gf_8xb64_in1k |  | 8 GPUs | | 79.67 |

The networks see blue first, as those of the paper. BatchNorm is in 8 groups, one for each GPU of the name; after each epoch its
statistics are taken anew, over 8,192 images.
"""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import classic, cosine_schedule, plain_crops

# Noise along the principal components of ImageNet's colours; rows are of B, G, R.
LIGHTING = dict(
    type="Lighting",
    eigval=[0.2175, 0.0188, 0.0045],
    eigvec=[[-0.5836, -0.6948, 0.4203], [-0.5808, -0.0045, -0.814], [-0.5675, 0.7192, 0.4009]],
    alphastd=25.5,
    to_rgb=False,
)


def regnetx(size: str, width: int, per_gpu: int) -> ConfigDict:
    data = plain_crops()
    data["train"]["pipeline"].append(LIGHTING)
    return classic(
        dict(type="RegNet", arch=f"regnetx_{size}", norm_cfg=dict(type="BN", groups=8)),
        width,
        per_gpu=per_gpu,
        optimizer=dict(lr=0.8 * per_gpu / 128, weight_decay=5e-5, nesterov=True),
        schedule=cosine_schedule(100, warmup=5),
        data=data,
        data_preprocessor=dict(channel_order="bgr"),
        precise_bn=dict(num_samples=8192, interval=1),
    )


RECIPES = {
    f"regnetx-{size}_8xb{per_gpu}_in1k": partial(regnetx, size, width, per_gpu)
    for size, width, per_gpu in (
        ("400mf", 384, 128),
        ("800mf", 672, 128),
        ("1.6gf", 912, 128),
        ("3.2gf", 1008, 64),
        ("4.0gf", 1360, 64),
        ("6.4gf", 1624, 64),
        ("8.0gf", 1920, 64),
        ("12gf", 2240, 64),
    )
}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
