"""Record files and folders of them, and what is taken out before they are published."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from estimator import catalog
from estimator.errors import InputError
from estimator.time.profile import shipped_profiles
from estimator.time.profile_file import load_profile, save_profile
from validator.__main__ import main
from validator.compare import GROUPINGS, compare_sources, group_errors, settings_of
from validator.kernels.files import export_kernels, import_kernels
from validator.kernels.report import KernelReport
from validator.store.files import profile_path_of, publish, read_record_files
from validator.store.records import export_reports, import_reports


@pytest.fixture
def profile():
    """A whole machine's profile: its GPU is the one of the tests' jobs."""
    shipped = next(p for p in shipped_profiles() if p.arch == "hopper")
    gpu = replace(catalog.gpu("h200"), name="test-gpu")
    versions = {"os": "Linux-6.1.0-22-amd64-x86_64-with-glibc2.36", "torch": "2.13.0+cpu"}
    return replace(shipped, name="mine", gpu=gpu, host_name="secret.example.org", versions=versions)


def test_a_folder_is_read_file_by_file(tmp_path, make_report, make_job, profile):
    other = make_report(make_job(micro_batch=2))
    export_reports([make_report(), replace(other, origin="predicted")], tmp_path / "a.jsonl")
    export_reports([other], tmp_path / "b.jsonl")
    save_profile(profile, tmp_path / "b.profile.json")
    (tmp_path / "h200.kernels.jsonl").write_text('{"kernel": "rms_norm"}\n')
    (tmp_path / "failures.jsonl").write_text('{"id": 1}\n')
    files, left_out = read_record_files(tmp_path)
    assert [(f.path.name, len(f.reports), f.profile and f.profile.name) for f in files] == [
        ("a.jsonl", 1, None), ("b.jsonl", 1, "mine"),
    ]  # fmt: skip
    assert [path.name for path in left_out] == ["failures.jsonl", "h200.kernels.jsonl"]
    ((alone,), _) = read_record_files(tmp_path / "b.jsonl")
    assert (alone.path, alone.reports, alone.profile and alone.profile.name) == (files[1].path, (other,), "mine")


@pytest.mark.parametrize("name", ["x.kernels.jsonl", "none", "absent.jsonl"])
def test_without_records_of_steps_it_is_one_sentence(tmp_path, name):
    (tmp_path / "none").mkdir()
    (tmp_path / "x.kernels.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        read_record_files(tmp_path / name)


def test_each_file_is_forecast_with_its_own_profile(make_report, profile):
    report = make_report(origin="cuda", collective_bytes={})
    points = tuple(p._replace(op_s=10 * p.op_s, autograd_op_s=10 * p.autograd_op_s) for p in profile.host_points)
    slow = replace(profile, host_points=points)
    result = compare_sources([([report], [profile]), ([report], [slow])])
    fast_s, slow_s = (row.predicted for row in result.comparison.rows if row.term == "step_s")
    assert slow_s > fast_s and result.refused == {}


def test_groups_by_hand(make_job, make_report):
    cases = [(0, 1, 0.1), (0, 2, 0.3), (3, 2, -0.5), (3, 4, 0.7)]
    measured = [
        make_report(make_job(zero=z, n_gpus=n, micro_batch=i + 1), step_s=1.0) for i, (z, n, _) in enumerate(cases)
    ]
    measured[3] = replace(measured[3], origin="cuda")
    from validator.compare import compare

    predicted = [
        replace(m, origin="predicted", step_s=1 + error) for m, (_, _, error) in zip(measured, cases, strict=True)
    ]
    c = compare(predicted, measured)

    def table(by):
        return {
            g.group: (g.summary.n, g.summary.median, g.summary.bias)
            for g in group_errors(c.rows, c.settings, by, ["step_s"])
        }

    assert table("stage") == {
        "0": (2, pytest.approx(0.2), pytest.approx(0.2)),
        "3": (2, pytest.approx(0.6), pytest.approx(0.1)),
    }
    assert list(table("world")) == ["1", "2", "4"]
    assert table("backend") == {
        "cpu": (3, pytest.approx(0.3), pytest.approx(-0.1 / 3)), "cuda": (1, pytest.approx(0.7), pytest.approx(0.7)),
    }  # fmt: skip
    assert {by: list(table(by)) for by in ("offload", "recompute", "dtype", "model", "gpu")} == {
        "offload": ["none"], "recompute": ["none"], "dtype": ["fp32"], "model": ["tiny"], "gpu": ["test-gpu"],
    }  # fmt: skip
    assert group_errors(c.rows, c.settings, "stage", ["host_bytes"]) == ()
    with pytest.raises(InputError, match="did you mean 'stage'"):
        group_errors(c.rows, c.settings, "stages", ["step_s"])


def test_settings_of_a_report_without_a_job(make_report):
    assert settings_of(replace(make_report(), job={})) == {**dict.fromkeys(GROUPINGS, "unknown"), "backend": "cpu"}


def private(make_report, **changes):
    provenance = {
        "host": "secret.example.org", "os": "Linux-6.1.0-22-amd64-x86_64-with-glibc2.36", "torch": "2.13.0+cpu", "gpu": None,
        "command": ["worker.py", "--case", "/home/me/secret/case.json", "--follow-stdin"],
    }  # fmt: skip
    return make_report(provenance={**provenance, **changes})


def test_publishing_names_the_file_and_hides_the_host(tmp_path, make_report, profile):
    export_reports([private(make_report)], tmp_path / "records.jsonl")
    save_profile(profile, tmp_path / "cpu.json")
    out = tmp_path / "public" / "records"
    written = publish([tmp_path / "records.jsonl"], tmp_path / "cpu.json", out)
    assert [path.name for path in written] == ["cpu_torch2.13.0.jsonl", "cpu_torch2.13.0.profile.json"]
    assert not any("secret" in path.read_text() or "22-amd64" in path.read_text() for path in written)
    (report,) = import_reports(written[0])
    assert report.provenance["command"] == ["worker.py", "--case", "case.json", "--follow-stdin"]
    assert report.provenance["host"] == load_profile(written[1]).host_name
    assert report.provenance["host"].startswith("host-") and report.provenance["os"] == "Linux-6.1"
    assert replace(report, provenance={}) == replace(private(make_report), provenance={})

    again = publish([written[0]], None, out)  # publishing what is public changes nothing but the name
    assert [path.name for path in again] == ["cpu_torch2.13.0_2.jsonl"]
    assert again[0].read_text() == written[0].read_text()
    files, _ = read_record_files(out)
    assert [f.profile is None for f in files] == [False, True]


def test_kernels_are_published_beside_the_steps(tmp_path, make_report, profile):
    steps, kernels = tmp_path / "cpu", tmp_path / "kernels"
    for folder in (steps, kernels):
        folder.mkdir()
    export_reports([private(make_report)], steps / "records.jsonl")
    report = KernelReport(
        kernel="rms_norm", shape=(4, 8), bytes=128, seconds=1.0, low_s=1.0, high_s=1.0, repeats=3, copy_bytes_per_s=1e9,
        provenance=private(make_report).provenance,
    )  # fmt: skip
    export_kernels([report], kernels / "kernels.jsonl")
    save_profile(profile, tmp_path / "cpu.json")
    written = publish([steps, kernels], tmp_path / "cpu.json", tmp_path / "out")
    assert [path.name for path in written] == [
        "cpu_torch2.13.0.jsonl", "cpu_torch2.13.0.kernels.jsonl", "cpu_torch2.13.0.profile.json",
    ]  # fmt: skip
    assert (
        "secret" not in written[1].read_text()
        and profile_path_of(written[1]) == profile_path_of(written[0]) == written[2]
    )
    alone = publish([kernels], None, tmp_path / "out")
    assert [path.name for path in alone] == ["cpu_torch2.13.0_2.kernels.jsonl"]
    assert import_kernels(alone[0]) == import_kernels(written[1])


@pytest.mark.parametrize(
    ("gpu", "name"), [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100-sxm"), ("Quadro T1000", "quadro-t1000")]
)
def test_records_of_a_gpu_are_named_after_it(tmp_path, make_report, gpu, name):
    export_reports([private(make_report, gpu={"name": gpu}, torch="2.11.0+cu130")], tmp_path / "records.jsonl")
    assert publish([tmp_path], None, tmp_path / "out")[0].name == f"{name}_torch2.11.0.jsonl"


def test_two_machines_are_not_mixed(tmp_path, make_report):
    export_reports([private(make_report), private(make_report, torch="2.11.0")], tmp_path / "records.jsonl")
    with pytest.raises(InputError, match=r"2 kinds of machine \(cpu_torch2.11.0, cpu_torch2.13.0\)"):
        publish([tmp_path], None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_from_a_source_tree(tmp_path, make_report, capsys):
    export_reports([private(make_report)], tmp_path / "records.jsonl")
    (tmp_path / "failures.jsonl").write_text("{}\n")
    assert main(["publish", "--records", str(tmp_path), "--to", str(tmp_path / "out")]) == 0
    (written,) = json.loads(capsys.readouterr().out)["written"]
    assert written.endswith("cpu_torch2.13.0.jsonl")
    status = main(["compare", "--records", str(tmp_path)])
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert err == "not compared: failures.jsonl\n" and data["refused"] == {}
    assert status == 1 and [row["term"] for row in data["inexact"]] == [
        "collective_bytes.all_gather"
    ]  # made up by the fixture
