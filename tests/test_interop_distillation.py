"""Training checkpoints of DINO, iBOT, DINOv2 and VICReg: names as the releases have them, numbers made up."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import abstract
from jaxpretrain.interop import InteropError, export, files, load_weights
from jaxpretrain.interop import mmpretrain as hub
from tests import foreign
from tests.method_cases import CASES

State = dict[str, np.ndarray]
VIT = dict(arch=dict(embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=24), img_size=16, patch_size=4)
HEAD = dict(in_channels=16, out_channels=20, hidden_channels=12, bottleneck_channels=8)


def method(kind: str, backbone: Any, neck: Any, **head: Any) -> Any:
    head = dict(type=f"{kind}Head", out_channels=20, **head)
    model = abstract(dict(type=kind, backbone=backbone, neck=dict(neck, type=f"{kind}Neck"), head=head))
    return model


def dino() -> Any:
    return method("DINO", dict(type="VisionTransformer", **VIT), HEAD)


def dino_file() -> State:
    """Student behind DistributedDataParallel, teacher bare, and the loss: a golden student, and twice its numbers."""
    student = foreign.state("original_dino_student")
    teacher = {f"teacher.{n.removeprefix('module.')}": 2 * a for n, a in student.items()}
    center = np.linspace(0, 1, 20, dtype=np.float32)[None]
    return {f"student.{n}": a for n, a in student.items()} | teacher | {"dino_loss.center": center}


def ibot_file(shared: bool) -> State:
    state = dino_file()
    for who, factor in (("student.module.", 1), ("teacher.", 2)):
        state[who + "backbone.masked_embed"] = factor * np.full((1, 16), 0.5, np.float32)
        for part in ("weight_g", "weight_v"):
            one = state[f"{who}head.last_layer.{part}"]
            state[f"{who}head.last_layer2.{part}"] = one if shared else -one[:14]
    state["ibot_loss.center"] = state.pop("dino_loss.center")
    state["ibot_loss.center2"] = np.linspace(1, 2, 20 if shared else 14, dtype=np.float32)[None, None]
    return state


def ibot(shared: bool) -> Any:
    neck = dict(HEAD, shared_head=shared, patch_out_channels=14)
    more = {} if shared else dict(patch_out_channels=14)
    return method("IBOT", dict(type="IBOTViT", **VIT), neck, **more)


def dinov2_teacher() -> State:
    """`teacher_checkpoint.pth`: blocks in chunks, both heads."""
    return dict(foreign.state("original_dinov2_teacher"))


def dinov2_file() -> State:
    teacher = {re.sub(r"blocks\.\d+\.(\d+)", r"blocks.\1", n): a for n, a in dinov2_teacher().items()}
    state = {f"student.{n}": a / 2 for n, a in teacher.items()} | {f"teacher.{n}": a for n, a in teacher.items()}
    state["dino_loss.center"] = np.linspace(0, 1, 20, dtype=np.float32)[None]
    return state | {"ibot_patch_loss.center": np.linspace(1, 2, 20, dtype=np.float32)[None, None]}


def dinov2() -> Any:
    layers = dict(VIT["arch"], num_layers=4, feedforward_channels=32)
    backbone = dict(type="IBOTViT", **dict(VIT, arch=layers), layer_scale_init_value=1e-5)
    head = {name: value for name, value in HEAD.items() if name != "in_channels"}
    return method("DINOv2", backbone, dict(in_channels=16, dino_head=head, ibot_head=head))


FULL = {
    "dino": (dino, dino_file),
    "ibot": (lambda: ibot(True), lambda: ibot_file(True)),
    "ibot-apart": (lambda: ibot(False), lambda: ibot_file(False)),
    "dinov2": (dinov2, dinov2_file),
}


@pytest.mark.parametrize("name", FULL)
def test_training_checkpoints_come_in_whole_and_go_out_the_same(name):
    build, made = FULL[name]
    model, state = build(), made()
    report = load_weights(model, state)
    assert report.layout == name.split("-")[0] and not report.ignored
    assert model.momentum_encoder.steps == 0
    teacher = model.momentum_encoder.module[0]
    key = "student.module.backbone.cls_token" if name != "dinov2" else "student.backbone.cls_token"
    np.testing.assert_array_equal(model.backbone.cls_token[...], state[key])
    np.testing.assert_array_equal(teacher.cls_token[...], 2 * model.backbone.cls_token[...])
    np.testing.assert_array_equal(model.head.center[0], np.linspace(0, 1, 20, dtype=np.float32))
    exported = export(model, report.layout)
    assert exported.keys() == state.keys()
    for key, array in exported.items():
        np.testing.assert_array_equal(array, state[key], key)


@pytest.mark.parametrize("name", FULL)
def test_one_unknown_name_is_an_error(name):
    build, made = FULL[name]
    state = made()
    state["student.module.head.mlp.0.weights"] = state.pop(next(n for n in state if n.endswith("mlp.0.weight")))
    with pytest.raises(InteropError, match=r"no place for.*mlp.0.weights"):
        load_weights(build(), state, layout=name.split("-")[0])


@pytest.mark.parametrize("name", FULL)
def test_both_networks_start_from_a_teacher_alone(name):
    build, made = FULL[name]
    state = {n.removeprefix("teacher."): a for n, a in made().items() if n.startswith("teacher.")}
    model = build()
    assert load_weights(model, state).layout == name.split("-")[0]
    online = nnx.state(nnx.List([model.backbone, model.neck])).flat_state()
    teacher = dict(nnx.state(model.momentum_encoder.module).flat_state())
    for path, variable in online:
        np.testing.assert_array_equal(variable[...], teacher[path][...], str(path))
    assert not model.head.center[...].any() and model.momentum_encoder.steps == 0


def test_teachers_of_dinov2_have_blocks_in_chunks():
    model = dinov2()
    assert load_weights(model, dinov2_teacher()).layout == "dinov2"
    np.testing.assert_array_equal(
        model.backbone.layers[2].ln1.scale[...], dinov2_teacher()["backbone.blocks.1.2.norm1.weight"]
    )


def test_students_and_teachers_of_several_gpus():
    """ResNets are wrapped on both sides, for their BatchNorms."""
    golden = {n: a for n, a in foreign.state("original_dino_resnet").items() if not n.startswith("module.")}
    state = {f"{who}.module.{n}": a for who in ("student", "teacher") for n, a in golden.items()}
    backbone = dict(type="ResNet", depth=18, stem_channels=8, base_channels=4)
    neck = dict(in_channels=32, out_channels=20, hidden_channels=12, bottleneck_channels=8, num_layers=2)
    model = method("DINO", backbone, neck)
    load_weights(model, state, layout="dino")
    np.testing.assert_array_equal(model.momentum_encoder.module[0].bn1.var[...], golden["backbone.bn1.running_var"])


def test_files_are_read_whole_on_demand(tmp_path):
    torch = pytest.importorskip("torch")
    state = dino_file()
    nested: dict[str, Any] = dict(epoch=3, optimizer=dict(state={0: dict(exp_avg=torch.zeros(3))}, param_groups=[]))
    for name, array in state.items():
        part, _, inner = name.partition(".")
        nested.setdefault(part, {})[inner] = torch.from_numpy(array.copy())
    torch.save(nested, tmp_path / "checkpoint.pth")
    assert files.read(tmp_path / "checkpoint.pth", "*").keys() == state.keys()
    model = dino()
    load_weights(model, tmp_path / "checkpoint.pth", key="*")
    np.testing.assert_array_equal(
        model.momentum_encoder.module[1].last_layer.kernel[...], 2 * state["student.module.head.last_layer.weight_v"].T
    )
    np.testing.assert_array_equal(model.neck.last_layer.scale[...], state["student.module.head.last_layer.weight_g"])
    load_weights(model, tmp_path / "checkpoint.pth")  # the teacher, for both
    np.testing.assert_array_equal(model.backbone.cls_token[...], state["teacher.backbone.cls_token"])


def test_heads_that_are_not_shared_are_refused_where_one_is_expected():
    with pytest.raises(InteropError, match="heads of their own"):
        load_weights(ibot(True), ibot_file(False), layout="ibot")


def test_bare_backbones():
    state = {n.removeprefix("student.module."): a for n, a in ibot_file(True).items() if n.startswith("student.")}
    plain, masked = abstract(dict(type="VisionTransformer", **VIT)), abstract(dict(type="IBOTViT", **VIT))
    report = load_weights(plain, state, layout="ibot")
    assert "masked_embed" in report.ignored
    load_weights(masked, state, layout="ibot")
    np.testing.assert_array_equal(masked.mask_token[...], np.full((1, 16), 0.5))
    np.testing.assert_array_equal(masked.cls_token[...], plain.cls_token[...])


# VICReg


def vicreg() -> Any:
    config = CASES["vicreg"].config
    return abstract(
        dict(
            config,
            backbone=dict(type="ResNet", depth=18, stem_channels=8, base_channels=4),
            neck=dict(config["neck"], in_channels=32, num_layers=3),
        )
    )


def test_vicreg_training_checkpoint():
    model = vicreg()
    names = export(filled(model), "vicreg")
    expected = {f"module.projector.{i}.{p}" for i in (0, 3) for p in ("weight", "bias")} | {"module.projector.6.weight"}
    running = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected |= {f"module.projector.{i}.{name}" for i in (1, 4) for name in running}
    assert {n for n in names if "projector" in n} == expected
    assert "module.backbone.layer4.1.bn2.running_var" in names
    other = vicreg()
    assert load_weights(other, names).layout == "vicreg"
    for (path, ours), (_, wanted) in zip(nnx.state(other).flat_state(), nnx.state(model).flat_state(), strict=True):
        np.testing.assert_array_equal(ours[...], wanted[...], str(path))
    encoder = abstract(dict(type="ResNet", depth=18, stem_channels=8, base_channels=4))
    assert load_weights(encoder, names).layout == "vicreg"


def filled(model: Any) -> Any:
    rng = np.random.default_rng(0)
    shapes = {path: v.shape for path, v in nnx.state(model).flat_state()}
    hub.fill(model, {path: np.asarray(rng.integers(1, 99, shape), np.float32) for path, shape in shapes.items()})
    return model


# Our own names


@pytest.mark.parametrize("name", ["dino_vit", "dino_resnet", "ibot", "ibot_two_heads", "dinov2", "vicreg"])
def test_round_trip_through_mmpretrains_names(name):
    model = filled(abstract(CASES[name].config))
    state = hub.to_state_dict(model)
    other = abstract(CASES[name].config)
    hub.fill(other, hub.from_state_dict(other, {n: a for n, a in state.items() if n not in hub.derived(model)}))
    for (path, ours), (_, wanted) in zip(nnx.state(other).flat_state(), nnx.state(model).flat_state(), strict=True):
        np.testing.assert_array_equal(ours[...], wanted[...], str(path))
    if name == "dino_vit":
        assert state["neck.last_layer.weight_v"].shape == (24, 8)
        assert state["momentum_encoder.module.1.last_layer.weight_g"].shape == (24, 1)
        assert state["neck.mlp.4.weight"].shape == (8, 16)
    loaded = abstract(CASES[name].config)
    assert load_weights(loaded, state).layout == "mmpretrain"
