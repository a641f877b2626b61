"""VICReg: the loss against NumPy, term by term, and what each term does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpretrain.build import ConfigError
from jaxpretrain.methods.vicreg import VICRegLoss
from tests.method_cases import CASES


def terms(z1: np.ndarray, z2: np.ndarray) -> list[float]:
    """Equations 1 to 6 in loops, with the release's half of the variance term and its weights."""
    channels = z1.shape[1]
    invariance = np.mean([(a - b) ** 2 for a, b in zip(z1.ravel(), z2.ravel(), strict=True)])
    variance = covariance = 0.0
    for z in (z1, z2):
        c = np.cov(z, rowvar=False)
        variance += np.mean([max(0, 1 - np.sqrt(c[j, j] + 1e-4)) for j in range(channels)]) / 2
        covariance += sum(c[i, j] ** 2 for i in range(channels) for j in range(channels) if i != j) / channels
    return [25 * invariance, 25 * variance, covariance]


@pytest.fixture
def views() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    z = rng.standard_normal((6, 5)) * [0.3, 0.8, 1.0, 2.0, 0.1]
    return z, z + 0.2 * rng.standard_normal(z.shape)


def test_terms_by_hand(views):
    found = VICRegLoss()(*map(jnp.asarray, views))
    assert list(found) == ["loss_invariance", "loss_variance", "loss_covariance"]
    np.testing.assert_allclose(list(found.values()), terms(*views), rtol=1e-5)
    other = VICRegLoss(1.0, 2.0, 3.0)(*map(jnp.asarray, views))
    np.testing.assert_allclose(list(other.values()), np.array(terms(*views)) / 25 * [1, 2, 75], rtol=1e-5)


def test_gradient_by_finite_differences(views):
    with jax.enable_x64(True):
        z1, z2 = map(jnp.asarray, views)

        def loss(z1: jax.Array) -> jax.Array:
            return sum(VICRegLoss()(z1, z2).values())

        grad = jax.grad(loss)(z1)
        for index in ((0, 0), (3, 2), (5, 4)):
            step = jnp.zeros_like(z1).at[index].set(1e-6)
            assert grad[index] == pytest.approx(float(loss(z1 + step) - loss(z1 - step)) / 2e-6, rel=1e-5)


def test_each_term_sees_its_own_fault():
    rng = np.random.default_rng(0)
    good = jnp.asarray(np.linalg.qr(rng.standard_normal((64, 8)) - 0.0)[0] * 9.0)
    good = good - good.mean(axis=0)
    collapsed, copies = jnp.ones((64, 8)), jnp.repeat(good[:, :1], 8, axis=1)
    fine = [float(v) for v in VICRegLoss()(good, good).values()]
    assert fine[0] == 0 and fine[1] < 0.1 and fine[2] < 0.1
    assert [round(float(v), 2) for v in VICRegLoss()(collapsed, collapsed).values()] == [0, 24.75, 0]
    assert VICRegLoss()(copies, copies)["loss_covariance"] > 10
    assert VICRegLoss()(good, -good)["loss_invariance"] > 50


def test_method_adds_the_terms_up():
    case = CASES["vicreg"]
    method, batch = case.make(), case.batch()
    value, metrics = jax.jit(lambda m, b: m.loss(b))(method, batch)
    z1, z2 = (np.float64(method.neck(method.backbone(view))[-1]) for view in batch["image"])
    assert value == pytest.approx(sum(terms(z1, z2)), rel=1e-4)  # BatchNorm on 8 images makes rounding visible
    parts = [metrics[f"loss_{name}"] for name in ("invariance", "variance", "covariance")]
    assert value == pytest.approx(float(sum(parts)), rel=1e-6)
    with pytest.raises(ConfigError, match="learns from 2 views"):
        method.loss(dict(image=batch["image"][0]))


def test_bfloat16_embeddings_give_float32_terms(views):
    found = VICRegLoss()(*(jnp.asarray(z, jnp.bfloat16) for z in views))
    assert all(v.dtype == jnp.float32 for v in found.values())
