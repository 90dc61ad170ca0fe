"""Losses as pure functions of arrays. This room imports jax and nothing else."""

from unicl_jax.losses.sharded import sharded
from unicl_jax.losses.unicl import (
    NO_LABEL,
    UniclAux,
    contrastive_loss,
    positive_mask,
    unicl_loss,
    unicl_loss_and_aux,
)

__all__ = [
    "NO_LABEL",
    "UniclAux",
    "contrastive_loss",
    "positive_mask",
    "sharded",
    "unicl_loss",
    "unicl_loss_and_aux",
]
