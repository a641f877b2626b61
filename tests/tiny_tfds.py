"""A TFDS builder for the tests: six grey images in three classes."""

from __future__ import annotations

import io

import tensorflow_datasets as tfds
from PIL import Image


class TinyTfds(tfds.core.GeneratorBasedBuilder):
    """Image i has grey level 10 i and label i mod 3."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(4, 4, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(6):
            png = io.BytesIO()  # TFDS encodes arrays with TensorFlow, and takes encoded files without it
            Image.new("RGB", (4, 4), (10 * i,) * 3).save(png, "PNG")
            yield i, {"image": png.getvalue(), "label": i % 3}
