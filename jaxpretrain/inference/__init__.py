"""Models put to use: from image files to classes and features."""

from jaxpretrain.inference.base import BaseInferencer
from jaxpretrain.inference.classification import ImageClassificationInferencer, inference_model
from jaxpretrain.inference.compiled import Compiled, jit
from jaxpretrain.inference.features import FeatureExtractor
from jaxpretrain.inference.images import ImageError, load_image

__all__ = [
    "BaseInferencer",
    "Compiled",
    "FeatureExtractor",
    "ImageClassificationInferencer",
    "ImageError",
    "inference_model",
    "jit",
    "load_image",
]
