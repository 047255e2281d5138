"""``zerocast check`` from the command line: records in, verdict, files and exit code out."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from estimator.job.files import job_to_dict
from estimator.job.options import JobOptions, build_job
from estimator.report import StepReport
from validator.store.database import Store
from validator.store.records import export_reports

JOB = build_job(JobOptions(model="llama-3-8b", gpu="h100-sxm", gpus=8, seq_len=2048))
PLACE = {
    "torch": "2.13.0",
    "cuda": "13.0",
    "host": "node1",
    "cpu": "a cpu",
    "gpu": {"name": "H100", "driver_version": "580"},
}


def reports(seed: int, factor: float = 1.0, peak: int = 60_000_000_000, n: int = 5, **place) -> list[StepReport]:
    rng = np.random.default_rng(seed)
    steps = [float(s) for s in factor * 1.5 * np.exp(rng.normal(0, 0.005, n))]
    return [
        StepReport(
            origin="cuda", job_key=JOB.key, job=job_to_dict(JOB), step_s=s, tokens_per_s=16384 / s, peak_allocated_bytes=peak, fits=True,
            provenance={**PLACE, **place, "steps": 8, "warmup": 3, "seed": 0, "date_utc": f"{seed}-{i}"},
        )
        for i, s in enumerate(steps)
    ]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, zerocast) -> Path:
    """A folder with ``baseline.json`` and records: same, slow, fat, alien."""
    export_reports(reports(0), tmp_path / "old.jsonl")
    export_reports(reports(1), tmp_path / "same.jsonl")
    export_reports(reports(2, factor=1.05), tmp_path / "slow.jsonl")
    export_reports(reports(3, peak=60_600_000_000), tmp_path / "fat.jsonl")
    export_reports(reports(4, torch="2.14.0"), tmp_path / "alien.jsonl")
    export_reports(reports(5, host="node2"), tmp_path / "host.jsonl")
    done = zerocast("check", "--update", "--baseline", tmp_path / "baseline.json", "--records", tmp_path / "old.jsonl")
    assert done.code == 0, done.err
    return tmp_path


def run(zerocast, place: Path, records: str, *flags: object):
    return zerocast("check", "--baseline", place / "baseline.json", "--records", place / f"{records}.jsonl", *flags)


def test_unchanged_runs_pass(zerocast, place: Path, capsys) -> None:
    done = run(zerocast, place, "same", "--json")
    assert done.code == 0 and done.err == ""
    data = json.loads(done.out)
    assert {v["metric"]: v["status"] for v in data["verdicts"]} == dict.fromkeys(
        ("step_s", "tokens_per_s", "peak_allocated_bytes", "step_prediction_error", "peak_prediction_error"), "pass"
    )
    assert data["environment"]["driver"] == "580" and data["regressed"] == 0
    assert "5 pass" in run(zerocast, place, "same").out


@pytest.mark.parametrize(("records", "metric"), [("slow", "step_s"), ("fat", "peak_allocated_bytes")])
def test_regressions_fail_everywhere(zerocast, place: Path, monkeypatch, records: str, metric: str) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    junit, summary = place / "check.xml", place / "summary.md"
    summary.write_text("before\n", encoding="utf-8")
    flags = ("--metric", metric, "--junit", junit, "--summary", summary)
    done = run(zerocast, place, records, *flags, "--json")
    assert done.code == 1 and json.loads(done.out)["verdicts"][0]["status"] == "regressed"
    assert f"::error title={metric} regressed::" in done.err and f"{metric} regressed" in done.err.splitlines()[-1]
    assert ET.parse(junit).getroot().get("failures") == "1"
    assert summary.read_text(encoding="utf-8").startswith("before\n### zerocast check: 1 regressed")


def test_min_effect_lets_small_losses_pass(zerocast, place: Path) -> None:
    assert run(zerocast, place, "slow", "--metric", "step_s", "--min-effect", "10%").code == 0
    for bad in ("3", "0%", "-3%", "nan%", "x%", "100%"):
        done = run(zerocast, place, "same", "--min-effect", bad)
        assert done.code == 2 and f"--min-effect is '{bad}'" in done.err and done.out == ""


def test_inconclusive_warns_and_fails_when_strict(zerocast, place: Path) -> None:
    done = run(zerocast, place, "slow", "--metric", "step_s", "--runs", "2")
    assert done.code == 0 and "warning:" in done.out and "more run" in done.out
    done = run(zerocast, place, "slow", "--metric", "step_s", "--runs", "2", "--strict")
    assert done.code == 1 and "inconclusive" in done.err


def test_the_store_is_read_and_old_runs_are_left_out(zerocast, place: Path) -> None:
    store = Store(place / "s.db")
    store.add_many([*reports(0), *reports(2, factor=1.05), *reports(4, torch="2.14.0")])
    done = zerocast("check", "--baseline", place / "baseline.json", "--store", place / "s.db", "--json")
    data = json.loads(done.out)
    assert done.code == 1 and data["verdicts"][0]["n_now"] == 5
    assert "5 record(s) left out" in data["notes"][0] and "torch is '2.14.0' here" in data["notes"][0]


def test_another_environment_is_refused(zerocast, place: Path) -> None:
    done = run(zerocast, place, "alien")
    assert done.code == 2 and done.out == "" and "torch is '2.14.0' here and '2.13.0' there" in done.err
    assert "host is 'node2' here and 'node1' there" in run(zerocast, place, "host").err
    assert run(zerocast, place, "host", "--any-host").code == 0
    assert run(zerocast, place, "alien", "--any-host").code == 2


def test_update_adds_an_environment(zerocast, place: Path) -> None:
    before = json.loads((place / "baseline.json").read_text(encoding="utf-8"))
    assert run(zerocast, place, "alien", "--update").code == 0
    after = json.loads((place / "baseline.json").read_text(encoding="utf-8"))
    assert [e["environment"]["torch"] for e in after["environments"]] == ["2.13.0", "2.14.0"]
    assert after["environments"][0] == before["environments"][0]
    both = [*reports(8), *reports(9, torch="2.14.0")]
    export_reports(both, place / "both.jsonl")
    assert "runs of several environments" in run(zerocast, place, "both").err
    done = run(zerocast, place, "slow", "--update", "--runs", "2")
    assert done.code == 0 and "fewer than 5 runs" in done.out


def test_bad_input_is_one_sentence_and_nothing_is_written(zerocast, place: Path) -> None:
    good = (place / "baseline.json").read_text(encoding="utf-8")
    (place / "cut.json").write_text(good[: len(good) // 2], encoding="utf-8")
    (place / "newer.json").write_text(
        good.replace('"zerocast_baseline": 2', '"zerocast_baseline": 9'), encoding="utf-8"
    )
    (place / "key.json").write_text(good.replace('"runs":', '"rnus":'), encoding="utf-8")
    export_reports([], place / "empty.jsonl")
    (place / "broken.jsonl").write_text((place / "same.jsonl").read_text(encoding="utf-8")[:-40], encoding="utf-8")
    export_reports([replace(r, origin="predicted") for r in reports(6)], place / "forecasts.jsonl")
    outputs = ("--junit", place / "out.xml", "--summary", place / "out.md")
    known = {*place.iterdir()}
    texts = {p: p.read_bytes() for p in known}
    for baseline, records, says in (
        ("cut.json", "same", "truncated"), ("newer.json", "same", "newer"), ("key.json", "same", "did you mean 'runs'"),
        ("none.json", "same", "does not exist"), ("baseline.json", "empty", "no measured runs"),
        ("baseline.json", "broken", "truncated"), ("baseline.json", "missing", "cannot be read"),
        ("baseline.json", "forecasts", "no measured runs"), ("baseline.json", "old", "no new run"),
    ):  # fmt: skip
        flags = ("--baseline", place / baseline, "--records", place / f"{records}.jsonl")
        done = zerocast("check", *flags, *outputs)
        assert done.code == 2 and says in done.err and done.out == "" and done.err.count("\n") == 1, (baseline, records)
        if baseline in ("cut.json", "newer.json", "key.json") or records in ("empty", "broken", "missing"):
            assert zerocast("check", "--update", *flags).code == 2
    for flags, says in (
        (("--metric", "step"), "did you mean 'step_s'"),
        (("--records", place / "same.jsonl", "--store", place / "s.db"), "both given"),
        (("--store", place / "s.db"), "no measured runs"),
        (("--measure",), "--measure is given"),
        (("--update", "--store", place / "s.db"), "--update decides nothing"),
    ):
        done = zerocast("check", "--baseline", place / "baseline.json", *flags, *outputs)
        assert done.code == 2 and says in done.err and done.out == ""
    assert {p: p.read_bytes() for p in place.iterdir()} == texts


def test_without_records_it_measures_and_records(zerocast, tmp_path: Path, monkeypatch) -> None:
    import validator.gate.remeasure as remeasure

    here = {**PLACE, "host": "here"}
    export_reports(reports(0, host="here"), tmp_path / "old.jsonl")
    baseline = tmp_path / "baseline.json"
    assert zerocast("check", "--update", "--baseline", baseline, "--records", tmp_path / "old.jsonl").code == 0
    queue = reports(2, factor=1.05, host="here", n=5)
    monkeypatch.setattr(remeasure, "local_environment", lambda: remeasure.environment_of(here))
    monkeypatch.setattr(remeasure.remeasure, "__defaults__", (None, lambda case, _: queue.pop(), remeasure.Remote))
    done = zerocast("check", "--baseline", baseline, "--metric", "step_s")
    assert done.code == 1 and not queue and Store().count() == 5, done.err
    queue += reports(7, host="there", n=5)
    assert zerocast("check", "--baseline", baseline, "--update", "--measure").code == 0 and not queue
    places = json.loads(baseline.read_text(encoding="utf-8"))["environments"]
    assert [(e["environment"]["host"], len(e["cases"][0]["runs"])) for e in places] == [("here", 5), ("there", 5)]
    monkeypatch.setattr(remeasure, "local_environment", lambda: remeasure.environment_of(PLACE))
    assert "host is 'node1' here and 'here' there" in zerocast("check", "--baseline", baseline).err


def test_against_measures_both_versions_in_pairs(zerocast, place: Path, monkeypatch) -> None:
    import validator.gate.against as against

    measured: list[str] = []

    def one(factor: float):
        def measure(version, case):
            measured.append(version.name)
            slower = 1.0 if version.name == "main~1" else factor
            drift = 1.0 + (len(measured) - 1) // 2  # by far larger than the change, but alike within a pair
            step_s = slower * drift * (1 + 0.001 * (len(measured) % 3))
            return replace(reports(len(measured) + 100, n=1)[0], step_s=step_s, tokens_per_s=1 / step_s)

        return measure

    @contextmanager
    def unpacked(revision: str):
        yield against.Version(tree=place, name=revision, commit="f" * 40)

    monkeypatch.setattr(against, "unpacked", unpacked)
    flags = ("check", "--baseline", place / "baseline.json", "--against", "main~1")
    for factor, code, status in ((1.06, 1, "regressed"), (1.0, 0, "pass"), (0.9, 0, "improved")):
        monkeypatch.setattr(against.measure_pairs, "__defaults__", (one(factor),))
        measured.clear()
        done = zerocast(*flags, "--json", "--junit", place / "pairs.xml")
        found = {v["metric"]: v["status"] for v in json.loads(done.out)["verdicts"]}
        assert done.code == code, done.err
        assert found["step_s"] == found["tokens_per_s"] == status and found["peak_allocated_bytes"] == "pass"
        assert len(measured) == 16 and measured[:4] == ["main~1", "the working tree", "the working tree", "main~1"]
    assert "main~1, ffffffffffff" in zerocast(*flags, "--case", "llama", "--runs", "2").out
    for extra, says in (
        (("--update",), "--against measures both"),
        (("--records", "x"), "--against measures both"),
        (("--case", "lama-9"), "--case is 'lama-9'"),
    ):
        done = zerocast(*flags, *extra)
        assert done.code == 2 and says in done.err and done.out == ""


def test_only_the_named_cases_are_judged(zerocast, place: Path) -> None:
    assert run(zerocast, place, "slow", "--case", "llama-3-8b").code == 1
    assert run(zerocast, place, "slow", "--case", "gpt").code == 2


def test_the_environment_of_this_machine_is_that_of_its_records() -> None:
    torch = pytest.importorskip("torch")
    from validator.gate.baseline import environment_of
    from validator.gate.remeasure import local_environment
    from validator.provenance import collect

    found = local_environment()
    assert found == environment_of(collect(with_torch=True)) and found["torch"] == torch.__version__
