"""Downloads from a local server: ours over eight connections, one curl, and bare sockets.

The server sends with sendfile, one process for each core. Every round visits every arm. What the
machine could do at most is `sockets`: as many connections, read and thrown away. `sockets_to_file`
writes them too, `curl` is one connection to a file, and `sha256` what one core hashes; ours writes,
hashes each block and the whole, and makes it durable. So the CPU seconds of `sockets_to_file` and
`sha256` together are what ours cannot do without; they say more than rates where others use the
machine too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from rich.console import Console

from nexus_ext.bench import machine
from nexus_ext.download import Download, Downloader

NUM_CONNECTIONS = 8
REQUEST_BYTES = 8 << 20
READ_BYTES = 1 << 20


def answer(connection: socket.socket, descriptor: int, size: int) -> None:
    """Answer requests for ranges until the other side goes away."""
    held = b""
    while True:
        while b"\r\n\r\n" not in held:
            data = connection.recv(READ_BYTES)
            if not data:
                return
            held += data
        head, _, held = held.partition(b"\r\n\r\n")
        match = re.search(rb"(?i)range: bytes=(\d+)-(\d+)", head)
        start, end = (int(match[1]), min(int(match[2]) + 1, size)) if match else (0, size)
        status = b"206 Partial Content" if match else b"200 OK"
        connection.sendall(
            b'HTTP/1.1 %s\r\nContent-Length: %d\r\nETag: "1"\r\n'
            b"Content-Range: bytes %d-%d/%d\r\n\r\n" % (status, end - start, start, end - 1, size)
        )
        while start < end:
            start += os.sendfile(connection.fileno(), descriptor, start, end - start)


def serve(listener: socket.socket, path: Path) -> None:
    """One server process; ends when it is killed."""
    descriptor = os.open(path, os.O_RDONLY)
    size = os.fstat(descriptor).st_size

    def run(connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answer(connection, descriptor, size)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client is done
        finally:
            connection.close()

    while True:
        threading.Thread(target=run, args=(listener.accept()[0],), daemon=True).start()


@contextmanager
def served(path: Path) -> Iterator[int]:
    """The port of a server with one process for each core."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    processes = []
    for _ in range(os.cpu_count() or 1):
        pid = os.fork()
        if pid == 0:
            serve(listener, path)
        processes.append(pid)
    try:
        yield listener.getsockname()[1]
    finally:
        for pid in processes:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        listener.close()


def sockets(port: int, size: int, target: Path | None) -> None:
    """As many connections, no library: the ceiling."""
    starts = iter(range(0, size, REQUEST_BYTES))
    lock = threading.Lock()
    file = None if target is None else os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    def fetch() -> None:
        buffer = memoryview(bytearray(READ_BYTES))
        with socket.create_connection(("127.0.0.1", port)) as connection:
            while True:
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                receive(connection, start, min(start + REQUEST_BYTES, size), buffer, file)

    threads = [threading.Thread(target=fetch) for _ in range(NUM_CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if file is not None:
        os.close(file)


def receive(
    connection: socket.socket, start: int, end: int, buffer: memoryview, file: int | None
) -> None:
    connection.sendall(b"GET / HTTP/1.1\r\nRange: bytes=%d-%d\r\n\r\n" % (start, end - 1))
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += connection.recv(1)
    while start < end:
        got = connection.recv_into(buffer[: end - start])
        if file is not None:
            os.pwrite(file, buffer[:got], start)
        start += got


def curl(port: int, target: Path) -> None:
    command = ["curl", "-s", "-f", "-o", str(target), f"http://127.0.0.1:{port}/file"]
    subprocess.run(command, check=True)


def nexus(port: int, target: Path, chunk_bytes: str) -> None:
    with Downloader(max_connections=NUM_CONNECTIONS, chunk_bytes=chunk_bytes) as downloader:
        downloader.fetch(Download(f"http://127.0.0.1:{port}/file", target))


def digest(path: Path) -> None:
    with open(path, "rb") as file:
        hashlib.file_digest(file, "sha256")


def warm_up(path: Path, size: int) -> None:
    """Have the memory that a file of this size takes in the page cache belong to this machine.

    A virtual machine gives back what it does not use; to get it again costs several times as much
    as to write a file, and hit the arms by their order.
    """
    zeros = bytes(READ_BYTES)
    with open(path, "wb") as file:
        for _ in range(0, size, READ_BYTES):
            file.write(zeros)
    path.unlink()


def measured(arm: Callable[[], None], size: int) -> dict[str, float]:
    """GB/s, and the seconds of CPU that it took here (not the server's, nor curl's)."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    arm()
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"gbps": size / seconds / 1e9, "cpu_seconds_per_gb": cpu / size * 1e9}


def run(folder: Path, size: int, num_rounds: int) -> dict[str, list[dict[str, float]]]:
    source, target = folder / "source", folder / "target"
    with open(source, "wb") as file:
        for _ in range(0, size, 1 << 20):
            file.write(os.urandom(1 << 20))
    with served(source) as port:
        arms: dict[str, Callable[[], None]] = {
            "nexus": lambda: nexus(port, target, "64MiB"),
            "nexus_small_chunks": lambda: nexus(port, target, "8MiB"),
            "sockets": lambda: sockets(port, size, None),
            "sockets_to_file": lambda: sockets(port, size, target),
            "sha256": lambda: digest(source),
        }
        if shutil.which("curl"):
            arms["curl"] = lambda: curl(port, target)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
        for _ in range(num_rounds):
            for name, arm in arms.items():
                target.unlink(missing_ok=True)
                os.sync()  # what one arm wrote is not flushed in the next one's time
                warm_up(folder / "scratch", size)
                rounds[name].append(measured(arm, size))
    return rounds


def summary(rounds: dict[str, list[dict[str, float]]]) -> dict[str, object]:
    """Medians, and ours against the target: 0.9 of the lower of two ceilings."""
    middle = {
        name: {key: median(one[key] for one in runs) for key in runs[0]}
        for name, runs in rounds.items()
    }
    ceilings = {"sockets": middle["sockets"]["gbps"]}
    if "curl" in rounds:
        best = max(one["gbps"] for one in rounds["curl"])
        ceilings["curl_times_connections"] = best * min(NUM_CONNECTIONS, os.cpu_count() or 1)
    lower = min(ceilings, key=lambda name: ceilings[name])
    ours = middle["nexus"]["gbps"]
    cpu = {name: one["cpu_seconds_per_gb"] for name, one in middle.items()}
    floor = cpu["sockets_to_file"] + cpu["sha256"]
    return {
        "arms": middle,
        "ceilings_gbps": ceilings,
        "ceiling": lower,
        "share_of_ceiling": ours / ceilings[lower],
        "over_curl": ours / middle["curl"]["gbps"] if "curl" in rounds else None,
        "over_sockets_to_file": ours / middle["sockets_to_file"]["gbps"],
        "cpu_floor_seconds_per_gb": floor,
        "cpu_over_floor": cpu["nexus"] / floor,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, default=Path.home())
    options = parser.parse_args()
    size, num_rounds = ((8 << 20), 1) if options.toy else ((1 << 30), 5)
    before = os.getloadavg()[0]  # of one minute: who else uses the machine
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        result = summary(run(Path(name), size, num_rounds))
    result["size_bytes"] = size
    result["machine"] = machine()
    result["load_average"] = {"before": before, "after": os.getloadavg()[0]}
    Console().print({key: value for key, value in result.items() if key != "rounds"})
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
