"""RepMLPNet: the reference's numbers in float64, and its matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, build
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.models.layers.conv import Conv2d
from jaxpretrain.models.repmlp import conv_matrices
from tests.backbone_cases import CASES
from tests.parity import (
    assert_logits,
    assert_summary,
    build_by_reference,
    load_golden,
    one_pass,
    reference_input,
)


@pytest.mark.slow
def test_golden():
    """In float64: with these weights maps grow to 1e6, and PyTorch's own float32 numbers are 2.6e-5 off."""
    golden = load_golden("repmlp-base_3rdparty_8xb64_in1k")
    model = build_by_reference(golden["model_cfg"], golden["manifest"])
    assert len(hub.names(model)) == golden["n_keys"] and hub.num_parameters(model) == golden["n_params"]
    model.eval()
    with jax.enable_x64(True):
        graphdef, state = nnx.split(model)
        state = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64 if x.dtype == jnp.float32 else x.dtype), state)

        @jax.jit
        def run(state, x):
            model = one_pass(nnx.merge(graphdef, state))
            return model.extract_feat(x, "backbone"), model(x)

        feats, logits = run(state, jnp.asarray(reference_input(golden["input_shape"]), jnp.float64))
        assert_summary(feats[-1], golden["features"][0])
        assert_logits(logits, golden["logits"])


def test_a_convolution_as_matrices():
    conv = Conv2d(4, 4, 5, padding=2, groups=4, bias=False, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((2, 3, 6, 4)).astype(np.float32)
    matrices = conv_matrices(conv.kernel[...], (3, 6))
    y = jnp.einsum("bis,iso->bos", x.reshape(2, 18, 4), matrices).reshape(x.shape)
    np.testing.assert_allclose(y, conv(x), atol=1e-5)


def test_mistakes():
    config = CASES["RepMLPNet"].config
    model = build(config)
    with pytest.raises(ConfigError, match=r"images are \(40, 40\), but img_size is \(32, 32\)"):
        model(np.zeros((1, 40, 40, 3), np.float32))
    with pytest.raises(ConfigError, match="8 channels cannot be dealt out to 3 sets"):
        build(config | dict(out_indices=0, arch=dict(channels=[8], depths=[1], sharesets_nums=[3])))
    with pytest.raises(ConfigError, match="a number for each stage"):
        build(config | dict(out_indices=0, arch=dict(channels=[8], depths=[1, 1], sharesets_nums=[1])))
