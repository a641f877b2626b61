"""SparseResNet: ResNet of partly hidden images (SparK: Tian et al., 2023, https://arxiv.org/abs/2301.03580)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.models.layers.conv import max_pool2d, relu
from jaxpretrain.models.layers.drop import drop_path
from jaxpretrain.models.layers.intermediates import record
from jaxpretrain.models.layers.sparse import Visible, hide, sparsely
from jaxpretrain.models.layers.stack import apply_block
from jaxpretrain.models.resnet import BasicBlock, Bottleneck, ResidualBlock, ResNet


class SparseBlock(ResidualBlock):
    """A residual block whose output is zero where the image is hidden.

    A norm follows every convolution, and makes hidden positions zero; so convolutions need not.
    """

    def __call__(
        self, x: Float[Array, "b h w in"], *, visible: Visible = None, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b h2 w2 out"]:
        shortcut = x
        for layer in self.downsample or ():
            shortcut = sparsely(layer, shortcut, visible)
        for i in range(1, self.num_convs + 1):
            x = sparsely(getattr(self, f"bn{i}"), getattr(self, f"conv{i}")(x), visible)
            x = relu(x) if i < self.num_convs else x
        if not self.deterministic:
            x = drop_path(x, self.drop_path_rate, rngs)
        return relu(x + shortcut)


class SparseBasicBlock(SparseBlock, BasicBlock):
    """`BasicBlock` of partly hidden images."""


class SparseBottleneck(SparseBlock, Bottleneck):
    """`Bottleneck` of partly hidden images."""


class SparseResNet(ResNet):
    """ResNet that sees only the visible patches of an image; without a mask it is a `ResNet`.

    Args:
        depth: 18, 34, 50, 101 or 152.
        norm_cfg: the norms. BatchNorms count visible positions only, under whatever name.
        zero_init_residual: whether `init_weights` makes every block start as its shortcut.
        kwargs: other arguments of `ResNet`.
    """

    arch_settings: ClassVar = {
        18: (SparseBasicBlock, (2, 2, 2, 2)),
        34: (SparseBasicBlock, (3, 4, 6, 3)),
        50: (SparseBottleneck, (3, 4, 6, 3)),
        101: (SparseBottleneck, (3, 4, 23, 3)),
        152: (SparseBottleneck, (3, 8, 36, 3)),
    }

    def __init__(
        self,
        depth: int,
        *,
        norm_cfg: Mapping[str, Any] = {"type": "SparseSyncBatchNorm2d"},
        zero_init_residual: bool = False,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(depth, norm_cfg=norm_cfg, zero_init_residual=zero_init_residual, rngs=rngs, **kwargs)

    def __call__(
        self, x: Float[Array, "b h w c"], visible: Visible = None, *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 c2"], ...]:
        """Feature maps of the stages in `out_indices`, in order; zero where the image is hidden.

        Args:
            x: images.
            visible: which patches are seen. Each must be at least one position of the last map; None: all are seen.
            rngs: for drop path in training.
        """
        x = hide(x, visible)
        if self.deep_stem:
            layers = [(layer.conv, getattr(layer, layer.norm_name)) for layer in self.stem]
        else:
            layers = [(self.conv1, self.bn1)]
        for conv, norm in layers:
            x = relu(sparsely(norm, conv(x), visible))
        record(self, "stem", x)
        x = hide(max_pool2d(x, 3, 2, 1), visible)
        outs = []
        for i in range(self.num_stages):
            for block in getattr(self, f"layer{i + 1}"):
                x = apply_block(block, x, rngs=rngs, remat=self.remat, shared={"visible": visible})
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)
