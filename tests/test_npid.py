"""NPID: the loss against NumPy, which negatives are drawn, and the memory; MoCo v1 by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError
from jaxpretrain.methods.npid import SimpleMemory
from tests.method_cases import CASES
from tests.method_cases.base import make
from tests.method_cases.siamese import FEATURES, npid


def unit(x: Any) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def info_nce(pos: np.ndarray, neg: np.ndarray, temperature: float) -> float:
    """-log of the positive's share: pos [B], neg [B, N]."""
    e_pos, e_neg = np.exp(pos / temperature), np.exp(neg / temperature)
    return float(np.mean(-np.log(e_pos / (e_pos + e_neg.sum(axis=1)))))


def test_npid_by_hand() -> None:
    """Equation 2 of the paper over the drawn negatives, and the memory's update (section 3.1, proximal or not: momentum)."""
    method, batch = make(npid()), CASES["npid"].batch()
    batch["index"] = jnp.asarray([3, 1, 4, 15, 9, 2, 6, 5], jnp.int32)
    bank = np.asarray(method.memory_bank.feature_bank[...], np.float64)
    np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1, rtol=1e-5)

    @nnx.jit
    def run(method: Any, batch: Any) -> Any:
        v = method.neck(method.backbone(batch["image"]))[-1]
        negatives = method.draw_negatives(batch["index"], nnx.Rngs(7).negatives())
        return v, negatives, method.loss(batch, rngs=nnx.Rngs(7))[0]

    v, negatives, loss = run(method, batch)
    v = unit(v)
    assert negatives.shape == (8, 32)
    index = np.asarray(batch["index"])
    wanted = info_nce(np.sum(v * bank[index], axis=1), np.einsum("bd,bnd->bn", v, bank[negatives]), 0.07)
    assert loss == pytest.approx(wanted, rel=1e-4)
    after = bank.copy()
    after[index] = unit(0.5 * bank[index] + 0.5 * v)
    np.testing.assert_allclose(method.memory_bank.feature_bank[...], after, atol=1e-5)


@pytest.mark.parametrize("ensure", [False, True])
def test_negatives_are_even(ensure: bool) -> None:
    method = make(npid(ensure_neg=ensure) | dict(neg_num=20_000))
    index = jnp.asarray([0, 17, FEATURES - 1])
    drawn = np.asarray(method.draw_negatives(index, jax.random.key(0)))
    for row, own in zip(drawn, np.asarray(index), strict=True):
        counts = np.bincount(row, minlength=FEATURES)
        assert len(counts) == FEATURES
        others = np.delete(counts, own) if ensure else counts
        if ensure:
            assert counts[own] == 0
        expected = len(row) / len(others)
        assert np.abs(others - expected).max() < 5 * expected**0.5
    assert (drawn[0] != drawn[1]).any()


def test_memory() -> None:
    memory = SimpleMemory(4, 2, momentum=0.25, rngs=nnx.Rngs(0))
    memory.feature_bank.set_value(jnp.asarray([[1.0, 0.0]] * 4))
    memory.update(jnp.asarray([2, 9]), jnp.asarray([[0.0, 5.0], [0.0, 1.0]]))
    wanted = np.array([[1.0, 0.0]] * 4)
    wanted[2] = unit([0.75, 0.25])
    np.testing.assert_allclose(memory.feature_bank[...], wanted, rtol=1e-6)
    assert jnp.isnan(memory.read(jnp.asarray([4]))).all(), "more images than rows: training shall stop"
    with pytest.raises(ConfigError, match="length=1 must be the number of training images"):
        SimpleMemory(1, 2, 0.5, rngs=nnx.Rngs(0))


def test_needs_random_numbers() -> None:
    method = make(npid())
    with pytest.raises(ValueError, match="call it with rngs"):
        method.loss(CASES["npid"].batch())


def test_mocov1_by_hand() -> None:
    """Equation 1 of He et al.: the key of the same image against the queue, and the queue afterwards."""
    method, batch = make(CASES["mocov1"].config), CASES["mocov1"].batch()
    queue = np.asarray(method.queue[...], np.float64)

    @nnx.jit
    def run(method: Any, batch: Any) -> Any:
        query, key = batch["image"]
        q = method.neck(method.backbone(query))[-1]
        k = method.encoder_k.module[1](method.encoder_k.module[0](key))[-1]
        return q, k, method.loss(batch)[0]

    q, k, loss = run(method, batch)
    q, k = unit(q), unit(k)
    assert q.shape == (8, 8)
    assert loss == pytest.approx(info_nce(np.sum(q * k, axis=1), q @ queue, 0.07), rel=1e-4)
    np.testing.assert_allclose(method.queue[:, :8], k.T, atol=1e-5)
    np.testing.assert_array_equal(method.queue[:, 8:], queue[:, 8:].astype(np.float32))
    assert method.queue_ptr[0] == 8
