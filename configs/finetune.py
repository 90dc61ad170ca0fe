"""Fine-tuning: the whole image tower of a trained model learns one set of classes.

python -m unicl_jax.main --config=configs/finetune.py --workdir=runs/finetune \
  --config.init_from=runs/quickstart

The classifier has a vector for each class and starts as the zero-shot one, from the
classes' prompts; `:random_head` starts it at random. Layers learn the more slowly the
deeper they lie. A fifth of every class is left out of training: settings are chosen by
`eval/validation_top1`; `eval/test_top1` is measured once, at the end.

On the quick start's Fashion-MNIST and towers. `:own_data` has the towers of
configs/own_data.py, for class folders:

python -m unicl_jax.main --config=configs/finetune.py:own_data \
  --workdir=runs/finetune --config.init_from=runs/own \
  --config.data.sources.train.path=pictures --config.evaluations.test.path=held_out

`:paper` has ImageNet and the towers of configs/swin_tiny.py, with Swin's settings for
fine-tuning. For weights of another kind set config.model as theirs.
"""

import runpy
from pathlib import Path

from unicl_jax import config as config_lib

VARIANTS = ("random_head", "own_data", "paper")
SETTINGS = dict(own_data="own_data", paper="swin_tiny")


def get_config(variant: str = ""):
    config_lib.check_variant(variant, VARIANTS)
    base = SETTINGS.get(variant, "quickstart")
    recipe = runpy.run_path(str(Path(__file__).with_name(f"{base}.py")))
    config = recipe["get_config"]("labels")
    config.objective = "cosine_cross_entropy"
    config.classes_from_prompts = variant != "random_head"
    config.data.mixture = "proportional"
    config.data.share_prompts = False  # no prompt is looked at
    config.optimizer.name = "adamw"  # Muon's steps are as long whatever was learnt
    config.optimizer.b2 = 0.999
    config.optimizer.clip_norm = 1.0
    test = config.evaluations.get("imagenet")
    config.evaluations = {}
    if variant == "paper":
        _imagenet(config, test)
        return config
    (_fashion_mnist if base == "quickstart" else _folders)(config)
    config.batch_size = 128
    config.total_steps = 500
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.05
    config.optimizer.image_layer_decay = 0.85
    config.evaluate_every_steps = config.checkpoint_every_steps = 250
    return config


def _fashion_mnist(config):
    fields = dict(format="quickstart", path="fashion_mnist")
    config.data.sources = dict(train=dict(kind="image_label", part="train", **fields))
    config.augment.shift = 2
    config.augment.flip = True  # left and right mean nothing in clothes
    for name, more in (("validation", dict(part="validation")), ("test", AT_END)):
        config.evaluations[name] = dict(templates="short", **fields, **more)


AT_END = dict(at_end=True)


def _folders(config):
    train = config.data.sources.labels.to_dict()
    config.data.sources = dict(train={**train, "part": "train"})
    train = config.data.sources.train
    path, names = (train.get_oneway_ref(k) for k in ("path", "class_names"))
    common = dict(format="folder", templates="short", class_names=names)
    config.evaluations.validation = dict(path=path, part="validation", **common)
    config.evaluations.test = dict(path="", at_end=True, **common)


def _imagenet(config, test):
    """30 epochs, as Swin's release fine-tunes from ImageNet-22k; 1 % for validation."""
    train = config.data.sources.imagenet
    train.split = "train[:99%]"
    config.evaluations.validation = {**test, "split": "train[99%:]"}
    config.evaluations.test = {**test, "at_end": True}
    for task in config.evaluations.values():
        task.path = train.get_oneway_ref("path")
    config.batch_size = 1024
    config.total_steps = 30 * 1_281_167 // 1024
    config.optimizer.learning_rate = 1e-4
    config.optimizer.final_learning_rate = 1e-6
    config.optimizer.warmup_steps = 5 * 1_281_167 // 1024
    config.optimizer.weight_decay = 1e-8
    config.optimizer.clip_norm = 5.0
    config.optimizer.image_layer_decay = 0.9
