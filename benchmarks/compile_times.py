"""How long XLA takes to compile the forward pass of every backbone: tracing, lowering and compiling, without a cache.

    python benchmarks/compile_times.py [--largest] [--only=ResNet,XCiT] [--batch=8]

For each class of backbones, the smallest model of the zoo (or the largest), in evaluation at its usual input size, for the
device at hand. Weights are abstract, so nothing is computed. Prints seconds of the clock and of CPU time, the slowest first,
and ends with an error where the clock says more than 60.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

LIMIT = 60.0
# Backbones that no model of the zoo has with weights.
OTHERS: dict[str, tuple[dict[str, Any], int]] = {
    "AlexNet": (dict(type="AlexNet"), 224),
    "LeNet5": (dict(type="LeNet5"), 32),
    "ResNeSt": (dict(type="ResNeSt", depth=50), 224),
    "SEResNeXt": (dict(type="SEResNeXt", depth=50), 224),
}


def models(largest: bool) -> dict[str, tuple[str, dict[str, Any], int]]:
    """Class of the backbone -> name, configuration, and edge of the images. Classifiers go before pre-training methods."""
    from jaxpretrain.zoo import list_models, model_info

    found: dict[str, list[Any]] = {}
    for name in list_models():
        info = model_info(name)
        if info.available and info.model.get("backbone"):
            found.setdefault(info.model["backbone"]["type"], []).append(info)
    chosen = {kind: (kind, cfg, size) for kind, (cfg, size) in OTHERS.items()}
    for kind, infos in found.items():
        classifiers = [info for info in infos if info.model["type"] == "ImageClassifier"]
        info = (max if largest else min)(classifiers or infos, key=lambda info: info.built["params"])
        size = info.preprocessing.size[0] if classifiers else info.model["backbone"].get("img_size", 224)
        chosen[kind] = info.name, dict(info.model), size
    return chosen


def compile_forward(cfg: dict[str, Any], size: int, batch: int) -> tuple[float, float]:
    """Seconds of wall time and of CPU time."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxpretrain.build import abstract
    from jaxpretrain.train_state import split

    model = abstract(cfg)
    model.eval()
    graphdef, params, rest = split(model)
    images = jax.ShapeDtypeStruct((batch, size, size, 1 if cfg["type"] == "LeNet5" else 3), jnp.float32)

    def forward(params: Any, rest: Any, images: Any) -> Any:
        model = nnx.merge(graphdef, params, rest)
        if cfg["type"] == "ImageClassifier":
            return model.backbone(images)
        return model(images) if "backbone" not in cfg else model.features(images)

    wall, cpu = time.perf_counter(), time.process_time()
    jax.jit(forward).trace(params, rest, images).lower().compile()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", action="store_true", help="the largest model of each class")
    parser.add_argument("--only", help="classes, separated by commas")
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    chosen = models(args.largest)
    kinds = args.only.split(",") if args.only else list(chosen)
    if unknown := set(kinds) - set(chosen):
        parser.error(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(sorted(chosen))}")

    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    rows = []
    for kind in kinds:
        name, cfg, size = chosen[kind]
        wall, cpu = compile_forward(cfg, size, args.batch)
        rows.append((wall, cpu, f"{kind}: {name}, {size} x {size}"))
        print(f"{wall:.1f} s, CPU time {cpu:.1f} s: {rows[-1][-1]}", file=sys.stderr, flush=True)
        jax.clear_caches()
    print("| compiling the forward pass of | s | CPU s |\n|---|---|---|")
    for wall, cpu, what in sorted(rows, reverse=True):
        print(f"| {what} | {wall:.1f} | {cpu:.1f} |")
    if rows and max(rows)[0] > LIMIT:
        sys.exit(f"{max(rows)[-1]} takes more than {LIMIT:.0f} s")


if __name__ == "__main__":
    main()
