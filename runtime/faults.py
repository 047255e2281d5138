"""When a rank of the job is lost, the others stop with one sentence instead of waiting for ever.

with runtime.process_group("gloo", timeout_s=120):   # torchrun's environment says rank and world size
    engine = runtime.initialize(...)
    ...

A lost rank shows in three ways. gloo breaks off a collective as soon as a process is gone, or after the time-out;
NCCL's own watchdog ends a process after the time-out. And beside both every process has a thread that beats in the
group's store, watches the beat of the next rank, and hears of faults: so it is known which rank is lost and why, and a
process that is stuck elsewhere ends too.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from estimator.errors import invalid

TIMEOUT_S = 600.0
"""How long a rank waits for another, unless told otherwise (NCCL's own default)."""
BEAT_S = 0.5
"""Seconds between two beats of a rank; more in groups of more than 256, so that the store is not flooded."""
GRACE_S = 10.0
"""What a process that knows of a fault gets to leave by itself before its watch ends it."""


_STORE_IS_LOST = "the process that keeps the group's store (torchrun, or else rank 0) no longer answers"


class LostRankError(RuntimeError):
    """Another rank of the job has ended, or does not answer."""


@contextlib.contextmanager
def process_group(backend: str, *, timeout_s: float = TIMEOUT_S, watch: bool = True, **where: Any) -> Iterator[None]:
    """Inside, this process is one rank of torch.distributed's default group; the ranks leave it together.

    ``where``: as ``torch.distributed.init_process_group`` takes it; without, torchrun's environment. When a rank ends
    or raises, the others raise ``LostRankError`` (or, stuck outside of a collective, end with its sentence on standard
    error and exit status 1): within seconds when its process is gone, else after ``timeout_s``. After an exception the
    group is left as it is, because ending it waits for the others: the process should end. ``watch=False``: no thread
    watches; for launchers that do so themselves. Raises ``InputError`` for a time-out that is none.
    """
    global _watch
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s < float("inf"):
        raise invalid("timeout_s", timeout_s, "a number of seconds > 0")
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **where)
    alone = dist.get_world_size() == 1 or backend == "fake"
    if watch and not alone:
        _watch = _start_watch(timeout_s)
    try:
        with told():
            yield
            if not alone:
                dist.barrier()  # who leaves while another still receives breaks its connection
    except BaseException as error:
        if alone:  # there is nobody to wait for
            dist.destroy_process_group()
        if _watch is not None and not isinstance(error, LostRankError):
            said = " ".join(str(error).split())[:300]
            _watch.report(f"rank {dist.get_rank()} raised {type(error).__name__}{': ' if said else ''}{said}")
        raise
    finally:
        if _watch is not None:
            _watch.stop(failed=sys.exc_info()[0] is not None)
            _watch = None
    dist.destroy_process_group()


@contextlib.contextmanager
def told(doing: str = "") -> Iterator[None]:
    """Inside, a collective that fails because another rank is lost raises ``LostRankError``, ``doing`` named."""
    watch = _watch
    if watch is not None:
        watch.doing, before = doing, watch.doing
    try:
        yield
    except RuntimeError as error:
        sign = None if isinstance(error, LostRankError) else _sign_of_loss(error)
        if sign is None:
            raise
        cause = watch.cause() if watch is not None else None
        where = f" in {doing}" if doing else ""
        raise LostRankError(f"rank {dist.get_rank()} stopped{where}: {cause or sign}") from error
    finally:
        if watch is not None:
            watch.doing = before


def _sign_of_loss(error: RuntimeError) -> str | None:
    """What the communication library's ``error`` says about other ranks, if it comes from one."""
    text = str(error)
    if not isinstance(error, dist.DistError) and "gloo" not in text:
        return None
    if "timed out" in text.lower() or "timeout" in text.lower():
        return "another rank did not answer within the time-out"
    return f"another rank no longer answers ({text.split('] ', 1)[-1].split('. ')[0].splitlines()[0]})"


class Watch:
    """The thread of one rank that beats, watches the next rank's beat and hears of faults, through ``store``."""

    def __init__(self, store: Any, rank: int, size: int, timeout_s: float) -> None:
        self.fault: str | None = None
        """The first fault of the job, once this rank has heard of it."""
        self.doing = ""
        """What this rank is in the middle of, for the others to read."""
        self._store, self._rank, self._size, self._timeout_s = store, rank, size, timeout_s
        self._beat_s = BEAT_S * max(1.0, size / 256)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="zerocast-watch", daemon=True)
        self._thread.start()

    def report(self, what: str) -> None:
        """Tells every rank of a fault; the first to be told of stands."""
        with self._lock, contextlib.suppress(RuntimeError):  # the store may be what is lost
            self.fault = self._store.compare_set("fault", "", what).decode()
        self.fault = self.fault or what

    def cause(self) -> str | None:
        """Which ranks are lost or late, as far as this rank can learn within a few beats; ``None``: none that shows."""
        try:
            before, deadline = self._beats(), time.monotonic() + 4 * self._beat_s
            while self.fault is None and time.monotonic() < deadline:
                time.sleep(self._beat_s / 4)
            beats = self._beats()
        except RuntimeError:
            self.fault = self.fault or _STORE_IS_LOST
        if self.fault is None:
            silent = [rank for rank, (old, new) in enumerate(zip(before, beats, strict=True)) if old == new]
            others = {rank: beat.partition(b" ")[2].decode() for rank, beat in enumerate(beats)}
            late = [rank for rank, doing in others.items() if doing != self.doing]
            if silent:
                self.report(f"{_named(silent)} no longer answer{'s' if len(silent) == 1 else ''}")
            elif late:
                is_in = others[late[0]] or "no pass of the engine"
                self.report(f"{_named(late)} did not come within the time-out (rank {late[0]} is in {is_in})")
        return self.fault

    def stop(self, failed: bool) -> None:
        """Ends the thread. After a failure it beats on for a moment first: others still find out who is lost."""
        if failed:
            time.sleep(2 * self._beat_s)
        self._ended.set()
        self._thread.join(self._beat_s)

    def _read(self, key: str) -> bytes:
        """What the store has, now; ``get`` alone would wait for it."""
        return self._store.get(key) if self._store.check([key]) else b""

    def _beats(self) -> list[bytes]:
        with self._lock:
            return [self._read(f"beat/{rank}") for rank in range(self._size)]

    def _run(self) -> None:
        following, seen, seen_at, heard_at = (self._rank + 1) % self._size, b"", time.monotonic(), 0.0
        number = 0
        while not self._ended.wait(self._beat_s if number else 0):
            number += 1
            try:
                with self._lock:
                    self._store.set(f"beat/{self._rank}", f"{number} {self.doing}")
                    beat, fault = self._read(f"beat/{following}"), self._read("fault").decode()
            except RuntimeError:
                beat, fault = seen, _STORE_IS_LOST
            self.fault = self.fault or fault or None
            now = time.monotonic()
            if beat != seen:
                seen, seen_at = beat, now
            if self.fault is None and now - seen_at > self._timeout_s:
                self.report(f"{_named([following])} has not answered for {self._timeout_s:g} s")
            if self.fault is not None:
                heard_at = heard_at or now
                if now - heard_at > GRACE_S and not self._ended.is_set():
                    sys.stderr.write(f"rank {self._rank} stopped: {self.fault}\n")
                    sys.stderr.flush()
                    os._exit(1)


def _named(ranks: list[int]) -> str:
    """``rank 1``; ``ranks 1, 2``; at most eight by number."""
    numbers = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers}"


_watch: Watch | None = None


def _start_watch(timeout_s: float) -> Watch | None:
    """A watch over the default group's store; ``None`` where that is a file, which would grow with every beat."""
    store = _get_default_store()
    inner = store
    while isinstance(inner, dist.PrefixStore):
        inner = inner.underlying_store
    if not isinstance(inner, dist.TCPStore):
        return None
    twin = store.clone()  # type: ignore[attr-defined]  # a connection of its own: the group's may be waiting
    own = dist.PrefixStore("zerocast", twin)
    own.set_timeout(timedelta(seconds=timeout_s))
    return Watch(own, dist.get_rank(), dist.get_world_size(), timeout_s)
