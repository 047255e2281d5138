"""A recorded history of PyTorch's allocator, played again by the simulator: does it ask the device for the same segments?

Format: ``torch.cuda.memory._snapshot()`` after ``_record_memory_history("all")``: ``segments`` and ``device_traces``, whose
entries are ``alloc``, ``free_requested``, ``free_completed``, ``segment_alloc``, ``segment_free``, ``segment_map``,
``segment_unmap`` and ``oom``. What a request does to segments is written down before the request itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from estimator.memory.allocator import CachingAllocator, DeviceOutOfMemory
from estimator.memory.allocator_settings import AllocatorSettings
from estimator.memory.blocks import Block, SegmentEvent, Upwards

_SEGMENT_ACTIONS = ("segment_alloc", "segment_free", "segment_map", "segment_unmap")
_GROWS = ("segment_alloc", "segment_map")


@dataclass(frozen=True, kw_only=True)
class RecordedReplay:
    """How a recorded history and its simulation compare."""

    n_requests: int
    n_segment_events: int
    """Recorded ones."""
    n_equal: int
    """Those that the simulator made too, at the same place in the history, address and size."""
    n_extra: int
    """Segment events of the simulator alone."""
    n_moved: int
    """Requests that the simulator met at another address."""
    unknown_frees: int
    """Releases of what neither the history nor the segments before it hold."""
    first_difference: str | None
    recorded_peak_bytes: int
    """Largest number of reserved bytes, ..."""
    simulated_peak_bytes: int
    """... and in the simulation."""

    @property
    def is_exact(self) -> bool:
        return self.first_difference is None


def settings_of(snapshot: Mapping[str, Any]) -> AllocatorSettings:
    """The options under which ``snapshot`` was taken. Raises ``InputError`` for those that the simulator does not know."""
    known = snapshot.get("allocator_settings", {})
    return AllocatorSettings.parse(known.get("PYTORCH_CUDA_ALLOC_CONF") or known.get("PYTORCH_ALLOC_CONF") or "")


def replay_recorded(
    before: Sequence[Mapping[str, Any]], trace: Iterable[Mapping[str, Any]], settings: AllocatorSettings | None = None
) -> RecordedReplay:  # fmt: skip
    """Play ``trace``, one device's entry of ``device_traces``, through the simulator.

    ``before``: that device's ``segments`` when the history began. A garbage collection threshold is left out, because its limit is not
    recorded. Where the recorded allocator gave memory back in the middle of a
    request, the simulated device has no room for it at first, as the real one had none.
    """
    settings = replace(settings or AllocatorSettings(), garbage_collection_threshold=0)
    return _Replay(before, list(trace), settings).run()


class _Recorded(Upwards):
    """A device that has room when the recorded one had, and gives its addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.coming: deque[SegmentEvent] = deque()
        """What was recorded for the request that is being met and has not been made yet."""

    def has_room(self, n_bytes: int) -> bool:
        return not self.coming or self.coming[0].action in _GROWS

    def place(self, n_bytes: int) -> int:
        if self.coming and self.coming[0].action in _GROWS:
            return self.coming[0].address
        return super().place(n_bytes)


class _Replay:
    def __init__(
        self, before: Sequence[Mapping[str, Any]], trace: Sequence[Mapping[str, Any]], settings: AllocatorSettings
    ) -> None:
        self.trace = trace
        self.device = _Recorded()
        self.allocator = CachingAllocator(settings, device=self.device, on_segment=self._made)
        self.blocks: dict[int, Block] = {}
        """By recorded address."""
        self.waiting: set[int] = set()
        self.recorded: list[SegmentEvent] = []
        """Since the last request."""
        self.reserved = self.peak = 0
        self.counts = dict.fromkeys(("requests", "events", "equal", "extra", "moved", "unknown"), 0)
        self.first_difference: str | None = None
        self.at = 0
        self._adopt(before)

    def _adopt(self, before: Sequence[Mapping[str, Any]]) -> None:
        ordered = sorted(before, key=lambda segment: segment["address"])
        for i, segment in enumerate(ordered):
            self.reserved += segment["total_size"]
            at, pieces = segment["address"], []
            for block in segment["blocks"]:
                is_live = block["state"].startswith("active")
                pieces.append((at, block["size"], block["requested_size"] if is_live else 0))
                at += block["size"]
            end = None
            if segment.get("is_expandable"):
                after = ordered[i + 1]["address"] if i + 1 < len(ordered) else at + self.allocator.address_bytes
                end = min(after, at + self.allocator.address_bytes)
            key = str(segment.get("stream", 0)), segment.get("segment_type") == "small"
            for block in self.allocator.adopt(key, pieces, end):
                if not block.is_free:
                    self.blocks[block.address] = block
        self.peak = self.reserved

    def run(self) -> RecordedReplay:
        for at, entry in enumerate(self.trace):
            self.at, action = at, entry["action"]
            if action in _SEGMENT_ACTIONS:
                self.recorded.append(SegmentEvent(action, entry["addr"], entry["size"]))
                self.reserved += entry["size"] if action in _GROWS else -entry["size"]
                self.peak = max(self.peak, self.reserved)
            elif action in ("alloc", "oom"):
                self._request(entry)
            elif action == "free_requested":
                self._free(entry)
            elif action == "free_completed" and entry["addr"] in self.waiting:
                self.waiting.remove(entry["addr"])
                self.allocator.complete(_event_of(entry["addr"]))
        self._settle()
        counts = self.counts
        return RecordedReplay(
            n_requests=counts["requests"], n_segment_events=counts["events"], n_equal=counts["equal"], n_extra=counts["extra"],
            n_moved=counts["moved"], unknown_frees=counts["unknown"], first_difference=self.first_difference,
            recorded_peak_bytes=self.peak, simulated_peak_bytes=self.allocator.peak_reserved_bytes,
        )  # fmt: skip

    def _request(self, entry: Mapping[str, Any]) -> None:
        self.counts["requests"] += 1
        if self.recorded and not any(event.action in _GROWS for event in self.recorded) and entry["action"] == "alloc":
            self._settle()  # nothing was taken: somebody emptied the cache before
        self.counts["events"] += len(self.recorded)
        self.device.coming.extend(self.recorded)
        self.recorded.clear()
        try:
            block = self.allocator.malloc(entry["size"], str(entry.get("stream", 0)))
        except DeviceOutOfMemory:
            block = None
        self._left()
        if entry["action"] == "oom":
            return
        if block is None:
            self._differs("the simulator is out of memory")
            return
        if block.address != entry["addr"]:
            self.counts["moved"] += 1
            self._differs(f"{entry['size']} bytes at {entry['addr']:#x}, simulated at {block.address:#x}")
        self.blocks[entry["addr"]] = block

    def _free(self, entry: Mapping[str, Any]) -> None:
        address = entry["addr"]
        block = self.blocks.pop(address, None)
        if block is None:
            self.counts["unknown"] += 1
            self._differs(f"what is freed at {address:#x} is not known")
            return
        following = self.trace[self.at + 1] if self.at + 1 < len(self.trace) else {"action": "", "addr": 0}
        if (following["action"], following["addr"]) != ("free_completed", address):  # it waits for another stream
            self.allocator.record_stream(block, _event_of(address))
            self.waiting.add(address)
        self.allocator.free(block)

    def _settle(self) -> None:
        """What was given back without a request: by ``torch.cuda.empty_cache``."""
        if not self.recorded:
            return
        self.counts["events"] += len(self.recorded)
        self.device.coming.extend(self.recorded)
        self.recorded.clear()
        self.allocator.empty_cache()
        self._left()

    def _made(self, event: SegmentEvent) -> None:
        """The simulator has made ``event``. What is given back has no order: pools are emptied by the order of their streams."""
        coming = self.device.coming
        if event in coming and (coming[0] == event or event.action not in _GROWS):
            coming.remove(event)
            self.counts["equal"] += 1
            return
        self.counts["extra"] += 1
        self._differs(f"{_said(event)} is simulated alone")

    def _left(self) -> None:
        """What was recorded and not simulated."""
        for event in self.device.coming:
            self._differs(f"{_said(event)} is recorded alone")
        self.device.coming.clear()

    def _differs(self, what: str) -> None:
        if self.first_difference is None:
            self.first_difference = f"entry {self.at}: {what}"


def _said(event: SegmentEvent) -> str:
    return f"{event.action} of {event.n_bytes} bytes at {event.address:#x}"


def _event_of(address: int) -> str:
    return f"event of {address:#x}"
