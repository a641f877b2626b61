"""LeNet-5: Gradient-Based Learning Applied to Document Recognition (LeCun et al., 1998)."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.build import ConfigError
from jaxpretrain.models.layers.activation import Activation
from jaxpretrain.models.layers.base import BaseModule
from jaxpretrain.models.layers.conv import Conv2d
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.sequence import AvgPool2d, apply_sequence, flatten

_TANH = {"type": "Tanh"}


class LeNet5(BaseModule):
    """LeNet-5 on grey images: [B, H, W, 1] -> a map of [B, H/4 - 7, W/4 - 7, 120], or logits [B, num_classes]; in a tuple.

    Args:
        num_classes: number of classes; -1 leaves the classifier out. With it, images have 32x32 pixels.

    Raises:
        ConfigError: in a call, for images of another size than the classifier is for.
    """

    def __init__(self, num_classes: int = -1, *, rngs: nnx.Rngs):
        self.num_classes = num_classes
        self.features = nnx.List(
            [
                Conv2d(1, 6, 5, rngs=rngs),
                Activation(_TANH),
                AvgPool2d(2),
                Conv2d(6, 16, 5, rngs=rngs),
                Activation(_TANH),
                AvgPool2d(2),
                Conv2d(16, 120, 5, rngs=rngs),
                Activation(_TANH),
            ]
        )
        if num_classes > 0:
            layers = [Linear(120, 84, rngs=rngs), Activation(_TANH), Linear(84, num_classes, rngs=rngs)]
            self.classifier = nnx.List(layers)

    def __call__(self, x: Float[Array, "b h w 1"], *, rngs: nnx.Rngs | None = None) -> tuple[Float[Array, "b ..."]]:
        """The last map, or the logits. Nothing is drawn: `rngs` is not used."""
        size = x.shape[1:3]
        x = apply_sequence(self.features, x)
        if self.num_classes > 0:
            if x.shape[1:3] != (1, 1):
                raise ConfigError(f"LeNet5's classifier is for images of 32x32 pixels, not {size[0]}x{size[1]}")
            x = apply_sequence(self.classifier, flatten(x))
        return (x,)
