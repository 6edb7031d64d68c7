"""Random draws as functions of their place: what is drawn depends on where it is used, never on what was drawn before.

    number(seed, purpose, place…) = blake2b-8 of "seed/purpose/place…" (big-endian) mod 2⁶³

The number seeds a generator of its own on the CPU (normal noise, orders), or is the draw itself (`unit`). A resumed run therefore
needs the step and nothing else: no state to restore, no samples to skip. Everything of a sample is drawn from its position in the
global batch, hence any split of that batch among processes and micro-steps sees the same draws, and so do a CPU and a GPU.

    purpose                    place                         drawn with
    order                      epoch[, bucket]               order
    noise, noise-offset, posterior   step, position          normal
    timestep                   step, position                unit
    crop, flip, caption        epoch, sample, repeat         unit
    model                      step, micro-step, rank        model_seed (dropout inside the model)

Invariants: the global generators of torch, numpy and Python are neither read nor moved; `PYTHONHASHSEED` has no influence; a place
that holds a slash is not the same as two places. torch's CPU generator uses the low 32 bits of its seed: two of 100,000 draws share
them about once, and then draw the same noise at two far places of a run, which is accepted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from loratools.errors import InputError, LoraToolsError, UsageError, worst

if TYPE_CHECKING:
    import torch

VERSION = 1  # of everything drawn here; a checkpoint records it, for another version would continue another run


class Drawn(NamedTuple):
    """One sample of a global batch: in which epoch, its id, its place in the batch, and which of its repeats in that epoch it is."""

    epoch: int
    sample: str
    position: int
    repeat: int


def number(seed: int, purpose: str, *place: int | str) -> int:
    """63 bits from the seed, the purpose and the place: the same everywhere and always."""
    parts = (str(part).replace("%", "%25").replace("/", "%2F") for part in (seed, purpose, *place))
    digest = blake2b("/".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") & (2**63 - 1)


def unit(seed: int, purpose: str, *place: int | str) -> float:
    """A float64 uniform over (0, 1), from the number's upper 52 bits; no torch.

    Each value is the middle of one of 2⁵² equal cells: never 0 and never 1, so that its logit and its normal quantile are finite.
    """
    return ((number(seed, purpose, *place) >> 11) + 0.5) * 2.0**-52


def generator(seed: int, purpose: str, *place: int | str) -> torch.Generator:
    """A new generator on the CPU, at its beginning."""
    import torch

    return torch.Generator().manual_seed(number(seed, purpose, *place))


def normal(shape: Sequence[int], seed: int, step: int, position: int, purpose: str = "noise") -> torch.Tensor:
    """Standard normal numbers of one sample, float32 on the CPU. shape: of the sample, without the batch; position: in the global batch.

    The same bits for one torch version and type of processor, whatever the number of threads.
    """
    import torch

    return torch.randn(tuple(shape), generator=generator(seed, purpose, step, position), dtype=torch.float32)


def order(count: int, seed: int, epoch: int, *bucket: str) -> list[int]:
    """The numbers 0 … count - 1 as an epoch goes through them, those of a bucket by its name."""
    import torch

    permutation: list[int] = torch.randperm(count, generator=generator(seed, "order", epoch, *bucket)).tolist()
    return permutation


def model_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """What `torch.manual_seed` gets before each micro-step, for dropout inside the model: it is drawn on the device it runs on."""
    return number(seed, "model", step, micro, rank)


def batches(
    buckets: Mapping[str, Sequence[str]], size: int, seed: int, *, drop_last: bool = False, repeats: Mapping[str, int] | None = None
) -> Callable[[int], list[Drawn]]:
    """The function step → global batch of that update; steps and epochs count from 0.

    buckets: name → sample ids, samples of one shape each; their order in the mapping and in a bucket makes no difference. size: of a
    global batch (processes × accumulation × micro-batch), which is of one bucket. repeats: sample id → how often an epoch has it, 1
    where it is missing.
    An epoch puts each bucket into an order of its own, cuts it into batches (the last may be short; with drop_last it is left out,
    other samples each epoch), and goes through the batches of all buckets in an order of theirs.
    Raises InputError and UsageError, see `per_epoch`.
    """
    items, starts = _plan(buckets, size, drop_last, repeats or {})

    @lru_cache(maxsize=2)  # steps come in order: an epoch is shuffled once, and its last step may be asked for beside the next one's first
    def shuffled(epoch: int) -> tuple[dict[str, list[int]], list[int]]:
        within = {bucket: order(len(chosen), seed, epoch, bucket) for bucket, chosen in items.items()}
        return within, order(len(starts), seed, epoch)

    def batch(step: int) -> list[Drawn]:
        if step < 0:
            raise UsageError(f"step {step}: steps count from 0")
        epoch, index = divmod(step, len(starts))
        within, among = shuffled(epoch)
        bucket, start = starts[among[index]]
        chosen = (items[bucket][item] for item in within[bucket][start : start + size])
        return [Drawn(epoch, sample, position, repeat) for position, (sample, repeat) in enumerate(chosen)]

    return batch


def per_epoch(buckets: Mapping[str, Sequence[str]], size: int, *, drop_last: bool = False, repeats: Mapping[str, int] | None = None) -> int:
    """Updates in an epoch of `batches`; no torch.

    Raises with all findings: InputError for no sample, an id twice, repeats of an id that is not there, and a bucket that drop_last
    would never let be seen; UsageError for a size or repeats below 1.
    """
    return len(_plan(buckets, size, drop_last, repeats or {})[1])


Items = dict[str, list[tuple[str, int]]]  # bucket → (sample, repeat)


def _plan(
    buckets: Mapping[str, Sequence[str]], size: int, drop_last: bool, repeats: Mapping[str, int]
) -> tuple[Items, list[tuple[str, int]]]:
    """What is in each bucket, and (bucket, first item) of each batch of an epoch, both before they are shuffled.

    Sorted, for an order of files on a disk is nobody's choice.
    """
    items = {
        bucket: [(sample, repeat) for sample in sorted(buckets[bucket]) for repeat in range(repeats.get(sample, 1))]
        for bucket in sorted(buckets)
    }
    problems = [*_bad_samples(buckets, repeats), *_bad_numbers(size, repeats)]
    if problems := problems or (_never_seen(items, size) if drop_last else []):
        raise worst(problems)
    until = size - 1 if drop_last else 0
    return items, [(bucket, start) for bucket in items for start in range(0, len(items[bucket]) - until, size)]


def _bad_samples(buckets: Mapping[str, Sequence[str]], repeats: Mapping[str, int]) -> list[LoraToolsError]:
    counts = Counter(sample for samples in buckets.values() for sample in samples)
    wrong = [f"{sample}: {count} times, an id names one sample" for sample, count in sorted(counts.items()) if count > 1]
    wrong += [f"{sample}: has repeats, but is in no bucket" for sample in sorted(repeats) if sample not in counts]
    if not counts:
        wrong.append("no bucket holds a sample")
    return [InputError("these samples cannot be put into batches", details=wrong)] if wrong else []


def _bad_numbers(size: int, repeats: Mapping[str, int]) -> list[LoraToolsError]:
    given = {"batch size": size} | {f"repeats of {sample}": repeats[sample] for sample in sorted(repeats)}
    wrong = [f"{what}: {count}, expected 1 or more" for what, count in given.items() if count < 1]
    return [UsageError("no batch can be made with these numbers", details=wrong)] if wrong else []


def _never_seen(items: Items, size: int) -> list[LoraToolsError]:
    """Buckets smaller than a batch, which drop_last leaves out in every epoch."""
    small = [
        f"bucket {bucket}: {len(found)} with repeats, a batch takes {size}" for bucket, found in items.items() if 0 < len(found) < size
    ]
    fix = "set drop_last to false, take a smaller batch, or raise the repeats"
    return [InputError("drop_last would never show the samples of some buckets", details=small, fix=fix)] if small else []
