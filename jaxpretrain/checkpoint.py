"""Checkpoints: train state, data iterator, clock and configuration of one step in one directory.

`workdir/checkpoints/STEP/` is written by Orbax in the background and renamed into place when it is complete, so a
process killed at any moment leaves the earlier checkpoints as they were. It holds two items:

* `state`: every array of the train state, as nested dictionaries with string keys, readable with Orbax alone;
* `meta`: JSON with the configuration, the data iterator's state, the clock, the metrics, and each array's path, shape,
  dtype and checksum; protected by a digest.

Orbax restores a flipped byte as a wrong number without complaint, so the checksums are verified after loading.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Sharding, SingleDeviceSharding

from jaxpretrain.build import ConfigError, nearest
from jaxpretrain.checkpoint_format import (
    KeyPath,
    config_difference,
    digest,
    flatten,
    from_json,
    join,
    leaf_differences,
    look_up,
    name,
    nest,
    reason,
    strings,
    to_json,
)
from jaxpretrain.checksums import checksums, is_key, key_data
from jaxpretrain.cli import ExpectedFailure

FORMAT, VERSION = "jaxpretrain", 1
GROUPS = ("params", "ema", "model_state")  # entries of the train state that using a model needs
ALL_GROUPS = (*GROUPS, "ema_state")  # and one that only some runs have
_TMP = ".orbax-checkpoint-tmp"  # Orbax's suffix of directories that are not complete
logger = logging.getLogger("jaxpretrain")


class CheckpointError(ExpectedFailure):
    """A checkpoint that cannot be read, used or written: the message says which, why, and what to do."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint held. `state` has the structure asked for; the rest is JSON, so tuples are lists."""

    step: int
    state: Any
    data_state: Any
    clock: dict[str, Any]
    config: dict[str, Any]
    metrics: dict[str, float]


class Checkpointer:
    """Saves and restores the checkpoints of one run. All processes of a run call the same methods in the same order.

    Args:
        directory: `workdir/checkpoints`, on a file system that all processes share. Created by the first save.
        config: the run's configuration; stored, and compared with the stored one when restoring. None compares nothing.
        interval: epochs (`by_epoch`) or steps between checkpoints, as `should_save` counts; -1 never saves.
        max_to_keep: how many of the latest checkpoints to keep; -1 or None keeps all.
        save_best: an evaluation metric (`knn/top1`): the best checkpoint by it is kept besides the latest.
        best_mode: 'max' or 'min'; None means 'min' for a metric named after loss, error, perplexity or FID, else 'max'.
        ignore_config: restore although the configuration differs.
        step: what `restore` restores if not told: None or 'latest', 'best', or a step.
        read_only: creates and removes nothing. `save_best` and its mode are those of the latest checkpoint.

    Raises:
        CheckpointError: the directory holds something else. ConfigError: an argument out of range.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        config: Any = None,
        *,
        interval: int = 1,
        by_epoch: bool = True,
        max_to_keep: int | None = 3,
        save_best: str | None = None,
        best_mode: str | None = None,
        ignore_config: bool = False,
        step: int | str | None = None,
        read_only: bool = False,
    ) -> None:
        if interval == 0 or max_to_keep == 0 or best_mode not in (None, "max", "min"):
            raise ConfigError(
                "config.checkpoint: interval and max_to_keep are positive or -1, best_mode is 'max' or 'min'; "
                f"got interval={interval}, max_to_keep={max_to_keep}, best_mode={best_mode!r}"
            )
        self.directory = epath.Path(os.path.abspath(directory))
        self.config, self.ignore_config, self.step, self.read_only = config, ignore_config, step, read_only
        self.interval, self.by_epoch, self.max_to_keep = interval, by_epoch, max_to_keep
        self.save_best = save_best
        lower_is_better = re.search(r"loss|error|perplexity|(^|[/_])(err|fid)$", save_best or "", re.IGNORECASE)
        self.best_mode = best_mode or ("min" if lower_is_better else "max")
        self.stall = 0.0  # seconds that the last `save` kept the training loop waiting
        self._position: int | None = None  # the step last saved or restored here
        self._restored = False  # and it was restored
        self._pending: int | None = None  # the step being written
        self._metas: dict[int, dict[str, Any]] = {}
        self._manager: ocp.CheckpointManager | None = None
        self._check_directory()
        if not read_only:
            self._remove_leftovers()
        elif (latest := self.latest_step()) is not None and save_best is None:
            self.save_best, self.best_mode = self._meta(latest)["best"]

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------------------
    # Which steps

    def all_steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        if not self.directory.exists():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def latest_step(self) -> int | None:
        """The step of the last complete checkpoint, None if there is none."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step of the best checkpoint by `save_best`, the later one of equals; None if none has that metric."""
        scores = {step: score for step in self.all_steps() if (score := self._score(step)) is not None}
        return max(scores, key=lambda step: (scores[step], step), default=None)

    def should_save(
        self,
        step: int,
        steps_per_epoch: int = 1,
        *,
        total_steps: int | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Whether to save after `step` completed steps: `interval` is due, it is the last, or `metrics` are best."""
        if self.interval < 0:
            return False
        due = step % (self.interval * (steps_per_epoch if self.by_epoch else 1)) == 0
        return due or step == total_steps or self._is_best(metrics or {})

    def _is_best(self, metrics: Mapping[str, float]) -> bool:
        score = self._rank(metrics)
        if score is None:
            return False
        self.wait()  # what is still being written counts
        best = self.best_step()
        best_score = None if best is None else self._score(best)
        return best_score is None or score > best_score

    def _rank(self, metrics: Mapping[str, float]) -> float | None:
        """The value of `save_best` such that greater is better; None if it is absent or not a number."""
        value = metrics.get(self.save_best) if self.save_best else None
        if value is None or math.isnan(value):
            return None
        return float(value) if self.best_mode == "max" else -float(value)

    def _score(self, step: int) -> float | None:
        try:
            return self._rank(self._meta(step)["metrics"])
        except CheckpointError as error:  # matters to those who restore it, and they are told
            logger.warning("%s", error)
            return None

    # ------------------------------------------------------------------------------------------------------------------
    # Saving

    def save(
        self,
        step: int,
        state: Any,
        *,
        data_state: Any = None,
        clock: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Starts writing a checkpoint and returns; training may then go on and donate `state`.

        Blocks while the previous checkpoint is still being written, and until the arrays have been copied to the host.

        Args:
            step: number of completed optimizer steps.
            state: any tree of arrays.
            data_state: where the data iterator stands; anything that JSON can hold, or bytes. Of several processes the
                first one's is kept, so it must describe the position of the whole run.
            clock: the clock's state.
            metrics: of an evaluation at this very step.

        Returns:
            False if nothing was done: `interval` is -1, or this step is saved already.

        Raises:
            CheckpointError: this or the previous checkpoint could not be written; earlier ones are intact.
            ConfigError: `metrics` lack `save_best`.
        """
        if self.interval < 0 or self.read_only or step == self._position:
            return False
        if metrics and self.save_best and self.save_best not in metrics:
            where = f"config.checkpoint.save_best={self.save_best!r}"
            raise ConfigError(f"{where}: no evaluator reports this.{nearest(self.save_best, metrics)}")
        start = time.perf_counter()
        self.wait()
        self._continue_from_position()
        with jax.transfer_guard("allow"):
            flat = flatten(state)
            arrays = {strings(path): key_data(leaf) for path, leaf in flat.items() if leaf.size}
            meta = to_json(
                dict(
                    format=FORMAT,
                    version=VERSION,
                    step=step,
                    config=self.config or {},
                    data_state=data_state,
                    clock=clock or {},
                    metrics=metrics or {},
                    best=(self.save_best, self.best_mode),
                    leaves=_describe(flat),
                )
            )
            items = ocp.args.Composite(
                state=ocp.args.PyTreeSave(nest(arrays)), meta=ocp.args.JsonSave(dict(meta=meta, sha256=digest(meta)))
            )
            self._pending = step
            try:
                self._orbax().save(step, args=items, force=True)
            except Exception as error:
                raise self._failure(error) from error
        self._position = step
        self.stall = time.perf_counter() - start
        return True

    def check(self) -> None:
        """Raises CheckpointError if a write in the background has failed; does not wait for one that is going on."""
        if self._pending is not None and not self._orbax().is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the checkpoint being written is complete, then removes those beyond `max_to_keep`.

        Raises CheckpointError if it could not be written; saving can be tried again then.
        """
        if self._pending is None:
            return
        try:
            self._orbax().wait_until_finished()
        except Exception as error:
            raise self._failure(error) from error
        self._pending = None
        if self.max_to_keep is not None and self.max_to_keep > 0:
            keep = self.max_to_keep
            self._remove(lambda: set(self.all_steps()[:-keep]) - {self.best_step()})

    def close(self) -> None:
        """Waits for the checkpoint being written and ends all threads. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()
                self._manager = None

    def _continue_from_position(self) -> None:
        """Removes checkpoints of later steps than the one restored: the run goes another way from there."""
        if self._restored:
            position = self._position or 0
            self._remove(lambda: [step for step in self.all_steps() if step > position])
            self._orbax().reload()
            self._restored = False
        elif self._position is None and (steps := self.all_steps()):
            raise CheckpointError(
                f"{self.directory} already has checkpoints (steps {join(steps)}), but this run has not restored one. "
                "Start in a new --workdir"
            )

    def _remove(self, doomed: Callable[[], Iterable[int]]) -> None:
        """Removes checkpoints, each renamed first, so that one half removed never passes for complete.

        The first process alone decides and removes, and the others wait: they would see the directory change.
        """
        if jax.process_index() == 0:
            for step in sorted(doomed()):
                logger.debug("removing the checkpoint of step %d", step)
                path = self.directory / str(step)
                renamed = path.parent / (path.name + _TMP)
                path.rename(renamed)
                renamed.rmtree(missing_ok=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints removed")
        steps = self.all_steps()
        self._metas = {step: meta for step, meta in self._metas.items() if step in steps}

    def _remove_leftovers(self) -> None:
        if jax.process_index() == 0 and self.directory.exists():
            for path in self.directory.iterdir():
                if _TMP in path.name:
                    path.rmtree(missing_ok=True)

    def _failure(self, error: Exception) -> CheckpointError:
        """The error of a write that failed, after removing what it left."""
        step, self._pending = self._pending, None
        manager, self._manager = self._manager, None
        try:
            if manager is not None:
                manager.close()
        except Exception:  # the same error once more
            logger.debug("closing after a failed write", exc_info=True)
        self._remove_leftovers()
        latest = self.latest_step()
        if self._position == step:
            self._position = latest
        rest = "there is no earlier one"
        if latest is not None:
            rest = f"the checkpoint of step {latest} is intact, and the run can go on from it"
        where = self.directory / str(step)
        return CheckpointError(f"The checkpoint of step {step} could not be written ({where}): {reason(error)}; {rest}")

    # ------------------------------------------------------------------------------------------------------------------
    # Restoring

    def restore(self, abstract_state: Any, step: int | str | None = None) -> Checkpoint:
        """Loads one checkpoint and verifies it. A damaged one is never passed over for an older one.

        Args:
            abstract_state: the state's tree with `jax.ShapeDtypeStruct` leaves (or arrays), which say shape, dtype, and
                sharding over any mesh; leaves without a sharding come to the first device.
            step: a step, 'best' or 'latest'; None is what the constructor was given.

        Saving goes on from this step: the next `save` removes checkpoints of later steps.

        Raises:
            CheckpointError: there is none, or it is damaged, of another configuration, or has other leaves.
        """
        self.wait()
        step = self._resolve(self.step if step is None else step)
        meta = self._meta(step)
        different = [] if self.config is None or self.ignore_config else config_difference(meta["config"], self.config)
        if different:
            lines = "\n  ".join(different)
            raise CheckpointError(
                f"The checkpoint {self.directory / str(step)} was made with another configuration:\n  {lines}\n"
                "Start in a new --workdir, or go on from this checkpoint all the same with "
                "--config.checkpoint.ignore_config=True"
            )
        state = self._load_like(step, abstract_state, meta["leaves"])
        self._position, self._restored = step, True
        return self._checkpoint(step, state)

    def restore_params(self, step: int | str | None = None, abstract: Mapping[str, Any] | None = None) -> Checkpoint:
        """Loads only what using the model needs; see `load_params`."""
        step = self._resolve(self.step if step is None else step)
        leaves = self._meta(step)["leaves"]
        if abstract is None:
            paths = [tuple(leaf["path"]) for leaf in leaves.values() if leaf["path"][0] in ALL_GROUPS]
            return self._checkpoint(
                step, {group: {} for group in GROUPS} | nest(self._load(step, dict.fromkeys(paths)))
            )
        wanted = {group: abstract[group] for group in ALL_GROUPS if group in abstract}
        # A model without averaged weights can be used from a checkpoint that has them.
        groups = [group for group in wanted if group != "ema" or jax.tree.leaves(wanted["ema"])]
        leaves = {leaf_name: leaf for leaf_name, leaf in leaves.items() if leaf["path"][0] in groups}
        return self._checkpoint(step, self._load_like(step, wanted, leaves))

    def _checkpoint(self, step: int, state: Any) -> Checkpoint:
        meta = self._meta(step)
        fields = {field: from_json(meta[field]) for field in ("data_state", "clock", "config", "metrics")}
        return Checkpoint(step=step, state=state, **fields)

    def _resolve(self, step: int | str | None) -> int:
        steps = self.all_steps()
        if not steps:
            raise CheckpointError(f"There is no checkpoint in {self.directory}")
        if step in (None, "latest"):
            return steps[-1]
        if step == "best":
            if (best := self.best_step()) is not None:
                return best
            metric = repr(self.save_best) if self.save_best else "a metric to choose by"
            raise CheckpointError(
                f"No checkpoint in {self.directory} (steps {join(steps)}) has {metric}: "
                "take the latest, or train with --config.checkpoint.save_best=METRIC"
            )
        if not str(step).isdecimal() or int(step) not in steps:
            raise CheckpointError(f"There is no checkpoint {step!r} in {self.directory}; there are {join(steps)}")
        return int(step)

    def _meta(self, step: int) -> dict[str, Any]:
        """The verified JSON of one checkpoint."""
        if step not in self._metas:
            path = self.directory / str(step) / "meta" / "metadata"
            try:
                record = json.loads(path.read_bytes())
                meta, intact = record["meta"], digest(record["meta"]) == record["sha256"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise self._damaged(step, f"{path} cannot be read ({reason(error)})") from error
            if not intact:
                raise self._damaged(step, f"{path} does not match its digest")
            if meta["version"] > VERSION:
                raise CheckpointError(f"{path} has format {meta['version']}; this version reads up to {VERSION}")
            self._metas[step] = meta
        return self._metas[step]

    def _load_like(self, step: int, abstract: Any, saved: Mapping[str, Any]) -> Any:
        """The leaves `saved`, in the structure and shardings of `abstract`, which must fit them exactly."""
        flat = flatten(abstract)
        if different := leaf_differences(saved, flat):
            lines = "\n  ".join(different)
            raise CheckpointError(f"The checkpoint {self.directory / str(step)} does not fit:\n  {lines}")
        first = SingleDeviceSharding(jax.local_devices()[0])
        shardings = {path: getattr(x, "sharding", None) or first for path, x in flat.items()}
        for path, sharding in shardings.items():
            sharding.shard_shape(tuple(flat[path].shape))  # raises if it does not divide
        loaded = self._load(step, shardings)
        return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[path] for path in flat])

    def _load(self, step: int, shardings: Mapping[KeyPath, Sharding | None]) -> dict[KeyPath, Any]:
        """The arrays of these paths, verified; numpy arrays where the sharding is None."""
        leaves = {path: self._meta(step)["leaves"][name(path)] for path in shardings}
        present = {strings(path): shardings[path] for path, leaf in leaves.items() if 0 not in leaf["shape"]}
        how = {
            path: ocp.ArrayRestoreArgs(sharding=sharding) if sharding else ocp.RestoreArgs(restore_type=np.ndarray)
            for path, sharding in present.items()
        }
        request = ocp.args.PyTreeRestore(item=nest(dict.fromkeys(how, 0)), restore_args=nest(how), partial_restore=True)
        with jax.transfer_guard("allow"):
            try:
                tree = self._orbax().restore(step, args=ocp.args.Composite(state=request))["state"] if how else {}
            except Exception as error:
                if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                    raise  # of this machine's memory, not the checkpoint's fault
                state = self.directory / str(step) / "state"
                raise self._damaged(step, f"{state} cannot be read ({reason(error)})") from error
            values = {
                # Orbax stores no empty arrays.
                path: jnp.zeros(leaf["shape"], leaf["dtype"], device=shardings[path])
                if 0 in leaf["shape"]
                else look_up(tree, strings(path))
                for path, leaf in leaves.items()
            }
            arrays = {path: x for path, x in values.items() if isinstance(x, jax.Array | np.ndarray)}
            sums = dict(zip(arrays, checksums(list(arrays.values())), strict=True))
        wrong = [name(path) for path, leaf in leaves.items() if sums.get(path) != leaf["checksum"]]
        # The same bits may come back as another type, if it is the description that is damaged.
        wrong += [name(path) for path, x in arrays.items() if not _fits(x, leaves[path])]
        if wrong:
            raise self._damaged(step, f"{join(wrong)} in {self.directory / str(step) / 'state'}: wrong checksum")
        keys = {path: leaf["key_impl"] for path, leaf in leaves.items() if "key_impl" in leaf}
        return arrays | {
            path: jax.random.wrap_key_data(jnp.asarray(arrays[path]), impl=impl) for path, impl in keys.items()
        }

    def _damaged(self, step: int, what: str) -> CheckpointError:
        older = [other for other in self.all_steps() if other < step]
        advice = "There is no older one: start in a new --workdir"
        if older:
            advice = (
                f"Older ones: steps {join(older)}. To go on from one, add --config.checkpoint.step={older[-1]} to this "
                "start alone; the next save removes the checkpoints of later steps"
            )
        return CheckpointError(f"The checkpoint of step {step} is damaged: {what}. {advice}")

    # ------------------------------------------------------------------------------------------------------------------
    # The directory

    def _orbax(self) -> ocp.CheckpointManager:
        """Orbax's manager, which reads and writes; which checkpoints to keep is decided here."""
        if self._manager is None:
            self._manager = ocp.CheckpointManager(
                self.directory, options=ocp.CheckpointManagerOptions(create=not self.read_only)
            )
        return self._manager

    def _check_directory(self) -> None:
        """Raises CheckpointError if the directory holds something, but no checkpoint of ours."""
        if not self.directory.exists():
            if self.read_only:
                raise CheckpointError(f"There is no directory {self.directory}")
            return
        if not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory} is a file, not a directory of jaxpretrain's checkpoints{_hint([self.directory])}"
            )
        found = sorted(p for p in self.directory.iterdir() if _TMP not in p.name and not p.name.startswith("."))
        steps = [path for path in found if path.name.isdecimal() and path.is_dir()]
        if not found or any((path / "meta").exists() for path in steps):
            return
        what = join([path.name for path in found])
        if steps:
            inside = sorted({item.name for path in steps for item in path.iterdir()})
            what = f"{join([path.name for path in steps])}, with {join(inside)} but without the 'meta' that ours have"
        raise CheckpointError(
            f"{self.directory} is not a directory of jaxpretrain's checkpoints. It holds {what}{_hint(found)}"
        )


def load_params(
    directory: str | os.PathLike, which: int | str = "latest", abstract: Mapping[str, Any] | None = None
) -> Checkpoint:
    """The weights of one checkpoint, for evaluation or export, without what trained them.

    Args:
        directory: a workdir, its `checkpoints` directory, or the directory of one step.
        which: 'latest', 'best' or a step. The directory of one step says it itself.
        abstract: a state's tree with `jax.ShapeDtypeStruct` leaves, of which `params`, `ema` and `model_state` are
            looked at; shardings are honoured. Averaged weights in the checkpoint are left out if `abstract` has none.

    Returns:
        a Checkpoint with a `state` of `params`, `ema` and `model_state` (empty dictionaries where there are none), and of
        `ema_state` if that was averaged too: as in `abstract`, or without it nested dictionaries of numpy arrays with the
        keys that were saved.

    Raises:
        CheckpointError: as `Checkpointer` and its `restore`, but for the configuration, which is not compared.
    """
    path = Path(directory)
    if path.name.isdecimal() and (path / "meta").exists():
        path, which = path.parent, int(path.name)
    elif (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    with Checkpointer(path, read_only=True) as checkpointer:
        return checkpointer.restore_params(which, abstract)


def _describe(flat: Mapping[KeyPath, Any]) -> dict[str, dict[str, Any]]:
    """Name -> path, shape, dtype and checksum of each array."""
    leaves = {}
    for (path, x), checksum in zip(flat.items(), checksums(list(flat.values())), strict=True):
        leaf = dict(path=path, shape=x.shape, dtype=str(x.dtype), checksum=checksum)
        leaves[name(path)] = leaf | (dict(key_impl=str(jax.random.key_impl(x))) if is_key(x) else {})
    return leaves


def _fits(x: Any, leaf: Mapping[str, Any]) -> bool:
    """Whether an array read has the shape and dtype recorded; a PRNG key is stored as words in one more axis."""
    if "key_impl" in leaf:
        return str(x.dtype) == "uint32" and list(x.shape[:-1]) == leaf["shape"]
    return str(x.dtype) == leaf["dtype"] and list(x.shape) == leaf["shape"]


def _hint(found: Iterable[epath.Path]) -> str:
    torch = any(path.suffix in (".pth", ".pt", ".bin", ".ckpt", ".safetensors") for path in found)
    return "; weights of PyTorch have to be converted first" if torch else ""
