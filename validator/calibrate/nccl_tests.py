"""Reads what ``all_reduce_perf`` and its sisters print (github.com/NVIDIA/nccl-tests) into ``CollectivePoint``s.

The out-of-place time is taken. ``size`` is the full buffer, as in ``CollectivePoint``: nccl-tests multiplies by the ranks
where a rank holds a part (all_gather, reduce_scatter, alltoall). Which collective it was, old versions do not print:
then the command in the text, or the file's name, says it, and the bus bandwidth must agree (its ratio to the
algorithm bandwidth is 2 (n - 1) / n for all-reduce, (n - 1) / n where parts travel, 1 for sends; PERFORMANCE.md there).
"""

from __future__ import annotations

import datetime
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from estimator import catalog
from estimator.errors import InputError
from estimator.time.fit import fit_link
from estimator.time.profile import CollectivePoint, HardwareProfile, profile_for
from estimator.time.profile_file import load_profile, save_profile
from validator.devices import catalogue_name

OPS = {
    "all_reduce": "all_reduce", "allreduce": "all_reduce", "all_gather": "all_gather", "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter", "reducescatter": "reduce_scatter", "alltoall": "all_to_all",
    "all_to_all": "all_to_all", "sendrecv": "send_recv", "send_recv": "send_recv",
}  # fmt: skip
"""Spellings of a collective in commands and file names -> its name here."""
_DTYPES = {"float": "fp32", "half": "fp16", "bfloat16": "bf16", "double": "fp64", "f8e4m3": "fp8"}
_PREFIX = re.compile(
    r"^(\[(\S+@)?\d+,\d+\]<std(out|err)>:\s?|\s*\d+: (?=\s*[#\d])|\[[\w./-]*[a-z][\w./-]*\] (?=\s*[#$\d])"
    r"|\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d\S* )+"
)
"""What mpirun, srun, kubectl and loggers put before a line."""
_RANK = re.compile(
    r"^#\s+Rank\s+(\d+)\s+(?:Group\s+(\d+)\s+)?Pid\s+\d+\s+on\s+(\S+)\s+device\s+\d+\s+\[[^\]]*\]\s*(.*)$"
)
_COMMAND = re.compile(
    r"\b(all_reduce|all_gather|reduce_scatter|alltoall|sendrecv)(?:_perf)?\b|\b(broadcast|gather|scatter|reduce|hypercube)_perf\b"
)
_VERSION = re.compile(r"NCCL version (\S+)")
_TOLERANCE = 0.03


class Row(NamedTuple):
    """One line of the table."""

    line: int
    n_bytes: int
    dtype: str
    redop: str
    root: int
    """-1: none."""
    seconds: float
    algorithm_bytes_per_s: float
    bus_bytes_per_s: float


@dataclass(kw_only=True)
class Run:
    """One program's output: from its first line (``# nThread ...``) to the next one's."""

    where: str
    said: str = ""
    """The collective that the text names."""
    ranks: dict[int, list[tuple[str, str]]] = field(default_factory=dict)
    """Group -> host and GPU of each rank."""
    rows: list[Row] = field(default_factory=list)
    version: str = ""
    closed: bool = False
    """Whether its last line is there."""

    @property
    def group_size(self) -> int:
        return len(self.ranks[min(self.ranks)])

    @property
    def n_nodes(self) -> int:
        return len({host for host, _ in self.ranks[min(self.ranks)]})

    @property
    def gpus(self) -> set[str]:
        return {gpu for group in self.ranks.values() for _, gpu in group}


@dataclass(frozen=True, kw_only=True)
class Imported:
    """Points of one or more files."""

    points: tuple[CollectivePoint, ...]
    sources: dict[str, str]
    """Key in the points' ``source`` -> what it was."""
    gpus: frozenset[str]
    """As the driver names them."""
    notes: tuple[str, ...] = ()


def read_nccl_tests(paths: Iterable[str | Path]) -> Imported:
    """The points of all ``paths``. Raises ``InputError`` with file and line for what nccl-tests did not print so."""
    points: list[CollectivePoint] = []
    sources: dict[str, str] = {}
    notes: list[str] = []
    gpus: set[str] = set()
    for path in map(Path, paths):
        for i, run in enumerate(_runs(path)):
            op = _collective(run, path)
            key = f"nccl-tests:{path.name}" + (f"#{i + 1}" if i else "")
            points += [
                CollectivePoint(op, run.group_size, run.n_nodes, r.n_bytes, r.seconds, r.dtype, source=key)
                for r in run.rows
            ]
            version = f", NCCL {run.version}" if run.version else ""
            sources[key] = (
                f"nccl-tests output {path.name}: {op} over {run.group_size} x {', '.join(sorted(run.gpus))} on "
                f"{run.n_nodes} node(s){version}"
            )
            gpus |= run.gpus
            if not run.closed:
                notes.append(f"{path.name} has no closing line (Avg bus bandwidth): larger sizes may be missing")
    notes += [
        f"collectives were taken on {gpu!r}, which the catalogue does not know"
        for gpu in sorted(gpus)
        if catalogue_name(gpu) is None
    ]
    return Imported(points=_merged(points), sources=sources, gpus=frozenset(gpus), notes=tuple(notes))


def require_same_gpu(imported: Imported, gpu_name: str) -> None:
    """Raises ``InputError`` when the points were taken on another GPU than the catalogue's ``gpu_name``."""
    for gpu in sorted(imported.gpus):
        name = catalogue_name(gpu)
        if name != gpu_name and (name is not None or gpu_name == "cpu"):
            known = f" ({name})" if name else ""
            raise InputError(f"the nccl-tests output is of {gpu!r}{known}, the profile of {gpu_name!r}")


def with_nccl_tests(profile: HardwareProfile, imported: Imported) -> HardwareProfile:
    """``profile`` with the imported points; its own of the same collective, ranks, nodes, size and dtype give way.

    Raises ``InputError`` when they were taken on another GPU than the profile's.
    """
    if profile.gpu is not None:
        require_same_gpu(imported, profile.gpu.name)
    new = {_place(p) for p in imported.points}
    kept = tuple(p for p in profile.collectives if _place(p) not in new)
    skipped = {what: why for what, why in profile.skipped.items() if what != "collectives"}
    return replace(
        profile,
        collectives=(*kept, *imported.points),
        sources={**profile.sources, **imported.sources},
        notes=tuple(dict.fromkeys((*profile.notes, *imported.notes))),
        skipped=skipped,
    )


def _place(p: CollectivePoint) -> tuple[str, int, int, int, str]:
    return p.op, p.group_size, p.n_nodes, p.bytes, p.dtype


def _merged(points: Sequence[CollectivePoint]) -> tuple[CollectivePoint, ...]:
    """One point of each place: the median of several (reductions by sum, max, ...; several files)."""
    found: dict[tuple[str, int, int, int, str], list[CollectivePoint]] = {}
    for p in points:
        found.setdefault(_place(p), []).append(p)
    return tuple(
        group[0]._replace(seconds=statistics.median(p.seconds for p in group)) for _, group in sorted(found.items())
    )


def import_nccl_tests(path: str | Path, files: Iterable[str | Path], gpu_name: str | None = None) -> HardwareProfile:
    """Put the points of ``files`` into the profile at ``path``, or, where there is none, make one of the GPU's shipped curves with
    link constants fitted to the points; returns what it is now. Raises ``InputError``."""
    imported = read_nccl_tests(files)
    if Path(path).exists():
        profile = with_nccl_tests(load_profile(path), imported)
    else:
        profile = fitted_to_nccl_tests(imported, gpu_name)
    save_profile(profile, path)
    return profile


def fitted_to_nccl_tests(imported: Imported, gpu_name: str | None = None) -> HardwareProfile:
    """The shipped profile of the GPU on which ``imported`` was taken (``gpu_name``, where its own name tells nothing), with link
    constants fitted to the points: forecasts of any size and number of ranks follow them. Raises ``InputError``."""
    known = {name for name in map(catalogue_name, imported.gpus) if name}
    if gpu_name is None and len(known) != 1:
        seen = ", ".join(sorted(imported.gpus))
        raise InputError(f"gpu is not given, and {seen!r} does not tell it; allowed: a GPU's name in the catalogue")
    chip = catalog.gpu(gpu_name or next(iter(known)))
    require_same_gpu(imported, chip.name)
    shipped, notes = profile_for(chip)
    assert shipped.link is not None
    per_node = max(-(-p.group_size // p.n_nodes) for p in imported.points)
    usual = catalog.cluster(chip.name, 1)
    cluster = replace(usual, gpus_per_node=max(per_node, usual.gpus_per_node))
    fit = fit_link(imported.points, cluster, shipped.link)
    say = f"collectives follow {fit.n_points} points of nccl-tests, {100 * fit.median_error:.0f}% off in the median"
    return replace(
        shipped,
        name=f"{chip.name}-fitted",
        gpu=chip,
        covers=(),
        date=datetime.date.today().isoformat(),
        link=replace(fit.link, derivation=f"fitted to {', '.join(sorted(imported.sources))}"),
        collectives=imported.points,
        sources={**shipped.sources, **imported.sources},
        spread={**shipped.spread, "collective": fit.median_error},
        notes=tuple(dict.fromkeys((*notes, say, *imported.notes))),
    )


# ---- one file -----------------------------------------------------------------------------------------------------


def _runs(path: Path) -> list[Run]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"nccl-tests output {str(path)!r} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"nccl-tests output {str(path)!r} is not text") from None
    runs = parse(text, f"nccl-tests output {str(path)!r}")
    if not runs:
        raise InputError(
            f"nccl-tests output {str(path)!r} has no table of nccl-tests; it begins with {text.strip().partition(chr(10))[0][:60]!r}"
        )
    return runs


def parse(text: str, where: str) -> list[Run]:
    """The runs in ``text``. Lines that are not of nccl-tests (NCCL's own, mpirun's, the shell's) are passed over.

    Raises ``InputError``: rows without header or ranks, cut rows, results that nccl-tests found wrong.
    """
    runs: list[Run] = []
    run = Run(where=where)
    columns: list[str] = []
    said = ""
    for number, raw in enumerate(text.splitlines(), 1):
        line = _PREFIX.sub("", raw).rstrip()
        place = f"{where}, line {number}"
        command = _COMMAND.search(line)
        rank = _RANK.match(line)
        if line.startswith("# nThread"):
            run, columns, said = Run(where=where, said=said), [], ""
        elif rank is not None:
            group = run.ranks.setdefault(int(rank[2] or 0), [])
            group.append((rank[3], rank[4].strip()))
        elif re.match(r"^#\s+size\s+count\b", line):
            columns = line.lstrip("# ").split()
        elif line.startswith("# Avg bus bandwidth"):
            run.closed = True
        elif re.match(r"^\s*\d+\s", line) and " NCCL " not in line and _looks_like_row(line, columns):
            row = _row(line.split(), columns, number, place)
            if not run.ranks:
                raise InputError(f"{place}: a row comes before any '#  Rank ...' line; the file's beginning is missing")
            if row is not None:
                if not run.rows:
                    runs.append(run)
                run.rows.append(row)
        if command is not None:  # before a run's first line, or within it ahead of its rows
            said = command[1] or command[2]
            if run.ranks and not run.rows:
                run.said = said
        if version := _VERSION.search(line):
            run.version = version[1]
    return runs


def _looks_like_row(line: str, columns: list[str]) -> bool:
    """Two whole numbers, then a type: the beginning of a row even where the rest of it is cut off."""
    words = line.split()
    numbers = len(words) > 1 and words[0].isdigit() and words[1].isdigit()
    return numbers if columns else numbers and len(words) >= 10 and words[2].isalnum() and not words[2].isdigit()


def _row(words: list[str], columns: list[str], number: int, place: str) -> Row | None:
    """The row, or ``None`` for one of size 0."""
    if "time" not in columns:
        raise InputError(f"{place}: a row comes before the header '#  size  count  type ...'")
    first = columns.index("time")
    n_right = len(columns) - first
    left, right = words[:-n_right], words[-n_right:]
    # old versions leave redop and root blank where there is none
    if not 3 <= len(left) <= first or not left[2][0].isalpha():
        raise InputError(f"{place} is cut off or not of nccl-tests: {' '.join(words)!r}; expected {' '.join(columns)}")
    try:
        time_us, algorithm, bus = (float(x) for x in right[:3])
        n_bytes = int(left[0])
    except ValueError:
        raise InputError(f"{place} has something else than numbers: {' '.join(words)!r}") from None
    if n_bytes == 0:
        return None
    if columns[first + 3 : first + 4] == ["#wrong"] and right[3] not in ("0", "N/A"):
        raise InputError(f"{place}: {right[3]} wrong values; such a run is no measurement")
    if not 0 < time_us < math.inf:
        raise InputError(f"{place}: time is {time_us:g} us; allowed: a finite number > 0")
    rate = n_bytes / (time_us * 1e-6)
    if algorithm >= 1 and abs(algorithm * 1e9 / rate - 1) > _TOLERANCE:
        raise InputError(
            f"{place}: {n_bytes} bytes in {time_us:g} us are {rate / 1e9:.2f} GB/s, but algbw says {algorithm:g}"
        )
    redop = left[3] if len(left) > 3 and "redop" in columns else ""
    root = int(left[-1]) if "root" in columns and len(left) == first and left[-1].lstrip("-").isdigit() else -1
    return Row(number, n_bytes, _DTYPES.get(left[2], left[2]), redop, root, time_us * 1e-6, algorithm * 1e9, bus * 1e9)


def _collective(run: Run, path: Path) -> str:
    """Which collective it was. Raises ``InputError`` when nothing tells, or when the bandwidths say otherwise."""
    ranks = run.group_size
    fitting = _fitting(run, ranks)
    if run.said and run.said not in OPS:
        raise InputError(f"{run.where} is of {run.said}_perf; allowed: {', '.join(sorted(set(OPS.values())))}")
    rooted = next((row for row in run.rows if row.root >= 0), None)
    if rooted is not None:
        raise InputError(
            f"{run.where}, line {rooted.line}: root is {rooted.root}: a broadcast, reduce, gather or scatter; allowed: "
            f"{', '.join(sorted(set(OPS.values())))}"
        )
    if ranks == 1:
        raise InputError(f"{run.where} is of one rank, which sends nothing; allowed: at least 2")
    named = OPS.get(run.said) or _named_by(path.name)
    if named is None and len(fitting) == 1:
        return fitting[0]
    if named is None:
        raise InputError(
            f"{run.where} does not say which collective it is of ({' or '.join(fitting) or 'none known'} by its numbers); "
            "name it in the file's name, e.g. all_gather.txt"
        )
    if named not in fitting:
        widest = max(run.rows, key=lambda r: r.bus_bytes_per_s)
        raise InputError(
            f"{run.where}, line {widest.line}: busbw {widest.bus_bytes_per_s / 1e9:g} beside algbw "
            f"{widest.algorithm_bytes_per_s / 1e9:g} is not what {named} over {ranks} ranks gives"
        )
    return named


def _named_by(name: str) -> str | None:
    text = name.lower().replace("-", "_")
    found = {op for spelling, op in OPS.items() if spelling in text}
    return found.pop() if len(found) == 1 else None


def _fitting(run: Run, ranks: int) -> list[str]:
    """The collectives that the bandwidths of the fastest row, and whether it reduces, allow."""
    widest = max(run.rows, key=lambda r: r.bus_bytes_per_s)
    part = (ranks - 1) / ranks
    factors = {"all_reduce": 2 * part, "all_gather": part, "reduce_scatter": part, "all_to_all": part, "send_recv": 1.0}
    if ranks == 1 or widest.algorithm_bytes_per_s < 1e9:  # too coarse (or always 0) to tell
        return list(factors)
    ratio = widest.bus_bytes_per_s / widest.algorithm_bytes_per_s
    fitting = [op for op, factor in factors.items() if abs(ratio / factor - 1) <= _TOLERANCE]
    if widest.redop in ("none", ""):
        return [op for op in fitting if op not in ("all_reduce", "reduce_scatter")]
    return [op for op in fitting if op not in ("all_gather", "all_to_all")]
