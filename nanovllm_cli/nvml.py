"""NVML, NVIDIA's library of counters: what driver there is, and the energy a GPU has drawn.

Through ctypes, as the driver brings it: Python's own binding would be one more dependency.
Reference: https://docs.nvidia.com/deploy/nvml-api/
"""

import ctypes


class Nvml:
    """One GPU's counters. Whatever the machine, or this GPU, does not give is None."""

    def __init__(self, uuid: str) -> None:
        """`uuid` as torch has it: CUDA's number of a GPU need not be NVML's."""
        self._library: ctypes.CDLL | None = None
        self._device = ctypes.c_void_p()
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        if library.nvmlInit_v2() == 0:
            self._library = library
            name = f"GPU-{uuid.removeprefix('GPU-')}".encode()
            if library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(self._device)) != 0:
                self._device = ctypes.c_void_p()

    def driver_version(self) -> str | None:
        text = ctypes.create_string_buffer(96)
        if self._library is None or self._library.nvmlSystemGetDriverVersion(text, 96) != 0:
            return None
        return text.value.decode()

    def joules(self) -> float | None:
        """Drawn since the driver was loaded, the memory's share included."""
        millijoules = ctypes.c_ulonglong()
        if self._library is None or not self._device:
            return None
        ask = self._library.nvmlDeviceGetTotalEnergyConsumption
        if ask(self._device, ctypes.byref(millijoules)) != 0:
            return None
        return millijoules.value / 1000
