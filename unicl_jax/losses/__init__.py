"""Losses as pure functions of arrays. This room imports jax and nothing else."""

from unicl_jax.losses.accumulation import in_micro_batches
from unicl_jax.losses.classification import cross_entropy_loss, multitask_loss
from unicl_jax.losses.mp_nce import mp_nce_loss
from unicl_jax.losses.pairs import NO_LABEL, positive_mask
from unicl_jax.losses.sharded import sharded
from unicl_jax.losses.siglip import siglip_loss
from unicl_jax.losses.soft_targets import (
    mixed_targets,
    pair_logits,
    soft_target_floor,
    soft_target_loss,
)
from unicl_jax.losses.supcon import supcon_loss
from unicl_jax.losses.unicl import (
    UniclAux,
    contrastive_loss,
    unicl_loss,
    unicl_loss_and_aux,
)

__all__ = [
    "NO_LABEL",
    "UniclAux",
    "contrastive_loss",
    "cross_entropy_loss",
    "in_micro_batches",
    "mixed_targets",
    "mp_nce_loss",
    "multitask_loss",
    "pair_logits",
    "positive_mask",
    "sharded",
    "siglip_loss",
    "soft_target_floor",
    "soft_target_loss",
    "supcon_loss",
    "unicl_loss",
    "unicl_loss_and_aux",
]
