"""Contrastive training of image and text encoders on image-label and image-text data.

`unicl_loss` is the loss of UniCL (Yang et al., CVPR 2022, arXiv 2204.03610). Importing
this package loads jax and nothing else; `python -m unicl_jax.main` is the trainer.
"""

from unicl_jax.losses import NO_LABEL, unicl_loss

__version__ = "0.1.0"
__all__ = ["NO_LABEL", "__version__", "load", "unicl_loss"]


def load(source, **options):
    """Loads a model to embed images and texts with; see `unicl_jax.model.load`."""
    from unicl_jax import model  # towers and checkpoints are imported when needed

    return model.load(source, **options)
