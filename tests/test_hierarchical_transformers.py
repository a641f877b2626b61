"""What is particular to T2T-ViT, TNT, Twins, MViT, Conformer and DaViT."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, build
from jaxpretrain.interop import mmpretrain
from jaxpretrain.models.layers.rel_pos_decomposed import relative_vectors
from tests.backbone_cases.hierarchical_transformers import CASES
from tests.parity import (
    assert_logits,
    assert_summary,
    build_by_reference,
    load_golden,
    one_pass,
    reference_input,
)
from tests.test_backbones import assert_close, images, made, parts, tensors


@pytest.mark.slow
def test_t2t_vit_equals_the_reference_in_float64() -> None:
    """PyTorch's own float32 numbers are further than 1e-5 from these."""
    golden = load_golden("t2t-vit-t-14_8xb64_in1k")
    with jax.enable_x64(True):
        model: Any = build_by_reference(golden["model_cfg"], golden["manifest"])
        keys = len(mmpretrain.names(model)) + len(mmpretrain.derived(model))
        assert keys == golden["n_keys"] and mmpretrain.num_parameters(model) == golden["n_params"]
        model.eval()
        model.set_attributes(scan_layers=True, raise_if_not_found=False)
        graphdef, params, rest = parts(model)

        @jax.jit
        def run(params: Any, rest: Any, x: Any) -> Any:
            model = one_pass(nnx.merge(graphdef, params, rest))
            return model.extract_feat(x, "backbone"), model(x)

        feats, logits = run(params, rest, reference_input(tuple(golden["input_shape"])).astype(np.float64))
        assert logits.dtype == jnp.float64
        summaries = jax.tree.leaves(golden["features"], is_leaf=lambda node: isinstance(node, dict))
        for array, summary in zip(tensors(feats), summaries, strict=True):
            assert_summary(array, summary, 1e-6)
        assert_logits(logits, golden["logits"], 1e-6)


def test_padding_of_windows_is_not_seen() -> None:
    """The last rows of a map of 10x8 in windows of 4, by the formula of attention among the real tokens alone."""
    attn = made(CASES["SVT"].config, training=False).stages[0][0].attn
    attn.window_size = 4
    x = np.asarray(np.random.default_rng(0).standard_normal((1, 10, 8, 8)), np.float32)
    tokens = x[0, 8:, :4].reshape(8, 8)
    q, k, v = np.split(np.asarray(attn.qkv(tokens), np.float64).reshape(8, 3, 2, 4), 3, axis=1)
    logits = np.einsum("ihc,jhc->hij", q[:, 0], k[:, 0]) / 2
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    mean = np.einsum("hij,jhc->ihc", weights, v[:, 0]).reshape(8, 8)
    assert_close(attn(jnp.asarray(x))[0, 8:, :4].reshape(8, 8), attn.proj(jnp.asarray(mean, jnp.float32)))


def test_mvit_scales_and_positions() -> None:
    """Earlier scales are extras, which change nothing; offsets of a coarser grid are those of its places on the finer."""
    config = CASES["MViT"].config
    x = images(32, 1)
    last, both = (made(config | dict(out_scales=scales), training=False) for scales in (-1, [0, 1]))
    for name in ("norm1", "blocks", "patch_embed"):
        setattr(both, name, getattr(last, name))
    assert [out.shape for out in both(x)] == [(1, 8, 8, 8), (1, 4, 4, 16)]
    assert_close(both(x)[1], last(x)[0])
    table = jnp.arange(7.0)[:, None]  # offsets -3 to 3
    places = relative_vectors(table, 4, 2)[..., 0]
    np.testing.assert_array_equal(places, np.arange(4)[:, None] - np.array([0, 2]) + 2)


def test_conformer_head() -> None:
    cfg = dict(type="ConformerHead", num_classes=3, in_channels=[4, 5], cal_acc=True)
    head: Any = build(cfg, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    feats = ((jnp.asarray(rng.standard_normal((6, 4))), jnp.asarray(rng.standard_normal((6, 5)))),)
    label = jnp.asarray([0, 1, 2, 0, 1, 2])
    first, second = head(feats)
    value, logs = head.loss(feats, label)
    losses = [-jax.nn.log_softmax(logits)[jnp.arange(6), label].mean() for logits in (first, second)]
    assert_close(value, sum(losses))
    assert_close(head.predict(feats), jax.nn.softmax(first + second))
    assert_close(logs["accuracy_top-1"], 100 * ((first + second).argmax(1) == label).mean())


def test_errors() -> None:
    twins = CASES["PCPVT"].config
    for config, message in (
        (dict(type="T2T_ViT", t2t_cfg=dict(use_performer=True)), "use_performer"),
        (dict(type="T2T_ViT", out_type="cls"), "unknown out_type 'cls'"),
        (dict(type="TNT", arch="m"), "unknown arch 'm'"),
        (twins | dict(norm_after_stage=[True]), "1 norm_after_stage for 2 stages"),
        (dict(type="MViT", arch="tiny", out_scales=4), "out_indices has 4"),
        (dict(type="Conformer", patch_size=8), "multiple of 16"),
        (dict(type="Conformer", out_indices=13), "blocks \\[13\\]"),
        (dict(type="DaViT", frozen_stages=4), "frozen_stages=4"),
    ):
        with pytest.raises(ConfigError, match=message):
            nnx.eval_shape(lambda config=config: build(config, rngs=nnx.Rngs(0)))
    tnt = made(CASES["TNT"].config, training=False)
    with pytest.raises(ConfigError, match="images of 48x48, but its positions are for 32x32"):
        tnt(images(48, 1))
