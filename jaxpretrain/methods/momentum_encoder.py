"""Teachers that follow their students: copies of networks as moving averages of weights (MoCo, BYOL, MoCo v3, DINO)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpretrain.methods.base import BaseSelfSupervisor, Progress, pool
from jaxpretrain.models.layers import BaseModule, Frozen, freeze


class MomentumEncoder(BaseModule):
    """A copy of networks that follows their weights, and never learns itself.

    Attributes:
        module: the copies, all their weights `Frozen`.
        steps: updates so far, int32; part of MMPretrain's checkpoints.
    """

    def __init__(self, *networks: nnx.Module):
        self.module = nnx.List([nnx.clone(network) for network in networks])
        freeze(self.module)
        self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x: Any, *, rngs: nnx.Rngs | None = None) -> Any:
        """The first network takes images and `rngs`, each further one the output of that before it."""
        x = self.module[0](x, rngs=rngs)
        for network in self.module[1:]:
            x = network(x)
        return x

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Nothing: its owner copies the initialised weights."""

    def copy(self, *networks: nnx.Module) -> None:
        """Takes over all weights and statistics of `networks`."""
        for ours, theirs in self._pairs(networks, ...):
            ours.set_value(theirs[...])

    def follow(self, *networks: nnx.Module, momentum: Float[Array, ""] | float) -> None:
        """weights += momentum * (those of `networks` - weights)."""
        for ours, theirs in self._pairs(networks, (nnx.Param, Frozen)):
            # In this form, weights that are equal (position tables) stay so to the last bit.
            step = jnp.asarray(momentum, ours.dtype) * (theirs[...] - ours[...])
            ours.set_value(ours[...] + step)

    def copy_statistics(self, *networks: nnx.Module) -> None:
        """Takes over the running statistics of `networks`."""
        for ours, theirs in self._pairs(networks, nnx.BatchStat):
            ours.set_value(theirs[...])

    def _pairs(self, networks: tuple, kinds: Any) -> Iterator[tuple[nnx.Variable, nnx.Variable]]:
        for copy, network in zip(self.module, networks, strict=True):
            source = dict(nnx.state(network, kinds).flat_state())
            for path, ours in nnx.state(copy, kinds).flat_state():
                yield ours, source[path]


class MomentumMethod(BaseSelfSupervisor):
    """A method whose backbone and neck (`students`) have a momentum encoder. How fast it follows is `teacher_momentum`.

    Attributes:
        teacher_name: MMPretrain's name of it.
    """

    teacher_name: ClassVar = "momentum_encoder"

    def __init__(self, *, rngs: nnx.Rngs, **parts: Any):
        super().__init__(rngs=rngs, **parts)
        setattr(self, self.teacher_name, MomentumEncoder(*self.students))

    @property
    def teacher(self) -> MomentumEncoder:
        return getattr(self, self.teacher_name)

    @property
    def students(self) -> tuple[nnx.Module, ...]:
        """The networks that the teacher follows."""
        return self.backbone, self.neck

    def teacher_momentum(self, progress: Progress) -> Float[Array, ""] | float:
        """How far the teacher's weights move towards the student's after this step."""
        raise NotImplementedError

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Initialises the online networks; the teacher starts as their copy."""
        super().init_weights(rngs)
        self.reset_teacher()

    def reset_teacher(self) -> None:
        """Makes the teacher a copy of the students: after their weights were loaded from elsewhere."""
        self.teacher.copy(*self.students)

    def teach(self, *images: Float[Array, "b h w 3"], rngs: nnx.Rngs | None = None) -> list[Any]:
        """What the teacher makes of each view, one after the other, in training mode.

        Its running statistics start from the online ones, as in MMPretrain; no gradient passes, for its weights are not
        learnt.
        """
        self.teacher.copy_statistics(*self.students)
        return [self.teacher(view, rngs=rngs) for view in images]

    def after_step(self, progress: Progress) -> None:
        """Moves the teacher."""
        self.teacher.follow(*self.students, momentum=self.teacher_momentum(progress))
        self.teacher.steps.set_value(jnp.asarray(progress.step, jnp.int32))

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """The online backbone's class token (ViT), or last feature map averaged over positions (ResNet)."""
        return pool(self.backbone(images))
