"""The keys of memory."""

from __future__ import annotations

from dataclasses import dataclass

from gemtune.options import option, require_range


@dataclass
class MemoryConfig:
    """What is done about memory beside the records of every step."""

    plan: bool = option(
        True, "train.py plans the peak in a process beside it, for the records and for oom.md"
    )
    snapshot_at_step: int | None = option(
        None, "the step whose allocations go to memory_step_N_rank_R.pickle (GPU only)"
    )
    leak_mib_per_step: float = option(
        1.0, "growth of what is held between steps of one shape from which on it is said"
    )

    def __post_init__(self) -> None:
        require_range("memory.snapshot_at_step", self.snapshot_at_step, at_least=1)
        require_range("memory.leak_mib_per_step", self.leak_mib_per_step, above=0)
