"""Reversible transformers: gradients are those of the plain form, and memory does not grow with depth."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, build
from tests.test_backbones import assert_close, images, loss_grads, parts
from tests.test_resnet import random


def config(depth: int = 3, **kwargs: Any) -> dict[str, Any]:
    arch = dict(embed_dims=16, num_layers=depth, num_heads=2, feedforward_channels=32)
    return dict(type="RevVisionTransformer", arch=arch, img_size=16, patch_size=4) | kwargs


def gradients(cfg: dict[str, Any], *, scan_layers: bool = False, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    model = random(cfg)
    model.train()
    model.scan_layers = scan_layers
    value, grads, _ = loss_grads(model, images(16).astype(dtype))
    return value, grads


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("chance", [{}, dict(drop_path_rate=0.5, drop_rate=0.2)], ids=["plain", "drop"])
def test_gradients_are_those_of_the_plain_form(scan_layers: bool, chance: dict[str, float]) -> None:
    value, grads = gradients(config(**chance, no_custom_backward=True))
    again, same = gradients(config(**chance), scan_layers=scan_layers)
    assert_close(again, value)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(same), jax.tree.leaves(grads), strict=True):
        scale = max(np.abs(theirs).max(), 1e-3)  # the keys' biases have no gradient but for rounding
        assert np.abs(ours - theirs).max() <= 2e-5 * scale, jax.tree_util.keystr(path)


def test_gradients_of_the_plain_form_in_float64() -> None:
    """To the last digits, so the inverse is exact but for rounding; and of frozen layers too."""
    with jax.enable_x64(True):
        cfg = config(drop_path_rate=0.3, frozen_stages=1)
        _, grads = gradients(cfg | dict(no_custom_backward=True), dtype=np.float64)
        _, same = gradients(cfg, dtype=np.float64)
    for ours, theirs in zip(jax.tree.leaves(same), jax.tree.leaves(grads), strict=True):
        assert np.abs(ours - theirs).max() <= 1e-6 * max(np.abs(theirs).max(), 1e-6)


def test_bfloat16_streams_are_kept_in_float32() -> None:
    """Otherwise what is recomputed drifts from layer to layer."""
    _, grads = gradients(config(5, no_custom_backward=True), dtype=jnp.bfloat16)
    _, same = gradients(config(5), dtype=jnp.bfloat16)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    for ours, theirs in zip(jax.tree.leaves(same), jax.tree.leaves(grads), strict=True):
        assert np.abs(ours - theirs).max() <= 0.02 * scale


def bytes_of_a_step(depth: int, *, scan_layers: bool, **kwargs: Any) -> int:
    """Temporary memory of the compiled gradient, without the parameters and their gradients that a loop stacks."""
    model = random(config(depth, drop_path_rate=0.1, img_size=32, **kwargs))
    model.train()
    model.scan_layers = scan_layers
    graphdef, params, rest = parts(model)

    @jax.jit
    def step(params: Any, rest: Any, x: Any) -> Any:
        def loss(params: Any) -> Any:
            return nnx.merge(graphdef, params, rest)(x, rngs=nnx.Rngs(dropout=1))[0].sum()

        return jax.grad(loss)(params)

    memory = step.lower(params, rest, np.zeros((16, 32, 32, 3), np.float32)).compile().memory_analysis()
    stacked = sum(leaf.nbytes for leaf in jax.tree.leaves(params["layers"])) if scan_layers else 0
    return memory.temp_size_in_bytes - 2 * stacked


@pytest.mark.slow
@pytest.mark.parametrize(("scan_layers", "growth"), [(True, 1.02), (False, 1.1)])
def test_memory_does_not_grow_with_depth(scan_layers: bool, growth: float) -> None:
    two, eight = (bytes_of_a_step(depth, scan_layers=scan_layers) for depth in (2, 8))
    plain_two, plain_eight = (
        bytes_of_a_step(depth, scan_layers=scan_layers, no_custom_backward=True) for depth in (2, 8)
    )
    assert plain_eight > 2.5 * plain_two, "without recomputation each layer's activations are kept"
    # A loop needs nothing for another layer. Unrolled, the compiler keeps some arrays longer than it must.
    assert eight < growth * two, f"{two} bytes for 2 layers, {eight} for 8"


@pytest.mark.parametrize("mode", ["concat", "add", "avg", "max", "min"])
def test_fusion(mode: str) -> None:
    both = random(config(out_type="raw"))
    both.eval()
    first, second = np.split(np.asarray(both(images(16, 1))[0]), 2, axis=-1)
    fused = {
        "concat": np.concatenate([first, second], -1),
        "add": first + second,
        "avg": (first + second) / 2,
        "max": np.maximum(first, second),
        "min": np.minimum(first, second),
    }
    model = random(config(out_type="raw", fusion_mode=mode))
    model.eval()
    assert_close(model(images(16, 1))[0], fused[mode])


def test_errors() -> None:
    for wrong, message in (
        (dict(fusion_mode="sum"), "fusion_mode: unknown mode 'sum'"),
        (dict(arch="eva-g"), "unknown arch"),
        (dict(layer_cfgs=dict(num_fcs=3)), "num_fcs=3"),
    ):
        with pytest.raises(ConfigError, match=message):
            nnx.eval_shape(lambda wrong=wrong: build(config() | wrong, rngs=nnx.Rngs(0)))
