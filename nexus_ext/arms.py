"""Arms of a benchmark: one process each, so that memory is counted apart and steps can alternate.

streamed    the model as nexus streams it
resident    the plain model in memory
accelerate  accelerate's disk offload of the same checkpoint
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from nexus_ext.errors import ConfigError, MissingExtra, NexusError
from nexus_ext.limit import MemoryLimit
from nexus_ext.module import plan_of, stats
from nexus_ext.pretrained import from_pretrained

__all__ = ["KINDS", "Arm", "ArmSpec"]

_SEED = 0
# What the parent raises in its own name; anything else ends the process with its traceback.
_EXPECTED = (NexusError, OSError, RuntimeError, ValueError)


@dataclass(frozen=True)
class ArmSpec:
    """What a process runs: a kind, a model, T tokens a step, and options for streaming."""

    kind: str
    path: Path
    num_tokens: int = 1
    options: dict[str, Any] = field(default_factory=dict)


class Arm:
    """The parent's handle of one arm. Calls block until the process has answered."""

    def __init__(self, spec: ArmSpec, memory_limit: int | None = None) -> None:
        """Start the process and load the model in it.

        Args:
            spec: What to run.
            memory_limit: Bytes the process may use, page cache included; needs cgroups.

        Raises:
            NexusError: What loading raised there.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._limit = MemoryLimit(memory_limit) if memory_limit else None
        tasks = self._limit.tasks if self._limit else None
        self._process = context.Process(target=_serve, args=(child, spec, tasks), daemon=True)
        self._process.start()
        child.close()
        self.facts = self._receive()

    def step(self) -> dict[str, float]:
        """Two forwards back to back; the second one's seconds, stall and bytes."""
        measured: dict[str, float] = self._ask("step")
        return measured

    def sweep(self) -> dict[str, float]:
        """Streamed only: the same two passes, reading everything and computing nothing."""
        measured: dict[str, float] = self._ask("sweep")
        return measured

    def generate(self, num_tokens: int) -> list[int]:
        """Greedy tokens from the fixed prompt."""
        tokens: list[int] = self._ask("generate", num_tokens)
        return tokens

    def report(self) -> dict[str, Any]:
        """peak_rss_bytes, peak_device_bytes (of a GPU) and, for a streamed arm, its stats."""
        report: dict[str, Any] = self._ask("report")
        return report

    def __enter__(self) -> Arm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pipe.close()
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        if self._limit:
            self._limit.remove()

    def _ask(self, *command: Any) -> Any:
        self._pipe.send(command)
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise NexusError(
                f"A benchmark process must live to its end; it ended with exit code "
                f"{self._process.exitcode} (-9: out of memory). Raise the memory limit."
            ) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer


# -- in the process ------------------------------------------------------------------------------


def _serve(pipe: Connection, spec: ArmSpec, tasks: Path | None) -> None:
    if tasks is not None:
        tasks.write_text(str(os.getpid()))
    try:
        runner = KINDS[spec.kind](spec)
    except _EXPECTED as error:
        pipe.send(error)
        return
    pipe.send(runner.facts)
    while True:
        try:
            name, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(getattr(runner, name)(*arguments))
        except _EXPECTED as error:
            pipe.send(error)


class _Runner(ABC):
    """A model in this process, and how to run it."""

    def __init__(self, spec: ArmSpec) -> None:
        _quiet_transformers()
        # What the process weighs before it has weights: interpreter, libraries, model code.
        _model_class(spec.path)
        baseline = _rss_bytes()
        began = time.perf_counter()
        self.model: Any = self._load(spec)
        self.facts: dict[str, Any] = {
            "load_seconds": time.perf_counter() - began,
            "baseline_rss_bytes": baseline,
            "groups": 0,
        }
        vocabulary = self.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(_SEED)
        prompt = torch.randint(0, vocabulary, (1, spec.num_tokens), generator=generator)
        self.prompt = prompt.to(_device(spec))

    @abstractmethod
    def _load(self, spec: ArmSpec) -> Any:
        """The model, ready to be called."""

    def _forward(self) -> None:
        with torch.inference_mode():
            self.model(self.prompt)
        if self.prompt.is_cuda:
            torch.cuda.synchronize()

    def step(self) -> dict[str, float]:
        return self._timed(self._forward)

    def _timed(self, run: Callable[[], None]) -> dict[str, float]:
        # The first run leaves caches and arenas as the second will: the steady state.
        run()
        before = self._counters()
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
        after = self._counters()
        return {"seconds": seconds} | {key: after[key] - before[key] for key in before}

    def _counters(self) -> dict[str, float]:
        return {}

    def generate(self, num_tokens: int) -> list[int]:
        with torch.inference_mode():
            tokens = self.model.generate(
                self.prompt, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False
            )
        return tokens[0].tolist()  # type: ignore[no-any-return]

    def report(self) -> dict[str, Any]:
        peak = torch.cuda.max_memory_allocated() if self.prompt.is_cuda else 0
        return {"peak_rss_bytes": _peak_rss_bytes(), "peak_device_bytes": peak}


class _Streamed(_Runner):
    def _load(self, spec: ArmSpec) -> Any:
        return from_pretrained(spec.path, **spec.options)

    def __init__(self, spec: ArmSpec) -> None:
        super().__init__(spec)
        self.facts["plan"] = plan_of(self.model)

    def sweep(self) -> dict[str, float]:
        return self._timed(self.model._nexus.streamer.sweep)

    def _counters(self) -> dict[str, float]:
        now = stats(self.model)
        return {"stall_seconds": now.stall_seconds, "bytes_read": now.bytes_read}

    def report(self) -> dict[str, Any]:
        return super().report() | {"stats": asdict(stats(self.model))}


class _Resident(_Runner):
    def _load(self, spec: ArmSpec) -> Any:
        kind = _model_class(spec.path)
        return kind.from_pretrained(spec.path, dtype="auto").to(_device(spec)).eval()


class _Accelerate(_Runner):
    def _load(self, spec: ArmSpec) -> Any:
        try:
            import accelerate  # noqa: F401 - transformers uses it
        except ImportError:
            raise MissingExtra(
                "The accelerate arm needs accelerate: pip install accelerate."
            ) from None
        folder = spec.path / ".offload"
        kind = _model_class(spec.path)
        return kind.from_pretrained(
            spec.path, dtype="auto", device_map={"": "disk"}, offload_folder=folder
        ).eval()


def _device(spec: ArmSpec) -> torch.device:
    return torch.device(spec.options.get("device", "cpu"))


def _model_class(path: Path) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    return getattr(transformers, config.architectures[0])


def _quiet_transformers() -> None:
    logging: Any = importlib.import_module("transformers.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _peak_rss_bytes() -> int:
    """Of this program alone: what getrusage tells would include the parent's, before exec."""
    status = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


KINDS: dict[str, type[_Runner]] = {
    "streamed": _Streamed,
    "resident": _Resident,
    "accelerate": _Accelerate,
}


def check_kinds(kinds: list[str]) -> None:
    """Peers that can be run beside a streamed model."""
    for kind in kinds:
        if kind not in KINDS or kind == "streamed":
            raise ConfigError(f"--against takes resident and accelerate, got {kind!r}.")
