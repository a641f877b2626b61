"""A transformer in NumPy and float64, for references: it reads the weights of our modules and shares no code with them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_erf = np.vectorize(math.erf)


def array(variable: Any) -> np.ndarray:
    return np.asarray(variable[...], np.float64)


def linear(x: np.ndarray, layer: Any) -> np.ndarray:
    return x @ array(layer.kernel) + array(layer.bias)


def standardized(x: np.ndarray, axis: int, eps: float = 1e-5) -> np.ndarray:
    return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + eps)


def layer_norm(x: np.ndarray, norm: Any) -> np.ndarray:
    return standardized(x, -1, norm.eps) * array(norm.scale) + array(norm.bias)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + _erf(x / math.sqrt(2)))


def attention(x: np.ndarray, layer: Any) -> np.ndarray:
    """Of one image, [N, C]."""
    qkv = linear(x, layer.qkv).reshape(len(x), 3, layer.num_heads, -1)
    heads = []
    for h in range(layer.num_heads):
        q, k, v = qkv[:, 0, h], qkv[:, 1, h], qkv[:, 2, h]
        weights = np.exp(q @ k.T / math.sqrt(q.shape[1]))
        heads.append(weights / weights.sum(axis=1, keepdims=True) @ v)
    return linear(np.concatenate(heads, axis=1), layer.proj)


def feed_forward(x: np.ndarray, layer: Any) -> np.ndarray:
    return linear(gelu(linear(x, layer.fc1)), layer.fc2)


def pre_norm_block(x: np.ndarray, layer: Any) -> np.ndarray:
    x = x + attention(layer_norm(x, layer.ln1), layer.attn)
    return x + feed_forward(layer_norm(x, layer.ln2), layer.ffn)


def patch_tokens(image: np.ndarray, backbone: Any) -> np.ndarray:
    """Patches of an image [H, W, 3] with positions, [N, C]."""
    p = backbone.patch_embed.patch_size[0]
    kernel = array(backbone.patch_embed.projection.kernel)
    tokens = [
        np.tensordot(image[i : i + p, j : j + p], kernel, axes=3)
        for i in range(0, image.shape[0], p)
        for j in range(0, image.shape[1], p)
    ]
    return np.stack(tokens) + array(backbone.patch_embed.projection.bias) + array(backbone.pos_embed)[0]
