"""``zerocast predict --module``, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from estimator.errors import InputError
from zerocast.cli import cli

FILE = """
import torch
import torch.nn.functional as F
from torch import nn

ids = torch.zeros(4, 32, dtype=torch.int64)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(1000, 64)
        self.lstm = nn.LSTM(64, 64, batch_first=True)
        self.head = nn.Linear(64, 1000)

    def forward(self, ids, labels):
        return F.cross_entropy(self.head(self.lstm(self.embed(ids))[0]).flatten(0, 1).float(), labels.flatten())


def make_model():
    return Net(), (ids, ids)


def images():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return net, (torch.empty(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64)), F.cross_entropy


def logits():
    return nn.Sequential(nn.Linear(8, 8)), torch.empty(4, 8)


def fails():
    raise ValueError("two\\nlines")


def nothing():
    return None


def no_module():
    return "net", ids


number = 3
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the current folder: long paths are cut in messages."""
    monkeypatch.chdir(tmp_path)
    file = Path("mine.py")
    file.write_text(FILE)
    return file


def predict(*args: str, gpu: str = "h100-sxm") -> dict:
    done = CliRunner().invoke(cli, ["predict", "--gpu", gpu, *args, "--json"], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return json.loads(done.output)


def test_forecast(path: Path) -> None:
    report = predict("--module", f"{path}:make_model", "--zero", "3", "--gpus", "16", "--recompute", "full")
    workload = report["job"]["workload"]
    assert workload == {"seq_len": 32, "micro_batch_size": 4, "global_batch_size": 64}
    n_params = 1000 * 64 + 4 * 64 * (64 + 64 + 2) + 64 * 1000 + 1000
    padded = sum(-(-n // 128) * 128 for n in (64_000, 4 * 64 * 130, 65_000))
    assert report["category_peak_bytes"]["params"] == 2 * padded // 16
    assert n_params <= padded
    assert report["step_s"] > 0 and report["mfu"] > 0
    assert any("cuDNN" in note for note in report["notes"])
    assert predict("--module", f"{path}:images", "--gpus", "1")["job"]["model"]["name"] == "Sequential"


def test_job_of_a_report_is_forecast_again(path: Path, tmp_path: Path) -> None:
    report = predict("--module", f"{path}:make_model")
    (tmp_path / "job.json").write_text(json.dumps(report["job"]))
    done = CliRunner().invoke(cli, ["predict", "--job", str(tmp_path / "job.json"), "--json"], standalone_mode=False)
    assert json.loads(done.output) == report


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("", (), r"module is '.*mine.py:'; allowed: FILE.py:NAME, the name of a function"),
        ("make_modle", (), r"module file '.*mine.py' has no 'make_modle'; did you mean 'make_model'\?"),
        ("number", (), "module 'number' of '.*' is a int; allowed: a function"),
        ("fails", (), "module 'fails' of '.*' fails: ValueError: two lines"),
        ("nothing", (), r"module 'nothing' of '.*' gives a NoneType; allowed: \(module, example_batch\) or"),
        ("no_module", (), "module 'no_module' of '.*' gives a str first"),
        ("logits", (), r"loss is a tensor of shape \[4, 8\]; allowed: a scalar"),
        ("make_model", ("--model", "gpt2"), "--module and --model are both given; allowed: one of them"),
        ("make_model", ("--job", "x.json"), "--module and --job are both given"),
        (
            "make_model",
            ("--micro-batch", "2"),
            "micro_batch is 2, but the example batch that Net was traced with has 4",
        ),
        ("make_model", ("--dtype", "fp8"), "dtype is 'fp8'"),
    ],
)
def test_mistakes(path: Path, name: str, flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        predict("--module", f"{path}:{name}", *flags)


def test_files_that_are_no_modules(path: Path) -> None:
    with pytest.raises(InputError, match=r"module file 'nowhere\.py' does not exist"):
        predict("--module", "nowhere.py:make_model")
    path.write_text("import nothing_of_this_name")
    with pytest.raises(InputError, match="cannot be run: ModuleNotFoundError: No module named 'nothing_of_this_name'"):
        predict("--module", f"{path}:make_model")
    path.write_text("def make_model(:")
    with pytest.raises(InputError, match="cannot be run: SyntaxError"):
        predict("--module", f"{path}:make_model")
    with pytest.raises(InputError, match="--gpu is not given"):
        CliRunner().invoke(
            cli, ["predict", "--module", f"{path}:make_model"], standalone_mode=False, catch_exceptions=False
        )
