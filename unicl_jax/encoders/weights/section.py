"""What a config's `model` section can say: checked, changed, compared, as shapes."""

from collections.abc import Mapping
from typing import Any

import jax

from unicl_jax import encoders
from unicl_jax.errors import InputError, did_you_mean

# What a `model` section says where a file says nothing.
MODEL = {"logit_scale_init": 1.0, "logit_scale_max": None, "dtype": "float32"}
# All that it can say.
SECTION = (
    *("image", "text", "embed_dim", *MODEL),
    *("normalization", "crop_pct", "tokenizer", "text_padding"),
)
# Options of towers that change how they learn or are computed, not what they are.
OF_TRAINING = ("drop_path", "init_std", "remat", "scan", "dtype", "layer_scale")


def check_changes(changes: Mapping[str, Any]) -> None:
    """Refuses what says nothing of a model, and would be passed over.

    Args:
      changes: as for `from_arrays`.

    Raises:
      InputError: for a name that no `model` section has, or a tower without options.
    """
    if not isinstance(changes, Mapping):
        raise InputError(
            f"a model's options must have names: got {type(changes).__name__}; pass "
            "them by their names."
        )
    for name, value in changes.items():
        if name not in SECTION:
            raise InputError(
                f'a model has no option "{name}"; {did_you_mean(name, SECTION)} Those '
                f'of a tower go as image={{"image_size": 384}}.'
            )
        if name in ("image", "text") and not isinstance(value, Mapping):
            raise InputError(
                f"{name} must be options of the {name} tower by name: got {value!r}; "
                'pass them as image={"image_size": 384}.'
            )


def merged(model: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A `model` section with some options changed, those of towers one by one.

    Args:
      model: the section.
      changes: to it, as {"text": {"num_heads": 4}, "embed_dim": 32}.

    Returns:
      The section, new.

    Raises:
      InputError: for a tower that the model does not have.
    """
    found = dict(model)
    for section, options in changes.items():
        if section in ("image", "text"):
            if section not in model:
                alone = "an image tower" if section == "text" else "a text tower"
                raise InputError(
                    f"options of a tower must be of one that is there: got {section}="
                    f"{dict(options)} for {alone} alone; leave them out."
                )
            options = {**model[section], **options}
        found[section] = options
    return found


def different_options(
    there: Mapping[str, Any], here: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Where two models' towers are not the same, but for how they learn.

    Args:
      there: a `model` section, of both towers or one.
      here: another one, with those towers.

    Returns:
      (name, value there, value here), as ("text.num_heads", 8, 2); defaults included.
    """
    found = []
    for tower in encoders.TOWERS:
        if tower not in there:
            continue
        theirs, ours = (encoders.options(tower, x[tower]) for x in (there, here))
        found += [
            (f"{tower}.{name}", theirs.get(name), value)
            for name, value in ours.items()
            if name not in OF_TRAINING and not _equal(theirs.get(name), value)
        ]
    return found


def _equal(a, b):
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return list(a) == list(b)
    return a == b


def shapes(model: Mapping[str, Any]) -> tuple[Any, Any]:
    """The parameters and the state that a model has, as shapes.

    Args:
      model: a config's `model` section, of both towers or one.

    Returns:
      (params, state), trees of ShapeDtypeStruct.
    """
    key = jax.random.key(0)
    towers = [name for name in encoders.TOWERS if name in model]
    if len(towers) > 1:
        return jax.eval_shape(encoders.from_config({**MODEL, **model}).init, key)
    (name,) = towers
    tower = encoders.one_tower(name, model[name])
    params, state = jax.eval_shape(tower.init, key)
    return {name: params}, {name: state}
