"""Owns one question: where do weights end, and how much room is there?

A device has two names: the engine's ("cpu", "cuda:0"), and torch's, whose allocator gives the
memory, so that torch's own statistics count every arena. Nothing is asked of a GPU at import.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nexus_ext.errors import BudgetError, ConfigError
from nexus_ext.memory import available_bytes

__all__ = ["Device"]

_PAGE_BYTES = 4096
_HUGE_PAGE_BYTES = 2 << 20


@dataclass(frozen=True)
class Device:
    """Memory that weights stream to.

    Attributes:
        name: The engine's name of it: "cpu", "cuda:0", ...
        torch_device: Where its tensors are. A simulated GPU has them in host memory.
    """

    name: str
    torch_device: torch.device

    @classmethod
    def of(cls, device: str | torch.device | Device) -> Device:
        """What a user meant; "cuda" is torch's current one.

        Raises:
            ConfigError: No device, or none that weights can stream to here.
        """
        if isinstance(device, Device):
            return device
        try:
            wanted = torch.device(device)
        except (RuntimeError, TypeError):
            raise ConfigError(
                f"device must name a device, got {device!r}; use 'cpu' or 'cuda'."
            ) from None
        if wanted.type == "cpu":
            return cls("cpu", torch.device("cpu"))
        if wanted.type != "cuda":
            raise ConfigError(
                f"device must be one that weights can stream to: 'cpu' or 'cuda'; got {device!r}."
            )
        return cls._cuda(wanted)

    @classmethod
    def _cuda(cls, wanted: torch.device) -> Device:
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device='{wanted}' needs a GPU that torch can use; torch {torch.__version__} sees "
                "none. Install a CUDA build of torch and a driver, or use device='cpu'."
            )
        index = torch.cuda.current_device() if wanted.index is None else wanted.index
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"device must be a GPU that is there; got '{wanted}', and torch sees "
                f"{torch.cuda.device_count()}."
            )
        return cls(f"cuda:{index}", torch.device("cuda", index))

    @property
    def is_host(self) -> bool:
        """Whether files are read straight into its memory, without staging."""
        return self.name == "cpu"

    def available_bytes(self) -> int:
        """Bytes that can still be allocated there, other programs' use and limits counted."""
        if self.torch_device.type == "cpu":
            return available_bytes()
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        # What torch's allocator keeps for itself is as good as free.
        kept = torch.cuda.memory_reserved(self.torch_device)
        return int(free + kept - torch.cuda.memory_allocated(self.torch_device))

    def allocate(self, nbytes: int, phase: int = 0) -> torch.Tensor:
        """Uninitialised uint8 [nbytes], whose first byte lies `phase` bytes behind a page boundary
        (0 on a GPU: wherever torch's allocator puts it).

        Raises:
            BudgetError: A GPU has not got it.
        """
        if not self.is_host and phase == 0:
            return self._empty(nbytes)
        is_big = self.is_host and nbytes >= _HUGE_PAGE_BYTES
        page = _HUGE_PAGE_BYTES if is_big else _PAGE_BYTES
        # In host memory, what lies before and behind is never touched, and so takes no memory.
        memory = self._empty(nbytes + page + _PAGE_BYTES)
        start = -memory.data_ptr() % page + phase
        return memory[start : start + nbytes]

    def _empty(self, nbytes: int) -> torch.Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError as error:
            raise BudgetError(
                f"a budget must fit into what is free on {self.name}; {nbytes} bytes more cannot "
                f"be had ({error}). Lower the budget, or free memory there"
            ) from error
