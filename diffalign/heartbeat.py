"""Signs of life between the processes that train together: none waits for one that is gone.

A rank whose peers are in a collective waits for as long as `world.LONGEST_WAIT`, since sampling a
round may take hours. What tells slow from gone is a thread of every rank: it holds one connection
between its rank and the main one, and sends a byte over it every few seconds. A closed connection
is a process that ended, and silence one that is stopped, or a machine or network that is gone.
Whoever notices it ends the run, with one sentence from the main rank.

A rank whose main thread is stuck while its threads run goes on sending: that is not noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from diffalign import __version__, versions, world
from diffalign.errors import ConfigError

SILENCE_S = 45.0
"""Seconds of silence after which a rank is taken for gone, so that a run ends within a minute.

Not less: the thread that sends needs Python's lock, which some calls hold while they work. The
longest of a run is the reading of a JSON file, 7 s a gigabyte of conversations and 26 s a gigabyte
of numbers on one core of the machine that docs/performance.md measures."""
EVERY_S = 3.0
"""Seconds between two signs of life."""
GRACE_S = 2.0
"""Seconds between the end of a process and that of the run: a launcher on the same machine knows
more of it, and speaks first."""
ERROR_GRACE_S = 20.0
"""Seconds between the error of a rank and the end of the others, where they notice nothing of it:
they may be ending by the same error, and closing their trackers."""
ARRIVAL_S = 300.0
"""Seconds in which all ranks have to start and meet. Before they have met nothing tells one that is
slow to import from one that is gone; importing over a slow network takes minutes at worst."""
MEETING_S = 60.0
"""Seconds in which the ranks, who have all started, reach the main one."""

BEAT, ENDED, FAILED, STOP = b".", b"e", b"f", b"x"
"""What is sent: still here; leaving, all is well; leaving with an error; end at once, it was told
why."""
_TICK_S = 0.5
_SHAPE_WEIGHTS = ("torch", "accelerate", "diffusers", "transformers", "peft")
_LOST = re.compile(r"gloo|NCCL|ProcessGroup|connection (closed|reset)|broken pipe", re.IGNORECASE)

_SILENT = (
    "Rank {rank} on {host} (process {pid}) has given no sign of life since {since}: it is stopped, "
    "or its machine or network is gone. The run ends here. Go on with --resume"
)
_GONE = (
    "Rank {rank} on {host} (process {pid}) ended at {since} without a word, as where the system "
    "kills a process because memory runs out. The run ends here. Go on with --resume"
)
_ERROR = (
    "Rank {rank} on {host} (process {pid}) ended with an error at {since}, which its own output "
    "tells. The run ends here. Go on with --resume"
)
_ALONE = (
    "Rank {rank} on {host} waited {seconds:.0f} s for all {size} ranks of the run to start and "
    "meet at {address}: one has ended before, or cannot reach that place. The output of the others "
    "tells more; start all again"
)


@dataclass(frozen=True)
class Member:
    """A process of the run, as the others know it."""

    host: str
    pid: int
    versions: dict[str, str]
    port: int
    """Where the main rank listens; 0 of any other."""
    secret: bytes
    """What whoever connects to the main rank has to know; empty of any other."""


@dataclass
class _Peer:
    rank: int
    connection: socket.socket
    said: bytes = BEAT
    is_open: bool = True
    quiet: float = 0.0
    """Seconds since it was heard of, or since its end, in which this process itself ran."""
    heard: datetime = field(default_factory=datetime.now)


class Heartbeat:
    """Within this context the end or the silence of a rank ends the run; all ranks together.

    It is entered before the process group is made, and `meet` follows that. In between, this
    process ends if the others do not come. One process alone does nothing here.
    """

    def __init__(
        self,
        *,
        silence: float = SILENCE_S,
        every: float = EVERY_S,
    ) -> None:
        """Args:
        silence: seconds after which a rank is taken for gone.
        every: seconds between two signs of life.
        """
        self._silence, self._every = silence, every
        self._members: list[Member] = []
        self._peers: dict[int, _Peer] = {}
        self._farewell = b""
        self._is_lost = False
        """Whether this rank waits for nothing but to be told who is gone."""
        self._thread: threading.Thread | None = None
        self._met = threading.Event()

    def __enter__(self) -> Heartbeat:
        if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
            threading.Thread(target=self._wait_for_all, name="arrival", daemon=True).start()
        return self

    def meet(self) -> None:
        """Find the other ranks of the process group, and listen to them from now on.

        Raises:
            ConfigError: they run other versions of the package, or of a library that shapes
                weights.
        """
        if world.size() > 1:
            hosts = world.Hosts()
            hosts.open()
            try:
                self._meet(hosts)
            finally:
                hosts.close()
        self._met.set()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._met.set()
        if self._thread is None:
            return
        if error is not None and _is_of_the_group(error):
            # Another rank is gone: the thread finds out which, says so, and ends this process. A
            # launcher that noticed as well is in no hurry.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._is_lost = True
            self._thread.join(self._silence + 2 * self._every + 5 * GRACE_S)
        self._farewell = FAILED if error is not None else ENDED
        self._waker.close()
        self._thread.join()

    def _wait_for_all(self) -> None:
        """End this process where the ranks do not meet, in a thread."""
        place = os.environ
        # The main rank goes last: it holds the store, whose loss torch would tell at length.
        if not self._met.wait(ARRIVAL_S + GRACE_S * (place.get("RANK") == "0")):
            sentence = _ALONE.format(
                rank=place.get("RANK", "?"),
                host=socket.gethostname(),
                seconds=ARRIVAL_S,
                size=place["WORLD_SIZE"],
                address=f"{place.get('MASTER_ADDR')}:{place.get('MASTER_PORT')}",
            )
            sys.stderr.write(f"{sentence}\n")
            _exit()

    def _meet(self, hosts: world.Hosts) -> None:
        listener = _listener() if world.is_main() else None
        self._members = hosts.gather(_this_member(listener))
        _refuse_other_versions(self._members)
        problem = ""
        try:
            if listener is None:
                self._connect()
            else:
                self._accept(listener)
        except OSError as error:
            problem = f"rank {world.rank()} on {socket.gethostname()}: {error}"
        finally:
            if listener is not None:
                listener.close()
        if problem := next(filter(None, hosts.gather(problem)), ""):
            for peer in self._peers.values():
                peer.connection.close()
            if world.is_main():
                print(
                    f"The ranks cannot reach the main one outside of their group ({problem}), so "
                    f"that a rank that hangs is not noticed: open all ports between the "
                    f"machines of the run",
                    file=sys.stderr,
                )
            return
        self._wake, self._waker = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ)
        for peer in self._peers.values():
            peer.connection.setblocking(False)
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def _connect(self) -> None:
        main = self._members[0]
        address = (os.environ.get("MASTER_ADDR", main.host), main.port)
        connection = socket.create_connection(address, timeout=MEETING_S)
        connection.sendall(main.secret + world.rank().to_bytes(4, "big"))
        self._peers[0] = _Peer(0, connection)

    def _accept(self, listener: socket.socket) -> None:
        secret = self._members[0].secret
        listener.settimeout(MEETING_S)
        while len(self._peers) < world.size() - 1:
            connection, _ = listener.accept()
            connection.settimeout(MEETING_S)
            greeting = _exactly(connection, len(secret) + 4)
            if greeting[:-4] == secret:
                rank = int.from_bytes(greeting[-4:], "big")
                self._peers[rank] = _Peer(rank, connection)
            else:
                connection.close()

    def _watch(self) -> None:
        """Send and listen until the run ends, in a thread."""
        due = last = time.monotonic()
        while not self._farewell:
            self._listen(_TICK_S)
            now = time.monotonic()
            if now >= due:
                self._send(BEAT)
                due = now + self._every
            # Of a time in which this process was stopped itself it knows nothing.
            passed, last = min(now - last, 2 * self._every), now
            for peer in self._peers.values():
                peer.quiet += passed
                self._judge(peer)
        self._leave()

    def _listen(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if key.data is not None:
                self._read(key.data)

    def _read(self, peer: _Peer) -> None:
        try:
            received = peer.connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        peer.quiet, peer.heard = 0.0, datetime.now()
        if STOP in received:
            _exit()
        for said in (ENDED, FAILED):
            if said in received:
                peer.said = said
        if not received:
            self._close(peer)

    def _send(self, message: bytes) -> None:
        for peer in self._peers.values():
            if peer.is_open:
                with contextlib.suppress(OSError):  # whoever is gone shows so when it is read
                    peer.connection.send(message)

    def _close(self, peer: _Peer) -> None:
        if peer.is_open:
            peer.is_open = False
            self._selector.unregister(peer.connection)
            peer.connection.close()

    def _judge(self, peer: _Peer) -> None:
        """End the run where a rank is gone."""
        if peer.said == ENDED:
            return
        ended = peer.said == FAILED or not peer.is_open
        grace = ERROR_GRACE_S if peer.said == FAILED and not self._is_lost else GRACE_S
        if peer.quiet < (min(grace, self._silence) if ended else self._silence):
            return
        told = _ERROR if peer.said == FAILED else _GONE if ended else _SILENT
        if self._speaks_after(peer.rank) and not (told is _ERROR and peer.rank == 0):
            member = self._members[peer.rank]
            sentence = told.format(
                rank=peer.rank,
                host=member.host,
                pid=member.pid,
                since=f"{peer.heard:%H:%M:%S}",
            )
            sys.stderr.write(f"{sentence}\n")  # in one piece: other ranks may speak as well
        self._farewell = STOP
        self._leave()
        _exit()

    def _speaks_after(self, gone: int) -> bool:
        """Whether this rank tells of the end of another: the main one does, and of its own end the
        first one of every machine that is left."""
        ranks = [rank for rank in range(len(self._members)) if rank != gone]
        if gone != 0:
            return world.rank() == 0
        here = self._members[world.rank()].host
        return world.rank() == next(r for r in ranks if self._members[r].host == here)

    def _leave(self) -> None:
        """Say farewell, and wait a moment until it was heard: a connection that is closed with
        something in it to be read may take the last message with it."""
        self._send(self._farewell)
        for peer in self._peers.values():
            if peer.is_open:
                with contextlib.suppress(OSError):
                    peer.connection.shutdown(socket.SHUT_WR)
        self._selector.unregister(self._wake)
        until = time.monotonic() + GRACE_S
        while any(p.is_open for p in self._peers.values()) and time.monotonic() < until:
            self._listen(_TICK_S / 5)
        for peer in self._peers.values():
            self._close(peer)
        self._selector.close()
        self._wake.close()


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=world.size()
        )
    return socket.create_server(("", 0), backlog=world.size())


def _exactly(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count and (part := connection.recv(count - len(received))):
        received += part
    return received


def _is_of_the_group(error: BaseException) -> bool:
    """Whether an error is that of a collective whose other ranks are gone."""
    distributed = getattr(dist, "DistError", ())
    return isinstance(error, distributed) or (
        isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
    )


def _exit() -> NoReturn:
    """End this process from a thread, whatever its main one waits for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(1)


def _this_member(listener: socket.socket | None) -> Member:
    return Member(
        host=socket.gethostname(),
        pid=os.getpid(),
        versions=_versions(),
        port=0 if listener is None else listener.getsockname()[1],
        secret=b"" if listener is None else secrets.token_bytes(16),
    )


@cache
def _versions() -> dict[str, str]:
    """Of everything that shapes weights; the package with a digest of its source files, since two
    checkouts may have one version."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    found = {name: versions.installed(name) or "none" for name in _SHAPE_WEIGHTS}
    return {"diffalign": f"{__version__}, sources {digest.hexdigest()[:8]}", **found}


def _refuse_other_versions(members: list[Member]) -> None:
    """Raise ConfigError on the main rank, and end the others, where versions differ."""
    main = members[0]
    for rank, member in enumerate(members):
        for name, version in main.versions.items():
            if (theirs := member.versions[name]) == version:
                continue
            if not world.is_main():
                raise SystemExit(1)
            raise ConfigError(
                f"rank {rank} on {member.host} runs {name} {theirs}, and rank 0 on {main.host} "
                f"{name} {version}: processes that train together need the same versions. Install "
                f"the same environment on every machine (diffalign env lists it)"
            )
