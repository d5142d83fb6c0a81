"""NVML, NVIDIA's library of counters: the driver, the energy GPUs have drawn, what connects them.

Through ctypes, as the driver brings it: Python's own binding would be one more dependency.
Reference: https://docs.nvidia.com/deploy/nvml-api/
"""

import ctypes

_NVLINK = 2  # NVML_P2P_CAPS_INDEX_NVLINK
_MAX_LINKS = 64  # of a GPU; there are 18 on Hopper and Blackwell
_COMMON_ANCESTORS = {  # nvmlGpuTopologyLevel_t
    0: "on one board",
    10: "PCIe through one switch",
    20: "PCIe through several switches",
    30: "PCIe through a host bridge",
    40: "PCIe through one NUMA node",
    50: "PCIe from one NUMA node to another",
}


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

    def path(self, first: int, second: int) -> str | None:
        """What connects two of the GPUs, by their places in `uuids`, in words."""
        a, b = self._devices[first], self._devices[second]
        if self._library is None or not a or not b:
            return None
        status = ctypes.c_int()
        ask = self._library.nvmlDeviceGetP2PStatus
        if ask(a, b, _NVLINK, ctypes.byref(status)) == 0 and status.value == 0:
            return f"NVLink ({self._num_links(a)} links a GPU)"
        level = ctypes.c_int()
        if self._library.nvmlDeviceGetTopologyCommonAncestor(a, b, ctypes.byref(level)) != 0:
            return None
        return _COMMON_ANCESTORS.get(level.value)

    def _num_links(self, device: ctypes.c_void_p) -> int:
        """NVLinks that are up, to other GPUs or to switches."""
        assert self._library is not None, "there are no devices without it"
        num_links = 0
        for link in range(_MAX_LINKS):
            is_up = ctypes.c_int()
            if self._library.nvmlDeviceGetNvLinkState(device, link, ctypes.byref(is_up)) != 0:
                break
            num_links += is_up.value
        return num_links
