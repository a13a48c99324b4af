"""Files that appear whole or not at all, and tensors over mapped bytes: what both checkpoint formats
share."""

import contextlib
import ctypes
import errno
import os
import re
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


class NotWritten(OSError):
    """A file or directory could not be written; `reason` says why."""

    def __init__(self, path, reason, unchanged=True):
        self.reason = reason
        kept = "; what was there before is unchanged" if unchanged else ""
        super().__init__(f"cannot write {path}: {reason}{kept}")


@contextlib.contextmanager
def replacing(path, mark=None):
    """`with replacing(path) as aside`: make the file or directory `aside`; it takes the place of `path`
    after.

    What was at `path` stays as it was until all of `aside` is on the disk; after an error, `aside` is
    removed. A link is followed: what it leads to is replaced.
    mark: a file in every directory that we write; one that has none is somebody else's, and refused.
    """
    path = Path(path).resolve() if Path(path).is_symlink() else Path(path)
    check_replaceable(path, mark)
    aside = _beside(path, "new")
    remove(aside)
    try:
        yield aside
        for file in sorted(aside.rglob("*")) if aside.is_dir() else [aside]:
            _sync(file)
        if path.is_dir():  # a directory that is not empty cannot be replaced by a rename
            _exchange(aside, path)
        else:
            os.replace(aside, path)
        _sync(path.parent)
    except NotWritten as error:  # inside of it
        raise NotWritten(path, error.reason) from None
    except OSError as error:
        raise NotWritten(path, error.strerror or error, unchanged=path.exists()) from None
    finally:
        remove(aside)


def check_replaceable(path, mark=None):
    """Raise `NotWritten` if something is at `path` that `replacing` would refuse to replace."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise NotWritten(path, "it is neither a file nor a directory")
    if path.is_dir() and any(path.iterdir()) and not (mark and (path / mark).is_file()):
        raise NotWritten(path, "the directory there is not one of minifp4's; move it or change --out")


def _beside(path, role):
    """A name beside `path` that only this process uses, for what is "new", "old" or "gone"."""
    return path.with_name(f".{path.name}.{os.getpid()}.minifp4-{role}")


OURS = re.compile(r"\.(?P<name>.+)\.\d+\.minifp4-(?P<role>new|old|gone)")  # such names, of any process


def _exchange(aside, path):
    """Let two directories change places: in one step where the system can, else in two renames that are
    taken back if the second fails (and by `tidy`, if nobody is left to)."""
    if _renameat2(aside, path):
        return
    old = _beside(path, "old")
    os.rename(path, old)
    try:
        os.rename(aside, path)
    except BaseException:
        os.rename(old, path)
        raise
    os.rename(old, aside)


def _renameat2(a, b):
    """Exchange two names by Linux's renameat2; False where there is none."""
    try:
        function = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # TypeError: Windows
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return function(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


# What a file system says that cannot sync, or cannot lock, as opposed to one that failed.
CANNOT = {errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES}


def _sync(path):
    """Have a file, or a directory's names, brought to the disk, where the system can do that: Windows opens
    no directories, some network file systems sync none."""
    try:
        if path.is_dir():
            descriptor = os.open(path, os.O_RDONLY)
        else:
            descriptor = os.open(path, os.O_RDWR)
    except OSError as error:
        if error.errno in CANNOT:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT:
            raise
    finally:
        os.close(descriptor)


def remove(path):
    """Delete a file, a link or a directory, if it is there. A directory loses its name first, so that a half
    of it never counts as the whole."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not OURS.fullmatch(path.name):
        gone = _beside(path, "gone")
        os.rename(path, gone)
        path = gone
    shutil.rmtree(path)


def tidy(directory):
    """Clean up after processes that were killed in `directory`: what they replaced comes back if nothing has
    taken its place, and what they left is removed. Nothing else is touched."""
    for left in directory.iterdir():
        found = OURS.fullmatch(left.name)
        if not found:
            continue
        if found["role"] == "old" and not (directory / found["name"]).exists():
            os.rename(left, directory / found["name"])
        else:
            remove(left)


@contextlib.contextmanager
def only_user(directory):
    """Make `directory` and hold a lock on it; ValueError if another process does. Ends with the process,
    however."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(f"{directory} is no directory; choose another --out") from None
    with open(directory / ".lock", "a+b") as file:
        try:
            _lock(file)
        except OSError as error:
            if error.errno not in CANNOT - {errno.EACCES} | {errno.ENOLCK}:
                raise ValueError(f"another run is writing to {directory}; choose another --out") from None
            print(f"note    {directory} cannot be locked here: let no other run write to it")
        tidy(directory)
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
