"""What a trained model can do, measured on data it never saw."""

from unicl_jax.evaluation.nearest import pixel_nearest
from unicl_jax.evaluation.zero_shot import Scores, ZeroShotTask, make_encoders

__all__ = ["Scores", "ZeroShotTask", "make_encoders", "pixel_nearest"]
