"""Arrays by name, from and to files."""

import contextlib
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from unicl_jax.encoders.weights.torch_files import read_torch
from unicl_jax.encoders.weights.torch_writer import write_torch
from unicl_jax.errors import InputError, choose

ABOUT = "__about__."  # before the names of an .npz file's strings about itself


def read_arrays(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a weights file.

    Args:
      path: `.safetensors`, `.npz`, or a PyTorch file (`.pth`, `.pt`, `.bin`), which is
        read without PyTorch, and nothing in it is run.

    Returns:
      Arrays by name, floating-point ones in float32 (float64 stays); and what the file
      says of itself, strings by name.

    Raises:
      InputError: if it is missing, damaged, or no format of these.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f'weights must be a file: there is no "{path}"; name another.')
    read = choose(READERS, path.suffix.lower(), f'weights "{path}": kind of file')
    try:
        arrays, about = read(path)
    except InputError as error:
        if (what := _other_kind(path)) is None:
            raise
        raise InputError(f'weights must be readable: "{path}" {what}.') from error
    if not arrays:
        raise InputError(
            f'weights must hold arrays: "{path}" holds none; name another file.'
        )
    return {name: _widened(path, name, x) for name, x in arrays.items()}, about


def write_arrays(
    path: str | Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, str]
) -> None:
    """Writes a weights file; a kill leaves the old one or the new one.

    Args:
      path: `.safetensors`, `.npz` or PyTorch's `.pth`, which is written without
        PyTorch.
      arrays: by name.
      about: strings by name; a `.pth` file has no place for them.

    Raises:
      InputError: if it cannot be written, or is no format of these.
    """
    path = Path(path)
    write = choose(WRITERS, path.suffix.lower(), f'weights "{path}": kind of file')
    partial = path.with_name(f".{path.stem}.part{path.suffix}")
    # Not `ascontiguousarray`, which gives a scalar an axis.
    arrays = {name: np.array(array, order="C") for name, array in arrays.items()}
    try:
        write(partial, arrays, about)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise InputError(
            f'weights must go to a directory that can be written: "{path}" gave '
            f"{error.strerror or error}; name another."
        ) from error


def _other_kind(path):
    """What a file is that could not be read, by how it begins, and what to do."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        return f"gave {error.strerror}; make it readable"
    suffix = path.suffix.lower()
    if not start:
        return "is empty; get it again"
    if start.startswith(b"version https://git-lfs"):
        return 'is a pointer of Git LFS, not the file; run "git lfs pull" where it is'
    if start.lstrip()[:9].lower() in (b"<!doctype", b"<html>"):
        return "is a web page; get the file that it links"
    if start[8:10] == b'{"' and suffix != ".safetensors":
        return "is of the .safetensors kind; rename it"
    if start.startswith(b"PK") and suffix == ".safetensors":
        return "is a zip file, as .pth and .npz are; rename it"
    if start.startswith(b"\x93NUMPY"):
        return "is one array, as .npy files are; put it in an .npz file, by its name"
    return None


def _widened(path, name, array):
    if array.dtype.kind in "iub" or array.dtype == np.float64:
        return array
    if array.dtype.kind != "f" and array.dtype != ml_dtypes.bfloat16:
        raise InputError(
            f'weights must be numbers: "{path}" holds {name}, {array.dtype}; name a '
            "weights file."
        )
    return array.astype(np.float32)


# The types of .safetensors files that are read.
_KINDS = {
    "BF16": ml_dtypes.bfloat16,
    "BOOL": np.bool_,
    **{f"F{8 * n}": np.dtype(f"f{n}") for n in (2, 4, 8)},
    **{f"I{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
}


def _read_safetensors(path):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            about = dict(file.metadata() or {})
            names = list(file.keys())
            kinds = {name: file.get_slice(name).get_dtype() for name in names}
            for name, kind in kinds.items():
                choose(_KINDS, kind, f'weights "{path}": type of {name}')
            if "BF16" in kinds.values():
                return _bits_as_float32(path), about
            return {name: file.get_tensor(name) for name in names}, about
    except (SafetensorError, OSError) as error:
        raise InputError(
            f'weights must be readable: "{path}" is no whole .safetensors file '
            f"({error}); get it again."
        ) from error


def _bits_as_float32(path):
    """Every array of a file with bfloat16 ones, for which NumPy has no type."""
    from safetensors import deserialize

    arrays = {}
    for name, each in deserialize(path.read_bytes()):
        data = np.frombuffer(each["data"], _KINDS[each["dtype"]])
        arrays[name] = data.reshape(each["shape"])
    return arrays


def _write_safetensors(path, arrays, about):
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(arrays, path, metadata=dict(about))
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _read_npz(path):
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it is one array, without a name")
        with file:
            arrays = {name: file[name] for name in file.files}
        about = [name for name in arrays if name.startswith(ABOUT)]
        about = {name.removeprefix(ABOUT): str(arrays.pop(name)) for name in about}
        return arrays, about
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(
            f'weights must be readable: "{path}" is no whole .npz file of arrays '
            f"({error}); get it again."
        ) from error


def _write_npz(path, arrays, about):
    with open(path, "wb") as file:  # by its name, it would get a suffix more
        np.savez(file, **arrays, **{ABOUT + key: x for key, x in about.items()})


def _read_torch(path):
    return read_torch(path), {}


READERS = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".bin": _read_torch,
}
WRITERS = {
    ".safetensors": _write_safetensors,
    ".npz": _write_npz,
    ".pth": lambda path, arrays, about: write_torch(path, arrays),
}
