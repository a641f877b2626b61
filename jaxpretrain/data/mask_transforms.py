"""What masked image modelling asks of the host: masks of patches, and two pictures of one crop.

Names, arguments and distributions are MMPretrain's. A transform is called as `transform(sample, rng)`, see
`transforms.py`. Masks go into `sample["mask"]`, int32 [h, w] with a number for each patch: 1 is masked, 0 is seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from jaxpretrain.build import ConfigError
from jaxpretrain.data.base import Sample
from jaxpretrain.data.image_ops import Box, Image, check_filter, crop, resize

Mask = Int32[np.ndarray, "h w"]


class Pictures(tuple[Image, ...]):
    """Pictures of one crop. Unlike views, they stay aligned: a flip that follows mirrors all of them, or none."""


class BEiTMaskGenerator:
    """Masks of rectangular blocks (Bao et al., 2021, "BEiT", algorithm 1).

    Blocks are added until exactly `num_masking_patches` patches are masked. A block's area is U(min_num_patches, what
    may still be masked), its log aspect U(log min_aspect, log max_aspect). One that does not fit, adds nothing or adds
    too much is drawn anew. As in the reference, the last row and the last column are never masked.

    Args:
        input_size: patches on an edge, or (height, width).
        num_masking_patches: how many are masked.
        min_num_patches, max_num_patches: area of a block, before overlaps; None: num_masking_patches.
        min_aspect, max_aspect: of height / width; None: 1 / min_aspect.

    Raises:
        ConfigError: no such mask exists.
    """

    ATTEMPTS = 100_000  # blocks drawn for one mask, some ten normally

    def __init__(
        self,
        input_size: int | Sequence[int],
        num_masking_patches: int,
        min_num_patches: int = 4,
        max_num_patches: int | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
    ):
        self.height, self.width = _pair(input_size)
        self.num_masking_patches, self.min_num_patches = num_masking_patches, min_num_patches
        self.max_num_patches = num_masking_patches if max_num_patches is None else max_num_patches
        maximum = (self.height - 1) * (self.width - 1)
        if not 0 < num_masking_patches <= maximum:
            raise ConfigError(
                f"BEiTMaskGenerator: num_masking_patches={num_masking_patches} must be within 1..{maximum}, the "
                f"{self.height}x{self.width} patches without the last row and column, which blocks do not reach"
            )
        if not 0 < min_aspect <= (max_aspect or 1 / min_aspect):
            raise ConfigError(f"BEiTMaskGenerator: min_aspect={min_aspect} and max_aspect={max_aspect} must ascend")
        self.log_aspect = math.log(min_aspect), math.log(max_aspect or 1 / min_aspect)

    def draw(self, rng: np.random.Generator) -> Mask:
        mask = np.zeros((self.height, self.width), np.int32)
        missing = self.num_masking_patches
        for _ in range(self.ATTEMPTS):
            largest = min(missing, self.max_num_patches)
            # Towards the end `largest` is below min_num_patches: the range is turned round then, as the reference's.
            area = self.min_num_patches + (largest - self.min_num_patches) * rng.random()
            aspect = math.exp(rng.uniform(*self.log_aspect))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= self.height or width >= self.width:
                continue
            top, left = rng.integers(self.height - height), rng.integers(self.width - width)
            block = mask[top : top + height, left : left + width]
            added = block.size - int(block.sum())
            if 0 < added <= largest:
                block[:] = 1
                missing -= added
                if not missing:
                    return mask
        raise ConfigError(
            f"BEiTMaskGenerator: no blocks of min_num_patches={self.min_num_patches} and more mask exactly "
            f"{self.num_masking_patches} of {self.height}x{self.width} patches; lower min_num_patches"
        )

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return {**sample, "mask": self.draw(rng)}


class SimMIMMaskGenerator:
    """Masks of squares on a grid, a fixed number of them (Xie et al., 2021, "SimMIM", section 3.2).

    Args:
        input_size: edge of the image, pixels.
        mask_patch_size: edge of a masked square, pixels.
        model_patch_size: edge of the model's patches, pixels: the mask has input_size / model_patch_size of them.
        mask_ratio: of the squares; their number is rounded up.

    Raises:
        ConfigError: sizes do not divide.
    """

    def __init__(
        self, input_size: int = 192, mask_patch_size: int = 32, model_patch_size: int = 4, mask_ratio: float = 0.6
    ):
        if input_size % mask_patch_size or mask_patch_size % model_patch_size:
            raise ConfigError(
                f"SimMIMMaskGenerator: input_size={input_size} must be a multiple of mask_patch_size={mask_patch_size}, "
                f"and that of model_patch_size={model_patch_size}"
            )
        if not 0 < mask_ratio <= 1:
            raise ConfigError(f"SimMIMMaskGenerator: mask_ratio={mask_ratio} must be within (0, 1]")
        self.edge, self.scale = input_size // mask_patch_size, mask_patch_size // model_patch_size
        self.count = math.ceil(self.edge**2 * mask_ratio)

    def draw(self, rng: np.random.Generator) -> Mask:
        mask = np.zeros(self.edge**2, np.int32)
        mask[rng.permutation(len(mask))[: self.count]] = 1
        return np.kron(mask.reshape(self.edge, self.edge), np.ones((self.scale, self.scale), np.int32))

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return {**sample, "mask": self.draw(rng)}


class RandomResizedCropAndInterpolationWithTwoPic:
    """One random crop at two sizes: `image` becomes two pictures, of the encoder and of the target's tokenizer (BEiT).

    The crop is RandomResizedCrop's, but for two things, as in the reference: it is smaller than the image along both
    edges, and the position farthest right or down is never drawn.

    Args:
        size: of the first picture: edge length or (width, height).
        second_size: of the second; None: there is one picture only.
        scale: of the crop's area, as a fraction of the image's.
        ratio: of width / height.
        interpolation: `bilinear`, `bicubic`, ... (OpenCV's), or `random`: bilinear or bicubic, each time anew.
        second_interpolation: of the second picture.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        second_size: int | Sequence[int] | None = None,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str = "bilinear",
        second_interpolation: str = "lanczos",
    ):
        name = type(self).__name__
        if not (0 < scale[0] <= scale[1] and 0 < ratio[0] <= ratio[1]):
            raise ConfigError(f"{name}: scale={scale} and ratio={ratio} must be ascending and positive")
        self.scale, self.ratio = scale, ratio
        self.interpolations = ("bilinear", "bicubic") if interpolation == "random" else (interpolation,)
        for one in (*self.interpolations, second_interpolation):
            check_filter(name, one, "cv2")
        self.second_interpolation = second_interpolation
        self.size = _pair(size)
        self.second_size = None if second_size is None else _pair(second_size)

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Box:
        for _ in range(10):
            area = height * width * rng.uniform(self.scale[0], self.scale[1])
            aspect = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w < width and 0 < h < height:
                return Box(int(rng.integers(height - h)), int(rng.integers(width - w)), h, w)
        h, w = min(height, round(width / self.ratio[0])), min(width, round(height * self.ratio[1]))
        return Box((height - h) // 2, (width - w) // 2, h, w)

    def apply(self, image: Image, box: Box, interpolation: str) -> Image | Pictures:
        part = crop(image, box)
        first = resize(part, self.size, "cv2", interpolation)
        if self.second_size is None:
            return first
        return Pictures((first, resize(part, self.second_size, "cv2", self.second_interpolation)))

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image = sample["image"]
        if isinstance(image, tuple):
            raise ConfigError(f"{type(self).__name__} takes one image, but here there are {len(image)} views already")
        box = self.draw(rng, *image.shape[:2])
        interpolation = self.interpolations[rng.integers(len(self.interpolations))]
        return {**sample, "image": self.apply(image, box, interpolation)}


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
