"""Supervised training: a softmax over the classes, on labels alone (Table 2).

python -m unicl_jax.main --config=configs/baselines/cross_entropy.py --workdir=runs/x

On the quick start's data; `:paper` has the data and the towers of configs/swin_tiny.py,
`:paper_mixup` MixUp and CutMix, too. Swin's label smoothing is left out.
"""

from unicl_jax.config import base_recipe


def get_config(variant: str = ""):
    variants = ("paper", "paper_mixup")
    config = base_recipe(__file__, variant, labels_only=True, variants=variants)
    config.objective = "cross_entropy"
    return config
