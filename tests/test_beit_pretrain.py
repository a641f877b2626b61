"""BEiT and BEiT v2: masks, targets, heads, the patch aggregation; tokenizers without weights; and the reference's numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.data.device import DevicePipeline
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.interop import starting_weights
from jaxpretrain.interop.files import write
from jaxpretrain.methods.beit import BEiTPretrainViT, BEiTV1Head, BEiTV2Neck
from jaxpretrain.methods.visual_tokens import RandomProjectionTokenizer, as_tokens, token_entropy
from jaxpretrain.models.layers import Frozen, PatchEmbed
from jaxpretrain.train_state import split
from tests.method_cases import CASES
from tests.method_cases.base import VIT
from tests.parity import (
    assert_summary,
    build_by_reference,
    load_golden,
    loss_and_grads,
    reference_gradient_errors,
    reference_input,
)

CE = dict(type="CrossEntropyLoss")
RELEASE = "https://download.openmmlab.com/mmselfsup/1.x/target_generator_ckpt/"


def make(config: dict[str, Any]) -> Any:
    """The module of a configuration with initialised weights."""
    module = build(config, rngs=nnx.Rngs(0))
    module.init_weights(nnx.Rngs(1))
    return module


def golden_batch(golden: dict[str, Any]) -> dict[str, Any]:
    """Two pictures, and 75 hidden patches of 196 in each image, as the golden files' `inputs` say."""
    side = 224 if "VQKD" in str(golden["model_cfg"]) else 112
    assert f"(2,3,{side},{side})" in golden["ssl"]["inputs"].split("target image")[1]
    mask = np.zeros((2, 196), np.int32)
    for b, row in enumerate(mask):
        row[np.argsort(np.random.Generator(np.random.PCG64(2000 + b)).random(196), kind="stable")[:75]] = 1
    images = reference_input((2, 3, 224, 224)), reference_input((2, 3, side, side), seed=1)
    return dict(image=images, mask=mask.reshape(2, 14, 14))


def golden_method(golden: dict[str, Any]) -> Any:
    """The reference's model, in eval mode: the golden runs had their drop path off."""
    method = build_by_reference(golden["model_cfg"], golden["manifest"])
    method.set_attributes(scan_layers=True, raise_if_not_found=False)  # compiles faster
    method.eval()
    assert len(hub.to_state_dict(method)) == golden["n_keys"]
    assert hub.num_parameters(method) == golden["n_params"]
    return method


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beit", "beitv2"])
def test_golden(name):
    golden = load_golden(f"{name}_beit-base-p16_8xb256-amp-coslr-300e_in1k")
    method, batch, ssl = golden_method(golden), golden_batch(golden), golden["ssl"]

    loss, grads = loss_and_grads(method, batch)
    assert loss == pytest.approx(ssl["total"], rel=1e-5)
    assert reference_gradient_errors(grads, ssl) < 1e-4
    # The reference's table of biases counts as one of them, and so do ours: every weight that is no target's learns.
    assert len(jax.tree.leaves(grads)) == ssl["n_grad_params"]

    @nnx.jit
    def forward(method, batch):
        metrics = method.loss(batch)[1]
        outputs = method.backbone(batch["image"][0], batch["mask"])
        target = method.target_generator(batch["image"][1])
        feats = method.neck(outputs, method.backbone.rel_pos_bias()) if method.neck else ()
        return metrics, outputs, target, feats, method.backbone(batch["image"][0]), method.features(batch["image"][0])

    metrics, outputs, target, feats, whole, features = forward(method, batch)
    stages = ssl["stages"]
    for ours, summary in zip(outputs, stages["backbone"][0], strict=True):
        assert_summary(ours, summary)
    for ours, summary in zip(feats, stages.get("neck", [[]])[0], strict=True):
        assert_summary(ours, summary)
    for ours, summary in zip(whole, golden["features"], strict=True):
        assert_summary(ours, summary)
    summary = stages["target_generator"][0]
    if name == "beit":
        assert_summary(target, summary)
    else:
        assert target.shape == tuple(summary["shape"])
        np.testing.assert_array_equal(np.asarray(target).reshape(-1)[:8], summary["first8"])
        assert metrics["loss_1"] == pytest.approx(ssl["losses"]["loss_1"], rel=1e-5)
        assert metrics["loss_2"] == pytest.approx(ssl["losses"]["loss_2"], rel=1e-5)
    np.testing.assert_allclose(features, whole[-1][:, 1:].mean(axis=1), rtol=1e-4, atol=1e-5)


# Hidden patches


def run(method, batch):
    return jax.jit(lambda method, batch: method.loss(batch, rngs=nnx.Rngs(0)))(method, batch)


def hidden_pixels(mask: jax.Array, patch: int = 4) -> jax.Array:
    return mask.repeat(patch, axis=1).repeat(patch, axis=2)[..., None] > 0


@pytest.mark.parametrize("name", ["beit", "beitv2", "beit_stand_in", "cae"])
def test_hidden_pixels_and_pictures_matter_to_the_target_alone(name):
    method, batch = CASES[name].make(), CASES[name].batch()
    images, pictures = batch["image"]
    changed = jnp.where(hidden_pixels(batch["mask"]), images + 1, images)
    if name != "cae":  # whose teacher sees the hidden patches
        assert run(method, batch)[0] == run(method, batch | dict(image=(changed, pictures)))[0]
    seen = jnp.where(hidden_pixels(batch["mask"]), images, images + 1)
    assert run(method, batch)[0] != run(method, batch | dict(image=(seen, pictures)))[0]
    assert run(method, batch)[0] != run(method, batch | dict(image=(images, -pictures)))[0]


def test_mask_token_takes_the_place_of_hidden_patches():
    backbone: BEiTPretrainViT = CASES["beit"].make().backbone
    backbone.mask_token.set_value(jnp.full(backbone.mask_token.shape, 3.0))
    batch = CASES["beit"].batch()
    seen = {}
    backbone._prepare = lambda tokens, rngs: seen.setdefault("tokens", tokens)  # type: ignore[method-assign]
    backbone._run = lambda tokens, *args: (tokens, {})  # type: ignore[method-assign]
    backbone(batch["image"][0], batch["mask"])
    mask = batch["mask"].reshape(8, 16) > 0
    np.testing.assert_array_equal(seen["tokens"][mask], 3.0)
    patches, _ = backbone.patch_embed(batch["image"][0])
    np.testing.assert_array_equal(seen["tokens"][~mask], patches[~mask])


def test_absolute_positions_are_added_to_mask_tokens():
    config = dict(type="BEiTPretrainViT", **VIT, use_abs_pos_emb=True)
    backbone = make(config)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    everything, nothing = jnp.ones((2, 4, 4), jnp.int32), jnp.zeros((2, 4, 4), jnp.int32)
    forward = jax.jit(lambda m, x, mask: m(x, mask)[-1])
    np.testing.assert_allclose(forward(backbone, images, nothing), backbone(images)[-1], rtol=1e-4, atol=1e-5)
    hidden = forward(backbone, images, everything)
    assert jnp.abs(hidden[:, 1] - hidden[:, 2]).max() > 1e-3  # told apart by their positions alone
    np.testing.assert_allclose(hidden[0], hidden[1], atol=1e-6)


def test_padding_of_patches():
    for padding, grid in (("corner", (3, 3)), (0, (2, 2))):
        layer = PatchEmbed(3, 8, 4, padding=padding, input_size=(9, 10), rngs=nnx.Rngs(0))
        tokens, found = layer(jnp.ones((1, 9, 10, 3)))
        assert layer.init_out_size == found == grid
        assert tokens.shape == (1, grid[0] * grid[1], 8)
    np.testing.assert_allclose(tokens[0, 3], layer(jnp.ones((1, 4, 4, 3)))[0][0, 0], atol=1e-6)
    layer = PatchEmbed(3, 8, 4, padding=0, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((1, 7, 9, 3)))[1] == (1, 2)
    with pytest.raises(ConfigError, match="padding=1 must be 'corner' or 0"):
        PatchEmbed(3, 8, 4, padding=1, rngs=nnx.Rngs(0))


# Losses


def cross_entropy(logits: np.ndarray, tokens: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Its mean over hidden patches, and the accuracy there, by loops."""
    values, right = [], []
    for row, token, hidden in zip(logits.reshape(-1, logits.shape[-1]), tokens.ravel(), mask.ravel(), strict=True):
        if hidden:
            row = row.astype(np.float64)
            values.append(np.log(np.exp(row).sum()) - row[token])
            right.append(row.argmax() == token)
    return float(np.mean(values)), 100 * float(np.mean(right))


def test_loss_by_hand():
    method, batch = CASES["beit"].make(), CASES["beit"].batch()
    value, metrics = run(method, batch)
    logits = np.asarray(method.head.cls_head(method.backbone(batch["image"][0], batch["mask"])[-1][:, 1:]))
    target = np.asarray(method.target_generator(batch["image"][1]))
    assert target.shape == (8, 4, 4, 16)
    tokens = target.argmax(axis=-1).reshape(8, 16)
    wanted, right = cross_entropy(logits, tokens, np.asarray(batch["mask"]))
    assert value == pytest.approx(wanted, rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(right, abs=1e-3)
    share = np.bincount(tokens.ravel(), minlength=16) / tokens.size
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum() / np.log(16)
    assert metrics["assignment_entropy"] == pytest.approx(entropy, rel=1e-5)


def test_second_loss_is_of_the_patch_aggregation():
    method, batch = CASES["beitv2"].make(), CASES["beitv2"].batch()
    value, metrics = run(method, batch)
    assert value == pytest.approx(float(metrics["loss_1"] + metrics["loss_2"]))
    early, final = method.backbone(batch["image"][0], batch["mask"])
    bias = method.backbone.rel_pos_bias()
    layer, norm = method.neck.patch_aggregation[0], method.neck.norm
    x = layer(jnp.concatenate([final[:, :1], early[:, 1:]], axis=1), rel_pos_bias=bias)
    tokens = np.asarray(method.target_generator(batch["image"][1]))
    for name, feats in (("loss_1", final), ("loss_2", x)):
        logits = np.asarray(method.head.cls_head(norm(feats)[:, 1:]))
        wanted, right = cross_entropy(logits, tokens, np.asarray(batch["mask"]))
        assert metrics[name] == pytest.approx(wanted, rel=1e-4)
        if name == "loss_1":
            assert metrics["accuracy"] == pytest.approx(right, abs=1e-3)


def test_shared_biases_reach_the_neck():
    method = CASES["beitv2"].make()
    table = method.backbone.rel_pos_bias.relative_position_bias_table
    first = jax.jit(lambda m, x, b: m.neck((x, x), b(m))[1], static_argnums=2)
    x = jax.random.normal(jax.random.key(0), (2, 17, 16))
    before = first(method, x, lambda m: m.backbone.rel_pos_bias())
    table.set_value(jax.random.normal(jax.random.key(1), table.shape))
    assert (
        jnp.abs(first(method, x, lambda m: m.backbone.rel_pos_bias()) - before).max() > 1e-5
    )  # LayerScale makes it small


@pytest.mark.parametrize("name", ["beit", "beitv2", "beit_stand_in", "cae"])
def test_targets_and_teachers_do_not_learn(name):
    method = CASES[name].make()
    learnt = {path[0] for path, _ in nnx.state(method, nnx.Param).flat_state()}
    assert learnt <= {"backbone", "neck", "head"}
    assert dict(nnx.state(method.target_generator, Frozen).flat_state())

    batch, (graphdef, *state) = CASES[name].batch(), split(method)

    @jax.jit
    @jax.grad
    def gradient(pictures):
        return nnx.merge(graphdef, *state).loss(batch | dict(image=(batch["image"][0], pictures)))[0]

    assert not gradient(batch["image"][1]).any()


@pytest.mark.parametrize("name", ["beit", "beitv2", "cae"])
def test_weights_go_out_and_come_back(name):
    method = CASES[name].make()
    state = hub.to_state_dict(method)
    other = abstract(CASES[name].config)
    derived = hub.derived(other)
    graphdef, empty = nnx.split(other)
    other = nnx.merge(graphdef, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), empty))
    hub.fill(other, hub.from_state_dict(other, {k: v for k, v in state.items() if k not in derived}))
    first, second = (run(m, CASES[name].batch())[0] for m in (method, other))
    assert first == second


def test_initialisation():
    size = dict(VIT, arch=dict(embed_dims=64, num_layers=2, num_heads=2, feedforward_channels=128))
    init = dict(type="TruncNormal", layer="Linear", std=0.02)
    backbone = make(dict(type="BEiTPretrainViT", **size, init_cfg=init))
    for token in (backbone.cls_token, backbone.mask_token):
        assert 0.01 < float(token[...].std()) < 0.03
    for i, layer in enumerate(backbone.layers):
        scale = (2 * (i + 1)) ** -0.5
        assert float(layer.attn.proj.kernel[...].std()) == pytest.approx(0.02 * scale, rel=0.1)
        assert float(jnp.abs(layer.ffn.fc2.kernel[...]).max()) == pytest.approx(scale * (6 / 192) ** 0.5, rel=0.05)
        assert float(layer.attn.qkv.kernel[...].std()) == pytest.approx(0.02, rel=0.1)
    neck: BEiTV2Neck = make(dict(type="BEiTV2Neck", num_layers=2, early_layers=1, backbone_arch=size["arch"]))
    for i, layer in enumerate(neck.patch_aggregation):
        assert float(layer.attn.proj.kernel[...].std()) == pytest.approx(0.02 * (2 * (i + 2)) ** -0.5, rel=0.1)


def test_neck_takes_its_sizes_and_rates_from_the_backbone():
    config = CASES["beitv2"].config
    neck = dict(config["neck"], drop_path_rate=0.3, num_layers=2, early_layers=2)
    layers = abstract(config | dict(neck=neck)).neck.patch_aggregation
    assert [layer.drop_path_rate for layer in layers] == pytest.approx([0.2, 0.3])  # of 4 layers from 0 to 0.3
    base = abstract(dict(type="BEiTV2Neck", drop_path_rate=0.11)).patch_aggregation
    assert [layer.drop_path_rate for layer in base] == pytest.approx([0.09, 0.10])  # of 12
    assert base[0].attn.num_heads == 12


# Tokens


def test_random_projection():
    tokenizer = RandomProjectionTokenizer(patch_size=4, num_embed=32, embed_dims=4, rngs=nnx.Rngs(0))
    images = np.asarray(jax.random.normal(jax.random.key(0), (2, 8, 12, 3)), np.float64)
    tokens = tokenizer(jnp.asarray(images, jnp.float32))
    assert tokens.dtype == jnp.int32 and tokens.shape == (2, 6)
    patch = images[1, 4:8, 8:12].reshape(-1)  # the last one
    z = patch @ np.asarray(tokenizer.projection[...], np.float64) + tokenizer.offset[...]
    cosines = np.asarray(tokenizer.codes[...], np.float64) @ z
    assert tokens[1, 5] == cosines.argmax()
    assert not list(nnx.state(tokenizer, nnx.Param).flat_state())
    grey = tokenizer(jnp.stack([jnp.full((4, 4, 3), level) for level in (-2.0, 0.0, 2.0)]))
    assert len(np.unique(grey)) > 1  # brightness counts


def test_tokens_and_their_entropy():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 3, 5))
    np.testing.assert_array_equal(as_tokens(logits), logits.argmax(-1).reshape(2, 9))
    tokens = jnp.arange(18).reshape(2, 3, 3) % 5
    np.testing.assert_array_equal(as_tokens(tokens), tokens.reshape(2, 9))
    assert token_entropy(jnp.asarray([[0, 1], [2, 3]]), 4) == pytest.approx(1)
    assert token_entropy(jnp.asarray([[2, 2], [2, 2]]), 4) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["beit", "beitv2", "beit_stand_in", "cae"])
def test_reconstruct_uncovers_what_is_right(name):
    method, batch = CASES[name].make(), CASES[name].batch()
    method.eval()
    images, pictures = batch["image"]
    made = jax.jit(lambda m, x, p, mask: m.reconstruct(x, pictures=p, mask=mask))(
        method, images, pictures, batch["mask"]
    )
    assert {key: x.shape for key, x in made.items()} == dict(
        masked=(8, 16, 16, 3), right_tokens=(8, 16, 16, 3), mask=(8, 16, 16, 1), accuracy=()
    )
    assert float(made["accuracy"]) == pytest.approx(float(run(method, batch)[1]["accuracy"]), abs=1e-3)
    hidden = hidden_pixels(batch["mask"])
    np.testing.assert_array_equal(made["mask"], hidden)
    np.testing.assert_array_equal(made["masked"], jnp.where(hidden, 0, images))
    shown = (made["right_tokens"] != made["masked"]).any(axis=-1, keepdims=True)
    assert not (shown & ~hidden).any()
    assert 100 * shown.sum() / hidden.sum() == pytest.approx(float(made["accuracy"]), abs=1e-3)
    assert method.reconstruct(images, rngs=nnx.Rngs(0))["mask"].mean() == pytest.approx(6 / 16)


def test_features_are_the_mean_of_patch_tokens():
    method = CASES["beitv2"].make()
    method.eval()
    images = CASES["beitv2"].batch()["image"][0]
    tokens = method.backbone(images)[-1]
    np.testing.assert_allclose(method.features(images), tokens[:, 1:].mean(axis=1), atol=1e-6)


# Weights of targets, and mistakes


@pytest.mark.parametrize(
    ("init_cfg", "message"),
    [
        (None, "no file is given"),
        (dict(type="Pretrained", checkpoint=""), "no file is given"),
        (dict(type="Pretrained", checkpoint=RELEASE + "vqkd_encoder.pth"), "vqkd_encoder.pth' is no file here"),
    ],
)
def test_training_does_not_begin_without_the_tokenizer(init_cfg, message):
    config = CASES["beitv2"].config
    method = abstract(config | dict(target_generator=config["target_generator"] | dict(init_cfg=init_cfg)))
    with pytest.raises(ConfigError, match=message) as error:
        starting_weights(method)
    text = str(error.value)
    assert "VQKD at config.method.target_generator needs trained weights" in text
    assert RELEASE + "vqkd_encoder.pth" in text
    assert "config.method.target_generator.init_cfg=dict(type='Pretrained', checkpoint='PATH')" in text


def test_dalle_says_where_its_weights_are():
    with pytest.raises(ConfigError, match=r"DALLEEncoder at .* published as dalle_encoder.pth.*" + RELEASE):
        starting_weights(abstract(CASES["beit"].config))


def test_tokenizer_from_a_file_or_from_the_whole(tmp_path):
    method = CASES["beit"].make()
    write(tmp_path / "dalle.safetensors", hub.to_state_dict(method.target_generator))
    config = CASES["beit"].config
    init = dict(type="Pretrained", checkpoint=str(tmp_path / "dalle.safetensors"))
    target = abstract(config | dict(target_generator=config["target_generator"] | dict(init_cfg=init)))
    arrays = starting_weights(target)
    assert {path[0] for path in arrays} == {"target_generator"}
    assert len(arrays) == len(hub.to_state_dict(method.target_generator))

    write(tmp_path / "whole.safetensors", hub.to_state_dict(method))
    everything = starting_weights(abstract(config), str(tmp_path / "whole.safetensors"))
    assert len(everything) == len(jax.tree.leaves(split(method)[1:]))


def test_stand_in_needs_no_file():
    assert starting_weights(abstract(CASES["beit_stand_in"].config)) == {}


def test_mistakes():
    config = CASES["beit_stand_in"].config
    method, batch = CASES["beit_stand_in"].make(), CASES["beit_stand_in"].batch()
    without = {key: value for key, value in batch.items() if key != "mask"}
    with pytest.raises(ConfigError, match=r"the batch has none: add dict\(type=.BEiTMaskGenerator"):
        method.loss(without)
    with pytest.raises(ValueError, match="the images have 4x4 patches: see input_size"):
        method.loss(batch | dict(mask=jnp.zeros((8, 2, 2), jnp.int32)))
    with pytest.raises(
        ValueError, match="makes 64 tokens of pictures of 32x32 px, and there are 4x4 patches: set second"
    ):
        method.loss(batch | dict(image=(batch["image"][0], jnp.zeros((8, 32, 32, 3)))))
    with pytest.raises(ConfigError, match="BEiT needs a target_generator: 'DALL-E', 'VQKD' or 'RandomProj"):
        abstract({key: value for key, value in config.items() if key != "target_generator"})
    with pytest.raises(ConfigError, match="with_cls_token=False is not supported"):
        abstract(dict(type="BEiTPretrainViT", **VIT, with_cls_token=False))
    with pytest.raises(ConfigError, match="BEiTV2Neck: unknown arch 'bas'. Did you mean 'base'"):
        abstract(dict(type="BEiTV2Neck", backbone_arch="bas"))
    assert isinstance(BEiTV1Head(4, 8, CE, rngs=nnx.Rngs(0)).cls_head.kernel, nnx.Param)


def test_colours_and_flips_are_the_same_in_both_pictures():
    """But for the second's own normalisation."""
    steps = [dict(type="ColorJitter", brightness=0.4, contrast=0.4), dict(type="RandomFlip", prob=0.5)]
    image = jax.random.randint(jax.random.key(0), (6, 8, 8, 3), 0, 256).astype(jnp.uint8)
    index = jnp.arange(6, dtype=jnp.int32)
    batch = dict(image=(image, image), index=index, epoch=jnp.zeros_like(index))
    scales = dict(mean=(0,) * 3, std=(1,) * 3, second_std=(2,) * 3)
    made = {}
    for kind, args in (("Pictures", dict(transforms=steps)), ("MultiView", dict(transforms=[steps], num_views=2))):
        first, second = DevicePipeline([dict(type=kind, **args)], **scales)(batch, jax.random.key(1))["image"]
        assert jnp.abs(first - image).max() > 1
        made[kind] = float(jnp.abs(first - 2 * second).max())
    assert made["Pictures"] < 1e-3 < 1 < made["MultiView"]
