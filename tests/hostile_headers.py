"""Headers that mean no good: a corpus of named cases, mutators, and the reasons to refuse them.

A case is the JSON of a header, the data behind it, and who should accept it: "legal" (both the
library and nexus_ext), "illegal" (neither), or the name of the rule by which nexus_ext alone
refuses.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, deserialize

from nexus_ext.checkpoint import Entry, File, Stamp
from nexus_ext.safetensors_header import DTYPES, parse_header

FIELDS = ["dtype", "shape", "data_offsets"]
SIZES = {code: dtype.itemsize for code, dtype in DTYPES.items()}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# Dtypes of the library that torch has no element for, with bits.
FOREIGN = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}


class Case(NamedTuple):
    """The JSON of a header, the data behind it, and who accepts it."""

    head: bytes
    data: bytes
    verdict: str

    @property
    def file(self) -> bytes:
        return with_length(self.head) + self.data


def with_length(head: bytes) -> bytes:
    return len(head).to_bytes(8, "little") + head


# ------------------------------------------------------------------------------------ two judges

Found = dict[str, tuple[str, list[int], bytes]]


def library_finds(raw: bytes) -> Found | None:
    """What the library finds in a whole file: dtype, shape, data by name. None: it refuses."""
    try:
        found = deserialize(raw)  # type: ignore[no-untyped-call]
    except SafetensorError:
        return None
    return {name: (spec["dtype"], spec["shape"], bytes(spec["data"])) for name, spec in found}


def we_find(head: bytes, raw: bytes) -> Found:
    """What our parser alone finds, without the library behind it; raises what it raises."""
    return shown(parse_header(head, File(Path("fuzz"), Stamp(0, 0, len(raw), 0))), raw)


def shown(entries: list[Entry], raw: bytes) -> Found:
    return {
        entry.name: (
            CODES[entry.dtype],
            list(entry.shape),
            raw[entry.offset : entry.offset + entry.nbytes],
        )
        for entry in entries
    }


# -------------------------------------------------------------- where we refuse and it does not


class Pairs(list[tuple[str, Any]]):
    """A JSON object as it stands, equal keys included."""


def _tree(head: bytes) -> Pairs:
    """A header the library accepted, by a third parser, with every number as its text."""
    decoder = json.JSONDecoder(object_pairs_hook=Pairs, parse_int=Digits, parse_float=Digits)
    return decoder.decode(head.decode())  # type: ignore[no-any-return]


class Digits(str):
    """A number's text."""


def _nodes(tree: object) -> list[Any]:
    """The tree's values, all levels."""
    nodes = [tree]
    for node in nodes:
        if isinstance(node, Pairs):
            nodes += [value for _, value in node]
        elif isinstance(node, list):
            nodes += node
    return nodes


def _tensors(tree: Pairs) -> list[Any]:
    return [value for name, value in tree if name != "__metadata__"]


def _values(tree: Pairs, field: str) -> list[Any]:
    objects = [value for value in _tensors(tree) if isinstance(value, Pairs)]
    return [value for fields in objects for name, value in fields if name == field]


def _has_equal_keys(tree: Pairs) -> bool:
    objects = [node for node in _nodes(tree) if isinstance(node, Pairs)]
    return any(len({name for name, _ in pairs}) < len(pairs) for pairs in objects)


def _has_other_fields(tree: Pairs) -> bool:
    return any(
        not isinstance(value, Pairs) or sorted(name for name, _ in value) != sorted(FIELDS)
        for value in _tensors(tree)
    )


def _has_product_over_63_bits(tree: Pairs) -> bool:
    for shape in _values(tree, "shape"):
        count = 1
        for length in shape:
            count *= int(length)
            if count >= 2**63:
                return True
    return False


@dataclass(frozen=True)
class Rule:
    """A rule stricter than the library's: words of its message, and a proof that it applies."""

    words: str
    applies: Callable[[Pairs], bool]


STRICTER = {
    # The library keeps the last of two.
    "equal keys": Rule("stands there twice", _has_equal_keys),
    # It ignores fields that it does not know, and takes a list for an object.
    "other fields": Rule("dtype, shape and data_offsets, nothing else", _has_other_fields),
    # Numbers in a field that it ignores may be anything.
    "other numbers": Rule(" as a number", _has_other_fields),
    "null metadata": Rule(
        "__metadata__ maps strings",
        lambda tree: any(name == "__metadata__" and value is None for name, value in tree),
    ),
    "foreign dtype": Rule(
        "nexus_ext reads",
        lambda tree: not FOREIGN.keys().isdisjoint(map(str, _values(tree, "dtype"))),
    ),
    "64 bits": Rule(
        "2**63 - 1",
        lambda tree: any(
            isinstance(node, Digits) and (node.startswith("-") or int(node) >= 2**63)
            for node in _nodes(tree)
        ),
    ),
    "product": Rule("the product of a shape is below 2**63", _has_product_over_63_bits),
    "dimensions": Rule(
        "at most 32 dimensions",
        lambda tree: any(len(shape) > 32 for shape in _values(tree, "shape")),
    ),
    "long name": Rule(
        "a name has at most 4096 bytes",
        lambda tree: any(
            len(name.encode()) > 4096
            for node in _nodes(tree)
            if isinstance(node, Pairs)
            for name, _ in node
        ),
    ),
    "long fields": Rule("JSON of at most 4096 characters", lambda tree: True),  # see `reason`
}


def reason(head: bytes, message: str) -> str | None:
    """The stricter rule by which a header that the library accepts was refused, or None.

    The message must name the rule and the rule must apply. Of two equal names the library judges
    only the last, so that a header with such may be refused for a flaw of the first.
    """
    tree = _tree(head)
    for name, rule in STRICTER.items():
        if rule.words in message and rule.applies(tree):
            if name == "long fields" and len(head) <= 4096 and not _has_other_fields(tree):
                return None
            return name
    return "equal keys" if _has_equal_keys(tree) else None


# ------------------------------------------------------------------------------------ the corpus


def tensor(shape: str = "[2]", offsets: str = "[0,2]", dtype: str = '"U8"', name: str = "a") -> str:
    return f'"{name}":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


def header(*tensors: str) -> str:
    return "{" + ",".join(tensors) + "}"


def corpus() -> dict[str, Case]:
    """Every named case; most have two bytes of data."""
    cases: dict[str, Case] = {}

    def add(verdict: str, texts: dict[str, str | bytes], data: bytes = b"xx") -> None:
        for name, text in texts.items():
            assert name not in cases, name
            cases[name] = Case(text if isinstance(text, bytes) else text.encode(), data, verdict)

    add("legal", _legal())
    for dtype, itemsize in SIZES.items():
        offsets = f"[0,{2 * itemsize}]"
        head = header(tensor(offsets=offsets, dtype=f'"{dtype}"'))
        add("legal", {f"two of {dtype}": head}, b"x" * 2 * itemsize)
        add("illegal", {f"one more than two of {dtype}": head}, b"x" * (2 * itemsize + 1))
    for dtype, bits in FOREIGN.items():
        head = header(tensor("[8]", f"[0,{bits}]", f'"{dtype}"'))
        add("foreign dtype", {f"eight of {dtype}": head}, b"x" * bits)
    add("legal", _legal_without_data(), b"")
    add("illegal", _illegal_json())
    add("illegal", _illegal_values())
    add("illegal", _illegal_cover())
    for verdict, texts in _stricter().items():
        add(verdict, texts)
    add("product", {"a product over 2**63": header(tensor(f"[{2**62},2,0]", "[0,0]"))}, b"")
    add("64 bits", {"2**63 beside a 0": header(tensor(f"[0,{2**63}]", "[0,0]"))}, b"")
    add("dimensions", {"33 without bytes": header(tensor(_ones(32, "0"), "[0,0]"))}, b"")
    return cases


def _ones(count: int, last: str) -> str:
    return "[" + "1," * count + last + "]"


def _legal() -> dict[str, str | bytes]:
    plain = header(tensor())
    two = [tensor("[1]", "[0,1]"), tensor("[1]", "[1,2]", name="b")]
    names = {
        "an empty name": "",
        "a name like a path": "../../etc/passwd",
        "a name with NUL": "\\u0000",
        "a name of braces": "}{][,:",
        "a name with a quote": '\\"',
        "a name with an escape": "\\u00e9\\n\\/",
        "a name in Greek": "\u03b1\u03b2",
        "a name outside of the first plane": "\U0001f600",
        "a name as a surrogate pair": "\\ud83d\\ude00",
        "a name that is almost metadata": "__metadata",
        "a name of 4096 bytes": "n" * 4096,
    }
    return {
        "plain": plain,
        "two tensors": header(*two),
        "two tensors, the last first": header(*two[::-1]),
        "no dimension": header(tensor("[]", "[0,2]", '"U16"')),
        "32 dimensions": header(tensor(_ones(31, "2"))),
        "a tensor without bytes in front": header(tensor("[0]", "[0,0]", name="0"), tensor()),
        "a tensor without bytes behind": header(tensor(), tensor("[0]", "[2,2]", name="z")),
        "two without bytes between": header(
            two[0], *(tensor("[3,0]", "[1,1]", name=n) for n in "xy"), two[1]
        ),
        "metadata": header('"__metadata__":{"format":"pt"}', tensor()),
        "metadata behind": header(tensor(), '"__metadata__":{"a":"b","c":""}'),
        "empty metadata": header('"__metadata__":{}', tensor()),
        "spaces behind": plain + " " * 55,
        "all white space behind": plain + " \t\r\n",
        "white space everywhere": re.sub(r"([\[\]{},:])", " \\1\n\t\r", plain),
        "fields in another order": '{"a":{"data_offsets":[0,2],"shape":[2],"dtype":"U8"}}',
        "an escaped field": plain.replace("dtype", "\\u0064type"),
        "an escaped dtype": plain.replace("U8", "\\u00558"),
        **{name: header(tensor(name=text)) for name, text in names.items()},
    }


def _legal_without_data() -> dict[str, str | bytes]:
    empty = [tensor("[0]", "[0,0]", name=str(number)) for number in range(40)]
    return {
        "nothing": "{}",
        "nothing, with spaces": "{ \n}  ",
        "only metadata": '{"__metadata__":{"k":"v"}}',
        "only a tensor without bytes": header(empty[0]),
        "40 tensors without bytes": header(*empty),
        "a long side beside a 0": header(tensor(f"[0,{2**63 - 1}]", "[0,0]")),
    }


def _illegal_json() -> dict[str, str | bytes]:
    plain = header(tensor())
    latin = plain.encode().replace(b'"a"', b'"\xe9"')
    broken_utf8 = {
        f"UTF-8: {name}": plain.encode().replace(b'"a"', b'"' + raw + b'"')
        for name, raw in {
            "a lone continuation": b"\x80",
            "an overlong slash": b"\xc0\xaf",
            "a surrogate": b"\xed\xa0\x80",
            "above U+10FFFF": b"\xf4\x90\x80\x80",
            "cut": b"\xe2\x82",
        }.items()
    }
    escapes = {
        f"the escape {text}": header(tensor(name=text))
        for text in ("\\x61", "\\u12", "\\u12g4", "\\ud800", "\\udc00\\ud800", "\\ud800x", "\\'")
    }
    controls = {
        f"a raw {code:#04x} in a name": header(tensor(name=chr(code))) for code in (0, 9, 31)
    }
    numbers = {
        f"the number {text}": header(tensor(f"[{text}]"))
        for text in ("2.0", "2e0", "20e-1", "02", "+2", "-2", "-0", "0x2", "2_0", "\u0662", "NaN")
    }
    return {
        "empty": "",
        "only spaces": "  ",
        "only a brace": "{",
        "a list": "[]",
        "null": "null",
        "a string": '"a"',
        "a number": "2",
        "a byte order mark": "\ufeff" + plain,
        "UTF-16": plain.encode("utf-16-le"),
        "UTF-32": plain.encode("utf-32-le"),
        "Latin-1": latin,
        "text behind": plain + "x",
        "an object behind": plain + "{}",
        "a zero behind": plain + "\0",
        "a form feed behind": plain + "\f",
        "a space and a form feed behind": plain + " \f",
        "a space and a vertical tab behind": plain + "\n\v ",
        "a space and a wide space behind": plain + " \u3000",
        "a space and a line separator behind": plain + "\r\u2028",
        "a non-breaking space behind": plain + "\u00a0",
        "a zero in front": "\0" + plain,
        "no last brace": plain[:-1],
        "one brace too many": plain + "}",
        "a comma at the end": plain[:-1] + ",}",
        "a comma in front": "{," + plain[1:],
        "two commas": header(tensor("[1]", "[0,1]"), "", tensor("[1]", "[1,2]", name="b")),
        "no comma": header(tensor("[1]", "[0,1]") + tensor("[1]", "[1,2]", name="b")),
        "no colon": plain.replace('"a":', '"a"'),
        "an equals sign": plain.replace('"a":', '"a"='),
        "single quotes": plain.replace('"', "'"),
        "no quotes": plain.replace('"', ""),
        "a comment": "{/**/" + plain[1:],
        "a line comment": plain + "//",
        "an open string": plain[: plain.index("dtype")],
        "a name that is a number": '{1:{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
        "deep lists": '{"a":' + "[" * 100_000,
        "deep objects": '{"a":' * 100_000,
        "deep lists as metadata": '{"__metadata__":' + "[" * 100_000,
        "deep lists at the top": "[" * 100_000,
        "deep and closed": '{"a":' + "[" * 200 + "]" * 200 + "}",
        "Infinity": header(tensor("[Infinity]")),
        "a comma in a shape": header(tensor("[2,]")),
        **broken_utf8,
        **escapes,
        **controls,
        **numbers,
    }


def _illegal_values() -> dict[str, str | bytes]:
    plain = header(tensor())
    shapes = {
        f"the shape {text}": header(tensor(text))
        for text in ("2", "null", '"2"', "{}", "[[2]]", '["2"]', "[null]", "[true,2]", "[-1,-2]")
    }
    offsets = {
        f"the offsets {text}": header(tensor(offsets=text))
        for text in ("2", "null", "[]", "[2]", "[0,1,2]", "{}", "[0.0,2]", "[false,2]", '["0","2"]')
    }
    dtypes = {
        f"the dtype {text}": header(tensor(dtype=text))
        for text in ('"u8"', '"U9"', '""', '"U8 "', "null", "8", "[]", '["U8"]', '"torch.uint8"')
    }
    metadata = {
        f"the metadata {text}": header(f'"__metadata__":{text}', tensor())
        for text in ("[1]", "1", '"a"', "true", '{"a":1}', '{"a":null}', '{"a":{}}', '{"a":["b"]}')
    }
    lacking = {
        f"no {field}": json.dumps(
            {"a": {k: v for k, v in json.loads(plain)["a"].items() if k != field}}
        )
        for field in FIELDS
    }
    tensors = {
        f"the tensor {text}": f'{{"a":{text}}}'
        for text in ("null", "1", '"U8"', "true", "{}", "[]")
    }
    large = {
        f"the side {name}": header(tensor(f"[{number}]"))
        for name, number in {"2**64": 2**64, "2**200": 2**200, "of 5000 digits": "9" * 5000}.items()
    }
    return {
        **shapes,
        **offsets,
        **dtypes,
        **metadata,
        **lacking,
        **tensors,
        **large,
        "metadata with a surrogate": header('"__metadata__":{"a":"\\udc00"}', tensor()),
        "a wrapping product": header(tensor(f"[{2**32},{2**32},2]")),
        "a wrapping product of bytes": header(tensor(f"[{2**62}]", "[0,0]", '"F32"')),
        "an end of 2**64": header(tensor(offsets=f"[0,{2**64}]")),
        "an end of 2**64 + 2": header(tensor(offsets=f"[0,{2**64 + 2}]")),
        "an end of -2": header(tensor(offsets="[0,-2]")),
    }


def _illegal_cover() -> dict[str, str | bytes]:
    one, other = tensor("[1]", "[0,1]"), tensor("[1]", "[1,2]", name="b")
    return {
        "bytes without tensors": "{}",
        "bytes behind": header(one),
        "bytes in front": header(other),
        "a hole of no tensor": header(tensor("[0]", "[1,1]")),
        "an overlap": header(tensor(), other),
        "the same bytes twice": header(tensor(), tensor(name="b")),
        "one inside the other": header(tensor(), tensor("[0]", "[1,1]", name="b")),
        "a tensor behind the end": header(tensor(), tensor("[1]", "[2,3]", name="c")),
        "no bytes, behind the end": header(tensor(), tensor("[0]", "[3,3]", name="c")),
        "offsets that go back": header(tensor(offsets="[2,0]")),
        "too short for its shape": header(tensor("[3]")),
        "too long for its shape": header(tensor("[1]")),
        "too short for its dtype": header(tensor(dtype='"F32"')),
        "no dimension, two bytes": header(tensor("[]")),
        "offsets of the file": header(tensor(offsets="[60,62]")),
        "far offsets": header(tensor(offsets=f"[{2**62},{2**62 + 2}]")),
    }


def _stricter() -> dict[str, dict[str, str | bytes]]:
    inside = tensor()[:-1]
    return {
        "equal keys": {
            "a tensor twice": header(tensor(), tensor()),
            "a tensor twice, the first wrong": header(tensor("[9]"), tensor()),
            "a tensor twice, once escaped": header(tensor(), tensor(name="\\u0061")),
            "metadata twice over": header('"__metadata__":{"a":"b","a":"b"}', tensor()),
        },
        "other fields": {
            "a field too many": header(inside + ',"x":"y"}'),
            "an object too many": header(inside + ',"x":{"y":[]}}'),
            "an empty field name": header(inside + ',"":null}'),
            "a tensor as a list": '{"a":["U8",[2],[0,2]]}',
        },
        "other numbers": {"a float too many": header(inside + ',"x":1.5}')},
        "64 bits": {"a negative number too many": header(inside + ',"x":-1}')},
        "null metadata": {"metadata null": header('"__metadata__":null', tensor())},
        "dimensions": {
            "33 dimensions": header(tensor(_ones(32, "2"))),
            "1000 dimensions": header(tensor(_ones(999, "2"))),
        },
        "long name": {
            "a name of 4097 bytes": header(tensor(name="n" * 4097)),
            "a name of 4098 bytes, 2049 letters": header(tensor(name="\u00e9" * 2049)),
            "a name of a megabyte": header(tensor(name="n" * 10**6)),
            "a long name in the metadata": header(
                f'"__metadata__":{{"{"k" * 4097}":""}}', tensor()
            ),
        },
        "long fields": {
            "100,000 dimensions": header(tensor(_ones(99_999, "2"))),
            "many spaces in a tensor": header(tensor("[2" + " " * 5000 + "]")),
            "a long field too many": header(inside + ',"x":"' + "y" * 5000 + '"}'),
        },
    }


# ---------------------------------------------------------------------------------- the mutators

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|[ \t\r\n]+|.', re.DOTALL)
_MEMBER = re.compile(rb'"[^"]*":\{[^{}]*\}')
_WORDS = rb"""
"" "a" "b" "U8" "F32" "F4" "F8_E5M2FNUZ" "BOOL" "dtype" "shape" "data_offsets" "__metadata__"
"\ud800" "\u0061" "\ud83d\ude00" "\x" \n // 0 1 2 3 4 8 -0 -1 2.0 2e0 02 1e400 true false null NaN
Infinity [] {} [0] [1,1] [0,0] [0,2] [0,1,2] {"a":"b"} , : { } [ ] } ] ," ":
9223372036854775807 9223372036854775808 18446744073709551615 18446744073709551616 4294967296
"""
TOKENS = [*_WORDS.split(), *b'" \t\n\0\x0b\\\x80\xff'.split(b"|"), "\ufeff".encode(), b"[" * 300]
TOKENS += [bytes([code]) for code in b'" \t\n\r\f\0\x0b\\\x7f\x80\xc0\xff']
_CODES = [*SIZES, "U8", "U8", "F32", "F4"]
_NAMES = ["a", "b", "model.w", "\u00e9", "", "../x", "\\u0061", "\\n", '\\"', "}{"]

Mutant = tuple[bytes, bytes]


class Tokens:
    """Texts cut into JSON's tokens, which are replaced, inserted, dropped, swapped or repeated."""

    def __init__(self, texts: list[bytes], words: list[bytes]) -> None:
        self._texts = [_TOKEN.findall(text) for text in texts]
        self._words = words

    def mutated(self, rng: random.Random, number: int | None = None) -> bytes:
        """One of the texts, by its number or any, with one to three changes."""
        if number is None:
            number = int(rng.random() * len(self._texts))
        tokens = self._texts[number].copy()
        for _ in range(1 + int(rng.random() * 3)):
            if tokens:
                self._change(rng, tokens)
        return b"".join(tokens)

    def _change(self, rng: random.Random, tokens: list[bytes]) -> None:
        place, what = int(rng.random() * len(tokens)), int(rng.random() * 7)
        token = tokens[place]
        if what == 0:
            tokens[place] = rng.choice(self._words)
        elif what == 1:
            tokens.insert(place, rng.choice(self._words))
        elif what == 2:
            tokens[place] = b""
        elif what == 3:
            other = int(rng.random() * len(tokens))
            tokens[place], tokens[other] = tokens[other], token
        elif what == 4:
            tokens[place:place] = tokens[place : place + 1 + int(rng.random() * 12)]
        elif what == 5:
            tokens[place : place + 1 + int(rng.random() * 6)] = [b""]
        elif token.isdigit():
            tokens[place] = b"%d" % max(0, int(token) + int(rng.random() * 5) - 2)


class Mutator:
    """A seeded source of headers near the border between legal and illegal."""

    def __init__(self, seed: int, cases: dict[str, Case]) -> None:
        self._rng = random.Random(seed)
        # Large cases have their own tests; here they would only take time.
        self._small = [case for case in cases.values() if len(case.head) < 600]
        self._tokens = Tokens([case.head for case in self._small], TOKENS)

    def one(self) -> Mutant:
        """A header and its data."""
        rng = self._rng
        way = rng.random()
        head, data = self._built() if way < 0.5 else self._from_corpus()
        if way < 0.1 or way > 0.9:
            head = self._bytes_changed(head)
        if rng.random() < 0.06:
            data = data[:-1] if rng.random() < 0.5 else data + b"x"
        return head, data

    def _below(self, count: int) -> int:
        return int(self._rng.random() * count)

    def _built(self) -> Mutant:
        """A consistent header of one to four tensors, then often one thing that does not fit."""
        parts: list[list[object]] = []  # name, dtype, shape, start, end
        end = 0
        for number in range(1 + self._below(4)):
            name = _NAMES[self._below(len(_NAMES))] if self._below(3) == 0 else f"t{number}"
            dtype = _CODES[self._below(len(_CODES))]
            shape = [self._below(4) for _ in range(self._below(3))]
            nbytes = SIZES.get(dtype, 1)
            for length in shape:
                nbytes *= length
            parts.append([name, dtype, shape, end, end + nbytes])
            end += nbytes
        if self._below(4):
            self._bend(parts)
        texts = [self._written(part) for part in parts]
        if self._below(8) == 0:
            texts.insert(self._below(len(texts) + 1), '"__metadata__":{"k":"v"}')
        space = " " * self._below(9) if self._below(4) == 0 else ""
        return ("{" + ",".join(texts) + "}" + space).encode(), b"x" * end

    def _bend(self, parts: list[list[object]]) -> None:
        """Change one thing: a number, a name, a dtype, the order, the count."""
        where = self._below(len(parts))
        part, what = parts[where], self._below(8)
        if what == 0:
            part[3] = int(str(part[3])) + self._below(5) - 2
        elif what == 1:
            part[4] = int(str(part[4])) + self._below(5) - 2
        elif what == 2:
            part[2] = [self._below(5) for _ in range(self._below(4))]
        elif what == 3:
            part[1] = _CODES[self._below(len(_CODES))]
        elif what == 4:
            part[0] = parts[0][0]
        elif what == 5:
            parts.insert(self._below(len(parts)), parts.pop(where))  # legal in any order
        elif what == 6:
            parts.append(list(part))
        else:
            del parts[where]

    def _written(self, part: list[object]) -> str:
        name, dtype, shape, start, end = part
        if self._below(6) == 0:
            return f'"{name}":{{"shape":{shape},"data_offsets":[{start},{end}],"dtype":"{dtype}"}}'
        return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}'

    def _from_corpus(self) -> Mutant:
        number = self._below(len(self._small))
        case = self._small[number]
        if self._below(8) == 0:
            return self._members_changed(case.head), case.data
        return self._tokens.mutated(self._rng, number), case.data

    def _members_changed(self, head: bytes) -> bytes:
        """A whole tensor twice, or from another header, or not at all."""
        found = _MEMBER.findall(head)
        if not found:
            return head
        member, what = found[self._below(len(found))], self._below(3)
        if what == 0:
            return head.replace(member, member + b"," + member, 1)
        if what == 1:
            return head.replace(member, b"", 1)
        others = _MEMBER.findall(self._small[self._below(len(self._small))].head) or [b""]
        return head.replace(member, member + b"," + others[0], 1)

    def _bytes_changed(self, head: bytes) -> bytes:
        changed, what = bytearray(head or b"{"), self._below(4)
        place = self._below(len(changed))
        if what == 0:
            changed[place] ^= 1 << self._below(8)
        elif what == 1:
            changed[place] = self._below(256)
        elif what == 2:
            del changed[place]
        else:
            changed.insert(place, self._below(256))
        return bytes(changed)
