"""Which backend attends in a GPU's prefills, chosen without importing any of them.

attention_backend.py has the backends themselves. Where only a look at an installed package can
tell whether it fits this torch, a process of its own looks: importing one takes seconds.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from typing import Literal, NoReturn

from nanovllm_cli.core.config import AttentionBackendName
from nanovllm_cli.core.errors import UserError

Name = Literal["flash-attn-3", "flash-attn", "torch", "triton"]

# FlashAttention 2's C++ checks it (https://github.com/Dao-AILab/flash-attention/issues/828).
_PAGE_TOKENS = 256
_BEST_FIRST: tuple[Name, ...] = ("flash-attn-3", "flash-attn", "torch", "triton")
# H200, 2048 tokens: FlashAttention 3 491 TFLOP/s, our kernel 430, FlashAttention 2 277.
_BEST_FIRST_ON_HOPPER: tuple[Name, ...] = ("flash-attn-3", "triton", "flash-attn", "torch")
_PACKAGES: dict[Name, str] = {"flash-attn-3": "flash_attn_interface", "flash-attn": "flash_attn"}
_PROBE_SECONDS = 300.0


def best_first(capability: tuple[int, int]) -> tuple[Name, ...]:
    """The backends in the order in which a GPU of this compute capability runs them best."""
    return _BEST_FIRST_ON_HOPPER if capability == (9, 0) else _BEST_FIRST


def obstacle(name: Name, dtype: str, block_size: int, capability: tuple[int, int]) -> str | None:
    """Why an installed backend cannot run on this GPU or with these settings; None if it can."""
    if name == "triton":
        return None
    if dtype == "float32":
        return "it has no float32; --dtype bfloat16 or float16"
    if name == "flash-attn-3":
        if capability[0] != 9:
            return f"it runs on sm_90, and this GPU is sm_{capability[0]}{capability[1]}"
        return None
    if block_size % _PAGE_TOKENS:
        return f"it needs --block-size {_PAGE_TOKENS}, and block_size is {block_size}"
    return None


def choose_attention_backend_name(
    wanted: AttentionBackendName, *, dtype: str, block_size: int, capability: tuple[int, int]
) -> str:
    """Return the name of the backend `wanted`, of the best one for "auto".

    The name is that of AttentionBackend, with the version where there is one. Raises UserError if
    the backend cannot run.
    """
    if wanted == "triton":
        return wanted
    if wanted == "auto":
        for name in best_first(capability):
            if name == "triton":
                return name
            if obstacle(name, dtype, block_size, capability) is None and _may_be_there(name):
                break
    return _probe(wanted, dtype, block_size, capability)


def _may_be_there(name: Name) -> bool:
    """False for a package that is not installed; torch's own function has no package."""
    return name not in _PACKAGES or find_spec(_PACKAGES[name]) is not None


def _probe(wanted: str, dtype: str, block_size: int, capability: tuple[int, int]) -> str:
    asked = (wanted, dtype, block_size, capability)
    if "torch" in sys.modules:  # an engine's process, or a test
        return _look(*asked)
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "nanovllm_cli.core.attention_choice", json.dumps(asked)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_PROBE_SECONDS,
    )
    try:
        answer = json.loads(ended.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        reason = ended.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"attention_backend {wanted!r} cannot be looked for: {reason}") from None
    if "name" not in answer:
        raise UserError(answer["message"], answer["hint"])
    name: str = answer["name"]
    return name


def _look(wanted: str, dtype: str, block_size: int, capability: tuple[int, int]) -> str:
    # Late: it imports torch.
    from nanovllm_cli.core.attention_backend import choose_attention_backend

    return choose_attention_backend(
        wanted,  # type: ignore[arg-type]
        dtype=dtype,
        block_size=block_size,
        capability=(capability[0], capability[1]),
    ).name


def main() -> NoReturn:
    """Print the answer of `_look`, as JSON."""
    try:
        answer = {"name": _look(*json.loads(sys.argv[1]))}
    except UserError as error:
        answer = {"message": error.message, "hint": error.hint or ""}
    print(json.dumps(answer))
    sys.exit()


if __name__ == "__main__":
    main()
