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

import torch

from .atomic import TensorFile, bits, replacing, write_tensor
from ..nvfp4 import row_slices

TYPES = {
    0: torch.uint8, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.int64, 5: torch.float16,
    6: torch.float32, 7: torch.float64, 11: torch.bool, 15: torch.bfloat16, 101: torch.float8_e4m3fn,
}  # fmt: skip
IDS = {dtype: number for number, dtype in TYPES.items()}


class DatFile(TensorFile):
    """The tensors of one file, in its order.

    Raises ValueError naming the file, and the entry where there is one, for anything that does not fit.
    """

    def __init__(self, path):
        super().__init__(path)
        for number in range(self._uleb("the number of entries")):
            self._read_entry(f"entry {number}")
        if self.file.tell() != self.size:
            raise ValueError(f"{path}: {self.size - self.file.tell()} bytes after the last entry")

    def _read_entry(self, where):
        try:
            name = self._take(self._uleb(where), where).decode("utf-8")
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
        begin, size = self.file.tell(), math.prod(shape) * TYPES[kind].itemsize
        self._check(size, where)
        self.file.seek(size, 1)
        self.entries[name] = (TYPES[kind], shape)
        self.places[name] = (begin, begin + size)

    def _check(self, size, where):
        if size > self.size - self.file.tell():
            raise ValueError(f"{self.path}: {where}: the file ends before its {size} bytes do")

    def _take(self, size, where):
        self._check(size, where)
        return self.file.read(size)

    def _uleb(self, where):
        value = 0
        for place in range(10):
            byte = self._take(1, where)[0]
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80 and value < 2**64:
                return value
        raise ValueError(f"{self.path}: {where}: a number of more than 64 bits")


def rewrite(source, path, replacements):
    """Copy the opened `source` to `path` (which may be its own), with the payloads of `replacements` {name:
    tensor}.

    A replacement must have the entry's type and shape; all other bytes stay as they are. The copy is read
    again and compared before it takes its place.
    """
    with replacing(path) as aside:
        with open(aside, "wb") as file:
            at = 0
            for name, (begin, end) in source.places.items():
                if name not in replacements:
                    continue
                _copy(source, at, begin, file)
                tensor, at = replacements[name], end
                if (tensor.dtype, tuple(tensor.shape)) != source.entries[name]:
                    raise ValueError(f"{source.path}: {name!r} is {source.entries[name]}, not {tensor.shape}")
                write_tensor(file, tensor)
            _copy(source, at, source.size, file)
        _compare(source, DatFile(aside), replacements)


def _copy(source, begin, end, file):
    for piece in row_slices(end - begin, 2**24):
        file.write(source.raw(begin + piece.start, begin + piece.stop).data)


def _compare(source, copy, replacements):
    for name in source.entries:
        expected = replacements[name] if name in replacements else source[name]
        if not torch.equal(bits(copy[name]), bits(expected)):
            raise ValueError(f"{copy.path}: {name!r} was not written as it should be")


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
