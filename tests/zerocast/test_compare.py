"""``zerocast compare``: groups, budgets, plots and the accuracy page, through the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from estimator.job.options import JobOptions, build_job
from estimator.predict import predict
from validator.store.records import export_reports


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of records: steps as forecast, 25 % and 100 % slower; one activation too many in the last."""
    path = tmp_path / "records"
    path.mkdir()
    runs = []
    for stage, factor in ((1, 1.0), (2, 1.25), (3, 2.0)):
        forecast = predict(build_job(JobOptions(model="gpt2", gpu="h100-sxm", gpus=8, zero=stage, seq_len=128)))
        runs.append(replace(forecast, origin="cuda", step_s=forecast.step_s * factor, notes=()))
    last = runs[2]
    more = 64 << 20
    runs[2] = replace(
        last,
        origin="fake",
        peak_allocated_bytes=last.peak_allocated_bytes + more,
        category_bytes_at_peak={
            **last.category_bytes_at_peak,
            "activations": last.category_bytes_at_peak.get("activations", 0) + more,
        },
    )
    export_reports(runs[:2], path / "a.jsonl")
    export_reports(runs[2:], path / "b.jsonl")
    (path / "h100.kernels.jsonl").write_text('{"kernel": "rms_norm"}\n')
    return path


def groups(done, by: str, term: str) -> dict[str, float]:
    data = json.loads(done.out)
    return {g["group"]: g["summary"]["bias"] for g in data["groups"] if g["by"] == by and g["summary"]["term"] == term}


def test_groups_as_json(zerocast, folder: Path) -> None:
    done = zerocast("compare", "--records", folder, "--by", "stage", "--by", "model", "--json")
    assert done.code == 0 and done.err == ""
    assert groups(done, "stage", "step_s") == pytest.approx({"1": 0.0, "2": -0.2, "3": -0.5})
    assert groups(done, "model", "step_s") == pytest.approx({"gpt2": -0.7 / 3})
    assert groups(done, "backend", "step_s") == {}
    assert json.loads(done.out)["left_out"] == [str(folder / "h100.kernels.jsonl")]


def test_groups_are_shown_by_backend_and_stage_unless_said(zerocast, folder: Path) -> None:
    text = zerocast("compare", "--records", folder).out
    assert "Error by backend" in text and "Error by stage" in text and "Error by model" not in text
    assert "not compared: h100.kernels.jsonl" in text
    text = zerocast("compare", "--records", folder, "--by", "world", "--term", "step_s").out
    assert (
        "Error by world" in text and "Error by stage" not in text and "peak memory" not in text.split("Worst first")[0]
    )
    assert "step 50.0% low" in text and "activations" not in text  # the peak was not asked for
    one = zerocast("compare", "--records", folder, "--origin", "fake").out
    assert "Error by" not in one  # one group says nothing new


def test_the_worst_comes_first_with_a_sentence(zerocast, folder: Path) -> None:
    text = zerocast("compare", "--records", folder).out.split("Worst first")[1]
    assert text.index("step 50.0% low") < text.index("step 20.0% low")
    assert "activations 64.00 MiB short" in " ".join(text.split())


def test_budgets_of_terms_and_statistics(zerocast, folder: Path) -> None:
    compare = ("compare", "--records", folder)
    assert zerocast(*compare, "--fail-over", "step_s:median=21", "--fail-over", "peak_allocated_bytes=50").code == 0
    over = zerocast(*compare, "--fail-over", "step_s:median=19", "--json")
    assert over.code == 1 and over.err == "error: step_s: median error over 3 runs is 20.0%, over 19 %\n"
    assert json.loads(over.out)["failures"] == ["step_s: median error over 3 runs is 20.0%, over 19 %"]
    worst = zerocast(*compare, "--fail-over", "10")
    assert worst.code == 1 and "-50.0% is over 10 %" in worst.err and "more)" in worst.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--fail-over", "step_s:mean=3"], ["'mean'", "did you mean 'median'?"]),
        (["--fail-over", "stepp_s=3"], ["'stepp_s'", "did you mean 'step_s'?"]),
        (["--fail-over", "much"], ["'much'", "TERM=PERCENT"]),
        (["--by", "stages"], ["'stages'", "did you mean 'stage'?"]),
        (["--write", "page.md", "--model", "gpt2"], ["--write", "--model"]),
    ],
)
def test_a_mistake_is_one_sentence(
    zerocast, folder: Path, args: list[str], words: list[str], tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = zerocast("compare", "--records", folder, *args)
    assert done.code == 2 and done.out == "" and done.err.count("\n") == 1, done
    assert all(word in done.err for word in words), done.err
    assert [p.name for p in tmp_path.iterdir()] == ["records"]


def test_plots_are_written_and_told(zerocast, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = zerocast(
        "compare", "--records", folder, "--plots", tmp_path / "plots", "--term", "step_s", "--term", "host_bytes"
    )
    assert done.code == 0, done.err
    names = {"step_s_scatter.png", "step_s_residuals.png", "step_s_groups.png"}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == names
    assert all(name in done.out for name in names) and "no plot of host memory" in done.out


def test_the_page_holds_the_same_figures(zerocast, folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    done = zerocast("compare", "--records", folder, "--write", page)
    assert done.code == 0 and f"wrote {page}" in done.out
    text = page.read_text(encoding="utf-8")
    assert text.startswith(
        f"<!-- Generated by `zerocast compare --records {folder} --write {page}`: do not edit. -->\n"
    )
    assert "| step time | 3 | 20.0% | 44.0% | 50.0% | -23.3% |" in text
    assert "| peak memory (live tensors) | 3 |" in text and "| 64.00 MiB |" in text
    assert "| `a.jsonl` | 2 cuda |" in text and "| `b.jsonl` | 1 fake |" in text
    assert "| 3 | 1 | 50.0% | 50.0% | 50.0% | -50.0% |" in text  # stage 3
    assert "activations 64.00 MiB short" in text and "| fits | fits | 3 |" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|"), line
