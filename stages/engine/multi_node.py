"""Several machines in one stage: each says that it lives, gets on, and how it ended, and hears the same of the others.

A machine that is cut off sends nothing, not even an error: whoever waits for its tensors would wait for hours. So one rank of
every machine puts a sign into torchrun's key-value store, which the first machine holds, every two seconds, and reads the
others'. Who hears nothing of one for `frozen_s` ends its part, so that both sides of a cut end. A rank that fails says so
there, and the other machines end at once, in its words. Nothing goes through the stage's folder: it may be each machine's own.
"""

import datetime as dt
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import TCPStore

from stages.contract.errors import UserError
from stages.runtime import heartbeat
from stages.store.files import digest_path, write_bytes
from stages.store.manifest import InputRecord

Word = dict[str, Any]
"""How a rank ended: `rank`, `host` (number of its machine), `status`, `message`, `mend`."""
TOKEN = ".first-host"  # noqa: S105 - no secret: a mark by which a machine sees whether it shares a folder
_ENDED, _STAGE = "r1/ended", "r1/stage"
_PARTING = 5.0
"""Seconds that a rank which ends may spend on saying so."""


def count() -> int:
    """How many machines the stage runs on."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def mark(folder: Path) -> str:
    """Put a mark into a folder and return it: who finds it there sees the same folder."""
    token = secrets.token_hex(16)
    write_bytes(folder / TOKEN, token.encode())
    return token


def sees(folder: Path, token: str) -> bool:
    """Whether the mark is in what this machine calls by that name."""
    try:
        return (folder / TOKEN).read_text() == token
    except OSError:
        return False


class Hosts:
    """A rank's side of it. Under torchrun on several machines only."""

    def __init__(self, attempt: Path, rank: int, frozen_s: float) -> None:
        """`attempt`: where this machine's ranks leave their signs; `frozen_s`: how long a machine may be silent."""
        self.number, self.rank = int(os.environ["GROUP_RANK"]), rank
        self.first = os.environ["LOCAL_RANK"] == "0"
        """Whether this rank speaks for its machine."""
        self._attempt, self._frozen_s, self._left = attempt, frozen_s, False
        self._address, self._port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = self._connect()
        now = time.monotonic()
        self._answered, self._lost = now, ""
        self._heard = {number: (b"", now) for number in range(count()) if number != self.number}
        """Machine -> its last sign, and when that came, by this process's clock."""
        self._gone: set[int] = set()
        """Machines that have done their part."""
        self._word: Word | None = None

    def _connect(self) -> TCPStore:
        patience = dt.timedelta(seconds=self._frozen_s)
        return TCPStore(self._address, self._port, is_master=False, timeout=patience, wait_for_workers=False)

    def watch(self, end: Callable[[Word], object]) -> None:
        """From now on give signs, and call `end` once when another machine has failed, or is silent for too long."""
        if not self.first:
            return

        def look() -> None:
            word = None
            while word is None and not self._left:
                time.sleep(heartbeat.PERIOD / 2)
                word = self.complaint()
            if word is not None and not self._left:
                end(word)

        for target in (self._exchange, look):
            threading.Thread(target=target, daemon=True, name="hosts").start()

    def _exchange(self) -> None:
        try:
            store, known, beat = self._connect(), set[int](), 0
            while True:
                beat += 1
                sign = {"beat": beat, "progress": heartbeat.newest_progress(self._attempt), "name": socket.gethostname()}
                store.set(_alive(self.number), json.dumps(sign))
                known |= {number for number in self._heard if number not in known and store.check([_alive(number)])}
                for number in known - self._gone:
                    self._hear(number, store.get(_alive(number)))
                    if store.check([_left(number)]):
                        self._gone.add(number)
                if store.check([_ENDED]):
                    self._word = json.loads(store.get(_ENDED))
                self._answered = time.monotonic()
                time.sleep(heartbeat.PERIOD)
        except RuntimeError as error:  # torch's network errors
            self._lost = str(error).splitlines()[0]

    def _hear(self, number: int, sign: bytes) -> None:
        before, _ = self._heard[number]
        if sign == before:
            return
        self._heard[number] = (sign, time.monotonic())
        if not before or json.loads(sign)["progress"] != json.loads(before)["progress"]:
            (self._attempt / f"progress-host{number}").touch()  # for the parent's watchdog

    def complaint(self) -> Word | None:
        """How another machine failed, or that it is silent; None while all is well."""
        now = time.monotonic()
        if self._word is not None and self._word["host"] != self.number:
            return self._word
        first = f"the first machine ({self._address})"
        if self._lost:
            return self._failed(f"{first} has ended its part, or its network ({self._lost})")
        if (age := now - self._answered) > self._frozen_s:
            return self._failed(f"{first} has not answered for {age:.0f} s: it is gone, or cut off")
        for number, (sign, since) in self._heard.items():
            if number not in self._gone and (age := now - since) > self._frozen_s:
                name = f" ({json.loads(sign)['name']})" if sign else ""
                return self._failed(f"machine {number}{name} has given no sign of life for {age:.0f} s: it is gone, or cut off")
        return None

    def _failed(self, message: str) -> Word:
        word = {"rank": self.rank, "host": self.number, "status": "failed", "message": message}
        return word | {"mend": "see that the machines reach each other, then r1 resume"}

    def agree(self, folder: Path, fingerprint: str, inputs: Mapping[str, InputRecord]) -> None:
        """See that every machine is about to do the same: the first one's stage, from the same inputs.

        In a folder of its own a machine reads every input through, and anywhere those that are no stage's output. Raises
        UserError when its stage is another one, or an input is not what the first machine has.
        """
        if self.rank == 0:
            self._store.set(_STAGE, json.dumps({"fingerprint": fingerprint, "token": mark(folder)}))
        if self.number == 0 or not self.first:
            return
        wanted = json.loads(self._store.get(_STAGE))
        if wanted["fingerprint"] != fingerprint:
            mend = "copy the stage's folder from the first machine again"
            raise UserError("another computation than the first machine's", where=str(folder / "config.json"), mend=mend)
        shared = sees(folder, wanted["token"])
        for role, item in inputs.items():
            if (shared and item.stage is not None) or not item.digest:
                continue
            if item.files:  # settings and code, which every machine has compared (stages/store/user_files.py)
                continue
            path, mend = Path(item.path), "copy it from the first machine to the same path"
            where = f"{socket.gethostname()}: {path}"
            if not path.exists():
                raise UserError(f"the input `{role}` is missing on this machine", where=where, mend=mend)
            if digest_path(path) != item.digest:
                raise UserError(f"the input `{role}` is not what the first machine has", where=where, mend=mend)

    def leave(self, outcome: Mapping[str, Any]) -> None:
        """Say how this rank ended: the last thing it does. The others end with it unless it is done or was interrupted."""
        self._left = True
        told = threading.Thread(target=self._tell, args=(outcome,), daemon=True, name="parting")
        told.start()
        told.join(_PARTING)  # over a network that is cut it would wait for ever

    def _tell(self, outcome: Mapping[str, Any]) -> None:
        if outcome["status"] in ("done", "interrupted"):
            if self.first:
                self._store.set(_left(self.number), "")
            return
        word = {"rank": self.rank, "host": self.number, **{key: outcome[key] for key in ("status", "message", "mend")}}
        self._store.compare_set(_ENDED, "", json.dumps(word))  # the first one counts: the others may only have lost their peer
        if self.number == 0:  # with this machine the store goes
            time.sleep(heartbeat.PERIOD * 1.5)


def _alive(number: int) -> str:
    return f"r1/alive/{number}"


def _left(number: int) -> str:
    return f"r1/left/{number}"
