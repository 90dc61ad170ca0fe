"""The quick start: a small Swin and text transformer on data that ships along.

python -m unicl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Five minutes on two CPU cores. `:captions` and `:labels` train the same model for the
same steps on one kind of data alone; `:long` trains the mixture three times as long.

`:lit` trains a text tower to an image tower that stays as it is (arXiv 2111.07991):

python -m unicl_jax.main --config=configs/baselines/cross_entropy.py \
  --workdir=runs/cross_entropy
python -m unicl_jax.main --config=configs/quickstart.py:lit --workdir=runs/lit \
  --config.init_from=runs/cross_entropy
"""

from unicl_jax import config as config_lib

# Name, kind, share of a batch: half image-text and half image-label, as in the paper's
# balanced sampler; the labels are split two to one.
SOURCES = (
    ("emoji_captions", "image_text", 3),
    ("emoji_subgroups", "image_label", 2),
    ("fashion_mnist", "image_label", 1),
)
KINDS = {"captions": ("image_text",), "labels": ("image_label",)}


def get_config(variant: str = ""):
    config_lib.check_variant(variant, ("captions", "labels", "lit", "long"))
    config = config_lib.default()
    config.batch_size = 256
    config.total_steps = 4200 if variant == "long" else 1400

    config.model.image.name = "swin"
    config.model.image.image_size = 32
    config.model.image.patch_size = 4
    config.model.image.window_size = 4
    config.model.image.embed_dim = 64
    config.model.image.depths = (1, 4)
    config.model.image.num_heads = (2, 4)
    config.model.image.drop_path = 0.1 if variant == "long" else 0.0
    config.model.image.init_std = 0.1  # 0.02 is for towers ten times as wide
    config.model.image.absolute_positions = True  # the drawings are centred
    config.model.text.name = "transformer"
    config.model.text.vocab_size = 16384  # the first 15,870 merges of CLIP's
    config.model.text.context_length = 10  # 99 % of the names fit
    config.model.text.width = 128
    config.model.text.num_heads = 2
    config.model.text.num_layers = 1
    config.model.embed_dim = 128
    # CLIP's start and cap. From the paper's 1.0 the scale takes most of so short a run
    # to get where it is needed.
    config.model.logit_scale_init = 2.659  # log(1 / 0.07)
    config.model.logit_scale_max = 4.605  # log(100)

    for name, kind, weight in SOURCES:
        if kind in KINDS.get(variant, (kind,)):
            config.data.sources[name] = dict(
                format="quickstart", path=name, kind=kind, weight=weight
            )
    if variant == "lit":
        config.frozen = ("image",)
    config.data.mixture = "weights"
    config.data.templates = "short"
    config.data.share_prompts = True
    # No flips: letters, clocks and flags have a left and a right.
    config.augment.shift = 2
    config.augment.color = 0.15

    config.optimizer.name = "muon"  # gets further than AdamW in so few steps
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.1
    config.optimizer.b2 = 0.98
    config.optimizer.clip_norm = 1.0

    for name in ("twemoji_names", "twemoji_subgroups", "fashion_mnist"):
        config.evaluations[name] = dict(
            format="quickstart",
            path=name,
            templates=("{}",) if name == "twemoji_names" else "short",
        )
    config.evaluate_every_steps = 350
    config.checkpoint_every_steps = 350
    config.log_every_steps = 20
    return config
