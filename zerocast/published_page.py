"""The part of the accuracy page about runs that others published, as Markdown."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from math import expm1
from pathlib import Path

from estimator.time.interval import NOMINAL, conformal
from estimator.time.stack import RANGES, Shipped, shipped_stacks
from validator.published import Evaluation, PublishedRun
from zerocast.accuracy import WORST, markdown_table

PLOT = "accuracy_published.png"
"""Beside the page."""

LEFT_OUT = {
    "model": "all runs of one model",
    "gpus": "all runs on one number of GPUs",
    "source": "all runs of one source",
    "gpu": "all runs on one type of GPU",
    "framework": "all runs of one framework",
}
"""What ``validator.published.left_out`` leaves out, in words."""


MISSES = (
    "Megatron-LM README (H100 weak scaling): micro-batch, interleaving, recomputation and flags were not published. One sequence per "
    "micro-batch without interleaving is forecast, whose bubbles, collectives and gathers its authors say they overlapped or avoided; where "
    "a replica is one GPU (1.7B) none of that matters.",
    "Megatron-Bridge: releases of one configuration differ by up to twice (Qwen3 30B: 14.5 and 27 s), recomputation comes from presets that "
    "are not in the columns, and how DeepEP's exchanges overlap is a guess. Collectives in pieces beside tensor-parallel products were tried: "
    "nearer here, but farther off for torchtitan, where both ways were published.",
    "llm-foundry's 13B on 8 and 70B on 64 A100s of 40 GB are forecast too short. Their source suspects retries of the allocator, whose replay "
    "needs none.",
    "torchtitan's rowwise fp8 (its page calls it a known issue), context parallelism over 4 and 8 GPUs, and a B200 row without its model's name.",
    "DeepSpeed: too few rows for constants of its own; settings of ZeRO-3 in SC'21's comparison were not stated.",
)
"""Of sources far from their goals, in words."""


def published_page(runs: Sequence[PublishedRun], result: Evaluation) -> list[str]:
    """Sections about ``runs`` and their forecasts with shipped constants."""
    shipped = shipped_stacks()
    return [
        "## Published runs",
        f"{len(runs)} runs that others published (`validator/published/runs.csv`, each with its source), forecast with the constants that "
        "come with the project. Constants of frameworks were fitted on these step times, so errors of the next tables, whose constants did "
        "without the runs they forecast, say more; memory is fitted to nothing.",
        markdown_table(error_rows(result)),
        *_reasons(result),
        "### Step times without their group",
        "Each run is forecast with constants that took no part of it: those of its framework and GPU's chip fitted without the group that is "
        "named, or, where nothing of them is left, those that `estimator.time.stack` takes in their place. Without a group they are found "
        "along derivatives taken where all runs had led, not by fitting all over again; the errors are those of whole forecasts. In interval: "
        f"share of runs inside the nominal {NOMINAL:.0%} interval that the other groups' errors give.",
        "The form of the model (which constants there are, their ranges, what frameworks do and since when) was chosen by people who had all "
        "these rows in view, so even these errors flatter it; rows that nobody had seen would say more.",
        "What misses, as far as it is understood:\n\n" + "\n".join(f"- {reason}" for reason in MISSES),
        f"![Errors of published step times]({PLOT})",
        markdown_table(left_out_rows(runs, shipped)),
        "### Largest errors",
        f"The {WORST} largest errors with the run's model left out.",
        markdown_table(worst_rows(runs, shipped)),
        "### Constants",
        f"Of `estimator/catalog/stacks.json`, fitted on {shipped.date} by `python -m validator fit --write estimator/catalog/stacks.json`; `*` is over all "
        "GPUs of a framework. Rates are over those of lone kernels and collectives (hardware profiles), products within what the board's power sustains.",
        markdown_table(constant_rows(shipped)),
        markdown_table([{"constant": f"`{name}`", "allowed": f"{r.low:g} to {r.high:g}", "expected": f"{r.prior:g} ± {r.width:g}", "what": r.why} for name, r in RANGES.items()]),
    ]  # fmt: skip


def write_plot(folder: Path, runs: Sequence[PublishedRun]) -> Path:
    """``PLOT`` in ``folder``. Raises ``InputError`` when it cannot be written."""
    from dashboard.published_plot import write_left_out_plot

    seconds = {run.run_id: value for run in runs if (value := run.number("step_time_s"))}
    errors: dict[str, dict[str, float]] = {}
    for (framework, _, by), own in shipped_stacks().errors.items():
        if by == "model":
            errors.setdefault(framework, {}).update(own)
    write_left_out_plot(folder / PLOT, seconds, errors)
    return folder / PLOT


def error_rows(result: Evaluation) -> list[dict[str, str]]:
    """By source, GPU and metric."""
    return [
        {
            "source": g.source, "GPU": g.gpu, "metric": g.metric, "runs": str(g.n), "skipped": str(g.skipped),
            "median": _percent(g.median_abs_pct), "P90": _percent(g.p90_abs_pct), "bias": _percent(g.bias_pct),
            "in interval": _percent(g.coverage90_pct),
        }
        for g in result.groups
    ]  # fmt: skip


def left_out_rows(runs: Sequence[PublishedRun], shipped: Shipped) -> list[dict[str, str]]:
    """By what was left out, framework and source."""
    source_of = {run.run_id: run.text("source") or "" for run in runs}
    group_of = {
        "model": lambda run: run.text("model"), "gpus": lambda run: run.text("n_gpus"), "source": lambda run: run.text("source"),
        "gpu": lambda run: run.text("gpu"), "framework": lambda run: run.text("framework"),
    }  # fmt: skip
    by_id = {run.run_id: run for run in runs}
    rows = []
    for by, words in LEFT_OUT.items():
        found: dict[tuple[str, str], dict[str, float]] = {}
        for (framework, _, what), errors in shipped.errors.items():
            if what == by:
                for run_id, error in errors.items():
                    found.setdefault((framework, source_of.get(run_id, "unknown")), {})[run_id] = error
        for (framework, source), errors in sorted(found.items()):
            sizes = sorted(abs(expm1(error)) for error in errors.values())
            inside = 0
            for run_id, error in errors.items():
                group = group_of[by](by_id[run_id]) if run_id in by_id else None
                others = [e for r, e in errors.items() if r in by_id and group_of[by](by_id[r]) != group]
                inside += abs(error) <= conformal(others)
            rows.append({
                "left out": words, "framework": framework, "source": source, "runs": str(len(errors)),
                "median": f"{statistics.median(sizes):.1%}", "P90": f"{_quantile(sizes, 0.9):.1%}",
                "bias": f"{statistics.fmean(expm1(e) for e in errors.values()):+.1%}", "in interval": f"{inside / len(errors):.0%}",
            })  # fmt: skip
    return rows


def worst_rows(runs: Sequence[PublishedRun], shipped: Shipped) -> list[dict[str, str]]:
    """Runs whose model was left out, largest error first."""
    notes = {run.run_id: run.text("notes") or "" for run in runs}
    errors = [
        (abs(e), e, run_id) for (_, _, by), own in shipped.errors.items() if by == "model" for run_id, e in own.items()
    ]
    return [
        {"run": f"`{run_id}`", "error": f"{expm1(error):+.1%}", "what its source says": notes.get(run_id, "")[-160:]}
        for _, error, run_id in sorted(errors, reverse=True)[:WORST]
    ]


def constant_rows(shipped: Shipped) -> list[dict[str, str]]:
    return [
        {"framework": framework, "GPU": gpu, **{f"`{name}`": f"{value:.3g}" for name, value in asdict(stack).items()}}
        for (framework, gpu), stack in sorted(shipped.stacks.items())
    ]


def _reasons(result: Evaluation) -> list[str]:
    reasons = Counter(row.skipped for row in result.rows if row.skipped is not None).most_common()
    return ["Not forecast:\n\n" + "\n".join(f"- {n}: {reason}." for reason, n in reasons)] if reasons else []


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
