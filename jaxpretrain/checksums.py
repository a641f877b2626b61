"""Checksums of arrays that do not depend on how they are laid out over devices."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, UInt32


def is_key(x: Any) -> bool:
    """True for typed PRNG keys (`jax.random.key`), also abstract ones."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def key_data(x: Any) -> Any:
    """The uint32 words of typed PRNG keys; anything else as it is."""
    return jax.random.key_data(x) if is_key(x) else x


def _words(x: Array) -> UInt32[Array, "*shape"]:
    """The bits of `x` as uint32: one word per element; two, in a new last axis, for 64-bit types."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = (jnp.finfo if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo)(x.dtype).bits
    unsigned = jnp.dtype("uint32" if bits == 64 else f"uint{bits}")
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def checksum(x: Array) -> UInt32[Array, ""]:
    """Sum over all words of `x`, modulo 2^32, of a mix of the word and its position in the whole array.

    Integer sums are exact in any order, and positions come from iotas rather than a reshape, so a sharded array is not
    gathered and gives the same sum. The mix (MurmurHash3's finalizer) is a bijection for each position: damage in one
    word always shows, any other goes unseen with probability 2^-32.
    """
    words = _words(x)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = words ^ (position * jnp.uint32(0x9E3779B1) + jnp.uint32(0x85EBCA77))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


@functools.cache
def _jitted(out_sharding: Sharding | None) -> Any:
    return jax.jit(checksum, out_shardings=out_sharding)


def checksums(arrays: Sequence[Any]) -> list[int]:
    """The checksum of each array (jax or numpy, typed PRNG keys too), computed on device.

    One function is compiled for each shape and sharding rather than one for all arrays together: for 3600 arrays that
    takes 4 s instead of 37 s, and runs as fast.
    """
    sums = []
    for x in map(key_data, arrays):
        sharding = getattr(x, "sharding", None)
        # Every process reads the sum, so it has to be replicated.
        everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
        sums.append(_jitted(everywhere)(x))
    return [int(value) for value in jax.device_get(sums)]
