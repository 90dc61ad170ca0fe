"""Reads PyTorch's files without PyTorch, and without running what is in them.

A `.pth` is a zip of one pickle and the tensors' bytes. The pickle may name any function
to call; here it gets three harmless ones, and an empty object for all others.
"""

import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import NamedTuple

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


# Where training checkpoints have a model's arrays, beside their optimizer's. Averages
# of the weights come last: they are taken where a file has nothing else.
CHECKPOINTS = (
    *("model", "state_dict", "model_state_dict"),
    *("model_ema", "state_dict_ema", "ema_state_dict"),
)


class _Inert:
    """Stands for any class a file names: takes anything, does nothing."""

    def __new__(cls, *args, **kwargs):
        del args, kwargs
        made = super().__new__(cls)
        made.state = {}  # here: unpickling need not call __init__
        return made

    def __init__(self, *args, **kwargs):
        del args, kwargs

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.state.update(state)

    def __setitem__(self, key, value):  # what subclasses of dict are filled by
        self.state[key] = value

    def append(self, item):  # and of list
        del item

    def extend(self, items):
        del items


class _Dict(dict):
    """An OrderedDict of the file, whose attributes the file cannot set."""

    def __init__(self, items=()):
        super().__init__(items)

    def __setstate__(self, state):
        del state


class _Storage(NamedTuple):
    """The elements of a storage, in a row: what tensors are views of."""

    data: np.ndarray


def _rebuild_tensor(storage, offset, size, stride):
    """A tensor's elements: PyTorch's strides count elements, NumPy's bytes."""
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor's elements are no storage's")
    data, numbers = storage.data, (offset, *size, *stride)
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"a tensor has offset {offset}, size {size}, stride {stride}")
    count = math.prod(size)
    if not count:
        return np.zeros(size, data.dtype)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if last >= len(data) or count > max(len(data), 1):
        raise ValueError(f"a tensor of {tuple(size)} lies outside of its storage")
    strides = [s * data.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(data[offset:], size, strides).copy()


class _Unpickler(pickle._Unpickler):  # in Python: its memo has no size to be told
    def __init__(self, archive, folder):
        super().__init__(io.BytesIO(_read(archive, f"{folder}data.pkl")))
        self._archive, self._folder, self._storages = archive, folder, {}
        # Made anew for each file, which may set attributes on what it gets.
        self._harmless = {
            ("collections", "OrderedDict"): _Dict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *x: _rebuild_tensor(*x[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }

    def find_class(self, module, name):
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return self._harmless.get((module, name), _Inert)

    def persistent_load(self, saved):
        kind, dtype, key, _, count = saved
        if kind != "storage" or dtype not in _DTYPES.values():
            raise ValueError(f"an unknown kind of storage: {kind} of {dtype}")
        if key not in self._storages:
            data = _read(self._archive, f"{self._folder}data/{key}")
            self._storages[key] = _Storage(np.frombuffer(data, dtype, count=count))
        return self._storages[key]


def _read(archive, name):
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED:  # a little file could hold very much
        raise ValueError(f"{name} is compressed, as torch.save never does")
    return archive.read(entry)


def read_torch(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a PyTorch file, by their names.

    Args:
      path: a file that `torch.save` or `torch.jit.save` wrote (1.6 or newer). A
        training checkpoint's arrays under one of CHECKPOINTS are taken.

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
        for _ in range(2):  # one may be in another
            inside = found if isinstance(found, dict) else {}
            whose = (inside[k] for k in CHECKPOINTS if isinstance(inside.get(k), dict))
            found = next((x for x in whose if dict(_walk(x, "", set()))), found)
        arrays = dict(_walk(found, "", set()))
    except Exception as error:  # whatever a damaged pickle can raise
        raise InputError(
            f'weights must be readable: "{path}" is no whole file of torch.save '
            f"1.6 or newer ({type(error).__name__}: {str(error)[:100]}); get it again, "
            "or save it anew with a newer PyTorch."
        ) from error
    if not arrays:
        raise InputError(
            f'weights must hold arrays: "{path}" holds none, by name or under '
            f"{', '.join(CHECKPOINTS)}; name the file of the weights."
        )
    return arrays


def _walk(node, name, seen):
    """Arrays below a node, with dotted names: dicts, and modules of TorchScript."""
    if isinstance(node, np.ndarray):
        yield name, node
        return
    if isinstance(node, _Inert):
        node = node.state
    if isinstance(node, dict) and id(node) not in seen:  # a pickle may hold a ring
        seen.add(id(node))
        for key, value in node.items():
            yield from _walk(value, f"{name}.{key}" if name else str(key), seen)
