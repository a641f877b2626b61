"""The layout of Hugging Face transformers: against golden files, and against the library itself where it is installed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain.build import abstract, build
from jaxpretrain.interop import InteropError, export, load_weights
from tests import foreign, interop_cases
from tests.foreign import Case, Run
from tests.parity import TOLERANCE

TINY = dict(embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=24)
EPS12 = dict(type="LN", eps=1e-12)
CLIP = dict(arch=TINY, img_size=16, patch_size=4, pre_norm=True, norm_cfg=dict(type="LN", eps=1e-5), out_type="raw")
DINOV2 = dict(arch=TINY | dict(feedforward_channels=32), img_size=16, patch_size=4, layer_scale_init_value=1.0)
SWIN = dict(
    arch=dict(embed_dims=8, depths=[2, 2], num_heads=[2, 4], extra_norm_every_n_blocks=0),
    img_size=32,
    patch_size=2,
    window_size=4,
    out_indices=(1,),
    drop_path_rate=0.0,
)
SAM = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=24, global_attn_indexes=[1])
NOISE = np.random.Generator(np.random.PCG64(1)).random((2, 16)).astype(np.float32)


def vit(**kwargs: Any) -> dict[str, Any]:
    return dict(type="VisionTransformer", arch=TINY, img_size=16, patch_size=4) | kwargs


def classifier(backbone: Mapping[str, Any], head: str = "VisionTransformerClsHead", **kwargs: Any) -> dict[str, Any]:
    width = kwargs.pop("in_channels", 16)
    return dict(
        type="ImageClassifier", backbone=backbone, head=dict(type=head, num_classes=5, in_channels=width), **kwargs
    )


# Where ours are what transformers calls hidden states and attentions.


def found(path: str) -> Callable[[Run], Any]:
    return lambda run: run.found[path]


def layers(prefix: str = "", count: int = 3) -> dict[str, Callable[[Run], Any]]:
    states = {f"hidden_states.{i + 1}": found(f"{prefix}layers.{i}.out") for i in range(count)}
    return states | {f"attentions.{i}": found(f"{prefix}layers.{i}.attn.weights") for i in range(count)}


def tokens(run: Run) -> Any:
    """The input of the first layer."""
    backbone = getattr(run.model, "backbone", run.model)
    x = backbone.add_cls_token(backbone.embed(run.x)[0])
    return x if backbone.pre_norm is None else backbone.pre_norm(x)


def last(run: Run) -> Any:
    return run.result[-1]


def nchw(get: Callable[[Run], Any]) -> Callable[[Run], Any]:
    return lambda run: get(run).transpose(0, 3, 1, 2)


def flat(get: Callable[[Run], Any]) -> Callable[[Run], Any]:
    return lambda run: get(run).reshape(get(run).shape[0], -1, get(run).shape[-1])


def logits(run: Run) -> Any:
    return run.result


IN_CLASSIFIER = {"logits": logits, "hidden_states.0": tokens, **layers("backbone.")}
BARE = {"last_hidden_state": last, "hidden_states.0": tokens, **layers()}


def two_part_logits(run: Run) -> Any:
    """DINOv2's classifier looks at the class token and the mean patch."""
    (x,) = run.model.backbone(run.x)
    return run.model.head.fc(jnp.concatenate([x[:, 0], x[:, 1:].mean(axis=1)], axis=1))


def one_token_logits(run: Run) -> Any:
    ((cls_token, _),) = run.model.backbone(run.x)
    return run.model.head.layers.head(cls_token)


def swin_outputs(version: int) -> dict[str, Callable[[Run], Any]]:
    def merged_patches(run: Run) -> Any:
        stages = run.model.backbone.stages
        return stages[version - 1].downsample(run.found["backbone.stages.0.blocks.1.out"])

    # Per stage, transformers gives the attention of its last block.
    get: dict[str, Callable[[Run], Any]] = {
        "hidden_states.0": lambda run: run.model.backbone.embed(run.x),
        "hidden_states.1": merged_patches,
        "hidden_states.2": found("backbone.stages.1.blocks.1.out"),
    }
    maps = {f"reshaped_{name}": nchw(value) for name, value in get.items()}
    states = {name: flat(value) for name, value in get.items()}
    attention = {f"attentions.{i}": found(f"backbone.stages.{i}.blocks.1.attn.w_msa.weights") for i in range(2)}
    return {"logits": logits, **states, **maps, **attention}


def resnet_outputs() -> dict[str, Callable[[Run], Any]]:
    def stage(index: int) -> Callable[[Run], Any]:
        return nchw(lambda run: run.result[index])

    return {f"hidden_states.{i + 1}": stage(i) for i in range(4)} | {"logits": lambda run: run.result[-1]}


def run_resnet(model: Any, x: jax.Array) -> Any:
    maps = model.backbone(x)
    return (*maps, model.head(model.neck(maps)))


def run_mae(model: Any, x: jax.Array) -> Any:
    latent, mask, ids = model.backbone(x, noise=jnp.asarray(NOISE))
    pred = model.neck(latent, ids)
    return model.head.loss(pred, x, mask), pred, mask, ids


def resnet(depth: int, base: int) -> dict[str, Any]:
    backbone = dict(type="ResNet", depth=depth, stem_channels=8, base_channels=base, out_indices=(0, 1, 2, 3))
    width = 128 if depth == 50 else 64
    return classifier(backbone, "LinearClsHead", in_channels=width, neck=dict(type="GlobalAveragePooling"))


def names(golden: str, pattern: str) -> frozenset[str]:
    return frozenset(name for name in foreign.state(golden) if re.search(pattern, name))


DEIT = dict(type="DistilledVisionTransformer", arch=TINY, img_size=16, patch_size=4, norm_cfg=EPS12)
BEIT = dict(type="BEiTViT", arch=TINY, img_size=16, patch_size=4, norm_cfg=EPS12)
MASK_TOKEN = frozenset({"embeddings.mask_token"})

CASES = [
    Case("hf_vit", "hf", classifier(vit(norm_cfg=EPS12)), IN_CLASSIFIER),
    Case("hf_vit_model", "hf", vit(norm_cfg=EPS12, out_type="raw"), BARE, names("hf_vit_model", "pooler")),
    Case(
        "hf_deit", "hf", classifier(DEIT), IN_CLASSIFIER | {"logits": one_token_logits}, call=lambda m, x: m.backbone(x)
    ),
    Case("hf_deit_distilled", "hf", classifier(DEIT, "DeiTClsHead"), IN_CLASSIFIER),
    Case("hf_beit", "hf", classifier(BEIT | dict(out_type="avg_featmap"), "LinearClsHead"), IN_CLASSIFIER),
    Case(
        "hf_beit_shared",
        "hf",
        BEIT
        | dict(
            use_abs_pos_emb=True, use_rel_pos_bias=False, use_shared_rel_pos_bias=True, final_norm=True, out_type="raw"
        ),
        layers(),
        names("hf_beit_shared", "lm_head|mask_token"),
        bare="beit.",
    ),
    Case(
        "hf_swin",
        "hf",
        classifier(dict(type="SwinTransformer") | SWIN, "LinearClsHead", neck=dict(type="GlobalAveragePooling")),
        swin_outputs(1),
    ),
    Case(
        "hf_swinv2",
        "hf",
        classifier(
            dict(type="SwinTransformerV2", pretrained_window_sizes=(0, 0)) | SWIN,
            "LinearClsHead",
            neck=dict(type="GlobalAveragePooling"),
        ),
        swin_outputs(2),
    ),
    Case(
        "hf_dinov2",
        "hf",
        classifier(vit(**DINOV2, out_type="raw"), "LinearClsHead", in_channels=32),
        {"logits": two_part_logits, "hidden_states.0": tokens, **layers("backbone.")},
        frozenset({"dinov2.embeddings.mask_token"}),
        call=lambda model, x: model.backbone(x),
    ),
    Case(
        "hf_dinov2_giant",
        "hf",
        vit(**DINOV2, layer_cfgs=dict(ffn_type="swiglu_fused"), out_type="raw"),
        BARE | {"pooler_output": lambda run: last(run)[:, 0]},
        MASK_TOKEN,
    ),
    Case(
        "hf_dinov2_registers",
        "hf",
        vit(**DINOV2, num_registers=4, out_type="raw"),
        BARE | {"pooler_output": lambda run: last(run)[:, 0]},
        MASK_TOKEN,
    ),
    Case("hf_resnet", "hf", resnet(50, 4), resnet_outputs(), call=run_resnet),
    Case("hf_resnet_basic", "hf", resnet(18, 8), resnet_outputs(), call=run_resnet),
    Case(
        "hf_clip_vision",
        "hf",
        vit(**CLIP, layer_cfgs=dict(act_cfg=dict(type="QuickGELU"))),
        layers() | {"hidden_states.0": tokens, "pooler_output": lambda run: last(run)[:, 0]},
    ),
    Case(
        "hf_clip",
        "hf",
        vit(**CLIP),
        layers() | {"hidden_states.0": tokens, "pooler_output": lambda run: last(run)[:, 0]},
        names("hf_clip", "^text|visual_projection|logit_scale"),
    ),
    Case(
        "hf_mae",
        "hf",
        dict(
            type="MAE",
            backbone=dict(type="MAEViT", arch=TINY, img_size=16, patch_size=4, mask_ratio=0.5, norm_cfg=EPS12),
            neck=dict(
                type="MAEPretrainDecoder",
                patch_size=4,
                decoder_embed_dim=8,
                decoder_depth=2,
                decoder_num_heads=2,
                norm_cfg=EPS12,
            ),
            head=dict(
                type="MAEPretrainHead",
                norm_pix=True,
                patch_size=4,
                loss=dict(type="PixelReconstructionLoss", criterion="L2"),
            ),
        ),
        {
            **layers("backbone."),
            "loss": lambda run: run.result[0],
            "logits": lambda run: run.result[1],
            "mask": lambda run: run.result[2],
            "ids_restore": lambda run: run.result[3],
        },
        call=run_mae,
    ),
    Case(
        "hf_sam",
        "hf",
        dict(type="ViTSAM", arch=SAM, img_size=32, patch_size=4, window_size=3, out_channels=8),
        {
            "last_hidden_state": nchw(last),
            "hidden_states.0": lambda run: run.model.embed(run.x)[0],
            "hidden_states.1": found("layers.0.out"),
            "hidden_states.2": found("layers.1.out"),
            **{f"attentions.{i}": (lambda run, i=i: merged(run.found[f"layers.{i}.attn.weights"])) for i in range(2)},
        },
        names("hf_sam", "^(shared_image_embedding|prompt_encoder|mask_decoder)"),
    ),
]


def merged(attention: Any) -> Any:
    return attention.reshape(-1, *attention.shape[2:])


every = pytest.mark.parametrize("case", CASES, ids=repr)


@every
class TestTiny(interop_cases.Tiny):
    checks = foreign


def in_memory(golden: str) -> dict[str, np.ndarray]:
    """The golden weights by the names that `model.state_dict()` has in transformers 5."""
    renamed = {}
    for name, _, other in foreign.load(golden)["manifest"]:
        array = foreign.state(golden)[name]
        if other is None:  # one tensor in the file, two in memory
            gate, up = (name.replace("weights_in", part) for part in ("gate_proj", "up_proj"))
            renamed |= dict(zip((gate, up), np.split(array, 2), strict=True))
        else:
            renamed[other] = array
    return {
        name.replace("weights_in", "x").replace("attention.attention", "attention"): v for name, v in renamed.items()
    }


@every
def test_names_in_memory_are_taken_too(case):
    model = foreign.abstract(case)
    report = load_weights(model, in_memory(case.golden))
    assert report.layout == "hf"
    for (path, ours), (_, wanted) in zip(
        nnx.state(model).flat_state(), nnx.state(foreign.loaded(case)).flat_state(), strict=True
    ):
        np.testing.assert_array_equal(ours[...], wanted[...], str(path))


def test_decoder_as_transformers_5_saves_it():
    case = next(case for case in CASES if case.golden == "hf_mae")
    state = {
        n.replace("decoder.decoder_layers.", "decoder.decoder_encoder.layer."): v
        for n, v in foreign.state("hf_mae").items()
    }
    assert load_weights(foreign.abstract(case), state, layout="hf").layout == "hf"


def test_encoder_of_mae_alone():
    backbone = dict(type="MAEViT", arch=TINY, img_size=16, patch_size=4, norm_cfg=EPS12)
    encoder = abstract(backbone)
    report = load_weights(encoder, foreign.state("hf_mae"), layout="hf")
    assert all(name.startswith("decoder.") for name in report.ignored)
    names = {n.removeprefix("vit.") for n in foreign.state("hf_mae") if n.startswith("vit.")}
    exported = export(encoder, "hf")
    assert set(exported) == names
    for name, array in exported.items():
        np.testing.assert_array_equal(array, foreign.state("hf_mae")[f"vit.{name}"])


@pytest.mark.parametrize("kind", ["DeiT3", "ViTEVA02", "ResNetV1d"])
def test_models_that_transformers_has_not_are_refused(kind):
    args = dict(depth=18) if kind.startswith("ResNet") else dict(arch="s" if kind == "DeiT3" else "t")
    model = abstract(dict(type=kind, **args))
    with pytest.raises(InteropError, match=f"'hf' has no {kind}"):
        export(model, "hf")


def test_a_hidden_layer_in_the_head_has_no_place():
    head = dict(type="VisionTransformerClsHead", num_classes=5, in_channels=16, hidden_dim=8)
    cfg = dict(type="ImageClassifier", backbone=vit(), head=head)
    with pytest.raises(InteropError, match=r"no place for\n  head.layers.pre_logits"):
        export(build(cfg, rngs=nnx.Rngs(0)), "hf")


# transformers itself, where it is installed.


def tensors(output: Any) -> dict[str, np.ndarray]:
    """All that a model of transformers gives, hidden states and attentions with numbers behind their names."""
    flat = {}
    for name, value in output.items():
        several = isinstance(value, tuple | list)
        flat |= {f"{name}.{i}": v for i, v in enumerate(value)} if several else {name: value}
    return {name: value.detach().numpy() for name, value in flat.items() if hasattr(value, "detach")}


def run_transformers(transformers: Any, golden: dict[str, Any], directory: Any, x: jax.Array) -> dict[str, np.ndarray]:
    """Reads a directory as a user of transformers would, and runs the images through the part that is ours."""
    import torch

    kind = getattr(transformers, golden["model"])
    model, info = kind.from_pretrained(directory, attn_implementation="eager", output_loading_info=True)
    left_out = (
        "mask_token",
        "pooler",
        "text_",
        "projection",
        "logit_scale",
        "lm_head",
        "prompt_encoder",
        "mask_decoder",
    )
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not [name for name in info["missing_keys"] if not any(part in name for part in (*left_out, "shared_"))]
    model.eval()
    part = {"CLIPModel": "vision_model", "SamModel": "vision_encoder"}.get(golden["model"])
    options = dict(output_hidden_states=True)
    options |= {} if "ResNet" in golden["model"] else dict(output_attentions=True)
    options |= dict(noise=torch.from_numpy(NOISE)) if "MAE" in golden["model"] else {}
    with torch.no_grad():
        images = torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())
        return tensors((getattr(model, part) if part else model)(images, **options))


@every
def test_transformers_reads_our_export_and_gives_the_same(case, tmp_path):
    """Random weights, not the golden ones; all hidden states, attentions and logits, in full."""
    transformers = pytest.importorskip("transformers")
    from jaxpretrain.interop import files
    from tests.test_layers_transformer import filled

    golden = foreign.load(case.golden)
    model = filled(lambda: build(case.model, rngs=nnx.Rngs(0)))
    model.eval()
    getattr(transformers, golden["config_class"])(**golden["config"]).save_pretrained(tmp_path)
    files.write(tmp_path / "model.safetensors", export(model, "hf"))
    x = foreign.images(case)
    theirs = run_transformers(transformers, golden, tmp_path, x)
    ours = foreign.run(case, model, x)
    compared = {name for name in case.outputs if name in theirs}
    # The embeddings of masked images, the pooler that we leave out, and visual tokens' logits are not ours.
    other = {"pooler_output"} | ({"hidden_states.0"} if "resnet" in case.golden or "mae" in case.golden else set())
    other |= {"logits", "hidden_states.0"} if case.golden == "hf_beit_shared" else set()
    other |= {"cls_logits", "distillation_logits"} | ({"last_hidden_state"} if "clip" in case.golden else set())
    assert set(theirs) - compared <= other, set(theirs) - compared
    for name in compared:
        scale = np.abs(theirs[name]).max()
        np.testing.assert_allclose(case.outputs[name](ours) / scale, theirs[name] / scale, atol=TOLERANCE, err_msg=name)
