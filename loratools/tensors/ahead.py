"""Tensors computed ahead of the writer: many threads make blocks, one writes them strictly in order.

    blocks of the declared tensors, in order  →  a pool of threads  →  a bounded window  →  TensorSink

A worker takes the next block only while the window is open: at most 32 blocks taken and not written, and less than 64 MiB
of finished ones. The oldest block is always taken first, so the window cannot block itself. Runs of tensors that lie behind
one another in one file and stay untouched are one piece of work; where no hash needs their bytes the kernel copies them, first
of all, while the workers import torch and begin to compute. Invariants: the bytes do not depend on `threads`; a block's
exception is the caller's; no thread outlives the call. torch runs with one thread in each worker; it is imported only if
something has to be computed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from loratools.errors import LoraToolsError
from loratools.tensors.header import printable
from loratools.tensors.lazy import BytesTensor, LazyTensor, ReshapedTensor, StoredTensor
from loratools.tensors.writer import TensorSink

WINDOW = 64 << 20  # bytes of finished blocks above which no further block is begun
BLOCKS = 32  # blocks taken and not yet written
_RUN = 64 << 20  # bytes after which a run of untouched tensors is cut: progress is told between two pieces of work

Block = Callable[[], bytes | memoryview]


def write_all(sink: TensorSink, tensors: Mapping[str, LazyTensor], threads: int, progress: Callable[[int], None] | None = None) -> None:
    """Write every declared tensor of `sink`, in the order of the declarations.

    threads: how many blocks are computed at a time (at least one). progress: called with the bytes of tensors written so far.
    Raises what a block raises, WriteError, and LoraToolsError when `tensors` are not the declared ones.
    """
    jobs = sorted(_jobs(sink, tensors), key=lambda job: job.ahead)  # stable: the order of the declarations within both parts
    work = ((number, block) for number, job in enumerate(jobs) if job.ahead for block in job.tensor.blocks())
    done = 0
    workers = max(1, threads) if any(job.ahead for job in jobs) else 0
    needs_torch = any(job.ahead and not _plain(job.tensor) for job in jobs)
    with _one_torch_thread(needs_torch) as prepare, _Pool(work, workers, prepare) as pool:
        for number, job in enumerate(jobs):
            sink.write_run(job.names, pool.results(number) if job.ahead else job.tensor)
            done += job.tensor.nbytes
            if progress is not None:
                progress(done)


@dataclass
class _Job:
    """What is written at once: one tensor, or a run of untouched ones as one tensor of bytes. `ahead`: by the pool."""

    names: list[str]
    tensor: LazyTensor
    ahead: bool


def _jobs(sink: TensorSink, tensors: Mapping[str, LazyTensor]) -> list[_Job]:
    """The declared tensors as pieces of work, in order."""
    wrong = [printable(name) for name in sink.declared.keys() ^ tensors.keys()]
    if wrong:
        raise LoraToolsError(f"{sink.path}: {len(wrong)} tensors are declared and missing, or not declared", details=sorted(wrong))
    sink.open()
    through_memory = sink.digest or bool(sink.stamps)
    jobs: list[_Job] = []
    for name in sink.declared:
        tensor = _stored(tensors[name])
        sink.fits(name, tensors[name])
        last = jobs[-1] if jobs else None
        if last and sink.payload_of[name] is sink.payload_of[last.names[-1]] and (longer := _joined(last.tensor, tensor)):
            last.names.append(name)
            last.tensor = longer
        else:
            jobs.append(_Job([name], tensor, through_memory or not isinstance(tensor, StoredTensor)))
    return jobs


def _stored(tensor: LazyTensor) -> LazyTensor:
    """The tensor in its file that holds these bytes under another shape, or the tensor itself."""
    base = tensor
    while isinstance(base, ReshapedTensor):
        base = base.base
    return base if isinstance(base, StoredTensor) else tensor


def _joined(first: LazyTensor, second: LazyTensor) -> StoredTensor | None:
    """Two tensors as one of bytes, where the second lies right behind the first in the same file."""
    if not (isinstance(first, StoredTensor) and isinstance(second, StoredTensor)) or first.nbytes >= _RUN:
        return None
    if first.file is not second.file or first.offset + first.nbytes != second.offset:
        return None
    return StoredTensor(first.file, first.offset, "U8", (first.nbytes + second.nbytes,))


def _plain(tensor: LazyTensor) -> bool:
    """True when a tensor's bytes are only read, so that nothing of it needs torch."""
    while isinstance(tensor, ReshapedTensor):
        tensor = tensor.base
    return isinstance(tensor, StoredTensor | BytesTensor)


@contextmanager
def _one_torch_thread(needed: bool) -> Iterator[Callable[[], object]]:
    """What every worker calls first: blocks run side by side, each of them with one thread of torch's own."""
    if not needed:
        yield lambda: None
        return
    lock, before = threading.Lock(), list[int]()

    def prepare() -> None:
        import torch  # here: the first worker imports it while the caller copies

        with lock:
            before.append(torch.get_num_threads())
            torch.set_num_threads(1)

    try:
        yield prepare
    finally:
        if before:
            import torch

            torch.set_num_threads(before[0])  # a worker's setting is also that of threads which start later


@dataclass
class _Slot:
    """A block that a worker has taken: empty until it is done."""

    job: int
    value: bytes | memoryview = b""
    error: BaseException | None = None
    done: bool = False


class _Pool:
    """Threads that take blocks from `work` in order; `results` gives them back in the same order."""

    def __init__(self, work: Iterable[tuple[int, Block]], threads: int, prepare: Callable[[], object]) -> None:
        self.work, self.prepare, self.window = iter(work), prepare, BLOCKS
        self.changed = threading.Condition()
        self.slots: deque[_Slot] = deque()
        self.ready = 0  # bytes of finished blocks in `slots`
        self.exhausted = threads == 0
        self.stopped = False
        self.failure: BaseException | None = None  # of the iterator that gives the blocks
        self.threads = [threading.Thread(target=self._run, name=f"block-{number}", daemon=True) for number in range(threads)]

    def __enter__(self) -> _Pool:
        try:
            for thread in self.threads:
                thread.start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        """No further block is begun; those that run end first."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()
        for thread in self.threads:
            if thread.ident is not None:
                thread.join()

    def results(self, job: int) -> Iterator[bytes | memoryview]:
        """The finished blocks of one job, each as soon as it is there. Raises what the block raised."""
        while (slot := self._next(job)) is not None:
            if slot.error is not None:
                raise slot.error
            yield slot.value

    def _next(self, job: int) -> _Slot | None:
        """The oldest block once it is done; None when it belongs to a later job, or there is none."""
        with self.changed:
            self.changed.wait_for(lambda: self.slots[0].done or self.slots[0].job != job if self.slots else self.exhausted)
            if not self.slots and self.failure is not None:
                raise self.failure
            if not self.slots or self.slots[0].job != job:
                return None
            slot = self.slots.popleft()
            self.ready -= len(slot.value)
            self.changed.notify_all()
            return slot

    def _run(self) -> None:
        try:
            self.prepare()
            while (taken := self._take()) is not None:
                self._do(*taken)
                taken = None  # a finished block is the window's alone
        except BaseException as error:
            with self.changed:
                self.failure, self.exhausted = error, True
                self.changed.notify_all()

    def _take(self) -> tuple[_Slot, Block] | None:
        """The next block, once the window is open; None when there is none or the pool is stopped."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or self.exhausted or (len(self.slots) < self.window and self.ready < WINDOW))
            taken = None if self.stopped or self.exhausted else next(self.work, None)
            if taken is None:
                self.exhausted = True
                self.changed.notify_all()
                return None
            self.slots.append(_Slot(taken[0]))
            return self.slots[-1], taken[1]

    def _do(self, slot: _Slot, block: Block) -> None:
        """Compute a block; what it raises is raised again where its bytes are asked for."""
        try:
            value, error = _flat(block()), None
        except BaseException as raised:
            value, error = b"", raised
        with self.changed:
            slot.value, slot.error, slot.done = value, error, True
            self.ready += len(value)
            self.changed.notify_all()


def _flat(data: bytes | memoryview) -> bytes | memoryview:
    """Bytes whose len() is their number."""
    if isinstance(data, bytes):
        return data
    return data.cast("B") if data.nbytes else b""
