"""SparseConvNeXt: ConvNeXt, V1 and V2, of partly hidden images (SparK: Tian et al., 2023, https://arxiv.org/abs/2301.03580).

With `sparse_grn` it is the encoder of FCMAE (ConvNeXt V2: Woo et al., 2023, https://arxiv.org/abs/2301.00808).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.models.convnext import ConvNeXt, ConvNeXtBlock
from jaxpretrain.models.layers.conv import global_avg_pool
from jaxpretrain.models.layers.drop import drop_path
from jaxpretrain.models.layers.sparse import Visible, hide, sparsely
from jaxpretrain.models.layers.stack import apply_layers


class SparseConvNeXtBlock(ConvNeXtBlock):
    """A ConvNeXt block whose output is zero where the image is hidden.

    Attributes:
        sparse_grn: whether global response normalisation (GRN) counts visible positions only.
    """

    sparse_grn = False

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        *,
        visible: Visible = None,
        rngs: nnx.Rngs | None = None,
        drop_path_rate: float | Array | None = None,
    ) -> Float[Array, "b h w c"]:
        """As of `ConvNeXtBlock`, with the visible patches."""
        rate = self.drop_path_rate if drop_path_rate is None else drop_path_rate
        y = sparsely(self.norm, self.depthwise_conv(x), visible)
        y = self.act(self.pointwise_conv1(y))  # where hidden: the bias, activated
        if self.grn is not None:
            y = self.grn(hide(y, visible) if self.sparse_grn else y)
        y = self.pointwise_conv2(y)
        if self.gamma is not None:
            y = y * self.gamma[...].astype(y.dtype)
        return x + drop_path(hide(y, visible), 0.0 if self.deterministic else rate, rngs)


class SparseConvNeXt(ConvNeXt):
    """ConvNeXt that sees only the visible patches of an image. Its outputs are not normalised.

    Args:
        arch, in_channels, stem_patch_size, act_cfg, linear_pw_conv, use_grn, drop_path_rate, layer_scale_init_value,
            out_indices, frozen_stages, with_cp, init_cfg: as of `ConvNeXt`.
        norm_cfg: the norms.
        gap_before_output: whether outputs are averaged over the image, hidden positions too; else they are maps.
        sparse_grn: whether global response normalisation counts visible positions only, as in FCMAE. MMPretrain's SparK
            also counts what a bias leaves at hidden ones, unless `linear_pw_conv=False`.
    """

    block_type: ClassVar = SparseConvNeXtBlock
    norms_outputs = False

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "small",
        in_channels: int = 3,
        stem_patch_size: int = 4,
        norm_cfg: Mapping[str, Any] = {"type": "SparseLN2d", "eps": 1e-6},
        act_cfg: Mapping[str, Any] = {"type": "GELU"},
        linear_pw_conv: bool = True,
        use_grn: bool = False,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = 0,
        gap_before_output: bool = True,
        sparse_grn: bool = False,
        *,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(
            arch,
            in_channels,
            stem_patch_size,
            norm_cfg,
            act_cfg,
            linear_pw_conv,
            use_grn,
            drop_path_rate,
            layer_scale_init_value,
            out_indices,
            frozen_stages,
            gap_before_output,
            rngs=rngs,
            **kwargs,
        )
        self.set_attributes(SparseConvNeXtBlock, sparse_grn=sparse_grn or not linear_pw_conv)

    def __call__(
        self, x: Float[Array, "b h w c"], visible: Visible = None, *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b *grid c2"], ...]:
        """The outputs of the chosen stages, in order; maps are zero where the image is hidden.

        Args:
            x: images.
            visible: which patches are seen. Each must be at least one position of the last map; None: all are seen.
            rngs: for drop path in training.
        """
        x = hide(x, visible)
        outputs = []
        for i, (downsample, blocks) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            for layer in downsample:
                x = sparsely(layer, x, visible)
            x, _ = apply_layers(
                blocks, x, rngs=rngs, scan_layers=self.scan_layers, remat=self.remat, shared={"visible": visible}
            )
            if i in self.out_indices:
                outputs.append(global_avg_pool(x) if self.gap_before_final_norm else x)
        return tuple(outputs)
