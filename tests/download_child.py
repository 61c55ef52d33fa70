"""A process that downloads until it is killed; imports no torch, so that it starts fast.

    python download_child.py PACKAGE_FOLDER

Reads lines of JSON. For `{"url", "path", "sha256", "chunk_bytes", "flock"}` it forks a child that
fetches, and prints its pid; for `{"reap": pid}` it waits for that child, and prints its status.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import types


def fetch(asked: dict[str, object]) -> None:
    from nexus_ext.download import Download, Downloader, patience

    patience._FIRST_SECONDS = 0.001
    if not asked["flock"]:
        fcntl.flock = lambda descriptor, operation: None
    with Downloader(max_connections=4, chunk_bytes=asked["chunk_bytes"]) as downloader:
        downloader.fetch(Download(asked["url"], asked["path"], sha256=asked["sha256"]))


def main(package: str) -> None:
    # The package itself imports torch; its parts are found without it.
    parent = types.ModuleType("nexus_ext")
    parent.__path__ = [package]
    sys.modules["nexus_ext"] = parent
    import h2.connection  # noqa: F401
    import httpx2  # noqa: F401

    import nexus_ext.download  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        if "reap" in asked:
            status = os.waitpid(asked["reap"], 0)[1]
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            fetch(asked)
            os._exit(0)
        print(pid, flush=True)
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main(sys.argv[1])
