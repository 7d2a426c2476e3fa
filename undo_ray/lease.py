"""The right to write a run directory: `lock.json`, a lease renewed by a thread and checked at every commit.

On a local disk taking it is atomic. Where the store has no atomic create (pyarrow offers none for object stores) two drivers
started within the same second may both believe they hold it; the first commit after that stops the loser.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.fs as pafs

from undo_ray.place import Place
from undo_ray.types import UserError, first_line, now, unusable

LEASE_SECONDS = 90
"""A lease not renewed for this long belongs to a dead driver."""

_KEYS = {"token", "host", "machine", "pid", "started", "since", "renewed"}


class Lease:
    """Held from `take` to `release`."""

    def __init__(self, place: Place, token: str):
        self.place, self.token = place, token
        self._since = now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="undo_ray lease")

    @classmethod
    def take(cls, run: Place, say: Callable[[str], None]) -> Lease:
        """Raises UserError (exit code 4) saying who holds it and since when, or that nothing can be written there.

        A holder on another machine is watched until it renews or has not for long; `say` is told why that takes its time.
        """
        lease = cls(run / "lock.json", uuid.uuid4().hex)
        try:
            for _ in range(3):
                if lease._create():
                    lease._thread.start()
                    return lease
                holder = _read(lease.place)
                if holder and not _here(holder):
                    holder, before = lease._watched(holder, say), holder
                    lives = holder != before
                else:
                    lives = holder is not None and not _dead(holder)
                if holder and lives:
                    who = f"pid {holder['pid']} on {holder['host']} since {holder['since']}"
                    raise unusable(f"{lease.place.uri}: held by {who}; wait for it, or stop it and run the same command")
                if holder is not None:
                    lease._clear(holder)
        except OSError as error:
            what = f"cannot be used as a run directory ({first_line(error)}); give one that can be written"
            raise unusable(f"{run.uri}: {what}") from None
        raise unusable(f"{lease.place.uri}: another driver takes this run directory at the same time; start one")

    def _content(self) -> dict[str, Any]:
        me = {"token": self.token, "host": socket.gethostname(), "machine": _machine(), "pid": os.getpid()}
        return {**me, "started": psutil.Process().create_time(), "since": self._since, "renewed": time.time()}

    def _create(self) -> bool:
        """Write the lock unless there is one. On a local disk by a hard link: atomic, and never seen half written."""
        if isinstance(self.place.fs, pafs.LocalFileSystem):
            own = Place(f"{self.place.uri}.{self.token}")
            own.write_json(self._content())
            try:
                os.link(own.path, self.place.path)
                return True
            except FileExistsError:
                return False
            finally:
                own.remove()
        if self.place.exists():
            return False
        self.place.write_json(self._content())
        return True

    def _watched(self, holder: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any] | None:
        """What the lock of another machine says once it changes, or what it said when that did not happen for too long.

        Its clock and ours may disagree, so no more than the least wait depends on them.
        """
        age = time.time() - holder["renewed"]
        seconds = min(LEASE_SECONDS, max(LEASE_SECONDS / 3, LEASE_SECONDS - age))
        who = f"pid {holder['pid']} on {holder['host']}"
        say(f"{self.place.uri}: {who} gave its last sign of life {age:.0f} s ago; waiting up to {seconds:.0f} s for another")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(LEASE_SECONDS / 90)
            if (found := _read(self.place)) != holder:
                return found
        return holder

    def _clear(self, dead: dict[str, Any]) -> None:
        """Take a dead holder's lock away, or one that cannot be read. On a local disk one driver at a time may do so, and looks
        once more: the lock may be a living driver's by now, who took the dead one's away before."""
        if not isinstance(self.place.fs, pafs.LocalFileSystem):
            self.place.remove()
            return
        claim = f"{self.place.path}.{dead.get('token', 'damaged')}.dead"
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            with suppress(FileNotFoundError):  # it is gone already
                if time.time() - os.path.getmtime(claim) > LEASE_SECONDS:  # whose driver died over it
                    os.remove(claim)
            return
        try:
            found = _read(self.place)
            if found is not None and found.get("token") == dead.get("token"):
                self.place.remove()
        finally:
            os.remove(claim)

    def check(self) -> None:
        """Raises UserError when another driver has taken the directory over."""
        holder = _read(self.place)
        if not holder or holder["token"] != self.token:
            who = f"pid {holder['pid']} on {holder['host']}" if holder else "somebody"
            raise unusable(f"{self.place.uri}: {who} has taken this run directory over; this driver stops")

    def _renew(self) -> None:
        while not self._stop.wait(LEASE_SECONDS / 6):
            try:
                self.check()
                self.place.write_json(self._content())
            except UserError:
                return  # the next commit says so, in the driver's own thread
            except OSError:
                continue  # a passing storage error: the lease outlives five of them

    def release(self) -> None:
        """Give it back, unless it is somebody else's by now."""
        self._stop.set()
        self._thread.join()
        holder = _read(self.place)
        if holder and holder["token"] == self.token:
            self.place.remove()


def holder(run: Place) -> tuple[dict[str, Any] | None, bool]:
    """(who holds a run directory or held it when it died, whether it lives); (None, False) where nobody does."""
    found = _read(run / "lock.json") or None
    return found, found is not None and not _dead(found)


def _read(lock: Place) -> dict[str, Any] | None:
    """What a lock says; None when there is none, {} when it cannot be a driver's."""
    try:
        return lock.read_json("", valid=_is_lease)
    except FileNotFoundError:
        return None
    except UserError:
        return {}


def _is_lease(found: dict[str, Any]) -> bool:
    if not found.keys() >= _KEYS or not isinstance(found["renewed"], int | float):
        return False
    return bool(re.fullmatch(r"[0-9a-f]{32}", str(found["token"])))


def _machine() -> str:
    """Where a process id of ours is this process: two containers of a host may share its name and not their processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _here(holder: dict[str, Any]) -> bool:
    """Whether we would see the holder's process."""
    return bool(holder["machine"] == _machine())


def _dead(holder: dict[str, Any]) -> bool:
    """Whether a lease's holder is gone: not renewed for long by our clock, or a process we would see and do not."""
    if not holder or time.time() - holder["renewed"] > LEASE_SECONDS:
        return True
    if not _here(holder):
        return False
    try:
        process = psutil.Process(holder["pid"])
        # The kernel's start times move by fractions of a second when the clock is stepped.
        return abs(process.create_time() - holder["started"]) > 5 or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
