"""What a trained model can do, measured on data it never saw."""

from unicl_jax.evaluation.between_steps import FeatureTask, make_task
from unicl_jax.evaluation.encoders import make_encoders
from unicl_jax.evaluation.nearest import pixel_nearest
from unicl_jax.evaluation.zero_shot import Scores, ZeroShotTask

__all__ = [
    "FeatureTask",
    "Scores",
    "ZeroShotTask",
    "make_encoders",
    "make_task",
    "pixel_nearest",
]
