"""Forward pass and training step of backbones against MMPretrain's in PyTorch: same weights, same images, in turn, in one run.

Both sides have the classifier of the zoo's entry in float32 on the CPU, with two threads each, and only one works at a time.
A training step is loss, gradients and update, with SGD with momentum or AdamW, as the recipe has it. PyTorch's images and
weights have their channels first, as MMPretrain runs them, or last, which is faster for some. MMPretrain needs an environment
of its own (PyTorch, mmengine, mmcv-lite, mmpretrain), whose Python is given:

    python benchmarks/backbones.py --python=PATH [--models=convnext,...] [--batch=4] [--rounds=7] [--steps=2] [--threads=2]
                                   [--channels-last]

Prints a row for each model: the ratio of medians over the rounds, ours / PyTorch's, of wall time and of CPU time, with the
smallest and largest ratio of wall times in a single round, and how far the outputs are apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sides import Side, serve

SGD = dict(type="SGD", lr=1e-4, momentum=0.9, weight_decay=1e-4)
ADAMW = dict(type="AdamW", lr=1e-5, weight_decay=0.05)
# Name in the zoo, and the optimizer.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "convnext": ("convnext-tiny_32xb128_in1k", ADAMW),
    "efficientnet": ("efficientnet-b0_3rdparty_8xb32_in1k", SGD),
    "mobilenetv3": ("mobilenet-v3-large_8xb128_in1k", SGD),
    "regnet": ("regnetx-1.6gf_8xb128_in1k", SGD),
    "xcit": ("xcit-small-12-p16_3rdparty_in1k", ADAMW),
    "van": ("van-small_3rdparty_in1k", ADAMW),
}


def data(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [B, 224, 224, 3] and labels [B]."""
    images = np.random.default_rng(0).standard_normal((batch, 224, 224, 3)).astype(np.float32)
    return images, np.arange(batch) * 7


def torch_side(name: str, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """MMPretrain's; it writes its first weights to the folder."""
    import torch
    from mmpretrain.registry import MODELS as REGISTRY
    from mmpretrain.structures import DataSample
    from mmpretrain.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = REGISTRY.build(json.loads((args.folder / "model.json").read_text()))
    model.init_weights()
    torch.save(model.state_dict(), args.folder / "weights.pth")
    _, cfg = MODELS[name]
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)
    kind = {key: value for key, value in cfg.items() if key != "type"}
    optimizer = getattr(torch.optim, cfg["type"])(model.parameters(), **kind)
    images, labels = data(args.batch)
    inputs = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).contiguous(memory_format=layout)
    samples = [DataSample().set_gt_label(int(label)) for label in labels]

    def forward() -> np.ndarray:
        model.eval()
        with torch.no_grad():
            return model(inputs, mode="tensor").numpy()

    def train() -> float:
        model.train()
        loss, _ = model.parse_losses(model(inputs, samples, mode="loss"))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return dict(forward=forward, train=train)


def our_side(name: str, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """The trainer's step, and the classifier's scores."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxpretrain.build import abstract
    from jaxpretrain.interop import load_weights
    from jaxpretrain.optim import build_optimizer
    from jaxpretrain.train_state import make_train_step, split

    _, cfg = MODELS[name]
    method = abstract(dict(type="Supervised", model=json.loads((args.folder / "model.json").read_text())))
    load_weights(method, args.folder / "weights.pth", layout="mmpretrain")
    images, labels = data(args.batch)
    inputs = dict(image=jnp.asarray(images), label=jnp.asarray(labels, jnp.int32))
    graphdef, params, rest = split(method)
    rates = np.full(10**4, cfg["lr"], np.float32)
    optimizer = build_optimizer(dict(optimizer=cfg), rates, params)
    key = jax.random.key_data(jax.random.key(0))
    state = dict(params=params, model_state=rest, opt_state=optimizer.init(params), step=jnp.int32(0), ema={}, rng=key)
    step = jax.jit(make_train_step(graphdef, optimizer, rates, lambda batch, rng: batch), donate_argnums=0)
    method.eval()
    eval_graphdef = split(method)[0]
    predict = jax.jit(lambda params, rest, images: nnx.merge(eval_graphdef, params, rest).logits(images))
    held = dict(state=state)

    def forward() -> np.ndarray:
        return np.asarray(predict(held["state"]["params"], held["state"]["model_state"], inputs["image"]))

    def train() -> float:
        held["state"], metrics = step(held["state"], inputs)
        jax.block_until_ready(held["state"])
        return float(metrics["loss"])

    return dict(forward=forward, train=train)


def worker(side: str, name: str, args: argparse.Namespace) -> None:
    """The life of one side."""

    def build() -> dict[str, Callable[[], Any]]:
        functions = (our_side if side == "ours" else torch_side)(name, args)

        def repeated(run: Callable[[], Any]) -> Callable[[], Any]:
            return lambda: [run() for _ in range(args.steps)][-1]

        train, forward = repeated(functions["train"]), repeated(functions["forward"])
        return dict(outputs=lambda: functions["forward"]().tolist(), forward=lambda: forward() is None, train=train)

    serve(build)


def measure(name: str, args: argparse.Namespace) -> str:
    """A row of the table."""
    from jaxpretrain.zoo import model_info

    with tempfile.TemporaryDirectory() as folder:
        model = {key: value for key, value in model_info(MODELS[name][0]).model.items() if key != "train_cfg"}
        (Path(folder) / "model.json").write_text(json.dumps(model))
        flags = [f"--{key}={getattr(args, key)}" for key in ("batch", "steps", "threads")] + [f"--folder={folder}"]
        flags += ["--channels-last"] if args.channels_last else []
        command = [__file__, f"--models={name}", *flags]
        reference = Side([args.python, *command, "--worker=torch"], args.threads)  # writes the weights
        sides = dict(torch=reference, ours=Side([sys.executable, *command, "--worker=ours"], args.threads))
        first = {side: np.array(s.run("outputs")["value"]) for side, s in sides.items()}
        apart = np.abs(first["ours"] - first["torch"]).max() / np.abs(first["torch"]).max()
        times: dict[str, list[dict[str, float]]] = {}
        for i in range(args.rounds + 1):
            for what in ("forward", "train"):
                for side, s in sides.items():
                    answer = s.run(what)
                    if i > 0:  # the first compiles
                        times.setdefault(f"{what} {side}", []).append(answer)
        for s in sides.values():
            s.close()
    cells = [f"{name}, batch {args.batch}"]
    for what in ("forward", "train"):
        ours, theirs = times[f"{what} ours"], times[f"{what} torch"]
        wall, cpu = (
            statistics.median(t[clock] for t in ours) / statistics.median(t[clock] for t in theirs)
            for clock in ("wall", "cpu")
        )
        single = [a["wall"] / b["wall"] for a, b in zip(ours, theirs, strict=True)]
        cells.append(f"{wall:.2f} ({cpu:.2f}), {min(single):.2f} to {max(single):.2f}")
    images = args.batch * args.steps / statistics.median(t["wall"] for t in times["train ours"])
    return "| " + " | ".join([*cells, f"{images:.1f}", f"{apart:.0e}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="the Python that has mmpretrain")
    parser.add_argument("--models", default=",".join(MODELS))
    for option, default in (("batch", 4), ("rounds", 7), ("steps", 2), ("threads", 2)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--channels-last", action="store_true", help="of PyTorch's images and weights")
    parser.add_argument("--worker", choices=("torch", "ours"), help="for the script itself")
    parser.add_argument("--folder", type=Path, help="for the script itself: where the weights are")
    args = parser.parse_args()
    names = args.models.split(",")
    if unknown := set(names) - set(MODELS):
        parser.error(f"--models: {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    if args.worker:
        worker(args.worker, names[0], args)
        return
    if not args.python:
        parser.error("--python is needed: the Python that has mmpretrain")
    what = "wall (CPU time), smallest to largest of a round"
    print(f"| model | forward: {what} | training step | images/s, ours | outputs apart |")
    print("|---|---|---|---|---|")
    for name in names:
        print(measure(name, args), flush=True)


if __name__ == "__main__":
    main()
