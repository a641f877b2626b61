"""Features of images."""

from __future__ import annotations

from typing import Any

from jaxpretrain.inference.base import BaseInferencer, rows


class FeatureExtractor(BaseInferencer):
    """Features of image files by any model of the zoo, classifiers and methods of pre-training alike.

    Args:
        model, pretrained, device, preprocessing, overrides: as of `BaseInferencer`.

    Example:
        >>> model = get_model("resnet18_8xb16_cifar10", backbone=dict(out_indices=(0, 1, 2, 3)))
        >>> features = FeatureExtractor(model)("photo.jpg")[0]
        >>> [feature.shape for feature in features]
        [(64,), (128,), (256,), (512,)]
    """

    def __call__(self, inputs: Any, batch_size: int = 1, **options: Any) -> list[Any]:
        """What `model.extract_feat` gives for each image, without the batch axis.

        Args:
            inputs: an image, several, or a folder (see `jaxpretrain.inference.images`).
            batch_size: images that go through the network at once.
            options: of the model's `extract_feat`. Of a classifier `stage`: 'backbone' gives a tuple of feature maps
                [H, W, C], 'neck' (the default) a tuple of vectors [C], one for each of `out_indices`, 'pre_logits' the
                input of the last linear layer, [C].

        Returns:
            a list with as many entries as images: a NumPy array, or a tuple of them.

        Raises:
            ImageError: an image cannot be read, naming it.
        """
        results = []
        for batch in self.batches(inputs, batch_size):
            results += rows(self.compiled.extract_feat(batch.pixels, **options), len(batch.sources))
        return results
