"""Blobs: what is written is read, and nothing else; the two ops that make them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from nexus_ext import ops
from nexus_ext.cache import header
from nexus_ext.cache.blob import BLOCK_BYTES, Header, open_blob, read_header, tensors_of, write_blob
from nexus_ext.cache.reading import BlockMode, check_blocks, read_payload
from nexus_ext.engine import Faults
from nexus_ext.errors import ConfigError, CorruptCheckpoint, EngineError, ReadError, WriteError

PAGE = 4096
OPS = torch.ops.nexus
ALWAYS = 1_000_000  # of a million reads
SIZES = sorted(
    {0, 1}
    | {n + d for n in (PAGE, 2 * PAGE, BLOCK_BYTES, 2 * BLOCK_BYTES) for d in (-1, 0, 1)}
    | {BLOCK_BYTES + PAGE - 1, 3 * BLOCK_BYTES + 12345}
)
MODES = {
    "direct, ring": BlockMode("direct"),
    "direct, threads": BlockMode("direct", use_uring=False),
    "buffered": BlockMode("buffered"),
}


def random_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def header_of(*parts: Any, key: str = "key") -> tuple[Header, list[torch.Tensor]]:
    tensors = tensors_of(parts)
    return Header.of(key, "layer", {"of": "a test"}, 123, tensors), tensors


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(*parts: Any, name: str = "blob.nx") -> Path:
        header, tensors = header_of(*parts)
        path = tmp_path / "ab" / name
        write_blob(path, path.with_name("temporary"), header, tensors, 0o600)
        return path

    return make


@pytest.fixture
def opened() -> Iterator[Callable[[Path], int]]:
    descriptors: list[int] = []

    def open_one(path: Path) -> int:
        descriptors.append(open_blob(path))
        return descriptors[-1]

    yield open_one
    for descriptor in descriptors:
        os.close(descriptor)


def read_back(descriptor: int, mode: BlockMode = MODES["direct, ring"]) -> torch.Tensor:
    header = read_header(descriptor, "blob")
    return read_payload(descriptor, header, "blob", mode)[0]


# -- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("nbytes", SIZES)
def test_what_is_written_is_read(
    write: Callable[..., Path], opened: Callable[[Path], int], nbytes: int, mode: str
) -> None:
    data = random_bytes(nbytes)
    descriptor = opened(write(data[: nbytes // 3], data[nbytes // 3 :]))
    header = read_header(descriptor, "blob")
    out, report = read_payload(descriptor, header, "blob", MODES[mode])
    assert torch.equal(out, data)
    assert (header.key, header.kind, header.about, header.created_ns) == (
        "key",
        "layer",
        {"of": "a test"},
        123,
    )
    assert header.header_nbytes % PAGE == 0
    assert report.nbytes == nbytes
    assert report.num_second == report.num_plain == 0
    assert check_blocks(descriptor, header, "blob", MODES[mode]) == nbytes


def test_a_read_into_memory_on_a_page_boundary_stages_the_tail_alone(
    write: Callable[..., Path], opened: Callable[[Path], int]
) -> None:
    descriptor = opened(write(random_bytes(2 * BLOCK_BYTES + PAGE + 7)))
    report = read_payload(descriptor, read_header(descriptor, "blob"), "blob", BlockMode("direct"))[
        1
    ]
    # Where direct reads are refused nothing is staged at all.
    assert report.bytes_staged < PAGE if report.is_direct else report.bytes_staged == 0


def test_memory_at_an_odd_address_is_filled_too(
    write: Callable[..., Path], opened: Callable[[Path], int]
) -> None:
    data = random_bytes(BLOCK_BYTES + 77)
    descriptor = opened(write(data))
    out = torch.zeros(data.numel() + 3, dtype=torch.uint8)[3:]
    header = read_header(descriptor, "blob")
    filled, _ = read_payload(descriptor, header, "blob", BlockMode("direct"), out)
    assert filled.data_ptr() == out.data_ptr()
    assert torch.equal(out, data)


def test_a_header_longer_than_a_page_is_read(
    write: Callable[..., Path], opened: Callable[[Path], int], tmp_path: Path
) -> None:
    tensors = tensors_of([random_bytes(100)])
    about = {"words": "x" * 3 * PAGE}
    header = Header.of("key", "layer", about, 5, tensors)
    path = tmp_path / "cd" / "long.nx"
    write_blob(path, path.with_name("t"), header, tensors, 0o600)
    again = read_header(opened(path), "blob")
    assert again.about == about
    assert again.header_nbytes == 4 * PAGE
    assert torch.equal(read_back(opened(path)), tensors[0])


@pytest.mark.parametrize(
    "part",
    [
        b"\x01\x02\x03",
        bytearray(b"\x01\x02\x03"),
        memoryview(b"\x01\x02\x03"),
        torch.tensor([[1, 2, 3]], dtype=torch.uint8),
    ],
    ids=["bytes", "bytearray", "memoryview", "tensor"],
)
def test_any_contiguous_buffer_is_a_part(
    write: Callable[..., Path], opened: Callable[[Path], int], part: Any
) -> None:
    assert read_back(opened(write(part, b"", part))).tolist() == [1, 2, 3, 1, 2, 3]


def test_a_buffer_that_may_be_written_to_is_not_copied() -> None:
    data = bytearray(b"abc")
    tensor = tensors_of([data])[0]
    data[0] = 7
    assert tensor[0] == 7


@pytest.mark.parametrize(
    "part",
    [torch.zeros(4), torch.zeros(4, 4, dtype=torch.uint8)[:, 1], memoryview(b"abcd")[::2]],
    ids=["float", "strided", "strided buffer"],
)
def test_other_parts_are_refused(part: Any) -> None:
    with pytest.raises(ConfigError, match="contiguous"):
        tensors_of([part])


@pytest.mark.parametrize("about", [{"x": object()}, {"x": float("nan")}, {"x": "y" * (1 << 20)}])
def test_descriptions_that_are_no_short_json_are_refused(about: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="JSON"):
        Header.of("key", "layer", about, 0, [])


@pytest.mark.parametrize("key", ["", "a/../b", "\x00", "ü\udcff", "k" * 5000])
def test_any_text_is_a_key(tmp_path: Path, opened: Callable[[Path], int], key: str) -> None:
    header, tensors = header_of(b"x", key=key)
    path = tmp_path / "ab" / "k.nx"
    write_blob(path, path.with_name("t"), header, tensors, 0o600)
    assert read_header(opened(path), "blob").key == key


@pytest.mark.parametrize("names", [(5, "layer"), ("key", None)])
def test_key_and_kind_are_texts(names: Any) -> None:
    with pytest.raises(ConfigError, match="texts"):
        Header.of(*names, {}, 0, [])


# -- writing ---------------------------------------------------------------------------------------


def test_a_blob_leaves_no_temporary_and_nobody_else_may_read_it(
    write: Callable[..., Path],
) -> None:
    path = write(b"x")
    assert [entry.name for entry in path.parent.iterdir()] == ["blob.nx"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_partial_writes_go_on_where_they_stopped(
    write: Callable[..., Path],
    opened: Callable[[Path], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = os.pwritev
    draw = random.Random(0)

    def partly(descriptor: int, views: list[memoryview], offset: int) -> int:
        some = views[: draw.randint(1, len(views))]
        return real(descriptor, [some[0][: draw.randint(1, some[0].nbytes)], *[]], offset)

    data = random_bytes(3 * PAGE + 5)
    monkeypatch.setattr(os, "pwritev", partly)
    path = write(data[:100], data[100:])
    monkeypatch.undo()
    assert torch.equal(read_back(opened(path)), data)


@pytest.mark.parametrize("call", ["pwritev", "fdatasync", "rename"])
def test_what_the_disk_refuses_leaves_nothing(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(WriteError, match="No space left") as refused:
            write(b"x")
    assert isinstance(refused.value.__cause__, OSError)
    assert refused.value.__cause__.errno == 28
    assert list((tmp_path / "ab").iterdir()) == []


def test_an_interrupt_leaves_nothing(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write(b"x")
    assert list((tmp_path / "ab").iterdir()) == []


# -- what is not a blob ----------------------------------------------------------------------------


def test_links_pipes_and_folders_are_not_read(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(b"x")
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "ab"):
        with pytest.raises(CorruptCheckpoint):
            open_blob(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        open_blob(tmp_path / "nothing")


@pytest.mark.parametrize("nbytes", [0, 1, 79, 80, 4095, 4096, 4097, 5000])
def test_zeros_are_no_blob(tmp_path: Path, opened: Callable[[Path], int], nbytes: int) -> None:
    (tmp_path / "zeros").write_bytes(bytes(nbytes))
    with pytest.raises(CorruptCheckpoint):
        read_header(opened(tmp_path / "zeros"), "zeros")


@pytest.mark.parametrize("extra", [-1, 1, 4096])
def test_a_blob_that_is_cut_or_longer_is_refused(
    write: Callable[..., Path], opened: Callable[[Path], int], extra: int
) -> None:
    path = write(random_bytes(10_000))
    os.truncate(path, path.stat().st_size + extra)
    with pytest.raises(CorruptCheckpoint, match="promises"):
        read_header(opened(path), "blob")


def test_a_version_to_come_is_refused(
    write: Callable[..., Path],
    opened: Callable[[Path], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(header, "_VERSION", 2)
        path = write(b"x")
    with pytest.raises(CorruptCheckpoint, match="version 1"):
        read_header(opened(path), "blob")


# -- reading, when something goes wrong ------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_changed_byte_is_found_in_its_block(
    write: Callable[..., Path], opened: Callable[[Path], int], where: str, mode: str
) -> None:
    nbytes = 3 * BLOCK_BYTES + 10
    at = {"first": 0, "middle": BLOCK_BYTES + 5, "last": nbytes - 1}[where]
    path = write(random_bytes(nbytes))
    header = read_header(opened(path), "blob")
    with open(path, "r+b") as file:
        file.seek(header.header_nbytes + at)
        value = file.read(1)[0]
        file.seek(header.header_nbytes + at)
        file.write(bytes([value ^ 1]))
    descriptor = opened(path)
    for check in (lambda: read_back(descriptor, MODES[mode]), lambda: check_blocks(
        descriptor, header, "blob", MODES[mode]
    )):  # fmt: skip
        with pytest.raises(CorruptCheckpoint, match=f"block {at // BLOCK_BYTES} of"):
            check()


def test_a_file_that_shrinks_while_it_is_read_is_refused(
    write: Callable[..., Path], opened: Callable[[Path], int]
) -> None:
    path = write(random_bytes(3 * BLOCK_BYTES))
    descriptor = opened(path)
    header = read_header(descriptor, "blob")
    os.truncate(path, header.header_nbytes + BLOCK_BYTES)
    with pytest.raises(CorruptCheckpoint, match=r"block [12] of blob .* ends early"):
        read_payload(descriptor, header, "blob", BlockMode("direct"))


def test_a_file_that_was_unlinked_can_be_read(
    write: Callable[..., Path], opened: Callable[[Path], int]
) -> None:
    data = random_bytes(BLOCK_BYTES + 1)
    path = write(data)
    descriptor = opened(path)
    path.unlink()
    assert torch.equal(read_back(descriptor), data)


@pytest.mark.parametrize("ring", [True, False])
@pytest.mark.parametrize("fault", ["again", "short", "delay", "refuse", "flip"])
def test_faults_that_can_be_mended_are(
    write: Callable[..., Path], opened: Callable[[Path], int], fault: str, ring: bool
) -> None:
    data = random_bytes(20 * BLOCK_BYTES + 4321)
    descriptor = opened(write(data))
    header = read_header(descriptor, "blob")
    num_faults = 0
    for seed in range(4):
        faults = Faults(seed, delay_us=2000, **{f"{fault}_ppm": 500_000})
        mode = BlockMode("direct", ring, faults)
        out, report = read_payload(descriptor, header, "blob", mode)
        assert torch.equal(out, data)
        num_faults += report.num_faults
        if fault == "flip":
            assert 0 < report.num_second <= report.num_faults  # two reads may be of one block
    # Direct reads cannot be refused where there are none.
    assert num_faults > 0 or (fault == "refuse" and not report.is_direct)


@pytest.mark.parametrize("ring", [True, False])
def test_an_error_of_the_disk_is_an_error(
    write: Callable[..., Path], opened: Callable[[Path], int], ring: bool
) -> None:
    data = random_bytes(20 * BLOCK_BYTES)
    descriptor = opened(write(data))
    header = read_header(descriptor, "blob")
    for ppm in (ALWAYS, 100_000):
        mode = BlockMode("direct", ring, Faults(7, errno_ppm=ppm))
        with pytest.raises(ReadError, match="Input/output error") as refused:
            read_payload(descriptor, header, "blob", mode)
        assert refused.value.errno == 5
    assert torch.equal(read_back(descriptor), data)


@pytest.mark.parametrize("out", [torch.zeros(99, dtype=torch.uint8), torch.zeros(100)])
def test_memory_of_another_size_or_kind_is_refused(
    write: Callable[..., Path], opened: Callable[[Path], int], out: torch.Tensor
) -> None:
    descriptor = opened(write(random_bytes(100)))
    with pytest.raises(ConfigError, match="100 contiguous bytes"):
        read_payload(descriptor, read_header(descriptor, "blob"), "blob", BlockMode(), out)


# -- the ops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 4096, BLOCK_BYTES])
def test_digests_do_not_depend_on_how_the_bytes_are_parted(block_bytes: int) -> None:
    data = random_bytes(min(5 * block_bytes + 3, 3 * BLOCK_BYTES))
    raw = bytes(data.tolist())
    want = [
        xxhash.xxh3_64_intdigest(raw[at : at + block_bytes])
        for at in range(0, len(raw), block_bytes)
    ]
    draw = random.Random(block_bytes)
    for _ in range(3):
        cuts = sorted(draw.randrange(data.numel() + 1) for _ in range(5))
        parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, data.numel()], strict=True)]
        got = OPS.block_digests(parts, block_bytes)
        assert [value & (1 << 64) - 1 for value in got.tolist()] == want


def stamp_of(path: Path) -> list[int]:
    info = path.stat()
    return [info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns]


def test_opcheck_finds_nothing_wrong_with_the_ops(tmp_path: Path) -> None:
    data = random_bytes(10_000)
    path = tmp_path / "file"
    path.write_bytes(bytes(data.tolist()))
    digests = OPS.block_digests([data], 4096)
    results = torch.library.opcheck(OPS.block_digests.default, ([data[:100], data[100:]], 4096))
    assert set(results.values()) == {"SUCCESS"}
    out = torch.zeros(10_000, dtype=torch.uint8)
    # How much of a direct read is staged depends on where `out` lies, and opcheck moves it.
    args = (out, str(path), stamp_of(path), 0, digests, 4096 * 16, "buffered", True, 0, [])
    args = (*args[:4], OPS.block_digests([data], 4096 * 16), *args[5:])
    results = torch.library.opcheck(OPS.read_blocks_.default, args)
    assert set(results.values()) == {"SUCCESS"}
    OPS.read_blocks_(*args)
    assert torch.equal(out, data)


def test_the_op_that_reads_says_what_it_changes_and_is_not_taken_out(tmp_path: Path) -> None:
    data = random_bytes(1000)
    path = tmp_path / "file"
    path.write_bytes(bytes(data.tolist()))
    digests = OPS.block_digests([data], 1 << 16)
    arguments = OPS.read_blocks_.default._schema.arguments
    assert [a.name for a in arguments if a.alias_info and a.alias_info.is_write] == ["out"]

    name, stamp = str(path), stamp_of(path)

    def read(out: torch.Tensor) -> torch.Tensor:
        OPS.read_blocks_(out, name, stamp, 0, digests, 1 << 16, "direct", True, 0, [])
        return out + 1

    compiled = torch.compile(read, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(1000, dtype=torch.uint8)), data + 1)


@pytest.mark.parametrize(
    "change",
    [
        {"offset": -1},
        {"num_digests": 2},
        {"num_digests": 0},
        {"block_bytes": 0},
        {"block_bytes": -5},
        {"dtype": torch.int8},
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    with pytest.raises(EngineError):
        ops.call(
            OPS.read_blocks_,
            torch.zeros(100, dtype=change.get("dtype", torch.uint8)),
            str(path),
            stamp_of(path),
            change.get("offset", 0),
            torch.zeros(change.get("num_digests", 1), dtype=torch.int64),
            change.get("block_bytes", 1 << 16),
            "direct",
            True,
            0,
            [],
        )


@pytest.mark.parametrize("io", ["mmap", "gds", "fast"])
def test_other_modes_are_refused(tmp_path: Path, io: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    nothing = torch.zeros(0, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="direct"):
        ops.call(OPS.read_blocks_, nothing, str(path), stamp_of(path), 0, nothing.long(),
                 1 << 16, io, True, 0, [])  # fmt: skip


def test_blocks_in_a_wide_unit_of_the_file_are_put_together(tmp_path: Path) -> None:
    """Offsets that no direct read may begin at: all is staged, and compared all the same."""
    data = random_bytes(300_000)
    path = tmp_path / "file"
    path.write_bytes(b"head" + bytes(data.tolist()))
    out = torch.zeros_like(data)
    digests = OPS.block_digests([data], 1 << 16)
    answer = ops.call(
        OPS.read_blocks_, out, str(path), stamp_of(path), 4, digests, 1 << 16, "direct", True, 0, []
    )
    assert answer[0] == -1
    assert torch.equal(out, data)
