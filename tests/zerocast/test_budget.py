"""``zerocast budget`` from the command line."""

from __future__ import annotations

import json

import pytest

JOB = ("--model", "llama-3-8b", "--gpus", "64", "--global-batch", "256", "--tokens", "1T")


def test_a_run_as_a_table_and_as_json(zerocast) -> None:
    def budget(*args: str) -> str:
        done = zerocast("budget", *JOB, *args)
        assert done.code == 0 and done.err == ""
        return done.out

    text = budget("--gpu", "aws-p5.48xlarge")
    for word in (
        "wall clock",
        "GPU-hours",
        "MFU, HFU (full attention)",
        "goodput",
        "price: 55.04 USD/h for 8 GPUs",
        "419 unexpected",
    ):
        assert word in text
    data = json.loads(budget("--gpu", "h100-sxm", "--price", "2", "--mtbf", "none", "--json"))
    assert data["usd"] == pytest.approx(2 * data["gpu_hours"]) and data["goodput"] == 1.0
    assert data["days"] * 86_400 == pytest.approx(data["n_steps"] * data["step_s"])
    assert data["checkpoint"]["total_bytes"] == 12 * 8_030_261_248
    dear = json.loads(budget("--gpu", "h100-sxm", "--machine", "oci-bm.gpu.h100.8", "--mtbf", "none", "--json"))
    assert dear["usd"] == pytest.approx(10 * dear["gpu_hours"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--gpu", "h100-sxm", "--machine", "dgx-a100"), "the job is for h100-sxm"),
        (("--gpu", "h100-sxm", "--mtbf", "lama-3"), "did you mean 'llama-3'"),
        (("--gpu", "h100-sxm", "--pue", "0.2"), "pue is 0.2"),
        (("--gpu", "h100-sxm", "--tokens", "1X"), "tokens is '1X'"),
    ],
)
def test_mistakes_are_one_sentence(zerocast, args: tuple[str, ...], words: str) -> None:
    done = zerocast("budget", *JOB, *args)
    assert done.code == 2 and done.out == "" and words in done.err


def test_tokens_are_needed(zerocast) -> None:
    assert "--tokens is not given" in zerocast("budget", "--model", "gpt2", "--gpu", "h100").err
