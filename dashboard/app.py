"""The page: ``streamlit run dashboard/app.py -- [--store FILE] [--profile FILE]``. Widgets and layout only."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import streamlit as st

from dashboard.forecast import forecast_tab
from dashboard.runs import runs_tab
from estimator.errors import InputError


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dashboard")
    parser.add_argument("--store", type=Path)
    parser.add_argument("--profile", type=Path)
    return parser.parse_known_args(sys.argv[1:])[0]


def _guarded(show: Callable[..., None], *args: Any) -> None:
    """Runs one tab; a user's mistake is shown as its sentence."""
    try:
        show(*args)
    except InputError as error:
        st.error(str(error))


def main() -> None:
    st.set_page_config(page_title="Zerocast", page_icon="📊", layout="wide")
    st.title("Zerocast")
    arguments = _arguments()
    forecast, runs = st.tabs(["Forecast", "Recorded runs"])
    with forecast:
        _guarded(forecast_tab, arguments.store, arguments.profile)
    with runs:
        _guarded(runs_tab, arguments.store, arguments.profile)


main()
