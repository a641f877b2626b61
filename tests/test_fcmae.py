"""FCMAE: the encoder and the loss by NumPy, what is hidden is not seen, reconstruction, and files of the release."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from jaxpretrain.build import ConfigError, abstract
from jaxpretrain.interop import export, load_weights, mmpretrain
from jaxpretrain.methods.fcmae import FCMAE
from jaxpretrain.models.layers.sparse import draw_visible
from tests.method_cases.spark import CASES
from tests.parity import fill_by_reference

CASE = CASES["fcmae"]
State = dict[str, np.ndarray]


def kind(name: str, shape: tuple[int, ...]) -> str:
    if len(shape) > 1:
        return "weight"
    return "norm" if name.endswith(("weight", "gamma")) else "bias"


@pytest.fixture(scope="module")
def method() -> FCMAE:
    """With weights that are a function of their names; GRN's gain and bias are not zero, as they start."""
    model = abstract(CASE.config)
    fill_by_reference(model, [[name, shape, kind(name, shape)] for name, shape in mmpretrain.shapes(model).items()])
    return model


def noise() -> jax.Array:
    return jax.random.uniform(jax.random.key(3), (8, 16))


# The paper, of one image and by the positions that are visible: lists of places and vectors, no masks.


def norm(x: np.ndarray, weights: State, name: str) -> np.ndarray:
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def block(points: dict[tuple[int, int], np.ndarray], weights: State, name: str) -> dict[tuple[int, int], np.ndarray]:
    """A ConvNeXt V2 block over a set of places: the others do not exist."""
    places, w = (
        list(points),
        {key.removeprefix(f"{name}."): x for key, x in weights.items() if key.startswith(f"{name}.")},
    )
    seen = []
    for row, column in places:
        total = np.array(w["depthwise_conv.bias"])
        for i, j in np.ndindex(7, 7):
            neighbour = points.get((row + i - 3, column + j - 3))
            if neighbour is not None:
                total = total + neighbour * w["depthwise_conv.weight"][:, 0, i, j]
        seen.append(total)
    y = norm(np.stack(seen), w, "norm") @ w["pointwise_conv1.weight"].T + w["pointwise_conv1.bias"]
    y = y * (1 + erf(y / np.sqrt(2))) / 2
    length = np.sqrt((y**2).sum(axis=0))
    y = w["grn.gamma"] * (y * length / (length.mean() + 1e-6)) + w["grn.beta"] + y
    y = y @ w["pointwise_conv2.weight"].T + w["pointwise_conv2.bias"]
    return {place: points[place] + y[k] for k, place in enumerate(places)}


def reference(image: np.ndarray, visible: np.ndarray, weights: State) -> tuple[np.ndarray, np.ndarray]:
    """(the encoder's map, zero where hidden; predicted patches) of one image in patches of 4 pixels."""
    stem, down = "backbone.downsample_layers.0", "backbone.downsample_layers.1"

    def patch(values: np.ndarray, name: str) -> np.ndarray:
        return np.einsum("ijc,ocij->o", values, weights[f"{name}.weight"]) + weights[f"{name}.bias"]

    points = {}
    for row, column in np.ndindex(8, 8):
        if visible[row // 2, column // 2]:
            pixels = image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            points[row, column] = norm(patch(pixels, f"{stem}.0"), weights, f"{stem}.1")
    points = block(points, weights, "backbone.stages.0.0")
    latent = {}
    for row, column in zip(*np.nonzero(visible), strict=True):
        values = np.stack([[points[2 * row + i, 2 * column + j] for j in (0, 1)] for i in (0, 1)])
        latent[row, column] = patch(norm(values, weights, f"{down}.0"), f"{down}.1")
    latent = block(latent, weights, "backbone.stages.1.0")
    token, dense = weights["neck.mask_token"].reshape(-1), {}
    for place in np.ndindex(4, 4):
        project = weights["neck.proj.weight"][:, :, 0, 0]
        dense[place] = project @ latent[place] + weights["neck.proj.bias"] if place in latent else token
    dense = block(dense, weights, "neck.decoder.0")
    pixels = [weights["neck.pred.weight"][:, :, 0, 0] @ dense[p] + weights["neck.pred.bias"] for p in np.ndindex(4, 4)]
    encoded = np.zeros((4, 4, 16))
    for place, vector in latent.items():
        encoded[place] = vector
    return encoded, np.stack(pixels)


def test_numpy_agrees(method):
    """Masked dense convolutions are sparse ones; and the loss, of hidden patches that are each normalised."""
    weights = {name: x.astype(np.float64) for name, x in mmpretrain.to_state_dict(method).items()}
    batch = CASE.batch() | dict(noise=noise())
    images, visible = np.asarray(batch["image"], np.float64), np.asarray(draw_visible(batch["noise"], 6, (4, 4)))
    made = [reference(*pair, weights) for pair in zip(images, visible, strict=True)]
    encoded, patches = (np.stack(part) for part in zip(*made, strict=True))

    def run(method, batch):
        shown = method.mask(batch["image"], batch["noise"])
        latent = method.backbone(batch["image"], shown)[-1]
        return shown, latent, method.neck(latent, shown), method.loss(batch)[0]

    ours = jax.jit(run)(method, batch)
    np.testing.assert_array_equal(ours[0], visible, "int(16 * 0.4) are visible")
    np.testing.assert_allclose(ours[1], encoded, atol=1e-5 * np.abs(encoded).max())
    np.testing.assert_allclose(ours[2], patches, atol=1e-5 * np.abs(patches).max())
    target = images.reshape(8, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(8, 16, 48)
    target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, ddof=1, keepdims=True) + 1e-6)
    errors = ((patches - target) ** 2).mean(axis=-1)[~visible.reshape(8, 16)]
    assert ours[3] == pytest.approx(errors.mean(), rel=1e-5)


def test_hidden_pixels_are_not_seen(method):
    images, visible = CASE.batch()["image"], draw_visible(noise(), 6, (4, 4))
    shown = np.kron(np.asarray(visible), np.ones((1, 4, 4)))[..., None] > 0
    backbone = jax.jit(lambda m, x, visible: m(x, visible)[-1])
    once = backbone(method.backbone, images, visible)
    np.testing.assert_array_equal(once, backbone(method.backbone, jnp.where(shown, images, 9.0), visible))
    assert (once != backbone(method.backbone, jnp.where(shown, 9.0, images), visible)).any()


def test_reconstruct_and_features(method):
    images = CASE.batch()["image"]
    made = jax.jit(lambda m, images: m.reconstruct(images, noise=noise()))(method, images)
    hidden = np.asarray(made["mask"])
    assert (hidden.reshape(8, -1).sum(axis=1) == 10 * 16).all()
    np.testing.assert_array_equal(made["masked"], np.where(hidden > 0, 0, images))
    np.testing.assert_array_equal(made["pasted"], np.where(hidden > 0, made["reconstructed"], images))
    method.eval()
    feature_map, features = jax.jit(lambda m, x: (m.extract_feat(x)[-1], m.features(x)))(method, images)
    np.testing.assert_allclose(features, feature_map.mean(axis=(1, 2)), atol=1e-5)
    method.train()


def test_initialisation():
    method = CASE.make()
    block = method.neck.decoder[0]
    for weight in (
        block.pointwise_conv1.kernel,
        method.neck.pred.kernel,
        method.backbone.stages[1][0].pointwise_conv1.kernel,
    ):
        assert float(weight[...].std()) == pytest.approx(0.02, rel=0.15)
    assert 0 < float(jnp.abs(method.neck.mask_token[...]).max()) < 0.1
    assert (block.grn.gamma[...] == 0).all() and block.gamma is None


def release(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """What facebookresearch's training calls and how it shapes a variable, written down from its modules."""
    name = name.replace("depthwise_conv", "dwconv").replace("pointwise_conv", "pwconv").replace("neck.", "")
    if not name.startswith("backbone."):
        return name, array.reshape(1, 1, 1, -1) if "grn" in name else array
    name = name.replace("backbone.", "encoder.")
    if name.startswith("encoder.downsample_layers.0."):
        return name, array
    name = re.sub(r"(norm|downsample_layers\.\d\.0)\.(\w+)$", r"\1.ln.\2", name)
    name = re.sub(r"(pwconv\d)", r"\1.linear", name)
    if "grn" in name or re.search(r"(dwconv|layers\.\d\.1)\.bias", name):
        return name, array[None]
    if array.ndim == 4:  # its first coordinate runs fastest, which to_sparse makes the row
        height, width = array.shape[2:]
        places = [array[:, :, i, j] for j in range(width) for i in range(height)]
        name = name.replace(".weight", ".kernel")
        return name, np.stack([place[:, 0] if "dwconv" in name else place.T for place in places])
    return name, array


def test_files_of_the_release():
    """A checkpoint of its training, both ways; the encoder of one, and a dense one."""
    method = abstract(CASE.config)
    rng = np.random.default_rng(0)
    state = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in mmpretrain.shapes(method).items()}
    file = dict(release(name, array) for name, array in state.items())
    assert file["encoder.stages.0.0.dwconv.kernel"].shape == (49, 8)
    assert file["encoder.downsample_layers.1.1.kernel"].shape == (4, 8, 16)
    assert load_weights(method, file).layout == "convnext"
    assert_equal(mmpretrain.to_state_dict(method), state)
    assert_equal(export(method, "convnext"), file)
    own = {name.removeprefix("backbone."): array for name, array in state.items() if name.startswith("backbone.")}
    encoder = abstract(CASE.config["backbone"])
    load_weights(encoder, file, layout="convnext")
    assert_equal(mmpretrain.to_state_dict(encoder), own)
    dense = {name.replace("depthwise_conv", "dwconv").replace("pointwise_conv", "pwconv"): x for name, x in own.items()}
    dense = {name: x.reshape(1, 1, 1, -1) if "grn" in name else x for name, x in dense.items()}
    encoder = abstract(CASE.config["backbone"])
    load_weights(encoder, dense | {"norm.weight": np.ones(16), "norm.bias": np.ones(16)}, layout="convnext")
    assert_equal(mmpretrain.to_state_dict(encoder), own)


def assert_equal(ours, wanted):
    assert ours.keys() == wanted.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, wanted[name], name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mask_ratio=0.0), "mask_ratio=0.0 must be between 0 and 1"),
        (dict(backbone=CASE.config["backbone"] | dict(gap_before_output=True)), "gap_before_output=False"),
        (
            dict(backbone=CASE.config["backbone"] | dict(stem_patch_size=4)),
            "head.patch_size 4 is not the backbone's stride 8",
        ),
        (dict(neck=CASE.config["neck"] | dict(in_channels=8)), "neck.in_channels 8 is not the backbone's channels 16"),
        (
            dict(neck=CASE.config["neck"] | dict(patch_size=8)),
            "neck's prediction 192 is not the head's pixels per patch 48",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        abstract(CASE.config | change)
