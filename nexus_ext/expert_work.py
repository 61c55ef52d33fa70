"""Owns what arms of `nexus bench-experts` do: which tokens they are told, and in which pieces."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nexus_ext.errors import ConfigError

__all__ = ["Work"]

_PROMPT_FILE = "prompt_ids.json"
_SEED = 0


@dataclass(frozen=True)
class Work:
    """A prompt and tokens behind it, of `batch` sequences.

    Attributes:
        ids: Tokens of each sequence, prompt first.
        num_prompt: Of these, the prompt's.
        segment_tokens: Decoded by one arm before it is another's turn.
        num_prefills: Times the prompt is run.
        is_warm: Whether the files are in the page cache when an arm begins; else none of it is.
        source: Where the tokens come from.
    """

    ids: tuple[tuple[int, ...], ...] = field(repr=False)
    num_prompt: int
    segment_tokens: int = 16
    num_prefills: int = 3
    is_warm: bool = False
    source: str = ""

    @classmethod
    def of(
        cls,
        folder: Path,
        num_prompt: int,
        num_new: int,
        *,
        batch: int = 1,
        prompt_ids: Path | None = None,
        **others: Any,
    ) -> Work:
        """Take tokens from a file of ids, else from prompt_ids.json in the folder, else any.

        Raises:
            ConfigError: The file is no list of ids, or has too few.
        """
        file = prompt_ids or folder / _PROMPT_FILE
        wanted = num_prompt + num_new
        if prompt_ids is None and not file.exists():
            ids, source = (
                _random_ids(folder, wanted * batch),
                (f"random: there is no {_PROMPT_FILE}; routes of random tokens are no text's"),
            )
        else:
            ids, source = _read_ids(file, wanted), file.name
        # Sequences begin apart; in a short text they overlap.
        apart = (len(ids) - wanted) // max(1, batch - 1)
        rows = tuple(tuple(ids[n * apart : n * apart + wanted]) for n in range(batch))
        return cls(rows, num_prompt, source=source, **others)

    @property
    def batch(self) -> int:
        return len(self.ids)

    @property
    def num_new(self) -> int:
        """Tokens decoded of each sequence."""
        return len(self.ids[0]) - self.num_prompt

    @property
    def segments(self) -> list[int]:
        """Tokens of each segment."""
        whole, rest = divmod(self.num_new, self.segment_tokens)
        return [self.segment_tokens] * whole + [rest] * bool(rest)

    def describe(self) -> dict[str, Any]:
        """For a report: everything but the ids."""
        return {
            "num_prompt": self.num_prompt,
            "num_new": self.num_new,
            "batch": self.batch,
            "segment_tokens": self.segment_tokens,
            "num_prefills": self.num_prefills,
            "pages": "in the page cache" if self.is_warm else "dropped",
            "ids": self.source,
        }


def _read_ids(path: Path, wanted: int) -> list[int]:
    rule = f"token ids are a JSON list of {wanted} numbers or more"
    try:
        ids = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{rule}; {path}: {error}") from None
    if not isinstance(ids, list) or not all(type(one) is int for one in ids) or len(ids) < wanted:
        found = f"{len(ids)} entries" if isinstance(ids, list) else type(ids).__name__
        raise ConfigError(f"{rule}; {path} has {found}. Ask for fewer tokens, or for other ids.")
    return ids


def _random_ids(folder: Path, count: int) -> list[int]:
    config = json.loads((folder / "config.json").read_text())
    vocabulary = (config.get("text_config") or config)["vocab_size"]
    choose = random.Random(_SEED)
    return [choose.randrange(vocabulary) for _ in range(count)]
