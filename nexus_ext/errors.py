"""Every error nexus_ext raises, as one tree.

    NexusError
    ├── ConfigError             an option, a device or a mode that cannot be (also a ValueError)
    │   └── BudgetError         the bytes allowed are too few; names the smallest that works
    ├── MissingExtra            an optional package is not installed (also an ImportError)
    ├── StreamError             a module that cannot be streamed as asked
    ├── CheckpointError         the files are not what they should be
    │   ├── CheckpointFormatError   a header, an index or a file name breaks the format
    │   ├── CheckpointMismatch      tensors and module disagree: missing, unexpected, dtype, shape
    │   ├── TruncatedCheckpoint     the file ends before the byte that was expected
    │   ├── CheckpointChanged       a file was replaced or modified while it was streamed
    │   └── CorruptCheckpoint       bytes differ from their recorded digest
    ├── QuantizationError       packed tensors that do not belong together, weights that cannot be
    │                           packed (also a ValueError)
    ├── WriteError              the disk would not take what was to be kept (also an OSError)
    ├── DownloadError           a file could not be fetched (also an OSError)
    │   ├── SourceRefused           the server says no, or what must not be followed
    │   │   ├── AccessDenied            it wants another token, or gives it to nobody
    │   │   └── SourceMissing           it has no such file
    │   ├── SourceUnavailable       the network or the server failed more often than may be retried
    │   ├── SourceChanged           another file took the place of the one that was being fetched
    │   ├── ContentMismatch         what came is not the file: size, digest, encoding, a web page
    │   ├── DownloadCancelled       cancelled, or its Downloader was closed
    │   └── DownloadTimeout         bytes were waited for longer than allowed (also a TimeoutError)
    └── EngineError             the native engine could not do what was asked
        ├── ReadError           the disk answered with an error (also an OSError)
        ├── DeviceError         the GPU's driver answered with an error
        │   └── DeviceLost      the GPU can do nothing more in this process, or not for this model
        ├── EngineClosed        the engine was closed before
        ├── ForkedEngine        used in a child process; engines do not survive fork
        └── ThreadConflict      two threads ran one model at the same time

A message states the rule, what was got, and what to do.
"""

from __future__ import annotations

import re

__all__ = [
    "AccessDenied",
    "BudgetError",
    "CheckpointChanged",
    "CheckpointError",
    "CheckpointFormatError",
    "CheckpointMismatch",
    "ConfigError",
    "ContentMismatch",
    "CorruptCheckpoint",
    "DeviceError",
    "DeviceLost",
    "DownloadCancelled",
    "DownloadError",
    "DownloadTimeout",
    "EngineClosed",
    "EngineError",
    "ForkedEngine",
    "MissingExtra",
    "NexusError",
    "QuantizationError",
    "ReadError",
    "SourceChanged",
    "SourceMissing",
    "SourceRefused",
    "SourceUnavailable",
    "StreamError",
    "ThreadConflict",
    "TruncatedCheckpoint",
    "WriteError",
    "from_native",
    "to_native",
]


class NexusError(Exception):
    """The root: `except NexusError` catches everything this package raises on purpose."""


class ConfigError(NexusError, ValueError):
    """An option, a device or a mode that cannot be."""


class BudgetError(ConfigError):
    """The bytes allowed are too few."""


class MissingExtra(NexusError, ImportError):
    """An optional package is not installed."""


class StreamError(NexusError):
    """A module that cannot be streamed as asked."""


class CheckpointError(NexusError):
    """The files are not what they should be."""


class CheckpointFormatError(CheckpointError):
    """A header, an index or a file name breaks the format."""


class CheckpointMismatch(CheckpointError):
    """Tensors and module disagree."""


class TruncatedCheckpoint(CheckpointError):
    """The file ends before the byte that was expected."""


class CheckpointChanged(CheckpointError):
    """A file was replaced or modified while it was streamed."""


class CorruptCheckpoint(CheckpointError):
    """Bytes differ from their recorded digest."""


class QuantizationError(NexusError, ValueError):
    """Packed tensors that do not belong together, or weights that cannot be packed."""


class WriteError(NexusError, OSError):
    """The disk would not take what was to be kept."""


class DownloadError(NexusError, OSError):
    """A file could not be fetched."""


class SourceRefused(DownloadError):
    """The server says no, or leads to where a download must not follow."""


class AccessDenied(SourceRefused):
    """The server wants another token, or gives the file to nobody."""


class SourceMissing(SourceRefused):
    """The server has no such file."""


class SourceUnavailable(DownloadError):
    """The network or the server failed more often than may be retried."""


class SourceChanged(DownloadError):
    """Another file took the place of the one that was being fetched."""


class ContentMismatch(DownloadError):
    """What came is not the file that was asked for."""


class DownloadCancelled(DownloadError):
    """The download was cancelled, or its Downloader was closed."""


class DownloadTimeout(DownloadError, TimeoutError):
    """Bytes were waited for longer than allowed; the download goes on."""


class EngineError(NexusError):
    """The native engine could not do what was asked."""


class ReadError(EngineError, OSError):
    """The disk answered with an error."""


class DeviceError(EngineError):
    """The GPU's driver answered with an error."""


class DeviceLost(DeviceError):
    """The GPU can do nothing more in this process, or not for this model."""


class EngineClosed(EngineError):
    """The engine was closed before."""


class ForkedEngine(EngineError):
    """Used in a child process."""


class ThreadConflict(EngineError):
    """Two threads ran one model at the same time."""


_NATIVE = re.compile(r"nexus:(\w+): (.*)", re.DOTALL)


def from_native(error: RuntimeError) -> BaseException:
    """Turn what native code threw into its typed twin; anything else comes back as it is.

    Native code names the class in front of its message, `nexus:ReadError: ...`, because the
    stable ABI carries a text across the border and no type.
    """
    match = _NATIVE.search(str(error))
    if match is None:
        return error
    kind, message = match.groups()
    if kind == "Interrupted":
        return KeyboardInterrupt()
    typed = globals()[kind]
    assert issubclass(typed, NexusError)
    # torch appends its own C++ trace after a blank line or "Exception raised from".
    return typed(message.split("\nException raised from")[0].strip())  # type: ignore[no-any-return]


def to_native(error: NexusError) -> str:
    """What native code keeps of an error, to throw it later; `from_native` knows it again."""
    return f"nexus:{type(error).__name__}: {error}"
