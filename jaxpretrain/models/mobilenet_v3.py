"""MobileNetV3: Searching for MobileNetV3 (Howard et al., 2019, https://arxiv.org/abs/1905.02244).

The head is `StackedLinearClsHead`. The small networks at 0.75 and 0.5 of the width are PaddleClas's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.models.layers.arch import check_frozen_stages, output_indices
from jaxpretrain.models.layers.base import BaseModule, freeze_stage
from jaxpretrain.models.layers.conv import ConvModule
from jaxpretrain.models.layers.inverted_residual import InvertedResidual
from jaxpretrain.models.layers.stack import apply_block

_BN = {"type": "BN", "eps": 1e-3, "momentum": 0.01}
_RELU, _HSWISH = {"type": "ReLU"}, {"type": "HSwish"}
_GATES = (_RELU, {"type": "HSigmoid", "bias": 3, "divisor": 6, "min_value": 0, "max_value": 1})
_INIT = (
    {"type": "Kaiming", "layer": ["Conv2d"], "nonlinearity": "leaky_relu"},
    {"type": "Normal", "layer": ["Linear"], "std": 0.01},
    {"type": "Constant", "layer": ["BatchNorm2d"], "val": 1},
)


class Row(NamedTuple):
    """A block: a row of the paper's tables 1 and 2. `SE`: squeeze and excitation; `HS`: h-swish rather than ReLU."""

    kernel_size: int
    mid: int
    outs: int
    se: bool
    hs: bool
    stride: int


SE, HS = True, True


def _small(*widths: tuple[int, int]) -> tuple[Row, ...]:
    """The small network with these channels (inside, at the end) of its blocks."""
    kernels, strides = (3,) * 3 + (5,) * 8, (2, 2, 1, 2, 1, 1, 1, 1, 2, 1, 1)
    return tuple(
        Row(kernel, *width, i not in (1, 2), i > 2, stride)
        for i, (kernel, width, stride) in enumerate(zip(kernels, widths, strides, strict=True))
    )


class MobileNetV3(BaseModule):
    """MobileNetV3: [B, H, W, 3] -> a tuple of feature maps; the last is [B, H/32, W/32, 576] (small) or 960 (large).

    Args:
        arch: 'small', 'large', 'small_075' or 'small_050'.
        conv_cfg, norm_cfg: of all convolutions, as for `ConvModule`.
        out_indices: the layers whose outputs are returned: 0 the first convolution, then the blocks, and the last
            convolution (12 in the small networks, 16 in the large one), which is the default.
        frozen_stages: the last of the layers, counted alike, that do not learn; -1 none.
        norm_eval: whether BatchNorms always use, and never change, their running statistics.
        with_cp: the same as `remat='full'`.
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        remat: what the backward pass recomputes: 'none', 'full' (all within a block), 'dots' (all but convolutions).

    Raises:
        ConfigError: an unknown name, or layers that do not exist.
    """

    arch_settings: ClassVar[Mapping[str, Sequence[Row]]] = {
        "small": _small(
            (16, 16),
            (72, 24),
            (88, 24),
            (96, 40),
            (240, 40),
            (240, 40),
            (120, 48),
            (144, 48),
            (288, 96),
            (576, 96),
            (576, 96),
        ),
        "small_075": _small(
            (16, 16),
            (72, 24),
            (88, 24),
            (96, 32),
            (192, 32),
            (192, 32),
            (96, 40),
            (120, 40),
            (240, 72),
            (432, 72),
            (432, 72),
        ),
        "small_050": _small(
            (16, 8),
            (40, 16),
            (56, 16),
            (64, 24),
            (144, 24),
            (144, 24),
            (72, 24),
            (72, 24),
            (144, 48),
            (288, 48),
            (288, 48),
        ),
        "large": (
            Row(3, 16, 16, not SE, not HS, 1),
            Row(3, 64, 24, not SE, not HS, 2),
            Row(3, 72, 24, not SE, not HS, 1),
            Row(5, 72, 40, SE, not HS, 2),
            Row(5, 120, 40, SE, not HS, 1),
            Row(5, 120, 40, SE, not HS, 1),
            Row(3, 240, 80, not SE, HS, 2),
            Row(3, 200, 80, not SE, HS, 1),
            Row(3, 184, 80, not SE, HS, 1),
            Row(3, 184, 80, not SE, HS, 1),
            Row(3, 480, 112, SE, HS, 1),
            Row(3, 672, 112, SE, HS, 1),
            Row(5, 672, 160, SE, HS, 2),
            Row(5, 960, 160, SE, HS, 1),
            Row(5, 960, 160, SE, HS, 1),
        ),
    }

    def __init__(
        self,
        arch: str = "small",
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] = _BN,
        out_indices: int | Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
    ):
        if arch not in self.arch_settings:
            raise ConfigError(f"MobileNetV3: unknown arch {arch!r}.{nearest(str(arch), self.arch_settings)}")
        rows = self.arch_settings[arch]
        self.num_layers, self.init_cfg = len(rows) + 2, init_cfg
        self.out_indices = output_indices(-1 if out_indices is None else out_indices, self.num_layers, "MobileNetV3")
        self.remat = "full" if with_cp else "none"
        args: dict[str, Any] = {"conv_cfg": conv_cfg, "norm_cfg": norm_cfg, "norm_eval": norm_eval, "rngs": rngs}

        channels = 16
        self.layer0 = ConvModule(3, channels, 3, 2, 1, act_cfg=_HSWISH, **args)
        for i, row in enumerate(rows, start=1):
            se_cfg = {"channels": row.mid, "ratio": 4, "act_cfg": _GATES} if row.se else None
            act_cfg = _HSWISH if row.hs else _RELU
            sizes = (channels, row.outs, row.mid, row.kernel_size, row.stride)
            setattr(self, f"layer{i}", InvertedResidual(*sizes, se_cfg=se_cfg, act_cfg=act_cfg, **args))
            channels = row.outs
        last = ConvModule(channels, rows[-1].mid, 1, act_cfg=_HSWISH, **args)
        setattr(self, f"layer{len(rows) + 1}", last)

        check_frozen_stages(frozen_stages, -1, self.num_layers - 1, "MobileNetV3")
        for i in range(frozen_stages + 1):
            freeze_stage(getattr(self, f"layer{i}"))

    def __call__(
        self, x: Float[Array, "b h w 3"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c"], ...]:
        """The outputs of the layers in `out_indices`, in order."""
        outs = []
        for i in range(self.num_layers):
            layer = getattr(self, f"layer{i}")
            is_block = isinstance(layer, InvertedResidual)
            x = apply_block(layer, x, rngs=rngs, remat=self.remat) if is_block else layer(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)
