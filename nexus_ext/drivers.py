"""The errors of fsspec's drivers: those that are no OSError, though a network failed.

Their texts may hold signed URLs and endpoints, so none is shown, and none is attached.
"""

from __future__ import annotations

import asyncio
import sys

__all__ = ["credential_errors", "driver_errors"]

_Errors = tuple[type[BaseException], ...]

# By module; only a loaded one can have raised.
_DRIVERS = {
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "azure.core.exceptions": ("AzureError",),
}
_CREDENTIALS = {
    "botocore.exceptions": ("NoCredentialsError", "PartialCredentialsError"),
    "google.auth.exceptions": ("DefaultCredentialsError", "RefreshError"),
    "azure.core.exceptions": ("ClientAuthenticationError",),
}


def driver_errors() -> _Errors:
    """What a source or a store raises that cannot be reached now, or says no."""
    return (OSError, EOFError, TimeoutError, asyncio.TimeoutError, *_loaded(_DRIVERS))


def credential_errors() -> _Errors:
    """Those of them that say: no credentials, or wrong ones."""
    return (PermissionError, *_loaded(_CREDENTIALS))


def _loaded(names: dict[str, tuple[str, ...]]) -> _Errors:
    found: list[type[BaseException]] = []
    for module, classes in names.items():
        loaded = sys.modules.get(module)
        found += [getattr(loaded, name) for name in classes if hasattr(loaded, name)]
    return tuple(found)
