"""An optimizer whose masters and states live in files: what is read and written, and through which host memory.

Rajbhandari et al. 2021 (ZeRO-Infinity), section 5.2: groups pass one after another through pinned host memory; while one is
stepped the next is read and the one before is written.
"""

from __future__ import annotations

from collections.abc import Sequence

from estimator.job.strategy import OPTIMIZER_STATES, Strategy
from estimator.schedule.events import Buffer, Commit, Copy, Event, Wait
from estimator.sharding.layout import Group, align
from estimator.units import MIB

FILE_ALIGNMENT_BYTES = 4096
"""Direct access to files wants offsets, lengths and addresses at multiples of this."""

IO_BLOCK_BYTES = MIB
"""What one thread reads or writes at a time, and what one checksum is of."""

IO_QUEUE = 4
"""Blocks under way at once in each direction."""

N_SLOTS = 2
"""Groups in host memory at once: one is stepped while another is written, then read over."""


def record_bytes(group: Group, strategy: Strategy) -> int:
    """File bytes of one rank's fp32 masters and states of ``group``."""
    n_tensors = 1 + OPTIMIZER_STATES[strategy.optimizer]
    return align(group.shard_numel * 4 * n_tensors, FILE_ALIGNMENT_BYTES)


def slots(groups: Sequence[Group], strategy: Strategy) -> tuple[Buffer, ...]:
    """Host memory through which the records of ``groups`` pass by turns: each as large as the largest record."""
    largest = max(groups, key=lambda group: record_bytes(group, strategy))
    n_bytes = record_bytes(largest, strategy)
    return tuple(
        Buffer(f"slot_{i}", largest.number, "offload_staging", n_bytes, "host")
        for i in range(min(N_SLOTS, len(groups)))
    )


def read(group: Group, strategy: Strategy) -> Copy:
    """``group``'s record from the files to its slot."""
    return Copy("nvme_read", "states", group.number, record_bytes(group, strategy), ("nvme_read", group.number))


def write(group: Group, strategy: Strategy) -> Copy:
    """``group``'s record from its slot to the files."""
    return Copy("nvme_write", "states", group.number, record_bytes(group, strategy), ("nvme_write", group.number))


def read_ahead(stepped: Group, groups: Sequence[Group], strategy: Strategy) -> list[Event]:
    """Read the group that has the slot next, once the ``stepped`` one has left it. ``groups``: all that are stepped, in order."""
    following = groups.index(stepped) + N_SLOTS
    if following >= len(groups):
        return []
    waits: list[Event] = [Wait("nvme_read", ("nvme_write", stepped.number))]
    if strategy.dtype == "fp32":  # the slot is what is copied to the device
        waits.append(Wait("nvme_read", ("h2d", stepped.number)))
    return [*waits, read(groups[following], strategy)]


def finish(groups: Sequence[Group], strategy: Strategy) -> list[Event]:
    """Until everything has been written, for good, and the next step may read into the slots."""
    written: list[Event] = [Wait("host", ("nvme_write", group.number)) for group in groups]
    last = groups[-N_SLOTS:] if strategy.dtype == "fp32" else ()
    return [*written, Commit(), *(Wait("host", ("h2d", group.number)) for group in last)]
