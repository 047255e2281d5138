"""Constants and options of PyTorch's CUDA caching allocator, as ``PYTORCH_ALLOC_CONF`` gives them.

Source: ``c10/core/AllocatorConfig.h`` of torch 2.11 to 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass

from estimator.errors import InputError, unknown_choice
from estimator.units import MIB

MIN_BLOCK_BYTES = 512
"""``kMinBlockSize``: all sizes are rounded up to a multiple."""
SMALL_BYTES = MIB
"""``kSmallSize``: the largest block of the small pool."""
SMALL_SEGMENT_BYTES = 2 * MIB
"""``kSmallBuffer``."""
MIN_LARGE_BYTES = 10 * MIB
"""``kMinLargeAlloc``: from here on a request gets a segment of its own size, ..."""
ROUND_LARGE_BYTES = 2 * MIB
"""``kRoundLarge``: ... rounded up to a multiple of this."""
_N_INTERVALS = 16
"""``kRoundUpPowerOfTwoIntervals``: 1 MiB to 64 GiB."""


@dataclass(frozen=True, kw_only=True)
class AllocatorSettings:
    """Options by their names in ``PYTORCH_ALLOC_CONF``; sizes in bytes."""

    expandable_segments: bool = False
    """One segment per pool that grows, in place of one for each request."""
    max_split_bytes: int | None = None
    """Blocks of this size and more are not split, nor handed out for less; ``None``: all are."""
    max_non_split_rounding_bytes: int = 20 * MIB
    """How much larger than asked for such a block may be."""
    large_segment_bytes: int = 20 * MIB
    """Segment of requests above 1 MiB and below 10 MiB."""
    roundup_power2_divisions: tuple[int, ...] = ()
    """Into how many steps each doubling from 1 MiB to 64 GiB is divided, to which sizes are rounded up; empty: to 512 B."""
    garbage_collection_threshold: float = 0.0
    """Share of the limit above which idle segments are given back before a new one is taken; 0: never."""

    @property
    def collects(self) -> bool:
        return self.garbage_collection_threshold > 0

    def round(self, n_bytes: int) -> int:
        """``round_size``."""
        if n_bytes < MIN_BLOCK_BYTES:
            return MIN_BLOCK_BYTES
        if self.roundup_power2_divisions:
            place = min(max(n_bytes.bit_length() - 21, 0), _N_INTERVALS - 1)
            divisions = self.roundup_power2_divisions[place]
            if divisions > 1 and n_bytes > MIN_BLOCK_BYTES * divisions:
                return _next_division(n_bytes, divisions)
        return n_bytes + (-n_bytes) % MIN_BLOCK_BYTES

    @classmethod
    def parse(cls, text: str) -> AllocatorSettings:
        """Settings written as ``PYTORCH_ALLOC_CONF`` is: ``"expandable_segments:True,max_split_size_mb:128"``.

        Raises ``InputError`` for options that the simulator does not know and values that PyTorch refuses.
        """
        values: dict[str, object] = {}
        for name, value in _options(text):
            if name == "expandable_segments":
                if value not in ("True", "False"):
                    raise InputError(f"expandable_segments is {value!r}; allowed: True, False")
                values[name] = value == "True"
            elif name == "garbage_collection_threshold":
                share = _number(name, value, float)
                if not 0 < share < 1:
                    raise InputError(f"garbage_collection_threshold is {value}; allowed: a number between 0 and 1")
                values[name] = share
            elif name == "roundup_power2_divisions":
                values[name] = _divisions(value)
            elif name in _SIZES:
                field, least = _SIZES[name]
                size = int(_number(name, value, int))
                if size < least:
                    raise InputError(f"{name} is {value}; allowed: a whole number of MiB, at least {least}")
                values[field] = size * MIB
            elif name not in _ELSEWHERE and (name, value) != ("backend", "native"):
                allowed = {*_SIZES, "expandable_segments", "garbage_collection_threshold", "roundup_power2_divisions"}
                raise unknown_choice("allocator option", name, allowed)
        return cls(**values)  # type: ignore[arg-type]


_ELSEWHERE = frozenset(
    ("pinned_use_background_threads", "pinned_use_cuda_host_register", "pinned_num_register_threads", "pinned_max_round_threshold_mb",
     "pinned_max_cached_size_mb", "pinned_reserve_segment_size_mb", "release_lock_on_cudamalloc", "release_lock_on_hipmalloc")
)  # fmt: skip
"""Options that change nothing of the device's blocks."""
_SIZES = {
    "max_split_size_mb": ("max_split_bytes", 21),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", 21),
    "large_segment_size_mb": ("large_segment_bytes", 20),
}
"""Field and smallest value that PyTorch takes, by option."""


def _options(text: str) -> list[tuple[str, str]]:
    """Name and value of each option; a value in brackets holds commas of its own."""
    options, depth, start = [], 0, 0
    text = "".join(text.split())
    for i, char in enumerate(text + ","):
        depth += (char == "[") - (char == "]")
        if char == "," and not depth:
            part, start = text[start:i], i + 1
            if part:
                name, colon, value = part.partition(":")
                if not colon or not value:
                    raise InputError(f"allocator option is {part!r}; allowed: name:value")
                options.append((name, value))
    return options


def _number(name: str, value: str, kind: type[float] | type[int]) -> float:
    try:
        return kind(value)
    except ValueError:
        raise InputError(f"{name} is {value!r}; allowed: a number") from None


def _divisions(value: str) -> tuple[int, ...]:
    """``8``, or ``[256:1,512:2,>:8]``: by size in MiB, up to it and from it on."""
    if not value.startswith("["):
        return (_power_of_two(value),) * _N_INTERVALS
    divisions = [0] * _N_INTERVALS
    last = -1
    for pair in value.strip("[]").split(","):
        size, _, text = pair.partition(":")
        n = _power_of_two(text)
        if size == ">":
            divisions[last + 1 :] = [n] * (_N_INTERVALS - last - 1)
            continue
        place = min(_power_of_two(size).bit_length() - 1, _N_INTERVALS - 1)
        if last < 0:
            divisions[:place] = [n] * place
        divisions[place], last = n, place
    return tuple(divisions)


def _power_of_two(text: str) -> int:
    value = int(_number("roundup_power2_divisions", text, int))
    if value < 1 or value & (value - 1):
        raise InputError(f"roundup_power2_divisions is {text}; allowed: a power of two")
    return value


def _next_division(n_bytes: int, divisions: int) -> int:
    """``roundup_power2_next_division``: up to the next of ``divisions`` equal steps of its doubling."""
    if not n_bytes & (n_bytes - 1):
        return n_bytes
    floor = 1 << (n_bytes.bit_length() - 1)
    step = floor >> (divisions.bit_length() - 1)
    if not step:
        return floor << 1
    return n_bytes if n_bytes % step == 0 else n_bytes - n_bytes % step + step
