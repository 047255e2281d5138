"""How often the gate is right: detections and false alarms over simulated gates. ``python benchmarks/bench_gate.py``

One gate is four cases of 5 + 5 runs of 8 steps. A step's time is lognormal; one step in fifty takes 1.2 to 3 times as long; each
run has an offset of its own; within a session the machine wanders (a random walk over the interleaved runs); the session
of the baseline and that of the new runs differ by an offset that all cases share. The sizes below are assumed, not measured.
Fixed seeds: two runs print the same.
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from itertools import chain

import numpy as np

from validator.gate import Status, decide_ratio


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Standard deviations of the logarithm of a step's time; the defaults are the quiet machine."""

    step: float = 0.02
    run: float = 0.008
    walk: float = 0.001
    """Per run of a session."""
    session: float = 0.003
    outliers: float = 0.02
    """Share of steps."""


NOISES = {
    "quiet": Noise(),
    "drifting": Noise(walk=0.004),
    "noisy": Noise(step=0.05, run=0.02, walk=0.003, session=0.005, outliers=0.05),
    "sessions differ by 3 %": Noise(session=0.03),
}


def session(
    rng: np.random.Generator, noise: Noise, n_cases: int, n_runs: int, factor: float = 1.0
) -> list[list[list[float]]]:
    """Seconds of every step, as [case][run][step], of runs measured in turn over the cases."""
    offset, wander = rng.normal(0, noise.session), 0.0
    cases: list[list[list[float]]] = [[] for _ in range(n_cases)]
    for _ in range(n_runs):
        for case in range(n_cases):
            wander += rng.normal(0, noise.walk)
            steps = np.exp(offset + wander + rng.normal(0, noise.run) + rng.normal(0, noise.step, 8))
            slow = rng.random(8) < noise.outliers
            steps[slow] *= rng.uniform(1.2, 3.0, int(slow.sum()))
            cases[case].append([0.1 * factor * float(s) for s in steps])
    return cases


def gates(
    noise: Noise, factor: float, n_gates: int, n_runs: int = 5, n_cases: int = 4, seed: int = 0
) -> list[list[Status]]:
    """The verdicts of each simulated gate, one per case."""
    found: list[list[Status]] = []
    for number in range(n_gates):
        rng = np.random.default_rng([seed, number])
        old, new = session(rng, noise, n_cases, n_runs), session(rng, noise, n_cases, n_runs, factor)
        pairs = zip(old, new, strict=True)
        found.append([decide_ratio("case", "step_s", _medians(a), _medians(b), 0.03).status for a, b in pairs])
    return found


def pooled_false_alarms(noise: Noise, n_gates: int, seed: int = 0) -> float:
    """Share of gates with a false alarm if every step counted as an independent sample and nothing else were asked."""
    wrong = 0
    for number in range(n_gates):
        rng = np.random.default_rng([seed, number])
        old, new = session(rng, noise, 4, 5), session(rng, noise, 4, 5)
        flat = [(list(chain(*a)), list(chain(*b))) for a, b in zip(old, new, strict=True)]
        wrong += any(decide_ratio("case", "step_s", a, b, 1e-9).status == "regressed" for a, b in flat)
    return wrong / n_gates


def _medians(runs: list[list[float]]) -> list[float]:
    return [statistics.median(steps) for steps in runs]


def main(n_gates: int = 400) -> None:
    """Prints one table per kind of noise."""
    print(
        f"{n_gates} gates of 4 cases, 5 + 5 runs of 8 steps, minimum effect 3 %; shares of cases, and of gates with an alarm\n"
    )
    print(
        f"{'noise':<24}{'true change':>12}{'regressed':>11}{'improved':>10}{'inconcl.':>10}{'pass':>8}{'gates that fail':>17}"
    )
    for name, noise in NOISES.items():
        for change in (0.0, 0.05, 0.10, -0.05):
            found = gates(noise, 1 + change, n_gates)
            n = Counter(status for gate in found for status in gate)
            total, failing = sum(n.values()), sum("regressed" in gate for gate in found) / n_gates
            shares = [n[s] / total for s in ("regressed", "improved", "inconclusive", "pass")]
            cells = "".join(f"{share:>{width}.1%}" for share, width in zip(shares, (11, 10, 10, 8), strict=True))
            print(f"{name:<24}{change:>+12.0%}{cells}{failing:>17.1%}")
    share = pooled_false_alarms(NOISES["quiet"], n_gates)
    print(f"\nsteps taken as independent samples, no minimum effect, quiet, no change: {share:.1%} of gates alarm")


if __name__ == "__main__":
    main()
