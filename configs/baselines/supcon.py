"""SupCon: images of a class attract each other; then a linear classifier (Table 2).

python -m unicl_jax.main --config=configs/baselines/supcon.py:two_stage \
  --workdir=runs/supcon

The first stage (runs/supcon/stage_1) learns no names and is not evaluated; the second
(stage_2) trains a classifier on its image tower, which stays as it is. Without
`:two_stage` the first is trained alone; `:linear` is the second, for any run's tower:

python -m unicl_jax.main --config=configs/baselines/supcon.py:linear \
  --workdir=runs/linear --config.init_from=runs/supcon/stage_1

On the quick start's data, labels alone; `:paper`, `:paper_linear` and
`:paper_two_stage` have the data and the towers of configs/swin_tiny.py.
"""

from unicl_jax.config import base_recipe, followed_by

VARIANTS = ("linear", "two_stage", "paper", "paper_linear", "paper_two_stage")


def get_config(variant: str = ""):
    if variant.endswith("two_stage"):
        first = variant.removesuffix("two_stage").removesuffix("_")
        return followed_by(
            get_config(first), get_config(f"{first}_linear" if first else "linear")
        )
    config = base_recipe(__file__, variant, labels_only=True, variants=VARIANTS)
    if variant.endswith("linear"):
        config.objective = "cross_entropy"
        config.frozen = ("image",)
        return config
    config.objective = "supcon"
    config.evaluations = {}
    config.model.logit_scale_init = 2.303  # log(1 / 0.1): arXiv 2004.11362, section 4.4
    config.views = 2
    config.augment.crop = 0.2  # as the authors' code, which jitters colours by 0.4
    config.augment.color = 0.4
    config.augment.grayscale = 0.2
    if variant == "paper":
        config.augment.flip = True
        # Whole pictures travel, squashed to a square, once a record; the device cuts
        # the views from them.
        config.data.image_size = 320
        for source in config.data.sources.values():
            source.preprocess = dict(name="resize")
    else:
        config.augment.crop = 0.5  # a drawing's lower fifth says little
    return config
