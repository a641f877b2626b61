"""SwAV: codes, loss, prototypes and queue, against NumPy; several sets of prototypes; state in the reference's layout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.interop import export, load_weights
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.interop.rules import InteropError
from jaxpretrain.methods.base import Progress
from jaxpretrain.methods.swav import SwAVLoss, SwAVNeck, sinkhorn
from jaxpretrain.optim import build_optimizer
from jaxpretrain.train_state import make_train_step, split
from tests.method_cases import CASES
from tests.method_cases.base import make
from tests.method_cases.siamese import swav

D, K, B = 6, 5, 4


def unit(x: np.ndarray, axis: int = -1) -> np.ndarray:
    return x / np.linalg.norm(x, axis=axis, keepdims=True)


def numpy_sinkhorn(scores: np.ndarray, iterations: int = 3, epsilon: float = 0.05) -> np.ndarray:
    """Listing 1 of the paper's appendix: Q is [K, B], and sums to 1."""
    q = np.exp(scores.astype(np.float64) / epsilon).T
    q /= q.sum()
    k, b = q.shape
    for _ in range(iterations):
        q *= (1 / k) / q.sum(axis=1, keepdims=True)
        q *= (1 / b) / q.sum(axis=0, keepdims=True)
    return (q / q.sum(axis=0, keepdims=True)).T


def numpy_loss(
    z: np.ndarray, prototypes: np.ndarray, assign: tuple[int, ...], queue: np.ndarray | None = None
) -> float:
    """Equations 1 and 2: z [V, B, D], prototypes [D, K] of unit columns."""
    scores = z @ prototypes
    losses = []
    for i, crop in enumerate(assign):
        rows = scores[crop] if queue is None else np.concatenate([queue[i] @ prototypes, scores[crop]])
        q = numpy_sinkhorn(rows)[-z.shape[1] :]
        for view in range(len(z)):
            if view != crop:
                p = np.exp(scores[view] / 0.1)
                p /= p.sum(axis=1, keepdims=True)
                losses.append(-np.mean(np.sum(q * np.log(p), axis=1)))
    return float(np.mean(losses))


def data(views: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return unit(rng.standard_normal((views, B, D))), unit(rng.standard_normal((D, K)), axis=0)


def loss_module(prototypes: np.ndarray, **more: Any) -> SwAVLoss:
    loss = SwAVLoss(D, num_crops=(2, 2), num_prototypes=K, rngs=nnx.Rngs(0), **more)
    loss.prototypes.kernel.set_value(jnp.asarray(prototypes, jnp.float32))
    return loss


def test_sinkhorn() -> None:
    scores = np.random.default_rng(0).uniform(-1, 1, (B, K))
    np.testing.assert_allclose(sinkhorn(jnp.asarray(scores)), numpy_sinkhorn(scores), rtol=2e-4, atol=1e-7)
    codes = sinkhorn(jnp.asarray(scores), iterations=100, epsilon=0.5)
    np.testing.assert_allclose(codes.sum(axis=1), np.ones(B), rtol=1e-5)
    np.testing.assert_allclose(codes.sum(axis=0), np.full(K, B / K), rtol=1e-4)
    # What would overflow, and leave a column without anyone, does neither.
    assert jnp.isfinite(sinkhorn(jnp.asarray([[1e3, 0.0], [1e3, -1e3]]))).all()


def test_loss_by_hand() -> None:
    z, prototypes = data()
    loss, metrics = loss_module(prototypes)(jnp.asarray(z.reshape(-1, D), jnp.float32))
    assert loss == pytest.approx(numpy_loss(z, prototypes, (0, 1)), rel=1e-5)
    codes = np.stack([numpy_sinkhorn(z[v] @ prototypes) for v in (0, 1)]).reshape(-1, K).mean(axis=0)
    assert metrics["assignment_entropy"] == pytest.approx(-np.sum(codes * np.log(codes)) / np.log(K), rel=1e-4)
    loss, _ = loss_module(prototypes, crops_for_assign=(2,))(jnp.asarray(z.reshape(-1, D), jnp.float32))
    assert loss == pytest.approx(numpy_loss(z, prototypes, (2,)), rel=1e-5)


def test_gradients_pass_predictions_alone() -> None:
    """Finite differences of the loss with the codes held, in float64: by embeddings, and by unit prototypes."""
    with jax.enable_x64(True):
        z, prototypes = data()
        x = jnp.asarray(z.reshape(-1, D))
        loss = loss_module(prototypes)
        kernel = jnp.asarray(3 * prototypes)  # not of unit length: counts as if it were
        graphdef, _ = nnx.split(loss)
        value = lambda kernel, x: nnx.merge(graphdef, {"prototypes": {"kernel": kernel}})(x)[0]  # noqa: E731
        grads = jax.grad(value, argnums=(0, 1))(kernel, x)
        codes = [numpy_sinkhorn(z[v] @ prototypes) for v in (0, 1)]

        def held(prototypes: np.ndarray, z: np.ndarray) -> float:
            scores = z.reshape(4, B, D) @ prototypes / 0.1
            log_p = scores - np.log(np.exp(scores).sum(axis=2, keepdims=True))
            pairs = [(q, view) for q in (0, 1) for view in range(4) if view != q]
            return -np.mean([np.mean(np.sum(codes[q] * log_p[view], axis=1)) for q, view in pairs])

        for grad, base, at in (
            (grads[0], prototypes, lambda moved: held(moved, z)),
            (grads[1], z.reshape(-1, D), lambda moved: held(prototypes, moved)),
        ):
            for index in ((0, 0), (2, 3), (D - 1, K - 1)):
                step = np.zeros_like(base)
                step[index] = 1e-5
                wanted = (at(base + step) - at(base - step)) / 2e-5
                assert grad[index] == pytest.approx(wanted, rel=1e-4, abs=1e-8)


def test_queue_counts_once_full() -> None:
    z, prototypes = data()
    queue = unit(np.random.default_rng(1).standard_normal((2, 2 * B, D)))
    loss, x = loss_module(prototypes), jnp.asarray(z.reshape(-1, D), jnp.float32)
    full, _ = loss(x, jnp.asarray(queue, jnp.float32))
    assert full == pytest.approx(numpy_loss(z, prototypes, (0, 1), queue), rel=1e-5)
    queue[:, B:] = 0
    half, _ = loss(x, jnp.asarray(queue, jnp.float32))
    assert half == pytest.approx(numpy_loss(z, prototypes, (0, 1)), rel=1e-5)
    assert abs(full - half) > 1e-3


def test_queue_fills_from_its_epoch() -> None:
    config = swav(queue_length=20, epoch_queue_starts=3)  # two batches of 8 fit
    method = make(config)
    loss = nnx.jit(lambda method, batch: method.loss(batch)[0])
    batch = CASES["swav"].batch()
    loss(method, batch | dict(epoch=jnp.full((8,), 2)))
    assert not method.queue[...].any()
    for filled in (8, 16, 16):
        before = method.queue[...]
        loss(method, batch | dict(epoch=jnp.full((8,), 3)))
        rows = np.asarray(jnp.linalg.norm(method.queue[...], axis=2))
        np.testing.assert_allclose(rows[:, :filled], 1, rtol=1e-5)
        assert not rows[:, filled:].any()
        np.testing.assert_array_equal(method.queue[:, 8:16], before[:, :8])
    with pytest.raises(ConfigError, match="queue_length=4 is less than the batch of 8"):
        make(swav(queue_length=4)).loss(batch)


def test_the_whole_method_by_hand() -> None:
    """Crops of both sizes, in order: what the method makes of them is the loss of their projections."""
    method = make(swav())
    batch = CASES["swav"].batch()

    @jax.jit
    def both(method: Any, batch: Any) -> Any:
        first, second, third, fourth = batch["image"]
        large = jnp.stack([first, second], axis=1).reshape(-1, 16, 16, 3)
        small = jnp.stack([third, fourth], axis=1).reshape(-1, 8, 8, 3)
        z = method.neck([method.backbone(large), method.backbone(small)])
        return method.loss(batch)[0], z

    value, z = both(method, batch)
    z = np.asarray(z, np.float64)
    z = np.concatenate([z[:16].reshape(8, 2, -1), z[16:].reshape(8, 2, -1)], axis=1).swapaxes(0, 1)
    prototypes = np.asarray(method.head.loss_module.prototypes.kernel[...], np.float64)
    np.testing.assert_allclose(np.linalg.norm(prototypes, axis=0), 1, rtol=1e-5)
    assert value == pytest.approx(numpy_loss(z, prototypes, (0, 1)), rel=1e-4)


def test_several_sets_of_prototypes() -> None:
    loss = SwAVLoss(D, num_crops=(2, 2), num_prototypes=[K, 3], rngs=nnx.Rngs(0))
    z, prototypes = data()
    other = data(seed=2)[1][:, :3]
    loss.prototypes.prototypes0.kernel.set_value(jnp.asarray(prototypes, jnp.float32))
    loss.prototypes.prototypes1.kernel.set_value(jnp.asarray(other, jnp.float32))
    wanted = np.mean([numpy_loss(z, unit(p, axis=0), (0, 1)) for p in (prototypes, other)])
    assert loss(jnp.asarray(z.reshape(-1, D), jnp.float32))[0] == pytest.approx(wanted, rel=1e-5)


def test_prototypes_stay_of_unit_length_and_may_stand_still() -> None:
    """In the trainer's own step: frozen for two steps, then they move, and are of unit length after each."""
    case = CASES["swav"]
    graphdef, params, rest = split(case.make())
    wrapper = dict(optimizer=dict(type="SGD", lr=0.5), paramwise_cfg=dict(custom_keys={"prototypes": dict(begin=2)}))
    optimizer = build_optimizer(wrapper, np.full(4, 0.5), params)
    state = dict(params=params, model_state=rest, opt_state=optimizer.init(params), ema={}, step=jnp.int32(0))
    state["rng"] = jax.random.key_data(jax.random.key(0))
    step = jax.jit(make_train_step(graphdef, optimizer, np.full(4, 0.5), lambda batch, rng: batch))
    moved = []
    for _ in range(4):
        before = state["params"]["head"]["loss_module"]["prototypes"]["kernel"]
        state, _ = step(state, case.batch())
        after = state["params"]["head"]["loss_module"]["prototypes"]["kernel"]
        np.testing.assert_allclose(jnp.linalg.norm(after, axis=0), 1, rtol=1e-5)
        moved.append(float(jnp.abs(after - before).max()) > 1e-4)
    assert moved == [False, False, True, True]


def test_after_step_alone() -> None:
    loss = loss_module(3 * data()[1])
    loss.normalize_prototypes()
    np.testing.assert_allclose(loss.prototypes.kernel[...], data()[1], rtol=1e-6)
    method = make(swav())
    method.head.loss_module.prototypes.kernel.set_value(2 * method.head.loss_module.prototypes.kernel[...])
    method.after_step(Progress(jnp.int32(1), 2))
    np.testing.assert_allclose(jnp.linalg.norm(method.head.loss_module.prototypes.kernel[...], axis=0), 1, rtol=1e-5)


@pytest.mark.parametrize(("hidden", "out"), [(0, 8), (8, 0)])
def test_smaller_necks(hidden: int, out: int) -> None:
    neck = SwAVNeck(16, hidden, out, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 16))
    y = neck([(x,), (x[:, :2],)])
    assert y.shape == (4, out or 16)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=1), 1, rtol=1e-5)
    assert not hub.aliases(neck)


def test_names_in_the_references_layout() -> None:
    """The neck's norm is there twice, and the queue is not; both when written and when read."""
    method = make(swav(queue_length=16))
    method.queue.set_value(method.queue[...] + 1)
    state = export(method)
    assert "queue" not in state
    np.testing.assert_array_equal(state["neck.projection_neck.1.weight"], state["neck.norm.weight"])
    assert sorted(key for key in state if not key.startswith("backbone")) == [
        "head.loss_module.prototypes.weight",
        *(f"neck.norm.{part}" for part in ("bias", "num_batches_tracked", "running_mean", "running_var", "weight")),
        "neck.projection_neck.0.bias",
        "neck.projection_neck.0.weight",
        *(
            f"neck.projection_neck.1.{p}"
            for p in ("bias", "num_batches_tracked", "running_mean", "running_var", "weight")
        ),
        "neck.projection_neck.3.bias",
        "neck.projection_neck.3.weight",
    ]
    copy = abstract(swav(queue_length=16))
    load_weights(copy, state)
    assert not copy.queue[...].any()
    without = {key: array for key, array in state.items() if not key.startswith("neck.projection_neck.1.")}
    load_weights(copy, without)
    np.testing.assert_array_equal(copy.neck.norm.scale[...], method.neck.norm.scale[...])
    state["neck.projection_neck.1.weight"] = state["neck.norm.weight"] + 1
    with pytest.raises(InteropError, match=r"neck.projection_neck.1.weight and neck.norm.weight are one array"):
        load_weights(abstract(swav()), state)


def test_errors() -> None:
    method = abstract(swav())
    with pytest.raises(ConfigError, match="learns from 4 views of each image, and the batch has 2"):
        method.loss(CASES["mocov2"].batch())
    with pytest.raises(ConfigError, match=r"crops_for_assign=\(0, 4\) must be among the 4 crops"):
        SwAVLoss(D, crops_for_assign=(0, 4), num_crops=(2, 2), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="num_prototypes=0 must be 2 or more"):
        SwAVLoss(D, num_prototypes=0, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"crops_for_assign=\(0,\), but its loss has \(0, 1\)"):
        build(swav(crops_for_assign=(0,)), rngs=nnx.Rngs(0))
