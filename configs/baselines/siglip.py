"""SigLIP: each pair a yes or no, rows of equal label all yes.

python -m unicl_jax.main --config=configs/baselines/siglip.py --workdir=runs/x

On the quick start's data; `:paper` has the data and the towers of configs/swin_tiny.py.
"""

from unicl_jax.config import base_recipe


def get_config(variant: str = ""):
    config = base_recipe(__file__, variant)
    config.objective = "siglip"
    # t' and b at the start, arXiv 2303.15343, Algorithm 1.
    config.model.logit_scale_init = 2.303  # log(10); the bias is the objective's: -10
    return config
