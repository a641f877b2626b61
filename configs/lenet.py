"""LeNet-5: Gradient-Based Learning Applied to Document Recognition (LeCun et al., 1998), trained with labels.

It has not been run by us, and MMPretrain publishes no result. Images are MNIST's, grey, of one channel.

| recipe | command | hardware | wall time | metric |
|---|---|---|---|---|
| lenet5_mnist | `--config=configs/lenet.py` | 1 GPU | | |
"""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxpretrain.config import pick
from jaxpretrain.supervised_recipes import classic, step_schedule


def mnist() -> ConfigDict:
    """Five epochs, so that the step of the schedule never comes."""
    data = {
        split: dict(
            dataset=dict(type="MNIST", data_root="data/mnist", split=name), pipeline=[dict(type="Resize", scale=32)]
        )
        for split, name in (("train", "train"), ("val", "test"))
    }
    return classic(
        dict(type="LeNet5", num_classes=10),
        None,
        gpus=1,
        per_gpu=128,
        epochs=5,
        optimizer=dict(lr=0.01),
        schedule=step_schedule(15),
        data=data,
        data_preprocessor=dict(mean=(33.46,), std=(78.87,), channel_order="grey"),
        evaluators=dict(accuracy=dict(type="Accuracy", topk=(1,))),
    )


RECIPES = {"lenet5_mnist": mnist}


def get_config(name: str | None = None) -> ConfigDict:
    return pick(RECIPES, name)
