"""Blocks that several networks share.

Two conventions hold for every layer:

- **A layer computes in the dtype of its input.** Parameters stay float32 and are cast where they are used, so one cast
  of the images switches a whole network to bfloat16. Statistics (norms, softmax) are at least float32.
- **Mode is an attribute, as in PyTorch.** `module.train()` and `module.eval()` switch `deterministic` (dropout, drop
  path) and `use_running_average` (BatchNorm); a fresh module is in training mode. Random layers take `rngs` in calls.
"""

from jaxpretrain.models.layers.attention import MultiheadAttention
from jaxpretrain.models.layers.base import BaseModule, Frozen, freeze
from jaxpretrain.models.layers.conv import Conv2d, ConvModule, avg_pool2d, global_avg_pool, max_pool2d, relu
from jaxpretrain.models.layers.drop import Dropout, drop_path
from jaxpretrain.models.layers.ffn import FFN, SwiGLUFFNFused
from jaxpretrain.models.layers.intermediates import capture, intermediates, record, wanted
from jaxpretrain.models.layers.layer_scale import LayerScale
from jaxpretrain.models.layers.linear import Linear
from jaxpretrain.models.layers.norm import BatchNorm, LayerNorm, build_norm
from jaxpretrain.models.layers.patch_embed import PatchEmbed
from jaxpretrain.models.layers.position import build_2d_sincos_position_embedding, resize_pos_embed
from jaxpretrain.models.layers.stack import apply_layers

__all__ = [
    "FFN",
    "BaseModule",
    "BatchNorm",
    "Conv2d",
    "ConvModule",
    "Dropout",
    "Frozen",
    "LayerNorm",
    "LayerScale",
    "Linear",
    "MultiheadAttention",
    "PatchEmbed",
    "SwiGLUFFNFused",
    "apply_layers",
    "avg_pool2d",
    "build_2d_sincos_position_embedding",
    "build_norm",
    "capture",
    "drop_path",
    "freeze",
    "global_avg_pool",
    "intermediates",
    "max_pool2d",
    "record",
    "relu",
    "resize_pos_embed",
    "wanted",
]
