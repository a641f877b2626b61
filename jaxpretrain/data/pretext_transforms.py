"""What pretext tasks ask of the host: the patches of an image, or the image turned. Names are MMSelfSup's.

Labels follow from the order of the views, which is fixed, so the methods know them; none are put into the sample. A
transform is called as `transform(sample, rng)`, see `transforms.py`.
"""

from __future__ import annotations

import numpy as np

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import Sample
from jaxpretrain.data.image_ops import Box, Image, crop


class RandomPatchWithLabels:
    """Nine patches: `image` becomes a tuple of the central one, and its eight neighbours row by row.

    The image is cut into 3 x 3 cells of equal size; a patch lies at a random place in its cell, so that borders do not meet
    (Doersch et al., 2015, section 3.1).

    Args:
        patch_jitter: by how many pixels a patch is smaller than its cell (21 in MMSelfSup, where it is no argument).
    """

    PER_SIDE = 3

    def __init__(self, patch_jitter: int = 21):
        if patch_jitter < 0:
            raise ConfigError(f"RandomPatchWithLabels: patch_jitter={patch_jitter} must not be negative")
        self.patch_jitter = patch_jitter

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image: Image = sample["image"]
        if isinstance(image, tuple):
            raise ConfigError("RandomPatchWithLabels takes one image, not views")
        cell_height, cell_width = (length // self.PER_SIDE for length in image.shape[:2])
        height, width = cell_height - self.patch_jitter, cell_width - self.patch_jitter
        if min(height, width) < 1:
            raise ConfigError(
                f"RandomPatchWithLabels: cells of {cell_height}x{cell_width} pixels leave no patch with "
                f"patch_jitter={self.patch_jitter}; resize images to more, or lower it"
            )
        patches = []
        for cell in range(self.PER_SIDE**2):
            row, column = divmod(cell, self.PER_SIDE)
            top, left = rng.integers(self.patch_jitter + 1, size=2)
            box = Box(row * cell_height + int(top), column * cell_width + int(left), height, width)
            patches.append(crop(image, box))
        centre = len(patches) // 2
        return {**sample, "image": (patches[centre], *patches[:centre], *patches[centre + 1 :])}


class RotationWithLabels:
    """The image turned by 0, 90, 180 and 270 degrees clockwise: `image` becomes a tuple of four.

    Raises:
        ConfigError: (when applied) the image is not square.
    """

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image: Image = sample["image"]
        if isinstance(image, tuple) or image.shape[0] != image.shape[1]:
            what = "views" if isinstance(image, tuple) else f"an image of {image.shape[0]}x{image.shape[1]} pixels"
            raise ConfigError(f"RotationWithLabels takes one square image, not {what}: crop or resize it first")
        return {**sample, "image": tuple(np.rot90(image, -turns) for turns in range(4))}
