"""Image augmentation and normalisation on the device, inside the jitted step.

A transform sees **one** image, float32 [H, W, 3], RGB, 0..255, and a key: `transform(image, key) -> image`. Crops change
its shape. `DevicePipeline` maps the transforms of a recipe over a batch, and gives each sample its own key, made of the
seed, the epoch and the sample's index. So the pixels of a sample depend on these alone: not on the rest of the batch,
and not on the number of devices.

Names and arguments are MMPretrain's. Its images are BGR and ours RGB: colours in arguments are RGB (`fill_color`,
`pad_val`), but for `RandomGrayscale`, whose order is read and mapped.

The transforms are in `device_colour.py`, `device_geometry.py`, `device_crop.py`, `device_erasing.py` and
`device_auto_augment.py`. Each is within one grey level of the host's of the same name, where both exist, or says what is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jaxtyping import Array, Float, Int

from jaxpretrain.build import ConfigError, build, names, nearest
from jaxpretrain.data.device_auto_augment import AutoAugment, RandAugment
from jaxpretrain.data.device_colour import ColorJitter, GaussianBlur, RandomGrayscale, Solarize
from jaxpretrain.data.device_crop import CenterCrop, MAERandomResizedCrop, RandomResizedCrop, Resize
from jaxpretrain.data.device_draws import Image, Key, Transform, probability, sometimes
from jaxpretrain.data.device_erasing import RandomErasing
from jaxpretrain.data.device_geometry import RandomFlip, RandomRotate90, RandomRotation, Rotate90


class RandomApply:
    """Applies all of `transforms`, one after the other, with probability `prob`; else none."""

    def __init__(self, transforms: Any, prob: float = 0.5):
        self.prob = probability(prob, "RandomApply: prob")
        self.transforms = build_all(transforms if isinstance(transforms, Sequence) else [transforms])

    def __call__(self, image: Image, key: Key) -> Image:
        gate, rest = random.split(key)
        return sometimes(self.prob, gate, lambda x: apply_all(self.transforms, x, rest), image)


class MultiView:
    """Says which transforms each view gets: the form of the host's MultiView.

    The views are those that the host has made. If the host gives one image, and each list has a `RandomResizedCrop`, they are
    cut from that image here.

    Args:
        transforms: lists of transforms.
        num_views: how many views each list is for; one number if there is one list.
    """

    alike = False  # whether the views of a sample share its draws

    def __init__(self, transforms: Sequence[Sequence[Any]], num_views: int | Sequence[int]):
        counts = [num_views] if isinstance(num_views, int) else list(num_views)
        if len(counts) != len(transforms) or not all(isinstance(t, Sequence) for t in transforms):
            raise ConfigError(
                f"MultiView: num_views={num_views!r} needs as many lists of transforms; there are {len(transforms)}"
            )
        built = [build_all(t) for t in transforms]
        self.views = [chain for chain, count in zip(built, counts, strict=True) for _ in range(count)]

    @property
    def makes_views(self) -> bool:
        """Whether each list makes another image of the same one."""
        return all(any(isinstance(t, RandomResizedCrop | Rotate90) for t in chain) for chain in self.views)


class Pictures(MultiView):
    """Says that the views are pictures of one crop (BEiT): everything random happens to all of them alike.

    Args:
        transforms: one list, for all pictures.
        num_pictures: how many there are.
    """

    alike = True

    def __init__(self, transforms: Sequence[Any], num_pictures: int = 2):
        super().__init__([transforms], num_pictures)


class RotationWithLabels(MultiView):
    """Makes four views of a square image: turned by 0, 90, 180 and 270 degrees clockwise, and otherwise alike."""

    alike = True

    def __init__(self) -> None:
        super().__init__([[Rotate90(turns)] for turns in range(4)], [1] * 4)


TRANSFORMS: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        AutoAugment,
        CenterCrop,
        ColorJitter,
        GaussianBlur,
        MAERandomResizedCrop,
        MultiView,
        Pictures,
        RandAugment,
        RandomApply,
        RandomErasing,
        RandomFlip,
        RandomGrayscale,
        RandomResizedCrop,
        RandomRotate90,
        RandomRotation,
        Resize,
        RotationWithLabels,
        Solarize,
    )
}
_IGNORED = ("PackInputs",)  # ends every pipeline of MMPretrain; batches need no packing here


def _build_one(cfg: Any) -> Any:
    if not isinstance(cfg, Mapping) and not hasattr(cfg, "to_dict"):
        return cfg
    args = dict(cfg.to_dict() if hasattr(cfg, "to_dict") else cfg)
    name = args.get("type")
    if isinstance(name, str) and "." not in name:
        if name not in TRANSFORMS and name not in names():
            raise ConfigError(
                f"device_pipeline: {name!r} does not run on the device.{nearest(name, TRANSFORMS)} "
                "What loads images, or leaves them in sizes of their own, belongs in `pipeline`, on the host."
            )
        args["type"] = TRANSFORMS.get(name, name)
    return build(args)


def build_all(cfgs: Sequence[Any]) -> list[Any]:
    return [_build_one(cfg) for cfg in cfgs if not (isinstance(cfg, Mapping) and cfg.get("type") in _IGNORED)]


def apply_all(transforms: Sequence[Transform], image: Image, key: Key) -> Image:
    for i, transform in enumerate(transforms):
        image = transform(image, random.fold_in(key, i))
    return image


# ---------------------------------------------------------------------------------------------------------------------


def check_order(channel_order: str) -> str:
    """The order, if there is one of this name; else ConfigError."""
    orders = ("rgb", "bgr", "grey")
    if channel_order not in orders:
        raise ConfigError(f"channel_order={channel_order!r} must be one of {orders}.{nearest(channel_order, orders)}")
    return channel_order


def in_order(images: Float[Array, "b h w 3"], channel_order: str) -> Float[Array, "b h w c"]:
    """RGB images as networks want them that were trained on others: 'bgr', blue first, or 'grey', one channel; or 'rgb'."""
    if channel_order == "grey":
        return images.mean(axis=-1, keepdims=True)
    return images[..., ::-1] if channel_order == "bgr" else images


def sample_key(seed_key: Key, epoch: Int[Array, ""], index: Int[Array, ""], repeat: Int[Array, ""] | int = 0) -> Key:
    """The key of one sample in one epoch, from which everything random about it on the device derives; another one if
    the epoch has had the sample `repeat` times before.
    """
    key = random.fold_in(random.fold_in(seed_key, epoch), index)
    return jnp.where(jnp.asarray(repeat) > 0, random.fold_in(key, repeat), key)


class DevicePipeline:
    """Augments and normalises a batch; to be called inside the jitted step.

    Args:
        pipeline: descriptions `dict(type=...)` of device transforms (`TRANSFORMS`, or a dotted path of one's own), or
            callables `(image, key) -> image`. They apply to every view; `MultiView` gives each its own, and may make the
            views, of one image. May be empty.
        mean, std: of R, G, B, in grey levels 0..255: the result is (image - mean) / std.
        second_mean, second_std: those of the second of two views, where they differ (target pictures of BEiT and CAE).
        channel_order: of the result, see `in_order`.

    Raises:
        ConfigError: unknown transforms or arguments; when called, a number of views that is not the batch's.
    """

    def __init__(
        self,
        pipeline: Sequence[Any],
        mean: Sequence[float],
        std: Sequence[float],
        second_mean: Sequence[float] | None = None,
        second_std: Sequence[float] | None = None,
        channel_order: str = "rgb",
    ):
        self.transforms = build_all(pipeline)
        first = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        second = tuple(
            own if other is None else np.asarray(other, np.float32)
            for own, other in zip(first, (second_mean, second_std), strict=True)
        )
        self.mean_std, self.channel_order = (first, second), check_order(channel_order)

    def __call__(self, batch: Mapping[str, Any], seed_key: Key | None = None) -> dict[str, Any]:
        """The batch with float32 images; everything else passes through.

        Args:
            batch: `image` [B, H, W, 3], uint8 or float in 0..255, RGB, or a tuple of such views; and, unless the
                pipeline is empty, `epoch` and `index`, int32 [B], and `repeat` where samples may be repeated in an epoch.
            seed_key: key of the run's seed. A sample's key is fold_in(fold_in(seed_key, epoch), index), that of its nth
                repeat fold_in(that, n), and the key of its view v is fold_in(that, v), or fold_in(that, 0) with `Pictures`
                and `RotationWithLabels`. Not needed if the pipeline is empty.
        """
        images = batch["image"]
        makers = [t for t in self.transforms if isinstance(t, MultiView) and t.makes_views]
        single = not isinstance(images, tuple | list) and not makers
        count = len(makers[0].views) if makers else 1
        views = tuple(images) if isinstance(images, tuple | list) else (images,) * count
        chains = self._chains(len(views))
        if self.transforms:
            if seed_key is None:
                raise TypeError("DevicePipeline: a pipeline with transforms needs seed_key")
            numbers = [batch[name] for name in ("epoch", "index", "repeat") if name in batch]
            keys = jax.vmap(partial(sample_key, seed_key))(*numbers)
        alike = any(isinstance(transform, MultiView) and transform.alike for transform in self.transforms)
        done = []
        for v, (view, chain) in enumerate(zip(views, chains, strict=True)):
            view = view.astype(jnp.float32)
            if chain:
                view_keys = jax.vmap(random.fold_in, in_axes=(0, None))(keys, 0 if alike else v)
                view = self._map(chain)(view, view_keys)
            mean, std = self.mean_std[v == 1]
            done.append(in_order((view - mean) / std, self.channel_order))
        return {**batch, "image": done[0] if single else tuple(done)}

    @staticmethod
    def _map(chain: Sequence[Transform]) -> Callable[[Array, Array], Array]:
        """The transforms of one image, for a batch."""
        function = partial(apply_all, chain)
        switches = any(isinstance(transform, RandAugment | AutoAugment) for transform in chain)
        if switches and jax.default_backend() == "cpu" and jax.device_count() == 1:
            # One image after the other, so that only what was drawn is computed: 30 times as fast.
            return lambda images, keys: lax.map(lambda image_and_key: function(*image_and_key), (images, keys))
        return jax.vmap(function)

    def _chains(self, count: int) -> list[list[Transform]]:
        """The transforms of each of `count` views."""
        chains: list[list[Transform]] = [[] for _ in range(count)]
        for transform in self.transforms:
            if isinstance(transform, MultiView) and len(transform.views) != count:
                raise ConfigError(
                    f"device_pipeline: MultiView is for {len(transform.views)} views, the batch has {count}; "
                    "the MultiView in `pipeline` makes the views and must have the same num_views, or each list of this one "
                    "has a RandomResizedCrop, and `pipeline` makes none"
                )
            for view, chain in enumerate(chains):
                chain.extend(transform.views[view] if isinstance(transform, MultiView) else [transform])
        return chains
