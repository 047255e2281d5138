"""Each command's answer equals what the floor below computes."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from estimator.job import Job
from estimator.job.options import JobOptions, build_job
from estimator.memory.allocator_settings import AllocatorSettings
from estimator.plan import PlanQuestion, plan
from estimator.predict import predict
from estimator.report import CATEGORIES, TIME_PARTS, StepReport
from estimator.units import format_bytes, format_seconds
from validator.store.database import Store

FLAGS = ("--model", "llama-3-8b", "--gpu", "h100-sxm", "--gpus", "8", "--seq-len", "2048")
OPTIONS = JobOptions(model="llama-3-8b", gpu="h100-sxm", gpus=8, seq_len=2048)
JOB_FILE = """
[model]
name = "llama-3-8b"
[workload]
seq_len = 2048
micro_batch = 2
global_batch = 32
[strategy]
zero = 2
offload = "optimizer"
recompute = "full"
[cluster]
gpu = "h100-sxm"
gpus = 8
"""
FILE_OPTIONS = replace(OPTIONS, micro_batch=2, global_batch=32, zero=2, offload="optimizer", recompute="full")


def as_data(report: StepReport) -> dict:
    return json.loads(json.dumps(report.to_dict()))


def replayed(job: Job, conf: str = "") -> StepReport:
    """What ``zerocast predict`` says of it."""
    return predict(job, allocator=AllocatorSettings.parse(conf))


def test_predict_json_is_the_report(zerocast) -> None:
    done = zerocast("predict", *FLAGS, "--zero", "3", "--json")
    assert done.code == 0 and done.err == ""
    data = json.loads(done.out)
    assert list(data) == [f.name for f in fields(StepReport)]
    assert data == as_data(replayed(build_job(OPTIONS)))


@pytest.mark.parametrize(
    "flag", ["zero", "offload", "recompute", "dtype", "micro_batch", "global_batch", "gpus", "seq_len"]
)
def test_every_flag_reaches_the_job(zerocast, flag: str) -> None:
    value = {"zero": 1, "offload": "optimizer,param", "recompute": "selective", "dtype": "fp16", "micro_batch": 4,
             "global_batch": 64, "gpus": 16, "seq_len": 1024}[flag]  # fmt: skip
    done = zerocast("predict", *FLAGS, "--" + flag.replace("_", "-"), str(value), "--json")
    assert json.loads(done.out)["job_key"] == build_job(replace(OPTIONS, **{flag: value})).key


def test_predict_shows_every_figure(zerocast) -> None:
    done = zerocast("predict", *FLAGS, "--zero", "3")
    report = replayed(build_job(OPTIONS))
    assert done.code == 0
    for text in (
        format_bytes(report.device_used_bytes), format_bytes(report.capacity_bytes), report.peak_where, report.explanation,
        format_seconds(report.step_s), f"{report.tokens_per_s:,.0f} tokens/s", f"{100 * report.mfu:.1f} %", *report.notes,
    ):  # fmt: skip
        assert text in done.out, text
    assert format_bytes(sum(report.category_bytes_at_peak.values())) in done.out


def test_the_allocators_options_reach_it(zerocast) -> None:
    got = [
        json.loads(zerocast("predict", *FLAGS, "--recompute", "full", "--json", *conf).out)
        for conf in ((), ("--alloc-conf", "expandable_segments:True"))
    ]
    assert got[1] == as_data(replayed(build_job(replace(OPTIONS, recompute="full")), "expandable_segments:True"))
    assert got[1]["peak_reserved_bytes"] < got[0]["peak_reserved_bytes"]
    wrong = zerocast("predict", *FLAGS, "--alloc-conf", "expandable:True")
    assert wrong.code == 2 and "did you mean 'expandable_segments'" in wrong.err
    assert format_bytes(got[0]["peak_reserved_bytes"]) in zerocast("predict", *FLAGS, "--recompute", "full").out


def test_predict_says_why_it_does_not_fit(zerocast) -> None:
    done = zerocast("predict", *FLAGS, "--zero", "0")
    report = replayed(build_job(replace(OPTIONS, zero=0)))
    assert not report.fits and report.explanation in done.out


def test_job_file_equals_flags(zerocast, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(JOB_FILE)
    assert json.loads(zerocast("predict", "--job", file, "--json").out) == as_data(replayed(build_job(FILE_OPTIONS)))


def test_a_hugging_face_config_is_a_model(zerocast, tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 1000, "n_positions": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = zerocast("predict", "--model", tmp_path, "--gpu", "a100-80", "--gpus", "2", "--json")
    assert done.code == 0, done.err
    model = json.loads(done.out)["job"]["model"]
    assert (model["n_layers"], model["d_model"], model["vocab_size"]) == (2, 64, 1000)


def test_plan_json_is_the_plan(zerocast) -> None:
    done = zerocast("plan", *FLAGS, "--global-batch", "32", "--recompute", "full", "--offload", "none", "--json")
    job = build_job(replace(OPTIONS, global_batch=32, recompute="full"))
    answer = plan(
        PlanQuestion(
            model=job.model, cluster=job.cluster, seq_len=2048, global_batch_size=32, offloads=("none",), recomputes=("full",)
        )
    )  # fmt: skip
    data = json.loads(done.out)
    assert done.code == 0 and data["n_ranked"] == len(answer.ranked)
    assert data["ranked"] == [as_data(c.report) for c in answer.ranked[:10]]
    assert [r["reason"] for r in data["rejected"]] == [r.reason for r in answer.rejected]


def test_plan_shows_the_best_and_the_reasons(zerocast) -> None:
    done = zerocast("plan", *FLAGS, "--global-batch", "32", "--top", "3")
    assert done.code == 0 and "ways fit" in done.out
    assert [line.split()[0] for line in done.out.splitlines() if line[:4].strip().isdigit()][:3] == ["1", "2", "3"]
    assert "What does not fit" in done.out and "optimizer state" in done.out


def test_plan_takes_a_job_file(zerocast, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(JOB_FILE)
    data = json.loads(zerocast("plan", "--job", file, "--top", "1000", "--json").out)
    jobs = [r["job"] for r in data["ranked"]]
    assert {j["workload"]["global_batch_size"] for j in jobs} == {32}
    assert {j["workload"]["micro_batch_size"] for j in jobs} >= {1, 2}
    assert {j["strategy"]["zero_stage"] for j in jobs} == {0, 1, 2, 3}
    assert {j["strategy"]["recompute"] for j in jobs} == {"none", "selective", "full"}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with two measured runs: one exactly as forecast, one 25 % slower than forecast."""
    path = tmp_path / "runs.db"
    for micro, factor in ((1, 1.0), (2, 1.25)):
        forecast = predict(build_job(replace(OPTIONS, micro_batch=micro)))
        Store(path).add(replace(forecast, origin="cuda", step_s=forecast.step_s * factor, notes=()))
    return path


def test_runs_list_show_export_import_delete(zerocast, store: Path, tmp_path: Path) -> None:
    listed = json.loads(zerocast("runs", "list", "--store", store, "--json").out)
    assert [r["id"] for r in listed] == [1, 2]
    text = zerocast("runs", "list", "--store", store).out
    assert text.count("llama-3-8b") == 2 and "8 x h100-sxm" in text
    shown = json.loads(zerocast("runs", "show", "2", "--store", store, "--json").out)
    assert shown["report"] == listed[1]["report"]
    assert "record 2" in zerocast("runs", "show", "2", "--store", store).out

    file, other = tmp_path / "runs.jsonl", tmp_path / "other.db"
    assert zerocast("runs", "export", file, "--store", store).code == 0
    assert json.loads(zerocast("runs", "import", file, "--store", other, "--json").out) == {"read": 2, "added": 2}
    assert json.loads(zerocast("runs", "import", file, "--store", other, "--json").out) == {"read": 2, "added": 0}
    assert Store(other).reports() == Store(store).reports()

    assert zerocast("runs", "delete", "1", "99", "--store", other).code == 2
    assert Store(other).count() == 2
    assert json.loads(zerocast("runs", "delete", "1", "--store", other, "--json").out) == {"deleted": 1}
    assert [r.id for r in Store(other).records()] == [2]


def test_runs_list_filters(zerocast, store: Path) -> None:
    assert json.loads(zerocast("runs", "list", "--store", store, "--origin", "cpu", "--json").out) == []
    assert len(json.loads(zerocast("runs", "list", "--store", store, "--model", "llama-3-8b", "--json").out)) == 2


def test_compare_reports_each_error(zerocast, store: Path) -> None:
    done = zerocast("compare", "--store", store, "--json")
    assert done.code == 0 and done.err == ""
    data = json.loads(done.out)
    errors = sorted(row["error"] for row in data["rows"] if row["term"] == "step_s")
    assert errors == pytest.approx([-0.2, 0.0])
    assert all(row["error"] == 0 for row in data["rows"] if row["term"].startswith("category_peak_bytes"))
    assert data["refused"] == {} and data["inexact"] == []
    text = zerocast("compare", "--store", store).out
    assert "step time" in text and "step 20.0% low" in text and "all equal" in text


def test_compare_is_a_gate(zerocast, store: Path) -> None:
    assert zerocast("compare", "--store", store, "--fail-over", "21").code == 0
    failed = zerocast("compare", "--store", store, "--fail-over", "19")
    assert failed.code == 1 and "step_s" in failed.err and "-20.0%" in failed.err and "19 %" in failed.err
    assert zerocast("compare", "--store", store, "--fail-over", "19", "--term", "peak_allocated_bytes").code == 0
    wrong = zerocast("compare", "--store", store, "--term", "step_time")
    assert wrong.code == 2 and "did you mean 'step_s'?" in wrong.err


def test_compare_fails_on_other_bytes_whatever_the_limit(zerocast, store: Path) -> None:
    report = Store(store).reports()[0]
    (name, n_bytes), *_ = report.collective_bytes.items()
    Store(store).add(replace(report, collective_bytes={**report.collective_bytes, name: n_bytes + 2}))
    failed = zerocast("compare", "--store", store, "--fail-over", "1000")
    assert failed.code == 1 and f"collective_bytes.{name} must be equal" in failed.err


def test_compare_with_nothing_to_gate_fails(zerocast, tmp_path: Path) -> None:
    Store(tmp_path / "runs.db").add(StepReport(origin="cpu", job_key="f" * 16, step_s=1.0))
    failed = zerocast("compare", "--store", tmp_path / "runs.db", "--fail-over", "10")
    assert failed.code == 1 and "nothing to gate" in failed.err


def test_compare_reads_a_records_file(zerocast, store: Path, tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    zerocast("runs", "export", file, "--store", store)
    assert json.loads(zerocast("compare", "--records", file, "--json").out)["rows"]
    both = zerocast("compare", "--records", file, "--store", store)
    assert both.code == 2 and "--records" in both.err and "--store" in both.err


def test_doctor_looks_and_changes_nothing(zerocast, home: Path) -> None:
    findings = json.loads(zerocast("doctor", "--json").out)
    assert {"Python", "torch", "store"} <= {f["what"] for f in findings}
    assert all(f["status"] in ("ok", "warn", "missing") for f in findings)
    assert "Python" in zerocast("doctor").out
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--device", "gpu"], "did you mean 'cpu'?"),
        (["--device", "cpu", "--budget", "0"], "budget"),
        (["--device", "cpu", "--workers", "one"], "--workers is 'one'"),
        (["--device", "cpu", "--effort", "fast"], "effort"),
    ],
)
def test_calibrate_refuses(zerocast, home: Path, args: list[str], words: str) -> None:
    done = zerocast("calibrate", *args)
    assert done.code == 2 and words in done.err and done.out == "", done
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--backend", "gpu", *FLAGS], "backend is 'gpu'"),
        (["--backend", "cpu", *FLAGS], "--gpu is 'h100-sxm'"),
        (["--backend", "cpu", "--model", "gpt-30m"], "zerocast calibrate"),
        (["--backend", "fake", "--model", "gpt-30m"], "--gpu is not given"),
        (["--backend", "fake", *FLAGS, "--rank", "8"], "rank is 8"),
        (["--backend", "fake", *FLAGS, "--steps", "0"], "steps is 0"),
    ],
)
def test_measure_refuses(zerocast, home: Path, args: list[str], words: str) -> None:
    pytest.importorskip("torch")
    done = zerocast("measure", *args)
    assert done.code == 2 and words in done.err and done.out == "", done
    assert list(home.iterdir()) == []


def test_measure_records_and_shows_the_forecast_beside(zerocast, home: Path) -> None:
    pytest.importorskip("torch")
    flags = (
        "--model",
        "gpt-30m",
        "--gpu",
        "h100-sxm",
        "--gpus",
        "4",
        "--zero",
        "3",
        "--seq-len",
        "128",
        "--backend",
        "fake",
    )
    done = zerocast("measure", *flags, "--json")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data["measured"]["origin"] == "fake" and data["predicted"]["origin"] == "predicted"
    assert data["measured"]["job_key"] == data["predicted"]["job_key"]
    assert set(data["measured"]["category_peak_bytes"]) <= set(CATEGORIES)
    rows = {row["term"]: row for row in data["comparison"]["rows"]}
    for state in ("params", "grads", "master_params", "optimizer_state"):
        assert rows[f"category_peak_bytes.{state}"]["error"] == 0
    assert data["comparison"]["inexact"] == []
    (record,) = Store().records()
    assert as_data(record.report) == data["measured"]


@pytest.mark.slow
def test_calibrate_then_measure_on_this_machine(zerocast, home: Path) -> None:
    pytest.importorskip("torch")
    done = zerocast("calibrate", "--effort", "quick", "--workers", "1,2", "--budget", "30")
    assert done.code == 0, done.err
    assert (home / "profiles" / "cpu.json").exists()
    flags = ("--model", "gpt-30m", "--gpus", "2", "--zero", "2", "--seq-len", "64", "--dtype", "fp32", "--steps", "3")
    done = zerocast("measure", "--backend", "cpu", *flags, "--json")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data["measured"]["step_s"] > 0 and data["predicted"]["provenance"]["profile_origin"] == "measured"
    assert set(data["measured"]["time_parts_s"]) <= set(TIME_PARTS)
    assert json.loads(zerocast("compare", "--json").out)["refused"] == {}


@pytest.mark.slow
def test_demo_walks_the_whole_road(zerocast, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    done = zerocast("demo", "--store", tmp_path / "demo.db")
    assert done.code == 0, done.err
    for stage in range(4):
        assert f"ZeRO-{stage}: forecast" in done.out
    assert f"dashboard --store {tmp_path / 'demo.db'}" in done.out
    assert Store(tmp_path / "demo.db").count() == 4


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("Tesla V100-SXM2-32GB", "v100-32"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA H100 NVL", "h100-pcie-94"),
        ("Quadro T1000", None),
    ],
)
def test_cuda_names_are_found_in_the_catalogue_or_not_guessed(device: str, name: str | None) -> None:
    from validator.devices import catalogue_name

    assert catalogue_name(device) == name
