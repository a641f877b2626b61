"""A method that compiles in a second, and runs of it: what the tests of the trainer train."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from jaxpretrain import sharding
from jaxpretrain.methods.base import Method, Progress
from jaxpretrain.models.layers import BatchNorm, Frozen, Linear
from jaxpretrain.recipes import DIGITS_MEAN_STD, digits, recipe


class TinyMethod(Method):
    """A classifier of one hidden layer, with something of everything: dropout, statistics, a teacher that follows."""

    def __init__(self, width: int = 16, batch_norm: bool = True, noise: float = 0.1, *, rngs: nnx.Rngs):
        self.hidden = Linear(8 * 8 * 3, width, rngs=rngs)
        self.norm = BatchNorm(width) if batch_norm else None
        self.head = Linear(width, 10, rngs=rngs)
        self.teacher = Frozen(jnp.zeros((width, 10)))
        self.noise = noise

    def _hidden(self, images: jax.Array) -> jax.Array:
        x = self.hidden(images.reshape(len(images), -1))
        return jax.nn.relu(self.norm(x) if self.norm else x)

    def loss(self, batch: Any, *, rngs: nnx.Rngs | None = None) -> Any:
        x = self._hidden(batch["image"])
        if self.noise:
            x = x + self.noise * jax.random.normal(rngs.noise(), x.shape, x.dtype)
        logits = self.head(x).astype(jnp.float32)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], axis=1)
        drift = jnp.mean(jnp.square(logits - x.astype(jnp.float32) @ self.teacher[...]))
        return -picked.mean() + 1e-3 * drift, {"drift": drift}

    def after_step(self, progress: Progress) -> None:
        self.teacher[...] += 0.1 * (self.head.kernel[...] - self.teacher[...])

    def features(self, images: jax.Array) -> jax.Array:
        return self._hidden(images)

    def logits(self, images: jax.Array) -> jax.Array:
        return self.head(self._hidden(images))


class Slowly:
    """A host transform that only takes its time: the run lasts long enough to be stopped in the middle."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        time.sleep(self.seconds)
        return sample


def tiny_config(**fields: Any) -> ConfigDict:
    """Ten steps of `TinyMethod` on 8x8 digits, with the transfer guard on and every step logged."""
    defaults = dict(
        method=dict(type="tests.tiny.TinyMethod"),
        data=digits([dict(type="RandomResizedCrop", scale=8, crop_ratio_range=(0.5, 1.0))], [], size=8),
        data_preprocessor=DIGITS_MEAN_STD,
        batch_size=32,
        max_steps=10,
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-2, weight_decay=0.01)),
        checkpoint=dict(interval=-1),
        log_interval=1,
        tensorboard=False,
        transfer_guard=True,
        mesh=dict(data=1),
    )
    for name, value in fields.items():
        both = isinstance(value, dict) and isinstance(defaults.get(name), dict)
        defaults[name] = {**defaults[name], **value} if both else value
    return recipe(**defaults)


def xla_flags(devices: int) -> str:
    """XLA_FLAGS for a process with so many devices, which compiles as quickly as the tests do."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])


def records(workdir: Path, phase: str = "train") -> list[dict[str, Any]]:
    """The records of one phase in metrics.jsonl."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["phase"] == phase]


def losses(workdir: Path) -> list[tuple[int, float]]:
    """(step, loss) of all training records."""
    return [(record["step"], record["loss"]) for record in records(workdir)]


def first_devices() -> Any:
    """Lets a mesh be smaller than the number of devices."""
    make = sharding.make_mesh
    smaller = lambda sizes: make(sizes, jax.devices()[: math.prod(sizes.get(axis, 1) for axis in sharding.AXES)])  # noqa: E731
    return mock.patch("jaxpretrain.trainer.make_mesh", smaller)
