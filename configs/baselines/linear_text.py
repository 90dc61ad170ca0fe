"""A learnt vector a class in place of the text tower: labels alone (Table 3).

python -m unicl_jax.main --config=configs/baselines/linear_text.py --workdir=runs/x

On the quick start's data; `:paper` has the data and the towers of configs/swin_tiny.py.
"""

from unicl_jax.config import base_recipe


def get_config(variant: str = ""):
    config = base_recipe(__file__, variant, labels_only=True)
    config.objective = "linear_text"
    return config
