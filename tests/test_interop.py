"""The rule engine, and weights into and out of models: every mistake is named, nothing is lost on the way."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import abstract as build_abstract
from jaxpretrain.interop import InteropError, export, load_weights, read_weights, save_weights
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.interop.rules import Rule, Table, reorder, shape, stack, translate, transpose
from jaxpretrain.trainer import Trainer
from tests.tiny import tiny_config

TINY = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=24)
VIT = dict(type="VisionTransformer", arch=TINY, img_size=16, patch_size=4)
CLASSIFIER = dict(
    type="ImageClassifier", backbone=VIT, head=dict(type="VisionTransformerClsHead", num_classes=5, in_channels=16)
)
RESNET = dict(
    type="ImageClassifier",
    backbone=dict(type="ResNet", depth=18, stem_channels=4, base_channels=4),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=5, in_channels=32),
)


def abstract(cfg):
    return build_abstract(cfg)


def random_state(model, seed=0):
    """A state dict with MMPretrain's names and random numbers."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(size).astype(np.float32) if size else np.asarray(7)
        for name, size in hub.shapes(model).items()
    }


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


# Rules


def test_rules_translate_both_ways():
    table = Table(
        [
            Rule("blocks.{i}.norm.{p}", "layers.{i}.ln.{p}"),
            Rule(("b{i}.q.{p}", "b{i}.k.{p}", "b{i}.v.{p}"), "layers.{i}.qkv.{p}", stack(3)),
            Rule("stage{i+1}.{j}.bn.{bn}", "stages.{i}.{j}.bn.{bn}"),
            Rule("token", "cls", shape((-1,), (1, 1, -1))),
            Rule("conv", "kernel", transpose(1, 0)),
            Rule("merge", "merged", reorder([2, 0, 1], axis=1)),
        ],
        ignore=["position_ids$"],
    )
    rng = np.random.default_rng(0)
    theirs = {f"b{i}.{x}.weight": rng.standard_normal((4, 3)) for i in range(2) for x in "qkv"}
    theirs |= {"blocks.11.norm.bias": rng.standard_normal(3), "stage3.0.bn.running_mean": rng.standard_normal(2)}
    theirs |= {
        "token": rng.standard_normal(5),
        "conv": rng.standard_normal((2, 3)),
        "merge": rng.standard_normal((2, 3)),
    }
    result = translate(theirs | {"x.position_ids": np.arange(3), "left.over": np.zeros(1)}, table)
    assert result.ignored == ["x.position_ids"] and result.unused == ["left.over"]
    assert result.state["layers.1.qkv.weight"].shape == (12, 3)
    assert result.state["stages.2.0.bn.running_mean"] is not None
    assert result.state["cls"].shape == (1, 1, 5)
    np.testing.assert_array_equal(result.state["merged"], theirs["merge"][:, [2, 0, 1]])
    back = translate(result.state, table, inverse=True)
    assert equal(back.state, theirs) and not back.unused


def test_a_rule_of_which_a_part_is_missing_is_reported():
    table = Table([Rule(("q.{p}", "k.{p}"), "qk.{p}", stack(2))])
    result = translate({"q.weight": np.zeros(1)}, table)
    assert result.incomplete == ["q.weight needs k.weight beside it"]


# Models


@pytest.mark.parametrize("cfg", [CLASSIFIER, RESNET])
def test_weights_come_back_bit_identical(cfg, tmp_path):
    model = abstract(cfg)
    state = random_state(model)
    report = load_weights(model, state)
    assert report.layout == "mmpretrain" and not report.ignored
    assert equal(export(model), state)
    save_weights(model, tmp_path / "converted", meta=dict(model=cfg))
    again = abstract(cfg)
    assert load_weights(again, tmp_path / "converted").layout == "jaxpretrain"
    assert equal(export(again), state)


def test_counters_keep_their_type():
    model = abstract(RESNET)
    load_weights(model, random_state(model))
    assert model.backbone.bn1.num_batches_tracked.dtype == np.int32
    assert export(model)["backbone.bn1.num_batches_tracked"].dtype == np.int64


def test_prefixes_and_averaged_weights_of_mmengine():
    model = abstract(CLASSIFIER)
    state = random_state(model)
    wrapped = {f"module.{name}": array for name, array in state.items()} | {"steps": np.asarray(3)}
    report = load_weights(model, wrapped)
    assert report.ignored == ["steps"] and equal(export(model), state)
    backbone = abstract(VIT)
    load_weights(backbone, state, part="backbone")
    assert equal(export(backbone), {k.removeprefix("backbone."): v for k, v in state.items() if "head" not in k})


def test_all_leftovers_are_one_error():
    model = abstract(CLASSIFIER)
    state = random_state(model)
    state["backbone.ln1.weigth"] = state.pop("backbone.ln1.weight")
    state["backbone.cls_token"] = np.zeros((1, 1, 8), np.float32)
    with pytest.raises(InteropError) as error:
        load_weights(model, state)
    text = str(error.value)
    assert "no place for    backbone.ln1.weigth (16,)   (nearest: backbone.ln1.weight (16,))" in text
    assert "nothing for     backbone.ln1.weight (16,)" in text
    assert "another shape   backbone.cls_token: (1, 1, 8) in the file, (1, 1, 16) in the model" in text
    assert "drop=" in text


def test_another_head():
    state = random_state(abstract(CLASSIFIER))
    other = {**CLASSIFIER, "head": {**CLASSIFIER["head"], "num_classes": 3}}
    with pytest.raises(InteropError, match="reinit_head=True"):
        load_weights(abstract(other), state)
    model = abstract(other)
    report = load_weights(model, state, reinit_head=True)
    assert report.reinitialised == ["head.layers.head.bias", "head.layers.head.weight"]
    assert export(model)["head.layers.head.weight"].shape == (3, 16)
    np.testing.assert_array_equal(export(model)["backbone.cls_token"], state["backbone.cls_token"])
    # A head of the right size is taken, also with the option.
    model = abstract(CLASSIFIER)
    assert not load_weights(model, state, reinit_head=True).reinitialised
    # A file without a head.
    bare = {name: array for name, array in state.items() if not name.startswith("head.")}
    with pytest.raises(InteropError, match="The file has no such head"):
        load_weights(abstract(CLASSIFIER), bare)
    assert load_weights(abstract(CLASSIFIER), bare, reinit_head=True).reinitialised


def test_what_is_no_part_of_the_model_can_be_dropped():
    state = random_state(abstract(CLASSIFIER)) | {"neck.fc.weight": np.zeros((2, 2), np.float32)}
    with pytest.raises(InteropError, match="no place for    neck.fc.weight"):
        load_weights(abstract(CLASSIFIER), state)
    load_weights(abstract(CLASSIFIER), state, drop=["^neck"])


def test_an_abstract_model_is_never_left_with_holes():
    with pytest.raises(InteropError, match="leaves 2 arrays of an abstract model empty"):
        load_weights(abstract(CLASSIFIER), random_state(abstract(CLASSIFIER)), part="backbone")


def test_unknown_layouts_are_named():
    state = random_state(abstract(CLASSIFIER))
    with pytest.raises(InteropError, match="no layout 'tim'. Did you mean 'timm'"):
        load_weights(abstract(CLASSIFIER), state, layout="tim")
    with pytest.raises(InteropError, match="The layout 'sam' has no ResNet; layouts that have: mmpretrain"):
        load_weights(abstract(RESNET), state, layout="sam")


def test_layouts_are_recognised():
    model = abstract(CLASSIFIER)
    state = random_state(model)
    load_weights(model, state)
    timm = export(model, "timm")
    assert "blocks.1.attn.qkv.weight" in timm
    again = abstract(CLASSIFIER)
    assert load_weights(again, timm).layout == "timm"
    assert equal(export(again), state)


def test_an_existing_directory_is_not_overwritten(tmp_path):
    model = abstract(RESNET)
    load_weights(model, random_state(model))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").write_text("data")
    with pytest.raises(InteropError, match="exists already"):
        save_weights(model, tmp_path / "x")


# Images of another size


def output(model, images):
    model.eval()
    graphdef, state = nnx.split(model)
    return np.asarray(jax.jit(lambda s, x: nnx.merge(graphdef, s)(x)[-1])(state, images))


@pytest.mark.parametrize(
    "cfg",
    [
        VIT,
        {**VIT, "type": "DeiT3"},
        {**VIT, "type": "DistilledVisionTransformer", "out_type": "raw"},
        {**VIT, "type": "VisionTransformer", "num_registers": 2, "out_type": "raw"},
        {**VIT, "type": "BEiTViT", "use_rel_pos_bias": True},
        {**VIT, "type": "BEiTViT", "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "use_abs_pos_emb": True},
        {**VIT, "type": "ViTSAM", "out_channels": 8, "window_size": 2, "arch": {**TINY, "global_attn_indexes": [1]}},
    ],
    ids=lambda cfg: cfg["type"],
)
def test_positions_are_resized_on_loading(cfg):
    """A model made for 32 px with weights for 16 px gives what the model for 16 px gives for images of 32 px."""
    small, large = abstract(cfg), abstract({**cfg, "img_size": 32})
    state = {name: 0.3 * array for name, array in random_state(small).items()}
    load_weights(small, state)
    load_weights(large, state)
    assert hub.shapes(large) != hub.shapes(small)
    images = np.random.default_rng(1).standard_normal((2, 32, 32, 3)).astype(np.float32)
    wanted = output(small, images)
    assert np.abs(output(large, images) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_biases_of_swin_are_resized_on_loading():
    arch = dict(embed_dims=8, depths=[2, 2], num_heads=[2, 4])
    cfg = dict(type="SwinTransformer", arch=arch, img_size=64, window_size=4, out_indices=(1,), use_abs_pos_embed=True)
    state = random_state(abstract(cfg))
    model = abstract({**cfg, "img_size": 96, "window_size": 6})
    load_weights(model, state)
    name = "stages.0.blocks.1.attn.w_msa.relative_position_bias_table"
    small, large = state[name].reshape(7, 7, 2), export(model)[name].reshape(11, 11, 2)
    np.testing.assert_allclose(large[5, 5], small[3, 3], rtol=1e-5)  # no offset
    np.testing.assert_allclose(large[[0, -1]][:, [0, -1]], small[[0, -1]][:, [0, -1]], rtol=1e-4)  # the largest ones


def test_positions_that_fit_no_grid_are_an_error():
    state = random_state(abstract(VIT))
    state["pos_embed"] = np.zeros((1, 20, 16), np.float32)
    with pytest.raises(InteropError, match=r"another shape   backbone.pos_embed: \(1, 20, 16\)"):
        load_weights(abstract(VIT), state)


# Training


def vit_config(**fields):
    method = dict(type="Supervised", model={**CLASSIFIER, "head": {**CLASSIFIER["head"], "num_classes": 10}})
    method["model"]["backbone"] = {**VIT, "img_size": 8, "patch_size": 4}
    return tiny_config(
        method=method, max_steps=1, optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.0)), mesh=dict(data=-1), **fields
    )


def weights_after_start(config, workdir):
    workdir.mkdir()
    state, step = Trainer(config, workdir)._restore_or_init()
    assert step == 0
    return state["params"]["model"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
def test_training_starts_from_a_file(suffix, tmp_path):
    from jaxpretrain.interop import files

    config = vit_config()
    model = abstract(config.method.model.to_dict())
    state = random_state(model)
    source = tmp_path / f"weights{suffix}"
    if suffix:
        files.write(source, state)
    else:
        load_weights(model, state)
        save_weights(model, source)
    config.load_from = str(source)
    params = weights_after_start(config, tmp_path / "run")
    np.testing.assert_array_equal(params["head"]["layers"]["head"]["bias"], state["head.layers.head.bias"])
    np.testing.assert_array_equal(params["backbone"]["cls_token"], state["backbone.cls_token"])


def test_training_starts_from_a_pretrained_backbone(tmp_path):
    from jaxpretrain.interop import files

    config = vit_config()
    mae = dict(
        type="MAE",
        backbone=dict(type="MAEViT", arch=TINY, img_size=8, patch_size=4),
        neck=dict(type="MAEPretrainDecoder", decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2, patch_size=4),
        head=dict(type="MAEPretrainHead", patch_size=4, loss=dict(type="PixelReconstructionLoss", criterion="L2")),
    )
    state = random_state(abstract(mae))
    files.write(tmp_path / "mae.pth", state, meta=dict(epoch=300))
    config.method.model.backbone.init_cfg = dict(
        type="Pretrained", checkpoint=str(tmp_path / "mae.pth"), prefix="backbone."
    )
    params = weights_after_start(config, tmp_path / "run")
    np.testing.assert_array_equal(params["backbone"]["pos_embed"], state["backbone.pos_embed"])
    assert not np.asarray(params["head"]["layers"]["head"]["kernel"]).any()  # as VisionTransformerClsHead starts


def test_read_weights_changes_nothing():
    model = abstract(CLASSIFIER)
    state = random_state(model)
    del state["head.layers.head.bias"]
    report = read_weights(model, state, reinit_head=True)
    assert len(report.arrays) == len(hub.names(model))
    assert all(isinstance(v.get_value(), jax.ShapeDtypeStruct) for _, v in nnx.state(model).flat_state())
