"""Options that are whole numbers of a range."""

from __future__ import annotations

from nexus_ext.errors import ConfigError

__all__ = ["check_number"]


def check_number(name: str, value: int, least: int, most: int) -> None:
    """Raises ConfigError where an option is no whole number of this range."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{name} is a whole number from {least} to {most}, got {value!r}.")
