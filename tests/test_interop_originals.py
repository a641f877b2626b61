"""The layouts of the papers' own releases, against golden files made with their code."""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import abstract
from jaxpretrain.interop import InteropError, export, files, load_weights
from jaxpretrain.models.necks import GlobalAveragePooling
from tests import foreign, interop_cases
from tests.foreign import Case, Run

TINY = dict(embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=24)
SMALL = dict(img_size=16, patch_size=4)
LAYERS4 = dict(embed_dims=16, num_layers=4, num_heads=2, feedforward_channels=32)
CLIP = dict(SMALL, type="VisionTransformer", pre_norm=True, norm_cfg=dict(type="LN", eps=1e-5))
SWIN = dict(img_size=32, patch_size=2, window_size=4, out_indices=(1,))
NOISE = np.random.Generator(np.random.PCG64(1)).random((2, 16)).astype(np.float32)


def vit(**kwargs: Any) -> dict[str, Any]:
    return dict(type="VisionTransformer", arch=TINY) | SMALL | kwargs


def classifier(backbone: Mapping[str, Any], head: str = "VisionTransformerClsHead", **kwargs: Any) -> dict[str, Any]:
    head_cfg = dict(type=head, num_classes=5, in_channels=kwargs.pop("in_channels", 16))
    return dict(type="ImageClassifier", backbone=backbone, head=head_cfg, **kwargs)


def resnet(**kwargs: Any) -> dict[str, Any]:
    return dict(type="ResNet", depth=18, stem_channels=8, base_channels=4, out_indices=(0, 1, 2, 3)) | kwargs


def blocks(prefix: str = "", count: int = 3) -> dict[str, Callable[[Run], Any]]:
    return {f"blocks.{i}": (lambda run, i=i: run.found[f"{prefix}layers.{i}.out"]) for i in range(count)}


def last(run: Run) -> Any:
    return run.result[-1]


def logits(run: Run) -> Any:
    return run.result


def nchw(get: Callable[[Run], Any]) -> Callable[[Run], Any]:
    return lambda run: get(run).transpose(0, 3, 1, 2)


def names(golden: str, pattern: str) -> frozenset[str]:
    return frozenset(name for name in foreign.state(golden) if re.search(pattern, name))


MAPS: dict[str, Callable[[Run], Any]] = {f"layer{i + 1}": nchw(lambda run, i=i: run.result[i]) for i in range(4)}
MOCO_MAPS = MAPS | {"pool": lambda run: GlobalAveragePooling()(last(run))[:, :, None, None]}
DINO_MAPS = MAPS | {"out": lambda run: GlobalAveragePooling()(last(run))}


def run_mae(model: Any, x: jax.Array) -> Any:
    latent, mask, ids = model.backbone(x, noise=jnp.asarray(NOISE))
    pred = model.neck(latent, ids)
    return dict(loss=model.head.loss(pred, x, mask), pred=pred, mask=mask)


def run_mocov3(model: Any, x: jax.Array) -> Any:
    (projection,) = model.neck(model.backbone(x))
    (target,) = model.momentum_encoder(x)
    return dict(projection=projection, prediction=model.head.predictor(projection), target=target)


def result(name: str) -> Callable[[Run], Any]:
    return lambda run: run.result[name]


def mae() -> dict[str, Any]:
    neck = dict(type="MAEPretrainDecoder", patch_size=4, decoder_embed_dim=8, decoder_depth=2, decoder_num_heads=2)
    loss = dict(type="PixelReconstructionLoss", criterion="L2")
    return dict(
        type="MAE",
        backbone=dict(type="MAEViT", arch=TINY, mask_ratio=0.5, **SMALL),
        neck=dict(neck, mlp_ratio=1.5),
        head=dict(type="MAEPretrainHead", norm_pix=True, patch_size=4, loss=loss),
    )


def moco() -> dict[str, Any]:
    backbone = resnet(depth=50, out_indices=(3,))
    neck = dict(type="MoCoV2Neck", in_channels=128, hid_channels=128, out_channels=6)
    head = dict(type="ContrastiveHead", loss=dict(type="CrossEntropyLoss"))
    return dict(type="MoCo", queue_len=16, feat_dim=6, backbone=backbone, neck=neck, head=head)


def mocov3(backbone: Mapping[str, Any], width: int, layers: int, last_bn: bool, pool: bool) -> dict[str, Any]:
    def mlp(ins: int, num_layers: int, last_bn: bool, pool: bool) -> dict[str, Any]:
        cfg = dict(type="NonLinearNeck", in_channels=ins, hid_channels=10, out_channels=6, num_layers=num_layers)
        return cfg | dict(
            with_bias=False, with_last_bn=last_bn, with_last_bn_affine=False, with_last_bias=False, with_avg_pool=pool
        )

    head = dict(type="MoCoV3Head", predictor=mlp(6, 2, last_bn, False), loss=dict(type="CrossEntropyLoss"))
    return dict(type="MoCoV3", backbone=backbone, neck=mlp(width, layers, True, pool), head=head)


def swin(version: int) -> dict[str, Any]:
    arch: dict[str, Any] = dict(embed_dims=8, depths=[2, 2], num_heads=[2, 4])
    backbone = dict(SWIN, type="SwinTransformer", arch=arch, use_abs_pos_embed=True)
    if version == 2:
        arch["extra_norm_every_n_blocks"] = 0
        backbone = dict(SWIN, type="SwinTransformerV2", arch=arch, pretrained_window_sizes=(2, 2))
    return classifier(backbone, "LinearClsHead", neck=dict(type="GlobalAveragePooling"))


def swin_outputs() -> dict[str, Callable[[Run], Any]]:
    def block(i: int, j: int) -> Callable[[Run], Any]:
        return lambda run: run.found[f"backbone.stages.{i}.blocks.{j}.out"].reshape(2, -1, 8 * (i + 1))

    return {f"stages.{i}.blocks.{j}": block(i, j) for i in range(2) for j in range(2)} | {"out": logits}


DISTILLED = dict(type="DistilledVisionTransformer", arch=TINY, **SMALL)
BEIT = dict(type="BEiTViT", arch=TINY, **SMALL)
EVA01 = dict(BEIT, layer_scale_init_value=0.0, use_abs_pos_emb=True, use_rel_pos_bias=False, out_type="avg_featmap")
EVA02 = dict(
    type="ViTEVA02",
    arch=dict(embed_dims=24, num_layers=3, num_heads=3, feedforward_channels=64),
    norm_cfg=dict(type="LN", eps=1e-6),
    rope="eva02",
    out_type="avg_featmap",
    final_norm=False,
    **SMALL,
)
DINOV2 = dict(type="VisionTransformer", arch=LAYERS4, layer_scale_init_value=1e-5, out_type="raw", **SMALL)
CLASSES = blocks("backbone.") | {"out": logits}
BARE = blocks() | {"out": last}

CASES = [
    Case("original_deit_distilled", "deit", classifier(DISTILLED, "DeiTClsHead"), CLASSES, recognised="timm"),
    Case("original_deit3", "deit", classifier(dict(type="DeiT3", arch=TINY, ffn_norm="ln2", **SMALL)), CLASSES),
    Case("original_dino", "dino", vit(), BARE, recognised="timm"),
    Case(
        "original_dino_student",
        "dino",
        vit(),
        BARE,
        names("original_dino_student", r"^module\.head"),
        bare="module.backbone.",
    ),
    Case("original_dino_resnet", "dino", resnet(), DINO_MAPS, names("original_dino_resnet", "^head"), bare="backbone."),
    Case("original_dinov2", "dinov2", DINOV2, blocks(count=4) | {"out": last}, frozenset({"mask_token"})),
    Case(
        "original_dinov2_giant",
        "dinov2",
        DINOV2 | dict(num_registers=4, layer_cfgs=dict(ffn_type="swiglu_fused")),
        blocks(count=4) | {"out": last},
        frozenset({"mask_token"}),
    ),
    Case(
        "original_mae",
        "mae",
        mae(),
        {n: result(n) for n in ("loss", "pred", "mask")} | blocks("backbone."),
        call=run_mae,
    ),
    Case(
        "original_mae_finetune",
        "mae",
        classifier(vit(out_type="avg_featmap", final_norm=False), "LinearClsHead"),
        CLASSES,
        recognised="timm",
    ),
    Case(
        "original_moco_v1",
        "moco",
        resnet(),
        MOCO_MAPS,
        names("original_moco_v1", "q.fc|encoder_k|queue"),
    ),
    Case("original_moco_v2", "moco", moco(), {"projection": last}, call=lambda model, x: model.neck(model.backbone(x))),
    Case(
        "original_mocov3_vit",
        "mocov3",
        mocov3(dict(type="MoCoV3ViT", arch=TINY, **SMALL), 16, 3, last_bn=True, pool=False),
        {name: result(name) for name in ("projection", "prediction", "target")},
        call=run_mocov3,
    ),
    Case(
        "original_mocov3_resnet",
        "mocov3",
        mocov3(resnet(out_indices=(3,)), 32, 2, last_bn=False, pool=True),
        {name: result(name) for name in ("projection", "prediction", "target")},
        call=run_mocov3,
    ),
    Case(
        "original_beit",
        "beit",
        classifier(BEIT | dict(out_type="avg_featmap"), "LinearClsHead"),
        CLASSES,
        recognised="timm",
    ),
    Case(
        "original_beitv2_pretrain",
        "beit",
        BEIT | dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True, final_norm=True, out_type="raw"),
        BARE,
        names("original_beitv2_pretrain", "^(mask_token|lm_head|cls_pt)"),
    ),
    Case("original_eva01", "eva", classifier(EVA01, "LinearClsHead"), CLASSES, recognised="timm"),
    Case(
        "original_eva01_large",
        "eva",
        classifier(EVA01 | dict(layer_cfgs=dict(bias=True)), "LinearClsHead"),
        CLASSES,
        recognised="timm",
    ),
    Case("original_eva02_tiny", "eva", classifier(EVA02, "LinearClsHead", in_channels=24), CLASSES),
    Case("original_eva02_base", "eva", classifier(EVA02 | dict(sub_ln=True), "LinearClsHead", in_channels=24), CLASSES),
    Case(
        "original_clip",
        "clip",
        dict(
            CLIP,
            arch=dict(embed_dims=64, num_layers=3, num_heads=1, feedforward_channels=256),
            layer_cfgs=dict(act_cfg=dict(type="QuickGELU")),
        ),
        BARE,
        names("original_clip", r"^(?!visual\.)|visual\.proj$"),
    ),
    Case(
        "original_openclip",
        "clip",
        dict(
            CLIP,
            arch=dict(embed_dims=64, num_layers=3, num_heads=2, feedforward_channels=96),
            layer_scale_init_value=0.1,
        ),
        BARE,
        names("original_openclip", r"^(?!visual\.)|visual\.proj$"),
    ),
    Case(
        "original_sam",
        "sam",
        dict(
            type="ViTSAM",
            arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=24, global_attn_indexes=[1]),
            img_size=32,
            patch_size=4,
            window_size=3,
            out_channels=8,
        ),
        blocks(count=2) | {"out": nchw(last)},
        names("original_sam", r"^(?!image_encoder\.)"),
    ),
    *(
        Case(f"original_{name}", "swin", swin(version), swin_outputs(), names(f"original_{name}", "attn_mask"))
        for version, name in ((1, "swin"), (2, "swinv2"))
    ),
]


@pytest.mark.parametrize("case", CASES, ids=repr)
class TestTiny(interop_cases.Tiny):
    checks = foreign


# What comes in other forms, and what does not fit.


def golden_pair(golden: str) -> tuple[Any, dict[str, np.ndarray]]:
    case = next(case for case in CASES if case.golden == golden)
    return case, foreign.state(golden)


def assert_same_weights(model: Any, other: Any) -> None:
    for (path, ours), (_, wanted) in zip(nnx.state(model).flat_state(), nnx.state(other).flat_state(), strict=True):
        np.testing.assert_array_equal(ours[...], wanted[...], str(path))


def test_blocks_of_a_dinov2_training_are_numbered_twice():
    case = Case(
        "original_dinov2_teacher",
        "dinov2",
        DINOV2,
        blocks(count=4) | {"out": last},
        names("original_dinov2_teacher", "mask_token|^(dino|ibot)_head"),
    )
    assert "backbone.blocks.1.2.norm1.weight" in foreign.state(case.golden)
    foreign.check_outputs(case)
    foreign.check_recognised(case)


def test_of_a_dino_training_checkpoint_the_teacher_is_taken(tmp_path):
    torch = pytest.importorskip("torch")
    case, student = golden_pair("original_dino_student")
    student = {name: torch.from_numpy(array.copy()) for name, array in student.items()}
    teacher = {name.removeprefix("module."): 2 * array for name, array in student.items()}
    torch.save(dict(student=student, teacher=teacher, epoch=3), tmp_path / "checkpoint.pth")
    model = foreign.abstract(case)
    assert load_weights(model, tmp_path / "checkpoint.pth").layout == "dino"
    np.testing.assert_array_equal(model.cls_token[...], 2 * foreign.loaded(case).cls_token[...])
    load_weights(model, tmp_path / "checkpoint.pth", key="student")
    assert_same_weights(model, foreign.loaded(case))


@pytest.mark.parametrize(
    ("golden", "layout", "backbone", "begins"),
    [
        ("original_mae", "mae", dict(type="MAEViT", arch=TINY, **SMALL), ""),
        ("original_moco_v2", "moco", resnet(depth=50), "module.encoder_q."),
        ("original_mocov3_vit", "mocov3", dict(type="MoCoV3ViT", arch=TINY, **SMALL), "module.base_encoder."),
        ("original_mocov3_resnet", "mocov3", resnet(), "module.base_encoder."),
    ],
)
def test_the_encoder_alone(golden, layout, backbone, begins):
    encoder = abstract(backbone)
    assert load_weights(encoder, foreign.state(golden)).layout == layout
    case, state = golden_pair(golden)
    assert_same_weights(encoder, foreign.loaded(case).backbone)
    exported = export(encoder, layout)
    assert all(name.startswith(begins) for name in exported)
    for name, array in exported.items():
        np.testing.assert_array_equal(array, state[name])


def test_other_activation_other_numbers():
    """OpenAI's weights with GELU: what a user gets who does not read the module's first lines."""
    case, state = golden_pair("original_clip")
    model = abstract({**case.model, "layer_cfgs": {}})
    load_weights(model, state, layout="clip")
    (other,) = foreign.run(case, model, foreign.images(case)).result
    difference = np.abs(other - foreign.observed(case).result[0]).max()
    assert 1e-4 < difference < 0.3


@pytest.mark.parametrize(
    ("golden", "change"),
    [
        ("original_eva02_tiny", dict(rope="mmpretrain")),
        ("original_swinv2", dict(pretrained_window_sizes=(0, 0))),
    ],
)
def test_tables_of_other_settings_are_an_error(golden, change):
    case, state = golden_pair(golden)
    cfg = {**case.model, "backbone": {**case.model["backbone"], **change}}
    model = abstract(cfg)
    with pytest.raises(InteropError, match="another table"):
        load_weights(model, state, layout=case.layout)


def test_a_key_bias_has_no_place_in_eva02():
    case, state = golden_pair("original_eva02_tiny")
    model = foreign.abstract(case)
    load_weights(model, state)
    bias = model.backbone.layers[0].attn.qkv.bias
    bias.set_value(bias[...].at[30].set(1.0))
    with pytest.raises(InteropError, match="no bias for keys"):
        export(model, "eva")


@pytest.mark.parametrize(
    ("layout", "kind"),
    [("clip", "DeiT3"), ("dino", "ViTSAM"), ("mae", "DistilledVisionTransformer"), ("moco", "ResNetV1d")],
)
def test_models_that_no_release_has_are_refused(layout, kind):
    args = dict(depth=18) if kind == "ResNetV1d" else dict(arch=TINY | dict(global_attn_indexes=[1]))
    model = abstract(dict(type=kind, **args))
    with pytest.raises(InteropError, match=f"{layout!r} has no {kind}"):
        export(model, layout)


# TorchScript archives, which OpenAI's CLIP comes in.


def torchscript(path: Any, state: Mapping[str, np.ndarray]) -> None:
    """Writes an archive whose modules have the given tensors."""
    torch = pytest.importorskip("torch")

    class Module(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x + 1

    root = Module()
    for name, array in state.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, Module())
            module = module.get_submodule(parent)
        module.register_buffer(leaf, torch.from_numpy(array.copy()))
    torch.jit.save(torch.jit.trace(root, torch.zeros(2)), path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_clip_comes_as_a_program_and_is_read_without_running_it(tmp_path):
    case, state = golden_pair("original_clip")
    half = {name: array.astype(np.float16) if name.endswith("conv1.weight") else array for name, array in state.items()}
    torchscript(tmp_path / "ViT-B-32.pt", half)
    found = files.read(tmp_path / "ViT-B-32.pt")
    assert set(found) == set(half)
    for name, array in found.items():
        assert array.dtype == half[name].dtype and array.shape == half[name].shape
        np.testing.assert_array_equal(array, half[name])
    model = foreign.abstract(case)
    assert load_weights(model, tmp_path / "ViT-B-32.pt").layout == "clip"
    np.testing.assert_array_equal(model.pos_embed[...][0], state["visual.positional_embedding"])


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def network(stride: int = 1, kind: str = "FloatStorage") -> bytes:
    """A pickle, as TorchScript writes it, of one module with a tensor `weight` of two numbers."""
    storage = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text("0") + text("cpu") + b"K\x02tQ"
    sizes = b"K\x00(K\x02t(J" + struct.pack("<i", stride) + b"t"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + sizes + b"\x89NtR"
    return b"\x80\x02c__torch__.net\nNet\n)\x81}" + text("weight") + tensor + b"sb."


def archive(path: Any, pickled: bytes, constants: str = "x/constants.pkl") -> Any:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickled)
        file.writestr(constants, b"")
        file.writestr("x/data/0", np.asarray([1, 2], np.float32).tobytes())
    return path


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"cbuiltins\nprint\n(" + text("executed") + b"tR.", "refused: it names builtins.print"),
        (b"cos\nsystem\n(" + text("echo executed") + b"tR.", "refused: it names os.system"),
        (network(stride=10**6), "reaches out of 2 numbers"),
        (network(stride=-1), "reaches out of 2 numbers"),
        (network(kind="DoubleStorage"), "has not 2 numbers"),
        (network()[:60], "damaged"),
        (b"\x80\x02c__torch__.net\nNet\n)\x81q\x00}" + text("me") + b"h\x00sb.", "damaged"),  # a module in itself
    ],
)
def test_archives_that_are_more_than_modules_and_tensors_are_refused(pickled, message, tmp_path, capfd):
    with pytest.raises(InteropError, match=message):
        files.read(archive(tmp_path / "bad.pt", pickled))
    assert "executed" not in capfd.readouterr().out
    found = files.read(archive(tmp_path / "good.pt", network()))
    np.testing.assert_array_equal(found["weight"], [1, 2])
