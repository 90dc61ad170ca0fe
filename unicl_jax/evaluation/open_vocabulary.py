"""Which of any names a picture shows: the names are a text file, not a training set."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from unicl_jax.data.labels import load_class_names
from unicl_jax.data.prompts import fill, load_templates
from unicl_jax.errors import InputError
from unicl_jax.model import Model

TOP = 5


def name_pictures(
    model: Model,
    names: str | Sequence[str],
    pictures: Sequence[str | Path],
    templates: str | Sequence[str] = "unicl_81",
) -> dict[str, list[tuple[str, float]]]:
    """Names pictures.

    p_k = softmax_k(s <u, c_k>), c_k = unit(mean_t unit(f_text(prompt_t(name_k))))

    Args:
      model: of images and texts.
      names: any, or a text file with one a line.
      pictures: paths.
      templates: of prompts; see `data.prompts`.

    Returns:
      By picture the five likeliest names with their probabilities among all of them,
      the likeliest first.

    Raises:
      InputError: if a file cannot be read, a tower is missing, or there are no
        pictures.
    """
    if not pictures:
        raise InputError("--names needs pictures: got none; name some image files.")
    names = load_class_names("--names", names)
    templates = load_templates(templates)
    texts = [fill(t, name) for name in names for t in templates]
    found = np.asarray(model.encode_text(texts))
    classes = found.reshape(len(names), len(templates), -1).mean(1)
    classes /= np.maximum(np.linalg.norm(classes, axis=-1, keepdims=True), 1e-12)
    named = {}
    for picture in pictures:
        image = np.asarray(model.encode_image(model.preprocess([picture])))
        shares = jax.nn.softmax(model.logit_scale * image[0] @ classes.T)
        order = np.argsort(-np.asarray(shares), kind="stable")[:TOP]
        named[str(picture)] = [(names[i], float(shares[i])) for i in order]
    return named
