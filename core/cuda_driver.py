"""The GPUs of this machine, asked of NVIDIA's driver: torch, which takes seconds to import, is not.

What the job's own process must know of GPUs (whether there is one, how many, of what kind, how much
memory) it learns here; the engine's processes compute on them by torch. The driver counts as torch
does: CUDA_VISIBLE_DEVICES hides GPUs and orders them, and no context is made.
Reference: https://docs.nvidia.com/cuda/cuda-driver-api/
"""

import ctypes
import re
import uuid
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

_LIBRARY = "libcuda.so.1"
_CAPABILITY_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR; minor is the next
_NAME_BYTES = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU that this process sees."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]  # sm_90 is (9, 0)
    uuid: str = ""

    def __str__(self) -> str:
        return f"{self.name}, {self.memory_bytes / 2**30:.0f} GiB, {self.architecture}"

    @property
    def architecture(self) -> str:
        """As compilers call it: sm_90."""
        major, minor = self.capability
        return f"sm_{major}{minor}"


@lru_cache(maxsize=1)
def visible_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that this process's torch can use, in torch's order; () if there is none.

    A torch that was built without CUDA can use none, nor can one that is newer than the driver.
    """
    built_for = torch_cuda_version()
    driver = _load_driver() if built_for is not None else None
    if driver is None or built_for is None:
        return ()
    version, count = ctypes.c_int(), ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return ()
    if version.value // 1000 < int(built_for.partition(".")[0]):
        return ()
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_gpu(driver, ordinal) for ordinal in range(count.value))


def are_peers(first: int, second: int) -> bool:
    """Whether each of two visible GPUs can read the other's memory."""
    driver = _load_driver()
    if driver is None:
        return False
    a, b = _device(driver, first), _device(driver, second)
    for one, other in ((a, b), (b, a)):
        can_access = ctypes.c_int()
        asked = driver.cuDeviceCanAccessPeer(ctypes.byref(can_access), one, other)
        if asked != 0 or not can_access.value:
            return False
    return True


@lru_cache(maxsize=1)
def torch_cuda_version() -> str | None:
    """Return the version of CUDA that torch was built for, without importing it; None for a CPU."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"](\d+\.\d+)", text, re.MULTILINE)
    return found[1] if found else None


@lru_cache(maxsize=1)
def _load_driver() -> ctypes.CDLL | None:
    """The driver's library, at work; None if there is no driver or it finds no GPU."""
    try:
        driver = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


def _device(driver: ctypes.CDLL, ordinal: int) -> ctypes.c_int:
    device = ctypes.c_int()
    _check(driver.cuDeviceGet(ctypes.byref(device), ordinal))
    return device


def _gpu(driver: ctypes.CDLL, ordinal: int) -> Gpu:
    device = _device(driver, ordinal)
    name = ctypes.create_string_buffer(_NAME_BYTES)
    memory, number = ctypes.c_size_t(), (ctypes.c_ubyte * 16)()
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(driver.cuDeviceGetName(name, _NAME_BYTES, device))
    _check(driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device))
    _check(driver.cuDeviceGetUuid(number, device))
    for value, attribute in ((major, _CAPABILITY_MAJOR), (minor, _CAPABILITY_MAJOR + 1)):
        _check(driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device))
    return Gpu(
        name=name.value.decode(errors="replace"),
        memory_bytes=memory.value,
        capability=(major.value, minor.value),
        uuid=str(uuid.UUID(bytes=bytes(number))),
    )


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"CUDA driver error {status} while GPUs were looked for")
