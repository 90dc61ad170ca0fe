"""Reads PyTorch's files without PyTorch, and without running what is in them.

A `.pth` is a zip of one pickle and the tensors' bytes. The pickle may name any function
to call; here it gets a short list of harmless ones, and an empty object for all others.
"""

import collections
import io
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

from unicl_jax.errors import InputError

_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Inert:
    """Stands for any class a file names: takes anything, does nothing."""

    def __new__(cls, *args, **kwargs):
        del args, kwargs
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        del args, kwargs
        self.state = {}

    def __setstate__(self, state):
        self.state = state if isinstance(state, dict) else {}

    def __setitem__(self, key, value):  # what subclasses of dict are filled by
        self.state[key] = value

    def append(self, item):  # and of list
        del item

    def extend(self, items):
        del items


def _rebuild_tensor(storage, offset, size, stride, *_):
    """A view of a storage: PyTorch's strides count elements, NumPy's bytes."""
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if 0 in size:
        return np.zeros(size, storage.dtype)
    if offset < 0 or min(stride, default=0) < 0 or last >= len(storage):
        raise ValueError(f"a tensor of {tuple(size)} lies outside of its storage")
    strides = [s * storage.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()


def _rebuild_parameter(tensor, *_):
    return tensor


_HARMLESS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive, folder):
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self._archive, self._folder = archive, folder

    def find_class(self, module, name):
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return _HARMLESS.get((module, name), _Inert)

    def persistent_load(self, saved):
        kind, dtype, key, _, count = saved
        if kind != "storage" or not isinstance(dtype, type):
            raise ValueError(f"an unknown kind of storage: {saved}")
        data = self._archive.read(f"{self._folder}data/{key}")
        return np.frombuffer(data, dtype, count=count)


def read_torch(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a PyTorch file, by their names.

    Args:
      path: a file that `torch.save` or `torch.jit.save` wrote (1.6 or newer). A
        training checkpoint's arrays under "model" or "state_dict" are taken.

    Returns:
      The arrays, in the file's dtypes.

    Raises:
      InputError: if it is no such file, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [n for n in archive.namelist() if n.endswith("data.pkl")]
            if not entries:
                raise ValueError("it holds no data.pkl")
            folder = min(entries, key=len).removesuffix("data.pkl")
            found = _Unpickler(archive, folder).load()
    except Exception as error:  # whatever a damaged pickle can raise
        raise InputError(
            f'weights must be readable: "{path}" is no whole file of torch.save '
            f"1.6 or newer ({type(error).__name__}: {str(error)[:100]}); get it again, "
            "or save it anew with a newer PyTorch."
        ) from error
    if isinstance(found, dict):
        for key in ("model", "state_dict"):
            if isinstance(found.get(key), dict):
                found = found[key]
                break
    arrays = dict(_walk(found, ""))
    if not arrays:
        raise InputError(
            f'weights must hold arrays: "{path}" holds none, by name or under "model" '
            'or "state_dict".'
        )
    return arrays


def _walk(node, name):
    """Arrays below a node, with dotted names: dicts, and modules of TorchScript."""
    if isinstance(node, np.ndarray):
        yield name, node
    if isinstance(node, _Inert):
        node = node.state
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _walk(value, f"{name}.{key}" if name else str(key))
