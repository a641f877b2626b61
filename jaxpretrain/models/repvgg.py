"""RepVGG: Making VGG-style ConvNets Great Again (Ding et al., 2021, https://arxiv.org/abs/2101.03697).

In training a block adds a 3x3 convolution, a 1x1 one and its input, each normalised; for inference (`switch_to_deploy`)
they are one 3x3 convolution. The pooling block (`add_ppf`) and 'yolox-pai-small' are those of YOLOX-PAI (Zou et al., 2022,
https://arxiv.org/abs/2208.13040).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.arch import architecture, output_indices
from jaxpretrain.models.layers.base import BaseModule, freeze_first
from jaxpretrain.models.layers.conv import ConvModule, max_pool2d
from jaxpretrain.models.layers.reparam import ParallelBranches, deploy_all
from jaxpretrain.models.layers.se import SELayer
from jaxpretrain.models.layers.stack import apply_block

_BN = {"type": "BN"}
_RELU = {"type": "ReLU"}
_INIT = (
    {"type": "Kaiming", "layer": ["Conv2d"]},
    {"type": "Constant", "val": 1, "layer": ["_BatchNorm", "GroupNorm"]},
)


class RepVGGBlock(ParallelBranches):
    """act(se(3x3 + 1x1 + identity)), each branch with its norm; the identity where the block keeps size and channels.

    Deployed, the squeeze-and-excitation stays. (MMPretrain's deployed block leaves it out.)

    Args:
        in_channels, out_channels: channels of input and output.
        stride, dilation, groups: of the 3x3 convolution, which is padded by `dilation`; stride and groups of the 1x1 too.
        se_cfg: arguments of the `SELayer`; None for none.
        norm_cfg, norm_eval: the norms, as for `build_norm`.
        act_cfg: the activation.
        deploy: whether to build the form for inference.
    """

    branch_names = ("branch_3x3", "branch_1x1", "branch_norm")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        se_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] = _BN,
        act_cfg: Mapping[str, Any] = _RELU,
        deploy: bool = False,
        *,
        norm_eval: bool = False,
        rngs: nnx.Rngs,
    ):
        shape = (in_channels, out_channels, 3, stride, dilation, dilation, groups)
        super().__init__(*shape, norm_cfg, deploy, norm_eval=norm_eval, rngs=rngs)
        self.se_layer = None if se_cfg is None else SELayer(out_channels, **se_cfg, rngs=rngs)
        self.act = activation(act_cfg)

    def _build_branches(self, branch: Any, padding: int, dilation: int) -> None:
        self.branch_3x3 = branch(3, padding, dilation)
        self.branch_1x1 = branch(1, 0, 1)

    def __call__(self, x: Float[Array, "b h w in"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h2 w2 out"]:
        y = self.combine(x)
        return self.act(y if self.se_layer is None else self.se_layer(y))


class MTSPPF(BaseModule):
    """Features with their maxima over 5, 9 and 13 pixels beside them: three poolings in a row, between 1x1 convolutions.

    Args:
        in_channels, out_channels: channels of input and output.
        norm_cfg, norm_eval, act_cfg: of the two convolutions.
        kernel_size: of each pooling.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_cfg: Mapping[str, Any] = _BN,
        act_cfg: Mapping[str, Any] = _RELU,
        kernel_size: int = 5,
        *,
        norm_eval: bool = False,
        rngs: nnx.Rngs,
    ):
        hidden, self.kernel_size = in_channels // 2, kernel_size
        args: dict[str, Any] = dict(norm_cfg=norm_cfg, act_cfg=act_cfg, norm_eval=norm_eval, rngs=rngs)
        self.conv1 = ConvModule(in_channels, hidden, 1, **args)
        self.conv2 = ConvModule(4 * hidden, out_channels, 1, **args)

    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h w out"]:
        maps = [self.conv1(x)]
        for _ in range(3):
            maps.append(max_pool2d(maps[-1], self.kernel_size, 1, self.kernel_size // 2))
        return self.conv2(jnp.concatenate(maps, axis=-1))


def _arch(blocks: Sequence[int], widths: Sequence[float], groups: int = 1, stem: int = 64, se: Any = None) -> dict:
    """An architecture; `groups` are of every second block, counted through all stages from 1."""
    every_second = dict.fromkeys(range(2, 27, 2), groups) if groups > 1 else None
    return dict(num_blocks=blocks, width_factor=widths, group_layer_map=every_second, se_cfg=se, stem_channels=stem)


_A, _B = (2, 4, 14, 1), (4, 6, 16, 1)
_B1, _B2, _B3 = (2, 2, 2, 4), (2.5, 2.5, 2.5, 5), (3, 3, 3, 5)


class RepVGG(BaseModule):
    """RepVGG: [B, H, W, in_channels] -> a tuple of [B, H/s, W/s, C] maps; the last has s = 32.

    Args:
        arch: 'A0' to 'A2', 'B0' to 'B3', 'B1g2', 'B1g4' and so on (grouped convolutions), 'D2se', 'yolox-pai-small'; or a
            dictionary: num_blocks and width_factor (a number for each stage; channels are `base_channels * 2**stage` times
            the factor), group_layer_map (number of a block, counted from 1 -> groups; or None), se_cfg (arguments of every
            block's `SELayer`; or None) and stem_channels (at most so many; 64 if not given).
        in_channels: channels of the images.
        base_channels: see `arch`.
        out_indices: the stages whose outputs are returned; negative ones count from the end.
        strides, dilations: of each stage.
        frozen_stages: how many stages do not learn: weights and running statistics stay; 0 is the stem alone, -1 none.
        conv_cfg: accepted for MMPretrain's configs; there is one kind of convolution.
        norm_cfg: the norms, as for `build_norm`.
        act_cfg: the activation.
        with_cp: the same as `remat='full'`.
        deploy: whether to build the form for inference, one convolution a block (see `switch_to_deploy`).
        norm_eval: whether BatchNorms always use, and never change, their running statistics.
        add_ppf: whether the last stage ends with `MTSPPF`.
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        deploy: whether it has this form.
        remat: what the backward pass recomputes: 'none', 'full' (all within a block), 'dots' (all but convolutions).

    Raises:
        ConfigError: an unknown architecture or stage; lists of different lengths.
    """

    arch_settings: ClassVar[dict[tuple[str, ...], dict[str, Any]]] = {
        ("a0",): _arch(_A, (0.75, 0.75, 0.75, 2.5)),
        ("a1",): _arch(_A, (1, 1, 1, 2.5)),
        ("a2",): _arch(_A, (1.5, 1.5, 1.5, 2.75)),
        ("b0",): _arch(_B, (1, 1, 1, 2.5)),
        ("b1",): _arch(_B, _B1),
        ("b1g2",): _arch(_B, _B1, 2),
        ("b1g4",): _arch(_B, _B1, 4),
        ("b2",): _arch(_B, _B2),
        ("b2g2",): _arch(_B, _B2, 2),
        ("b2g4",): _arch(_B, _B2, 4),
        ("b3",): _arch(_B, _B3),
        ("b3g2",): _arch(_B, _B3, 2),
        ("b3g4",): _arch(_B, _B3, 4),
        ("d2se",): _arch((8, 14, 24, 1), _B2, se=dict(ratio=16, divisor=1)),
        ("yolox-pai-small",): _arch((3, 5, 7, 3), (1, 1, 1, 1), stem=32),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any],
        in_channels: int = 3,
        base_channels: int = 64,
        out_indices: int | Sequence[int] = (3,),
        strides: Sequence[int] = (2, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        frozen_stages: int = -1,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] = _BN,
        act_cfg: Mapping[str, Any] = _RELU,
        with_cp: bool = False,
        deploy: bool = False,
        norm_eval: bool = False,
        add_ppf: bool = False,
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
    ):
        if not isinstance(arch, str):
            arch = {"stem_channels": 64, **arch}
        numbers = architecture(arch, self.arch_settings, "RepVGG")
        sizes, factors = numbers["num_blocks"], numbers["width_factor"]
        groups = {int(block): parts for block, parts in (numbers["group_layer_map"] or {}).items()}  # JSON has strings
        if not len(sizes) == len(factors) == len(strides) == len(dilations):
            raise ConfigError(
                f"RepVGG: num_blocks {sizes}, width_factor {factors}, strides {strides} and dilations {dilations} need "
                "a number for each stage"
            )
        self.init_cfg, self.deploy, self.remat = init_cfg, deploy, "full" if with_cp else "none"
        self.num_stages = len(sizes)
        self.out_indices = output_indices(out_indices, self.num_stages, "RepVGG")

        common: dict[str, Any] = dict(norm_cfg=norm_cfg, act_cfg=act_cfg, norm_eval=norm_eval, rngs=rngs)
        block = common | dict(se_cfg=numbers["se_cfg"], deploy=deploy)
        ins, count = min(numbers["stem_channels"], int(base_channels * factors[0])), 0
        self.stem = RepVGGBlock(in_channels, ins, stride=2, **block)
        for i, size in enumerate(sizes):
            outs, stage = int(base_channels * 2**i * factors[i]), []
            for j in range(size):
                count += 1
                stride, parts = strides[i] if j == 0 else 1, groups.get(count, 1)
                stage.append(RepVGGBlock(ins, outs, stride, dilations[i], parts, **block))
                ins = outs
            setattr(self, f"stage_{i + 1}", nnx.List(stage))
        self.ppf = MTSPPF(ins, ins, **common) if add_ppf else None
        freeze_first([self.stem, *self.stages()], frozen_stages, "RepVGG")

    def stages(self) -> list[nnx.List]:
        """The stages in order, each a list of blocks."""
        return [getattr(self, f"stage_{i + 1}") for i in range(self.num_stages)]

    def switch_to_deploy(self) -> None:
        """Makes every block one convolution, in place. Eval mode gives the same; training is over."""
        deploy_all([self.stem, *self.stages()])
        self.deploy = True

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c2"], ...]:
        """The maps of the stages in `out_indices`, in order. Nothing is drawn: `rngs` is not used."""
        x = apply_block(self.stem, x, remat=self.remat)
        outs = []
        for i, stage in enumerate(self.stages()):
            for block in stage:
                x = apply_block(block, x, remat=self.remat)
            if self.ppf is not None and i == self.num_stages - 1:
                x = self.ppf(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)
