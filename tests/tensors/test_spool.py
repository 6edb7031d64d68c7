"""Tensors parked on the disk: the same bits come back, nothing is ever to be seen, and a full disk is a WriteError."""

from __future__ import annotations

import errno
import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.errors import WriteError
from loratools.tensors.lazy import CHUNK
from loratools.tensors.spool import Spool
from loratools.tensors.writer import write_safetensors

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 1, 1), (0, 4)])
def test_what_comes_back(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.add(noise(7))  # so that it does not begin at 0
    tensor = noise(*shape, seed=1, dtype=dtype)
    parked = spool.add(tensor)
    assert (parked.shape, parked.nbytes) == (shape, tensor.numel() * tensor.element_size())
    found = parked.load()
    assert (found.dtype, tuple(found.shape), bits(found)) == (dtype, shape, bits(tensor))
    assert b"".join(parked.chunks()) == bits(tensor)


def test_a_view_is_parked_as_it_reads(tmp_path: Path) -> None:
    """Transposed, strided, expanded, and larger than a chunk; and it is a copy."""
    spool, tensor = Spool(tmp_path), noise(6, 8, seed=2)
    views = [tensor.t(), tensor[::2, 1::3], tensor[:1].expand(4, 8), noise(CHUNK // 4 + 1000).reshape(-1, 2).t()]
    parked = [spool.add(view) for view in views]
    wanted = [bits(view.clone(memory_format=torch.contiguous_format)) for view in views]
    tensor.zero_()
    assert [bits(one.load()) for one in parked] == wanted
    assert torch.equal(parked[0].load_rows(2, 4), noise(6, 8, seed=2).t()[2:4])


def test_nothing_is_to_be_seen(tmp_path: Path) -> None:
    """The file has no name while it is used, and its room is given back with the last tensor."""
    before = set(os.listdir("/proc/self/fd"))
    spool = Spool(tmp_path)
    parked = spool.add(noise(1000))
    assert list(tmp_path.iterdir()) == []
    del spool
    assert float(parked.load()[0]) == float(noise(1000)[0])  # a tensor outlives the spool
    del parked
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= before  # what earlier tests left may be gone by now
    assert list(tmp_path.iterdir()) == []


def test_many_threads(tmp_path: Path) -> None:
    spool, barrier = Spool(tmp_path), threading.Barrier(8)

    def work(number: int) -> list[tuple[bytes, Any]]:
        barrier.wait()
        tensors = [noise(3 + number, 50 + step, seed=100 * number + step) for step in range(20)]
        return [(bits(tensor), spool.add(tensor)) for tensor in tensors]

    with ThreadPoolExecutor(8) as pool:
        found = [pair for pairs in pool.map(work, range(8)) for pair in pairs]
    assert all(bits(parked.load()) == wanted for wanted, parked in found)


def test_what_is_parked_can_be_written(tmp_path: Path) -> None:
    """The writer copies from a file without a name as from any other."""
    from safetensors.torch import load_file

    spool = Spool(tmp_path)
    tensors = {name: noise(40, 50 + number, seed=number) for number, name in enumerate("abc")}
    write_safetensors(tmp_path / "out.safetensors", {name: spool.add(tensor) for name, tensor in tensors.items()}, {})
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_short_writes(tmp_path: Path, monkeypatch: Any) -> None:
    """A write of a part goes on where it stopped."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, bytes(data[:7]), offset))
    spool, tensor = Spool(tmp_path), noise(11, 13)
    spool.add(noise(3))
    assert bits(spool.add(tensor).load()) == bits(tensor)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails(code: int, tmp_path: Path, monkeypatch: Any) -> None:
    spool = Spool(tmp_path)

    def failing(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(WriteError) as caught:
        spool.add(noise(3))
    assert caught.value.exit_code == 1
    assert "full" in caught.value.message or code != errno.ENOSPC
    assert str(tmp_path) in caught.value.message


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="none"):
        Spool(tmp_path / "none")
