"""`.dat`: the state dict of TorchSharp, in which the F# trainer keeps its Qwen3.

    uleb(number of entries), then for each entry
        uleb(length) key in UTF-8 | uleb(element type) | uleb(number of dims) uleb(dim)... | payload

without alignment and without a trailer. uleb is unsigned LEB128: seven bits a byte, the low ones first, the
high bit set in all bytes but the last: 300 = 0xac 0x02. A payload is the tensor's bytes, C order,
little-endian.

NVFP4 there has no global scale: each projection and the head are two neighbours, `X.weight.qdata` (uint8
[out, in/2]) and `X.weight.scale` (E4M3 [out, in/16]; fp16 in old files). Embedding and norms are fp16.
Small weights therefore live in E4M3's subnormals (below 2**-6), which are numbers like any other.
"""

import math
from pathlib import Path

import torch

from .files import map_bytes, replacing, tensor_over, write_tensor

TYPES = {
    0: torch.uint8, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.int64, 5: torch.float16,
    6: torch.float32, 7: torch.float64, 11: torch.bool, 15: torch.bfloat16, 101: torch.float8_e4m3fn,
}  # fmt: skip
IDS = {dtype: number for number, dtype in TYPES.items()}


class DatFile:
    """The tensors of one file: `file.entries` {name: (dtype, shape)} in file order, `file[name]` a tensor.

    Raises ValueError naming the file, and the entry where there is one, for anything that does not fit.
    """

    def __init__(self, path):
        self.path = Path(path)
        self._bytes = map_bytes(path)
        self._at = 0
        self.entries, self._places = {}, {}
        for number in range(self._uleb("the number of entries")):
            self._read_entry(f"entry {number}")
        if self._at != len(self._bytes):
            raise ValueError(f"{self.path}: {len(self._bytes) - self._at} bytes after the last entry")

    def _read_entry(self, where):
        try:
            name = self._take(self._uleb(where), where).tobytes().decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: {where}: the key is not UTF-8") from None
        if name in self.entries:
            raise ValueError(f"{self.path}: the key {name!r} stands twice")
        where = f"{where} ({name!r})"
        kind = self._uleb(where)
        if kind not in TYPES:
            raise ValueError(f"{self.path}: {where}: unknown element type {kind}")
        dims = self._uleb(where)
        if dims > 16:
            raise ValueError(f"{self.path}: {where}: {dims} dimensions")
        shape = tuple(self._uleb(where) for _ in range(dims))
        begin = self._at
        self._take(math.prod(shape) * TYPES[kind].itemsize, where)
        self.entries[name] = (TYPES[kind], shape)
        self._places[name] = (begin, self._at)

    def _take(self, size, where):
        begin, self._at = self._at, self._at + size
        if self._at > len(self._bytes):
            raise ValueError(f"{self.path}: {where}: the file ends before its {size} bytes do")
        return self._bytes[begin : self._at]

    def _uleb(self, where):
        value = 0
        for place in range(10):
            byte = int(self._take(1, where)[0])
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80 and value < 2**64:
                return value
        raise ValueError(f"{self.path}: {where}: a number of more than 64 bits")

    def __getitem__(self, name):
        begin, end = self._places[name]
        return tensor_over(self._bytes[begin:end], *self.entries[name])


def write(path, tensors):
    """Write {name: tensor} to `path` in the given order; complete or not at all."""
    with replacing(path) as aside, open(aside, "wb") as file:
        file.write(uleb(len(tensors)))
        for name, tensor in tensors.items():
            key = name.encode()
            numbers = (IDS[tensor.dtype], tensor.dim(), *tensor.shape)
            file.write(uleb(len(key)) + key + b"".join(uleb(number) for number in numbers))
            write_tensor(file, tensor)


def uleb(number):
    """Unsigned LEB128 of a number."""
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])
