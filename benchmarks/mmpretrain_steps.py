"""One training step of MAE, MoCo v3 and SimCLR against MMPretrain's: same weights, same images, in turn, in one run.

Both sides train the recipe's network with the recipe's optimizer in float32 on the CPU, with two threads each. MMPretrain
needs an environment of its own (PyTorch, mmengine, mmcv-lite, mmpretrain), whose Python is given:

    python benchmarks/mmpretrain_steps.py --python=PATH [--batch=8] [--rounds=5] [--threads=2]

Prints a row for each method: the ratio of medians, ours / MMPretrain's, of wall time and of CPU time, and the losses of the
first step. (MAE's differ, because each side draws its own mask.)
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sides import Side, serve

RECIPES = {
    "mae": "configs/mae.py:mae_vit-base-p16_8xb512-amp-coslr-300e_in1k",
    "mocov3": "configs/mocov3.py:mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k",
    "simclr": "configs/simclr.py:simclr_resnet50_16xb256-coslr-200e_in1k",
}
LR = 1e-4


def views(name: str, batch: int) -> list[np.ndarray]:
    """One or two views, [B, 224, 224, 3]."""
    count = 1 if name == "mae" else 2
    return [np.random.default_rng(i).standard_normal((batch, 224, 224, 3)).astype(np.float32) for i in range(count)]


def reference_side(name: str, batch: int, threads: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """MMPretrain's; it writes its first weights to the folder."""
    import torch
    from mmengine.logging import MessageHub
    from mmengine.optim import build_optim_wrapper
    from mmpretrain.registry import MODELS
    from mmpretrain.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    MessageHub.get_current_instance().update_info("max_iters", 10**4)  # the momentum of MoCo v3's teacher asks for it
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    settings = json.loads((folder / "settings.json").read_text())
    model = MODELS.build(settings["model"])
    model.init_weights()
    model.train()
    torch.save(model.state_dict(), folder / "weights.pth")
    wrapper = build_optim_wrapper(model, settings["optim_wrapper"])
    inputs = [torch.from_numpy(np.ascontiguousarray(view.transpose(0, 3, 1, 2))) for view in views(name, batch)]

    def train() -> float:
        losses = model(inputs[0] if settings["single"] else inputs, None, mode="loss")
        loss, _ = model.parse_losses(losses)
        wrapper.update_params(loss)
        return float(loss.detach())

    return dict(train=train)


def our_side(name: str, batch: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """The trainer's step."""
    import jax
    import jax.numpy as jnp

    from jaxpretrain.build import abstract
    from jaxpretrain.interop import load_weights
    from jaxpretrain.methods.momentum_encoder import MomentumMethod
    from jaxpretrain.optim import build_optimizer
    from jaxpretrain.train_state import make_train_step, split

    settings = json.loads((folder / "settings.json").read_text())
    method = abstract(settings["ours"])
    load_weights(method, folder / "weights.pth", layout="mmpretrain")
    if isinstance(method, MomentumMethod):
        method.reset_teacher()  # as MMPretrain does in its first step
    graphdef, params, rest = split(method)
    rates = np.full(10**4, LR, np.float32)
    optimizer = build_optimizer(settings["optim_wrapper"], rates, params)
    key = jax.random.key_data(jax.random.key(0))
    state = dict(params=params, model_state=rest, opt_state=optimizer.init(params), step=jnp.int32(0), ema={}, rng=key)
    step = jax.jit(make_train_step(graphdef, optimizer, rates, lambda batch, rng: batch), donate_argnums=0)
    images = tuple(map(jnp.asarray, views(name, batch)))
    inputs = dict(image=images[0] if len(images) == 1 else images, label=jnp.zeros(batch, jnp.int32))
    # A teacher that was reset shares arrays with its students, and a step consumes its state.
    held = dict(state=jax.tree.map(jnp.copy, state))

    def train() -> float:
        held["state"], metrics = step(held["state"], inputs)
        jax.block_until_ready(held["state"])
        return float(metrics["loss"])

    return dict(train=train)


def write_settings(name: str, folder: Path) -> None:
    """The recipe's network and optimizer, with BatchNorm in place of SyncBN, which PyTorch has for GPUs alone."""
    from jaxpretrain.config import load_config, to_plain

    config = to_plain(load_config(RECIPES[name]))
    method = json.loads(json.dumps(config["method"]).replace('"SyncBN"', '"BN"'))
    wrapper = {key: value for key, value in config["optim_wrapper"].items() if value is not None}
    wrapper["optimizer"]["lr"] = LR
    settings = dict(model=add_norms(method), ours=method, optim_wrapper=wrapper, single=name == "mae")
    (folder / "settings.json").write_text(json.dumps(settings))


def add_norms(cfg: Any) -> Any:
    """The same with norm_cfg=BN1d where MMPretrain's default is SyncBN."""
    if isinstance(cfg, dict):
        cfg = {key: add_norms(value) for key, value in cfg.items()}
        return (
            dict(norm_cfg=dict(type="BN1d"), **cfg)
            if cfg.get("type") == "NonLinearNeck" and "norm_cfg" not in cfg
            else cfg
        )
    return [add_norms(value) for value in cfg] if isinstance(cfg, list) else cfg


def measure(name: str, python: str, batch: int, rounds: int, threads: int) -> str:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        write_settings(name, Path(folder))
        flags = [name, str(batch), str(threads), folder]
        reference = Side([python, __file__, "worker", "reference", *flags], threads)
        sides = dict(reference=reference, ours=Side([sys.executable, __file__, "worker", "ours", *flags], threads))
        first = {side: s.run("train")["value"] for side, s in sides.items()}  # compiles
        times: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, s in sides.items():
                times[side].append(s.run("train"))
        for s in sides.values():
            s.close()
    median = {
        (side, clock): statistics.median(t[clock] for t in times[side]) for side in sides for clock in ("wall", "cpu")
    }
    wall, cpu = (median["ours", clock] / median["reference", clock] for clock in ("wall", "cpu"))
    losses = f"{first['ours']:.5f}, {first['reference']:.5f}"
    return f"| {name}, batch {batch} | {wall:.2f} ({cpu:.2f}) | {batch / median['ours', 'wall']:.1f} | {losses} |"


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        side, name, batch, threads, folder = sys.argv[2:]
        if side == "ours":
            serve(lambda: our_side(name, int(batch), Path(folder)))
        else:
            serve(lambda: reference_side(name, int(batch), int(threads), Path(folder)))
        return
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="the Python that has mmpretrain")
    parser.add_argument("--methods", default=",".join(RECIPES))
    for option, default in (("batch", 8), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{option}", type=int, default=default)
    args = parser.parse_args()
    print(
        "| method | step: wall (CPU time), ours / MMPretrain's | images/s, ours | first loss, ours and MMPretrain's |"
    )
    print("|---|---|---|---|", flush=True)
    for name in args.methods.split(","):
        print(measure(name, args.python, args.batch, args.rounds, args.threads), flush=True)


if __name__ == "__main__":
    main()
