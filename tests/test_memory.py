"""How many bytes may we really use: sizes as text, fake /proc and /sys trees, and this machine."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ext.errors import ConfigError
from nexus_ext.memory import (
    available_bytes,
    default_budget,
    format_bytes,
    locked_limit_bytes,
    parse_bytes,
    should_prefault,
)

GIB = 1 << 30
V1_UNLIMITED = 9223372036854771712
V1_MOUNT = "/ /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
V2_MOUNT = "/ /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate"
HYBRID_MOUNT = "/ /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


class Machine:
    """A fake root directory with 64 GiB available and the cgroups a test asks for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        write(root / "proc/meminfo", f"MemTotal: {64 << 20} kB\nMemAvailable:   {64 << 20} kB")

    def cgroups(self, own: str, *mounts: str) -> None:
        lines = [f"{20 + i} 1 0:{i} {mount}" for i, mount in enumerate(mounts)]
        write(self.root / "proc/self/cgroup", own)
        write(
            self.root / "proc/self/mountinfo", "\n".join(["1 0 8:1 / / rw - ext4 sda rw", *lines])
        )

    def v2(
        self, directory: str, limit: object, usage: int, inactive: int = 0, active: int = 0
    ) -> Path:
        path = self.root / "sys/fs/cgroup" / directory
        write(path / "memory.max", limit)
        write(path / "memory.current", usage)
        write(path / "memory.stat", f"anon 7\ninactive_file {inactive}\nactive_file {active}")
        return path

    def v1(
        self, directory: str, limit: int, usage: int, inactive: int = 0, active: int = 0
    ) -> None:
        path = self.root / "sys/fs/cgroup/memory" / directory
        write(path / "memory.limit_in_bytes", limit)
        write(path / "memory.usage_in_bytes", usage)
        own = "inactive_file 1\nactive_file 1\n"
        write(
            path / "memory.stat", f"{own}total_inactive_file {inactive}\ntotal_active_file {active}"
        )

    @property
    def available(self) -> int:
        return available_bytes(self.root)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (4096, 4096),
        (0, 0),
        ("4096", 4096),
        ("7 B", 7),
        ("1GiB", GIB),
        ("512MiB", 512 << 20),
        ("1.5GB", 1_500_000_000),
        ("300 MB", 300_000_000),
        (" 2gib ", 2 * GIB),
        ("0.5 KIB", 512),
        ("1k", 1000),
        ("1Ki", 1024),
        ("0.3GiB", 322122547),
        ("2TiB", 2 << 40),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


NO_SIZES = (
    *("", " ", "-1", "-1GiB", "nan", "inf", "1.5", "1.5 B", "1e9", "GiB", "1 GiBs", "1,5GB"),
    *("1_000", "1 2", "0x10", "auto", "\u0663GiB", "1\u212aB", "9" * 5000),
    *(-1, 1.5, float("nan"), True, None),
)


@pytest.mark.parametrize("text", NO_SIZES, ids=range(len(NO_SIZES)))
def test_what_is_no_size_is_refused_with_an_example(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"got .*write it like '1\.5GiB'"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        ((1 << 20) - 1, "1.00 MiB"),
        (int(1.23 * GIB), "1.23 GiB"),
        (3 << 40, "3.00 TiB"),
        (5000 << 60, "5000.00 EiB"),
    ],
)
def test_sizes_are_written_in_binary_units(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@given(st.integers(0, 1 << 62))
def test_what_is_written_can_be_read_back(nbytes: int) -> None:
    # Half of the last digit, 0.005 of at least 1, and a part of a byte when it is read.
    assert abs(parse_bytes(format_bytes(nbytes)) - nbytes) <= 0.005 * nbytes + 1


def test_without_cgroups_everything_available_is_ours(machine: Machine) -> None:
    assert machine.available == 64 * GIB


def test_a_kernel_that_does_not_say_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"MemAvailable.*give the budget in bytes"):
        available_bytes(tmp_path)


def test_a_v2_limit_counts_and_file_cache_under_it_is_room(machine: Machine) -> None:
    machine.cgroups("0::/job", V2_MOUNT)
    machine.v2("job", 8 * GIB, 5 * GIB, inactive=1 * GIB, active=2 * GIB)
    assert machine.available == 6 * GIB


def test_every_v2_level_up_to_the_mount_counts(machine: Machine) -> None:
    machine.cgroups("0::/slice/user/job", V2_MOUNT)
    machine.v2("slice/user/job", "max", 1 * GIB)
    machine.v2("slice/user", 9 * GIB, 1 * GIB)
    machine.v2("slice", 10 * GIB, 7 * GIB)
    assert machine.available == 3 * GIB


def test_the_limits_of_a_sibling_do_not_count(machine: Machine) -> None:
    machine.cgroups("0::/job", V2_MOUNT)
    machine.v2("job", "max", 1 * GIB)
    machine.v2("other", 1 * GIB, 0)
    assert machine.available == 64 * GIB


def test_room_is_never_negative_and_never_above_the_limit(machine: Machine) -> None:
    machine.cgroups("0::/job", V2_MOUNT)
    machine.v2("job", 1 * GIB, 2 * GIB)
    assert machine.available == 0
    machine.v2("job", 1 * GIB, 2 * GIB, inactive=5 * GIB)
    assert machine.available == 1 * GIB


def test_the_throttling_limit_counts_too(machine: Machine) -> None:
    machine.cgroups("0::/job", V2_MOUNT)
    write(machine.v2("job", "max", 1 * GIB) / "memory.high", 3 * GIB)
    assert machine.available == 2 * GIB


def test_a_limit_above_the_free_memory_changes_nothing(machine: Machine) -> None:
    machine.cgroups("0::/job", V2_MOUNT)
    machine.v2("job", 500 * GIB, 1 * GIB)
    assert machine.available == 64 * GIB


def test_a_v1_limit_counts_with_the_cache_of_the_whole_subtree(machine: Machine) -> None:
    machine.cgroups("5:cpu,memory:/job\n3:cpuset:/", V1_MOUNT)
    machine.v1("job", 8 * GIB, 5 * GIB, inactive=1 * GIB, active=1 * GIB)
    machine.v1("", V1_UNLIMITED, 40 * GIB)
    assert machine.available == 5 * GIB


def test_an_unlimited_v1_group_limits_nothing(machine: Machine) -> None:
    machine.cgroups("5:memory:/job", V1_MOUNT)
    machine.v1("job", V1_UNLIMITED, 5 * GIB)
    assert machine.available == 64 * GIB


def test_every_v1_level_up_to_the_mount_counts(machine: Machine) -> None:
    machine.cgroups("5:memory:/outer/job", V1_MOUNT)
    machine.v1("outer/job", V1_UNLIMITED, 1 * GIB)
    machine.v1("outer", 4 * GIB, 3 * GIB)
    assert machine.available == 1 * GIB


@pytest.mark.parametrize("own", ["/docker/abc", "/docker/abc/../../elsewhere", "/../host"])
def test_a_host_path_unseen_in_a_container_means_the_mount_itself(
    machine: Machine, own: str
) -> None:
    machine.cgroups(f"5:memory:{own}", V1_MOUNT)
    machine.v1("", 2 * GIB, 1 * GIB)
    machine.v1("../host", 1, 0)
    assert machine.available == 1 * GIB


def test_a_path_is_taken_relative_to_the_root_of_its_mount(machine: Machine) -> None:
    machine.cgroups("0::/docker/abc/job", V2_MOUNT.replace("/", "/docker/abc", 1))
    machine.v2("job", 2 * GIB, 1 * GIB)
    machine.v2("", 9 * GIB, 1 * GIB)
    assert machine.available == 1 * GIB


def test_a_mount_root_is_matched_by_whole_names(machine: Machine) -> None:
    machine.cgroups("0::/docker/abcd", V2_MOUNT.replace("/", "/docker/abc", 1))
    machine.v2("", 2 * GIB, 1 * GIB)
    assert machine.available == 1 * GIB


def test_a_hybrid_machine_obeys_both_hierarchies(machine: Machine) -> None:
    machine.cgroups("5:memory:/job\n0::/job", V1_MOUNT, HYBRID_MOUNT)
    machine.v1("job", 8 * GIB, 1 * GIB)
    (machine.root / "sys/fs/cgroup/unified/job").mkdir(parents=True)
    assert machine.available == 7 * GIB
    machine.v2("unified/job", 3 * GIB, 1 * GIB)
    assert machine.available == 2 * GIB


def test_the_first_mount_of_a_hierarchy_is_the_one_we_believe(machine: Machine) -> None:
    foreign = "/other /mnt/cgroup rw - cgroup2 cgroup2 rw"
    machine.cgroups("0::/job", V2_MOUNT, foreign)
    machine.v2("job", 2 * GIB, 1 * GIB)
    write(machine.root / "mnt/cgroup/memory.max", 0)
    write(machine.root / "mnt/cgroup/memory.current", 0)
    assert machine.available == 1 * GIB


def test_nothing_above_the_mount_counts(machine: Machine) -> None:
    machine.cgroups("0::/job", HYBRID_MOUNT)
    machine.v2("unified/job", 2 * GIB, 1 * GIB)
    machine.v2("", 1, 0)
    assert machine.available == 1 * GIB


def test_a_mount_point_with_a_space_is_found(machine: Machine) -> None:
    machine.cgroups("0::/", r"/ /sys/fs/cgroup/my\040own rw - cgroup2 none rw")
    machine.v2("my own", 2 * GIB, 1 * GIB)
    assert machine.available == 1 * GIB


def test_this_machine_has_some_memory_but_not_more_than_it_has() -> None:
    total = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) * 1024
    assert 0 < available_bytes() <= total


def limit_locked_memory(monkeypatch: pytest.MonkeyPatch, soft: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("capabilities", "uid_map", "limit"),
    [
        ("00000000000000ff", "0 0 4294967295", 8 << 20),
        ("0000000000004000", "0 0 4294967295", None),
        ("0000000000004000", "0 1000 1", 8 << 20),
    ],
)
def test_only_real_privilege_lifts_the_lock_limit(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capabilities: str,
    uid_map: str,
    limit: int | None,
) -> None:
    limit_locked_memory(monkeypatch, 8 << 20)
    write(tmp_path / "proc/self/status", f"Name:\tpython\nCapEff:\t{capabilities}\nSeccomp:\t0")
    write(tmp_path / "proc/self/uid_map", uid_map)
    assert locked_limit_bytes(tmp_path) == limit


def test_without_a_lock_limit_nothing_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit_locked_memory(monkeypatch, resource.RLIM_INFINITY)
    assert locked_limit_bytes(tmp_path) is None


def test_an_unknown_privilege_leaves_the_lock_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit_locked_memory(monkeypatch, 4096)
    assert locked_limit_bytes(tmp_path) == 4096


@pytest.mark.parametrize(
    ("available", "budget"),
    [
        (0, 0),
        (GIB // 2, 0),
        (GIB, 0),
        (3 * GIB, 2 * GIB),
        (10 * GIB, 9 * GIB),
        (100 * GIB, 90 * GIB),
    ],
)
def test_the_default_budget_leaves_a_reserve(available: int, budget: int) -> None:
    assert default_budget(available) == budget


def test_prefault_auto_stops_at_four_fifths_of_the_memory() -> None:
    assert should_prefault("auto", 799, 1000)[0]
    assert not should_prefault("auto", 800, 1000)[0]
    assert not should_prefault("auto", 0, 0)[0]


def test_prefault_does_as_told() -> None:
    assert should_prefault("on", 10**12, 1)[0]
    assert not should_prefault("off", 1, 10**12)[0]


def test_prefault_gives_its_reason_with_the_numbers() -> None:
    assert should_prefault("auto", 3 * GIB, 10 * GIB)[1] == (
        "auto: 3.00 GiB to map, 10.00 GiB available, which is under the limit of 80 %"
    )
    for mode in ("on", "off"):
        reason = should_prefault(mode, 3 * GIB, 10 * GIB)[1]
        assert reason == f"pre-fault is {mode} as asked: 3.00 GiB to map, 10.00 GiB available"


def test_an_unknown_prefault_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="'maybe'"):
        should_prefault("maybe", 1, 1)  # type: ignore[arg-type]
