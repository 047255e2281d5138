"""``explain``, ``trace`` and ``plot`` through the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from estimator.job.options import JobOptions, build_job
from estimator.memory.allocator_settings import AllocatorSettings
from estimator.predict import predict
from estimator.units import format_bytes, format_seconds
from estimator.views.memory import memory_over_step
from estimator.views.remedies import find_remedies
from estimator.views.step import view_step
from estimator.views.trace import chrome_trace
from estimator.views.waterfall import waterfall
from zerocast.cli import cli

FLAGS = (
    "--model",
    "gpt2",
    "--gpu",
    "h100-sxm",
    "--gpus",
    "8",
    "--seq-len",
    "512",
    "--zero",
    "2",
    "--global-batch",
    "64",
)
JOB = build_job(JobOptions(model="gpt2", gpu="h100-sxm", gpus=8, seq_len=512, zero=2, global_batch=64))
SETTINGS = AllocatorSettings()


@pytest.mark.parametrize("name", ["explain", "trace", "plot"])
def test_job_flags_are_those_of_predict(name: str) -> None:
    def flags(name: str) -> list[str]:
        command = cli.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        named = [p.opts[0] for p in command.params]
        return named[named.index("--model") : named.index("--job") + 1]

    assert flags(name) == flags("predict")


def test_explain_json_is_what_the_views_say(zerocast) -> None:
    done = zerocast("explain", *FLAGS, "--json")
    assert done.code == 0 and done.err == ""
    data = json.loads(done.out)
    view = view_step(JOB, allocator=SETTINGS)
    curve, found = memory_over_step(view), find_remedies(JOB, allocator=SETTINGS)
    assert data["job_key"] == JOB.key and data["step_s"] == view.report.step_s
    assert data["memory"]["peak"]["live_bytes"] == curve.peak.live
    assert len(data["memory"]["over_step"]) == len(curve.samples)
    assert [t["seconds"] for t in data["time"]["waterfall"]] == [t.seconds for t in waterfall(view)]
    assert sum(t["seconds"] for t in data["time"]["waterfall"]) == pytest.approx(data["step_s"], rel=1e-12)
    assert [r["change"] for r in data["memory"]["remedies"]] == [r.change.words for r in found.for_memory]
    assert [r["saved_bytes"] for r in data["tried"]] == [r.saved_bytes for r in found.tried]
    assert data["device_used_bytes"] == predict(JOB, allocator=SETTINGS).device_used_bytes


def test_explain_says_it_in_words(zerocast) -> None:
    done = zerocast("explain", *FLAGS, "--over-time", "--operators", "3", "--all")
    report = predict(JOB)
    assert done.code == 0 and done.err == ""
    for text in (
        format_bytes(report.peak_allocated_bytes), report.peak_where, format_seconds(report.step_s), "model FLOPs at the dense peak",
        "Less memory:", "Less time", "Memory over the step", "(peak)", "Operators", "Everything that was tried", "ZeRO stage 3",
    ):  # fmt: skip
        assert text in done.out, text
    operators = [
        line for line in done.out.splitlines() if line.count("%") == 2 and (" forward " in line or " backward " in line)
    ]
    assert len(operators) == 3
    short = zerocast("explain", *FLAGS, "--no-allocator")
    assert short.code == 0 and "tried: ZeRO stage 0" in short.out and "Operators" not in short.out


def test_explain_says_what_makes_a_job_fit(zerocast) -> None:
    done = zerocast(
        "explain", "--model", "llama-3-8b", "--gpu", "h100-sxm", "--gpus", "8", "--zero", "0", "--no-allocator"
    )
    assert done.code == 0 and "It does not fit: needs" in done.out and "; then it fits" in done.out


def test_trace_writes_what_the_view_says(zerocast, tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    done = zerocast("trace", *FLAGS, "--write", file, "--micro-batches", "2", "--json")
    assert done.code == 0 and done.err == ""
    written, facts = json.loads(file.read_text()), json.loads(done.out)
    assert written == json.loads(json.dumps(chrome_trace(view_step(JOB, kept_turns=2))))
    assert facts["n_events"] == len(written["traceEvents"]) and facts["n_bytes"] == file.stat().st_size
    assert facts["repeats_left_out"] == written["otherData"]["repeats_left_out"] > 0
    text = zerocast("trace", *FLAGS, "--write", file)
    assert "ui.perfetto.dev" in text.out and "left out" in text.out


def test_plot_writes_pictures_and_their_numbers(zerocast, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "plots"
    done = zerocast("plot", *FLAGS, "--write", folder, "--json")
    assert done.code == 0 and done.err == ""
    files = json.loads(done.out)["files"]
    assert [Path(name).name for name in files] == [
        "memory.png", "memory.csv", "waterfall.png", "waterfall.csv", "roofline.png", "roofline.csv"
    ]  # fmt: skip
    assert all((folder / Path(name).name).read_bytes()[:4] == b"\x89PNG" for name in files if name.endswith(".png"))
    with (folder / "memory.csv").open(newline="") as file:
        memory = list(csv.DictReader(file))
    assert max(int(row["total_bytes"]) for row in memory) == predict(JOB).peak_allocated_bytes
    with (folder / "waterfall.csv").open(newline="") as file:
        assert sum(float(row["seconds"]) for row in csv.DictReader(file)) == pytest.approx(predict(JOB).step_s)
    with (folder / "roofline.csv").open(newline="") as file:
        assert {row["kind"] for row in csv.DictReader(file)} >= {"matmul", "attention", "elementwise"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trace", *FLAGS], ["--write"]),
        (["plot", *FLAGS], ["--write"]),
        (["trace", *FLAGS, "--write", "nowhere/step.json"], ["nowhere/step.json"]),
        (["trace", *FLAGS, "--write", "step.json", "--micro-batches", "0"], ["--micro-batches", "0"]),
        (["trace", *FLAGS, "--write", "step.json", "--stage", "1"], ["stage is 1", "from 0 to 0"]),
        (["plot", *FLAGS, "--write", "file/plots"], ["file/plots"]),
        (["explain", *FLAGS, "--operators", "0"], ["--operators", "0"]),
        (["explain", "--model", "gpt2", "--gpu", "h100-sxm", "--zero", "5"], ["zero", "5"]),
    ],
)
def test_a_mistake_is_one_sentence(zerocast, args: list[str], words: list[str], tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    done = zerocast(*args)
    assert done.code == 2 and done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert all(word in done.err for word in words), done.err
