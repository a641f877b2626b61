"""Reversible Vision Transformers (Mangalam et al., 2022, https://arxiv.org/abs/2302.04869).

Each layer takes two streams of tokens, y1 = x1 + attention(x2) and y2 = x2 + ffn(y1), so its inputs follow from its
outputs: x2 = y2 - ffn(y1), x1 = y1 - attention(x2). The backward pass computes them anew, last layer first, and training
keeps the activations of one layer only, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.models.layers.drop import drop_path
from jaxpretrain.models.layers.intermediates import capturing
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.stack import apply_layers, split_layer
from jaxpretrain.models.vision_transformer import TransformerEncoderLayer, VisionTransformer

Branch = Callable[[Float[Array, "b n c"]], Float[Array, "b n c"]]

_FUSIONS: dict[str, Callable[[Array, Array], Array]] = {
    "concat": lambda a, b: jnp.concatenate([a, b], axis=-1),
    "add": jnp.add,
    "avg": lambda a, b: (a + b) / 2,
    "max": jnp.maximum,
    "min": jnp.minimum,
}


class RevTransformerEncoderLayer(TransformerEncoderLayer):
    """The layer of the module's description. A sample that skips one branch skips both.

    Args:
        args, kwargs: as of `TransformerEncoderLayer`.
        layer_id, num_fcs: accepted for MMPretrain's settings; a feed-forward half has two linear layers.
    """

    def __init__(self, *args: Any, layer_id: int = 0, num_fcs: int = 2, rngs: nnx.Rngs, **kwargs: Any):
        if num_fcs != 2:
            raise ConfigError(f"RevTransformerEncoderLayer: num_fcs={num_fcs}, but there are two linear layers")
        super().__init__(*args, **kwargs, rngs=rngs)

    def branches(
        self, rngs: nnx.Rngs | None, drop_path_rate: float | Array | None, dtype: jnp.dtype
    ) -> tuple[Branch, Branch]:
        """Both halves as functions of a stream, computed in `dtype`. All chance in them is drawn from one key of `rngs`."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        rate = 0.0 if self.deterministic else rate
        keys = [None] * 3 if rngs is None else [nnx.Rngs(dropout=key) for key in jax.random.split(rngs.dropout(), 3)]
        attn_rngs, ffn_rngs, path = keys
        path_key = None if path is None else path.dropout()

        def drop(x: Array) -> Array:
            return drop_path(x, rate, None if path_key is None else nnx.Rngs(dropout=path_key))

        def attend(x: Array) -> Array:
            return drop(self.attn(self.ln1(x.astype(dtype)), rngs=attn_rngs))

        def feed(x: Array) -> Array:
            return drop(self.ffn(self.ln2(x.astype(dtype)), rngs=ffn_rngs))

        return attend, feed

    def __call__(
        self,
        x: Float[Array, "b n 2*c"],
        *,
        rngs: nnx.Rngs | None = None,
        drop_path_rate: float | Array | None = None,
        dtype: Any = None,
    ) -> Float[Array, "b n 2*c"]:
        """Both streams, one after the other along the channels; `dtype` is that of the branches, by default their own."""
        attend, feed = self.branches(rngs, drop_path_rate, x.dtype if dtype is None else dtype)
        x1, x2 = jnp.split(x, 2, axis=-1)
        x1 = x1 + attend(x2)
        return jnp.concatenate([x1, x2 + feed(x1)], axis=-1)


def apply_reversible(
    layers: Sequence[RevTransformerEncoderLayer],
    x: Float[Array, "b n 2*c"],
    *,
    dtype: Any,
    rngs: nnx.Rngs | None = None,
    scan_layers: bool = False,
) -> Float[Array, "b n 2*c"]:
    """`apply_layers` for reversible layers, with a gradient that recomputes activations. The random draws are the same.

    Args:
        layers: the layers; neighbours that are alike (equal but for values and `drop_path_rate`) make one sequence, of
            which only the last output is kept.
        x: both streams, float32 at least: what is subtracted again must not be rounded away.
        dtype: in which the branches are computed.
        rngs: for dropout and drop path.
        scan_layers: whether each sequence is a loop over parameters stacked on the fly. In the unrolled form, the compiler
            may keep more than it must.
    """
    keys = None if rngs is None else jax.random.split(rngs.dropout(), len(layers))
    own = [layer.drop_path_rate for layer in layers]
    rates = jnp.asarray(own, jnp.float32) if any(own) else None
    parts = [(*split_layer(layer), i) for i, layer in enumerate(layers)]
    for graphdef, group in groupby(parts, key=lambda part: part[0]):
        members = list(group)
        per_layer = [
            (weights, None if keys is None else keys[i], None if rates is None else rates[i])
            for _, weights, i in members
        ]
        if scan_layers:
            per_layer = jax.tree.map(lambda *leaves: jnp.stack(leaves), *per_layer)
        x = jnp.concatenate(_sequence(graphdef, dtype)(per_layer, *jnp.split(x, 2, axis=-1)), axis=-1)
    return x


def _sequence(graphdef: nnx.GraphDef, dtype: Any) -> Callable[..., tuple[Array, Array]]:
    """The function of (weights, key and rate of each layer, both streams) that applies them, with its own gradient."""

    def half(index: int, weights: Any, x: Array, key: Array | None, rate: Array | None) -> Array:
        rngs = None if key is None else nnx.Rngs(dropout=key)
        return nnx.merge(graphdef, *weights).branches(rngs, 0.0 if rate is None else rate, dtype)[index](x)

    def attend(weights: Any, x: Array, *chance: Any) -> Array:
        return half(0, weights, x, *chance)

    def feed(weights: Any, x: Array, *chance: Any) -> Array:
        return half(1, weights, x, *chance)

    def forward(streams: tuple[Array, Array], layer: Any) -> tuple[tuple[Array, Array], None]:
        x1, x2 = streams
        y1 = x1 + attend(layer[0], x2, *layer[1:])
        return (y1, x2 + feed(layer[0], y1, *layer[1:])), None

    def backward(state: tuple[Array, ...], layer: Any) -> tuple[tuple[Array, ...], Any]:
        """From outputs and their gradients to inputs and theirs; and the gradients of the weights."""
        (y1, y2, d1, d2), (weights, *chance) = state, layer
        fed, pull = jax.vjp(lambda w, y: feed(w, y, *chance), weights, y1)
        of_feed, d = pull(d2.astype(fed.dtype))
        x2, d1 = y2 - fed, d1 + d
        attended, pull = jax.vjp(lambda w, x: attend(w, x, *chance), weights, x2)
        of_attend, d = pull(d1.astype(attended.dtype))
        return (y1 - attended, x2, d1, d2 + d), jax.tree.map(jnp.add, of_feed, of_attend)

    @jax.custom_vjp
    def run(layers: Any, x1: Array, x2: Array) -> tuple[Array, Array]:
        return _loop(forward, (x1, x2), layers)[0]

    def run_forward(layers: Any, x1: Array, x2: Array) -> tuple[tuple[Array, Array], Any]:
        streams = run(layers, x1, x2)
        return streams, (layers, streams)

    def run_backward(saved: Any, gradients: tuple[Array, Array]) -> tuple[Any, Array, Array]:
        layers, streams = saved
        (_, _, d1, d2), of_weights = _loop(backward, (*streams, *gradients), layers, reverse=True)
        # Keys and rates have no gradient.
        of_layers = (of_weights, None, None) if isinstance(layers, tuple) else [(w, None, None) for w in of_weights]
        return of_layers, d1, d2

    run.defvjp(run_forward, run_backward)
    return run


def _loop(step: Callable[..., Any], carry: Any, layers: Any, reverse: bool = False) -> tuple[Any, Any]:
    """`jax.lax.scan` over stacked layers; unrolled over a list of them."""
    if not isinstance(layers, list):
        return jax.lax.scan(step, carry, layers, reverse=reverse)
    outputs = []
    for layer in reversed(layers) if reverse else layers:
        carry, output = step(carry, layer)
        if reverse:  # so that a layer's activations are not computed before those behind it are of no more use
            carry = jax.lax.optimization_barrier(carry)
        outputs.append(output)
    return carry, outputs[::-1] if reverse else outputs


class RevVisionTransformer(VisionTransformer):
    """A Vision Transformer of reversible layers; both streams begin as the tokens, and end as twice the channels.

    In training, activations are computed anew in the backward pass. The streams are float32 at least, whatever the images
    are: rounded sums could not be undone.

    Args:
        arch: as of `VisionTransformer`: small, base, large, huge, deit-tiny, deit-small, deit-base, or a dict.
        out_type: as of `VisionTransformer`; 'avg_featmap' is the mean of the patches.
        final_norm: whether both streams together are normalised.
        with_cls_token: whether there is a class token.
        fusion_mode: what is made of the two streams: 'concat', 'add', 'avg', 'max' or 'min'.
        no_custom_backward: whether to keep all activations as other networks do.
        kwargs: other arguments of `VisionTransformer`, but for `out_indices`: only the last layer's output is to be had.

    Attributes:
        scan_layers: whether the layers are a loop, which keeps memory and compile time from growing with depth.
        remat: as of `apply_layers`, for the form with `no_custom_backward`.
    """

    archs: ClassVar = {
        names: numbers
        for names, numbers in VisionTransformer.archs.items()
        if names[0] in ("s", "b", "l", "h") or names[0].startswith("deit-")
    }
    layer_type: ClassVar = RevTransformerEncoderLayer

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "base",
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_channels: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        qkv_bias: bool = True,
        norm_cfg: Mapping[str, Any] = {"type": "LN", "eps": 1e-6},
        final_norm: bool = True,
        out_type: str = "avg_featmap",
        with_cls_token: bool = False,
        frozen_stages: int = -1,
        interpolate_mode: str = "bicubic",
        patch_cfg: Mapping[str, Any] = {},
        layer_cfgs: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {},
        fusion_mode: str = "concat",
        no_custom_backward: bool = False,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        if fusion_mode not in _FUSIONS:
            raise ConfigError(f"fusion_mode: unknown mode {fusion_mode!r}.{nearest(fusion_mode, _FUSIONS)}")
        super().__init__(
            arch=arch,
            img_size=img_size,
            patch_size=patch_size,
            in_channels=in_channels,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            qkv_bias=qkv_bias,
            norm_cfg=norm_cfg,
            final_norm=final_norm,
            out_type=out_type,
            with_cls_token=with_cls_token,
            interpolate_mode=interpolate_mode,
            patch_cfg=patch_cfg,
            layer_cfgs=layer_cfgs,
            init_cfg=init_cfg,
            rngs=rngs,
        )
        self.fusion_mode, self.no_custom_backward = fusion_mode, no_custom_backward
        if final_norm:  # of both streams
            self.ln1 = build_norm(norm_cfg, 2 * self.embed_dims, rngs=rngs)
        self.ln2 = None
        if frozen_stages > 0:
            self._freeze_stages(frozen_stages)

    def _run(
        self, x: Array, rngs: nnx.Rngs | None, out_indices: Sequence[int] = (), inputs: Mapping[str, Any] = {}
    ) -> tuple[Array, dict[int, Array]]:
        dtype = x.dtype
        x = jnp.concatenate([x, x], axis=-1).astype(jnp.promote_types(dtype, jnp.float32))
        training = not all(layer.deterministic for layer in self.layers)
        if training and not self.no_custom_backward and not capturing():
            x = apply_reversible(self.layers, x, dtype=dtype, rngs=rngs, scan_layers=self.scan_layers)
        else:
            x, _ = apply_layers(
                self.layers,
                x,
                rngs=rngs,
                scan_layers=self.scan_layers,
                remat=self.remat,
                shared={**inputs, "dtype": dtype},
            )
        x = x.astype(dtype)
        return x, dict.fromkeys(out_indices, x)

    def _format(self, x: Float[Array, "b n 2*c"], grid: tuple[int, int]) -> Any:
        return super()._format(_FUSIONS[self.fusion_mode](*jnp.split(x, 2, axis=-1)), grid)
