"""Settings of the engine that samples, apart from the sampling itself; readable without the engine installed.

Invariant: nothing here changes what is sampled but for rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

SYNCS = ("auto", "direct", "file")
ENGINE_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineConfig:
    """Settings of vLLM.

    Attributes:
        dtype: Of the engine's weights: `auto` is bfloat16 on a GPU and float32 on a CPU.
        block_size: Tokens of a block of keys and values. Only whole blocks are shared between turns and branches, so a small
            one computes less anew; `None` is the smallest that vLLM takes, 16 on a GPU and 32 on a CPU.
        memory: On a GPU the share of its memory that the engine may take; the rest is the learner's.
        cpu_cache_gib: On a CPU the GiB for keys and values.
        eager: Do without compilation and CUDA graphs: starts much faster, decodes slower. `None` is eager on a CPU only.
        sync: How new weights reach the engine: `direct` within the process, `file` by a safetensors file; `auto` takes `direct`
            where it can.
        tensor_parallel: GPUs that the engine's weights are spread over.
    """

    dtype: str = "auto"
    block_size: int | None = None
    memory: float = 0.45
    cpu_cache_gib: float = 1.0
    eager: bool | None = None
    sync: str = "auto"
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        for name, known in (("dtype", ENGINE_DTYPES), ("sync", SYNCS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown engine.{name} {getattr(self, name)!r}; known: {', '.join(known)}")
        for name in ("block_size", "tensor_parallel"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"engine.{name} must be at least 1, got {getattr(self, name)}")
        if self.sync == "direct" and self.tensor_parallel > 1:
            raise ValueError(
                f"engine.sync direct hands weights over within one process, but engine.tensor_parallel is "
                f"{self.tensor_parallel}: take file, or auto"
            )
        if not 0 < self.memory < 1:
            raise ValueError(f"engine.memory must be between 0 and 1, got {self.memory}")
        if not self.cpu_cache_gib > 0:
            raise ValueError(f"engine.cpu_cache_gib must be positive, got {self.cpu_cache_gib}")
