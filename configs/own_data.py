"""Your own pictures: a folder of labelled images, a table of captions, or both.

python -m unicl_jax.main --config=configs/own_data.py --workdir=runs/own \
  --config.data.sources.labels.path=pictures \
  --config.data.sources.captions.path=captions.csv \
  --config.evaluations.held_out.path=held_out

`pictures` and `held_out` have one folder a class; `captions.csv` has a column with
paths of images, relative to it, and one with captions. `:labels` and `:captions` train
on one of them alone; without held_out.path nothing is evaluated.
"""

from unicl_jax import config as config_lib

# The crops are milder than the paper's: so short a run has no time for hard ones.
CROPS = dict(name="random_resized_crop", scale=(0.5, 1.0), flip=True)
KINDS = {"captions": ("image_text",), "labels": ("image_label",)}


def get_config(variant: str = ""):
    config_lib.check_variant(variant, KINDS)
    config = config_lib.default()
    config.batch_size = 128
    config.total_steps = 1500

    config.model.image.name = "swin"
    config.model.image.image_size = 64
    config.model.image.patch_size = 4
    config.model.image.window_size = 4
    config.model.image.embed_dim = 32
    config.model.image.depths = (1, 1, 4)
    config.model.image.num_heads = (1, 2, 4)
    config.model.image.init_std = 0.1  # 0.02 is for towers ten times as wide
    config.model.text.name = "transformer"
    config.model.text.vocab_size = 16384  # the first 15,870 merges of CLIP's
    config.model.text.context_length = 32  # longer captions lose their tails
    config.model.text.width = 128
    config.model.text.num_heads = 2
    config.model.text.num_layers = 1
    config.model.embed_dim = 128
    # CLIP's start and cap: see configs/quickstart.py.
    config.model.logit_scale_init = 2.659  # log(1 / 0.07)
    config.model.logit_scale_max = 4.605  # log(100)

    # "" leaves to the format what it finds; docs/data.md says what may stand there.
    sources = dict(
        labels=dict(
            format="folder",
            kind="image_label",
            path="pictures",
            class_names="",
            preprocess=CROPS,
        ),
        captions=dict(
            format="csv",
            kind="image_text",
            path="captions.csv",
            root="",
            delimiter="",
            fields=dict(image="", text=""),
            preprocess=CROPS,
        ),
    )
    for name, source in sources.items():
        if source["kind"] in KINDS.get(variant, (source["kind"],)):
            config.data.sources[name] = source
    config.data.mixture = "proportional" if variant else "balanced"
    config.data.templates = "short"
    config.data.share_prompts = True
    config.augment.color = 0.15

    config.optimizer.name = "muon"  # gets further than AdamW in so few steps
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.1
    config.optimizer.b2 = 0.98
    config.optimizer.clip_norm = 1.0

    names = ""
    if variant != "captions":  # what the labels' classes are called, until it is set
        names = config.data.sources.labels.get_oneway_ref("class_names")
    config.evaluations.held_out = dict(
        format="folder", path="", class_names=names, templates="short"
    )
    config.evaluate_every_steps = 500
    config.checkpoint_every_steps = 250
    config.log_every_steps = 20
    return config
