"""How often the gate is right: detections and false alarms over simulated gates. ``python benchmarks/bench_gate.py``

With ``--real`` on real runs of this machine instead (about ten minutes, ``gate_real.py``). Simulated:
One gate is four cases of 5 + 5 runs of 8 steps. A step's time is lognormal; one step in fifty takes 1.2 to 3 times as long; each
run has an offset of its own; within a session the machine wanders (a random walk over the interleaved runs); the session
of the baseline and that of the new runs differ by an offset that all cases share. The sizes below are assumed, not measured.
Fixed seeds: two runs print the same.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from validator.gate.baseline import BaselineCase, Run
from validator.gate.decide import Status, check_runs, decide_shift
from validator.measure.yardstick import step_in_yardsticks, yardstick_median


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
        found.append([decide_shift("case", "step_s", _medians(a), _medians(b), 0.03).status for a, b in pairs])
    return found


def pooled_false_alarms(noise: Noise, n_gates: int, seed: int = 0) -> float:
    """Share of gates with a false alarm if every step counted as an independent sample and nothing else were asked."""
    wrong = 0
    for number in range(n_gates):
        rng = np.random.default_rng([seed, number])
        old, new = session(rng, noise, 4, 5), session(rng, noise, 4, 5)
        flat = [(list(chain(*a)), list(chain(*b))) for a, b in zip(old, new, strict=True)]
        wrong += any(decide_shift("case", "step_s", a, b, 1e-9).status == "regressed" for a, b in flat)
    return wrong / n_gates


def paced_gates(machine: float, factor: float, n_gates: int, *, yardstick: bool, paired: bool = False) -> list[Status]:
    """Verdicts on a machine whose speed differs by a standard deviation of ``machine`` from session to session and half as
    much from run to run (an eighth as much within a pair); a step feels 0.95 to 1.05 times (per session) what the
    yardstick feels.
    """
    found: list[Status] = []
    n_runs = 8 if paired else 5
    for number in range(n_gates):
        rng = np.random.default_rng([7, number])
        wander = rng.normal(0, machine / 2, n_runs)
        sides: list[list[Run]] = []
        for side, slower in enumerate((1.0, factor)):
            offset, feels = (0.0 if paired else rng.normal(0, machine)), rng.uniform(0.95, 1.05)
            runs = []
            for i in range(n_runs):
                pace = offset + (wander[i] + rng.normal(0, machine / 8) if paired else rng.normal(0, machine / 2))
                length = float(np.exp(feels * pace + rng.normal(0, 0.005)))
                paces = np.exp(pace + rng.normal(0, 0.02, 8))
                steps = slower * length * np.exp(rng.normal(0, 0.02, 8))
                facts = {"step_seconds": [float(s) for s in steps], "yardstick_seconds": [float(y) for y in paces]}
                run = Run(record=f"{side}-{i}", step_s=statistics.median(facts["step_seconds"]))
                if yardstick:
                    length_y, median_y = step_in_yardsticks(facts), yardstick_median(facts)
                    run = replace(run, yardstick="simulated", yardstick_s=median_y, step_yardsticks=length_y)
                runs.append(run)
            sides.append(runs)
        case = BaselineCase(name="case", job_key="", origin="cpu", runs=tuple(sides[0]), job={})
        found.append(check_runs(case, sides[1], metrics=["step_s"], paired=paired)[0].status)
    return found


def tell_paced(n_gates: int) -> None:
    """Prints what the yardstick and pairs are worth where the machine itself changes."""
    print(f"\n{n_gates} gates of one case; the machine's speed differs between sessions, and half as much between runs")
    print(f"{'machine':<10}{'':<22}{'true change':>12}{'regressed':>11}{'improved':>10}{'inconcl.':>10}{'pass':>8}")
    for machine in (0.02, 0.05, 0.20):
        for name, flags in (("plain", {}), ("yardstick", {"yardstick": True}), ("8 pairs in turn", {"paired": True})):
            for change in (0.0, 0.05):
                n = Counter(paced_gates(machine, 1 + change, n_gates, **{"yardstick": False, **flags}))
                shares = [n[s] / n_gates for s in ("regressed", "improved", "inconclusive", "pass")]
                cells = "".join(f"{share:>{width}.1%}" for share, width in zip(shares, (11, 10, 10, 8), strict=True))
                print(f"{machine:<10.0%}{name:<22}{change:>+12.0%}{cells}")


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
    tell_paced(n_gates)


if __name__ == "__main__":
    if "--real" in sys.argv[1:]:
        import gate_real

        gate_real.main([word for word in sys.argv[1:] if word != "--real"])
    else:
        main()
