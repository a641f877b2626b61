"""CLIP's image tower as a maker of targets (Radford et al., 2021; as used by MILAN, Hou et al., 2022, and EVA)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.models.layers import FFN, BaseModule, Conv2d, LayerNorm, MultiheadAttention, apply_layers
from jaxpretrain.models.layers.position import fit_pos_embed, resize_pos_embed
from jaxpretrain.models.vision_transformer import architecture

WEIGHTS = "https://download.openmmlab.com/mmselfsup/1.x/target_generator_ckpt/clip_vit_base_16.pth.tar"
_TEXT = {"width": 512, "layers": 12, "words": 49408, "context": 77}


class CLIPAttention(MultiheadAttention):
    """Self-attention by the names of PyTorch's, whose queries, keys and values come from one matrix."""

    state_names: ClassVar = {"kernel": "in_proj_weight", "bias": "in_proj_bias", "proj": "out_proj"}

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        super().__init__(width, num_heads, rngs=rngs)
        self.kernel: Any = self.qkv.kernel
        self.bias: Any = self.qkv.bias
        del self.qkv

    def heads(self, x: Float[Array, "b n c"]) -> tuple[Float[Array, "b n h d"], ...]:
        qkv = x @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)
        qkv = qkv.reshape(*x.shape[:2], 3, self.num_heads, self.head_dims)
        return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]

    def weights(self, x: Float[Array, "b n c"]) -> Float[Array, "b n n"]:
        """How much each token looks at each other, averaged over heads; float32 at least."""
        q, k, _ = self.heads(x)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
        return jax.nn.softmax(logits * self.scale, axis=-1).mean(axis=1)


class CLIPMLP(FFN):
    """The feed-forward half, by CLIP's names."""

    state_names: ClassVar = {"fc1": "c_fc", "fc2": "c_proj"}


class CLIPBlock(BaseModule):
    """A pre-norm block with `x * sigmoid(1.702 x)` for GELU, which OpenAI's weights were trained with."""

    state_names: ClassVar = {"ln1": "ln_1", "ln2": "ln_2"}
    drop_path_rate, deterministic = 0.0, True  # as `apply_layers` wants to know

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        self.ln1, self.ln2 = LayerNorm(width), LayerNorm(width)
        self.attn = CLIPAttention(width, num_heads, rngs=rngs)
        self.mlp = CLIPMLP(width, 4 * width, {"type": "QuickGELU"}, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"], **_: Any) -> Float[Array, "b n c"]:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class CLIPTransformer(BaseModule):
    """A stack of blocks.

    Attributes:
        scan_layers, remat: how they are run (see `apply_layers`); False and 'none' unless set.
    """

    def __init__(self, width: int, layers: int, num_heads: int, *, rngs: nnx.Rngs):
        self.scan_layers, self.remat = False, "none"
        self.resblocks = nnx.List([CLIPBlock(width, num_heads, rngs=rngs) for _ in range(layers)])

    def __call__(self, x: Float[Array, "b n c"]) -> tuple[Float[Array, "b n c"], Float[Array, "b n n"]]:
        """The last block's output, and its attention weights, averaged over heads."""
        *blocks, last = self.resblocks
        x, _ = apply_layers(blocks, x, scan_layers=self.scan_layers, remat=self.remat)
        return last(x), last.attn.weights(last.ln1(x))


class CLIPVisionTower(BaseModule):
    """CLIP's Vision Transformer, by its names. Positions are interpolated for images of another size.

    Args:
        width, layers, num_heads: of the transformer.
        img_size, patch_size: in pixels; images are square.
        out_dims: channels after the last projection, the space that images and texts share.
    """

    def __init__(
        self, width: int, layers: int, num_heads: int, img_size: int, patch_size: int, out_dims: int, *, rngs: nnx.Rngs
    ):
        self.grid = (img_size // patch_size,) * 2
        self.conv1 = Conv2d(3, width, patch_size, patch_size, bias=False, rngs=rngs)
        scale = width**-0.5

        def scaled(*shape: int) -> nnx.Param:
            return nnx.Param(scale * jax.random.normal(rngs.params(), shape))

        self.class_embedding = scaled(width)
        self.positional_embedding = scaled(self.grid[0] ** 2 + 1, width)
        self.proj = scaled(width, out_dims)
        self.ln_pre, self.ln_post = LayerNorm(width), LayerNorm(width)
        self.transformer = CLIPTransformer(width, layers, num_heads, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b n d"], Float[Array, "b n n"]]:
        x = self.conv1(x)
        grid = (x.shape[1], x.shape[2])
        positions = resize_pos_embed(self.positional_embedding[...][None], self.grid, grid)
        token = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (x.shape[0], 1, x.shape[3]))
        x = jnp.concatenate([token, x.reshape(x.shape[0], -1, x.shape[3])], axis=1) + positions.astype(x.dtype)
        x, attention = self.transformer(self.ln_pre(x))
        return self.ln_post(x) @ self.proj[...].astype(x.dtype), attention

    def adapt(self, name: str, array: np.ndarray) -> np.ndarray | None:
        """Positions for images of another size are interpolated on loading."""
        if name != "positional_embedding":
            return None
        fitting = fit_pos_embed(array[None], self.grid)
        return None if fitting is None else fitting[0]


class _Words(nnx.Module):
    def __init__(self, count: int, width: int):
        self.weight = nnx.Param(jnp.zeros((count, width)))


class CLIP(BaseModule):
    """Both towers of CLIP, by its names. The text tower makes no targets: it is there because the files have it."""

    def __init__(self, visual: CLIPVisionTower, text: Mapping[str, int] | None, *, rngs: nnx.Rngs):
        self.visual = visual
        if text is not None:
            width = text["width"]
            self.positional_embedding = nnx.Param(jnp.zeros((text["context"], width)))
            self.text_projection = nnx.Param(jnp.zeros((width, visual.proj.shape[1])))
            self.logit_scale = nnx.Param(jnp.zeros(()))
            self.transformer = CLIPTransformer(width, text["layers"], width // 64, rngs=rngs)
            self.token_embedding = _Words(text["words"], width)
            self.ln_final = LayerNorm(width)


class CLIPGenerator(BaseModule):
    """What CLIP sees in each patch, and which patches its class token looks at. Methods freeze it.

    Training loads the weights from `tokenizer_path`: MMPretrain's file `clip_vit_base_16.pth.tar`, or OpenAI's own archive
    `ViT-B-16.pt`, whichever is at hand. Without, the run stops and says what is missing.

    Args:
        tokenizer_path: the file. Recipes have the address that it comes from, as MMPretrain's do; nothing is downloaded:
            give the path of your copy (`--config.method.target_generator.tokenizer_path=FILE`).
        arch: of the image tower, as of `VisionTransformer`; its feed-forward halves are four times as wide in any case.
        img_size, patch_size: of the image tower, in pixels.
        stand_in: whether to do without CLIP: random weights, never trained, and no text tower. Such targets are a random
            function of the image: enough to try a method out, not to learn what CLIP knows.
        out_dims: channels of the features.
        text: size of the text tower in the file: width, layers, words, and context, the longest text; None for none.
        init_cfg: `dict(type='Pretrained', checkpoint=...)`, another way to name the file.

    Attributes:
        released_weights: which file training needs (see `interop.starting_weights`); None for a stand-in.
    """

    released_weights: str | None = (
        f"clip_vit_base_16.pth.tar, CLIP ViT-B/16, from {WEIGHTS}, or OpenAI's own ViT-B-16.pt (addresses are in "
        "https://github.com/openai/CLIP/blob/main/clip/clip.py)"
    )

    def __init__(
        self,
        tokenizer_path: str | None = None,
        arch: str | Mapping[str, int] = "base",
        img_size: int = 224,
        patch_size: int = 16,
        stand_in: bool = False,
        out_dims: int = 512,
        text: Mapping[str, int] | None = _TEXT,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        size = architecture(arch, owner="CLIPGenerator")
        width, layers, heads = size["embed_dims"], size["num_layers"], size["num_heads"]
        self.out_dims = out_dims
        if stand_in:
            self.released_weights = None
        else:
            self.init_cfg = init_cfg or dict(type="Pretrained", checkpoint=tokenizer_path)
        visual = CLIPVisionTower(width, layers, heads, img_size, patch_size, out_dims, rngs=rngs)
        self.tokenizer = CLIP(visual, None if stand_in else text, rngs=rngs)

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Nothing: weights are loaded, or those of a stand-in are random from the start."""

    def __call__(self, x: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b n d"], Float[Array, "b n n"]]:
        """Features of all tokens, class token first, in the space of texts; and the last layer's attention weights.

        Row 0 of the latter is how much the class token looks at each token: they add up to 1.
        """
        return jax.lax.stop_gradient(self.tokenizer.visual(x))
