"""MLP-Mixer: An all-MLP Architecture for Vision (Tolstikhin et al., 2021, https://arxiv.org/abs/2105.01601)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.arch import architecture, output_indices
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.drop import drop_path
from jaxpretrain.models.layers.ffn import FFN
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.patch_embed import PatchEmbed, to_2tuple
from jaxpretrain.models.layers.stack import apply_layers


class MixerBlock(BaseModule):
    """x + token_mix(ln1(x)^T)^T, then x + channel_mix(ln2(x)).

    Args:
        num_tokens: tokens of an image.
        embed_dims: channels of the tokens.
        tokens_mlp_dims, channels_mlp_dims: hidden channels of the two perceptrons.
        drop_rate: dropout in both.
        drop_path_rate: probability of dropping a branch of a sample.
        num_fcs: accepted for MMPretrain's settings; must be 2.
        act_cfg, norm_cfg: activations and norms.
    """

    def __init__(
        self,
        num_tokens: int,
        embed_dims: int,
        tokens_mlp_dims: int,
        channels_mlp_dims: int,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_fcs: int = 2,
        act_cfg: Mapping[str, Any] = {"type": "GELU"},
        norm_cfg: Mapping[str, Any] = {"type": "LN"},
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        if num_fcs != 2:
            raise ConfigError(f"MixerBlock: num_fcs={num_fcs}, but a perceptron has 2 layers")
        self.init_cfg, self.drop_path_rate, self.deterministic = init_cfg, float(drop_path_rate), False
        self.ln1 = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.token_mix = FFN(num_tokens, tokens_mlp_dims, act_cfg, drop_rate, rngs=rngs)
        self.ln2 = build_norm(norm_cfg, embed_dims, rngs=rngs)
        self.channel_mix = FFN(embed_dims, channels_mlp_dims, act_cfg, drop_rate, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n c"], *, rngs: nnx.Rngs | None = None, drop_path_rate: float | Array | None = None
    ) -> Float[Array, "b n c"]:
        """`drop_path_rate` replaces the block's own; it may be traced (see `apply_layers`)."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        mixed = self.token_mix(self.ln1(x).swapaxes(1, 2), rngs=rngs).swapaxes(1, 2)
        x = x + drop_path(mixed, rate, rngs)
        return x + drop_path(self.channel_mix(self.ln2(x), rngs=rngs), rate, rngs)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Besides `init_cfg`: Glorot-uniform kernels and biases of N(0, 1e-6) in both perceptrons."""
        super().init_weights(rngs)
        for ffn in (self.token_mix, self.channel_mix):
            for layer in (ffn.fc1, ffn.fc2):
                layer.kernel.set_value(initializers.xavier_uniform()(rngs.params(), layer.kernel.shape))
                assert layer.bias is not None
                layer.bias.set_value(1e-6 * jax.random.normal(rngs.params(), layer.bias.shape))


class MlpMixer(BaseModule):
    """MLP-Mixer, for images of one size: [B, H, W, in_channels] -> a tuple of tokens, [B, N, C] each.

    (MMPretrain has them as [B, C, N].)

    Args:
        arch: 'small', 'base' or 'large' (s, b, l); or a dict with embed_dims, num_layers, tokens_mlp_dims and
            channels_mlp_dims.
        img_size: size of the images, one number or (height, width).
        patch_size: pixels per patch, one number or (height, width).
        out_indices: the layers whose outputs are returned, from 0; negative ones count from the end. The last layer's is
            normalised.
        drop_rate: dropout in all perceptrons.
        drop_path_rate: stochastic depth, of every layer alike.
        norm_cfg, act_cfg: norms and activations.
        patch_cfg: further arguments of `PatchEmbed`.
        layer_cfgs: further arguments of `MixerBlock`: one dict for all, or one for each layer.
        init_cfg: initialisation (see `BaseModule`).

    Attributes:
        scan_layers, remat: how the layers are run (see `apply_layers`); False and 'none' unless set.

    Raises:
        ConfigError: an unknown name, or arguments that do not fit together.
        ValueError: in the call, for images of another size.
    """

    archs: ClassVar[dict[tuple[str, ...], dict[str, Any]]] = {
        ("s", "small"): dict(embed_dims=512, num_layers=8, tokens_mlp_dims=256, channels_mlp_dims=2048),
        ("b", "base"): dict(embed_dims=768, num_layers=12, tokens_mlp_dims=384, channels_mlp_dims=3072),
        ("l", "large"): dict(embed_dims=1024, num_layers=24, tokens_mlp_dims=512, channels_mlp_dims=4096),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "base",
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        out_indices: int | Sequence[int] = -1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_cfg: Mapping[str, Any] = {"type": "LN"},
        act_cfg: Mapping[str, Any] = {"type": "GELU"},
        patch_cfg: Mapping[str, Any] = {},
        layer_cfgs: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {},
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        size = architecture(arch, self.archs, "MlpMixer")
        width, self.num_layers = size["embed_dims"], size["num_layers"]
        self.img_size, self.init_cfg = to_2tuple(img_size), init_cfg
        self.out_indices = output_indices(out_indices, self.num_layers, "MlpMixer")
        self.scan_layers, self.remat = False, "none"
        patches: dict[str, Any] = {"embed_dims": width, "kernel_size": patch_size, "input_size": img_size, **patch_cfg}
        self.patch_embed = PatchEmbed(**patches, rngs=rngs)
        self.patch_resolution = self.patch_embed.init_out_size

        cfgs = [layer_cfgs] * self.num_layers if isinstance(layer_cfgs, Mapping) else list(layer_cfgs)
        if len(cfgs) != self.num_layers:
            raise ConfigError(f"MlpMixer: {len(cfgs)} layer_cfgs for {self.num_layers} layers")
        shared: dict[str, Any] = {"num_tokens": int(np.prod(self.patch_resolution)), "embed_dims": width}
        shared |= {key: size[key] for key in ("tokens_mlp_dims", "channels_mlp_dims")}
        shared |= {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate, "act_cfg": act_cfg, "norm_cfg": norm_cfg}
        self.layers = nnx.List(MixerBlock(**{**shared, **cfg}, rngs=rngs) for cfg in cfgs)
        self.ln1 = build_norm(norm_cfg, width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b n d"], ...]:
        """The tokens behind the chosen layers; `rngs` is for dropout and drop path in training."""
        if x.shape[1:3] != self.img_size:
            raise ValueError(
                f"MlpMixer: it mixes the patches of images of {self.img_size} pixels, so it cannot take {x.shape[1:3]}; "
                "resize them, or build it with another img_size"
            )
        x, _ = self.patch_embed(x)
        x, outputs = apply_layers(
            self.layers,
            x,
            rngs=rngs,
            scan_layers=self.scan_layers,
            remat=self.remat,
            out_indices=self.out_indices,
        )
        if self.num_layers - 1 in outputs:
            outputs[self.num_layers - 1] = self.ln1(x)
        return tuple(outputs.values())
