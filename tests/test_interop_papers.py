"""Layouts of the papers' own releases, and timm's of the same networks: tiny models of theirs against golden files.

Golden files are made by running timm 1.0.31 and the releases at github.com/facebookresearch/mvit, SlowFast and pycls,
Meituan-AutoML/Twins, dingmyu/davit, pengzhiliang/Conformer, yitu-opensource/T2T-ViT, mmaaz60/EdgeNeXt, apple/ml-cvnets and
ml-mobileone, locuslab/convmixer, DingXiaoH/RepVGG, google-research/vision_transformer (with the exact GELU) and
HRNet/HRNet-Image-Classification (names alone).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import abstract
from jaxpretrain.interop import InteropError, export, files, fitting, load_weights
from jaxpretrain.interop import mmpretrain as hub
from jaxpretrain.interop.rules import translate
from tests import interop_cases
from tests.backbone_cases.efficient import CASES as SMALL
from tests.interop_cases import GAP, Case, assert_identical, classifier, load, loaded, state
from tests.parity import TOLERANCE, reference_input
from tests.test_layers_transformer import quick_jit
from tests.test_resnet import random

TNT = dict(type="TNT", img_size=32, patch_size=8)
TNT_ARCH = dict(embed_dims_outer=16, embed_dims_inner=8, num_layers=2, num_heads_outer=2, num_heads_inner=2)
TWINS_ARCH = dict(
    depths=[2, 2],
    embed_dims=[8, 16],
    num_heads=[2, 2],
    patch_sizes=[4, 2],
    strides=[4, 2],
    mlp_ratios=[2, 2],
    sr_ratios=[2, 1],
)
TWINS = dict(qkv_bias=True, norm_after_stage=[False, True], out_indices=(1,))
PCPVT = classifier(dict(type="PCPVT", arch=TWINS_ARCH, **TWINS), 16, neck=GAP)
SVT = classifier(dict(type="SVT", arch=TWINS_ARCH | dict(window_sizes=[4, 4]), **TWINS), 16, neck=GAP)
MVIT_ARCH = dict(embed_dims=8, num_layers=3, num_heads=1, downscale_indices=[1])
MVIT = classifier(dict(type="MViT", arch=MVIT_ARCH, img_size=32), 16, neck=GAP)
DAVIT_ARCH = dict(embed_dims=8, depths=[1, 2], num_heads=[2, 2])
DAVIT = classifier(dict(type="DaViT", arch=DAVIT_ARCH, window_size=4, out_indices=(1,)), 16, neck=GAP)
T2T = dict(
    type="T2T_ViT",
    img_size=32,
    embed_dims=16,
    num_layers=2,
    t2t_cfg=dict(token_dims=8),
    layer_cfgs=dict(num_heads=2, feedforward_channels=32, qk_scale=16**-0.5),
    attention="paper",
)
REVVIT_ARCH = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=64)
REVVIT = dict(type="RevVisionTransformer", arch=REVVIT_ARCH, img_size=32, patch_size=8)
EDGENEXT = dict(
    type="EdgeNeXt",
    arch=dict(channels=[8, 16, 24, 32], depths=[1, 1, 1, 2], num_heads=[2, 2, 2, 4]),
    conv_kernel_sizes=[7, 7, 7, 7],
)
MOBILEVIT = dict(
    type="MobileViT",
    arch=[
        ["mobilenetv2", 8, 1, 1, 2],
        ["mobilenetv2", 12, 2, 2, 2],
        ["mobilevit", 16, 2, 24, 32, 2, 2],
        ["mobilevit", 16, 2, 24, 32, 1, 2],
        ["mobilevit", 16, 2, 24, 32, 1, 2],
    ],
)
CONVMIXER_ARCH = dict(embed_dims=16, depth=2, patch_size=4, kernel_size=5)
CONVMIXER = dict(type="ConvMixer", arch=CONVMIXER_ARCH, act_cfg=dict(type="GELU"))
REGNET = dict(
    type="RegNet",
    arch=dict(w0=8, wa=5.0, wm=2.0, group_w=8, depth=3, bot_mul=1.0),
    out_indices=(1,),
    strides=(2, 2),
    dilations=(1, 1),
)
VIT = dict(type="VisionTransformer", img_size=32, patch_size=8)
VIT_ARCH = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
MIXER = dict(type="MlpMixer", img_size=32, patch_size=8, norm_cfg=dict(type="LN", eps=1e-6))
MIXER_ARCH = dict(embed_dims=16, num_layers=2, tokens_mlp_dims=8, channels_mlp_dims=64)
SE = dict(ratio=16, divisor=1)
WIDTHS = (0.25, 0.125, 0.0625, 0.0625)
REPVGG_ARCH = dict(num_blocks=(1, 2, 1, 1), width_factor=WIDTHS, group_layer_map=None, se_cfg=SE)
MOBILEONE_ARCH = dict(
    num_blocks=(1, 1, 2, 1), width_factor=WIDTHS, num_conv_branches=(2, 2, 2, 2), num_se_blocks=(0, 0, 1, 1)
)


def deployable(kind: str, deploy: bool, **args: Any) -> dict[str, Any]:
    """A classifier with RepVGG or MobileOne."""
    return classifier(dict(type=kind, deploy=deploy, **args), 32, neck=GAP)


def twins(layout: str, name: str, ours: dict[str, Any]) -> Case:
    return Case(layout, name, {}, ours, size=64, recognised="timm")  # the release's names are timm's


CASES = [
    Case("timm.models.tnt.TNT", "tnt", dict(legacy=True), classifier(TNT | dict(arch=TNT_ARCH), 16)),
    Case("timm.models.twins.Twins", "pcpvt", {}, PCPVT, size=64),
    Case("timm.models.twins.Twins", "svt", {}, SVT, size=64),
    Case("timm.models.mvitv2.MultiScaleVit", "mvitv2", {}, MVIT),
    # Golden logits have the norm before the pooling, and images padded, as MMPretrain has them.
    Case("timm.models.davit.DaVit", "davit", {}, DAVIT),
    Case("davit.DaViT", "davit", {}, DAVIT),
    Case("mvit.MViT", "mvitv2", {}, MVIT),
    twins("twins.CPVTV2", "pcpvt", PCPVT),
    twins("twins.ALTGVT", "svt", SVT),
    Case("t2t.T2T_ViT", "t2t", dict(tokens_type="transformer"), classifier(T2T, 16)),
    Case("slowfast.MViT", "revvit", {}, classifier(REVVIT, 32)),
    # Golden logits are with our `eps` of norms.
    Case("edgenext.EdgeNeXt", "edgenext", {}, classifier(EDGENEXT, 32), size=64),
    Case("cvnets.MobileViT", "mobilevit", {}, classifier(MOBILEVIT, 64, neck=GAP), size=64),
    Case("convmixer.ConvMixer", "convmixer", {}, classifier(CONVMIXER, 16, neck=GAP)),
    Case("pycls.AnyNet", "regnet", {}, classifier(REGNET, 16, neck=GAP), size=64),
    *(
        Case("repvgg.RepVGG", form, {}, deployable("RepVGG", deploy, arch=REPVGG_ARCH), size=64)
        for form, deploy in (("train", False), ("deploy", True))
    ),
    *(
        Case("mobileone.MobileOne", form, {}, deployable("MobileOne", deploy, arch=MOBILEONE_ARCH, se_cfg=SE), size=64)
        for form, deploy in (("train", False), ("deploy", True))
    ),
]
GOOGLE = [
    Case(
        "vit_jax.VisionTransformer",
        "vit",
        {},
        classifier(VIT | dict(arch=VIT_ARCH), 16, "VisionTransformerClsHead", hidden_dim=12),
    ),
    Case("vit_jax.MlpMixer", "mixer", {}, classifier(MIXER | dict(arch=MIXER_ARCH), 16, neck=GAP | dict(dim=1))),
]
CONFORMER = Case(
    "conformer.Conformer",
    "conformer",
    {},
    classifier(
        dict(
            type="Conformer",
            arch=dict(embed_dims=16, channel_ratio=1, num_heads=2, depths=3),
            base_channels=16,
        ),
        [64, 16],  # type: ignore[arg-type]
        "ConformerHead",
    ),
    size=64,
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.layout}-{case.name}")
class TestTiny(interop_cases.Tiny):
    pass


def test_conformer() -> None:
    """Of its two classifiers, both logits."""
    golden = load("conformer_conformer")
    graphdef, weights = nnx.split(loaded(CONFORMER))
    x = jnp.asarray(reference_input(tuple(golden["input_shape"])))
    ours = np.stack(quick_jit(lambda weights, x: nnx.merge(graphdef, weights)(x))(weights, x))
    wanted = np.asarray(golden["output"])
    assert np.abs(ours - wanted).max() <= TOLERANCE * np.abs(wanted).max()
    interop_cases.check_recognised(CONFORMER)
    interop_cases.check_export(CONFORMER)
    interop_cases.check_renamed(CONFORMER)


def test_hrnet() -> None:
    channels = [4, 8, 16, 32]
    names = ("num_modules", "num_branches", "block", "num_blocks", "num_channels")
    stages: list[tuple[Any, ...]] = [(1, 1, "BOTTLENECK", (1,), (4,))]
    stages += [(1, n, "BASIC", (1,) * n, tuple(channels[:n])) for n in (2, 3, 4)]
    extra = {f"stage{i}": dict(zip(names, stage, strict=True)) for i, stage in enumerate(stages, 1)}
    neck = [dict(type="HRFuseScales", in_channels=channels), GAP]
    ours = classifier(dict(type="HRNet", extra=extra), 2048, neck=neck, num_classes=1000)
    interop_cases.check_state("hrnet", load("hrnet_hrnet")["keys"], ours)


@pytest.mark.parametrize("case", GOOGLE, ids=lambda case: case.name)
def test_google(case: Case) -> None:
    interop_cases.check_outputs(case)
    interop_cases.check_recognised(case)
    interop_cases.check_export(case)


def test_files_of_numpy(tmp_path: Path) -> None:
    """Google's weights are .npz files; what their code calls newly is found too."""
    case = GOOGLE[0]
    path = tmp_path / "vit.npz"
    files.write(path, export(loaded(case), "vit_jax"))
    model = abstract(case.ours)
    assert load_weights(model, path).layout == "vit_jax"
    assert_identical(export(model), export(loaded(case)))
    newer = {"LayerNorm_2": "LayerNorm_1", "MlpBlock_3": "MlpBlock_0", "Attention_1": "Attention_0"}
    renamed = {}
    for name, array in state(case).items():
        for old, new in newer.items():
            name = name.replace(old, new)
        renamed[name] = array
    load_weights(model, renamed, layout="vit_jax")
    assert_identical(export(model), export(loaded(case)))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InteropError, match=r"vit\.npz is damaged"):
        load_weights(model, path)


def test_glip() -> None:
    """The detector's other parts are left out; returned stages have norms of their own."""
    arch = dict(embed_dims=8, depths=[1, 1, 2], num_heads=[2, 2, 2])
    cfg = dict(type="SwinTransformer", arch=arch, window_size=4, img_size=32, out_indices=(1, 2))
    full = random(cfg)
    names = export(full, "glip")
    assert {"norm1.weight", "norm2.bias", "layers.0.downsample.reduction.weight", "patch_embed.norm.bias"} <= set(names)
    file = {f"module.backbone.body.{name}": array for name, array in names.items()}
    others = ("rpn.head.scale", "backbone.fpn.fpn_inner2.weight", "language_backbone.body.model.pooler.dense.bias")
    file |= {f"module.{name}": np.zeros(1) for name in others}
    model = abstract(cfg)
    report = load_weights(model, file)
    assert report.layout == "glip" and len(report.ignored) == len(others)
    assert_identical(export(model), export(full))


def test_variables_of_tensorflow() -> None:
    """EfficientNet: names and shapes of B0, and averaged variables, which are taken where there are both."""
    shapes = hub.shapes(model := abstract(classifier(dict(type="EfficientNet", arch="b0"), 1280, neck=GAP)))
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    names = {name: v.shape for name, v in translate(zeros, fitting.table_of("tpu", model), inverse=True).state.items()}
    known = {
        "stem/conv2d/kernel": (3, 3, 3, 32),
        "stem/tpu_batch_normalization/moving_variance": (32,),
        "blocks_0/conv2d/kernel": (1, 1, 32, 16),
        "blocks_0/depthwise_conv2d/depthwise_kernel": (3, 3, 32, 1),
        "blocks_0/se/conv2d_1/kernel": (1, 1, 8, 32),
        "blocks_0/tpu_batch_normalization_1/gamma": (16,),
        "blocks_15/conv2d_1/kernel": (1, 1, 1152, 320),
        "blocks_15/tpu_batch_normalization_2/beta": (320,),
        "head/dense/kernel": (1280, 10),
    }
    assert {name: names[name] for name in known} == known
    assert len(names) == len([name for name in shapes if not name.endswith("num_batches_tracked")])

    cfg = classifier(SMALL["EfficientNet"].config, 16, neck=GAP)
    full, model = random(cfg), abstract(cfg)
    exported = export(full, "tpu")
    file = {f"efficientnet-b0/{name}": np.zeros_like(array) for name, array in exported.items()}
    file |= {f"efficientnet-b0/{name}/ExponentialMovingAverage": array for name, array in exported.items()}
    report = load_weights(model, file | {"global_step": np.zeros((), np.int64)})
    assert report.layout == "tpu" and report.ignored == ["global_step"]
    assert_identical(export(model, "tpu"), exported)
