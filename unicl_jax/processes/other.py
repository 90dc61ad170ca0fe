"""The end of the roll call's line of every process but the first; see `roll_call`."""

import socket
import threading
import time
from typing import Any

from unicl_jax import exit_codes
from unicl_jax.errors import InputError
from unicl_jax.processes.agreement import Facts
from unicl_jax.processes.line import Line, Peer, patience, say
from unicl_jax.processes.roll_call import POLL, REMIND, Missing

_HEARD = 1.0  # seconds in which the others hear why this process ends


class Other(Line):
    """The end of a process that is not the first."""

    _peer: Peer | None = None

    def roll_call(self, facts: Facts, seconds: float) -> list[str]:
        """Tells process 0 what this one runs; waits until all have come.

        Args:
          facts: of this process.
          seconds: to wait for process 0, which waits as long for the others.

        Returns:
          Differences that a run can live with.

        Raises:
          Missing: naming who did not come.
          InputError: if they differ.
        """
        try:
            return self._take(self._introduce(facts, seconds))[0]
        except BaseException:
            self.close()
            raise

    def _introduce(self, facts, seconds):
        host, _, port = self.place.coordinator.rpartition(":")
        start, why = time.monotonic(), None
        remind = start + REMIND / 3
        while time.monotonic() < start + seconds:
            try:
                left = start + seconds - time.monotonic()
                connection = socket.create_connection(
                    (host.strip("[]"), int(port)), max(0.1, min(10.0, left))
                )
                self._peer = Peer(connection, self._keepalive)
                self._peer.send(
                    {
                        "process": self.place.index,
                        "of": self.place.count,
                        "host": socket.gethostname(),
                        "facts": facts,
                    }
                )
                # Process 0 may have begun to wait later than this one.
                answer = self._await_answer(seconds + 30)
                if answer is not None:
                    return answer
                connection.close()
                why = "it hung up, or is no trainer"
            except OSError as error:
                why = error.strerror or str(error)
            if time.monotonic() > remind:
                remind = time.monotonic() + REMIND
                say(f"waiting for process 0 at {self.place.coordinator} ({why})")
            time.sleep(0.2)
        first = f" ({self.place.hosts[0]})" if self.place.hosts else ""
        raise Missing(
            f"all processes must come within --start_timeout: process 0{first} did not "
            f"answer at {self.place.coordinator} in {seconds:g} s ({why}). Look at its "
            "log; make sure that the address is its host's, and that no firewall "
            f"closes the port. This is process {self.place.index} of "
            f"{self.place.count}, on {socket.gethostname()}."
        )

    def agree(
        self, name: str, facts: Facts, extra: Any = None
    ) -> tuple[list[str], Any]:
        """As of `First`; `extra` is process 0's."""
        del extra
        self._answer = None
        self._answered.clear()
        self._peer.send({"round": name, "facts": facts})
        self._answered.wait()
        return self._take(self._answer)

    def tell(self, code: int, text: str) -> None:
        """Says to all that this process fails; gives them time to hear."""
        self._finished.set()
        self._peer.send({"failed": self.place.index, "code": code, "text": text})
        time.sleep(_HEARD)

    def finish(self) -> None:
        """Says to all that this process ends as it should."""
        self._finished.set()
        self._peer.send({"done": self.place.index})

    def _close(self):
        if self._peer:
            self._peer.socket.close()

    def _await_answer(self, seconds):
        deadline = time.monotonic() + seconds
        self._peer.socket.settimeout(POLL)
        while time.monotonic() < deadline:
            for message in self._peer.read():
                if message is None or "error" in message:
                    return message
        return None

    def _take(self, answer):
        if answer["error"]:
            self._finished.set()
            raise (Missing if answer["missing"] else InputError)(answer["error"])
        self.hosts = answer["hosts"]
        if not hasattr(self, "_answered"):
            self._answered = threading.Event()
            self._listen_from_now_on()
        return answer["warnings"], answer["extra"]

    def _follow(self):
        while not self._finished.is_set():
            for message in self._peer.read():
                if message is None:
                    if not self._peer.done:
                        self._end(exit_codes.LOST, self._lost(0), 0.0)
                    return
                if "error" in message:
                    self._answer = message
                    self._answered.set()
                elif "done" in message:
                    self._peer.done = True
                elif "failed" in message and message["failed"] != self.place.index:
                    self._peer.done |= message["failed"] == 0
                    text = message["text"]
                    if message["failed"] == 0:
                        text = f"{self.name(0)} failed: {text}"
                    code = message["code"]
                    self._end(code, text, patience(code, 0.0))
