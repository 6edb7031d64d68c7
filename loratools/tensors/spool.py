"""Tensors parked on the disk until the file they belong to can be laid out: its header needs the shape of the last one.

The temporary file has no name, so nothing is left of it whatever happens, and lies in the output's folder, where there has to be
room for the result anyhow. What comes back are tensors of that file, which the writer copies in the kernel.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.tensors.atomic import write_errors
from loratools.tensors.dtypes import dtype_name
from loratools.tensors.lazy import ByteFile, StoredTensor, tensor_bytes

if TYPE_CHECKING:
    import torch


class Spool:
    """Any number of threads may add tensors. folder: an existing one, of the output."""

    def __init__(self, folder: Path) -> None:
        self._lock, self._end, self._folder = threading.Lock(), 0, folder
        with write_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
            self._file = ByteFile(folder, os.dup(file.fileno()))

    def add(self, tensor: torch.Tensor) -> StoredTensor:
        """Park a tensor; it is on the disk when this returns. Raises WriteError."""
        nbytes = tensor.numel() * tensor.element_size()
        with self._lock:
            start, self._end = self._end, self._end + nbytes
        position = start
        with write_errors(self._folder):
            for piece in tensor_bytes(tensor.cpu().contiguous()):
                view = memoryview(piece)
                while view:
                    count = os.pwrite(self._file.descriptor, view, position)
                    view, position = view[count:], position + count
        return StoredTensor(self._file, start, dtype_name(tensor.dtype), tuple(tensor.shape))
