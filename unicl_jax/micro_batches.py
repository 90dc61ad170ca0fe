"""Parts in which a step's towers embed the batch: what they must fit, and refuse."""

from collections.abc import Mapping

from unicl_jax import encoders
from unicl_jax.errors import InputError, nearest_multiples


def check(config: Mapping, num_rows: int) -> None:
    """Refuses micro-batches that don't fit, or whose numbers would be others.

    Args:
      config: the whole config: `micro_batches`, `batch_size`, `model`, `frozen`.
      num_rows: devices over which the batch's rows are divided.

    Raises:
      InputError: naming the field, what it must hold, what it holds.
    """
    count, batch = config["micro_batches"], config["batch_size"]
    if type(count) is not int or count < 1:
        raise InputError(
            f"micro_batches must be a whole number of at least 1: got {count}."
        )
    if count == 1:
        return
    unit = count * num_rows
    if batch % unit:
        raise InputError(
            "batch_size must be divisible by micro_batches times the devices that its "
            f"rows are divided over: got {batch} for {count} x {num_rows}; "
            f"{nearest_multiples(batch, unit)}."
        )
    name = config["model"]["image"]["name"]
    if name in encoders.BATCH_NORM and "image" not in config["frozen"]:
        raise InputError(
            f'micro_batches must be 1 for model.image "{name}": got {count}; its batch '
            "norm takes its statistics over the rows that it sees at once, and would "
            "see fewer. Use remat=True, or a tower without batch norm."
        )
