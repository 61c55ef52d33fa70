"""A hub of one model: what huggingface_hub asks, and the files, by ranges; counts what it sends."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["HubServer"]

COMMIT = "c0ffee" + "0" * 34


class HubServer:
    """Serves `files` (by name) as `name`; those above 1 KiB are in LFS, with a SHA-256.

    Attributes:
        files: The bytes; change them and the digests stay: `lies` are what is sent instead.
        sent: Bytes of bodies, by file name.
        asked: How often each kind of question came: "info", "file".
        tokens: The Authorization headers that came.
    """

    def __init__(self, name: str, files: dict[str, bytes]) -> None:
        self.name, self.files = name, files
        self.lies: dict[str, bytes] = {}
        self.listed: dict[str, str] = {}  # other names in the list
        self.sent: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.tokens: set[str] = set()
        self.status = 200
        self.ranges: list[tuple[str, int, int]] = []  # what was asked for: file, first, end
        # Called before a range is answered, from the thread that does: may wait.
        self.before: Callable[[str, int, int], None] = lambda file, first, end: None
        # Asked afterwards: whether the answer is 404.
        self.refuses: Callable[[str, int, int], bool] = lambda file, first, end: False
        self._lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def info(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            sibling: dict[str, Any] = {
                "rfilename": self.listed.get(name, name),
                "size": len(data),
                "blobId": git,
            }
            if len(data) > 1024:
                sha256 = hashlib.sha256(data).hexdigest()
                sibling["lfs"] = {"size": len(data), "sha256": sha256, "pointerSize": 130}
            siblings.append(sibling)
        return {"id": self.name, "modelId": self.name, "sha": COMMIT, "siblings": siblings}

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        self.tokens.add(request.headers.get("Authorization", ""))
        path = request.path.partition("?")[0]
        if self.status != 200:
            return self._send(request, self.status, b"{}", {})
        if path.startswith(f"/api/models/{self.name}"):
            self.asked["info"] += 1
            return self._send(request, 200, json.dumps(self.info()).encode(), {})
        file = path.removeprefix(f"/{self.name}/resolve/{COMMIT}/").lstrip("/")
        if file not in self.files:
            return self._send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        self.asked["file"] += 1
        data = self.lies.get(file, self.files[file])
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d+)?", request.headers.get("Range", ""))
        if span is None:
            return self._send(request, 200, data, headers, file)
        first, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
        with self._lock:
            self.ranges.append((file, first, last + 1))
        self.before(file, first, last + 1)
        if self.refuses(file, first, last + 1):
            return self._send(request, 404, b"", {})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return self._send(request, 206, data[first : last + 1], headers, file)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str],
        file: str = "",
    ) -> None:
        request.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)
            with self._lock:
                self.sent[file] += len(body)
