"""Looking at runs: tables and pictures."""

from unicl_jax.analysis.end_of_run import end_of_run

__all__ = ["end_of_run"]
