"""ResNet-50 on CIFAR with UniCL on labels alone: the paper's section 4.1.

python -m unicl_jax.main --config=configs/resnet50_cifar.py --workdir=runs/cifar10
(or --config=configs/resnet50_cifar.py:cifar100)

The class names are the text, so the classifier is the text tower.
"""

from unicl_jax import config as config_lib

# Where the data lies, as TFDS prepares it.
PATHS = {"cifar10": "data/tfds/cifar10/3.0.2", "cifar100": "data/tfds/cifar100/3.0.2"}

RECORDS, EPOCHS, WARMUP_EPOCHS = 50_000, 500, 5  # section 4.1; 5 for ResNet


def get_config(variant: str = "cifar10"):
    config_lib.check_variant(variant, PATHS)
    config = config_lib.default()
    config.batch_size = 4096
    batch_size = config.get_ref("batch_size")
    config.total_steps = EPOCHS * RECORDS // batch_size

    config.model.image.name = "resnet50"
    config.model.image.image_size = 32
    config.model.image.stem = "cifar"  # 3 x 3, no pooling: the images are 32 pixels
    config.model.text.name = "transformer"
    config.model.text.vocab_size = 49408
    config.model.text.context_length = 77
    config.model.text.width = 512
    config.model.text.num_heads = 8
    config.model.text.num_layers = 12
    config.model.embed_dim = 512
    config.model.logit_scale_init = 1.0
    config.model.dtype = "bfloat16"

    config.data.sources[variant] = dict(
        kind="image_label",
        format="tfds",
        path=PATHS[variant],
        split="train",
        # At this size timm crops with 4 pixels of padding instead of resizing
        # (`augment.shift` below); the rest is Swin's recipe.
        preprocess=dict(
            name="resize",
            randaugment=dict(num_ops=2, magnitude=9, magnitude_std=0.5),
            erasing=0.25,
        ),
    )
    config.data.mixture = "proportional"
    config.data.templates = "unicl_81"
    config.data.text_length = "pack"  # the same embeddings for fewer slots
    config.augment.shift = 4
    config.augment.flip = True

    config.optimizer.name = "sgd"  # pure CNN
    config.optimizer.learning_rate = 0.4
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.optimizer.warmup_steps = WARMUP_EPOCHS * RECORDS // batch_size

    config.evaluations[variant] = dict(
        format="tfds",
        path=PATHS[variant],
        split="test",
        preprocess=dict(name="resize"),
        templates="unicl_81",
    )
    config.evaluate_every_steps = 500
    config.checkpoint_every_steps = 500
    return config
