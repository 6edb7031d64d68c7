"""Tensors that are described now and read later.

Everything above this package works on `LazyTensor`: dtype and shape are known from the header, the bytes are read
when they are needed and forgotten afterwards. A tensor that an operation does not touch is copied as bytes, without
torch; a computed one says its dtype and shape first and is made when the writer asks for it.
Importing this module does not import torch.
"""

from __future__ import annotations

import math
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.errors import MalformedError
from loratools.tensors.dtypes import DTYPES, dtype_name, torch_dtype

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 23  # bytes read at a time when a tensor is copied

_STRUCT = {
    "U8": "B",
    "I8": "b",
    "I16": "h",
    "U16": "H",
    "I32": "i",
    "U32": "I",
    "I64": "q",
    "U64": "Q",
    "F16": "e",
    "F32": "f",
    "F64": "d",
    "BOOL": "?",
}


class LazyTensor(ABC):
    """A tensor of known dtype (safetensors name) and shape whose bytes come on demand, little-endian, row-major."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype][0] // 8

    @abstractmethod
    def load(self) -> torch.Tensor:
        """A fresh tensor that shares no memory with any file."""

    def load_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of the first axis, a fresh tensor; only their bytes are read where the tensor lies in a file."""
        return self.load()[start:stop].clone()

    @abstractmethod
    def chunks(self) -> Iterator[bytes]:
        """The bytes as a safetensors file holds them, in pieces of CHUNK and a last one that may be shorter."""

    def blocks(self) -> Iterator[Callable[[], bytes | memoryview]]:
        """The same bytes in order as pieces of work, each of which may run in another thread. Stepping costs next to nothing."""
        yield lambda: b"".join(self.chunks())

    def scalar(self) -> float:
        """The value of a one-element tensor, without torch (alpha and flags)."""
        if self.numel != 1:
            raise MalformedError(f"expected one value, found shape {list(self.shape)}")
        data = b"".join(self.chunks())
        if self.dtype == "BF16":
            return float(struct.unpack("<f", b"\0\0" + data)[0])
        if self.dtype not in _STRUCT:
            raise MalformedError(f"expected a number, found dtype {self.dtype}")
        return float(struct.unpack("<" + _STRUCT[self.dtype], data)[0])

    def reshape(self, shape: tuple[int, ...]) -> LazyTensor:
        """The same bytes under another shape."""
        return self if shape == self.shape else ReshapedTensor(self, shape)


class ByteFile:
    """A file opened once for positional reads; closed with its last user."""

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        """descriptor: of a file that is open already, and is this object's from now on."""
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)) if descriptor is None else descriptor

    def read(self, offset: int, size: int) -> bytes:
        pieces: list[bytes] = []
        while size > 0:
            piece = os.pread(self.descriptor, size, offset)
            if not piece:
                raise MalformedError(f"{self.path}: the file became shorter while it was read")
            pieces.append(piece)
            offset += len(piece)
            size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset` on."""
        while target:
            count = os.preadv(self.descriptor, [target], offset)
            if not count:
                raise MalformedError(f"{self.path}: the file became shorter while it was read")
            offset += count
            target = target[count:]

    def __del__(self) -> None:
        descriptor = getattr(self, "descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


class StoredTensor(LazyTensor):
    """A tensor that lies contiguously in a file, `offset` bytes from its start."""

    def __init__(self, file: ByteFile, offset: int, dtype: str, shape: tuple[int, ...]) -> None:
        self.file, self.offset, self.dtype, self.shape = file, offset, dtype, shape

    def load(self) -> torch.Tensor:
        return self._read(self.offset, self.shape)

    def load_rows(self, start: int, stop: int) -> torch.Tensor:
        height = self.nbytes // self.shape[0] if self.shape[0] else 0
        return self._read(self.offset + start * height, (max(stop - start, 0), *self.shape[1:]))

    def _read(self, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        tensor = torch.empty(shape, dtype=torch_dtype(self.dtype))
        if tensor.numel():
            self.file.read_into(offset, tensor.reshape(-1).view(torch.uint8).numpy().data)
        return tensor

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, self.nbytes, CHUNK):
            yield self.file.read(self.offset + start, min(CHUNK, self.nbytes - start))

    def blocks(self) -> Iterator[Callable[[], bytes | memoryview]]:
        for start in range(0, self.nbytes, CHUNK):
            yield partial(self.file.read, self.offset + start, min(CHUNK, self.nbytes - start))


class BytesTensor(LazyTensor):
    """A small tensor held as bytes, for what is made without torch (a new alpha)."""

    def __init__(self, data: bytes, dtype: str, shape: tuple[int, ...]) -> None:
        self.data, self.dtype, self.shape = data, dtype, shape

    def load(self) -> torch.Tensor:
        return tensor_from_bytes(self.data, self.dtype, self.shape)

    def chunks(self) -> Iterator[bytes]:
        yield from (self.data[start : start + CHUNK] for start in range(0, len(self.data), CHUNK))


class ReshapedTensor(LazyTensor):
    """Another tensor's bytes under a new shape of the same size."""

    def __init__(self, base: LazyTensor, shape: tuple[int, ...]) -> None:
        if math.prod(shape) != base.numel:
            raise ValueError(f"cannot view {base.shape} as {shape}")
        self.base, self.dtype, self.shape = base, base.dtype, shape

    def load(self) -> torch.Tensor:
        return self.base.load().reshape(self.shape)

    def load_rows(self, start: int, stop: int) -> torch.Tensor:
        if self.base.shape[:1] == self.shape[:1]:
            return self.base.load_rows(start, stop).reshape(max(stop - start, 0), *self.shape[1:])
        return super().load_rows(start, stop)

    def chunks(self) -> Iterator[bytes]:
        return self.base.chunks()

    def blocks(self) -> Iterator[Callable[[], bytes | memoryview]]:
        return self.base.blocks()


class ComputedTensor(LazyTensor):
    """A tensor that is made when it is asked for. `compute` must return exactly the declared dtype and shape."""

    def __init__(self, dtype: str, shape: tuple[int, ...], compute: Callable[[], torch.Tensor]) -> None:
        self.dtype, self.shape, self.compute = dtype, shape, compute

    def load(self) -> torch.Tensor:
        tensor = self.compute()
        if tuple(tensor.shape) != self.shape or dtype_name(tensor.dtype) != self.dtype:
            raise AssertionError(f"declared {self.dtype}{self.shape}, computed {dtype_name(tensor.dtype)}{tuple(tensor.shape)}")
        return tensor

    def chunks(self) -> Iterator[bytes]:
        yield from tensor_bytes(self.load())


def scalar_tensor(value: float, dtype: str = "F32", shape: tuple[int, ...] = ()) -> LazyTensor:
    """A new one-element tensor, made without torch. A BF16 value must be one: its low bits are cut."""
    if dtype == "BF16":
        return BytesTensor(struct.pack("<f", value)[2:], dtype, shape)
    return BytesTensor(struct.pack("<" + _STRUCT[dtype], value if dtype.startswith("F") else int(value)), dtype, shape)


def tensor_from_bytes(data: bytes, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Little-endian bytes as a torch tensor that owns its memory."""
    import torch

    if not data:
        return torch.empty(shape, dtype=torch_dtype(dtype))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(torch_dtype(dtype)).reshape(shape)


def tensor_bytes(tensor: torch.Tensor) -> Iterator[bytes]:
    """A torch tensor's bytes, little-endian and row-major, in pieces of at most CHUNK."""
    import torch

    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), CHUNK):
        yield flat[start : start + CHUNK].numpy().tobytes()


def from_torch(tensor: torch.Tensor) -> LazyTensor:
    """A tensor already in memory as a LazyTensor (not copied: the caller must not change it)."""
    return ComputedTensor(dtype_name(tensor.dtype), tuple(tensor.shape), lambda: tensor)


def same_bytes(first: LazyTensor, second: LazyTensor) -> bool:
    """True when both hold the same dtype, shape and bits. No torch."""
    if first is second:
        return True
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(mine == theirs for mine, theirs in zip(first.chunks(), second.chunks(), strict=True))
