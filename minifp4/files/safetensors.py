"""safetensors, by hand: a file of named tensors that is safe to read.

    8 bytes    N, little-endian
    N bytes    JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...,
                      "__metadata__": {"format": "pt"}}     padded with spaces to a multiple of 8
    the rest   the tensors' bytes, C order, little-endian, without gaps

Nothing in it can run code, and nothing in it is believed: whatever does not fit together is a ValueError
that names the file and the tensor, before a byte of data is read. Reading maps the file into memory, so
that a tensor costs no memory until somebody touches it. Writing goes to a temporary file that replaces the
old one when it is complete.

The official Rust library reads what is written here, and the other way round (`tests/test_formats.py`).
"""

import json
import math
from pathlib import Path

import torch

from ..progress import watched
from .atomic import TensorFile, replacing, write_tensor

HEADER_MAX = 100_000_000  # bytes; the official limit
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafeFile(TensorFile):
    """The tensors of one file; `metadata` is what its `__metadata__` says."""

    def __init__(self, path):
        super().__init__(path)
        header, start = self._header()
        self.metadata = header.pop("__metadata__", None) or {}
        if not isinstance(self.metadata, dict) or not all(
            isinstance(text, str) for text in self.metadata.values()
        ):
            raise ValueError(f"{path}: __metadata__ must map strings to strings")
        for name, entry in header.items():
            dtype, shape, begin, end = _entry(entry, f"{path}: tensor {name!r}")
            self.entries[name] = (dtype, shape)
            self.places[name] = (start + begin, start + end)
        self._check_coverage(start)

    def _header(self):
        """The header's JSON object, and where the data starts."""
        if self.size < 8:
            raise ValueError(f"{self.path}: {self.size} bytes are too few for a safetensors file")
        length = int.from_bytes(self.file.read(8), "little")
        if length > HEADER_MAX or 8 + length > self.size:
            raise ValueError(
                f"{self.path}: a header of {length} bytes does not fit; not a safetensors file, or cut short"
            )
        try:
            header = json.loads(self.file.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}: the header is not valid JSON ({error})") from None
        if not isinstance(header, dict):
            raise ValueError(f"{self.path}: the header is not a JSON object")
        return header, 8 + length

    def _check_coverage(self, at):
        for name, (begin, end) in sorted(self.places.items(), key=lambda item: item[1]):
            if begin != at:
                raise ValueError(f"{self.path}: tensor {name!r} leaves a hole or overlaps another")
            at = end
        if at != self.size:
            raise ValueError(f"{self.path}: the tensors end at byte {at}, the file at {self.size}")


def _no_duplicates(pairs):
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice")
        found[key] = value
    return found


def _entry(entry, where):
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise ValueError(f"{where}: expected dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"{where}: unknown dtype {entry['dtype']!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{where}: shape and data_offsets must be lists of whole numbers")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{where}: data_offsets {offsets} do not fit {entry['dtype']} of shape {shape}")
    return dtype, tuple(shape), *offsets


def write(path, tensors, metadata=None):
    """Write {name: tensor} to `path`; complete or not at all."""
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with replacing(path) as aside:
        lay_out(aside, entries, metadata)
        write_rows(aside, [(name, 0, tensor) for name, tensor in tensors.items()], Path(path).name)


def lay_out(path, entries, metadata=None):
    """Make a file for tensors {name: (dtype, shape)}, largest items first and then by name, whose bytes are
    still to be written."""
    header, at = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name in sorted(entries, key=lambda name: (-entries[name][0].itemsize, name)):
        dtype, shape = entries[name]
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def write_rows(path, pieces, shown):
    """Write some rows of tensors, [(name, first row, rows)], into a file that is laid out: rows of a tensor
    are one stretch of it, so several processes may write one file. shown: its name, for who waits."""
    file = SafeFile(path)
    begins = {name: begin for name, (begin, _) in file.places.items()}
    pieces = sorted(pieces, key=lambda piece: (begins[piece[0]], piece[1]))
    with open(path, "r+b") as into:
        for name, first, rows in watched(pieces, f"writing {shown}"):
            into.seek(begins[name] + first * math.prod(rows.shape[1:]) * rows.element_size())
            write_tensor(into, rows)
