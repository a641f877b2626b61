"""Melts branches of a trained network into one: `python -m jaxpretrain.tools.reparameterize_model MODEL CHECKPOINT DST`.

For RepVGG, MobileOne, RepLKNet, RepMLPNet, LeViT and RIFormer, whose form for inference (`deploy=True`) has fewer layers and
the same outputs; with --fuse-bn for every network with BatchNorm. Both forms are compared on noise before anything is written.

MODEL: a name of the zoo, a recipe (configs/mae.py:RECIPE), or a .json file with dict(type=...).
CHECKPOINT: a workdir, a directory of converted weights, or a .pth or .safetensors file in any layout.
DST: a .pth or .safetensors file with MMPretrain's names, or a new directory, which
`get_model('DST/model.json', pretrained='DST')` reads.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jaxpretrain import __version__, cli
from jaxpretrain.build import ConfigError
from jaxpretrain.tools.from_torch import local, model_config

FLAGS = {
    "layout": "whose names CHECKPOINT has: auto (default), mmpretrain, timm, ...",
    "key": "where the weights are inside a .pth file; of a workdir a step, or 'best'",
}
SWITCHES = {"fuse_bn": "also melt every BatchNorm into the convolution before it; DST is a directory then"}
TOLERANCE = 1e-3  # of the largest magnitude: what rounding never reaches, and a wrong form always


def main(argv: list[str]) -> int:
    places, rest = cli.positional([argument.replace("--fuse-bn", "--fuse_bn") for argument in argv], FLAGS)
    flags = cli.parse(rest, FLAGS, SWITCHES, __doc__ or "")
    if len(places) != 3:
        raise ConfigError(f"Give MODEL, CHECKPOINT and DST, in this order; got {' '.join(places) or 'nothing'}")
    name, source, target = places[0], places[1], Path(places[2])
    as_file = target.suffix in (".pth", ".safetensors")
    if flags.fuse_bn and as_file:
        raise ConfigError(f"--fuse-bn leaves convolutions that MMPretrain has not: give a directory, not {target}")
    if target.exists() and not as_file:
        raise ConfigError(f"{target} exists already; give a new directory")
    from jaxpretrain.interop import export, files, read_model, save_weights
    from jaxpretrain.models.fuse import deployed_config, fuse_conv_bn, switch_to_deploy

    found = read_model(model_config(name), local(source), layout=flags.layout or "auto", key=flags.key)
    print(found.report)
    model = found.filled()
    images, before = _run(model)
    parts = switch_to_deploy(model)
    norms = fuse_conv_bn(model) if flags.fuse_bn else []
    if not parts and not norms:
        hint = "" if flags.fuse_bn else "; --fuse-bn melts BatchNorm into convolutions"
        raise ConfigError(f"{name} has no form for inference{hint}")
    print(f"{len(parts)} parts deployed, {len(norms)} norms melted into the layers before them")
    _compare(model, images, before)

    about: dict[str, Any] = dict(jaxpretrain=__version__, model=deployed_config(found.config))
    if as_file:
        files.write(target, export(model), about)
    else:
        save_weights(model, target, meta=about | dict(name=name, source=source, fused=bool(norms) or found.fused))
    print(f"written to {target}")
    return cli.OK


def _run(model: Any, images: Any = None) -> tuple[Any, list[Any]]:
    """(images, the network's outputs for them); noise, if none are given."""
    import jax
    import numpy as np
    from flax import nnx

    from jaxpretrain.models.fuse import images_of

    if images is None:
        height, width = images_of(model)
        images = np.random.default_rng(0).standard_normal((1, height, width, 3)).astype(np.float32)
    graphdef, state = nnx.split(model)
    outputs = jax.jit(lambda state, x: jax.tree.leaves(nnx.merge(graphdef, state)(x)))(state, images)
    return images, [np.asarray(output) for output in outputs]


def _compare(model: Any, images: Any, before: list[Any]) -> None:
    """Prints how far the outputs moved. Raises ExpectedFailure if that is more than rounding."""
    import numpy as np

    _, after = _run(model, images)
    moved = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(after, before, strict=True))
    print(f"outputs for noise: {moved:.1e} of the largest magnitude apart")
    if not moved <= TOLERANCE:
        raise cli.ExpectedFailure(
            f"The two forms differ by {moved:.1e} of the largest output; nothing was written. Weights with variances near "
            "zero are beyond float32: train on, or keep the form of training"
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
