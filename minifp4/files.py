"""Files that appear whole or not at all, and tensors over mapped bytes: what both checkpoint formats
share."""

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
import torch


@contextlib.contextmanager
def replacing(path):
    """`with replacing(path) as aside`: make the file or directory `aside`; it takes the place of `path`
    afterwards.

    What was at `path` stays as it was until all of `aside` is on the disk; after an error, `aside` is
    removed.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(aside)
    try:
        yield aside
        for file in sorted(aside.rglob("*")) if aside.is_dir() else [aside]:
            _sync(file)
        if path.is_dir():  # a directory that is not empty cannot be replaced in one step
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.rename(path, old)
            os.rename(aside, path)
            _remove(old)
        else:
            os.replace(aside, path)
        _sync(path.parent)
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror or error}; what was there before is unchanged"
        ) from None
    finally:
        _remove(aside)


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def map_bytes(path):
    """The bytes of a file, uint8 [size], read when they are touched; copy-on-write, as torch wants writable
    memory."""
    return np.memmap(path, dtype=np.uint8, mode="c") if os.path.getsize(path) else np.empty(0, np.uint8)


def tensor_over(data, dtype, shape):
    """A tensor over mapped bytes; copied only where the file does not align it."""
    if not len(data):
        return torch.empty(shape, dtype=dtype)
    if data.ctypes.data % dtype.itemsize:
        data = data.copy()
    return torch.from_numpy(data).view(dtype).view(shape)


def write_tensor(file, tensor):
    """Write the tensor's bytes, C order."""
    flat = tensor.detach().cpu().contiguous().flatten()
    if flat.numel():
        file.write(flat.view(torch.uint8).numpy().data)
