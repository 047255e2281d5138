"""``python -m validator``: measure and compare from a source tree, with nothing but the runtime installed.

The full command line is ``zerocast``; this one serves machines on which only the tree lies.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from estimator.errors import InputError
from estimator.time.profile_file import load_profile
from estimator.units import format_seconds
from validator.case import read_case
from validator.compare import compare, predict_for
from validator.records import export_reports, import_reports
from validator.runner import Outcome, Progress, measure_many
from validator.store import Store


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a case failed or an exact term differs, 2 bad input, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        return int(args.command(args))
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what is finished is recorded, the same command goes on from here\n")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m validator", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="measure | compare | export | import")
    parts = {
        "measure": (_measure, "run cases and record what they measure"),
        "compare": (_compare, "predict recorded runs again and print every error as JSON"),
        "export": (_export, "write the store's reports to a file (.jsonl, .csv, .parquet)"),
        "import": (_import, "add the reports of a file to the store"),
    }
    sub = {}
    for name, (function, text) in parts.items():
        sub[name] = commands.add_parser(name, help=text, description=text)
        sub[name].add_argument(
            "--store", type=Path, help="SQLite file (default: $ZEROCAST_HOME/records.db or ~/.zerocast/records.db)"
        )
        sub[name].set_defaults(command=function)
    sub["measure"].add_argument("--case", type=Path, nargs="+", required=True, help="JSON files, one case each")
    sub["compare"].add_argument("--records", type=Path, help="records file to compare instead of the store's reports")
    sub["compare"].add_argument(
        "--profile", type=Path, help="hardware profile of the machine that was measured (calibrate writes one)"
    )
    sub["export"].add_argument("--out", type=Path, required=True, help="file to write")
    sub["import"].add_argument("--records", type=Path, required=True, help="file to read")
    return parser


def _measure(args: argparse.Namespace) -> int:
    outcomes = measure_many([read_case(path) for path in args.case], Store(args.store), _tell)
    _write([_outcome(o) for o in outcomes])
    return 1 if any(o.status == "failed" for o in outcomes) else 0


def _compare(args: argparse.Namespace) -> int:
    measured = import_reports(args.records) if args.records else Store(args.store).reports()
    measured = [report for report in measured if report.origin != "predicted"]
    if not measured:
        raise InputError("there is no measured report to compare; allowed: a store or records file that holds some")
    profile = load_profile(args.profile) if args.profile else None
    comparison = compare([predict_for(report, profile) for report in measured], measured)
    _write(comparison.to_dict())
    return 1 if comparison.inexact else 0


def _export(args: argparse.Namespace) -> int:
    reports = Store(args.store).reports()
    export_reports(reports, args.out)
    _write({"written": len(reports)})
    return 0


def _import(args: argparse.Namespace) -> int:
    reports = import_reports(args.records)
    _write({"read": len(reports), "new": Store(args.store).add_many(reports)})
    return 0


def _outcome(outcome: Outcome) -> dict[str, Any]:
    report = outcome.report.to_dict() if outcome.report else None
    return {"case": outcome.case.label, "status": outcome.status, "error": outcome.error, "report": report}


def _tell(progress: Progress) -> None:
    what = (
        f"{progress.stage} {progress.step}: {format_seconds(progress.step_s)}"
        if progress.step_s is not None
        else progress.stage
    )
    place = f"{progress.index + 1}/{progress.n_cases}"
    sys.stderr.write(f"[{place}] {progress.case.label}: {what} {progress.message}".rstrip() + "\n")


def _write(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
