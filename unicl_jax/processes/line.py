"""Words between processes over TCP: one end of a line, and what comes of its news."""

import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from unicl_jax import exit_codes
from unicl_jax.errors import InputError
from unicl_jax.processes.cluster import Place

_LONGEST = 1 << 26  # bytes of a message
# All processes come to these by themselves, at one step, and may be saving.
_TOGETHER = (exit_codes.NON_FINITE, exit_codes.NOT_SAVED)


class Peer:
    """The other end of a connection, and what was read of it."""

    def __init__(self, connection: socket.socket, keepalive: float):
        """Takes the connection; a host silent for `keepalive` seconds is gone."""
        self.socket, self.buffer, self.done = connection, b"", False
        self.process: int | None = None
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A host that is gone says nothing: three questions without an answer.
        for name, value in {
            "TCP_KEEPIDLE": max(1, int(keepalive) // 2),
            "TCP_KEEPINTVL": max(1, int(keepalive) // 6),
            "TCP_KEEPCNT": 3,
        }.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: dict) -> None:
        """Sends a message, if the other end is still there."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # it is gone; reading tells

    def read(self) -> list[dict | None]:
        """Whole messages; [None] if it has hung up, or talks nonsense."""
        try:
            found = self.socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            found = b""
        if not found:
            return [None]
        *lines, self.buffer = (self.buffer + found).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return [None]
        bad = any(not isinstance(message, dict) for message in messages)
        return [None] if bad or len(self.buffer) > _LONGEST else messages


class Line:
    """What both ends do."""

    def __init__(self, place: Place, keepalive: float):
        """See `Peer`; `place` is this process's."""
        self.place, self._keepalive = place, keepalive
        self.hosts = [*place.hosts] or ["?"] * place.count
        self.news: tuple[int, str] | None = None
        self._heard = threading.Event()
        self._finished = threading.Event()
        self._thread: threading.Thread | None = None

    def wait_for_news(self, seconds: float) -> tuple[int, str] | None:
        """A code and a line about another process, if one fails in that time."""
        self._heard.wait(seconds)
        return self.news

    def name(self, process: int) -> str:
        """As in "process 3 (host-b)"."""
        return f"process {process} ({self.hosts[process]})"

    def close(self) -> None:
        """Hangs up, without a word."""
        self._finished.set()
        if self._thread:
            self._thread.join(1.0)
        self._close()

    def _listen_from_now_on(self):
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _end(self, code, text, patience):
        """Ends this process for another's sake; its own end may come before."""
        if self._finished.is_set() or self.news:
            return
        self.news = (code, text)
        print(f"error: {text}", file=sys.stderr, flush=True)
        self._heard.set()
        if not self._finished.wait(patience):
            sys.stdout.flush()
            os._exit(code)

    def _lost(self, process):
        return (
            f"{self.name(process)} was lost: its connection closed before the run's "
            "end. It was killed (out of memory? preempted?) or crashed: look at its "
            "log. The same command goes on from the newest checkpoint."
        )


def ask(address: str, hello: dict, keepalive: float, seconds: float) -> str | None:
    """What is wrong with this process, as another one says that listens at an address.

    Args:
      address: "host:port".
      hello: who this is.
      keepalive: as for `Peer`.
      seconds: to wait for its word.

    Returns:
      Its error; "" if it hangs up or says nothing else; None if nobody listens.
    """
    host, _, port = address.rpartition(":")
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), seconds)
    except OSError:
        return None
    with connection:
        peer = Peer(connection, keepalive)
        peer.send(hello)
        connection.settimeout(seconds)
        found = peer.read()
    return next((x["error"] for x in found if x and x.get("error")), "")


def listen(
    port: int, seconds: float, while_in_use: Callable[[], None] = lambda: None
) -> socket.socket:
    """A listening socket; waits for a port in use, and raises InputError in the end."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if socket.has_dualstack_ipv6():
                try:
                    return socket.create_server(
                        ("", port), family=socket.AF_INET6, dualstack_ipv6=True
                    )
                except OSError as error:
                    if error.errno == errno.EADDRINUSE:
                        raise
            return socket.create_server(("", port))
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"the coordinator's port must be free on process 0's host: {port} "
                    f"gave {error.strerror}; end what holds it, or name another one "
                    "with JAX_COORDINATOR_PORT or --coordinator_address."
                ) from error
            while_in_use()
            time.sleep(0.5)


def patience(code: int, usual: float) -> float:
    """Seconds that a process has to end by itself when another one ends with `code`."""
    if code in _TOGETHER:
        return 60.0
    # Process 0 holds jax's service, without which jax aborts the others: it goes last.
    return min(usual, 2.0) if code == exit_codes.BAD_INPUT else usual


def say(line: str) -> None:
    """Prints to stderr, at once."""
    print(line, file=sys.stderr, flush=True)
