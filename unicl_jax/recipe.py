"""Recipe files and what a flag changes in them, for commands beside the trainer."""

import ast
import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from unicl_jax.errors import InputError, did_you_mean


def read_recipe(recipe: str) -> ConfigDict:
    """Runs a recipe.

    Args:
      recipe: its file; a variant may follow a colon.

    Returns:
      Its config.

    Raises:
      InputError: if there is no such file, it is no recipe or refuses the variant.
    """
    file, _, variant = recipe.partition(":")
    if not Path(file).is_file():
        raise InputError(
            f'--config must be a recipe file: there is no "{file}"; see configs/.'
        )
    get_config = runpy.run_path(file).get("get_config")
    if get_config is None:
        raise InputError(
            f'--config must be a recipe with a get_config(): "{file}" has none; see '
            "configs/."
        )
    return get_config(variant) if variant else get_config()


def set_field(config: ConfigDict, path: str, text: str) -> None:
    """Sets a field, as `--config.{path}={text}` does.

    Args:
      config: of a recipe.
      path: names with dots between them.
      text: what a flag says.

    Raises:
      InputError: if there is no such field, or it holds something else.
    """
    node = config
    for part in path.split("."):
        if not isinstance(node, ConfigDict) or part not in node:
            there = node if isinstance(node, ConfigDict) else ()
            raise InputError(
                f'there is no config field "{path}" in this recipe, for "{part}"; '
                f"{did_you_mean(part, there)}"
            )
        parent, node = node, node[part]
    try:
        parent[part] = text if isinstance(node, str) else literal(text)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path} must be {type(node).__name__}, as {node!r} is: got {text}."
        ) from error


def literal(text: str) -> Any:
    """Returns what Python reads in a text, or the text if that is nothing."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
