"""Classes of images."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.data.class_names import class_names
from jaxpretrain.data.image_ops import Image, resize
from jaxpretrain.data.transforms import ResizeEdge
from jaxpretrain.inference.base import BaseInferencer, Batch, rows
from jaxpretrain.inference.images import stem
from jaxpretrain.zoo.index import ModelInfo, ModelName, is_model_name, list_models, model_info

Result = dict[str, Any]


@dataclass(frozen=True)
class DataSample:
    """A result as an object; the attributes are the keys of the dictionary. `pred_class` is None where names are unknown."""

    pred_scores: Float[np.ndarray, " classes"]
    pred_label: int
    pred_score: float
    pred_class: str | None = None


class ImageClassificationInferencer(BaseInferencer):
    """Classes of image files.

    Args:
        model, pretrained, device, preprocessing, overrides: as of `BaseInferencer`.
        classes: names of the classes: a list, or a data set (see `jaxpretrain.data.class_names`). By default those of the
            data set that the model was trained on, if its head still has as many classes.

    Example:
        >>> inferencer = ImageClassificationInferencer("resnet18_8xb16_cifar10", pretrained=False)
        >>> result = inferencer(["photo.jpg", "other.jpg"], batch_size=2)[0]
        >>> sorted(result)
        ['pred_class', 'pred_label', 'pred_score', 'pred_scores']
    """

    def __init__(
        self,
        model: Any,
        pretrained: bool | str | os.PathLike | None = True,
        device: Any = None,
        classes: str | Sequence[str] | None = None,
        **options: Any,
    ):
        super().__init__(model, pretrained, device, **options)
        if not hasattr(self.model, "predict") or getattr(self.model, "head", None) is None:
            raise ConfigError(
                f"{type(self.model).__name__} has no head that classifies images; FeatureExtractor gives its features"
            )
        self._classes_given = classes is not None
        self.classes: Sequence[str] | None = None
        if classes is None:
            info = getattr(self.model, "info", None)
            classes = info.classes if info else None
        if classes is not None:
            self.classes = class_names(classes) if isinstance(classes, str) else tuple(classes)

    def __call__(
        self,
        inputs: Any,
        return_datasamples: bool = False,
        batch_size: int = 1,
        *,
        show: bool = False,
        show_dir: str | os.PathLike | None = None,
        rescale_factor: float | None = None,
        resize: int | None = None,
        draw_score: bool = True,
        wait_time: float = 0,
    ) -> list[Any]:
        """The class of each image.

        Args:
            inputs: a path, URL, Pillow image or array uint8 [H, W, 3] in **RGB** (MMPretrain takes BGR); a list of such;
                an array of several; or a folder.
            return_datasamples: give `DataSample`s instead of dictionaries.
            batch_size: images that go through the network at once. The last batch is filled up, so that only one shape is
                compiled.
            show: open each picture with the prediction written on it, in the system's viewer.
            show_dir: save these pictures there, as PNG under the images' names.
            rescale_factor: enlarge or shrink pictures by this factor; by default small ones are enlarged.
            resize: length of the pictures' shorter edge.
            draw_score: write the score beside the class.
            wait_time: accepted and not used: nothing waits for the viewer.

        Returns:
            a list with a dictionary for each image: `pred_scores` float32 [classes], `pred_label`, the best one's number,
            `pred_score`, its score, and `pred_class`, its name, where names are known.

        Raises:
            ImageError: an image cannot be read, naming it.
        """
        results: list[Result] = []
        taken: set[str] = set()
        for batch in self.batches(inputs, batch_size):
            scores = self.compiled.predict(batch.pixels)
            found = [self._result(row) for row in rows(scores, len(batch.sources))]
            if show or show_dir is not None:
                pictures = self._draw(batch, found, draw_score, rescale_factor, resize)
                self._hand_out(batch, pictures, len(results), show, show_dir, taken)
            results += found
        return [DataSample(**result) for result in results] if return_datasamples else results

    def _result(self, scores: Float[np.ndarray, " classes"]) -> Result:
        if self.classes is not None and len(self.classes) != len(scores):
            if self._classes_given:
                raise ConfigError(f"classes has {len(self.classes)} names, and the model {len(scores)} classes")
            self.classes = None  # the head was changed, and the zoo's names mean others
        label = int(np.argmax(scores))
        result = dict(pred_scores=scores.astype(np.float32), pred_label=label, pred_score=float(scores[label]))
        return result | ({} if self.classes is None else dict(pred_class=self.classes[label]))

    def _draw(
        self, batch: Batch, found: list[Result], draw_score: bool, factor: float | None, edge: int | None
    ) -> list[Image]:
        from jaxpretrain.visualize.predictions import draw_prediction

        pictures = []
        for image, result in zip(batch.originals, found, strict=True):
            if edge is not None:
                image = resize(image, ResizeEdge(edge).size(*image.shape[:2]), "pillow", "bilinear")
            pictures.append(draw_prediction(image, result, draw_score=draw_score, rescale_factor=factor))
        return pictures

    def _hand_out(
        self, batch: Batch, pictures: list[Image], first: int, show: bool, show_dir: Any, taken: set[str]
    ) -> None:
        from PIL import Image as pillow

        for number, (source, pixels) in enumerate(zip(batch.sources, pictures, strict=True), first):
            name = free = stem(source) or str(number)
            count = 1
            while free in taken:  # images of the same name in different folders
                free, count = f"{name}_{count}", count + 1
            taken.add(free)
            picture = pillow.fromarray(pixels)
            if show_dir is not None:
                Path(show_dir).mkdir(parents=True, exist_ok=True)
                picture.save(Path(show_dir) / f"{free}.png")
            if show:
                picture.show(title=free)

    @staticmethod
    def list_models(pattern: str | None = None) -> list[ModelName]:
        """Names of the classifiers in the zoo; see `jaxpretrain.list_models`."""
        return list_models(pattern, task="Image Classification")


_TASKS = ("Image Classification", "Multi-Label Classification")


def inference_model(model: Any, image: Any, **options: Any) -> Result:
    """The result of a model for one image, to try it out; for more than one, keep an inferencer.

    Args:
        model: a model, or a name or configuration, whose published weights are then loaded.
        image: a path, URL, Pillow image or array uint8 [H, W, 3] in RGB.
        options: arguments of the inferencer (`pretrained`, `device`, `classes`) and of its call (`show`, `show_dir`, ...).

    Returns:
        the dictionary that `ImageClassificationInferencer` gives for an image.

    Example:
        >>> model = get_model("resnet18_8xb16_cifar10")
        >>> sorted(inference_model(model, "photo.jpg"))
        ['pred_class', 'pred_label', 'pred_score', 'pred_scores']

    Raises:
        ConfigError: the model is for another task than classification.
    """
    if isinstance(model, str) and is_model_name(model):
        info: ModelInfo | None = model_info(model)
    else:
        info = getattr(model, "info", None)
    if info is not None and info.tasks and not set(info.tasks) & set(_TASKS):
        raise ConfigError(f"{info.name} is for {' and '.join(info.tasks)}, for which this version has no inferencer")
    own = ("pretrained", "device", "classes", "preprocessing")
    known = [*own, *inspect.signature(ImageClassificationInferencer.__call__).parameters]
    for name in options:
        if name not in known:
            raise ConfigError(f"inference_model has no argument {name!r}.{nearest(name, known)}")
    inferencer = ImageClassificationInferencer(model, **{k: options.pop(k) for k in list(options) if k in own})
    return inferencer(image, **options)[0]
