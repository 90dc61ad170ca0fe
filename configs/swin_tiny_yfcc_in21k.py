"""Swin-T on YFCC-14M and ImageNet-21K: the paper's section 4.2.2 (arXiv 2204.03610).

python -m unicl_jax.main --config=configs/swin_tiny_yfcc_in21k.py --workdir=runs/yfcc

All records alike, 32 epochs, random crops only; ImageNet-1K's classes are held out, so
that its validation set is zero-shot. The authors list 40.5 % top-1 there, against
30.1 % with YFCC-14M alone and 28.5 % with ImageNet-21K alone.
"""

from unicl_jax import config as config_lib

# Where the data lies; gs:// paths, globs and lists are as good.
IMAGENET_21K = "data/imagenet21k/*.tfrecord"  # ImageNet-22K without the 1K's classes
IMAGENET_21K_NAMES = "data/imagenet21k/class_names.txt"  # one a line, in label order
YFCC = "data/yfcc14m/*.tfrecord"  # written by img2dataset, output_format tfrecord
IMAGENET = "data/tfds/imagenet2012/5.1.0"  # for its validation set

RECORDS = 13_000_000 + 14_000_000  # the paper's table 1, to the million
EPOCHS = 32
# "Only random crop, following CLIP"; how much of the image is open_clip's choice.
RANDOM_CROP = dict(
    name="random_resized_crop", scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3), flip=False
)


def get_config(variant: str = ""):
    config_lib.check_variant(variant, ())
    config = config_lib.default()
    config.batch_size = 4096
    config.total_steps = EPOCHS * RECORDS // config.get_ref("batch_size")

    config.model.image.name = "swin_tiny"
    config.model.image.image_size = 224
    config.model.image.drop_path = 0.2  # the release's; not stated in the paper
    config.model.text.name = "transformer"
    config.model.text.vocab_size = 49408
    config.model.text.context_length = 77
    config.model.text.width = 512
    config.model.text.num_heads = 8
    config.model.text.num_layers = 12
    config.model.embed_dim = 512
    config.model.logit_scale_init = 1.0
    config.model.dtype = "bfloat16"

    config.data.sources.imagenet21k = dict(
        kind="image_label",
        format="tfrecord",
        path=IMAGENET_21K,
        class_names=IMAGENET_21K_NAMES,
        preprocess=RANDOM_CROP,
    )
    config.data.sources.yfcc = dict(
        kind="image_text",
        format="tfrecord",
        path=YFCC,
        fields=dict(image="jpg", text="caption"),
        preprocess=RANDOM_CROP,
    )
    config.data.mixture = "proportional"  # the standard sampler of section 4.2.2
    config.data.templates = "unicl_81"
    config.data.text_length = "pack"  # the same embeddings for fewer slots

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.1
    config.optimizer.warmup_steps = 5000

    config.evaluations.imagenet = dict(
        format="tfds",
        path=IMAGENET,
        split="validation",
        class_names="imagenet",
        templates="unicl_81",
    )
    config.evaluate_every_steps = 5000
    config.checkpoint_every_steps = 2000
    return config
