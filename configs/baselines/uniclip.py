"""UniCLIP: views of an image and its text in one space, each positive by itself.

python -m unicl_jax.main --config=configs/baselines/uniclip.py --workdir=runs/uniclip

The first view is weakly augmented, the others strongly; the embedding is told how. On
the quick start's data; `:paper` has the data and the towers of configs/swin_tiny.py.
"""

from unicl_jax.config import base_recipe


def get_config(variant: str = ""):
    config = base_recipe(__file__, variant)
    config.objective = "uniclip"
    config.model.logit_scale_init = 2.659  # log(1 / 0.07), of all three kinds of pairs
    config.views = 2
    config.strong_augment = dict(crop=0.5, color=0.4, grayscale=0.2)
    if variant == "paper":
        config.views = 3  # with the text, four embeddings a record
        config.augment.crop = 0.5
        config.augment.flip = True
        config.strong_augment = dict(crop=0.08, color=0.4, grayscale=0.2, blur=2.0)
        # Whole pictures travel, squashed to a square, once a record; the device cuts
        # the views from them.
        config.data.image_size = 320
        for source in config.data.sources.values():
            source.preprocess = dict(name="resize")
    return config
