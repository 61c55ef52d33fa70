"""Every interleaving of the real engine in small worlds: simcuda/explore.cpp has the how.

A world is a few groups, arenas and slots, and a caller with a script. In each of its states it is
looked at whether every kernel reads the bytes it should, whether anything that is under way touches
memory that is somebody else's, whether the engine's own counts are right and whether anybody still
moves. The second half takes the engine's orderings out, one at a time: each must be missed.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
EXPLORER = ["explore", "explore_caller", "explore_engine", "explore_fibers", "explore_machine"]
# The real engine; what it stands on and is not here, explore_machine.cpp and _fibers.cpp replace.
ENGINE = ["stream/engine", "stream/engine_files", "stream/engine_io", "stream/engine_pool"]
ENGINE += ["stream/engine_setup", "stream/load", "stream/order", "stream/pinned"]
ENGINE += ["io/arrived", "io/window", "io/rows", "io/fault", "io/page_cache", "io/reader_external"]
ENGINE += ["common/xxh3", "common/range_absent"]
FLAGS = "-std=c++20 -O1 -g1 -Wall -Wextra"
NUM_BUILDS = 2  # at a time

# Groups by arena, R: stays in RAM, B: brief; a script as explore_caller.cpp reads it.
RING = "groups=0 1 0 1;order=0 1 2 3;"
TWICE = "script=0 1 2 3 0 1 2 3;"
JUMPS = "script=0 3 0 2 1 2 3 1;"
WORLDS = {
    "ring": RING + TWICE,
    "ring-thrice": RING + "script=0 1 2 3 e 0 1 2 3 e 0 1 2 3 e;pieces=2",
    "three-arenas": "groups=0 1 2 0 1;order=0 1 2 3 4;script=0 1 2 3 4 e 0 1 2 3 4 e;lookahead=2",
    "three-by-two": "groups=0 1 2 0 1;order=0 1 2 3 4;script=0 1 2 3 4 0 1 2 3 4;lookahead=2;"
    "pieces=2;slots=4",
    "jumps": RING + JUMPS,
    "crowded": RING + "script=0 1 2 3 1 0 2 3;lookahead=3;pieces=2",
    "one-slot": RING + TWICE + "pieces=2;slots=1",
    "many-slots": RING + "script=0 1 2 3 0 1;slots=5;depth=4;pieces=2",
    "three-pieces": RING + "script=0 1 2 3 0 1;depth=3;pieces=3",
    "poison": "groups=0 1 2 1;order=0 1 2 3;poison;early_kernel;" + TWICE,
    "early-kernel": RING + TWICE + "early_kernel",
    "ram": "groups=0R 1 0 1R;order=0 1 2 3;pieces=2;" + TWICE,
    "ram-jumps": "groups=0R 1 0 1R;order=0 1 2 3;" + JUMPS,
    "no-room-in-ram": "groups=0R 1 0 1R;order=0 1 2 3;no_pin;" + TWICE,
    "resident": "groups=0 1 0 2;order=0 1 2;script=s3 3 0 1 2 3 0 1 2",
    "there-and-back": RING + "script=0 1 2 3 e 3 2 1 0 e",
    "two-streams": RING + "script=0 1 2 3 e t1 0 1 2 3 e t0 0 1",
    "held": RING + "script=h0 1 k0 r0 2 h3 0 k3 r3 1",
    "brief": "groups=0 1 0 1 2B;order=0 1 2 3 4;script=0 h4 k0 r4 1 2 h4 k2 r4 3 0",
    "errors": RING + TWICE + "errors=2",
    "errors-and-jumps": RING + JUMPS + "errors=1;pieces=2",
    "agains": RING + TWICE + "agains=2",
    "verify": "groups=0 1 0;order=0 1 2;pieces=2;flips=1;script=d 0 1 2 0 1",
    "verify-ram": "groups=0R 1 0;order=0 1 2;flips=1;script=d 0 1 2 0 1 2",
    "verify-late": "groups=0 1 0 2;order=0 1 2;script=s3 0 d 3 1 2 3",
    "close": RING + "script=0 1 2 3 0 x",
    "polls": RING + TWICE + "polls",
    "host": RING + TWICE + "pieces=2;host",
    "host-jumps": RING + JUMPS + "pieces=2;host",
    "direct": RING + TWICE + "pieces=2;direct",
    "direct-jumps": RING + JUMPS + "pieces=2;direct;poison;early_kernel",
    "direct-ram": "groups=0R 1 0 1R;order=0 1 2 3;direct;script=0 1 0 3 2 1 0 2 3",
    "direct-verify": "groups=0 1 0;order=0 1 2;direct;pieces=2;flips=1;script=d 0 1 2 0 1 2",
}

# A compiled graph that works on clones may write them back when it ends.
CLONES = {
    "clones": RING + "script=c0 c1 c2 c3 w0 w1 w2 w3 c0 c1 c2 c3",
    "clones-and-arenas": RING + "script=c0 c1 c2 c3 w0 w1 w2 w3 0 1 2 3 0 1",
    "clones-twice": RING + "script=c0 c1 c2 c1 c0 c1 w0 w1 w2 0 1",
    "clones-poison": RING + "script=c0 c1 c2 c3 w0 w1 w2 w3 c0 c1 c2 c3;poison",
    "clones-direct": RING + "script=c0 c1 c2 c3 w0 w1 w2 w3 c0 1 c2 3;direct",
    "clones-ram": "groups=0R 1 0 1R;order=0 1 2 3;script=c0 c1 c2 c3 w0 w1 w2 w3 c0 c1 2 3 0 1",
}
WORLDS |= CLONES
WORLDS |= {f"{n}-host": f"{w};host" for n, w in CLONES.items() if n != "clones-direct"}
# A pass that finds a group where a pass on another stream left it.
WORLDS["found-last"] = RING + "script=0 1 2 3 e t1 3 2 1 0"
WORLDS["found-in-mid-pass"] = RING + "script=0 1 e t1 1 0 3 2"
WORLDS["clones-of-two-streams"] = RING + "script=c0 c1 c2 c3 e t1 c0 c1 c2 c3"
WORLDS["clones-direct-poison"] = RING + "script=0 1 c2 c3 w2 w3 e c0;direct;poison"
# What a graph writes back on one stream, a pass on another one does not know of.
BACK = RING + "script=c0 c1 c2 c3 w2 w3 e t1 "
WORLDS["clones-on-two-streams"] = BACK + "c0 c1 c2 c3"
WORLDS["clones-then-arenas-on-two-streams"] = BACK + "0 1 2 3 e t0 c0 c1"
# These take seconds, and would take three times as many to be looked at both ways.
LARGE = {"many-slots", "three-by-two", "three-pieces", "errors", "errors-and-jumps", "verify"}
# Whoever looks up and waits on is where it was: a circle, which cannot be compared with itself.
CIRCULAR = {"polls"}

# What is taken out: the text, what stands there instead; and the world that must miss it.
MUTATIONS = {
    "a copy waits for the arena's readers": (
        "device_->wait(arena.lane, arena.free);\n    arena.is_left",
        "arena.is_left",
        "ring",
    ),
    "a freed arena says when its readers are through": (
        "  if (!arena.is_left) device_->record(arena.free, caller);\n",
        "",
        "ring",
    ),
    "a new arena may still have readers": (
        "  device_->record(arena.free, device_->current());\n}\n",
        "}\n",
        "early-kernel",
    ),
    "the computation waits for the copies": (
        "if (!home.is_settled) device_->wait(caller, home.ready);",
        "",
        "ring",
    ),
    "the last copy says that it is done": (
        "  device_->record(arena.ready, arena.lane);\n  arena.state",
        "  arena.state",
        "ring",
    ),
    "a slot waits for the copy out of it": (
        "if (device_->is_done(chunk.copied)) {",
        "if (true) {",
        "ring",
    ),
    "the copy out of a slot says that it is done": (
        "    device_->record(chunk.copied, arena.lane);\n",
        "",
        "ring",
    ),
    "a slot waits for its hash": (
        "if (chunk.holds_bytes && is_current(chunk)",
        "if (false && is_current(chunk)",
        "verify",
    ),
    "reads wait for stale ones": (
        " || arena.stale_in_flight > 0",
        "",
        "host-jumps",
    ),
    "a copy from RAM waits for stale reads": (
        "(is_here && arena.stale_in_flight == 0)",
        "is_here",
        "direct-ram",
    ),
    "stale reads are dropped": (
        "return chunk.generation == arena.generation && arena.state",
        "return arena.state",
        "errors-and-jumps",
    ),
    "a load that was replaced does not land": (
        "    if (arena.generation != generation) return;\n",
        "",
        "jumps",
    ),
    "an arena is promised once": (
        "  if (claims_[index] == num_schedules_) return;\n",
        "",
        "crowded",
    ),
    "the group in use keeps its arena": (
        "  if (current_ >= 0) want(current_);\n",
        "",
        "crowded",
    ),
    "a held group keeps its arena": (
        "  if (arena.is_held && arena.group != group) return;\n",
        "",
        "held",
    ),
    "a pass that ends says when its readers are through": (
        "    end_use();\n",
        "",
        "two-streams",
    ),
    "what another stream left is waited for": (
        "if (std::exchange(home.is_left, false)) device_->wait(caller, home.free);",
        "home.is_left = false;",
        "found-in-mid-pass",
    ),
    "who is through may begin anew": (
        "if (std::exchange(home.is_left, false))",
        "if (home.is_left)",
        "there-and-back",
    ),
    "poison waits for the readers": (
        "    device_->wait(arena.lane, arena.free);\n    device_->poison",
        "    device_->poison",
        "poison",
    ),
    "poisoned is empty": (
        "    arena.state = State::kEmpty;\n    arena.group = -1;\n",
        "",
        "poison",
    ),
    "a direct read waits for the arena's lane": (
        "    if (lands_on_device(next)) device_->record(arena.free, arena.lane);\n",
        "",
        "direct-jumps",
    ),
    "a direct read waits for the arena's readers": (
        "if (lands_on_device(group) && !device_->is_done(arena.free)) {",
        "if (false) {",
        "direct",
    ),
    "what is loaded anew is not settled": (
        "  arena.is_settled = false;\n",
        "",
        "verify-late",
    ),
    "a resident is waited for": (
        "    device_->block(arena.ready);\n  }\n",
        "  }\n",
        "resident",
    ),
    "a digest waits for its bytes": (
        "    device_->block(arena.ready);\n    hash",
        "    hash",
        "direct-verify",
    ),
    "landing wakes the caller": (
        "  ++counters_.num_landed;\n  landed_.notify_all();\n",
        "  ++counters_.num_landed;\n",
        "ring",
    ),
    "scheduling wakes the engine's thread": (
        "if (!queue_.empty() || !left_behind_.empty()) work_.notify_one();",
        "",
        "ring",
    ),
    "what stands in a cloned arena is not believed later": (
        "  if (arena.is_cloned) arena.state = State::kEmpty;\n",
        "",
        "clones-twice-host",
    ),
    "what a graph wrote back comes before what is loaded": (
        "    device_->wait(caller, home.free);\n    device_->record(home.free, caller);\n",
        "",
        "clones",
    ),
    "who clones waits for who had the arena before": (
        "    device_->wait(caller, home.free);\n    device_->record(home.free, caller);\n",
        "    device_->record(home.free, caller);\n",
        "clones-of-two-streams",
    ),
    "a cloned arena is not loaded ahead": (
        "  if (arena.is_cloned && std::ranges::find(awaited_, group) == awaited_.end()) return;\n",
        "",
        "clones-host",
    ),
    "closing waits for reads": (
        "  if (thread_.joinable()) thread_.join();\n",
        "",
        "close",
    ),
    "closing waits for copies": ("  device_->drain();\n", "", "close"),
}


def compile_one(source: Path, root: Path, target_folder: Path) -> Path:
    """The object of `source`, whose headers are in `root`."""
    target = target_folder / f"{source.stem}.o"
    command = [*os.environ.get("CXX", "g++").split(), *FLAGS.split()]
    command += [f"-I{root / 'csrc'}", f"-I{root / 'simcuda'}"]
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return target


def link(objects: list[Path], target: Path) -> Path:
    command = [*os.environ.get("CXX", "g++").split(), "-o", str(target), *map(str, objects)]
    subprocess.run([*command, "-pthread"], check=True)
    return target


def explore(
    explorer: Path, name: str, world: str, *options: str
) -> subprocess.CompletedProcess[str]:
    words = [word for word in world.split(";") if word]
    command = [str(explorer), *options, f"name={name}", *words]
    return subprocess.run(command, capture_output=True, text=True)


def explore_all_of(explorer: Path, name: str, world: str, *options: str) -> None:
    found = explore(explorer, name, world, "-t", *options)
    print(found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr
    assert re.search(r" [1-9]\d* ends +ok$", found.stdout.strip())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a copy of the sources: one state of them, however long this takes."""
    folder = tmp_path_factory.mktemp("explore")
    shutil.copytree(CSRC, folder / "csrc")
    shutil.copytree(HERE / "simcuda", folder / "simcuda")
    return folder


@pytest.fixture(scope="module")
def objects(folder: Path) -> list[Path]:
    sources = [folder / "simcuda" / f"{name}.cpp" for name in EXPLORER]
    sources += [folder / "csrc" / f"{name}.cpp" for name in ENGINE]
    with concurrent.futures.ThreadPoolExecutor(NUM_BUILDS) as pool:
        return list(pool.map(lambda source: compile_one(source, folder, folder), sources))


@pytest.fixture(scope="module")
def explorer(objects: list[Path], folder: Path) -> Path:
    return link(objects, folder / "explore")


@pytest.mark.parametrize("name", WORLDS)
def test_every_interleaving_of_a_world_is_right(explorer: Path, name: str) -> None:
    options = [] if name in LARGE | CIRCULAR else ["-b"]
    explore_all_of(explorer, name, WORLDS[name], *options)


@pytest.fixture(scope="module")
def found_without(objects: list[Path], folder: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """By mutation, what its world's exploration says of an engine that has it."""
    sources = sorted((folder / "csrc" / "stream").glob("engine*.cpp"))

    def explore_without(number: int, what: str) -> subprocess.CompletedProcess[str]:
        text, instead, world = MUTATIONS[what]
        holders = [path for path in sources if text in path.read_text()]
        count = sum(path.read_text().count(text) for path in holders)
        assert count == 1, f"{what}: the text is there {count} times"
        source = folder / f"mutant_{number}" / holders[0].name
        source.parent.mkdir()
        source.write_text(holders[0].read_text().replace(text, instead))
        mutated = compile_one(source, folder, source.parent)
        others = [path for path in objects if path.name != mutated.name]
        explorer = link([*others, mutated], source.parent / "explore")
        return explore(explorer, world, WORLDS[world])

    with concurrent.futures.ThreadPoolExecutor(NUM_BUILDS) as pool:
        return dict(
            zip(MUTATIONS, pool.map(explore_without, itertools.count(), MUTATIONS), strict=True)
        )


@pytest.mark.slow
@pytest.mark.parametrize("what", MUTATIONS)
def test_the_explorer_misses(
    found_without: dict[str, subprocess.CompletedProcess[str]], what: str
) -> None:
    found = found_without[what]
    print(found.stdout)
    assert found.returncode == 1, found.stdout + found.stderr
    assert "states" in found.stdout
