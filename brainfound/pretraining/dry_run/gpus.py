"""Kinds of GPU, and machines built from them, for estimates on paper.

Rates are peaks of dense matrix products with float32 accumulation. Memory is the part that a program can use.

Sources: NVIDIA data sheets of V100 (2020), A10 (2021), A100 (2021), H100 (2023), H200 (2024) and HGX B200
(2024), of RTX A6000 and A40 (2021), L40 (2022), L40S, L4 and RTX 6000 Ada (2023); NVIDIA white papers of the GA102
(2021, table 9: RTX 3090) and AD102 (2023, appendix A: RTX 4090) GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from brainfound.errors import UsageError, did_you_mean
from brainfound.training.engine import EngineRecipe


@dataclass(frozen=True)
class GPUSpec:
    """One kind of GPU; `bf16_tflops` is None if it has no bfloat16, `float32_tflops` is without TF32."""

    name: str
    memory_gib: float
    bf16_tflops: float | None
    float32_tflops: float

    def tflops(self, precision: str) -> tuple[float, str]:
        """The peak at a precision ("bf16" or "no"), and the precision used: float32 if there is no bfloat16."""
        if precision == "bf16" and self.bf16_tflops is not None:
            return self.bf16_tflops, "bfloat16"
        return self.float32_tflops, "float32"


GPU_SPECS = {
    kind.name: kind
    for kind in (
        GPUSpec("V100-16GB", 15.7, None, 15.7),
        GPUSpec("V100-32GB", 31.7, None, 15.7),
        GPUSpec("RTX-3090", 23.6, 71.0, 35.6),
        GPUSpec("RTX-4090", 23.6, 165.2, 82.6),
        GPUSpec("A10", 22.1, 125.0, 31.2),
        GPUSpec("L4", 22.0, 121.0, 30.3),
        GPUSpec("RTX-A6000", 47.5, 154.8, 38.7),
        GPUSpec("A40", 44.3, 149.7, 37.4),
        GPUSpec("L40", 44.4, 181.0, 90.5),
        GPUSpec("L40S", 44.4, 362.0, 91.6),
        GPUSpec("RTX-6000-Ada", 44.4, 364.2, 91.1),
        GPUSpec("A100-40GB", 39.4, 312.0, 19.5),
        GPUSpec("A100-80GB", 79.2, 312.0, 19.5),
        GPUSpec("H100", 79.2, 989.0, 67.0),
        GPUSpec("H200", 139.8, 989.0, 67.0),
        GPUSpec("B200", 178.0, 2250.0, 75.0),
    )
}


def find_gpu(name: str) -> GPUSpec:
    """The GPU with a name such as "rtx 4090", ignoring case; for an unknown one, a UsageError suggests the nearest."""
    wanted = name.strip().lower().replace(" ", "-").replace("_", "-")
    for known, kind in GPU_SPECS.items():
        if known.lower() == wanted:
            return kind
    sizes = [known for known in GPU_SPECS if known.lower().startswith(f"{wanted}-")]
    remedy = f"Name one: {' or '.join(sizes)}" if sizes else did_you_mean(wanted, GPU_SPECS)
    raise UsageError("this kind of GPU is not in the table", where="--gpu", got=name, remedy=remedy)


@dataclass(frozen=True)
class TargetHardware:
    """A machine on paper."""

    kind: GPUSpec
    num_gpus: int = 1
    utilisation: float = 0.33
    """Assumed fraction of the peak that the model's own operations reach (MFU)."""

    @classmethod
    def of(cls, gpus: int | None, gpu: str | None) -> TargetHardware | None:
        """The machine that the command line names, if any; a UsageError for a number without a kind."""
        if gpu is None and gpus is None:
            return None
        if gpu is None:
            raise UsageError("--gpu is missing", where="--gpus", got=gpus, remedy="Give --gpu too, such as A100-80GB")
        if gpus is not None and gpus < 1:
            raise UsageError("there is no such number of GPUs", where="--gpus", got=gpus, expected="1 or more")
        return cls(find_gpu(gpu), gpus or 1)

    @property
    def parallel_modes(self) -> tuple[str, ...]:
        return ("ddp", "fsdp") if self.num_gpus > 1 else ("ddp",)

    def micro_batch_size(self, engine: EngineRecipe) -> int:
        """Images that one GPU processes at a time."""
        return engine.batch_size // (self.num_gpus * engine.accumulation)

    def require_divisible_batch(self, engine: EngineRecipe) -> None:
        """Raise a UsageError for a batch that the GPUs cannot share, naming the nearest ones that they can."""
        parts = self.num_gpus * engine.accumulation
        if engine.batch_size % parts:
            above = (engine.batch_size // parts + 1) * parts
            raise UsageError(
                f"{self.num_gpus} GPUs with {engine.accumulation} micro-batches each cannot share the batch",
                where="engine.batch_size",
                got=engine.batch_size,
                expected=f"a multiple of {parts}",
                remedy=f"Set engine.batch_size={above}" + (f" or {above - parts}" if above > parts else ""),
            )
