"""The forecasts in the README are what the commands print today."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("refresh", TREE / "docs" / "refresh.py")
assert spec is not None and spec.loader is not None
refresh = importlib.util.module_from_spec(spec)
spec.loader.exec_module(refresh)
TEXT = (TREE / "README.md").read_text(encoding="utf-8")
BLOCKS = refresh.blocks(TEXT)
FORECASTS = [b for b in BLOCKS if not b["kind"]]


def test_every_block_of_output_is_marked() -> None:
    assert len(FORECASTS) >= 2 and len(BLOCKS) > len(FORECASTS)
    assert TEXT.count("$ zerocast") == 2 * len(BLOCKS)


@pytest.mark.parametrize("block", FORECASTS, ids=lambda b: b["command"].split()[1])
def test_forecast_is_current(block: re.Match[str]) -> None:
    command = block["command"]
    assert block["output"] == f"$ {command}\n{refresh.output_of(command)}", "run `make readme`"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (TREE / target).exists(), target
