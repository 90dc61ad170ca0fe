"""What a user can mend: one error type for wrong input, in one form."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Wrong input from the user; `main` prints its message without a traceback.

    Every message says what must hold; what was given; what to do.
    """


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Returns the tail of an error about an unknown name: a guess and the whole menu.

    Args:
      name: what was given.
      choices: what exists.

    Returns:
      For example `did you mean "swin_tiny"? Choices: resnet50, swin, swin_tiny.`
    """
    choices = sorted(choices)
    close = difflib.get_close_matches(str(name), choices, n=1)
    guess = f'did you mean "{close[0]}"? ' if close else ""
    return f"{guess}Choices: {', '.join(choices) or 'none'}."


def choose(menu: dict, name: str, what: str):
    """Looks `name` up in an explicit menu.

    Args:
      menu: the choices by name.
      name: the one wanted.
      what: what is chosen, as the message should call it.

    Returns:
      `menu[name]`.

    Raises:
      InputError: if there is no such name; the message lists the menu.
    """
    if name not in menu:
        raise InputError(f'{what}: got "{name}"; {did_you_mean(name, menu)}')
    return menu[name]


def nearest_multiples(number: int, unit: int) -> str:
    """Multiples of `unit` around a number: "nearest are 960 and 1024"; 0 is none."""
    below = number // unit * unit
    if not below:
        return f"nearest is {unit}"
    return f"nearest are {below} and {below + unit}"
