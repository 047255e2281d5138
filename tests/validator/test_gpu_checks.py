"""The doctor's checks of a GPU: one that fails, crashes or hangs costs only itself."""

from __future__ import annotations

import sys

import pytest

from validator import __main__ as command
from validator import doctor
from validator.gpu.run import NAMES, run_checks

SCRIPT = """
import json, os, signal, sys, time
def say(**line): print(json.dumps(line), flush=True)
for number in range(int(sys.argv[1]), 6):
    say(started=number)
    what = ("fine", "wrong", "crash", "hang", "sticky", "fine")[number]
    if what == "crash":
        sys.stderr.write("Segmentation fault, they say\\n")
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "hang":
        time.sleep(60)
    if what == "fine":
        say(found=f"{number} works")
    else:
        say(failed=f"{number} is {what}")
    if what == "sticky":
        sys.exit(1)
"""


def test_every_check_is_answered_whatever_happens_to_its_process():
    found = list(run_checks(limit_s=1.0, command=(sys.executable, "-c", SCRIPT), names=tuple("abcdef")))
    assert found == [
        ("a", True, "0 works"),
        ("b", False, "1 is wrong"),
        ("c", False, "took its process down, killed by SIGSEGV; its last line: Segmentation fault, they say"),
        ("d", False, "hung: ended after 1 s"),
        ("e", False, "4 is sticky"),
        ("f", True, "5 works"),
    ]


def test_a_process_that_says_nothing_is_a_failure_of_the_check():
    broken = (sys.executable, "-c", "import sys; sys.exit('No module named torch')")
    assert list(run_checks(command=broken, names=("a",))) == [
        ("a", False, "took its process down, exit status 1; its last line: No module named torch")
    ]


def test_what_has_not_begun_when_time_is_over_is_not_run():
    slow = (sys.executable, "-c", SCRIPT.replace("say(started", "time.sleep(0.1); say(started"))
    found = list(run_checks(budget_s=0.05, command=slow, names=("a", "b")))
    assert found == [("a", True, "0 works"), ("b", False, "not run: the 0.05 s for all checks are over")]


def test_the_names_are_those_of_the_checks():
    pytest.importorskip("torch")
    from validator.gpu.checks import CHECKS

    assert tuple(name for name, _ in CHECKS) == NAMES


def test_the_command_says_what_works_and_fails_when_something_does_not(monkeypatch, capsys):
    monkeypatch.setattr(
        command, "diagnose", lambda: [doctor.Finding(what="CUDA", status="warn", detail="torch has no CUDA")]
    )
    found = [doctor.Finding(what="events", status="ok", detail="10.1 ms")]
    monkeypatch.setattr(command, "examine_gpu", lambda: iter(found))
    assert command.main(["doctor"]) == 0
    assert capsys.readouterr().err == "warn    CUDA: torch has no CUDA\nok      events: 10.1 ms\n"
    found.append(doctor.Finding(what="NCCL", status="missing", detail="no answer"))
    assert command.main(["doctor"]) == 1


def test_without_a_gpu_nothing_is_run():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (finding,) = doctor.examine_gpu()
    assert finding.status == "warn" and "torch can use no GPU here" in finding.detail
