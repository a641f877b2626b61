"""LoRA: what learns, what it computes, and its merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import ConfigError, abstract, build
from jaxpretrain.interop import InteropError, export, load_weights, save_weights
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.models.layers import Frozen
from jaxpretrain.models.lora import LoRALinear, merge_lora
from tests.test_backbones import assert_close, call, images, loss_grads
from tests.test_resnet import random

VIT = dict(
    type="VisionTransformer",
    arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32),
    img_size=16,
    patch_size=4,
)
SWIN = dict(type="SwinTransformer", arch=dict(embed_dims=8, depths=[2], num_heads=[2]), window_size=4, out_indices=(0,))
LORA = dict(type="LoRAModel", module=VIT, alpha=8, rank=2, targets=[dict(type="qkv")])


def lora(module: dict[str, Any] = VIT, **kwargs: Any) -> Any:
    """With random updates, so that they count."""
    return random(LORA | dict(module=module) | kwargs)


@pytest.mark.parametrize("module", [VIT, SWIN], ids=["vit", "swin"])
def test_only_updates_learn(module: dict[str, Any]) -> None:
    model = lora(module)
    model.train()
    names = [path[-2] for path, _ in nnx.state(model, nnx.Param).flat_state()]
    assert set(names) == {"lora_down", "lora_up"} and len(names) == 4
    assert nnx.state(model, Frozen).flat_state()
    _, grads, _ = loss_grads(model, images(16))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_a_layer_by_its_formula_and_its_start() -> None:
    model = lora()
    layer = model.module.layers[0].attn.qkv
    x = np.random.default_rng(0).standard_normal((3, 16))
    weights = [np.asarray(v[...], np.float64) for v in (layer.kernel, layer.lora_down.kernel, layer.lora_up.kernel)]
    kernel, down, up = weights
    assert_close(layer(jnp.asarray(x, jnp.float32)), x @ kernel + layer.bias[...] + 8 / 2 * (x @ down @ up))
    model.init_weights(nnx.Rngs(0))
    assert not layer.lora_up.kernel[...].any() and np.abs(layer.lora_down.kernel[...]).max() <= 16**-0.5


def test_targets() -> None:
    """By regular expression or ending, in MMPretrain's names or ours, with settings of their own."""

    def found(*targets: dict[str, Any]) -> dict[str, tuple[float, int]]:
        model = nnx.eval_shape(
            lambda: build(dict(type="LoRAModel", module=VIT, rank=2, targets=targets), rngs=nnx.Rngs(0))
        )
        return {
            ".".join(map(str, path[1:])): (part.scaling, part.lora_up.in_features)
            for path, part in nnx.iter_modules(model)
            if isinstance(part, LoRALinear)
        }

    assert found(dict(type=r".*0\.attn\.qkv")) == {"layers.0.attn.qkv": (0.5, 2)}
    assert found(dict(type="0.ffn.layers.1", alpha=4, rank=8)) == {"layers.0.ffn.fc2": (0.5, 8)}
    assert found(dict(type="1.ffn.fc1")) == {"layers.1.ffn.fc1": (0.5, 2)}
    assert len(found(dict(type=".*", rank=1), dict(type="qkv", rank=4))) == 8


def test_merging() -> None:
    model = lora(drop_rate=0.5)
    model.eval()
    x = images(16, 2)
    before = call(model, x)
    plain = merge_lora(model)
    assert type(plain).__name__ == "VisionTransformer"
    assert not any(isinstance(part, LoRALinear) for _, part in nnx.iter_modules(plain))
    assert_close(call(plain, x)[0], before[0])
    assert set(hub.names(plain)) == set(hub.names(random(VIT)))

    head = dict(type="LinearClsHead", num_classes=3, in_channels=16)
    cfg = dict(type="LoRAModel", module=VIT, rank=2, targets=[dict(type="qkv")])
    classifier = random(dict(type="ImageClassifier", backbone=cfg, head=head))
    classifier.eval()
    before = call(classifier, x)
    assert_close(call(merge_lora(classifier), x)[0], before[0])
    assert type(classifier.backbone).__name__ == "VisionTransformer"


def test_dropout_of_updates() -> None:
    model = lora(drop_rate=0.5)
    model.train()
    x = images(16, 2)
    one, again, other = (call(model, x, seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3
    model.remat = "full"
    assert_close(call(model, x, 1)[0], one)


@pytest.mark.parametrize("how", [dict(scan_layers=True), dict(remat="full")], ids=["scan", "remat"])
def test_forms_agree(how: dict[str, Any]) -> None:
    model = lora()
    model.train()
    value, grads, _ = loss_grads(model, images(16, 2))
    model.module.set_attributes(**how)
    again, same, _ = loss_grads(model, images(16, 2))
    assert_close(again, value)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(grads), strict=True):
        assert_close(a, b, 1e-4)


def test_weights_of_the_network_fit() -> None:
    """A file of the plain network fills the network; the updates stay as they start."""
    plain = random(VIT, seed=1)
    model = lora()
    model.init_weights(nnx.Rngs(0))
    report = load_weights(model.module, hub.to_state_dict(plain))
    assert {name.split(".")[-2] for name in report.reinitialised} == {"lora_down", "lora_up"}
    model.eval(), plain.eval()
    x = images(16, 2)
    assert_close(call(model, x)[0], call(plain, x)[0])


def classifier(backbone: dict[str, Any]) -> dict[str, Any]:
    head = dict(type="VisionTransformerClsHead", num_classes=3, in_channels=16)
    return dict(type="ImageClassifier", backbone=backbone, head=head)


@pytest.mark.parametrize("layout", ["mmpretrain", "timm"])
def test_weights_of_the_network_fill_shapes(layout: str) -> None:
    """As the zoo loads them: whatever their names, into a network that has none; the updates start anew."""
    plain = random(classifier(VIT), seed=1)
    model = abstract(classifier(LORA))
    report = load_weights(model, export(plain, layout))
    assert report.layout == layout and len(report.reinitialised) == 4
    updates = [part for _, part in nnx.iter_modules(model) if isinstance(part, LoRALinear)]
    assert all(part.lora_down.kernel[...].any() and not part.lora_up.kernel[...].any() for part in updates)
    model.eval(), plain.eval()
    x = images(16, 2)
    assert_close(call(model, x)[0], call(plain, x)[0])


def test_its_own_weights_come_back(tmp_path: Path) -> None:
    """Updates included, alone and in a classifier; in a directory too, as do those of the plain network."""
    for config, plain in ((LORA, VIT), (classifier(LORA), classifier(VIT))):
        state = export(random(config))
        model = abstract(config)
        assert not load_weights(model, state).reinitialised
        again = export(model)
        assert all(np.array_equal(again[name], array) for name, array in state.items())
        folder = tmp_path / config["type"]
        save_weights(random(plain), folder)
        assert len(load_weights(abstract(config), folder).reinitialised) == 4
    with pytest.raises(InteropError, match=r"merge_lora\(model\)"):
        export(random(LORA), "timm")


def test_shapes_merge() -> None:
    merged = merge_lora(abstract(classifier(LORA)))
    assert hub.shapes(merged) == hub.shapes(abstract(classifier(VIT)))
    state = export(random(classifier(VIT)))
    assert not load_weights(merged, state).reinitialised


def test_errors() -> None:
    for wrong, message in (
        (dict(targets=[]), "no targets"),
        (dict(targets=[dict(type="kqv")]), "no linear layer is called 'kqv'"),
        (dict(rank=0), "rank=0 must be 1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            nnx.eval_shape(
                lambda wrong=wrong: build(
                    dict(type="LoRAModel", module=VIT, rank=2, targets=[dict(type="qkv")]) | wrong, rngs=nnx.Rngs(0)
                )
            )
