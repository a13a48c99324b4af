"""The two file formats against readers that nobody here wrote, golden bytes, and broken files."""

import json
import struct

import numpy as np
import pytest
import torch

from minifp4.files import dat, safetensors
from minifp4.files.atomic import replacing

DTYPES = [dtype for dtype in safetensors.NAMES if dtype not in (torch.bool,)]


def same(a, b):
    """Equal in dtype, shape and bits (NaNs included)."""
    raw = [t.contiguous().flatten().view(torch.uint8) if t.numel() else t.flatten() for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def random_tensors(seed):
    """A few tensors of random types and shapes, scalars and empty ones among them."""
    generator = torch.Generator().manual_seed(seed)

    def number(most):
        return int(torch.randint(0, most, (), generator=generator))

    tensors = {}
    for index in range(number(6)):
        shape = [number(5) for _ in range(number(4))]
        dtype = DTYPES[number(len(DTYPES))]
        size = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
        tensors[f"t{index}.重"] = raw.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
    return tensors


def test_safetensors_golden_bytes(tmp_path):
    safetensors.write(
        tmp_path / "a", {"b": torch.tensor([1, 2], dtype=torch.uint8), "a": torch.tensor([1.0])}
    )
    header = (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}}'
    )
    header += b" " * (-len(header) % 8)
    expected = struct.pack("<Q", len(header)) + header + struct.pack("<f", 1.0) + b"\x01\x02"
    assert (tmp_path / "a").read_bytes() == expected


def test_safetensors_both_ways_with_the_official_library(tmp_path, long):
    official = pytest.importorskip("safetensors.torch")
    for seed in range(300 if long else 60):
        tensors = random_tensors(seed)
        safetensors.write(tmp_path / "ours", tensors, {"note": "x"})
        theirs = official.load_file(tmp_path / "ours")
        assert theirs.keys() == tensors.keys() and all(same(theirs[name], tensors[name]) for name in tensors)
        official.save_file(tensors, tmp_path / "theirs", {"note": "重"})
        ours = safetensors.SafeFile(tmp_path / "theirs")
        assert ours.metadata == {"note": "重"} and ours.entries.keys() == tensors.keys()
        assert all(same(ours[name], tensors[name]) for name in tensors)


def entry(dtype="U8", shape=(2,), offsets=(0, 2), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def broken(header, data=b"\0\0", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


BROKEN = {
    "short": (b"abc", "too few"),
    "header past the end": (broken({}, b"", 99), "does not fit"),
    "huge header": (broken({}, b"", 2**63), "does not fit"),
    "not UTF-8": (broken(b"\xff\xff"), "not valid JSON"),
    "not JSON": (broken(b"{oops}"), "not valid JSON"),
    "deeply nested": (broken(b"[" * 100_000), "not valid JSON"),
    "a list": (broken([]), "not a JSON object"),
    "duplicate key": (broken(b'{"a":1,"a":2}'), "stands twice"),
    "no shape": (broken({"a": {"dtype": "U8", "data_offsets": [0, 2]}}), "'a': expected"),
    "unknown dtype": (broken({"a": entry("U7")}), "unknown dtype 'U7'"),
    "negative": (broken({"a": entry(offsets=(-2, 0))}), "whole numbers"),
    "fraction": (broken({"a": entry(shape=(2.0,))}), "whole numbers"),
    "true": (broken({"a": entry(shape=(True, 2))}), "whole numbers"),
    "wrong size": (broken({"a": entry(shape=(3,))}), "do not fit"),
    "overflow": (broken({"a": entry(shape=(2**62, 8))}), "do not fit"),
    "hole": (broken({"a": entry(offsets=(1, 3))}, b"\0" * 3), "hole"),
    "overlap": (broken({"a": entry(), "b": entry(offsets=(1, 3))}, b"\0" * 3), "overlaps"),
    "trailing bytes": (broken({"a": entry()}, b"\0" * 3), "end at byte"),
    "past the end": (broken({"a": entry(shape=(9,), offsets=(0, 9))}), "end at byte"),
    "metadata": (broken({"__metadata__": {"x": 1}, "a": entry()}), "strings"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_safetensors_file_is_refused(tmp_path, name):
    data, message = BROKEN[name]
    (tmp_path / "broken").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        safetensors.SafeFile(tmp_path / "broken")
    assert "broken" in str(error.value)


@pytest.mark.parametrize("header", [{"a": entry(extra={"x": 1})}, {"__metadata__": None, "a": entry()}])
def test_what_the_official_library_takes_is_taken(tmp_path, header):
    """Further keys in an entry, and metadata that is null."""
    official = pytest.importorskip("safetensors.torch")
    (tmp_path / "a").write_bytes(broken(header))
    ours = safetensors.SafeFile(tmp_path / "a")
    assert ours.metadata == {} and same(ours["a"], official.load_file(tmp_path / "a")["a"])


def test_dat_golden_bytes(tmp_path):
    """One fp16 vector and one E4M3 matrix, typed out from the format's description; 300 is 0xac 0x02."""
    tensors = {
        "n": torch.ones(300, dtype=torch.float16),
        "重": torch.tensor([[448.0]]).to(torch.float8_e4m3fn),
    }
    dat.write(tmp_path / "a.dat", tensors)
    expected = (
        b"\x02" + b"\x01n\x05\x01\xac\x02" + b"\x00\x3c" * 300 + b"\x03\xe9\x87\x8d\x65\x02\x01\x01\x7e"
    )
    assert (tmp_path / "a.dat").read_bytes() == expected
    read = dat.DatFile(tmp_path / "a.dat")
    assert all(same(read[name], tensors[name]) for name in tensors)


def test_dat_random_files(tmp_path):
    for seed in range(50):
        tensors = {name: t for name, t in random_tensors(seed).items() if t.dtype in dat.IDS}
        dat.write(tmp_path / "a.dat", tensors)
        read = dat.DatFile(tmp_path / "a.dat")
        assert list(read.entries) == list(tensors) and all(
            same(read[name], tensors[name]) for name in tensors
        )


DAT = b"\x01\x01n\x00\x01\x02ab"  # one entry: "n", uint8, [2]
BROKEN_DAT = {
    "empty": (b"", "number of entries"),
    "cut payload": (DAT[:-1], "ends before"),
    "cut number": (b"\x81", "ends before"),
    "11-byte number": (b"\x80" * 11, "more than 64 bits"),
    "65-bit number": (b"\xff" * 9 + b"\x03", "more than 64 bits"),
    "unknown type": (DAT.replace(b"n\x00", b"n\x63"), "unknown element type 99"),
    "duplicate": (b"\x02" + DAT[1:] * 2, "stands twice"),
    "trailing": (DAT + b"!", "1 bytes after"),
    "overflowing dims": (b"\x01\x01n\x00\x02" + (b"\xff" * 8 + b"\x7f") * 2, "ends before"),
    "many dims": (b"\x01\x01n\x00\x7f" + b"\x01" * 127 + b"a", "127 dimensions"),
    "key": (b"\x01\x01\xff\x00\x01\x02ab", "not UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN_DAT)
def test_a_broken_dat_file_is_refused(tmp_path, name):
    data, message = BROKEN_DAT[name]
    (tmp_path / "broken.dat").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        dat.DatFile(tmp_path / "broken.dat")
    assert "broken.dat" in str(error.value)


def test_replacing_keeps_the_old_until_the_new_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    for text in ("first", "second"):  # directories too
        with replacing(tmp_path / "dir", mark="inside") as aside:
            aside.mkdir()
            (aside / "inside").write_text(text)
    assert (tmp_path / "dir" / "inside").read_text() == "second" and len(list(tmp_path.iterdir())) == 2


def mutations(data, count, seed):
    """`count` damaged versions of a file: bytes changed, removed or put in; mostly near its beginning."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        mutant = bytearray(data)
        for _ in range(random.integers(1, 4)):
            end = len(mutant) if random.random() < 0.2 else min(len(mutant), 300)
            at, how = int(random.integers(0, max(1, end))), random.integers(0, 4)
            if how == 0 and mutant:
                mutant[at] = int(random.integers(0, 256))
            elif how == 1 and mutant:
                mutant[at] ^= 1 << int(random.integers(0, 8))
            elif how == 2:
                del mutant[at : at + int(random.integers(1, 9))]
            else:
                mutant[at:at] = bytes(random.integers(0, 256, random.integers(1, 9), dtype=np.uint8))
        yield bytes(mutant)


def read_all(kind, path):
    """The tensors of a file, or the ValueError's text."""
    try:
        file = kind(path)
        return {name: file[name].clone() for name in file.entries}
    except ValueError as error:
        assert str(path) in str(error)
        return None


def test_damaged_safetensors_files_are_read_only_if_the_official_library_reads_them(tmp_path):
    """1,000 mutants: no crash, no other exception, and nothing accepted that the reference refuses."""
    official = pytest.importorskip("safetensors.torch")
    path, kept = tmp_path / "file", 0
    tensors = {"a": torch.arange(6.0).view(2, 3), "b.重": torch.ones(4).bfloat16(), "c": torch.ones(3).byte()}
    safetensors.write(path, tensors, {"note": "x"})
    for data in mutations(path.read_bytes(), 1000, seed=0):
        path.write_bytes(data)
        ours = read_all(safetensors.SafeFile, path)
        if ours is None:
            continue
        theirs = official.load(data)
        assert ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)
        kept += 1
    assert kept > 20


def test_damaged_dat_files_never_crash_the_reader(tmp_path):
    path, kept = tmp_path / "file.dat", 0
    tensors = {f"layer.{n}.weight": torch.ones(n + 1, 3).half() for n in range(9)}
    dat.write(path, tensors)
    size = path.stat().st_size
    for data in mutations(path.read_bytes(), 1000, seed=1):
        path.write_bytes(data)
        read = read_all(dat.DatFile, path)
        if read is not None:
            kept += 1
            assert sum(t.numel() * t.element_size() for t in read.values()) <= size + 24
    assert kept > 20
