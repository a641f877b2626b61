"""What MMPretrain's pipelines do besides changing pixels: loading, packing, collecting, cleaning text.

Most of it happens elsewhere here (the loader decodes and packs, the device normalises), and is accepted so that pipelines
read unchanged.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import Sample

_OUR_KEYS = dict(img="image", gt_label="label", img_path="path", sample_idx="index")
_OF_BATCHES = ("image", "label", "index", "epoch", "mask")


def our_key(name: str) -> str:
    """What MMPretrain's key of a sample is called here."""
    return _OUR_KEYS.get(name, name)


class _Accepted:
    """Changes nothing."""

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return sample


class LoadImageFromFile(_Accepted):
    """The loader decodes images, to RGB uint8; this says how, as the first step of a pipeline, and needs not be there.

    Args:
        scaled: if what follows shrinks a JPEG, or a crop of it, to half or less (RandomResizedCrop, Resize, ResizeEdge,
            also inside MultiView), decode it at 1/2, 1/4 or 1/8 of its size, never below that of the result. Much faster
            for large photographs; antialiased whatever the backend. The draws of the transforms are the same, the pixels
            differ (see decode.ScaledJPEG), so for training alone.
        to_float32, color_type, imdecode_backend, file_client_args, ignore_empty, backend_args: accepted so that
            MMPretrain's pipelines read unchanged.
    """

    lazy = True

    def __init__(
        self,
        to_float32: bool = False,
        color_type: str = "color",
        imdecode_backend: str = "cv2",
        file_client_args: Any = None,
        ignore_empty: bool = False,
        backend_args: Any = None,
        scaled: bool = False,
    ):
        self.scaled = scaled
        if to_float32 or color_type != "color":
            raise ConfigError(
                "LoadImageFromFile: images are uint8 RGB here; to_float32 and other values of color_type do not exist"
            )


class PackInputs(_Accepted):
    """Accepted so that MMPretrain's pipelines read unchanged: the loader packs batches."""

    def __init__(self, input_key: str = "img", algorithm_keys: Sequence[str] = (), meta_keys: Sequence[str] = ()):
        _check_keys("PackInputs: algorithm_keys", algorithm_keys)


class PackSelfSupInputs(_Accepted):
    """MMSelfSup's PackInputs; accepted like that."""

    def __init__(
        self,
        key: str = "img",
        algorithm_keys: Sequence[str] = (),
        pseudo_label_keys: Sequence[str] = (),
        meta_keys: Sequence[str] = (),
    ):
        _check_keys("PackSelfSupInputs: algorithm_keys", algorithm_keys)


class PackMultiTaskInputs(_Accepted):
    """Accepted so that MMPretrain's pipelines read unchanged: labels by task are a dict, and the loader packs them.

    Args:
        multi_task_fields: what is given by task: `gt_label`.
        input_key, task_handlers: accepted.
    """

    def __init__(
        self, multi_task_fields: Sequence[str], input_key: str = "img", task_handlers: Mapping[str, Any] | None = None
    ):
        _check_keys("PackMultiTaskInputs: multi_task_fields", multi_task_fields)


class ToTensor(_Accepted):
    """Accepted, as `ToTensor` and `ImageToTensor`: the loader makes arrays on the device."""

    def __init__(self, keys: Sequence[str] = ()):
        pass


class Normalize:
    """Refused: images stay uint8 on the host, so that a quarter of the bytes travels, and the device normalises them."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], to_rgb: bool = True):
        raise ConfigError(
            "Normalize: images stay uint8 in `pipeline`; remove it, and set config.data_preprocessor = "
            f"dict(mean={list(mean)}, std={list(std)}), in the order R, G, B"
        )


class Collect:
    """Keeps the named keys of a sample, and what batches are made of.

    Args:
        keys: ours, or MMPretrain's (`img`, `gt_label`, ...).
    """

    def __init__(self, keys: Sequence[str]):
        self.keys = [our_key(key) for key in ([keys] if isinstance(keys, str) else keys)]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        missing = [key for key in self.keys if key not in sample]
        if missing:
            raise ConfigError(f"Collect: samples have no {', '.join(missing)}; they have {', '.join(sample)}")
        return {key: value for key, value in sample.items() if key in self.keys or key in _OF_BATCHES}


class Transpose:
    """Orders the axes of arrays anew. Images stay [H,W,3]: putting their channels first is the packing of a batch, skipped.

    Args:
        keys: of the sample.
        order: of the axes, as `numpy.transpose`.
    """

    def __init__(self, keys: Sequence[str], order: Sequence[int]):
        self.keys = [our_key(key) for key in ([keys] if isinstance(keys, str) else keys)]
        self.order = tuple(order)
        if "image" in self.keys and self.order not in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
            raise ConfigError(
                f"Transpose: order={list(order)} of an image [height, width, channel]; (1, 0, 2) swaps height and width, "
                "(2, 0, 1) is accepted and changes nothing, for batches have their channels last"
            )

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return {**sample, **{key: self._ordered(key, sample[key]) for key in self.keys}}

    def _ordered(self, key: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return type(value)(self._ordered(key, one) for one in value)
        return value if key == "image" and self.order == (2, 0, 1) else np.transpose(value, self.order)


class CleanCaption:
    """Plain text: without punctuation, in lower case, single spaces.

    Args:
        keys: of strings, or lists of strings, in the sample.
        remove_chars: characters to leave out.
        lowercase: as said.
        remove_dup_space: one space in place of several.
        strip: no space at both ends (of the text with its punctuation).
    """

    def __init__(
        self,
        keys: str | Sequence[str] = "gt_caption",
        remove_chars: str = string.punctuation,
        lowercase: bool = True,
        remove_dup_space: bool = True,
        strip: bool = True,
    ):
        self.keys = [keys] if isinstance(keys, str) else list(keys)
        self.removed = str.maketrans("", "", remove_chars)
        self.lowercase, self.remove_dup_space, self.strip = lowercase, remove_dup_space, strip

    def clean(self, text: str) -> str:
        """One text, cleaned."""
        text = (text.strip() if self.strip else text).translate(self.removed)
        text = re.sub(r"\s{2,}", " ", text) if self.remove_dup_space else text
        return text.lower() if self.lowercase else text

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        cleaned: Sample = {}
        for key in self.keys:
            text = sample.get(key)
            if isinstance(text, str):
                cleaned[key] = self.clean(text)
            elif isinstance(text, list | tuple) and all(isinstance(item, str) for item in text):
                cleaned[key] = [self.clean(item) for item in text]
            else:
                raise ConfigError(f"CleanCaption: {key!r} of a sample must be text or a list of texts, not {text!r}")
        return {**sample, **cleaned}


def _check_keys(what: str, keys: Sequence[str]) -> None:
    unknown = [key for key in keys if our_key(key) not in _OF_BATCHES]
    if unknown:
        raise ConfigError(f"{what}={list(keys)}: batches hold image, mask, label, index and epoch alone")
