"""Small folders and data sets for people to label, and a client of their server."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from diffalign.files import add_json_lines, sha256_of, write_atomically
from diffalign.generation.manifest import ManifestRow, append_rows
from diffalign.labelling.items import AbstractItems
from diffalign.labelling.server import Pages, listen, server_of
from diffalign.labelling.session import Session
from diffalign.pages.guard import Guard
from tests.layouts import encoded, solid_image


def generated(folder: Path, *, prompts: int = 3, models=("base", "new"), seeds: int = 1) -> Path:
    """A folder as `diffalign generate` writes it; every image has a colour of its own."""
    rows = []
    for p in range(prompts):
        for m, model in enumerate(models):
            for seed in range(seeds):
                file = f"images/{model}/p{p}-{seed}.png"
                colour = (p % 256, 40 + 80 * m, 17 * seed + p // 256)
                write_atomically(folder / file, encoded(solid_image(colour)))
                rows.append(
                    ManifestRow(
                        model=model,
                        prompt=f"a thing, number {p}",
                        prompt_id=f"p{p}",
                        seed=seed,
                        file=file,
                        sha256=sha256_of(folder / file),
                        fingerprint=model,
                        sampler={},
                    )
                )
    append_rows(folder, rows)
    return folder


def grouped(folder: Path, *, groups: int = 3, images: int = 4) -> Path:
    """A folder of groups; their trajectories are not read by those who label."""
    rows = []
    for g in range(groups):
        files = [f"images/g{g}-{i}.png" for i in range(images)]
        for i, file in enumerate(files):
            write_atomically(folder / file, encoded(solid_image((60 * i, 30 * g, 90))))
        rows.append(
            {
                "group": f"g{g}",
                "prompt": f"animal {g}",
                "prompt_id": f"g{g}",
                "seed": 0,
                "images": files,
                "trajectories": f"trajectories/g{g}.safetensors",
            }
        )
    add_json_lines(folder / "groups.jsonl", rows)
    return folder


def responses(folder: Path, *, rows: int = 3) -> Path:
    """Rows of TRL's form, each with an image."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(rows):
        (folder / f"{number}.png").write_bytes(encoded(solid_image((number, 90, 0))))
    add_json_lines(
        folder / "rows.jsonl",
        [
            {
                "images": [f"{number}.png"],
                "prompt": f"What is number {number}?",
                "chosen": f"a good answer <b>{number}</b>",
                "rejected": f"a bad answer {number}",
            }
            for number in range(rows)
        ],
    )
    return folder / "rows.jsonl"


class Client:
    """Somebody's browser without the page: cookies, JSON and the headers that matter."""

    def __init__(self, port: int, name: str | None = None, **headers: str) -> None:
        self.port, self.headers = port, {"Host": f"127.0.0.1:{port}", **headers}
        if name is not None:
            self.headers["Cookie"] = f"diffalign-label-{port}={quote(name)}"

    def ask(self, path: str, sent: Any = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers (in lower case) of a request; a POST where something is sent."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        body = sent if isinstance(sent, (bytes, type(None))) else json.dumps(sent)
        method = "GET" if sent is None else "POST"
        connection.request(method, path, body, {**self.headers, **headers})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, content, {k.lower(): v for k, v in response.getheaders()}

    def state(self) -> dict[str, Any]:
        status, content, _ = self.ask("/state")
        assert status == 200, content
        return json.loads(content)

    def answer(self, choice: str, **more: Any) -> dict[str, Any]:
        """Answer what is asked now; the state after it."""
        item = self.state()["item"]["token"]
        status, content, _ = self.ask("/answer", {"item": item, "answer": choice, **more})
        assert status == 200, content
        return json.loads(content)


@contextlib.contextmanager
def served(
    items: AbstractItems, folder: Path, *, guard: Guard | None = None, **settings: Any
) -> Iterator[tuple[int, Session]]:
    """The port of a server in a thread, and its session."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"order": range(len(items.items)), **settings}
    session = Session(items, folder, **settings)
    guard = guard or Guard.of("127.0.0.1")
    pages = Pages(session, guard, question="Which?", agreement=lambda: "<p>agreement</p>")
    with listen("127.0.0.1", 0) as listener:
        server = server_of(pages.app())
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1], session
        finally:
            server.should_exit = True
            thread.join()
