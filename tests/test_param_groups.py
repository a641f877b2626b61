"""Parameter groups against MMEngine's constructor, on the reference's parameter names mapped to ours."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxpretrain.build import ConfigError, abstract
from jaxpretrain.models.layers.norm import BatchNorm, LayerNorm
from jaxpretrain.optim import ParamGroup, param_groups
from jaxpretrain.optim.layer_decay import layer_numbers
from tests.parity import GOLDEN, load_golden, our_name

RECIPES = sorted(Path(file).name.removesuffix(".json.gz") for file in (GOLDEN / "param_groups").iterdir())


def our_path(name: str, shape: list[int]) -> str:
    """'backbone.ln1.weight' -> 'backbone/ln1/scale'; here every one-dimensional weight is a norm's."""
    name = our_name(name)
    if name.endswith(".weight"):
        name = name.removesuffix("weight") + ("scale" if len(shape) == 1 else "kernel")
    return name.replace(".", "/")


def tree(**shapes):
    """Nested parameters from paths written with '__'."""
    flat = {tuple(path.split("__")): jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    return unflatten_dict(flat)


def groups_of(params, **cfg):
    return {"/".join(map(str, path)): group for path, group in flatten_dict(param_groups(params, cfg)).items()}


def decays(params, **cfg):
    return {path: group.decay_mult for path, group in groups_of(params, **cfg).items()}


def test_all_recipes_are_there():
    assert len(RECIPES) == 48


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("separator", [".", "/"])
def test_recipe(recipe, separator):
    golden = load_golden(f"param_groups/{recipe}")
    cfg = dict(golden["paramwise_cfg"] or {})
    if "custom_keys" in cfg:
        cfg["custom_keys"] = {key.replace(".", separator): value for key, value in cfg["custom_keys"].items()}
    rows = {our_path(name, shape): (shape, *rest) for name, shape, *rest in golden["params"]}
    assert len(rows) == len(golden["params"])
    shapes = {path: jax.ShapeDtypeStruct(row[0], jnp.float32) for path, row in rows.items()}
    groups = groups_of(unflatten_dict(shapes, sep="/"), **cfg)
    frozen = 0
    for path, (_, lr_mult, weight_decay, lars_exclude, flags) in rows.items():
        if "not_in_optimizer" in flags:  # frozen, so not among our trained parameters
            frozen += 1
            continue
        group = groups[path]
        assert group.lr_mult == pytest.approx(lr_mult, rel=1e-8), path
        assert group.decay_mult * golden["optimizer"]["weight_decay"] == pytest.approx(weight_decay, rel=1e-9), path
        assert group.lars_exclude is lars_exclude, path
        assert group.fix_lr is ("fix_lr" in flags), path
        assert group.begin == 0 and group.momentum is None
    assert len(rows) - frozen > 30


LAYER_WISE = [
    recipe for recipe in RECIPES if "layer_decay_rate" in (load_golden(f"param_groups/{recipe}")["paramwise_cfg"] or {})
]


@pytest.mark.parametrize("recipe", LAYER_WISE)
def test_layers_are_numbered_from_stem_to_head(recipe):
    golden = load_golden(f"param_groups/{recipe}")
    expected = {
        our_path(name, shape): int(flags[0].removeprefix("layer="))
        for name, shape, *_, flags in golden["params"]
        if "not_in_optimizer" not in flags
    }
    for prefix in ("", "model/"):
        numbers = layer_numbers(prefix + path for path in expected)
        assert {path.removeprefix(prefix): layer for path, (layer, _) in numbers.items()} == expected
        assert {count for _, count in numbers.values()} == {max(expected.values()) + 1}


def test_layers_that_are_frozen_change_no_rate_of_the_others():
    params = {"backbone": {"patch_embed": {"bias": jnp.ones(2)}, "layers": {i: {"w": jnp.ones(2)} for i in range(4)}}}
    params["head"] = {"bias": jnp.ones(2)}
    rates = lambda params: {k: g.lr_mult for k, g in groups_of(params, layer_decay_rate=0.5).items()}  # noqa: E731
    whole = rates(params)
    assert whole["backbone/patch_embed/bias"] == 0.5**5 and whole["backbone/layers/3/w"] == 0.5
    del params["backbone"]["patch_embed"], params["backbone"]["layers"][0]
    assert rates(params) == {path: rate for path, rate in whole.items() if "/0/" not in path and "patch" not in path}
    del params["backbone"]
    assert rates(params) == {"head/bias": 1.0}


def test_layer_decay_comes_on_top_of_lr_mult_and_leaves_weight_decay_alone():
    params = {"backbone": {"patch_embed": {"bias": jnp.ones(2)}, "layers": {0: {"w": jnp.ones(2)}}}}
    keys = {"patch_embed": dict(lr_mult=0.2, decay_mult=0.0)}
    groups = groups_of(params, layer_decay_rate=0.5, custom_keys=keys)
    assert groups["backbone/patch_embed/bias"] == ParamGroup(lr_mult=0.2 * 0.25, decay_mult=0.0)
    assert groups["backbone/layers/0/w"] == ParamGroup(lr_mult=0.5)


def test_layers_that_are_not_known_are_an_error():
    with pytest.raises(ConfigError, match=r"not known by their paths, such as 'backbone/features/0/kernel'; known are"):
        param_groups(tree(backbone__features__0__kernel=(2, 2)), dict(layer_decay_rate=0.5))


def test_options_of_a_key():
    options = dict(begin=3, fix_lr=True, momentum=0.5)
    groups = groups_of(tree(head__bias=(2,), fc__bias=(2,)), custom_keys={"head": options})
    assert groups == {"head/bias": ParamGroup(**options), "fc/bias": ParamGroup()}


def test_no_configuration_changes_nothing():
    assert jax.tree.leaves(param_groups(tree(a__kernel=(2, 3), a__bias=(3,)))) == [ParamGroup()] * 2


def test_lists_have_integer_keys():
    params = {"layers": {i: {"ln": {"scale": jnp.ones(2)}} for i in range(11)}}
    groups = param_groups(params, dict(custom_keys={"layers.10.": dict(lr_mult=0.5)}))
    assert [groups["layers"][i]["ln"]["scale"].lr_mult for i in range(11)] == [1.0] * 10 + [0.5]


def test_the_longest_key_wins_then_the_alphabet():
    params = tree(backbone__ln1__scale=(2,), backbone__ln1__bias=(2,), backbone__fc__bias=(2,))
    keys = {
        "ln": dict(decay_mult=0.1),
        "ln1.bias": dict(decay_mult=0.2),
        "bia": dict(decay_mult=0.3),
        "ias": dict(decay_mult=0.4),
    }
    for order in (keys, dict(reversed(keys.items()))):
        assert decays(params, custom_keys=order) == {
            "backbone/ln1/scale": 0.1,
            "backbone/ln1/bias": 0.2,
            "backbone/fc/bias": 0.3,
        }


def test_a_custom_key_switches_other_rules_off():
    params = tree(ln__scale=(2,), ln__bias=(2,))
    assert decays(params, norm_decay_mult=0.0, custom_keys={"ln.bias": dict(lr_mult=2.0)}) == {
        "ln/scale": 0.0,
        "ln/bias": 1.0,
    }


def test_weight_means_kernel_and_scale():
    params = tree(a__fc__kernel=(2, 2), a__ln__scale=(2,), a__fc__bias=(2,), a__ls1__scale=(2,))
    assert decays(params, custom_keys={".weight": dict(decay_mult=0.0)}) == {
        "a/fc/kernel": 0.0,
        "a/ln/scale": 0.0,
        "a/fc/bias": 1.0,
        "a/ls1/scale": 0.0,
    }
    assert decays(params, custom_keys={"ln/scale": dict(decay_mult=0.0)})["a/ln/scale"] == 0.0


def test_a_leading_separator_fits_the_root_too():
    keys = {".cls_token": dict(decay_mult=0.0)}
    params = tree(cls_token=(1, 1, 2), backbone__cls_token=(1, 1, 2), backbone__my_cls_token=(1, 1, 2))
    assert decays(params, custom_keys=keys) == {
        "cls_token": 0.0,
        "backbone/cls_token": 0.0,
        "backbone/my_cls_token": 1.0,
    }


def test_rules_by_kind_of_layer():
    params = tree(
        ln__scale=(4,), ln__bias=(4,), fc__kernel=(4, 4), fc__bias=(4,), ls__scale=(4,),
        dw__kernel=(3, 3, 1, 4), dw__bias=(4,), conv__kernel=(3, 3, 4, 4), cls_token=(1, 1, 4),
    )  # fmt: skip
    found = decays(params, norm_decay_mult=0.1, bias_decay_mult=0.2, dwconv_decay_mult=0.3, flat_decay_mult=0.4)
    assert found == {
        "ln/scale": 0.1, "ln/bias": 0.1, "fc/kernel": 1.0, "fc/bias": 0.2, "ls/scale": 0.4,
        "dw/kernel": 0.3, "dw/bias": 0.2, "conv/kernel": 1.0, "cls_token": 1.0,
    }  # fmt: skip
    found = decays(params, flat_decay_mult=0.0)
    assert {name for name, value in found.items() if value == 0} == {
        "ln/scale",
        "ln/bias",
        "fc/bias",
        "ls/scale",
        "dw/bias",
    }


TINY = dict(embed_dims=8, num_layers=2, num_heads=2, feedforward_channels=16)


@pytest.mark.parametrize(
    "cfg",
    [dict(type="ResNet", depth=18), dict(type="VisionTransformer", arch=TINY, layer_scale_init_value=1e-5)],
    ids=lambda cfg: cfg["type"],
)
def test_leaves_tell_the_norms_of_real_models(cfg):
    model = abstract(cfg)
    expected = {
        "/".join(map(str, (*path, leaf)))
        for path, module in nnx.iter_graph(model)
        if isinstance(module, LayerNorm | BatchNorm)
        for leaf in ("scale", "bias")
    }
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    found = flatten_dict(param_groups(params, dict(norm_decay_mult=0.0)))
    assert {"/".join(map(str, path)) for path, group in found.items() if group.decay_mult == 0} == expected != set()


def test_bias_lr_mult_spares_norms():
    params = tree(ln__scale=(4,), ln__bias=(4,), fc__kernel=(4, 4), fc__bias=(4,))
    groups = groups_of(params, bias_lr_mult=2.0)
    assert {name for name, group in groups.items() if group.lr_mult == 2.0} == {"fc/bias"}


def test_keys_that_fit_nothing_are_logged(caplog):
    with caplog.at_level(logging.INFO, logger="jaxpretrain"):
        param_groups(
            tree(fc__bias=(2,)), dict(custom_keys={"bias": dict(decay_mult=0), "cls_tokn": dict(decay_mult=0)})
        )
    assert "cls_tokn" in caplog.text and "bias" not in caplog.text


@pytest.mark.parametrize(
    "cfg, message",
    [
        (dict(norm_decay=0), "paramwise_cfg has no option 'norm_decay'. Did you mean 'norm_decay_mult'"),
        (
            dict(custom_keys={"ln": dict(decay=0)}),
            r"custom_keys\['ln'\] has no option 'decay'. Did you mean 'decay_mult'",
        ),
        (dict(custom_keys={"ln": dict(begin=-1)}), r"custom_keys\['ln'\].begin=-1 must be at least 0"),
    ],
)
def test_mistakes_are_named(cfg, message):
    with pytest.raises(ConfigError, match=message):
        param_groups(tree(fc__bias=(2,)), cfg)
