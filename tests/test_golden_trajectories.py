"""Whole training runs against the reference's, step by step: loss, learning rate, gradient, weights, statistics.

Thirty optimizer steps from the same weights and data through `make_train_step`. Transformers agree in float32. ResNets are
compared in float64: in float32 one activation within rounding of 0 takes the other side of a ReLU after a few steps, and the
runs part, the reference's own float32 and float64 runs among them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpretrain import build
from jaxpretrain.data.batch_augments import Mixup
from jaxpretrain.methods.base import Method
from jaxpretrain.methods.supervised import Supervised
from jaxpretrain.optim import build_optimizer, cosine_ema_momentum, learning_rates
from jaxpretrain.train_state import make_train_step, split
from tests.parity import load_golden, our_path, summary_of, fill_by_reference, zeros

FLOAT32 = ["mae_vit", "mocov3_vit", "sup_vit_adamw_mixup"]
FLOAT64 = ["simclr_resnet18_lars", "sup_resnet18_sgd", "sup_resnet18_ema", "sup_resnet18_accum2"]
