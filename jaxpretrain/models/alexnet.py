"""AlexNet: ImageNet Classification with Deep Convolutional Neural Networks (Krizhevsky et al., 2012).

In the form of One Weird Trick for Parallelizing Convolutional Neural Networks (Krizhevsky, 2014,
https://arxiv.org/abs/1404.5997): one stream of convolutions instead of two, and no local response normalisation.
"""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.activation import Activation
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import Conv2d
from jaxpretrain.models.layers.drop import Dropout
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.sequence import MaxPool2d, apply_sequence, flatten

_RELU = {"type": "ReLU"}
_EDGE = 6  # of the last map, for images of 224 pixels


class AlexNet(BaseModule):
    """AlexNet: [B, H, W, 3] -> one map of [B, H/32 - 1, W/32 - 1, 256], or logits [B, num_classes]; in a tuple.

    Args:
        num_classes: number of classes; -1 leaves the classifier out. With it, images have 224 pixels (223 to 254 will do).

    Raises:
        ConfigError: in a call, for images of another size than the classifier is for.
    """

    def __init__(self, num_classes: int = -1, *, rngs: nnx.Rngs):
        self.num_classes = num_classes
        self.features = nnx.List(
            [
                Conv2d(3, 64, 11, 4, 2, rngs=rngs),
                Activation(_RELU),
                MaxPool2d(3, 2),
                Conv2d(64, 192, 5, 1, 2, rngs=rngs),
                Activation(_RELU),
                MaxPool2d(3, 2),
                Conv2d(192, 384, 3, 1, 1, rngs=rngs),
                Activation(_RELU),
                Conv2d(384, 256, 3, 1, 1, rngs=rngs),
                Activation(_RELU),
                Conv2d(256, 256, 3, 1, 1, rngs=rngs),
                Activation(_RELU),
                MaxPool2d(3, 2),
            ]
        )
        if num_classes > 0:
            self.classifier = nnx.List(
                [
                    Dropout(0.5),
                    Linear(256 * _EDGE**2, 4096, rngs=rngs),
                    Activation(_RELU),
                    Dropout(0.5),
                    Linear(4096, 4096, rngs=rngs),
                    Activation(_RELU),
                    Linear(4096, num_classes, rngs=rngs),
                ]
            )

    def __call__(self, x: Float[Array, "b h w 3"], *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, "b ..."]]:
        """The last map, or the logits. `rngs` is for dropout in training."""
        size = x.shape[1:3]
        x = apply_sequence(self.features, x)
        if self.num_classes > 0:
            if x.shape[1:3] != (_EDGE, _EDGE):
                raise ConfigError(f"AlexNet's classifier is for images of 224x224 pixels, not {size[0]}x{size[1]}")
            x = apply_sequence(self.classifier, flatten(x), rngs=rngs)
        return (x,)
