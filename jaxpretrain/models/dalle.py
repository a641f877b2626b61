"""The encoder of DALL-E's discrete VAE (Ramesh et al., 2021): images to visual tokens, the targets of BEiT and CAE."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import Conv2d, max_pool2d, relu
from jaxpretrain.models.layers.init import constant, normal

GROUPS = 4  # of blocks; between them, pictures are halved


class DALLEConv2d(Conv2d):
    """A convolution that keeps the size, as DALL-E's release names and initialises it: `w` from N(0, 1 / fan_in)."""

    state_names: ClassVar = {"kernel": "w", "bias": "b"}

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, rngs: nnx.Rngs):
        init = normal(std=(in_channels * kernel_size**2) ** -0.5)
        args: dict[str, Any] = dict(padding=(kernel_size - 1) // 2, kernel_init=init, bias_init=constant(0.0))
        super().__init__(in_channels, out_channels, kernel_size, **args, rngs=rngs)


class EncoderBlock(BaseModule):
    """x + gain * (four convolutions, a ReLU before each): a bottleneck of a quarter of the output's channels.

    Args:
        in_channels, out_channels: if they differ, x takes a 1x1 convolution (`id_path`).
        gain: of the residual branch.
    """

    def __init__(self, in_channels: int, out_channels: int, gain: float, *, rngs: nnx.Rngs):
        hidden = out_channels // 4
        sizes = ((in_channels, hidden, 3), (hidden, hidden, 3), (hidden, hidden, 3), (hidden, out_channels, 1))
        self.gain = gain
        self.id_path = None if in_channels == out_channels else DALLEConv2d(in_channels, out_channels, 1, rngs=rngs)
        self.res_path = nnx.Dict({f"conv_{i + 1}": DALLEConv2d(*size, rngs=rngs) for i, size in enumerate(sizes)})

    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h w out"]:
        y = x
        for i in range(len(self.res_path)):
            y = self.res_path[f"conv_{i + 1}"](relu(y))
        return (x if self.id_path is None else self.id_path(x)) + self.gain * y


class DALLEEncoder(BaseModule):
    """DALL-E's encoder: logits of 8,192 visual tokens for each 8x8 pixels. MMPretrain calls it 'DALL-E'.

    Its pictures have their pixels x from 0 to 255 mapped to 0.8 x / 255 + 0.1: `second_mean=[-31.875] * 3` and
    `second_std=[318.75] * 3` of the recipes.

    Args:
        group_count: counts in the gain of the residual branches alone, as in MMPretrain; there are always four groups.
        n_hid: channels of the first group; each next one has twice as many.
        n_blk_per_group: blocks in each.
        input_channels: channels of the images.
        vocab_size: number of tokens.
        device, requires_grad: accepted for MMPretrain's configs; methods freeze their targets.
        init_cfg: `dict(type='Pretrained', checkpoint=...)` names the file of the released weights.

    Attributes:
        patch_size: pixels per token, down and across.
        num_embed: number of tokens.
        released_weights: which file training needs (see `interop.starting_weights`).
    """

    released_weights = (
        "dalle_encoder.pth, the encoder of OpenAI's DALL-E (https://github.com/openai/DALL-E), from "
        "https://download.openmmlab.com/mmselfsup/1.x/target_generator_ckpt/dalle_encoder.pth"
    )

    def __init__(
        self,
        group_count: int = 4,
        n_hid: int = 256,
        n_blk_per_group: int = 2,
        input_channels: int = 3,
        vocab_size: int = 8192,
        device: Any = None,
        requires_grad: bool = False,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.input_channels, self.num_embed = init_cfg, input_channels, vocab_size
        self.patch_size = 2 ** (GROUPS - 1)
        gain = (group_count * n_blk_per_group) ** -2
        parts: dict[str, Any] = {"input": DALLEConv2d(input_channels, n_hid, 7, rngs=rngs)}
        channels = n_hid
        for group in range(GROUPS):
            blocks = {}
            for i in range(n_blk_per_group):
                blocks[f"block_{i + 1}"] = EncoderBlock(channels, n_hid * 2**group, gain, rngs=rngs)
                channels = n_hid * 2**group
            parts[f"group_{group + 1}"] = nnx.Dict(blocks)
        parts["output"] = nnx.Dict({"conv": DALLEConv2d(channels, vocab_size, 1, rngs=rngs)})
        self.blocks = nnx.Dict(parts)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/8 w/8 tokens"]:
        """Logits, in float32 at least. Height and width should be multiples of 8.

        Raises:
            ValueError: images of another form.
        """
        if x.ndim != 4 or x.shape[-1] != self.input_channels:
            raise ValueError(f"DALL-E: expected images [batch, height, width, {self.input_channels}], got {x.shape}")
        x = self.blocks["input"](x)
        for group in range(GROUPS):
            x = max_pool2d(x, 2) if group else x
            blocks = self.blocks[f"group_{group + 1}"]
            for i in range(len(blocks)):
                x = blocks[f"block_{i + 1}"](x)
        # As in the release: in half precision, the largest of 8,192 logits would often be another.
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return self.blocks["output"]["conv"](relu(x))
