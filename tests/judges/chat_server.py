"""A chat completions endpoint in this process, on 127.0.0.1."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class ChatServer:
    """What was asked, and how it is answered."""

    reply: Callable[[Any], str | dict[str, Any]]
    """From what the message holds: the text of the reply, or the whole choice."""
    failures: list[int] = field(default_factory=list)
    """HTTP statuses that the next requests are met with, one each."""
    said: bytes = b"failed on purpose"
    """Body of failures."""
    headers: dict[str, str] = field(default_factory=dict)
    """Sent with failures."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of what was asked."""
    keys: list[str | None] = field(default_factory=list)
    """Authorization headers."""
    address: str = ""

    @property
    def prompts(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.requests]


@contextmanager
def serving(reply: Callable[[Any], str | dict[str, Any]]) -> Iterator[ChatServer]:
    """A server for as long as the context lasts."""
    state = ChatServer(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            body = json.loads(self.rfile.read(length))
            state.requests.append(body)
            state.keys.append(self.headers.get("Authorization"))
            if self.path != "/v1/chat/completions":
                self._send(404, b"no such path", {})
            elif state.failures:
                self._send(state.failures.pop(0), state.said, state.headers)
            else:
                content = state.reply(body["messages"][0]["content"])
                text = {"message": {"content": content}}
                response = {"choices": [content if isinstance(content, dict) else text]}
                self._send(200, json.dumps(response).encode(), {})

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
    state.address = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
