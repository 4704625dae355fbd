"""A stand-in for the hub on loopback: repositories that answer well, badly, or not at all."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandInHub(ThreadingHTTPServer):
    """Serves the files below `folder`, as `OWNER/NAME/FILE`, and misbehaves by the owner's name.

    `gone` says 404, `closed` 401, `gated` 403, `busy` 429 to everything, `moody` 429 to the first
    two requests, `faulty` 500; of `cut` every file breaks off in the middle, `mute` never answers,
    and so `halfmute` but for the lists of its files.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked: Counter[str] = Counter()
        self.over = threading.Event()

    @property
    def address(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def stand_in_hub(folder: Path) -> Iterator[StandInHub]:
    """A hub that runs within."""
    server = StandInHub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self._response(with_body=False)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._response(with_body=True)

    def do_GET(self) -> None:
        self._response(with_body=True)

    def _response(self, *, with_body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        parts = parts[1:] if parts[0] in ("datasets", "models") else parts
        if len(parts) < 2:
            return self._say(404, {"error": "no such page"}, with_body)
        owner, name, rest = parts[0], parts[1], parts[2:]
        self.server.asked[owner] += 1
        if owner == "mute" or (owner == "halfmute" and not is_api):
            self.server.over.wait()
            self.close_connection = True
            return None
        refusals = {"gone": 404, "closed": 401, "gated": 403, "busy": 429, "faulty": 500}
        if owner == "moody" and self.server.asked[owner] <= 2:
            return self._say(429, {"error": "too many requests"}, with_body)
        if owner in refusals:
            return self._refuse(refusals[owner], with_body)
        folder = self.server.folder / owner / name
        if not folder.is_dir():
            return self._refuse(404, with_body)
        if is_api:
            deep = "recursive=true" in self.path.lower()
            return self._say(200, _described(folder, f"{owner}/{name}", rest, deep=deep), with_body)
        file = folder.joinpath(*rest[2:]) if rest[:1] == ["resolve"] else folder / "none"
        if not file.is_file():
            return self._say(
                404, {"error": "no such file"}, with_body, {"X-Error-Code": "EntryNotFound"}
            )
        return self._file(file, with_body, cut=owner == "cut")

    def _refuse(self, status: int, with_body: bool) -> None:
        codes = {404: "RepoNotFound", 401: "RepoNotFound", 403: "GatedRepo"}
        headers = {"X-Error-Code": codes[status]} if status in codes else {}
        self._say(status, {"error": f"status {status}"}, with_body, headers)

    def _say(
        self, status: int, content: object, with_body: bool, headers: dict[str, str] | None = None
    ) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _file(self, file: Path, with_body: bool, *, cut: bool) -> None:
        content = file.read_bytes()
        start, stop = 0, len(content)
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes="):
            first, _, last = asked[6:].partition("-")
            start = int(first) if first else len(content) - int(last)
            stop = min(int(last) + 1, len(content)) if first and last else len(content)
        body = content[start:stop]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{file.stat().st_size:x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2] if cut else body)
            if cut:
                self.close_connection = True


def _described(folder: Path, name: str, rest: list[str], *, deep: bool) -> object:
    """What the API says of a repository, or of the files in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if rest[:1] == ["tree"]:
        top = folder.joinpath(*rest[2:])
        return [_entry(path, folder) for path in sorted(top.rglob("*") if deep else top.iterdir())]
    if rest[:1] == ["paths-info"]:
        return []
    return {
        "id": name,
        "sha": COMMIT,
        "private": False,
        "gated": False,
        "disabled": False,
        "tags": [],
        "siblings": [{"rfilename": path.relative_to(folder).as_posix()} for path in files],
    }


def _entry(path: Path, folder: Path) -> dict[str, object]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
    size = path.stat().st_size
    return {"type": "file", "oid": f"{size:040x}", "size": size, "path": name}
