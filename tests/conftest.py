"""What holds for every test: eight virtual CPU devices and one compile cache."""

import contextlib
import os
import signal
from pathlib import Path

# In the environment, so that the processes that tests start find the same cache.
for name, value in {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # Of LLVM's, not of XLA's own: the same program, a third sooner. 0: as users run it.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}.items():
    os.environ.setdefault(name, value)

# A shell's background job is deaf to Ctrl-C, and so would be what tests start and stop.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# PyTorch's triton and TensorFlow hold an LLVM each, and both load in this order alone.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.sharding import AxisType  # noqa: E402

# By config, not by XLA_FLAGS, which would clobber the user's.
jax.config.update("jax_num_cpu_devices", 8)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """The arrays of a golden file, by its path in `golden/`; see its README."""

    def load(path):
        with np.load(GOLDEN / path) as arrays:
            return {key: arrays[key] for key in arrays.files}

    return load


@pytest.fixture
def x64():
    """Float64 arithmetic, where a law is to be seen without float32's round-off."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def make_mesh():
    """One mesh axis "data" over the first n devices, Auto unless asked otherwise."""

    def make(n, axis_type=AxisType.Auto):
        return jax.make_mesh(
            (n,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:n]
        )

    return make
