"""EVA (Fang et al., 2022), in the form of an MAE: masked patches' CLIP features are predicted from visible patches."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.methods.base import Batch, Metrics, spread
from jaxpretrain.methods.latent import latent_pictures
from jaxpretrain.methods.milan import CLIPTargets


class EVA(CLIPTargets):
    """Predicts CLIP's features of hidden patches.

    The backbone is a `MAEViT`, the neck a `MAEPretrainDecoder` with `predict_feature_dim` of CLIP's features (its
    `num_patches` and `embed_dim` are the backbone's where not given), the head a `MIMHead`, the target generator a
    `CLIPGenerator`.
    """

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The head's loss over hidden patches. Logs `feature_std`, of the mean over visible patches.

        A batch may bring its own masking `noise` [B, N] (see `MAEViT`); otherwise it is drawn from `rngs.mask`.
        """
        latent, pred, target, mask = self._predict(batch["image"], batch.get("noise"), rngs)
        return self.head.loss(pred, target, mask), {"feature_std": spread(latent[:, 1:].mean(axis=1))}

    def _predict(self, images: Array, noise: Array | None, rngs: nnx.Rngs | None) -> tuple[Array, Array, Array, Array]:
        """Latent, prediction, target, and the patches hidden (1) and not (0)."""
        target, _ = self.target_generator(images)
        latent, mask, ids_restore = self.backbone(images, noise=noise, rngs=rngs)
        return latent, self.neck(latent, ids_restore, rngs=rngs), target[:, 1:], mask

    def extract_feat(self, images: Float[Array, "b h w c"]) -> tuple[Array, ...]:
        """The backbone's features of whole images, nothing hidden."""
        return self.backbone(images, mask=None)

    def reconstruct(
        self,
        images: Float[Array, "b h w 3"],
        *,
        noise: Float[Array, "b n"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> dict[str, Float[Array, "b h w c"]]:
        """Images, what is hidden of them, and how well each patch's features are predicted (see `latent_pictures`)."""
        _, pred, target, hidden = self._predict(images, noise, rngs)
        grid = (images.shape[1] // self.backbone.patch_embed.patch_size[0], -1)
        return latent_pictures(images, hidden, pred, target, grid)
