"""AdaComp selection and packing of gradients."""

from __future__ import annotations

from estimator.ops.kernels.chip import ceil_div
from estimator.ops.operator import Op


def message_bytes(numel: int, bin: int, capacity: int) -> int:
    """Bytes that one rank sends: ``capacity`` 16-bit entries, a 32-bit count for each bin, an fp32 scale."""
    return 2 * capacity + 4 * ceil_div(numel, bin) + 4


def cost(numel: int, bin: int, dtype: str, itemsize: int, n_sent: int) -> tuple[Op, Op]:
    """``adacomp_pack`` and ``adacomp_add`` when ``n_sent`` elements are. The second look of the selection is from cache;
    prefix sums and the mean over bins are plain torch (one launch each, and their 20 bytes per bin counted)."""
    bins, both = ceil_div(numel, bin), numel * (itemsize + 4)
    pack_bytes = both + 8 * bins + (4 + 8 + 4) * bins + 4 + both + 16 * bins + 4 + numel * 4 + 2 * n_sent
    add_bytes = (4 + 8) * bins + 2 * n_sent + 12 * bins + 4 + 8 * n_sent
    return (
        Op("adacomp_pack", "elementwise", False, dtype, 8 * numel, pack_bytes, launches=4),
        Op("adacomp_add", "elementwise", False, "fp32", n_sent, add_bytes, launches=2),
    )
