"""The trainer: `python -m unicl_jax.main --config=configs/x.py --workdir=runs/x`.

Running the same command again goes on where it was. A variant of a recipe follows a
colon (`configs/swin_tiny.py:debug`); `--config.batch_size=512` overrides a field.
"""

import ast
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from unicl_jax import host_memory, processes, stages, train
from unicl_jax.checkpoint import NotSaved
from unicl_jax.config import flatten
from unicl_jax.errors import InputError
from unicl_jax.exit_codes import (
    BAD_INPUT,
    FAILED,
    LOST,
    NON_FINITE,
    NOT_SAVED,
    STOPPED_BY_SIGNAL,
)

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Of the run: made, or gone on with.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, where no cluster tells it."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With the above.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With the above.")
_START_TIMEOUT = flags.DEFINE_float(
    "start_timeout", 300.0, "Seconds until a process that has not come is named."
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_float(
    "heartbeat_timeout", 100.0, "Seconds until a host that says nothing is given up."
)
_why = ""  # the last error, for the other processes


def main(argv: Sequence[str]) -> int:
    """Runs the trainer.

    Args:
      argv: as `sys.argv`.

    Returns:
      The exit code: 0; 2 for wrong input, 3 for non-finite losses, 4 for a checkpoint
      that could not be written, 6 for a process that is missing, 128 + the signal's
      number when stopped by one; see `exit_codes`. The watchdog's thread ends a process
      that hangs, with 5.
    """
    try:
        parse(argv)
        place = processes.find_place(
            _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
        )
        processes.start(
            place,
            flatten(_CONFIG.value),
            _START_TIMEOUT.value,
            _HEARTBEAT_TIMEOUT.value,
        )
        stages.run(_CONFIG.value, _WORKDIR.value)
    except InputError as error:
        return _say(f"error: {error}", BAD_INPUT)
    except train.NonFiniteLoss as error:
        return _say(f"error: {error}", NON_FINITE)
    except NotSaved as error:
        return _say(f"error: {error}", NOT_SAVED)
    except processes.Missing as error:
        return _say(f"error: {error}", LOST)
    except KeyboardInterrupt:  # before the loop, which saves first if it is alone
        said = "stopped before the first step."
        if jax.distributed.is_initialized():
            said = "Ctrl-C: stopped without saving; SIGTERM saves on all processes."
        return _say(said, STOPPED_BY_SIGNAL + 2)
    except train.Stopped as stopped:
        code = STOPPED_BY_SIGNAL + stopped.signal
        return _say(f"{stopped} The same command goes on from there.", code)
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        return _say(f"error: {type(error).__name__}: {error}", FAILED)
    return 0


def leave(code: int) -> None:
    """Ends this process, at once if it has failed among several.

    Python's own end waits for the other processes, which wait for this one: minutes,
    in which nobody learns why. They are told, and end too.

    Args:
      code: of the exit.
    """
    code = processes.leave(code, _why)
    together = code in (0, STOPPED_BY_SIGNAL + signal.SIGTERM)
    if not together and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _say(message, code):
    global _why
    _why = message.removeprefix("error: ")
    print(message, file=sys.stderr)
    return code


def parse(
    argv: Sequence[str],
    needed: Sequence[str] = ("config", "workdir"),
    module: str = "unicl_jax.main",
) -> tuple[ConfigDict, str | None]:
    """Parses the flags; a wrong one is the user's to mend, not a traceback.

    Args:
      argv: as `sys.argv`.
      needed: the flags that must be given.
      module: of the command, for errors.

    Returns:
      The config, and the workdir.

    Raises:
      InputError: if a flag or the recipe is wrong.
    """
    app.define_help_flags()
    argv, options = _without_tower_options(argv)
    # Both --config=x and --config x.
    given = re.search(r"(?:^|\0)--?config[=\0]([^\0]*)", "\0".join(argv))
    recipe = given and given[1]
    file = (recipe or "").split(":")[0]
    if recipe is not None and not Path(file).is_file():
        raise InputError(
            f'--config must be a recipe file: there is no "{file}"; see configs/.'
        )
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError) as error:
        refusal = re.search(r"InputError: (.*)", str(error))  # the recipe's own
        if refusal:
            raise InputError(refusal[1]) from error
        typo = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(error))
        if typo:
            raise InputError(
                f'there is no config field "{typo[2]}"; did you mean "{typo[1]}"?'
            ) from error
        message = str(error.args[0] if error.args else error)
        # ml_collections puts a KeyError into an AttributeError where no name is near.
        is_key = isinstance(error, KeyError) or message.startswith("\"'")
        message = message.strip("'\"")
        absent = re.search(r"--config\.([\w.]+)", " ".join(argv))
        if is_key:
            raise InputError(f'there is no config field "{message}".') from error
        if re.fullmatch(r"\w+", message) and absent:
            raise InputError(
                f'"{message}" is not set in this recipe, so a flag cannot override it; '
                "set it in the recipe."
            ) from error
        raise InputError(f"wrong flag: {message}") from error
    if rest[1:]:
        raise InputError(f"flags must start with --: got {' '.join(rest[1:])}.")
    for name in needed:
        if flags.FLAGS[name].value is None:
            raise InputError(
                f"--{name} must be given, as in: python -m {module} "
                "--config=configs/quickstart.py --workdir=runs/quickstart"
            )
    _set_tower_options(_CONFIG.value, options)
    return _CONFIG.value, _WORKDIR.value


def _without_tower_options(argv):
    """Takes `--config.model.image.x=y` out, for options that no recipe has to name.

    ml_collections overrides only fields that are there. It looks at `sys.argv` itself.
    """
    found, rest = [], []
    for argument in argv:
        match = re.fullmatch(
            r"--?config\.model\.(image|text)\.(\w+)=(.*)", argument, re.DOTALL
        )
        found.append(match.groups()) if match else rest.append(argument)
    sys.argv = [*rest]
    return rest, found


def _set_tower_options(config, options):
    for tower, name, text in options:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            # A name; or as absl's own flags take them.
            value = {"true": True, "false": False}.get(text.lower(), text)
        try:
            with config.unlocked():
                config.model[tower][name] = value
        except (TypeError, ValueError) as error:
            there = config.model[tower][name]
            raise InputError(
                f"model.{tower}.{name} must be {type(there).__name__}, as {there!r} "
                f"is: got {text}."
            ) from error


if __name__ == "__main__":
    host_memory.restart_with_huge_pages("unicl_jax.main")
    leave(main(sys.argv))
