"""Writes PyTorch's files without PyTorch: what `torch.save` makes of a state dict."""

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_STORAGES = {
    np.dtype("f4"): b"FloatStorage",
    np.dtype("f8"): b"DoubleStorage",
    np.dtype("i8"): b"LongStorage",
}


def write_torch(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a dict of tensors, which `torch.load` reads with `weights_only=True`.

    Args:
      path: the file.
      arrays: by name; float32, float64 or int64.

    Source: PyTorch's "Serialization semantics": a zip, nothing in it compressed, of a
      pickle (protocol 2) and of each tensor's bytes.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def put(name, data):
            # Without the time of day: the same weights give the same file.
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)

        put("data.pkl", _pickled(arrays))
        put("byteorder", "little")
        for i, array in enumerate(arrays.values()):
            put(f"data/{i}", array.astype(array.dtype.newbyteorder("<")).tobytes())
        put("version", "3\n")


def _pickled(arrays):
    """{name: tensor}, each tensor the whole of a storage of its own."""
    parts = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, pickle.MARK]
    for i, (name, array) in enumerate(arrays.items()):
        storage = _tuple(
            _text("storage"),
            _named(b"torch", _STORAGES[array.dtype]),
            *(_text(str(i)), _text("cpu"), _number(array.size)),
        )
        strides = np.empty(array.shape, np.int8).strides  # of bytes: elements
        no_hooks = (
            *(_named(b"collections", b"OrderedDict"), pickle.EMPTY_TUPLE),
            pickle.REDUCE,
        )
        parts += [
            *(_text(name), _named(b"torch._utils", b"_rebuild_tensor_v2")),
            _tuple(
                *(storage, pickle.BINPERSID, _number(0)),
                _tuple(*map(_number, array.shape)),
                _tuple(*map(_number, strides)),
                *(pickle.NEWFALSE, *no_hooks),
            ),
            pickle.REDUCE,
        ]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _tuple(*items):
    return b"".join([pickle.MARK, *items, pickle.TUPLE])


def _named(module, name):
    return b"".join([pickle.GLOBAL, module, b"\n", name, b"\n"])


def _text(text):
    data = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _number(n):
    if n < 2**31:
        return pickle.BININT + struct.pack("<i", n)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", n)
