"""VGG: Very Deep Convolutional Networks for Large-Scale Image Recognition (Simonyan & Zisserman, 2015,
https://arxiv.org/abs/1409.1556). With BatchNorm, if wanted, which came later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.activation import Activation
from jaxpretrain.models.layers.base import BaseModule, freeze_stage
from jaxpretrain.models.layers.conv import ConvModule
from jaxpretrain.models.layers.drop import Dropout
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.sequence import MaxPool2d, apply_sequence, flatten
from jaxpretrain.models.layers.stack import apply_block

_RELU = {"type": "ReLU"}
_INIT = (
    {"type": "Kaiming", "layer": ["Conv2d"]},
    {"type": "Constant", "val": 1.0, "layer": ["_BatchNorm"]},
    {"type": "Normal", "std": 0.01, "layer": ["Linear"]},
)
_CHANNELS = (64, 128, 256, 512, 512)
_FLAT = 512 * 7 * 7  # what the classifier takes: the last map for images of 224 pixels


class Convolution(ConvModule):
    """A 3x3 convolution with its norm and activation, called as a block is."""

    def __call__(self, x: Float[Array, "b h w in"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h w out"]:
        return super().__call__(x)


class VGG(BaseModule):
    """VGG of depth 11, 13, 16 or 19: [B, H, W, 3] -> a tuple of maps, the last [B, H/32, W/32, 512], and of logits.

    Args:
        depth: number of layers with weights, the classifier's three included.
        num_classes: number of classes; with -1 there is no classifier. With it, the logits [B, num_classes] are the last
            output, and images have 224x224 pixels (or whatever gives 7x7).
        num_stages: number of stages, 1 to 5.
        dilations: of the convolutions of each stage.
        out_indices: the stages whose outputs are returned, from 0; None is the last, or only the logits if there are any.
        frozen_stages: how many stages do not learn; -1 and 0 are none.
        conv_cfg: as for `ConvModule`.
        norm_cfg: the norms, as for `build_norm`; None for none. Convolutions have a bias beside them.
        act_cfg: the activations.
        norm_eval: whether BatchNorms always use, and never change, their running statistics.
        ceil_mode: whether pooling keeps an odd last row and column.
        with_last_pool: whether the last stage is pooled too.
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        remat: what the backward pass recomputes: 'none', 'full' (norm and activation too), 'dots' (all but convolutions).

    Raises:
        ConfigError: a depth or stage that does not exist; in a call, images of another size than the classifier is for.
    """

    arch_settings: ClassVar[dict[int, tuple[int, ...]]] = {  # convolutions in each stage
        11: (1, 1, 2, 2, 2),
        13: (2, 2, 2, 2, 2),
        16: (2, 2, 3, 3, 3),
        19: (2, 2, 4, 4, 4),
    }

    def __init__(
        self,
        depth: int,
        num_classes: int = -1,
        num_stages: int = 5,
        dilations: Sequence[int] = (1, 1, 1, 1, 1),
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] | None = None,
        act_cfg: Mapping[str, Any] = _RELU,
        norm_eval: bool = False,
        ceil_mode: bool = False,
        with_last_pool: bool = True,
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
    ):
        self.init_cfg, self.num_classes, self.remat = init_cfg, num_classes, "none"
        if out_indices is None:
            out_indices = () if num_classes > 0 else (num_stages - 1,)
        self.out_indices = tuple(out_indices)
        self._check(depth, num_stages, dilations, frozen_stages)

        layers: list[Any] = []
        ends, ins = [], 3
        for i, convolutions in enumerate(self.arch_settings[depth][:num_stages]):
            for _ in range(convolutions):
                args: dict[str, Any] = {"bias": True, "conv_cfg": conv_cfg, "norm_cfg": norm_cfg, "act_cfg": act_cfg}
                args |= {"padding": dilations[i], "dilation": dilations[i], "norm_eval": norm_eval, "rngs": rngs}
                layers.append(Convolution(ins, _CHANNELS[i], 3, **args))
                ins = _CHANNELS[i]
            if i < num_stages - 1 or with_last_pool:
                layers.append(MaxPool2d(2, 2, ceil_mode=ceil_mode))
            ends.append(len(layers))
        self.features = nnx.List(layers)
        self.stage_ends = tuple(ends)
        if num_classes > 0:
            self.classifier = nnx.List(
                [
                    Linear(_FLAT, 4096, rngs=rngs),
                    Activation(_RELU),
                    Dropout(0.5),
                    Linear(4096, 4096, rngs=rngs),
                    Activation(_RELU),
                    Dropout(0.5),
                    Linear(4096, num_classes, rngs=rngs),
                ]
            )
        for layer in self.features[: self.stage_ends[frozen_stages - 1] if frozen_stages > 0 else 0]:
            freeze_stage(layer)

    def _check(self, depth: int, stages: int, dilations: Sequence[int], frozen_stages: int) -> None:
        if depth not in self.arch_settings:
            raise ConfigError(f"VGG has no depth {depth!r}; its depths are {sorted(self.arch_settings)}")
        if not 1 <= stages <= 5:
            raise ConfigError(f"VGG: num_stages is 1 to 5, not {stages}")
        if len(dilations) != stages:
            raise ConfigError(f"VGG: dilations {dilations} need num_stages={stages} entries")
        # MMPretrain's configs may name the logits too, as the output behind the last stage.
        if not all(0 <= i < stages + (self.num_classes > 0) for i in self.out_indices):
            raise ConfigError(f"VGG: out_indices {self.out_indices} must be in 0 ... {stages - 1}")
        if not -1 <= frozen_stages <= stages:
            raise ConfigError(f"VGG: frozen_stages is -1 (none) to {stages}, not {frozen_stages}")

    def __call__(
        self, x: Float[Array, "b h w 3"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b ..."], ...]:
        """Maps of the stages in `out_indices`, in order, and logits. `rngs` is for the classifier's dropout in training."""
        size, outs, start = x.shape[1:3], [], 0
        for i, end in enumerate(self.stage_ends):
            for layer in self.features[start:end]:
                x = apply_block(layer, x, remat=self.remat) if isinstance(layer, Convolution) else layer(x)
            if i in self.out_indices:
                outs.append(x)
            start = end
        if self.num_classes > 0:
            x = flatten(x)
            if x.shape[-1] != _FLAT:
                raise ConfigError(
                    f"VGG's classifier is for maps of 7x7 with 512 channels, as of 5 stages for images of 224x224 pixels; "
                    f"those of {size[0]}x{size[1]} give {x.shape[-1]} numbers instead of {_FLAT}"
                )
            outs.append(apply_sequence(self.classifier, x, rngs=rngs))
        return tuple(outs)
