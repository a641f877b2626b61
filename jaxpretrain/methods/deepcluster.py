"""DeepCluster (Caron et al., 2018, Deep Clustering for Unsupervised Learning of Visual Features)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError, build
from jaxpretrain.data.samplers import Order, UniformOrder
from jaxpretrain.evaluators.base import gather
from jaxpretrain.methods.base import BaseSelfSupervisor, Batch, Metrics, entropy, last, pool, spread
from jaxpretrain.methods.kmeans import Clusters, Kmeans, normalized_mutual_info
from jaxpretrain.models.heads import ClsHead
from jaxpretrain.models.layers import BaseModule, Conv2d, freeze
from jaxpretrain.models.resnet import ResNet

_HORIZONTAL = np.asarray([[1, 0, -1], [2, 0, -2], [1, 0, -1]], np.float32)


class Sobel(BaseModule):
    """Edges in place of colours, which k-means would cluster by: the mean of the channels, then its horizontal and vertical
    derivatives. [B, H, W, 3] -> [B, H, W, 2]; nothing of it learns.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        self.sobel = nnx.List([Conv2d(3, 1, 1, rngs=rngs), Conv2d(1, 2, 3, padding=1, rngs=rngs)])
        freeze(self)
        self._set()

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Undoes what the `init_cfg` of a network around it has done."""
        self._set()

    def _set(self) -> None:
        grey: Any = self.sobel[0]
        edges: Any = self.sobel[1]
        grey.kernel.set_value(jnp.full((1, 1, 3, 1), 1 / 3, jnp.float32))
        edges.kernel.set_value(jnp.asarray(np.stack([_HORIZONTAL, _HORIZONTAL.T], axis=-1)[:, :, None]))
        grey.bias.set_value(jnp.zeros((1,), jnp.float32))
        edges.bias.set_value(jnp.zeros((2,), jnp.float32))

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h w 2"]:
        for conv in self.sobel:
            x = conv(x)
        return x


class ResNetSobel(ResNet):
    """ResNet on the edges of images: `Sobel` in front of a network of 2 input channels.

    Args:
        kwargs: the arguments of `ResNet`, but `in_channels`.
    """

    def __init__(self, *, rngs: nnx.Rngs, **kwargs: Any):
        super().__init__(in_channels=2, rngs=rngs, **kwargs)
        self.sobel_layer = Sobel(rngs=rngs)

    def __call__(self, x: Float[Array, "b h w 3"], *, rngs: nnx.Rngs | None = None) -> tuple[Array, ...]:
        return super().__call__(self.sobel_layer(x), rngs=rngs)


class ClusteringMethod(BaseSelfSupervisor):
    """What DeepCluster and ODC share: classes are clusters of the neck's features, and the head learns to tell them.

    Args:
        clustering: the clustering of all features; a `Kmeans` of as many clusters as the head has classes.
        reweight: whether a cluster of n images has a weight in proportion to n^-reweight_pow in the loss. The loss is
            divided by the sum of weights, as in the papers' code. (MMSelfSup 1.0 divides by the number of images instead,
            which makes its loss and gradients `num_classes` times smaller.)
        reweight_pow: see there.
        parts: arguments of `BaseSelfSupervisor`.

    Attributes:
        loss_weight: of each cluster, float32 [K]; adds up to 1.
    """

    def __init__(
        self,
        clustering: Mapping[str, Any] | Kmeans,
        reweight: bool,
        reweight_pow: float,
        *,
        rngs: nnx.Rngs,
        **parts: Any,
    ):
        super().__init__(rngs=rngs, **parts)
        name = type(self).__name__
        self.num_classes: int = getattr(self.head, "num_classes", 0)
        if not isinstance(self.head, ClsHead) or not self.num_classes:
            raise ConfigError(f"{name} needs a classification head of num_classes clusters, such as LinearClsHead")
        self.clustering = build(clustering, k=self.num_classes)
        if self.clustering.k != self.num_classes:
            raise ConfigError(f"{name}: clustering.k={self.clustering.k}, but head.num_classes={self.num_classes}")
        self.reweight, self.reweight_pow = reweight, reweight_pow
        self.loss_weight = nnx.BatchStat(jnp.full((self.num_classes,), 1 / self.num_classes, jnp.float32))

    def weigh(self, sizes: Int[Array, " k"] | Int[np.ndarray, " k"]) -> None:
        """Sets the weights of clusters of these sizes, if `reweight`."""
        if self.reweight:
            weight = jnp.maximum(jnp.asarray(sizes, jnp.float32), 1) ** -self.reweight_pow
            self.loss_weight.set_value(weight / weight.sum())

    def classify(self, x: Float[Array, "b d"], label: Int[Array, " b"]) -> Float[Array, ""]:
        """The weighted mean of the head's loss."""
        weight = self.loss_weight[...].at[label].get(mode="fill", fill_value=jnp.nan)  # a wrong index: the run stops
        return self.head.loss(x, label, weight=weight / weight.mean())[0]

    def embed(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """What is clustered: the neck's output. Needs eval mode."""
        x = last(self.neck(self.extract_feat(images)))
        return x.reshape(len(x), -1)

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The backbone's last feature map, averaged over positions."""
        return pool(self.extract_feat(images))

    def cluster(self, features: Float[np.ndarray, "n d"], key: Array, mesh: Mesh | None) -> Clusters:
        """Clusters all features, and starts the head anew: its classes have no more to do with the clusters."""
        cluster_key, head_key = jax.random.split(key)
        self.head.init_weights(nnx.Rngs(head_key))
        return self.clustering(features, cluster_key, mesh)


def describe(clusters: Clusters, k: int) -> dict[str, float]:
    """What to log of a clustering."""
    sizes = np.bincount(clusters.labels, minlength=k)
    return dict(
        inertia=clusters.inertia / len(clusters.labels),  # mean squared distance to the centroid
        smallest=float(sizes.min()),
        largest=float(sizes.max()),
        empty=float((sizes == 0).sum()),
    )


class DeepCluster(ClusteringMethod):
    """Before an epoch, k-means clusters the features of all images; in it, the network learns to tell the clusters.

    So that it does not pay to put all images into one cluster, images are drawn evenly over clusters (section 3.3). The
    backbone gives a tuple of feature maps, the neck pools them, the head is a `LinearClsHead` whose classes are the clusters.

    Args:
        num_samples: images of the data set.
        clustering: a `Kmeans`; its k follows from the head if it is not given.
        unif_sampling: whether to draw images evenly over clusters; else every image comes once in an epoch.
        reweight, reweight_pow: as of `ClusteringMethod`.
        interval: epochs from one clustering to the next. The first is before the first epoch.
        with_sobel: whether the method itself puts `Sobel` before the backbone (with `in_channels=2`); `ResNetSobel` is
            the other way to have it.
        parts: arguments of `BaseSelfSupervisor`.

    Attributes:
        labels: the cluster of each image, int32 [num_samples]; image i is in cluster i mod K until the first clustering.
        sizes: of the clusters, int32 [K].
    """

    local_state: ClassVar = ("labels", "sizes")

    def __init__(
        self,
        num_samples: int = 1281167,
        clustering: Mapping[str, Any] | Kmeans = {"type": "Kmeans", "pca_dim": 256},  # noqa: B006 - read only
        unif_sampling: bool = True,
        reweight: bool = False,
        reweight_pow: float = 0.5,
        interval: int = 1,
        with_sobel: bool = False,
        *,
        rngs: nnx.Rngs,
        **parts: Any,
    ):
        super().__init__(clustering, reweight, reweight_pow, rngs=rngs, **parts)
        if interval < 1:
            raise ConfigError(f"DeepCluster: interval={interval} epochs must be at least 1")
        self.images, self.unif_sampling, self.interval = num_samples, unif_sampling, interval
        self.sobel_layer = Sobel(rngs=rngs) if with_sobel else None
        labels = jnp.arange(num_samples, dtype=jnp.int32) % self.num_classes
        self.labels = nnx.BatchStat(labels)
        self.sizes = nnx.BatchStat(jnp.bincount(labels, length=self.num_classes).astype(jnp.int32))

    @property
    def num_samples(self) -> int:
        return self.images

    def extract_feat(self, images: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Any:
        """The backbone's feature maps."""
        images = self.sobel_layer(images) if self.sobel_layer is not None else images
        return self.backbone(images, rngs=rngs)

    def loss(self, batch: Batch, *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, ""], Metrics]:
        """Cross entropy of the clusters; `image` is [B, H, W, 3], and `index` says which ones they are.

        Logs `feature_std` of the neck's output, and `assignment_entropy` of the clusters that all images are in.
        """
        x = last(self.neck(self.extract_feat(batch["image"], rngs=rngs)))
        x = x.reshape(len(x), -1)
        label = self.labels[...].at[batch["index"]].get(mode="fill", fill_value=self.num_classes)
        share = self.sizes[...] / self.sizes[...].sum()
        return self.classify(x, label), {"feature_std": spread(x), "assignment_entropy": entropy(share)}

    def regroups(self, epoch: int) -> bool:
        return epoch % self.interval == 0

    def regroup(
        self, features: Float[np.ndarray, "n d"], *, epoch: int, key: Array, mesh: Mesh | None = None
    ) -> dict[str, float]:
        """Clusters anew. Logs `nmi`, the mutual information with the clusters before, and sizes."""
        before = gather(self.labels[...])
        found = self.cluster(features, key, mesh)
        sizes = np.bincount(found.labels, minlength=self.num_classes)
        self.labels.set_value(jnp.asarray(found.labels))
        self.sizes.set_value(jnp.asarray(sizes, jnp.int32))
        self.weigh(sizes)
        described = describe(found, self.num_classes)
        return described | ({"nmi": normalized_mutual_info(before, found.labels)} if epoch else {})

    def order(self) -> Order | None:
        return UniformOrder(gather(self.labels[...])) if self.unif_sampling else None
