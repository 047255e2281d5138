"""The doctor says what is there, what is not, and what to do."""

from __future__ import annotations

import importlib.util

import pytest

from validator import doctor
from validator.doctor import diagnose
from validator.store.database import Store


def by_name(store_path):
    return {finding.what: finding for finding in diagnose(store_path)}


def test_every_part_is_looked_at_and_nothing_is_written(tmp_path):
    findings = by_name(tmp_path / "home" / "records.db")
    assert set(findings) == {
        "Python", "torch", "gloo", "CUDA", "NCCL", "CuPy", "GPUs", "host memory", "disk", "store", "Streamlit", "profile",
    }  # fmt: skip
    assert findings["Python"].status == "ok"
    assert all(f.detail for f in findings.values())
    assert all(f.remedy for f in findings.values() if f.status == "missing")
    assert list(tmp_path.iterdir()) == []


def test_torch_and_gpu_findings_match_this_machine(tmp_path):
    torch = pytest.importorskip("torch")
    findings = by_name(tmp_path / "records.db")
    assert findings["torch"].status == "ok" and torch.__version__ in findings["torch"].detail
    assert (findings["GPUs"].status == "ok") == (findings["CUDA"].status == "ok") == torch.cuda.is_available()
    assert (findings["gloo"].status == "ok") == torch.distributed.is_gloo_available()


def test_without_torch(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else real(name, *rest))
    findings = by_name(tmp_path / "records.db")
    assert findings["torch"].status == findings["gloo"].status == "missing"
    assert "zerocast[runtime]" in findings["torch"].remedy
    assert findings["CUDA"].status == findings["NCCL"].status == findings["GPUs"].status == "warn"


def test_the_store_is_opened(tmp_path, make_report):
    path = tmp_path / "records.db"
    Store(path).add(make_report())
    assert by_name(path)["store"].detail.endswith("holds 1 records")
    path.write_bytes(b"no database" * 100)
    finding = by_name(path)["store"]
    assert finding.status == "missing" and "corrupt" in finding.detail and finding.remedy


def test_little_disk_and_memory_are_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_DISK_BYTES", 1 << 62)
    monkeypatch.setattr(doctor, "LEAST_MEMORY_BYTES", 1 << 62)
    findings = by_name(tmp_path / "records.db")
    assert findings["disk"].status == findings["host memory"].status == "warn"
    assert "ZEROCAST_HOME" in findings["disk"].remedy
