"""Forward pass and training step against PyTorch: the same network, weights and images on both sides, in turn, in one run.

PyTorch's side is Hugging Face's implementation, with channels_last for ResNet. Each side has a process of its own and two
threads. A training step is loss, gradients and update (SGD with momentum for ResNet, AdamW for the others); ours is the
trainer's.

    pip install transformers==5.23.0
    python benchmarks/torch_vs_jax.py [--models=resnet50,vit,swin,mae] [--batch=8] [--rounds=5] [--threads=2] [--dtype=float32]

Prints a row for each model: the ratio of medians, ours / PyTorch's, of wall time and of CPU time, and how far the outputs
are apart. On a GPU (`--dtype=bfloat16`) PyTorch runs compiled, and MFU and peak memory of ours are printed too.
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

from jaxpretrain import cli
from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.cli import ExpectedFailure

FLAGS = {
    "models": "which ones, separated by commas",
    "batch": "images per step",
    "rounds": "how often each is measured",
    "threads": "threads of each side",
    "dtype": "float32 (default) or bfloat16",
    "worker": "for the script itself: jax or torch",
    "folder": "for the script itself: where the weights are",
}


def _classifier(backbone: dict, channels: int, vit_head: bool = False) -> dict[str, Any]:
    head = dict(
        type="VisionTransformerClsHead" if vit_head else "LinearClsHead", num_classes=1000, in_channels=channels
    )
    neck = None if vit_head else dict(type="GlobalAveragePooling")
    return dict(type="Supervised", model=dict(type="ImageClassifier", backbone=backbone, neck=neck, head=head))


# Ours; the class and the configuration of transformers; its settings.
MODELS: dict[str, tuple[dict[str, Any], str, str, dict[str, Any]]] = {
    "resnet50": (
        _classifier(dict(type="ResNet", depth=50), 2048),
        "ResNetForImageClassification",
        "ResNetConfig",
        dict(num_labels=1000),
    ),
    "vit": (
        _classifier(dict(type="VisionTransformer", arch="deit-base"), 768, vit_head=True),
        "ViTForImageClassification",
        "ViTConfig",
        dict(num_labels=1000, layer_norm_eps=1e-6),
    ),
    "swin": (
        _classifier(dict(type="SwinTransformer", arch="tiny", drop_path_rate=0.0), 768),
        "SwinForImageClassification",
        "SwinConfig",
        dict(num_labels=1000, drop_path_rate=0.0),
    ),
    "mae": (
        dict(
            type="MAE",
            backbone=dict(type="MAEViT", arch="b"),
            neck=dict(type="MAEPretrainDecoder", embed_dim=768),
            head=dict(type="MAEPretrainHead", norm_pix=True, loss=dict(type="PixelReconstructionLoss", criterion="L2")),
        ),
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        dict(norm_pix_loss=True, layer_norm_eps=1e-6),
    ),
}


def data(batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images [B, 224, 224, 3], labels [B], and the noise that says which of 196 patches MAE hides."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, 224, 224, 3)).astype(np.float32)
    return images, np.arange(batch) % 1000, rng.random((batch, 196)).astype(np.float32)


# The two sides: each gives {'forward': function, 'train': function, 'about': ...}; a function runs once, and waits for the end.


def torch_side(name: str, batch: int, threads: int, dtype: str, folder: str) -> dict[str, Any]:
    import torch
    import transformers

    torch.set_num_threads(threads)
    _, kind, config, settings = MODELS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings))
    model.save_pretrained(folder)
    layout = torch.channels_last if name == "resnet50" else torch.contiguous_format
    model = model.to(device, memory_format=layout)
    images, labels, noise = data(batch)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2)).contiguous(memory_format=layout).to(device)
    inputs: dict[str, Any] = dict(pixel_values=pixels)
    inputs |= dict(noise=torch.from_numpy(noise).to(device)) if name == "mae" else {}
    target = torch.from_numpy(labels).to(device)
    if name == "resnet50":
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05)
    run = torch.compile(model) if device == "cuda" else model
    half = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def forward() -> Any:
        model.eval()
        with torch.no_grad(), half:
            output = run(**inputs).logits.float().cpu().numpy()
        return output

    def train() -> float:
        model.train()
        with half:
            output = run(**inputs)
            loss = output.loss if name == "mae" else torch.nn.functional.cross_entropy(output.logits, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        wait()
        return float(loss.detach())

    return dict(forward=forward, train=train, about=dict)


def jax_side(name: str, batch: int, threads: int, dtype: str, folder: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxpretrain.build import abstract
    from jaxpretrain.flops import count_flops, peak_flops
    from jaxpretrain.interop import load_weights
    from jaxpretrain.optim import build_optimizer
    from jaxpretrain.train_state import make_train_step, split

    method = abstract(MODELS[name][0])
    load_weights(method, Path(folder) / "model.safetensors", layout="hf")
    kind = dict(type="SGD", lr=1e-3, momentum=0.9)
    if name != "resnet50":
        kind = dict(type="AdamW", lr=1e-5, weight_decay=0.05)
    images, labels, noise = data(batch)
    inputs = dict(image=jnp.asarray(images, dtype), label=jnp.asarray(labels, jnp.int32), noise=jnp.asarray(noise))
    graphdef, params, rest = split(method)
    rates = np.full(10**4, kind["lr"], np.float32)
    optimizer = build_optimizer(dict(optimizer=kind), rates, params)
    key = jax.random.key_data(jax.random.key(0))
    state = dict(params=params, model_state=rest, opt_state=optimizer.init(params), step=jnp.int32(0), ema={}, rng=key)
    step = jax.jit(make_train_step(graphdef, optimizer, rates, lambda batch, rng: batch), donate_argnums=0)
    method.eval()
    eval_graphdef = split(method)[0]

    @jax.jit
    def predict(params: Any, rest: Any, inputs: Any) -> Any:
        model = nnx.merge(eval_graphdef, params, rest)
        if name != "mae":
            return model.logits(inputs["image"])
        latent, _, restore = model.backbone(inputs["image"], noise=inputs["noise"])
        return model.neck(latent, restore)

    flops = count_flops(step, state, inputs)
    held = dict(state=state)

    def forward() -> Any:
        return np.asarray(predict(held["state"]["params"], held["state"]["model_state"], inputs), np.float32)

    def train() -> float:
        held["state"], metrics = step(held["state"], inputs)
        jax.block_until_ready(held["state"])
        return float(metrics["loss"])

    def about() -> dict[str, Any]:
        device = jax.devices()[0]
        memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
        return dict(device=device.device_kind, flops=flops, peak=peak_flops(device.device_kind), memory=memory)

    return dict(forward=forward, train=train, about=about)


def worker(side: str, name: str, batch: int, threads: int, dtype: str, folder: str) -> None:
    """The life of one side."""

    def build() -> dict[str, Callable[[], Any]]:
        functions = (jax_side if side == "jax" else torch_side)(name, batch, threads, dtype, folder)

        def forward() -> dict[str, Any]:
            flat = functions["forward"]().reshape(-1)
            return dict(values=flat[:: max(1, flat.size // 1000)].tolist(), largest=float(np.abs(flat).max()))

        return functions | dict(forward=forward)

    serve(build)


def start(side: str, **flags: Any) -> Side:
    command = [sys.executable, __file__, f"--worker={side}", *(f"--{key}={value}" for key, value in flags.items())]
    return Side(command, flags["threads"])


def measure(name: str, batch: int, rounds: int, threads: int, dtype: str) -> dict[str, Any]:
    """The figures of one model: medians, ratios, and how far the sides are apart."""
    with tempfile.TemporaryDirectory() as folder:
        flags: dict[str, Any] = dict(models=name, batch=batch, threads=threads, dtype=dtype, folder=folder)
        sides = {side: start(side, **flags) for side in ("torch", "jax")}
        first = {side: s.run("forward")["value"] for side, s in sides.items()}
        apart = np.abs(np.subtract(first["torch"]["values"], first["jax"]["values"])).max() / first["torch"]["largest"]
        losses = {side: s.run("train")["value"] for side, s in sides.items()}  # compiles
        times: dict[str, list[dict[str, Any]]] = {
            f"{what} {side}": [] for what in ("forward", "train") for side in sides
        }
        for _ in range(rounds):
            for what in ("forward", "train"):
                for side, s in sides.items():
                    times[f"{what} {side}"].append(s.run(what))
        about = sides["jax"].run("about")["value"]
        for s in sides.values():
            s.close()
    row: dict[str, Any] = dict(model=name, batch=batch, dtype=dtype, apart=float(apart), losses=losses, **about)
    for key, values in times.items():
        for clock in ("wall", "cpu"):
            row[f"{key} {clock}"] = statistics.median(value[clock] for value in values)
    return row


def describe(row: dict[str, Any]) -> str:
    """A row of the table."""

    def ratio(what: str, clock: str) -> float:
        return row[f"{what} jax {clock}"] / row[f"{what} torch {clock}"]

    cells = [f"{row['model']}, batch {row['batch']}"]
    for what in ("forward", "train"):
        cells.append(f"{ratio(what, 'wall'):.2f} ({ratio(what, 'cpu'):.2f})")
    cells.append(f"{row['batch'] / row['train jax wall']:.1f}")
    cells.append(f"{row['apart']:.0e}")
    if row["peak"]:
        cells.append(f"{row['flops'] / row['train jax wall'] / row['peak']:.1%}, {row['memory'] / 2**30:.1f} GiB")
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str]) -> int:
    flags = cli.parse(argv, FLAGS, usage=__doc__ or "")
    names = (flags.models or ",".join(MODELS)).split(",")
    for name in names:
        if name not in MODELS:
            raise ConfigError(f"--models: there is no {name!r}.{nearest(name, MODELS)}")
    batch, threads, dtype = int(flags.batch or 8), int(flags.threads or 2), flags.dtype or "float32"
    if flags.worker:
        worker(flags.worker, names[0], batch, threads, dtype, flags.folder)
        return cli.OK
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ExpectedFailure(f"{error}: pip install torch transformers==5.23.0") from error
    print(
        "| model | forward: wall (CPU time), ours / PyTorch | training step | images/s, ours | outputs apart | MFU, memory |"
    )
    print("|---|---|---|---|---|---|")
    rows = []
    for name in names:
        rows.append(measure(name, batch, int(flags.rounds or 5), threads, dtype))
        print(describe(rows[-1]), flush=True)
    print(json.dumps(rows))
    return cli.OK


if __name__ == "__main__":
    sys.exit(cli.run(main))
