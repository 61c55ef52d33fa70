"""Where are the bytes of a group? Real files, hostile headers, and safetensors as the judge."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nexus_ext import checkpoint_files
from nexus_ext.checkpoint import (
    ALIGNMENT,
    DTYPE_NAMES,
    Checkpoint,
    Entry,
    Extent,
    File,
    Group,
    Member,
    Stamp,
)
from nexus_ext.errors import (
    CheckpointChanged,
    CheckpointError,
    CheckpointFormatError,
    CheckpointMismatch,
    ReadError,
    TruncatedCheckpoint,
)
from nexus_ext.safetensors_header import parse_header

Spec = dict[str, tuple[str, list[int], bytes]]


def write_raw(path: Path, header: bytes | str, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else header.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def write(path: Path, spec: Spec, padding: int = 0) -> Path:
    """Write a file in the order of `spec`; `padding` spaces move the data anywhere."""
    fields, data = {}, b""
    for name, (dtype, shape, raw) in spec.items():
        offsets = [len(data), len(data) + len(raw)]
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += raw
    return write_raw(path, json.dumps(fields) + " " * padding, data)


def tensor(shape: str = "[2]", offsets: str = "[0,2]", dtype: str = '"U8"', name: str = "a") -> str:
    return f'"{name}":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


def header(*tensors: str) -> str:
    return "{" + ",".join(tensors) + "}"


def write_index(path: Path, weight_map: object) -> Path:
    path.write_text(json.dumps({"metadata": {"total_size": 1.5}, "weight_map": weight_map}))
    return path


def write_shards(directory: Path, stem: str = "model") -> Path:
    """Two shards and their index; returns the index."""
    first, second = (f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2))
    write(directory / first, {"b": ("U8", [3], b"bbb"), "a": ("U8", [2], b"aa")})
    write(directory / second, {"c": ("U8", [1], b"c")})
    weight_map = {"c": second, "a": first, "b": first}
    return write_index(directory / f"{stem}.safetensors.index.json", weight_map)


def refusal(path: Path, error: type[CheckpointError] = CheckpointFormatError) -> str:
    with pytest.raises(error) as caught:
        Checkpoint.open(path)
    return str(caught.value)


def read(found: Checkpoint, group: Group) -> bytearray:
    """Do what an engine does: copy every extent to its place."""
    arena = bytearray(b"\xaa" * group.nbytes)
    for extent in group.extents:
        with open(found.files[extent.file].path, "rb") as stream:
            stream.seek(extent.offset)
            place = slice(extent.group_offset, extent.group_offset + extent.nbytes)
            arena[place] = stream.read(extent.nbytes)
    return arena


# ------------------------------------------------------------------------------- what is found


def test_a_file_is_opened_with_its_tensors_in_file_order(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.ones(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}, path)
    found = Checkpoint.open(path)
    (file,) = found.files
    status = path.stat()
    assert found.path == file.path == path
    assert file.stamp == Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    base = status.st_size - 24 - 10
    assert list(found.entries.values()) == [
        Entry("w", 0, torch.float32, (2, 3), base, 24),
        Entry("b", 0, torch.bfloat16, (5,), base + 24, 10),
    ]
    assert found.nbytes == 34


def test_the_entries_cannot_be_changed(tmp_path: Path) -> None:
    found = Checkpoint.open(write(tmp_path / "a.safetensors", {"a": ("U8", [1], b"x")}))
    with pytest.raises(TypeError):
        found.entries["b"] = found.entries["a"]  # type: ignore[index]


def test_a_file_without_tensors_is_a_checkpoint_of_no_bytes(tmp_path: Path) -> None:
    found = Checkpoint.open(write_raw(tmp_path / "a.safetensors", "{}"))
    assert found.nbytes == 0
    assert found.group("nothing", []) == Group("nothing", (), (), 0)


def test_shards_are_joined_in_the_order_of_their_names(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    for path in (index, tmp_path, str(tmp_path)):
        found = Checkpoint.open(path)
        assert found.path == index
        assert [file.path.name[:11] for file in found.files] == ["model-00001", "model-00002"]
        assert [(entry.name, entry.file) for entry in found.entries.values()] == [
            ("b", 0),
            ("a", 0),
            ("c", 1),
        ]


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.safetensors", {"a": ("U8", [1], b"x")})
    monkeypatch.chdir(tmp_path)
    found = Checkpoint.open("a.safetensors")
    assert found.path == found.files[0].path == tmp_path / "a.safetensors"


def test_a_directory_prefers_model_safetensors_then_its_index(tmp_path: Path) -> None:
    write_shards(tmp_path)
    write_shards(tmp_path, "other")
    assert Checkpoint.open(tmp_path).path.name == "model.safetensors.index.json"
    write(tmp_path / "model.safetensors", {"z": ("U8", [1], b"z")})
    assert list(Checkpoint.open(tmp_path).entries) == ["z"]


def test_a_directory_with_one_file_of_any_name_is_enough(tmp_path: Path) -> None:
    write(tmp_path / "diffusion_pytorch_model.safetensors", {"a": ("U8", [1], b"x")})
    (tmp_path / "config.json").write_text("{}")
    assert list(Checkpoint.open(tmp_path).entries) == ["a"]


def test_an_index_of_any_name_wins_over_a_shard_that_arrived_alone(tmp_path: Path) -> None:
    write_shards(tmp_path, "diffusion_pytorch_model")
    assert len(Checkpoint.open(tmp_path).files) == 2
    (tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    assert "diffusion_pytorch_model-00002-of-00002.safetensors" in refusal(tmp_path)


def test_an_ambiguous_directory_is_refused_with_its_names(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / f"{name}.safetensors", {"a": ("U8", [1], b"x")})
    message = refusal(tmp_path)
    assert "exactly one file" in message
    assert "'one.safetensors', 'two.safetensors'; name the file to open" in message


def test_an_empty_directory_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert "model.safetensors.index.json" in message
    assert f"{tmp_path} holds nothing" in message


def test_a_directory_that_cannot_be_listed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "listdir", denied)
    message = refusal(tmp_path)
    assert f"the directory {str(tmp_path)!r} must be there and readable" in message
    assert "Permission denied" in message


@pytest.mark.parametrize("name", ["absent.safetensors", "absent", "x.index.json", "a\0b", "\ud800"])
def test_a_missing_path_is_refused_with_what_was_looked_for(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path / name)
    assert repr(str(tmp_path / name)) in message
    assert "a checkpoint is a .safetensors file" in message


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pytorch_model{suffix}"
    path.write_bytes(b"\x80\x02}q\x00.")
    for given in (path, tmp_path):
        message = refusal(given)
        assert "only safetensors is read" in message
        assert str(path) in message
        assert "safetensors.torch.save_file" in message
        assert "save_pretrained" in message


def test_an_index_over_pickles_is_refused_as_one(tmp_path: Path) -> None:
    index = write_index(tmp_path / "pytorch_model.bin.index.json", {"a": "pytorch_model-1.bin"})
    assert "only safetensors is read" in refusal(index)


# --------------------------------------------------------------------------- links and specials


def hub_layout(root: Path) -> Path:
    """What huggingface_hub leaves on disk: a snapshot of links to blobs. Returns the snapshot."""
    blobs, snapshot = root / "blobs", root / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_shards(snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / f"sha{number}")
        path.symlink_to(Path("..", "..", "blobs", f"sha{number}"))
    return snapshot


def test_the_links_of_a_hub_snapshot_are_followed_to_the_blobs(tmp_path: Path) -> None:
    found = Checkpoint.open(hub_layout(tmp_path))
    blobs = tmp_path / "blobs"
    assert [file.path for file in found.files] == [blobs / "sha0", blobs / "sha1"]
    assert found.path == tmp_path / "snapshots" / "abc" / "model.safetensors.index.json"
    assert read(found, found.group("g", "abc"))[:3] == b"bbb"


def test_a_link_to_a_single_blob_is_followed(tmp_path: Path) -> None:
    link = hub_layout(tmp_path) / "model-00002-of-00002.safetensors"
    assert Checkpoint.open(link).files[0].path == tmp_path / "blobs" / "sha1"


@pytest.mark.parametrize("target", ["absent", "model.safetensors"])
def test_a_link_that_dangles_or_loops_is_refused(tmp_path: Path, target: str) -> None:
    link = tmp_path / "model.safetensors"
    link.symlink_to(target)
    for path in (link, tmp_path):
        assert repr(str(link)) in refusal(path)


def opened_in_time(path: Path) -> str:
    """The refusal of `path`, got in a thread so that a hang fails the test and not the run."""
    messages: list[str] = []
    thread = threading.Thread(target=lambda: messages.append(refusal(path)), daemon=True)
    thread.start()
    thread.join(10)
    assert messages, f"opening {path} hung or did not refuse"
    return messages[0]


def test_a_fifo_is_refused_without_hanging(tmp_path: Path) -> None:
    fifo = tmp_path / "model.safetensors"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path):
        assert f"{fifo} must be a regular file, but is a FIFO" in opened_in_time(path)


def test_a_fifo_as_index_or_shard_is_refused_without_hanging(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "shard.safetensors")
    index = write_index(tmp_path / "a.index.json", {"a": "shard.safetensors"})
    assert "the shard named by a.index.json, " in opened_in_time(index)
    os.mkfifo(tmp_path / "b.index.json")
    message = opened_in_time(tmp_path / "b.index.json")
    assert re.search(r"the index .*b\.index\.json must be a regular file, but is a FIFO", message)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_a_link_to_a_device_is_refused(tmp_path: Path, device: str) -> None:
    (tmp_path / "model.safetensors").symlink_to(device)
    assert "is a character device" in opened_in_time(tmp_path)


def test_a_directory_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert "must be a regular file, but is a directory" in refusal(tmp_path)


# ---------------------------------------------------------------------------------- the headers

MALFORMED: dict[str, tuple[str | bytes, str]] = {  # each with two bytes of data
    "no JSON": ("{", "JSON object in UTF-8, but: Expecting"),
    "no UTF-8": (b'{"\xff":1}', "can't decode byte 0xff"),
    "UTF-16": ("{}".encode("utf-16"), "JSON object in UTF-8"),
    "a byte order mark": ("\ufeff" + header(tensor()), "JSON object in UTF-8"),
    "a list": ("[]", "JSON object in UTF-8, but: Expecting '{' at character 0, got '[]'"),
    "empty": ("", "Expecting '{' at character 0, got ''"),
    "text after the object": (header(tensor()) + "{}", "Extra data"),
    "zeros after the object": (header(tensor()) + "\0\0", "Extra data"),
    "deep nesting": ("[" * 200_000, "Expecting '{' at character 0, got '[[["),
    "deep nesting in a tensor": ('{"a":' + "[" * 200_000, "'a' must be JSON of at most 4096"),
    "deep nesting in metadata": ('{"__metadata__":' + "[" * 200_000, "maps strings to strings"),
    "a tensor twice": (header(tensor(), tensor()), "the key 'a' stands there twice"),
    "a field twice": (
        header(tensor()[:-1] + ',"shape":[2]}'),
        "the key 'shape' stands there twice",
    ),
    "metadata twice": (header(*['"__metadata__":{}'] * 2, tensor()), "stands there twice"),
    "metadata null": ('{"__metadata__":null}', "maps strings to strings, but got 'null}'"),
    "metadata list": ('{"__metadata__":[]}', "maps strings to strings, but got '[]}'"),
    "metadata number": ('{"__metadata__":{"a":1}}', "strings to strings, but got '1}}'"),
    "a lone surrogate": (header(tensor(name=r"\ud800")), "surrogates not allowed"),
    "a surrogate in metadata": (r'{"__metadata__":{"a":"\udc00"}}', "surrogates not allowed"),
    "NaN": (header(tensor("[NaN]")), "'NaN' is not allowed"),
    "Infinity": (header(tensor(offsets="[0,-Infinity]")), "'-Infinity' is not allowed"),
    "a float": (header(tensor("[2.0]")), "'2.0' is not allowed"),
    "an exponent": (header(tensor(offsets="[0,2e0]")), "'2e0' is not allowed"),
    "negative sizes": (header(tensor("[-1,-2]")), "from 0 to 2**63 - 1, and '-1' is not"),
    "minus zero": (header(tensor(offsets="[-0,2]")), "'-0' is not"),
    "2**63": (header(tensor(f"[0,{2**63}]", "[0,0]")), f"'{2**63}' is not"),
    "5000 digits": (header(tensor("[" + "9" * 5000 + "]")), "from 0 to 2**63 - 1, and '9999"),
    "true as a size": (header(tensor("[true,2]")), "shape is a list of whole numbers"),
    "false as an offset": (header(tensor(offsets="[false,2]")), "two whole numbers"),
    "a shape that is no list": (header(tensor("2")), "shape is a list of whole numbers"),
    "one offset": (header(tensor(offsets="[2]")), "two whole numbers, but got [2]"),
    "three offsets": (header(tensor(offsets="[0,1,2]")), "two whole numbers"),
    "offsets as an object": (header(tensor(offsets="{}")), "two whole numbers"),
    "a missing field": ('{"a":{"dtype":"U8","shape":[2]}}', "dtype, shape and data_offsets"),
    "an unknown field": (header(tensor()[:-1] + ',"x":0}'), "nothing else, but got"),
    "a tensor that is a list": ('{"a":["U8",[2],[0,2]]}', "nothing else, but got"),
    "an unknown dtype": (header(tensor(dtype='"U9"')), "but got 'U9'"),
    "a dtype that is no text": (header(tensor(dtype="[]")), "but got []"),
    "sizes that disagree": (header(tensor(dtype='"F32"')), "F32 with shape [2] takes 8 bytes"),
    "offsets that go back": (header(tensor(offsets="[2,0]")), "but got -2"),
    "a product over 2**63": (header(tensor(f"[{2**62},4,0]", "[0,0]")), "below 2**63"),
    "a first offset after 0": (header(tensor("[1]", "[1,2]")), "no hole, no overlap"),
    "a hole": (header(tensor("[0]", "[0,0]"), tensor("[1]", "[1,2]", name="b")), "no hole"),
    "an overlap": (header(tensor(), tensor("[1]", "[1,2]", name="b")), "'b': it starts at"),
    "the same bytes twice": (header(tensor(), tensor(name="b")), "no hole, no overlap"),
    "bytes after the tensors": (header(tensor("[1]", "[0,1]")), "ends where its last tensor"),
    "bytes without tensors": ("{}", "the file ends where its last tensor does"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_header_is_refused_naming_file_and_flaw(tmp_path: Path, case: str) -> None:
    text, fragment = MALFORMED[case]
    path = write_raw(tmp_path / "model.safetensors", text, b"xx")
    message = refusal(path)
    assert str(path) in message
    assert fragment in message
    assert "safetensors.torch.save_file" in message  # what to do


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_a_dtype_only_safetensors_knows_is_refused_by_name(tmp_path: Path, dtype: str) -> None:
    text = header(tensor("[8]", "[0,8]", json.dumps(dtype), "deep.w"))
    message = refusal(write_raw(tmp_path / "model.safetensors", text, b"x" * 8))
    assert "tensor 'deep.w': nexus_ext reads" in message
    assert "safetensors knows more, such as F4" in message
    assert f"but got '{dtype}'" in message


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
def test_a_header_length_above_the_limit_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    message = refusal(path)
    assert "offset 0" in message
    assert "header length up to 100000000" in message
    assert str(length) in message


def test_a_git_lfs_pointer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "download the file again" in refusal(path)


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_too_short_for_a_length_is_truncated(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * size)
    message = refusal(path, TruncatedCheckpoint)
    assert f"must have 8 bytes for the length of its header, but has {size}" in message


def test_a_file_at_any_length_below_its_own_is_truncated_with_both_sizes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a": ("U8", [2], b"xx"), "b": ("U8", [3], b"yyy")})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        message = refusal(path, TruncatedCheckpoint)
        assert f"but has {size};" in message
    assert f"{path} must have {len(whole)} bytes for tensor 'b' at offset" in message


def test_long_names_are_shortened_in_messages(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.safetensors", header(tensor("[1]", name="n" * 10**6)), b"xx")
    assert len(refusal(path)) < 1000


def test_what_only_the_library_refuses_is_refused_in_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "parse_header", lambda *_: [])
    path = write_raw(tmp_path / "model.safetensors", header(tensor()), b"xxx")
    message = refusal(path)
    assert "the safetensors library must accept the header at offset 8, but says" in message


def test_only_headers_are_read(tmp_path: Path) -> None:
    size = 2**37  # 128 GiB in a sparse file: reading or copying them would not go unnoticed
    path = write_raw(tmp_path / "model.safetensors", header(tensor(f"[{size}]", f"[0,{size}]")))
    os.truncate(path, path.stat().st_size + size)
    assert Checkpoint.open(path).nbytes == size


def test_descriptors_are_closed_whatever_happens(tmp_path: Path) -> None:
    good = write(tmp_path / "good.safetensors", {"a": ("U8", [1], b"x")})
    bad = write_raw(tmp_path / "bad.safetensors", header(tensor()), b"xxx")
    os.mkfifo(tmp_path / "fifo.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        Checkpoint.open(good)
        refusal(bad)
        refusal(tmp_path / "fifo.safetensors")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_modified_while_its_header_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.safetensors", {"a": ("U8", [1], b"x")})

    def touching(raw: bytes, file: File, number: int) -> list[Entry]:
        os.utime(path, ns=(1, 1))
        return parse_header(raw, file, number)

    monkeypatch.setattr(checkpoint_files, "parse_header", touching)
    assert f"{path} did; open the checkpoint again" in refusal(path, CheckpointChanged)


def test_a_file_that_shrinks_while_its_header_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.safetensors", {"a": ("U8", [1], b"x")})
    pread = os.pread

    def shrinking(descriptor: int, nbytes: int, offset: int) -> bytes:
        os.truncate(path, 0)
        return pread(descriptor, nbytes, offset)

    monkeypatch.setattr(os, "pread", shrinking)
    assert str(path) in refusal(path, CheckpointChanged)


def test_short_reads_of_a_header_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.safetensors", {"a": ("U8", [1], b"x")})
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, nbytes, offset: pread(fd, min(nbytes, 3), offset))
    assert list(Checkpoint.open(path).entries) == ["a"]


def test_a_disk_error_names_file_and_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.safetensors", {"a": ("U8", [1], b"x")})

    def failing(descriptor: int, nbytes: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(
        ReadError, match=f"{path} must be readable at offset 0, but: .*Input/output"
    ):
        Checkpoint.open(path)


# ------------------------------------------------------------------------------------ the index


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    missing = tmp_path / "model-00002-of-00002.safetensors"
    missing.unlink()
    message = refusal(index)
    assert "the shard named by model.safetensors.index.json" in message
    assert repr(str(missing)) in message


SHARD_NAMES = [
    *("", ".", "..", "/", "\\", "./a.safetensors", "a.safetensors/", "//a.safetensors"),
    *("../a.safetensors", "..\\a.safetensors", "sub/a.safetensors", "sub\\a.safetensors"),
    *("sub/../a.safetensors", "/etc/passwd", "\\\\server\\share", "//server/share"),
    *("C:a.safetensors", "C:\\a.safetensors", "c:/a.safetensors", "\\\\?\\C:\\a", "Z:"),
    *("a.safetensors\0", "\0", "a\0/../b", "a\nb.safetensors", "\x1b[2Ja", "a\u202eb", "\x7f"),
]


@pytest.mark.parametrize("name", SHARD_NAMES)
def test_a_shard_name_that_is_no_plain_name_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.safetensors", {"a": ("U8", [1], b"x")})
    message = refusal(write_index(tmp_path / "m.safetensors.index.json", {"a": name}))
    assert "a shard is the plain name of a file beside the index" in message
    assert repr(name) in message


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("[]", "JSON object in UTF-8, but: Expecting '{' at character 0, got '[]'"),
        ("{}", "weight_map maps tensor names to file names, but got None"),
        ('{"weight_map":[]}', "weight_map maps tensor names"),
        ('{"weight_map":{"a":1}}', "weight_map maps tensor names"),
        ('{"weight_map":{"a":null}}', "weight_map maps tensor names"),
        ('{"weight_map":{},"weight_map":{}}', "the key 'weight_map' stands there twice"),
        ('{"weight_map":{"a":"x","a":"y"}}', "the key 'a' stands there twice"),
        ('{"weight_map":{},"metadata":NaN}', "'NaN' is not allowed"),
        ('{"weight_map":{"a":"\\ud800"}}', "surrogates not allowed"),
        ('{"weight_map":' + "[" * 200_000, "weight_map maps tensor names"),
        ('{"x":' + "[" * 200_000, "'x' is nested deeper than 16"),
        ('{"x":"' + r"\"" * 1_000_000, "'x' must be JSON of at most 1048576 characters"),
        ('{"weight_map":{},"x":[1,' + "[]," * 400_000 + "2]}", "'x' must be JSON of at most"),
        ('{"weight_map":{},"metadata":' + "9" * 5000 + "}", "JSON object in UTF-8, but"),
        ("\ufeff{}", "JSON object in UTF-8"),
    ],
)
def test_a_malformed_index_is_refused(tmp_path: Path, text: str, fragment: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text, encoding="utf-8")
    message = refusal(path)
    assert str(path) in message
    assert fragment in message


def test_an_index_above_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.touch()
    os.truncate(path, 100_000_001)
    assert "an index has at most 100000000 bytes, but got 100000001" in refusal(path)


def test_a_listed_tensor_must_be_in_its_shard(tmp_path: Path) -> None:
    write(tmp_path / "s.safetensors", {"a": ("U8", [1], b"x")})
    names = {f"t{number:02}": "s.safetensors" for number in range(12)}
    index = write_index(tmp_path / "m.index.json", {"a": "s.safetensors", **names})
    message = refusal(index)
    assert "'s.safetensors' lacks 12: 't00', 't01'" in message
    assert "'t09' and 2 more; download index and shards again" in message


def test_an_unlisted_tensor_is_refused_with_at_most_ten_names(tmp_path: Path) -> None:
    spec: Spec = {f"t{number:02}": ("U8", [1], b"x") for number in range(30)}
    write(tmp_path / "s.safetensors", spec)
    message = refusal(write_index(tmp_path / "m.index.json", {"t00": "s.safetensors"}))
    assert "'s.safetensors' also holds, which the index puts elsewhere or nowhere, 29:" in message
    assert "'t10' and 19 more" in message
    assert "t11" not in message


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    spec: Spec = {"c": ("U8", [1], b"c"), "a": ("U8", [2], b"aa")}
    write(tmp_path / "model-00002-of-00002.safetensors", spec)
    message = refusal(index)
    assert "every tensor is in the one shard that the index names" in message
    assert "'model-00002-of-00002.safetensors' also holds" in message
    assert "1: 'a'" in message


def test_two_names_for_one_shard_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "s.safetensors", {"a": ("U8", [1], b"x"), "b": ("U8", [1], b"y")})
    (tmp_path / "t.safetensors").symlink_to("s.safetensors")
    weight_map = {"a": "s.safetensors", "b": "t.safetensors"}
    assert "also holds" in refusal(write_index(tmp_path / "m.index.json", weight_map))


# ----------------------------------------------------------------------------------- the groups


def test_members_stand_on_boundaries_and_neighbours_share_an_extent(tmp_path: Path) -> None:
    spec: Spec = {
        "a": ("U8", [128], b"a" * 128),
        "b": ("F32", [16], b"b" * 64),  # touches a in the file and in the group
        "c": ("U8", [5], b"c" * 5),  # touches b as well
        "d": ("U8", [64], b"d" * 64),  # touches c in the file, but not in the group
    }
    found = Checkpoint.open(write(tmp_path / "a.safetensors", spec))
    base = found.entries["a"].offset
    group = found.group("block", ["d", "b", "a", "c", "a"])
    assert group == Group(
        "block",
        (
            Member("a", torch.uint8, (128,), 0, 128),
            Member("b", torch.float32, (16,), 128, 64),
            Member("c", torch.uint8, (5,), 192, 5),
            Member("d", torch.uint8, (64,), 256, 64),
        ),
        (Extent(0, base, 197, 0), Extent(0, base + 197, 64, 256)),
        320,
    )
    assert group.file_bytes == 261
    assert not group.is_contiguous


def test_a_gap_in_the_file_separates_extents(tmp_path: Path) -> None:
    spec: Spec = {name: ("U8", [64], name.encode() * 64) for name in "abc"}
    found = Checkpoint.open(write(tmp_path / "a.safetensors", spec))
    assert [extent.group_offset for extent in found.group("g", "ac").extents] == [0, 64]
    assert found.group("g", "abc").is_contiguous
    assert found.group("g", "bc").is_contiguous


def test_a_padded_tail_is_still_contiguous(tmp_path: Path) -> None:
    found = Checkpoint.open(write(tmp_path / "a.safetensors", {"a": ("U8", [5], b"abcde")}))
    group = found.group("g", ["a"])
    assert group.is_contiguous
    assert (group.nbytes, group.file_bytes) == (64, 5)


def test_extents_do_not_reach_over_files(tmp_path: Path) -> None:
    """Equal offsets in another file are no neighbours."""
    first = write(tmp_path / "1.safetensors", {"a": ("U8", [64], b"a" * 64)})
    end = first.stat().st_size
    spec: Spec = {"p": ("U8", [64], b"p" * 64), "b": ("U8", [64], b"b" * 64)}
    plain = write(tmp_path / "2.safetensors", spec).stat().st_size - 64
    if plain < end:
        write(tmp_path / "2.safetensors", spec, end - plain)
    else:
        write(first, {"a": ("U8", [64], b"a" * 64)}, plain - end)
    weight_map = {"a": "1.safetensors", "p": "2.safetensors", "b": "2.safetensors"}
    found = Checkpoint.open(write_index(tmp_path / "m.index.json", weight_map))
    assert found.entries["a"].offset + 64 == found.entries["b"].offset
    assert [extent.file for extent in found.group("g", "ab").extents] == [0, 1]


def test_tensors_without_bytes_are_members_without_extents(tmp_path: Path) -> None:
    spec: Spec = {
        "x": ("F32", [0, 3], b""),
        "a": ("U8", [64], b"a" * 64),
        "y": ("F64", [0], b""),
        "b": ("U8", [64], b"b" * 64),
    }
    found = Checkpoint.open(write(tmp_path / "a.safetensors", spec))
    group = found.group("g", spec)
    assert [(member.name, member.offset) for member in group.members] == [
        ("x", 0),
        ("a", 0),
        ("y", 64),
        ("b", 64),
    ]
    assert len(group.extents) == 1  # y stands between a and b and does not part them
    empty = found.group("g", ["x", "y"])
    assert (empty.nbytes, empty.extents, empty.is_contiguous) == (0, (), False)


def test_an_unknown_tensor_is_a_mismatch_that_shows_real_names(tmp_path: Path) -> None:
    found = Checkpoint.open(write(tmp_path / "a.safetensors", {"model.a": ("U8", [1], b"x")}))
    with pytest.raises(CheckpointMismatch) as caught:
        found.group("layer 3", ["model.a", "b", "c"])
    message = str(caught.value)
    assert "group 'layer 3' must be in" in message
    assert str(tmp_path / "a.safetensors") in message
    assert "which lacks 2: 'b', 'c'; compare with its names: 'model.a'" in message


@pytest.mark.parametrize("padding", [*range(9), 31, 63, 4095])
def test_identical_blocks_get_identical_offsets_wherever_the_data_start(
    tmp_path: Path, padding: int
) -> None:
    sizes = {"q": 12, "k": 128, "v": 7, "norm": 1}
    spec: Spec = {
        f"layers.{layer}.{name}": ("U8", [size], bytes([65 + layer]) * size)
        for layer in range(5)
        for name, size in sizes.items()
    }
    found = Checkpoint.open(write(tmp_path / "a.safetensors", spec, padding))
    layouts = set()
    for layer in range(5):
        group = found.group(f"{layer}", [f"layers.{layer}.{name}" for name in sizes])
        layouts.add((group.nbytes, *((m.name.rpartition(".")[2], m.offset) for m in group.members)))
        assert set(read(found, group)) == {0xAA, 65 + layer}
    assert layouts == {(320, ("q", 0), ("k", 64), ("v", 192), ("norm", 256))}


def test_padding_moves_the_data_to_every_alignment(tmp_path: Path) -> None:
    spec: Spec = {"a": ("F32", [3], b"0123456789ab")}
    residues = set()
    for padding in range(ALIGNMENT):
        found = Checkpoint.open(write(tmp_path / "a.safetensors", spec, padding))
        residues.add(found.entries["a"].offset % ALIGNMENT)
        assert read(found, found.group("g", "a"))[:12] == b"0123456789ab"
    assert residues == set(range(ALIGNMENT))


DTYPES = sorted(DTYPE_NAMES, key=str)


def random_tensor(rng: random.Random) -> torch.Tensor:
    dtype = rng.choice(DTYPES)
    shape = [rng.choice([0, 1, 2, 3, 5, 16, 17]) for _ in range(rng.randrange(4))]
    value = torch.empty(shape, dtype=dtype)
    raw = rng.randbytes(value.nbytes)
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    if raw:
        value = torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)
    return value


def member_view(arena: bytearray, member: Member) -> torch.Tensor:
    if not member.nbytes:
        return torch.empty(member.shape, dtype=member.dtype)
    part = memoryview(arena)[member.offset : member.offset + member.nbytes]
    return torch.frombuffer(part, dtype=member.dtype).reshape(member.shape)


def as_bytes(value: torch.Tensor) -> bytes:
    return bytes(value.reshape(-1).view(torch.uint8).numpy()) if value.nbytes else b""


@pytest.mark.parametrize("seed", range(8))
def test_reading_the_extents_gives_every_tensor_that_was_saved(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(25):
        saved = {f"t{number}": random_tensor(rng) for number in range(rng.randrange(1, 14))}
        metadata = {"note": "n" * rng.randrange(70)}
        save_file(saved, tmp_path / "model.safetensors", metadata)
        found = Checkpoint.open(tmp_path)
        assert found.nbytes == sum(value.nbytes for value in saved.values())
        group = found.group("some", rng.sample(sorted(saved), rng.randint(1, len(saved))))
        arena = read(found, group)
        assert group.nbytes % ALIGNMENT == 0
        assert group.file_bytes == sum(member.nbytes for member in group.members)
        for member in group.members:
            value = saved[member.name]
            assert member.offset % ALIGNMENT == 0
            assert (member.dtype, member.shape) == (value.dtype, tuple(value.shape))
            assert as_bytes(member_view(arena, member)) == as_bytes(value)


# ------------------------------------------------------------------------------ the fingerprint


def test_the_fingerprint_is_stable_until_a_file_changes(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    before = Checkpoint.open(index).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", before)
    assert Checkpoint.open(tmp_path).fingerprint == before
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shutil.copy2(shard, tmp_path / "copy")  # same name, size and mtime, another inode
    os.replace(tmp_path / "copy", shard)
    replaced = Checkpoint.open(index).fingerprint
    os.utime(shard, ns=(1, 1))
    assert len({before, replaced, Checkpoint.open(index).fingerprint}) == 3
