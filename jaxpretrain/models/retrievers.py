"""Retrieval: which images of a collection are most like a given one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from jaxpretrain.build import ConfigError, build, nearest
from jaxpretrain.models.classifiers import build_chain
from jaxpretrain.models.layers.base import BaseModule

_STAGES = ("neck", "pre_logits")


def cosine_similarity(a: Float[Array, "n c"], b: Float[Array, "m c"]) -> Float[Array, "n m"]:
    """Cosines of the angles between the rows of `a` and those of `b`, in float32 at least."""

    def unit(x: Array) -> Array:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=1, keepdims=True), 1e-16))

    return jnp.matmul(unit(a), unit(b).T, precision="highest")


_SIMILARITIES: dict[str, Callable[[Array, Array], Array]] = {"cosine_similarity": cosine_similarity}


class Prototype:
    """The features that are searched. Not a variable: they are no weights, and not part of a checkpoint."""

    def __init__(self, vecs: Float[Array, "m c"]):
        self.vecs = vecs


class ImageToImageRetriever(BaseModule):
    """Finds the most similar images of a collection, the prototype.

    Args:
        image_encoder: what makes features [B, C] from images: a dictionary with `type` or a module, or a list of them,
            such as [backbone, neck], which are called one after the other.
        prototype: what to search, as for `prepare_prototype`; MMPretrain's data loader configs are accepted here, but
            must be replaced by data there.
        head: what learns from the features, or None: then there is no loss.
        pretrained: weights to start from, the same as `init_cfg=dict(type='Pretrained', checkpoint=...)`.
        similarity_fn: 'cosine_similarity', or a function of features [N, C] and [M, C] to [N, M]; more is more alike.
        train_cfg: settings of training; `augments` are batch augmentations, which the method applies.
        data_preprocessor: accepted for MMPretrain's configs; normalisation is the data pipeline's.
        topk: how many images to find; -1: all, in order.
        init_cfg: initialisation, MMEngine's dictionaries.
    """

    def __init__(
        self,
        image_encoder: Mapping[str, Any] | Sequence[Any] | nnx.Module,
        prototype: Any = None,
        head: Mapping[str, Any] | nnx.Module | None = None,
        pretrained: str | None = None,
        similarity_fn: str | Callable[[Array, Array], Array] = "cosine_similarity",
        train_cfg: Mapping[str, Any] | None = None,
        data_preprocessor: Mapping[str, Any] | None = None,
        topk: int = -1,
        init_cfg: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        if isinstance(similarity_fn, str) and similarity_fn not in _SIMILARITIES:
            raise ConfigError(f"similarity_fn: unknown {similarity_fn!r}.{nearest(similarity_fn, _SIMILARITIES)}")
        if topk != -1 and topk < 1:
            raise ConfigError(f"ImageToImageRetriever: topk is positive, or -1 for all, not {topk}")
        self.init_cfg = {"type": "Pretrained", "checkpoint": pretrained} if pretrained else init_cfg
        self.train_cfg = dict(train_cfg or {})
        self.similarity = _SIMILARITIES[similarity_fn] if isinstance(similarity_fn, str) else similarity_fn
        self.topk = topk
        self.image_encoder = build_chain(image_encoder, rngs)
        self.head = None if head is None else build(head, rngs=rngs)
        self.prototype: Prototype | None = None
        self.prototype_source = None if prototype is None or _is_config(prototype) else Prototype(prototype)

    def extract_feat(
        self, images: Float[Array, "b h w c"], stage: str = "neck", *, rngs: nnx.Rngs | None = None
    ) -> Any:
        """Features of normalised images: what the encoder gives, ([B, C],) in general.

        Args:
            images: normalised images.
            stage: 'neck': the encoder's output; 'pre_logits': the last entry of it, [B, C].
            rngs: for drop path and dropout in training.
        """
        if stage not in _STAGES:
            raise ConfigError(f"extract_feat: unknown stage {stage!r}.{nearest(stage, _STAGES)}")
        chain = self.image_encoder if isinstance(self.image_encoder, nnx.List) else [self.image_encoder]
        feats = chain[0](images, rngs=rngs)
        for part in chain[1:]:
            feats = part(feats)
        return _last(feats) if stage == "pre_logits" else feats

    def __call__(self, images: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None) -> Any:
        """The same as `extract_feat`."""
        return self.extract_feat(images, rngs=rngs)

    def loss(
        self, images: Float[Array, "b h w c"], label: Num[Array, "b ..."], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The head's loss and metrics."""
        if self.head is None:
            raise ConfigError("This retriever has no head, so it has no loss")
        return self.head.loss(self.extract_feat(images, rngs=rngs), label, rngs=rngs)

    def matching(self, feats: Float[Array, "b c"]) -> dict[str, Array]:
        """What of the prototype is most similar to features [B, C].

        Returns:
            score: the similarity to all, [B, M]. pred_label: the indices of the `topk` most similar, int32 [B, k], the
            most similar first. pred_score: their similarities, [B, k].
        """
        if self.prototype is None:
            raise ConfigError("Nothing to search yet: call prepare_prototype with features, images or an .npz file")
        score = self.similarity(feats, self.prototype.vecs)
        count = score.shape[1] if self.topk == -1 else min(self.topk, score.shape[1])
        pred_score, pred_label = jax.lax.top_k(score, count)
        return {"score": score, "pred_label": pred_label, "pred_score": pred_score}

    def predict(self, images: Float[Array, "b h w c"]) -> dict[str, Array]:
        """`matching` of normalised images. Needs eval mode; takes the constructor's prototype if there is no other."""
        if self.prototype is None and self.prototype_source is not None:
            self.prepare_prototype()
        return self.matching(self.extract_feat(images, stage="pre_logits"))

    def prepare_prototype(self, prototype: Any = None, batch_size: int = 32) -> None:
        """Takes the collection to search.

        Args:
            prototype: features [M, C]; normalised images [M, H, W, C], of which features are made; batches of images, as
                an iterable of such arrays or of dictionaries with `image`; or the path of an .npy or .npz file with one
                array of features or images. None: what the constructor was given.
            batch_size: how many images at a time, for an array of them.
        """
        if prototype is None and self.prototype_source is not None:
            prototype = self.prototype_source.vecs
        if isinstance(prototype, str | Path):
            prototype = _read(prototype)
        if prototype is None or _is_config(prototype):
            raise ConfigError("prepare_prototype needs features, images, batches of images, or a file of either")
        if getattr(prototype, "ndim", None) == 2:
            vecs = jnp.asarray(prototype)
        elif hasattr(prototype, "ndim"):
            vecs = self._features(prototype[i : i + batch_size] for i in range(0, len(prototype), batch_size))
        else:
            vecs = self._features(prototype)
        self.prototype = Prototype(vecs)

    def _features(self, batches: Iterable[Any]) -> Float[Array, "m c"]:
        """Features in eval mode, of batches of images."""
        twin = nnx.clone(self)
        twin.eval()
        graphdef, state = nnx.split(twin)
        extract = jax.jit(lambda state, images: nnx.merge(graphdef, state).extract_feat(images, "pre_logits"))
        feats = [
            extract(state, jnp.asarray(batch["image"] if isinstance(batch, Mapping) else batch)) for batch in batches
        ]
        if not feats:
            raise ConfigError("prepare_prototype: there are no images")
        return jnp.concatenate(feats)

    def dump_prototype(self, path: str | Path) -> None:
        """Writes the features that are searched to an .npz file, for `prepare_prototype`."""
        if self.prototype is None:
            self.prepare_prototype()
        assert self.prototype is not None
        np.savez(path, prototype_vecs=np.asarray(self.prototype.vecs, np.float32))


def _is_config(prototype: Any) -> bool:
    return isinstance(prototype, Mapping) or hasattr(prototype, "to_dict")


def _last(feats: Any) -> Array:
    return feats[-1] if isinstance(feats, tuple | list) else feats


def _read(path: str | Path) -> np.ndarray:
    try:
        content = np.load(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read the prototype {str(path)!r}: {error}") from error
    if isinstance(content, np.ndarray):
        return content
    with content:
        if len(content.files) != 1:
            raise ConfigError(f"The prototype {str(path)!r} must hold one array; it has {content.files}")
        return content[content.files[0]]
