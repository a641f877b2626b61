"""Networks in the form that is fastest in inference: parallel branches as one layer, BatchNorm melted into convolutions.

    model = get_model("repvgg-A0_8xb32_in1k", pretrained=True)
    for_inference(model)                       # in place; or get_model(..., fuse=True)

Outputs in eval mode stay the same but for rounding. Training is over: there are no statistics left to learn.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array

from jaxpretrain.build import accepted_arguments, build
from jaxpretrain.models.layers.conv import Conv2d
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import BatchNorm
from jaxpretrain.models.layers.reparam import fuse_norm, set_weights

T = TypeVar("T", bound=nnx.Module)
Place = tuple[Any, ...]

# What the constructors call the deployed form: RepLKNet has a word of its own.
_DEPLOYED = ("deploy", "small_kernel_merged")


class Identity(nnx.Module):
    """What stays in the place of a norm: nothing happens."""

    def __call__(self, x: Array) -> Array:
        return x


def for_inference(model: T, *, image_size: int | tuple[int, int] | None = None) -> T:
    """`switch_to_deploy`, then `fuse_conv_bn`: all that makes the same network with fewer layers. In place; returns it."""
    switch_to_deploy(model)
    fuse_conv_bn(model, image_size=image_size)
    return model


def switch_to_deploy(model: nnx.Module) -> list[str]:
    """Calls `switch_to_deploy()` of every part that has it: RepVGG, MobileOne, RepLKNet, RepMLPNet, LeViT, RIFormer.

    Returns:
        The paths of those parts; empty if nothing has such a form.
    """
    found = []
    for path, module in list(nnx.iter_modules(model)):
        if hasattr(module, "switch_to_deploy"):
            module.switch_to_deploy()
            found.append(_dotted(path))
    return found


def deployed_config(config: Any) -> Any:
    """The configuration that builds what `switch_to_deploy` leaves: `deploy=True` for every part that knows it."""
    if isinstance(config, Mapping):
        known = accepted_arguments(config["type"]) if isinstance(config.get("type"), str) else ()
        flags = {name: True for name in _DEPLOYED if name in known}
        return {name: deployed_config(value) for name, value in config.items()} | flags
    return [deployed_config(value) for value in config] if isinstance(config, list | tuple) else config


def fuse_conv_bn(model: nnx.Module, *, image_size: int | tuple[int, int] | None = None, channels: int = 3) -> list[str]:
    """Melts every BatchNorm that comes directly after a convolution or a linear layer into it, in place.

    Which ones do is not guessed from names: the network is traced (nothing is computed), and a norm is fused if its input is
    the output of one layer that nothing else sees, and both are used once. So pre-activation networks and shared layers
    keep what they need. An `Identity` takes the norm's place.

    Args:
        model: a network that is called with images: a classifier or a backbone, its weights may be tracers.
        image_size: side of the images that it is traced with, or (height, width); None: its own, or 224.
        channels: of those images.

    Returns:
        The paths of the norms that are gone.
    """
    pairs = _followed(model, image_size or images_of(model), channels)
    modules: dict[Place, Any] = dict(nnx.iter_modules(model))
    for layer, norm in pairs:
        set_weights(modules[layer], *fuse_norm(modules[layer], modules[norm]))
        owner, name = _at(model, norm[:-1]), norm[-1]
        if isinstance(name, int):
            owner[name] = Identity()
        else:
            setattr(owner, name, Identity())
    return [_dotted(norm) for _, norm in pairs]


def abstract_fused(config: Mapping[str, Any]) -> Any:
    """The network of a configuration after `fuse_conv_bn`, with shapes for weights: what weights of that form are read into."""

    def make() -> Any:
        model = build(config, rngs=nnx.Rngs(0))
        fuse_conv_bn(model)
        return model

    return nnx.eval_shape(make)


def is_fused(path: Any) -> bool:
    """Whether `path` is a directory with weights of a network whose norms are melted away (`reparameterize_model`)."""
    about = Path(path) / "model.json"
    return about.is_file() and bool(json.loads(about.read_text()).get("fused"))


def _dotted(path: Place) -> str:
    return ".".join(map(str, path))


def _at(model: Any, path: Place) -> Any:
    for part in path:
        model = model[part] if isinstance(part, int) else getattr(model, part)
    return model


def images_of(model: nnx.Module) -> tuple[int, int]:
    """Height and width of the images that some part was built for; 224 if none says so."""
    for _, module in nnx.iter_modules(model):
        size = getattr(module, "img_size", None)
        if size is None and hasattr(module, "init_out_size") and hasattr(module, "patch_size"):
            size = tuple(n * p for n, p in zip(module.init_out_size, module.patch_size, strict=True))
        if size is not None:
            return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return 224, 224


def _followed(model: nnx.Module, size: int | tuple[int, int], channels: int) -> list[tuple[Place, Place]]:
    """The (layer, norm) pairs where the norm's only input is the layer's output, and that goes nowhere else."""
    height, width = (size, size) if isinstance(size, int) else size
    graphdef, state = nnx.split(model)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nnx.to_pure_dict(state))
    paths: list[Place] = []

    def run(state: Any, images: Array) -> Any:
        twin = nnx.merge(graphdef, state)
        twin.eval()
        for path, module in nnx.iter_modules(twin):
            if isinstance(module, Conv2d | Linear | BatchNorm):
                tagged: Any = module
                tagged.__class__ = _tagged(type(module))
                tagged.tag = f"{'norm' if isinstance(module, BatchNorm) else 'layer'}:{len(paths)}"
                paths.append(path)
        return jax.tree.leaves(twin(images))

    jaxpr = jax.make_jaxpr(run)(shapes, jax.ShapeDtypeStruct((1, height, width, channels), "float32"))
    calls: Counter[str] = Counter()
    found = list(_pairs(jaxpr.jaxpr, calls))
    index = lambda tag: int(tag.partition(":")[2])  # noqa: E731
    return [
        (paths[index(layer)], paths[index(norm)]) for layer, norm in found if calls[layer] == 1 and calls[norm] == 1
    ]


@functools.cache
def _tagged(kind: type) -> type:
    """The same layer, leaving its name in the jaxpr: around what a norm takes, and what another layer gives."""

    class Tagged(kind):  # type: ignore[misc, valid-type]
        def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
            if isinstance(self, BatchNorm):
                return super().__call__(checkpoint_name(x, self.tag), *args, **kwargs)
            return checkpoint_name(super().__call__(x, *args, **kwargs), self.tag)

    return Tagged


def _pairs(jaxpr: Jaxpr, calls: Counter[str]) -> Iterator[tuple[str, str]]:
    """(tag of a layer, tag of the norm behind it), of a jaxpr and those in it; `calls` counts each tag."""
    uses = Counter(id(var) for eqn in jaxpr.eqns for var in eqn.invars if not isinstance(var, Literal))
    uses.update(id(var) for var in jaxpr.outvars)
    made_by: dict[int, str] = {}
    for eqn in jaxpr.eqns:
        tag = eqn.params.get("name") if eqn.primitive.name == "name" else None
        if isinstance(tag, str) and tag.startswith(("layer:", "norm:")):
            calls[tag] += 1
            source = eqn.invars[0]
            if tag.startswith("layer:"):
                made_by[id(eqn.outvars[0])] = tag
            elif id(source) in made_by and uses[id(source)] == 1:
                yield made_by[id(source)], tag
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, ClosedJaxpr | Jaxpr):
                    yield from _pairs(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner, calls)
