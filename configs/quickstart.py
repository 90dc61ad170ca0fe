"""The quick start: a small Swin and text transformer on data that ships along.

python -m unicl_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from unicl_jax import config as config_lib

LABEL, TEXT = "image_label", "image_text"


def get_config(variant: str = ""):
    config_lib.check_variant(variant, ("captions", "labels", "long"))
    config = config_lib.default()
    config.batch_size = 256
    config.total_steps = 1600

    config.model.image.name = "swin"
    config.model.image.image_size = 32
    config.model.image.patch_size = 4
    config.model.image.window_size = 4
    config.model.image.embed_dim = 64
    config.model.image.depths = (1, 4)
    config.model.image.num_heads = (2, 4)
    config.model.image.init_std = 0.08
    config.model.text.name = "transformer"
    config.model.text.vocab_size = 4096
    config.model.text.context_length = 16
    config.model.text.width = 128
    config.model.text.num_heads = 2
    config.model.text.num_layers = 1
    config.model.embed_dim = 128
    config.model.logit_scale_init = 2.659
    config.model.logit_scale_max = 4.605

    sources = {
        "emoji_captions": TEXT,
        "emoji_subgroups": LABEL,
        "fashion_mnist": LABEL,
    }
    for name, kind in sources.items():
        config.data.sources[name] = dict(format="quickstart", path=name, kind=kind)
    config.data.templates = "short"
    config.data.share_prompts = True
    config.augment.shift = 2
    config.augment.color = 0.15

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.05
    config.optimizer.b2 = 0.98
    config.optimizer.clip_norm = 1.0

    for name in ("twemoji_names", "twemoji_subgroups", "fashion_mnist"):
        config.evaluations[name] = dict(
            format="quickstart",
            path=name,
            templates=("{}",) if name == "twemoji_names" else "short",
        )
    config.evaluate_every_steps = 400
    config.checkpoint_every_steps = 400
    config.log_every_steps = 20
    return config
