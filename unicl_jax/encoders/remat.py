"""What a tower's blocks keep for the backward pass, and what they compute again."""

from collections.abc import Callable

import jax
from flax import linen as nn

from unicl_jax.errors import InputError

Remat = bool | str

# By the value of a tower's option `remat`, what a recomputed block keeps.
POLICIES = {
    True: None,  # nothing but its input
    # What its linear maps gave; norms, activations and attention's products of queries
    # and keys, which have batch dimensions, are computed again.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def check_remat(remat: Remat, what: str) -> None:
    """Refuses what is no way to recompute blocks.

    Args:
      remat: the option.
      what: it is an option of, for errors.

    Raises:
      InputError: listing the ways.
    """
    if type(remat) is not bool and not (isinstance(remat, str) and remat in POLICIES):
        raise InputError(
            f'{what}.remat must be True, False or "dots": got {remat!r}; False keeps '
            "all, True recomputes most."
        )


def recomputed(
    block: type[nn.Module], remat: Remat, static_argnums: tuple[int, ...] = ()
) -> type[nn.Module]:
    """A block that keeps less.

    Args:
      block: a linen module's class.
      remat: False, True or a key of POLICIES.
      static_argnums: of its `__call__`, self being 0, those that are no arrays.

    Returns:
      The class, or one of the same parameters and numbers.
    """
    if not remat:
        return block
    return nn.remat(block, static_argnums=static_argnums, policy=POLICIES[remat])


def recomputed_body(body: Callable, remat: Remat) -> Callable:
    """The same of a loop's body.

    Args:
      body: a function.
      remat: False, True or a key of POLICIES.

    Returns:
      The function, or one of the same result.
    """
    if not remat:
        return body
    return jax.checkpoint(body, prevent_cse=False, policy=POLICIES[remat])
