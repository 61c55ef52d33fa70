"""What the JSON of a checkpoint may say: the grammar of a header and of an index, and its limits.

`json` alone builds whatever a file describes: 33 million lists out of 100 MB, or a nesting that
ends the process where the recursion limit was raised. So objects are walked here member by member,
and `json` decodes only strings and pieces of bounded length. Duplicate keys, lone surrogates and
numbers that are not whole are refused on the way, which `json` lets pass.

This file knows JSON and limits; what the fields of a tensor mean is `checkpoint`'s part.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterator

from nexus_ext.errors import CheckpointFormatError

__all__ = [
    "AGAIN",
    "MAX_DIMS",
    "MAX_JSON_BYTES",
    "broken",
    "index_shards",
    "quote",
    "tensor_fields",
]

MAX_JSON_BYTES = 100_000_000  # the library's own limit for a header; kept for an index as well
MAX_DIMS = 32  # of one tensor; torch itself stops at 64
_MAX_MEMBERS = 1_000_000  # of one object; the largest public models have some 100,000 tensors
_MAX_NAME_BYTES = 4096  # of a name in UTF-8
_MAX_FIELDS_CHARS = 4096  # of one tensor's object: 32 dims of 19 digits take 700
_MAX_OTHER_CHARS = 1 << 20  # of what an index holds beside its weight_map; it is checked, not kept
_MAX_OTHER_DEPTH = 16
_MAX_INT = 2**63 - 1  # sizes and strides in torch are int64
_MAX_DIGITS = 4300  # Python's own limit, which 3.10.6 and older do not have

AGAIN = "download the file again, or write it again with safetensors.torch.save_file"

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200  # names come from the file and may be megabytes long
quote = _short.repr


def broken(where: str, rule: str, got: object) -> CheckpointFormatError:
    """The error for a broken rule: where, the rule, what was got (shortened), what to do."""
    return CheckpointFormatError(f"{where}: {rule}, but got {quote(got)}; {AGAIN}")


def tensor_fields(raw: bytes, where: str) -> Iterator[tuple[str, object]]:
    """Each tensor's name and what the header says of it, in the header's order.

    Only a run to the end has judged the whole header. Names are unique UTF-8 of at most 4 KiB;
    `__metadata__` is checked and left out. Values are unchecked but small: numbers in them are
    whole, from 0 to 2**63 - 1, and no object in them has a key twice.

    Args:
        raw: The JSON bytes of a header.
        where: Names the header in messages.

    Raises:
        CheckpointFormatError: It is not JSON, or breaks a rule or a limit.
    """
    reader = _Reader(raw, where)
    for name in reader.members():
        if name == "__metadata__":
            for _ in reader.texts("__metadata__ maps strings to strings"):
                pass
        else:
            yield name, reader.fields(name)
    reader.finish()


def index_shards(raw: bytes, where: str) -> dict[str, str]:
    """The weight_map of an index: the name of a file for each tensor, not yet judged as a path.

    Args:
        raw: The JSON bytes of an index.
        where: Names the index in messages.

    Raises:
        CheckpointFormatError: It is not JSON, breaks a rule or a limit, or has no weight_map.
    """
    rule = "weight_map maps tensor names to file names"
    reader = _Reader(raw, where)
    found: dict[str, str] | None = None
    for name in reader.members():
        if name == "weight_map":
            found = dict(reader.texts(rule))
        else:
            reader.skip_other(name)
    reader.finish()
    if found is None:
        raise broken(where, rule, None)
    return found


class _Reader:
    """A place in a JSON text; every method reads on from there or refuses."""

    def __init__(self, raw: bytes, where: str) -> None:
        self._where = where
        self._at = 0
        try:
            self._text = raw.decode()
        except UnicodeDecodeError as error:
            raise self._refused(str(error)) from error

    def members(self) -> Iterator[str]:
        """The names of an object's members; the caller reads each value before it goes on."""
        self._expect("{")
        if self._skip_if("}"):
            return
        names: set[str] = set()
        while True:
            name = self._name()
            if name in names:
                raise self._refused(f"the key {quote(name)} stands there twice")
            if len(names) == _MAX_MEMBERS:
                raise self._refused(
                    f"an object has at most {_MAX_MEMBERS} members, and one has more"
                )
            names.add(name)
            self._expect(":")
            yield name
            if not self._skip_if(","):
                break
        self._expect("}")

    def texts(self, rule: str) -> Iterator[tuple[str, str]]:
        """The members of an object whose values are strings."""
        self._demand("{", rule)
        for name in self.members():
            self._demand('"', rule)
            yield name, self._string()

    def fields(self, name: str) -> object:
        """The value of one tensor, whatever it is."""
        return self._value(_FIELDS_JSON, _MAX_FIELDS_CHARS, name)

    def skip_other(self, name: str) -> None:
        """A value that is not used, but must be JSON and small."""
        self._peek()
        depth = 0
        for match in _BRACKETS.finditer(self._text, self._at, self._at + _MAX_OTHER_CHARS):
            depth += _DEPTH_CHANGES.get(match[0], 0)
            if depth > _MAX_OTHER_DEPTH:
                raise self._refused(f"{quote(name)} is nested deeper than {_MAX_OTHER_DEPTH}")
            if depth <= 0:
                break
        self._value(_OTHER_JSON, _MAX_OTHER_CHARS, name)

    def finish(self) -> None:
        """Nothing but white space may follow."""
        if self._peek():
            raise self._unexpected("Extra data")

    def _value(self, decoder: json.JSONDecoder, max_chars: int, name: str) -> object:
        self._peek()
        piece = self._text[self._at : self._at + max_chars]
        try:
            value, used = decoder.raw_decode(piece)
        except (ValueError, RecursionError) as error:
            raise self._refused(
                f"{quote(name)} must be JSON of at most {max_chars} characters: {error}"
            ) from error
        self._at += used
        return value

    def _name(self) -> str:
        if self._peek() != '"':
            raise self._unexpected("Expecting a name in double quotes")
        name = self._string()
        if len(name) > _MAX_NAME_BYTES or len(name.encode()) > _MAX_NAME_BYTES:
            raise self._refused(f"a name has at most {_MAX_NAME_BYTES} bytes, unlike {quote(name)}")
        return name

    def _string(self) -> str:
        try:
            text, self._at = _FIELDS_JSON.raw_decode(self._text, self._at)
            # An escape can spell a lone surrogate, which no UTF-8 text can hold.
            if not text.isascii():
                text.encode()
        except ValueError as error:
            raise self._refused(str(error)) from error
        return str(text)

    def _peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        character = self._text[self._at : self._at + 1]
        if character in _SPACES:
            match = _NOT_SPACE.search(self._text, self._at)
            self._at = match.start() if match else len(self._text)
            character = self._text[self._at : self._at + 1]
        return character

    def _skip_if(self, character: str) -> bool:
        if self._peek() != character:
            return False
        self._at += 1
        return True

    def _expect(self, character: str) -> None:
        if not self._skip_if(character):
            raise self._unexpected(f"Expecting {character!r}")

    def _demand(self, character: str, rule: str) -> None:
        if self._peek() != character:
            raise broken(self._where, rule, self._text[self._at : self._at + _short.maxstring])

    def _unexpected(self, problem: str) -> CheckpointFormatError:
        rest = self._text[self._at : self._at + _short.maxstring]
        return self._refused(f"{problem} at character {self._at}, got {quote(rest)}")

    def _refused(self, problem: str) -> CheckpointFormatError:
        return CheckpointFormatError(
            f"{self._where}: it must be a JSON object in UTF-8, but: {problem}; {AGAIN}"
        )


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {quote(name)} stands there twice")
    return result


def _natural(text: str) -> int:
    if text.startswith("-") or len(text) > len(str(_MAX_INT)) or int(text) > _MAX_INT:
        raise ValueError(f"numbers are whole, from 0 to 2**63 - 1, and {quote(text)} is not")
    return int(text)


def _no_number(text: str) -> object:
    raise ValueError(f"{quote(text)} is not allowed as a number")


def _unread_number(text: str) -> str:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number has at most {_MAX_DIGITS} digits, and {quote(text)} has more")
    return text


_SPACES = " \t\n\r"  # JSON's own, far fewer than Python's
_NOT_SPACE = re.compile(r"[^ \t\n\r]")
# The last quote may lack: an open string that matched nothing would be tried at every quote in it.
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
_DEPTH_CHANGES = {"{": 1, "[": 1, "}": -1, "]": -1}
_FIELDS_JSON = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_constant=_no_number,
    parse_float=_no_number,
    parse_int=_natural,
)
_OTHER_JSON = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_constant=_no_number,
    parse_float=_unread_number,
    parse_int=_unread_number,
)
