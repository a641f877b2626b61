"""ConvMixer: Patches Are All You Need? (Trockman & Kolter, 2022, https://arxiv.org/abs/2201.09792)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.arch import architecture, output_indices
from jaxpretrain.models.layers.base import BaseModule, freeze_stage
from jaxpretrain.models.layers.conv import Conv2d
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.stack import apply_block


class ConvActNorm(BaseModule):
    """norm(act(conv(x))): in this order, with the norm last."""

    state_names: ClassVar = {"conv": "0", "norm": "2"}

    def __init__(self, conv: Conv2d, norm_cfg: Mapping[str, Any], act_cfg: Mapping[str, Any], *, rngs: nnx.Rngs):
        self.conv, self.act = conv, activation(act_cfg)
        self.norm = build_norm(norm_cfg, conv.kernel.shape[-1], rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        return self.norm(self.act(self.conv(x)))


class ConvMixerLayer(BaseModule):
    """x + depthwise(x) mixes positions, a pointwise convolution then mixes channels.

    Args:
        channels: channels of input and output.
        kernel_size: of the depthwise convolution.
        norm_cfg, act_cfg: norms and activations, behind both convolutions.
    """

    state_names: ClassVar = {"depthwise": "0.fn", "pointwise": "1", "norm": "3"}

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        norm_cfg: Mapping[str, Any],
        act_cfg: Mapping[str, Any],
        *,
        rngs: nnx.Rngs,
    ):
        depthwise = Conv2d(channels, channels, kernel_size, padding="same", groups=channels, rngs=rngs)
        self.depthwise = ConvActNorm(depthwise, norm_cfg, act_cfg, rngs=rngs)
        self.pointwise = Conv2d(channels, channels, 1, rngs=rngs)
        self.act = activation(act_cfg)
        self.norm = build_norm(norm_cfg, channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w c"]:
        return self.norm(self.act(self.pointwise(x + self.depthwise(x))))


class ConvMixer(BaseModule):
    """ConvMixer, for images of any size: [B, H, W, in_channels] -> a tuple of [B, H/p, W/p, C] maps.

    Args:
        arch: '768/32', '1024/20' or '1536/20' (channels / layers); or a dict with embed_dims, depth, patch_size and
            kernel_size.
        in_channels: channels of the images.
        norm_cfg, act_cfg: norms and activations. The weights of '768/32' were trained with ReLU.
        out_indices: the layers whose outputs are returned, from 0; negative ones count from the end.
        frozen_stages: how many first layers do not learn; 0 for none. The stem learns always, as in MMPretrain.
        init_cfg: initialisation (see `BaseModule`).

    Attributes:
        remat: what the backward pass recomputes: 'none', 'full' (all within a layer), 'dots' (all but convolutions).

    Raises:
        ConfigError: an unknown name, or layers that do not exist.
    """

    archs: ClassVar[dict[tuple[str, ...], dict[str, Any]]] = {
        ("768/32",): dict(embed_dims=768, depth=32, patch_size=7, kernel_size=7),
        ("1024/20",): dict(embed_dims=1024, depth=20, patch_size=14, kernel_size=9),
        ("1536/20",): dict(embed_dims=1536, depth=20, patch_size=7, kernel_size=9),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "768/32",
        in_channels: int = 3,
        norm_cfg: Mapping[str, Any] = {"type": "BN"},
        act_cfg: Mapping[str, Any] = {"type": "GELU"},
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = 0,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        size = architecture(arch, self.archs, "ConvMixer")
        width, depth, patch = size["embed_dims"], size["depth"], size["patch_size"]
        self.init_cfg, self.remat = init_cfg, "none"
        self.out_indices = output_indices(out_indices, depth, "ConvMixer")
        self.stem = ConvActNorm(Conv2d(in_channels, width, patch, patch, rngs=rngs), norm_cfg, act_cfg, rngs=rngs)
        self.stages = nnx.List(
            ConvMixerLayer(width, size["kernel_size"], norm_cfg, act_cfg, rngs=rngs) for _ in range(depth)
        )
        if not 0 <= frozen_stages <= depth:
            raise ConfigError(f"ConvMixer: frozen_stages is 0 (none) to {depth}, not {frozen_stages}")
        for layer in self.stages[:frozen_stages]:
            freeze_stage(layer)

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c2"], ...]:
        """The maps of the layers in `out_indices`, in order. Nothing is drawn from `rngs`."""
        x = self.stem(x)
        outputs = []
        for i, layer in enumerate(self.stages):
            x = apply_block(layer, x, rngs=rngs, remat=self.remat)
            if i in self.out_indices:
                outputs.append(x)
        return tuple(outputs)
