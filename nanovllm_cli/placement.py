"""How a model is best laid out over some GPUs, and why: facts in, words out.

A model that fits one GPU runs once on each: engines side by side never wait for each other, ranks
do twice a layer. One that does not is shared out to as few GPUs as it fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.cuda_driver import Gpu
from nanovllm_cli.core.resolved_config import ResolvedConfig, resolve, why_not_shared

from .gpus import find_gpus

_WORKING_BYTES = 2 << 30  # a prefill's activations, logits, captured steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a model asks of a GPU, of whose memory a share, `utilization`, is to be used."""

    model: ModelConfig
    dtype_bytes: int
    max_model_len: int
    utilization: float

    @classmethod
    def of(cls, model: ModelConfig, settings: ResolvedConfig) -> "Needs":
        """Those of a model that runs so."""
        return cls(
            model=model,
            dtype_bytes=2 if settings.dtype in ("bfloat16", "float16") else 4,
            max_model_len=settings.max_model_len,
            utilization=settings.gpu_memory_utilization,
        )

    def of_each(self, num_ranks: int) -> int:
        """Bytes on each of so many GPUs: weights, and room to work with one longest sequence."""
        part = self.model.part(num_ranks)
        kv_bytes = self.max_model_len * part.kv_bytes_per_token(self.dtype_bytes)
        return part.num_parameters * self.dtype_bytes + kv_bytes + _WORKING_BYTES

    def fits(self, num_ranks: int, gpus: Sequence[Gpu]) -> bool:
        """Whether every one of `gpus` could be one of so many ranks."""
        return self.of_each(num_ranks) <= self._usable_bytes(gpus)

    def compared(self, num_ranks: int, gpus: Sequence[Gpu]) -> str:
        """Needed and usable, in words."""
        return f"{_gib(self.of_each(num_ranks))} of {_gib(self._usable_bytes(gpus))} GiB"

    def _usable_bytes(self, gpus: Sequence[Gpu]) -> int:
        return int(self.utilization * min(gpu.memory_bytes for gpu in gpus))


def advise(needs: Needs, gpus: Sequence[Gpu]) -> str:
    """The flags to run a model with on these GPUs, and the reason."""
    sizes = [n for n in range(1, len(gpus) + 1) if why_not_shared(n, needs.model) is None]
    fitting = [size for size in sizes if needs.fits(size, gpus)]
    if not fitting:
        where = "the GPU" if len(gpus) == 1 else f"--tp {sizes[-1]}, the most that divides it here,"
        return f"it does not fit: {where} takes {needs.compared(sizes[-1], gpus)} on each"
    tp = fitting[0]
    dp = len(gpus) // tp
    flags = " ".join(f"{name} {n}" for name, n in (("--tp", tp), ("--dp", dp)) if n > 1)
    if tp == 1:
        reason = f"it fits one GPU ({needs.compared(1, gpus)})"
        if dp == 1:
            return f"no flag: {reason}, and there is one"
        return f"{flags}: {reason}, and engines side by side need not wait for each other"
    reason = (
        f"one GPU would take {needs.compared(1, gpus)}, each of {tp} {needs.compared(tp, gpus)}"
    )
    num_idle = len(gpus) - tp * dp
    return f"{flags}: {reason}" + (f"; {num_idle} of {len(gpus)} stay idle" if num_idle else "")


def advise_cpu(model: ModelConfig, memory_bytes: int) -> str:
    """The same where there is no GPU."""
    needed = 4 * model.num_parameters
    fits = "fit" if needed < memory_bytes else "do not fit"
    return (
        f"there is no GPU to run it on; on the CPU its weights, {_gib(needed)} GiB in float32, "
        f"{fits} the {_gib(memory_bytes)} GiB of memory"
    )


def notes(needs: Needs, gpus: Sequence[Gpu], *, tp: int, dp: int) -> list[str]:
    """What whoever runs a job on several GPUs may want to know; `gpus` are those it uses."""
    lines = []
    if tp > 1 and needs.fits(1, gpus):
        lines.append(
            f"the model fits one GPU ({needs.compared(1, gpus)}): "
            f"--dp {tp * dp} is faster than --tp {tp}"
        )
    kinds = dict.fromkeys(map(str, gpus))
    if dp > 1 and len(kinds) > 1:
        lines.append(
            f"the GPUs differ ({'; '.join(kinds)}): faster ones get more rows, and a row's last "
            "bits depend on which one runs it"
        )
    return lines


def parallel_notes(
    config: EngineConfig, num_replicas: int, source: Path | ModelConfig
) -> list[str]:
    """`notes` on a job as it is told to run on this machine; source: a checkpoint, or sizes."""
    tp, dp = config.tensor_parallel_size, num_replicas
    if tp * dp == 1:
        return []
    model = ModelConfig.of(source)
    settings = resolve(config, model)
    if settings.device == "cpu":
        return []
    return notes(Needs.of(model, settings), find_gpus()[: tp * dp], tp=tp, dp=dp)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f}"
