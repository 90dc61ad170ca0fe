"""Swin-T on ImageNet-1K and GCC: the paper's section 4.2.1 (arXiv 2204.03610).

python -m unicl_jax.main --config=configs/swin_tiny.py --workdir=runs/swin_tiny

Half of every batch is image-label, half image-text, for 500 epochs of the labels. The
authors list 81.8 % top-1 on ImageNet-1K, from prompts, when the captions are GCC-15M.

`:debug` runs all of it in a minute on made-up records of the same formats. `:labels`
is section 4.1: ImageNet-1K alone, 79.9 % top-1, and `:labels_mixup` Table 2's column
with MixUp and CutMix.
"""

from unicl_jax import config as config_lib

# Where the data lies. A gs:// path, a glob or a list of either is as good. On the
# command line --config.data.sources.gcc.path=... takes one path or glob.
IMAGENET = "data/tfds/imagenet2012/5.1.0"  # prepared by TFDS
GCC = "data/gcc15m/*.tfrecord"  # written by img2dataset, output_format tfrecord
# As WebDataset: format="webdataset", path="data/gcc15m/{00000..01499}.tar", no fields.

IMAGENET_RECORDS = 1_281_167
LABEL_EPOCHS, WARMUP_LABEL_EPOCHS = 500, 20  # section 4.2.1

# "The same augmentation as Swin", without MixUp and CutMix but for a column of Table 2;
# in timm's words.
SWIN_CROPS = dict(
    name="random_resized_crop",
    scale=(0.08, 1.0),
    ratio=(3 / 4, 4 / 3),
    flip=True,
    randaugment=dict(num_ops=2, magnitude=9, magnitude_std=0.5),  # rand-m9-mstd0.5-inc1
    erasing=0.25,
)


def get_config(variant: str = ""):
    config_lib.check_variant(variant, ("debug", "labels", "labels_mixup"))
    labels_only = variant.startswith("labels")
    config = config_lib.default()
    config.batch_size = 4096
    labels_a_step = config.get_ref("batch_size") // (1 if labels_only else 2)
    config.total_steps = LABEL_EPOCHS * IMAGENET_RECORDS // labels_a_step

    config.model.image.name = "swin_tiny"
    config.model.image.image_size = 224
    config.model.image.drop_path = 0.2  # Swin's, for this size
    config.model.text.name = "transformer"
    config.model.text.vocab_size = 49408
    config.model.text.context_length = 77
    config.model.text.width = 512
    config.model.text.num_heads = 8
    config.model.text.num_layers = 12
    config.model.embed_dim = 512
    config.model.logit_scale_init = 1.0  # "tau is trainable and initialised as 1"
    config.model.dtype = "bfloat16"

    config.data.sources.imagenet = dict(
        kind="image_label",
        format="tfds",
        path=IMAGENET,
        split="train",
        class_names="imagenet",  # readable names; TFDS itself has synset ids
        preprocess=SWIN_CROPS,
    )
    config.data.sources.gcc = dict(
        kind="image_text",
        format="tfrecord",
        path=GCC,
        fields=dict(image="jpg", text="caption"),
        preprocess=SWIN_CROPS,
    )
    config.data.mixture = "balanced"  # "very important", the authors say
    if labels_only:
        del config.data.sources.gcc
        config.data.mixture = "proportional"
    if variant == "labels_mixup":
        config.mix.update(mixup=0.8, cutmix=1.0)  # Swin's; the paper names no numbers
    config.data.templates = "unicl_81"
    config.data.text_length = "pack"  # the same embeddings for fewer slots

    config.optimizer.name = "adamw"  # where there is a Transformer
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_steps = (
        WARMUP_LABEL_EPOCHS * IMAGENET_RECORDS // labels_a_step
    )
    config.optimizer.clip_norm = 5.0  # the release's default; not stated in the paper

    config.evaluations.imagenet = dict(
        format="tfds",
        path=IMAGENET,
        split="validation",
        class_names="imagenet",
        templates="unicl_81",
    )
    config.evaluate_every_steps = 6250  # about ten label epochs
    config.checkpoint_every_steps = 2000
    if variant == "debug":
        _shrink(config)
    return config


def _shrink(config):
    """Every part of the run, each as small as it goes."""
    config.data.made_up_records = 256
    config.batch_size = 32
    config.total_steps = 60
    config.model.dtype = "float32"
    config.model.image.image_size = 64
    config.model.image.window_size = 4
    config.model.image.depths = (1, 1, 1, 1)
    config.model.image.embed_dim = 24
    config.model.text.num_layers = 2
    config.model.text.width = 64
    config.model.text.num_heads = 2
    config.model.text.vocab_size = 2048
    config.data.templates = "short"
    config.optimizer.warmup_steps = 10
    config.evaluate_every_steps = 30
    config.checkpoint_every_steps = 30
    config.log_every_steps = 5
