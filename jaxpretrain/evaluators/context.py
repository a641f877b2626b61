"""Builds what evaluators ask of a run, for the trainer and for `python -m jaxpretrain.evaluate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from jaxpretrain.build import ConfigError, build
from jaxpretrain.config import to_plain
from jaxpretrain.data.chunks import Reader
from jaxpretrain.data.device import DevicePipeline
from jaxpretrain.data.host_transforms import build_pipeline
from jaxpretrain.data.pipeline import EvalLoader
from jaxpretrain.data.prefetch import device_prefetch
from jaxpretrain.evaluators.base import Batch, EvalContext, Evaluator
from jaxpretrain.sharding import BATCH
from jaxpretrain.train_state import State, eval_params, eval_state, make_method


def make_context(config: Any, mesh: Mesh, workdir: Path | None) -> EvalContext:
    """The context of a run: its method in evaluation mode, and both splits seen through the evaluation pipeline."""
    method = make_method(config)
    method.eval()
    graphdef = nnx.split(method, nnx.Param, ...)[0]
    normalise = DevicePipeline([], **config.data_preprocessor)
    dtype = jnp.dtype(config.dtype)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = -(-(config.data.eval_batch_size or config.batch_size) // rows) * rows

    def merged(state: State) -> Any:
        return nnx.merge(graphdef, eval_params(state), eval_state(state))

    def preprocess(batch: Batch) -> Batch:
        batch = normalise(batch, None)
        return dict(batch, image=batch["image"].astype(dtype))

    @jax.jit
    def features(state: State, batch: Batch) -> Array:
        return merged(state).features(preprocess(batch)["image"]).astype(jnp.float32)

    @jax.jit
    def logits(state: State, batch: Batch) -> Any:
        found = merged(state).logits(preprocess(batch)["image"])
        return jax.tree.map(lambda x: x.astype(jnp.float32), found)

    loaders: dict[str, EvalLoader] = {}

    def source(split: str) -> EvalLoader:
        if split not in loaders:
            dataset = config.data[split].dataset
            if dataset is None:
                raise ConfigError(f"config.data.{split}.dataset is not set, but an evaluator needs that split")
            loaders[split] = EvalLoader(
                to_plain(dict(dataset=dataset, pipeline=config.data.val.pipeline), keep_callables=True),
                batch_size=batch_size,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                num_workers=config.data.num_workers,
                num_threads=config.data.num_threads,
                max_bad=config.data.max_bad,
            )
        return loaders[split]

    def loader(split: str) -> Iterator[Batch]:
        batches = device_prefetch(iter(source(split)), NamedSharding(mesh, BATCH), config.data.prefetch)
        try:
            yield from batches
        finally:
            batches.close()

    def image(split: str, index: int) -> np.ndarray:
        pipeline = build_pipeline(to_plain(config.data.val.pipeline, keep_callables=True))
        return Reader(source(split).source, pipeline, seed=0).read(0, index)[0]["image"]

    num_classes = source("train").num_classes
    return EvalContext(
        features=features,
        logits=logits if method.has_logits else None,
        loader=loader,
        num_classes=num_classes if isinstance(num_classes, int) else None,
        method=merged,
        workdir=workdir,
        seed=config.seed,
        preprocess=preprocess,
        classes=getattr(source("train").source, "classes", None),
        images=image,
    )


def make_evaluators(config: Any, context: EvalContext) -> dict[str, Evaluator]:
    """The evaluators of a config, by their names in it."""
    return {
        name: build(to_plain(cfg, keep_callables=True), context=context)
        for name, cfg in config.evaluators.items()
        if cfg
    }
