"""SparK (Tian et al., 2023, "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.methods.base import BaseSelfSupervisor, Batch, Metrics, draw_key, pool, spread
from jaxpretrain.methods.mae import MAEPretrainHead
from jaxpretrain.methods.masking import pictures
from jaxpretrain.models.layers import BaseModule
from jaxpretrain.models.layers.activation import activation
from jaxpretrain.models.layers.conv import Conv2d, ConvTranspose2d
from jaxpretrain.models.layers.init import trunc_normal
from jaxpretrain.models.layers.norm import build_norm
from jaxpretrain.models.layers.sparse import draw_visible, grid_of, sparsely, visible_at, visible_mean

_DECODER_INIT = (
    {"type": "Kaiming", "layer": ["Conv2d", "ConvTranspose2d"]},
    {"type": "TruncNormal", "std": 0.02, "layer": ["Linear"]},
    {"type": "Constant", "val": 1, "layer": ["_BatchNorm", "LayerNorm", "SyncBatchNorm"]},
)


class ConvBlock2x(BaseModule):
    """Two 3x3 convolutions, each with its norm and, but for the last unless `last_act`, its activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int,
        norm_cfg: Mapping[str, Any],
        act_cfg: Mapping[str, Any],
        last_act: bool,
        *,
        rngs: nnx.Rngs,
    ):
        self.act, self.last_act = activation(act_cfg), last_act
        self.conv1 = Conv2d(in_channels, mid_channels, 3, 1, 1, bias=False, rngs=rngs)
        self.norm1 = build_norm(norm_cfg, mid_channels, rngs=rngs)
        self.conv2 = Conv2d(mid_channels, out_channels, 3, 1, 1, bias=False, rngs=rngs)
        self.norm2 = build_norm(norm_cfg, out_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h w out"]:
        x = self.act(self.norm1(self.conv1(x)))
        x = self.norm2(self.conv2(x))
        return self.act(x) if self.last_act else x


class DecoderConvModule(BaseModule):
    """A transposed convolution that enlarges a map `scale_factor` times, and `num_conv_blocks` blocks."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int,
        kernel_size: int = 4,
        scale_factor: int = 2,
        num_conv_blocks: int = 1,
        norm_cfg: Mapping[str, Any] = {"type": "SyncBN"},
        act_cfg: Mapping[str, Any] = {"type": "ReLU6"},
        last_act: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        edge, odd = divmod(kernel_size - scale_factor, 2)
        if edge < 0 or odd:
            raise ConfigError(
                f"SparKLightDecoder: kernel_size={kernel_size} must be scale_factor={scale_factor}, or an even number more"
            )
        self.upsample = ConvTranspose2d(in_channels, in_channels, kernel_size, scale_factor, edge, rngs=rngs)
        self.conv_blocks = nnx.List(
            ConvBlock2x(in_channels, out_channels, mid_channels, norm_cfg, act_cfg, last_act, rngs=rngs)
            for _ in range(num_conv_blocks)
        )

    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        x = self.upsample(x)
        for block in self.conv_blocks:
            x = block(x)
        return x


class SparKLightDecoder(BaseModule):
    """The upper half of a U-Net: from the smallest feature map, with the larger ones added on the way, to an image.

    Args:
        feature_dim: channels of the smallest map; each step halves them.
        upsample_ratio: pixels per position of the smallest map, down and across: a power of 2. It takes log2 steps.
        mid_channels: channels between the two convolutions of a block; 0: as many as go in.
        kernel_size, scale_factor: of the transposed convolution that enlarges.
        num_conv_blocks: blocks of two convolutions in a step.
        norm_cfg, act_cfg: norms and activation.
        last_act: whether steps end with the activation.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        feature_dim: int,
        upsample_ratio: int,
        mid_channels: int = 0,
        kernel_size: int = 4,
        scale_factor: int = 2,
        num_conv_blocks: int = 1,
        norm_cfg: Mapping[str, Any] = {"type": "SyncBN"},
        act_cfg: Mapping[str, Any] = {"type": "ReLU6"},
        last_act: bool = False,
        init_cfg: Any = _DECODER_INIT,
        *,
        rngs: nnx.Rngs,
    ):
        if upsample_ratio < 1 or upsample_ratio & (upsample_ratio - 1):
            raise ConfigError(f"SparKLightDecoder: upsample_ratio={upsample_ratio} is no power of 2")
        self.feature_dim, self.upsample_ratio, self.init_cfg = feature_dim, upsample_ratio, init_cfg
        channels = [feature_dim // 2**i for i in range(upsample_ratio.bit_length())]
        self.decoder = nnx.List(
            DecoderConvModule(
                ins,
                outs,
                mid_channels or ins,
                kernel_size,
                scale_factor,
                num_conv_blocks,
                norm_cfg,
                act_cfg,
                last_act,
                rngs=rngs,
            )
            for ins, outs in pairwise(channels)
        )
        self.proj = Conv2d(channels[-1], 3, 1, rngs=rngs)

    def __call__(self, maps: Sequence[Float[Array, "b ..."]]) -> Float[Array, "b height width 3"]:
        """The image that `maps`, from the smallest to the largest, each twice the one before, stand for."""
        x: Any = 0.0
        for i, step in enumerate(self.decoder):
            x = step(x + maps[i] if i < len(maps) else x)
        return self.proj(x)


class SparKPretrainHead(MAEPretrainHead):
    """Compares a predicted with a true image, patch by patch.

    Args:
        loss: called with prediction, target and mask; `PixelReconstructionLoss`.
        norm_pix: whether a target patch is normalised by its own mean and (unbiased) variance.
        patch_size: pixels per patch, down and across.
    """

    def __init__(self, loss: Mapping[str, Any] | nnx.Module, norm_pix: bool = True, patch_size: int = 32):
        super().__init__(loss, norm_pix, patch_size)

    def loss(
        self, pred: Float[Array, "b h w c"], target: Float[Array, "b h w c"], mask: Bool[Array, "b n m"]
    ) -> Float[Array, ""]:
        """The error of a predicted image against the true one, in the patches where the mask is 1."""
        hidden = mask.reshape(len(mask), -1).astype(jnp.float32)
        return super().loss(self.patchify(pred), target, hidden)

    def true_colours(self, pred: Float[Array, "b h w c"], images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """A predicted image as pixels: with `norm_pix`, its patches scaled and shifted as those of `images` are."""
        return self.unpatchify(self.to_pixels(self.patchify(pred), images), *images.shape[1:3])


class SparK(BaseSelfSupervisor):
    """Reconstructs the pixels of hidden patches by a convolutional network that does not see them, and a U-Net's decoder.

    The backbone is a `SparseResNet` or `SparseConvNeXt` that gives maps, each half as large as the one before; at each
    scale a learnt token takes the places of what is hidden. The neck is a `SparKLightDecoder`, the head a
    `SparKPretrainHead`.

    Args:
        backbone, neck, head, pretrained, data_preprocessor, init_cfg: as of `BaseSelfSupervisor`.
        input_size: accepted for MMPretrain's configs; images have any size that patches divide.
        downsample_raito: pixels per patch, down and across: those of a position of the last map. (MMPretrain spells it so.)
        mask_ratio: part of the patches that is hidden, in (0, 1).
        enc_dec_norm_cfg: norms of the maps that go to the decoder.
        enc_dec_norm_dim: channels of the last map; those before have half as many each.

    Raises:
        ConfigError: parts that do not fit together.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any] | nnx.Module,
        neck: Mapping[str, Any] | nnx.Module,
        head: Mapping[str, Any] | nnx.Module,
        pretrained: None = None,
        data_preprocessor: Any = None,
        input_size: int = 224,
        downsample_raito: int = 32,
        mask_ratio: float = 0.6,
        enc_dec_norm_cfg: Mapping[str, Any] = {"type": "SparseSyncBatchNorm2d"},
        enc_dec_norm_dim: int = 2048,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(backbone, neck, head, init_cfg=init_cfg, rngs=rngs)
        self.downsample_raito, self.mask_ratio = downsample_raito, mask_ratio
        self._check()
        scales = range(len(self.backbone.out_indices))
        widths = [enc_dec_norm_dim // 2**i for i in scales]
        outs = [self.neck.feature_dim // 2**i for i in scales]
        self.enc_dec_norms = nnx.List(build_norm(enc_dec_norm_cfg, width, rngs=rngs) for width in widths)
        # The smallest map goes on as it is where it has the decoder's width.
        self.enc_dec_projectors = nnx.List(
            None
            if i == 0 and widths[i] == outs[i]
            else Conv2d(widths[i], outs[i], 3 if i else 1, padding=1 if i else 0, rngs=rngs)
            for i in scales
        )
        token = trunc_normal(0.02, a=-0.02, b=0.02)
        self.mask_tokens = nnx.List(nnx.Param(token(rngs.params(), (1, width, 1, 1))) for width in widths)

    def _check(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"SparK: mask_ratio={self.mask_ratio} must be between 0 and 1")
        if getattr(self.backbone, "gap_before_final_norm", False):
            raise ConfigError("SparK: the decoder needs maps; give the backbone gap_before_output=False")
        for what, value in (
            ("neck.upsample_ratio", self.neck.upsample_ratio),
            ("head.patch_size", self.head.patch_size),
        ):
            if value != self.downsample_raito:
                raise ConfigError(
                    f"SparK: {what}={value} is not downsample_raito={self.downsample_raito}; make them agree"
                )

    def mask(
        self, images: Float[Array, "b h w c"], noise: Array | None = None, rngs: nnx.Rngs | None = None
    ) -> Bool[Array, "b n m"]:
        """Which patches of images are visible: round(N (1 - mask_ratio)), those of the smallest noise.

        Args:
            images: their sides are multiples of `downsample_raito`.
            noise: [B, N]; drawn from `rngs.mask` if None.
            rngs: for the noise.
        """
        grid = grid_of(images, self.downsample_raito, "SparK")
        places = grid[0] * grid[1]
        if noise is None:
            noise = jax.random.uniform(draw_key(rngs, "mask"), (len(images), places))
        return draw_visible(noise, round(places * (1 - self.mask_ratio)), grid)

    def predict(
        self, images: Float[Array, "b h w c"], visible: Bool[Array, "b n m"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b d"]]:
        """The image as the decoder has it, and the mean of the encoder's last map over what is visible."""
        maps = self.backbone(images, visible, rngs=rngs)[::-1]
        filled = []
        for norm, project, token, x in zip(
            self.enc_dec_norms, self.enc_dec_projectors, self.mask_tokens, maps, strict=True
        ):
            y = sparsely(norm, x, visible)
            shown = visible_at(visible, *x.shape[1:3])[..., None]
            y = jnp.where(shown, y, token[...].reshape(-1).astype(y.dtype))
            filled.append(y if project is None else project(y))
        return self.neck(filled), visible_mean(maps[0], visible)

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The error over hidden patches. Logs `feature_std`, of the mean over visible positions.

        A batch may bring its own masking `noise` [B, N] (see `mask`); otherwise it is drawn from `rngs.mask`.
        """
        images = batch["image"]
        visible = self.mask(images, batch.get("noise"), rngs)
        prediction, feature = self.predict(images, visible, rngs=rngs)
        return self.head.loss(prediction, images, ~visible), {"feature_std": spread(feature)}

    def reconstruct(
        self,
        images: Float[Array, "b h w 3"],
        *,
        noise: Float[Array, "b n"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> dict[str, Float[Array, "b h w c"]]:
        """What the network makes of images that it sees a part of, in the space of the (normalised) images.

        With `norm_pix` the network predicts patches up to brightness and contrast; the true patches lend theirs.

        Returns:
            see `masking.pictures`.
        """
        visible = self.mask(images, noise, rngs)
        prediction, _ = self.predict(images, visible)
        return pictures(images, self.head.true_colours(prediction, images), (~visible).astype(jnp.float32))

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The mean of the last feature map of the whole image."""
        return pool(self.extract_feat(images))
