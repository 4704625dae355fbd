"""The studio's server: lists runs of a folder and shows the page of each; it reads, and writes
nothing.

Pages are made anew for every request, by the code of `diffalign report`; of the disk only images
and texts within the folder are sent, never a page that somebody put there.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from diffalign.comparison.explorer import explorer_section
from diffalign.comparison.score import SCORES, scores_by_item
from diffalign.data.decoding import IMAGE_SUFFIXES
from diffalign.errors import DiffalignError
from diffalign.files import inside, read_json
from diffalign.generation.manifest import MANIFEST, read_manifest
from diffalign.pages.environment import render
from diffalign.pages.guard import SAFE_HEADERS, Guard
from diffalign.pages.parts import Section, link, page_of, paragraph
from diffalign.reports.curves import accuracies_of
from diffalign.reports.results import result_parts
from diffalign.reports.run_folder import RunFolder, runs_below
from diffalign.reports.run_page import kind_of_run, page_of_runs

_TEXTS = frozenset({".txt", ".json", ".jsonl", ".yaml", ".yml", ".md", ".csv"})
_SHOWN = {"img-src": "'self' data:", "form-action": "'self'"}
"""What pages of the studio are allowed."""


@dataclass(frozen=True)
class Served:
    """Images and pages by their addresses at the studio."""

    folder: Path

    def image(self, file: Path, side: int) -> str:
        return f"/file/{self._name(file)}"

    def page(self, file: Path) -> str:
        if file.name == "report.html" and (file.parent / MANIFEST).is_file():
            return f"/images/{self._name(file.parent)}"
        return ""  # a page of the disk is not sent

    def _name(self, file: Path) -> str:
        return quote(file.relative_to(self.folder).as_posix())


@dataclass(frozen=True)
class Answer:
    """What a browser gets."""

    content: bytes
    kind: str = "text/html; charset=utf-8"
    status: int = 200


class Studio:
    """What is answered to each address, without a network."""

    def __init__(self, folder: Path) -> None:
        """Args:
        folder: of runs, or of one run; nothing outside of it is read.
        """
        self.folder = folder.resolve()
        self._routes: Mapping[str, Callable[[str, Mapping[str, list[str]]], Answer]] = {
            "": self._list,
            "run": self._run,
            "compare": self._compare,
            "images": self._images,
            "file": self._file,
        }

    def answer(self, target: str) -> Answer:
        """The answer to a request.

        Args:
            target: path and query, as in the first line of the request.
        """
        asked = urlsplit(target)
        route, _, name = asked.path.lstrip("/").partition("/")
        handler = self._routes.get(route)
        if handler is None:
            return self._problem("There is no such page.", 404)
        try:
            return handler(unquote(name), parse_qs(asked.query))
        except (DiffalignError, OSError, ValueError) as error:
            return self._problem(str(error), 404)

    def _list(self, name: str, query: Mapping[str, list[str]]) -> Answer:
        if name:
            return self._problem("There is no such page.", 404)
        rows = []
        for path in runs_below(self.folder):
            run = RunFolder.at(path)
            short = path.relative_to(self.folder).as_posix()
            accuracy = run.last("held_out/accuracy")
            for name in ("accuracy", *accuracies_of(run)):
                accuracy = run.last(name) if accuracy is None else accuracy
            loss = run.last("loss")
            rows.append(
                {
                    "name": run.name if short == "." else short,
                    "value": short,
                    "address": f"/run/{quote(short)}",
                    "kind": kind_of_run(run),
                    "state": run.status,
                    "step": f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else ""),
                    "loss": "" if loss is None else f"{loss:.4g}",
                    "accuracy": "" if accuracy is None else f"{accuracy:.0%}",
                    "verdicts": [str(each.get("verdict")) for each in run.verdicts],
                }
            )
        return self._page(
            render("studio.html", title="Runs", lead=str(self.folder), rows=rows, allow=_SHOWN)
        )

    def _run(self, name: str, query: Mapping[str, list[str]]) -> Answer:
        return self._page(
            page_of_runs([self._run_at(name)], Served(self.folder), above=_back(), allow=_SHOWN)
        )

    def _compare(self, name: str, query: Mapping[str, list[str]]) -> Answer:
        names = list(dict.fromkeys(query.get("run", [])))
        if len(names) < 2 or len(names) > 6:
            return self._problem("Choose two runs, or up to six, to hold them side by side.", 400)
        runs = [self._run_at(each) for each in names]
        return self._page(page_of_runs(runs, Served(self.folder), above=_back(), allow=_SHOWN))

    def _images(self, name: str, query: Mapping[str, list[str]]) -> Answer:
        """All images of a comparison, as on its own page."""
        folder = self._inside(name)
        rows = {row.key: row for row in read_manifest(folder)}
        found = folder / "compare.json"
        content = read_json(found) if found.is_file() else {}
        models = list(dict.fromkeys(model for model, _, _ in rows))
        baseline = content.get("baseline") or models[0]
        models = [baseline, *(model for model in models if model != baseline)]
        scores = {
            file.stem: scores_by_item(folder, file)
            for file in sorted((folder / SCORES).glob("*.jsonl"))
        }
        sections = [Section("Result", *result_parts(content))] if content else []
        sections.append(
            explorer_section(
                folder,
                folder / "report.html",
                rows,
                models,
                scores,
                tie_tolerance=float(content.get("tie_tolerance", 0.0)),
                served=f"/file/{quote(name)}",
            )
        )
        return self._page(page_of(name, *sections, above=_back(), allow=_SHOWN))

    def _file(self, name: str, query: Mapping[str, list[str]]) -> Answer:
        file = self._inside(name)
        if any(part.startswith(".") for part in Path(name).parts) or not file.is_file():
            return self._problem(f"There is no file {name}.", 404)
        suffix = file.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
            return Answer(file.read_bytes(), kind)
        if suffix in _TEXTS:
            return Answer(file.read_bytes(), "text/plain; charset=utf-8")
        return self._problem("Only images and texts are sent.", 403)

    def _run_at(self, name: str) -> RunFolder:
        return RunFolder.at(self.folder if name == "." else self._inside(name))

    def _inside(self, name: str) -> Path:
        return inside(self.folder, name)

    def _problem(self, sentence: str, status: int) -> Answer:
        said = page_of("diffalign studio", Section(sentence, paragraph(_back())), allow=_SHOWN)
        return Answer(said.encode(), status=status)

    @staticmethod
    def _page(text: str) -> Answer:
        return Answer(text.encode())


def _back() -> Any:
    return link("All runs", "/")


def server_of(studio: Studio, guard: Guard, port: int) -> ThreadingHTTPServer:
    """A server that answers while `serve_forever` runs.

    Args:
        studio: what it shows.
        guard: whom it answers, and the address it listens on.
        port: 0 takes a free one.

    Raises:
        OSError: the port is taken, or the address is none of this machine.
    """

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "diffalign", ""

        def do_GET(self) -> None:
            refusal = guard.refusal(dict(self.headers.items()))
            if refusal is not None:
                said = Answer(
                    refusal.sentence.encode(), "text/plain; charset=utf-8", refusal.status
                )
                return self._send(said, refusal.headers)
            return self._send(studio.answer(self.path), {})

        do_HEAD = do_GET

        def _send(self, answer: Answer, headers: Mapping[str, str]) -> None:
            self.send_response(answer.status)
            told = {"Content-Type": answer.kind, "Content-Length": str(len(answer.content))}
            for name, value in {**SAFE_HEADERS, **told, **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(answer.content)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: every image would be a line."""

    if ":" in guard.address:
        import socket

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6

        return Server((guard.address, port), Handler)
    return ThreadingHTTPServer((guard.address, port), Handler)
