"""MobileOne: An Improved One Millisecond Mobile Backbone (Vasu et al., 2023, https://arxiv.org/abs/2206.04040).

MobileNet's pairs of a 3x3 depthwise and a 1x1 convolution, each of which is several branches in training and one
convolution in inference (`switch_to_deploy`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.arch import architecture, output_indices
from jaxpretrain.models.layers.base import BaseModule, freeze_first
from jaxpretrain.models.layers.reparam import ParallelBranches, deploy_all
from jaxpretrain.models.layers.se import SELayer
from jaxpretrain.models.layers.stack import apply_block, apply_stages

_BN = {"type": "BN"}
_RELU = {"type": "ReLU"}
_INIT = (
    {"type": "Kaiming", "layer": ["Conv2d"]},
    {"type": "Constant", "val": 1, "layer": ["_BatchNorm"]},
)


class MobileOneBlock(ParallelBranches):
    """act(se(sum of branches)), each with its norm: `num_convs` alike convolutions, a 1x1 one, and the identity.

    The 1x1 branch is there where the kernel is larger, the identity where the block keeps size and channels.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: of the convolutions.
        num_convs: how many of the same geometry.
        se_cfg: arguments of the `SELayer`; None for none.
        norm_cfg, norm_eval: the norms, as for `build_norm`.
        act_cfg: the activation.
        deploy: whether to build the form for inference.
    """

    branch_names = ("branch_norm", "branch_scale", "branch_conv_list")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        num_convs: int,
        stride: int = 1,
        padding: int = 1,
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
        self.num_convs = num_convs
        shape = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        super().__init__(*shape, norm_cfg, deploy, norm_eval=norm_eval, rngs=rngs)
        self.se = None if se_cfg is None else SELayer(out_channels, **se_cfg, rngs=rngs)
        self.act = activation(act_cfg)

    def _build_branches(self, branch: Any, padding: int, dilation: int) -> None:
        size = self.kernel_size
        self.branch_scale = branch(1, 0, 1) if size > 1 else None
        self.branch_conv_list = nnx.List([branch(size, padding, dilation) for _ in range(self.num_convs)])

    def __call__(self, x: Float[Array, "b h w in"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "b h2 w2 out"]:
        y = self.combine(x)
        return self.act(y if self.se is None else self.se(y))


def _arch(widths: Sequence[float], branches: int = 1, se: Sequence[int] = (0, 0, 0, 0)) -> dict[str, Sequence]:
    return dict(num_blocks=(2, 8, 10, 1), width_factor=widths, num_conv_branches=(branches,) * 4, num_se_blocks=se)


class MobileOne(BaseModule):
    """MobileOne: [B, H, W, in_channels] -> a tuple of [B, H/s, W/s, C] maps; the last has s = 32.

    Args:
        arch: 's0' to 's4', or a dictionary with a number for each of the four stages: num_blocks (pairs of a depthwise and
            a 1x1 block), width_factor (channels over 64, 128, 256 and 512), num_conv_branches (see `MobileOneBlock`) and
            num_se_blocks (how many pairs, the last ones, have squeeze-and-excitation).
        in_channels: channels of the images.
        out_indices: the stages whose outputs are returned; negative ones count from the end.
        frozen_stages: how many stages do not learn: weights and running statistics stay; 0 is the stem alone, -1 none.
        conv_cfg: accepted for MMPretrain's configs; there is one kind of convolution.
        norm_cfg: the norms, as for `build_norm`.
        act_cfg: the activation.
        se_cfg: arguments of `SELayer`.
        deploy: whether to build the form for inference, one convolution a block (see `switch_to_deploy`).
        norm_eval: whether BatchNorms always use, and never change, their running statistics.
        init_cfg: initialisation, MMEngine's dictionaries.

    Attributes:
        deploy: whether it has this form.
        remat: what the backward pass recomputes: 'none', 'full' (all within a block), 'dots' (all but convolutions).

    Raises:
        ConfigError: an unknown architecture or stage, or numbers that do not fit.
    """

    arch_zoo: ClassVar[dict[tuple[str, ...], dict[str, Sequence]]] = {
        ("s0",): _arch((0.75, 1.0, 1.0, 2.0), branches=4),
        ("s1",): _arch((1.5, 1.5, 2.0, 2.5)),
        ("s2",): _arch((1.5, 2.0, 2.5, 4.0)),
        ("s3",): _arch((2.0, 2.5, 3.0, 4.0)),
        ("s4",): _arch((3.0, 3.5, 3.5, 4.0), se=(0, 0, 5, 1)),
    }

    def __init__(
        self,
        arch: str | Mapping[str, Sequence],
        in_channels: int = 3,
        out_indices: int | Sequence[int] = (3,),
        frozen_stages: int = -1,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] = _BN,
        act_cfg: Mapping[str, Any] = _RELU,
        se_cfg: Mapping[str, Any] = {"ratio": 16},
        deploy: bool = False,
        norm_eval: bool = False,
        init_cfg: Any = _INIT,
        *,
        rngs: nnx.Rngs,
    ):
        numbers = architecture(arch, self.arch_zoo, "MobileOne")
        for name, values in numbers.items():
            if len(values) != 4:
                raise ConfigError(f"MobileOne: {name} in arch needs a number for each of four stages, not {values}")
        sizes, with_se = numbers["num_blocks"], numbers["num_se_blocks"]
        if any(se > size for se, size in zip(with_se, sizes, strict=True)):
            raise ConfigError(f"MobileOne: num_se_blocks {with_se} are more than there are blocks: {sizes}")
        self.init_cfg, self.deploy, self.remat = init_cfg, deploy, "none"
        self.out_indices = output_indices(out_indices, 4, "MobileOne")

        block: dict[str, Any] = dict(norm_cfg=norm_cfg, act_cfg=act_cfg, deploy=deploy, norm_eval=norm_eval, rngs=rngs)
        ins = min(64, int(64 * numbers["width_factor"][0]))
        self.stage0 = MobileOneBlock(in_channels, ins, 3, 1, stride=2, **block)
        for i, size in enumerate(sizes):
            outs, convs = int(64 * 2**i * numbers["width_factor"][i]), numbers["num_conv_branches"][i]
            stage = []
            for j in range(size):
                se: dict[str, Any] = dict(se_cfg=se_cfg if j >= size - with_se[i] else None)
                stride = 2 if j == 0 else 1
                stage.append(MobileOneBlock(ins, ins, 3, convs, stride=stride, groups=ins, **se, **block))
                stage.append(MobileOneBlock(ins, outs, 1, convs, padding=0, **se, **block))
                ins = outs
            setattr(self, f"stage{i + 1}", nnx.List(stage))
        freeze_first([self.stage0, *self.stages()], frozen_stages, "MobileOne")

    def stages(self) -> list[nnx.List]:
        """The stages in order, each a list of blocks: depthwise and 1x1 in turn."""
        return [getattr(self, f"stage{i}") for i in range(1, 5)]

    def switch_to_deploy(self) -> None:
        """Makes every block one convolution, in place. Eval mode gives the same; training is over."""
        deploy_all([self.stage0, *self.stages()])
        self.deploy = True

    def __call__(
        self, x: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c2"], ...]:
        """The maps of the stages in `out_indices`, in order. Nothing is drawn: `rngs` is not used."""
        x = apply_block(self.stage0, x, remat=self.remat)
        return apply_stages(self.stages(), x, self.out_indices, remat=self.remat)
