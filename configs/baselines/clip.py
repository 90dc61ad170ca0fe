"""CLIP: every record is a class of its own, whatever its label.

python -m unicl_jax.main --config=configs/baselines/clip.py --workdir=runs/x

On the quick start's data; `:paper` has the data and the towers of configs/swin_tiny.py.
"""

from unicl_jax.config import base_recipe


def get_config(variant: str = ""):
    config = base_recipe(__file__, variant)
    config.objective = "clip"
    # With one text a class and step, CLIP's gradient is UniCL's (docs/losses.md).
    config.data.share_prompts = False
    return config
