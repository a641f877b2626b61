"""Fine-tuning of checkpoints on few labels or all, in the trainer: MMSelfSup's semi-supervised grid."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpretrain.build import ConfigError
from jaxpretrain.recipes import recipe

RATES, HEAD_MULTIPLIERS = (0.001, 0.01, 0.1), (1, 10, 100)


@dataclass(frozen=True)
class Settings:
    """How fine-tuning goes.

    Attributes:
        fraction: of the labels of each class; 1 for all.
        names: instead, a file that lists the images (see `Subset`).
        rates, head_multipliers: the grid: learning rates, and what they are multiplied by for the new head.
        optimizer: 'SGD' (momentum 0.9, weight decay 5e-4, divided by 5 after 12 and 16 of 20 epochs: MMSelfSup's) or
            'AdamW' (weight decay 0.05, a tenth of the epochs of warm-up, a cosine to zero).
        epochs, batch_size: of each run; batches are no larger than the data set.
        seed: of the draw of the images, the head and the order.
    """

    fraction: float = 0.01
    names: str | None = None
    rates: Sequence[float] = RATES
    head_multipliers: Sequence[float] = HEAD_MULTIPLIERS
    optimizer: str = "SGD"
    epochs: int = 20
    batch_size: int = 256
    seed: int = 0


def fine_tune(
    encoder: Mapping[str, Any],
    weights: str | None,
    feature_dims: int,
    data: Mapping[str, Any],
    settings: Settings,
    workdir: Path,
    **fields: Any,
) -> dict[str, float]:
    """Trains all of the network under a new head for every point of the grid; the scores of the best by top-1 on `val`.

    The best is chosen on `val`, as the benchmark does. A run that is finished is not repeated.

    Args:
        encoder: the network, `dict(type='Encoder', model=...)`.
        weights: a directory of converted weights for it; None starts from random ones.
        feature_dims: what its features are, D.
        data: `config.data`, with `train` and `val`.
        settings: see there.
        workdir: a folder per run is made in it.
        fields: of the configuration besides, such as data_preprocessor.

    Returns:
        `top1`, `top5` in percent, `lr` and `head` (the multiplier) of the best run.
    """
    from jaxpretrain.trainer import train

    results = []
    for lr, multiplier in itertools.product(settings.rates, settings.head_multipliers):
        folder = workdir / f"lr{lr:g}_head{multiplier:g}"
        done = folder / "result.json"
        if not done.exists():
            config = grid_config(encoder, weights, feature_dims, data, settings, lr, multiplier, **fields)
            scores = train(config, folder)
            done.write_text(json.dumps({name.removeprefix("accuracy/"): value for name, value in scores.items()}))
        results.append({**json.loads(done.read_text()), "lr": lr, "head": float(multiplier)})
    return max(results, key=lambda result: result["top1"])


def grid_config(
    encoder: Mapping[str, Any],
    weights: str | None,
    feature_dims: int,
    data: Mapping[str, Any],
    settings: Settings,
    lr: float,
    multiplier: float,
    **fields: Any,
) -> Any:
    """The configuration of one run; arguments as of `fine_tune`."""
    import jax

    from jaxpretrain.build import build

    train = dict(data["train"])
    if settings.names or settings.fraction < 1:
        part: dict[str, Any] = dict(type="Subset", dataset=train["dataset"])
        part |= dict(names=settings.names) if settings.names else dict(fraction=settings.fraction, seed=settings.seed)
        train["dataset"] = part
    source = build(train["dataset"])
    devices = jax.device_count()
    if len(source) < devices:
        raise ConfigError(
            f"{len(source)} images are fewer than {devices} devices: give more labels, or run on fewer devices"
        )
    epochs = settings.epochs
    if settings.optimizer == "SGD":
        optimizer = dict(type="SGD", lr=lr, momentum=0.9, weight_decay=5e-4)
        milestones = [round(0.6 * epochs), round(0.8 * epochs)]
        schedule = [dict(type="MultiStepLR", by_epoch=True, milestones=milestones, gamma=0.2)]
    else:
        warmup = max(1, epochs // 10)
        optimizer = dict(type="AdamW", lr=lr, weight_decay=0.05)
        schedule = [
            dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=warmup, convert_to_iter_based=True),
            dict(
                type="CosineAnnealingLR",
                T_max=max(1, epochs - warmup),
                by_epoch=True,
                begin=warmup,
                end=epochs,
                convert_to_iter_based=True,
            ),
        ]
    return recipe(
        method={**encoder, "type": "FineTuned", "num_classes": source.num_classes, "feature_dims": feature_dims},
        load_from=weights,
        data={**data, "train": train},
        batch_size=min(settings.batch_size, len(source)) // devices * devices,
        max_epochs=epochs,
        optim_wrapper=dict(
            optimizer=optimizer, paramwise_cfg=dict(custom_keys={"new_head": dict(lr_mult=float(multiplier))})
        ),
        param_scheduler=schedule,
        evaluators=dict(accuracy=dict(type="Accuracy")),
        checkpoint=dict(interval=-1),
        seed=settings.seed,
        tensorboard=False,
        **fields,
    )
