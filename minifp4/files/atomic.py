"""Files that appear whole or not at all, and tensors over mapped bytes: what both checkpoint formats
share."""

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
import torch


class TensorFile:
    """An open file of named tensors: `entries` {name: (dtype, shape)}, and `file[name]`, a tensor.

    A tensor's bytes are mapped into memory when it is asked for and unmapped when it is gone, so reading
    all tensors one after the other never takes more memory than the largest. `places` {name: (begin, end)}
    are filled by the reader of each format.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.file = open(path, "rb")  # noqa: SIM115, open as long as the tensors may be read
        self.size = os.fstat(self.file.fileno()).st_size
        self.entries, self.places = {}, {}

    def raw(self, begin, end):
        """Some bytes of the file, uint8; copy-on-write, because torch wants writable memory."""
        if begin == end:
            return np.empty(0, np.uint8)
        return np.memmap(self.file, dtype=np.uint8, mode="c", offset=begin, shape=(end - begin,))

    def __getitem__(self, name):
        dtype, shape = self.entries[name]
        data = self.raw(*self.places[name])
        if not len(data):
            return torch.empty(shape, dtype=dtype)
        if data.ctypes.data % dtype.itemsize:  # .dat aligns nothing
            data = data.copy()
        return torch.from_numpy(data).view(dtype).view(shape)


@contextlib.contextmanager
def replacing(path):
    """`with replacing(path) as aside`: make the file or directory `aside`; it takes the place of `path`
    after.

    What was at `path` stays as it was until all of `aside` is on the disk; after an error, `aside` is
    removed.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove(aside)
    try:
        yield aside
        for file in sorted(aside.rglob("*")) if aside.is_dir() else [aside]:
            _sync(file)
        if path.is_dir():  # a directory that is not empty cannot be replaced in one step
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.rename(path, old)
            os.rename(aside, path)
            remove(old)
        else:
            os.replace(aside, path)
        _sync(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write {path}: {reason}; what was there before is unchanged") from None
    finally:
        remove(aside)


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path):
    """Delete a file or directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def only_user(directory):
    """Make `directory` and hold a lock on it; ValueError if another process does. Ends with the process,
    however."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "a+b") as file:
        try:
            _lock(file)
        except OSError:
            raise ValueError(f"another run is writing to {directory}; choose another --out") from None
        for left in [*directory.glob(".*.tmp"), *directory.glob(".*.old")]:  # by a process that was killed
            remove(left)
        yield


def _lock(file):
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def bits(tensor):
    """The tensor's bytes, C order, uint8 on the CPU."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


def write_tensor(file, tensor):
    file.write(bits(tensor).numpy().data)
