"""Labels that a data set does not have as such, worked out of what it has."""

from collections.abc import Callable

RULES: dict[str, Callable] = {}
