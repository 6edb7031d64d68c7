"""What a runtime accepts of an adapter: the largest rank it takes, and whether every module has to have the same rank and scale.

All of them apply plain LoRA only. `uniform` ones read `r` and `lora_alpha` of adapter_config.json and neither rank_pattern nor
alpha_pattern: a module of another rank or scale is applied at a wrong strength, without a word.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from loratools.errors import UsageError


@dataclass(frozen=True)
class Loader:
    """A runtime. uniform: one rank and one alpha for all modules; limit: the largest rank (None: any).

    option: of the server, for the largest rank; settings: the values it may have, () for any
    """

    name: str
    title: str
    uniform: bool
    limit: int | None = None
    option: str = ""
    settings: tuple[int, ...] = ()

    def cap(self, rank: int | None) -> int | None:
        """The largest rank of an adapter, where the server is set to `rank` (None: not said). Raises UsageError."""
        if rank is not None and self.settings and rank not in self.settings:
            raise UsageError(f"--max-rank {rank}: {self.name} can be set to {', '.join(map(str, self.settings))}")
        known = [value for value in (rank, self.limit) if value is not None]
        return min(known, default=None)

    def setting(self, rank: int) -> int:
        """The smallest setting of the server that takes this rank."""
        return min((value for value in self.settings if value >= rank), default=rank)


LOADERS: dict[str, Loader] = {
    loader.name: loader
    for loader in (
        # vllm.config.lora.MaxLoRARanks, vllm.lora.peft_helper; 16 unless set
        Loader("vllm", "vLLM", True, 512, "--max-lora-rank", (1, 8, 16, 32, 64, 128, 256, 320, 512)),
        # sglang.srt.lora.lora_config.LoRAConfig: r, lora_alpha
        Loader("sglang", "SGLang", True, option="--max-lora-rank"),
        # before 0.2: the ranks its kernels were compiled for; beyond, images are black
        Loader("nunchaku", "nunchaku", False, 64),
    )
}


def loader_named(name: str) -> Loader:
    """A loader of the table. Raises UsageError with the nearest name."""
    if name in LOADERS:
        return LOADERS[name]
    near = difflib.get_close_matches(name, LOADERS, 1)
    told = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"unknown loader {name!r}{told}", fix=f"one of {', '.join(LOADERS)}")
