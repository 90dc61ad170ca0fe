"""One direction of UniCL: each image's softmax over the texts (the paper's Table 3).

python -m unicl_jax.main --config=configs/baselines/one_way.py --workdir=runs/x

On the quick start's data; `:paper` has the data and the towers of configs/swin_tiny.py.
"""

from unicl_jax.config import base_recipe


def get_config(variant: str = ""):
    config = base_recipe(__file__, variant)
    config.objective = "one_way"
    return config
