"""Schedules, optimizers and parameter groups, put together into one optax transformation."""

from jaxpretrain.optim.build import base_lr, build_optimizer, scale_lr
from jaxpretrain.optim.ema import cosine_ema_momentum, ema_update
from jaxpretrain.optim.param_groups import ParamGroup, param_groups
from jaxpretrain.optim.schedules import learning_rates, weight_decays

__all__ = [
    "ParamGroup",
    "base_lr",
    "build_optimizer",
    "cosine_ema_momentum",
    "ema_update",
    "learning_rates",
    "param_groups",
    "scale_lr",
    "weight_decays",
]
