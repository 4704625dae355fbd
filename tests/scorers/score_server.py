"""A server of scores in this process, on 127.0.0.1: the brightness of each image."""

from __future__ import annotations

import base64
import io
import json
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image


@dataclass
class ScoreServer:
    """What was asked, and how it is answered."""

    answer: Callable[[dict[str, Any], Sequence[Image.Image]], Any] = lambda request, images: {
        "scores": [brightness(image) for image in images]
    }
    """From a request and its images; an int is the status of a failure, bytes are sent as is."""
    images: str = "images"
    """Field of the images."""
    failures: list[int] = field(default_factory=list)
    """HTTP statuses that the next requests are met with, one each."""
    headers: dict[str, str] = field(default_factory=dict)
    """Sent with failures."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    """Authorization headers."""
    address: str = ""

    @property
    def sizes(self) -> list[int]:
        """Images of each request."""
        return [len(request[self.images]) for request in self.requests]


def brightness(image: Image.Image) -> float:
    """Mean level, 0 to 255."""
    return float(np.asarray(image.convert("RGB"), dtype=np.float64).mean())


def opened(content: str | bytes) -> Image.Image:
    """An image as it was sent."""
    if isinstance(content, str):
        content = base64.b64decode(content.rpartition(",")[2], validate=True)
    return Image.open(io.BytesIO(content))


@contextmanager
def scoring(**settings: Any) -> Iterator[ScoreServer]:
    """A server for as long as the context lasts."""
    state = ScoreServer(**settings)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            pickled = self.headers["Content-Type"] != "application/json"
            request = pickle.loads(content) if pickled else json.loads(content)
            state.requests.append(request)
            state.keys.append(self.headers.get("Authorization"))
            if state.failures:
                self._send(state.failures.pop(0), b"failed on purpose", state.headers)
                return
            reply = state.answer(request, [opened(each) for each in request[state.images]])
            if isinstance(reply, int):
                self._send(reply, b"failed on purpose", {})
            elif isinstance(reply, bytes):
                self._send(200, reply, {})
            else:
                self._send(200, pickle.dumps(reply) if pickled else json.dumps(reply).encode(), {})

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # who asked did not wait for the reply
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_port}/score"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
