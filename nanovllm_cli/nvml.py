"""NVML, NVIDIA's library of counters: what driver there is, and the energy a GPU has drawn.

Through ctypes, as the driver brings it: Python's own binding would be one more dependency.
Reference: https://docs.nvidia.com/deploy/nvml-api/
"""

import ctypes


class Nvml:
    """The counters of some GPUs. Whatever the machine, or one of them, does not give is None."""

    def __init__(self, *uuids: str) -> None:
        """`uuids` as torch has them: CUDA's number of a GPU need not be NVML's."""
        self._library: ctypes.CDLL | None = None
        self._devices = [ctypes.c_void_p() for _ in uuids]
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        if library.nvmlInit_v2() == 0:
            self._library = library
            for uuid, device in zip(uuids, self._devices, strict=True):
                name = f"GPU-{uuid.removeprefix('GPU-')}".encode()
                if library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(device)) != 0:
                    device.value = None

    def driver_version(self) -> str | None:
        text = ctypes.create_string_buffer(96)
        if self._library is None or self._library.nvmlSystemGetDriverVersion(text, 96) != 0:
            return None
        return text.value.decode()

    def joules(self) -> float | None:
        """Drawn since the driver was loaded, by all together, the memory's share included."""
        if self._library is None:
            return None
        total = 0
        for device in self._devices:
            millijoules = ctypes.c_ulonglong()
            ask = self._library.nvmlDeviceGetTotalEnergyConsumption
            if not device or ask(device, ctypes.byref(millijoules)) != 0:
                return None
            total += millijoules.value
        return total / 1000
