"""A line of TCP between process 0 and each of the others, for words.

jax's own start waits for all processes, and aborts without a name when one does not
come; its collectives wait for one that has ended, for minutes. On this line the
processes say who they are before jax starts, agree on what they run, and hear at once
when one fails or is gone. It needs no port but the coordinator's: process 0 listens
there until all have come, and hands it to jax then.
"""

import secrets
import selectors
import socket
import threading
import time
from typing import Any

from unicl_jax import exit_codes
from unicl_jax.errors import InputError
from unicl_jax.processes.agreement import Facts, differences, named
from unicl_jax.processes.cluster import Place
from unicl_jax.processes.line import Line, Peer, ask, listen, patience, say

POLL = 0.2  # seconds between looks at whether to go on listening
REMIND = 30.0  # seconds between lines about who is awaited
LAST = 2.5  # of process 0: without its service jax aborts those that still end


class Missing(RuntimeError):
    """A process did not come in time; the message names it."""


class First(Line):
    """Process 0's ends of the lines."""

    def __init__(self, place: Place, keepalive: float, bind_for: float = 30.0):
        """Listens at the coordinator's port.

        Args:
          place: of process 0.
          keepalive: seconds after which a silent host is taken for gone.
          bind_for: seconds to wait for a port that is in use.

        Raises:
          InputError: if the port stays in use.
        """
        super().__init__(place, keepalive)
        self.hosts[0] = socket.gethostname()
        self._peers: dict[int, Peer] = {}
        self._rounds: dict[str, dict[int, Facts]] = {}
        self._changed = threading.Condition()
        self._selector = selectors.DefaultSelector()
        self._token, self._refused = secrets.token_hex(8), None
        port = place.coordinator.rpartition(":")[2]

        def who_is_there():  # a process 0 of this run, maybe
            if said := self._ask(f"localhost:{port}"):
                raise InputError(said)

        self._listener = listen(int(port), bind_for, who_is_there)
        self._selector.register(self._listener, selectors.EVENT_READ, None)

    def roll_call(self, facts: Facts, seconds: float) -> list[str]:
        """Waits until all have come and compares what they run.

        Args:
          facts: of this process.
          seconds: to wait.

        Returns:
          Differences that a run can live with.

        Raises:
          Missing: naming who did not come.
          InputError: if they differ.
        """
        try:
            told, problem = self._await_all(facts, seconds)
            if problem is None:
                problem, warnings = differences(told)
            self._answer(problem, warnings=[] if problem else warnings)
            if problem:
                raise InputError(problem)
        except BaseException:
            self.close()
            raise
        self._selector.unregister(self._listener)
        self._listener.close()  # the port is jax's now
        self._listen_from_now_on()
        return warnings

    def _ask(self, address):
        """What another process 0 at an address says; see `line.ask`."""
        hello = {"process": 0, "of": self.place.count, "host": self.hosts[0]}
        hello |= {"facts": {}, "token": self._token}
        return ask(address, hello, self._keepalive, 2.0)

    def _look_for_another(self):
        """Until somebody answers at the address that all have: mostly this process."""
        while not self._finished.is_set() and self._refused is None:
            self._refused = self._ask(self.place.coordinator)
            time.sleep(POLL)

    def _await_all(self, facts, seconds):
        threading.Thread(target=self._look_for_another, daemon=True).start()
        told, problem, start = {0: facts}, None, time.monotonic()
        remind = start + REMIND / 3
        while problem is None and len(told) < self.place.count:
            now = time.monotonic()
            if now > start + seconds:
                self._answer(error := self._who_is_missing(told, seconds), True)
                raise Missing(error)
            if now > remind:
                remind = now + REMIND
                say(f"waiting for {named(self._missing(told))} of {self.place.count}")
            for peer, message in self._pump(min(POLL, start + seconds - now + 0.01)):
                if message is None:
                    self._forget(peer)
                    told.pop(peer.process, None)
                else:
                    problem = problem or self._enter(peer, message, told)
            problem = problem or self._refused or None
        return told, problem

    def agree(
        self, name: str, facts: Facts, extra: Any = None
    ) -> tuple[list[str], Any]:
        """As `roll_call`, later: waits for the others' facts of that name.

        Args:
          name: of what is agreed on, for messages.
          facts: of this process.
          extra: given to all.

        Returns:
          Differences that a run can live with, and `extra`.

        Raises:
          InputError: if they differ.
        """
        with self._changed:
            told = self._rounds.setdefault(name, {})
            told[0] = facts
            while len(told) < self.place.count:
                if not self._changed.wait(REMIND):
                    late = self._missing(told)
                    say(f"waiting for {named(late)} to come to the {name}")
            del self._rounds[name]  # another stage of the run may ask again
        problem, warnings = differences(told)
        if problem:
            self._finished.set()
        self._answer(problem, warnings=warnings, extra=extra)
        if problem:
            raise InputError(problem)
        return warnings, extra

    def tell(self, code: int, text: str) -> None:
        """Says to all that this process fails; gives them time to hear."""
        self._finished.set()
        self._send_all({"failed": 0, "code": code, "text": text})
        time.sleep(LAST)

    def finish(self) -> None:
        """Says to all that this process ends as it should."""
        self._finished.set()
        self._send_all({"done": 0})

    def _close(self):
        for key in list((self._selector.get_map() or {}).values()):
            key.fileobj.close()
        self._selector.close()

    def _missing(self, told):
        return sorted(set(range(self.place.count)) - set(told))

    def _who_is_missing(self, told, seconds):
        missing = self._missing(told)
        where = ", ".join(
            f"{i} ({self.place.hosts[i]})" if self.place.hosts else str(i)
            for i in missing[:8]
        ) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        came = ", ".join(f"{i} on {self.hosts[i]}" for i in sorted(told)[:8])
        came += f" and {len(told) - 8} more" if len(told) > 8 else ""
        what = "process" if len(missing) == 1 else "processes"
        verb = "is" if len(missing) == 1 else "are"
        return (
            f"all processes must come within --start_timeout: {len(told)} of "
            f"{self.place.count} came in {seconds:g} s; {what} {where} {verb} missing; "
            f"those that came: {came}. Look at the log of {named(missing)}: not "
            "started, failed before it could say so, or cannot reach "
            f"{self.place.coordinator}."
        )

    def _enter(self, peer, message, told):
        """Writes a newcomer down; returns what is wrong with it."""
        process, of = message.get("process"), message.get("of")
        is_own = message.get("token") == self._token
        if is_own or not isinstance(process, int) or "facts" not in message:
            self._forget(peer)
            return None
        if of != self.place.count or not 0 <= process < self.place.count:
            return (
                f"all processes must be told the same number of them: process 0 was "
                f"told {self.place.count}; process {process} on {message['host']} {of}."
            )
        if process in told:
            return (
                "each process must have a number of its own: two say they are process "
                f"{process}, on {self.hosts[process]} and on {message['host']}. Look "
                "at their --process_id, or for one that is left over from an earlier "
                "start."
            )
        peer.process, self._peers[process] = process, peer
        self.hosts[process], told[process] = message["host"], message["facts"]
        return None

    def _answer(self, error, missing=False, warnings=(), extra=None):
        answer = {"error": error, "missing": missing, "warnings": [*warnings]}
        answer |= {"hosts": self.hosts, "extra": extra}
        self._send_all(answer)
        if error:
            time.sleep(0.5)  # until it is read: this process ends

    def _send_all(self, message):
        for key in list((self._selector.get_map() or {}).values()):
            if key.data is not None:
                key.data.send(message)

    def _forget(self, peer):
        self._selector.unregister(peer.socket)
        self._peers.pop(peer.process, None)
        peer.socket.close()

    def _pump(self, seconds):
        """What came: (peer, message), None for one that has hung up."""
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                connection, _ = self._listener.accept()
                connection.settimeout(30)
                peer = Peer(connection, self._keepalive)
                self._selector.register(connection, selectors.EVENT_READ, peer)
                continue
            for message in key.data.read():
                if key.data.socket.fileno() >= 0:  # not forgotten meanwhile
                    yield key.data, message

    def _follow(self):
        while not self._finished.is_set():
            for peer, message in self._pump(POLL):
                self._hear(peer, message)

    def _hear(self, peer, message):
        if message is None:
            self._forget(peer)
            if peer.done or peer.process is None:
                return
            message = {"failed": peer.process, "code": exit_codes.LOST}
            message["text"] = self._lost(peer.process)
        if "done" in message:
            peer.done = True
        elif "round" in message:
            with self._changed:
                told = self._rounds.setdefault(message["round"], {})
                told[peer.process] = message["facts"]
                self._changed.notify_all()
        elif "failed" in message:
            peer.done = True
            text = message["text"]
            if message["code"] != exit_codes.LOST:
                text = f"{self.name(peer.process)} failed: {text}"
            told = {**message, "text": text}
            if not (self._finished.is_set() or self.news):
                self._send_all(told)
            # It writes the checkpoints: one that is whole but for its name gets it.
            self._end(message["code"], text, patience(message["code"], 5.0))
