"""``python -m validator``: measure and compare from a source tree, with nothing but the runtime installed.

The full command line is ``zerocast``; this one serves machines on which only the tree lies.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from estimator import catalog
from estimator.errors import InputError
from estimator.time.profile_file import load_profile
from estimator.units import format_seconds
from validator.calibrate import calibrate, describe, import_nccl_tests
from validator.campaign import run_campaign, summary_lines
from validator.compare import compare_sources
from validator.devices import check_devices, device_here, gpu_name, needs_gpu, without_gpu
from validator.doctor import diagnose, examine_gpu
from validator.kernels.campaign import kernel_summary_lines, plan_to_dict, run_kernel_campaign
from validator.kernels.files import KERNELS_ENDING, export_kernels, import_kernels, kernel_files
from validator.kernels.suite import KernelPlan, expand_kernels
from validator.kernels.summary import KernelRow, kernel_comparison, with_forecasts
from validator.measure.case import read_case
from validator.measure.runner import Outcome, Progress, measure_many
from validator.provenance import available_memory_bytes
from validator.store.database import Store
from validator.store.files import RecordFile, has_step_records, profile_path_of, publish, read_record_files
from validator.store.records import export_reports, import_reports
from validator.suites import Place, expand, load_suite, read_suite, suite_names


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a case failed, cannot be forecast or differs in an exact term, 2 bad input, 130 interrupted."""
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
    commands = parser.add_subparsers(
        required=True, metavar="doctor | campaign | calibrate | measure | compare | export | import | publish | fit"
    )
    text = "what this machine has, and whether every piece works on its GPU (about a minute)"
    commands.add_parser("doctor", help=text, description=text).set_defaults(command=_doctor)
    _add_campaign(commands)
    _add_calibrate(commands)
    parts = {
        "measure": (_measure, "run cases and record what they measure"),
        "compare": (_compare, "predict recorded runs again and print every error as JSON"),
        "export": (_export, "write the store's reports to a file (.jsonl, .csv, .parquet)"),
        "import": (_import, "add the reports of a file to the store"),
    }
    _add_publish(commands)
    _add_fit(commands)
    sub = {}
    for name, (function, text) in parts.items():
        sub[name] = commands.add_parser(name, help=text, description=text)
        sub[name].add_argument(
            "--store", type=Path, help="SQLite file (default: $ZEROCAST_HOME/records.db or ~/.zerocast/records.db)"
        )
        sub[name].set_defaults(command=function)
    sub["measure"].add_argument("--case", type=Path, nargs="+", required=True, help="JSON files, one case each")
    sub["measure"].add_argument(
        "--nvme-folder", metavar="DIR", help="for the files of cases with offload optimizer:nvme that name no folder"
    )
    sub["compare"].add_argument(
        "--records",
        type=Path,
        help="records file, or folder of *.jsonl files, to compare instead of the store's reports",
    )
    sub["compare"].add_argument(
        "--profile",
        type=Path,
        help="hardware profile of the machine that was measured (default: the one beside a records file)",
    )
    sub["export"].add_argument("--out", type=Path, required=True, help="file to write")
    sub["import"].add_argument("--records", type=Path, required=True, help="file to read")
    for name in ("export", "import"):
        sub[name].add_argument("--kernels", action="store_true", help="records of kernels instead of steps")
    return parser


def _add_campaign(commands: Any) -> None:
    text = "measure as much of a suite as fits into a time budget; the same command goes on from there"
    sub = commands.add_parser("campaign", help=text, description=text)
    sub.add_argument("--suite", required=True, metavar="NAME|FILE", help=f"{', '.join(suite_names())}, or a TOML file")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the records")
    sub.add_argument("--budget-s", type=float, default=540.0, help="seconds in which to finish (default: 540)")
    sub.add_argument("--profile", type=Path, help="hardware profile of this machine; what gpu = 'cpu' needs")
    sub.add_argument("--gpu", help="catalogue name of this machine's GPU, where it cannot be told")
    sub.add_argument(
        "--nvme-folder",
        type=Path,
        metavar="DIR",
        help="for the files of jobs with offload optimizer:nvme (default: OUT/nvme)",
    )
    sub.add_argument("--dry-run", action="store_true", help="only print the cases in their order, as JSON")
    sub.set_defaults(command=_campaign)


def _add_calibrate(commands: Any) -> None:
    text = "measure this machine into a hardware profile"
    sub = commands.add_parser("calibrate", help=text, description=text)
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="profile to write")
    sub.add_argument("--device", default="cpu", metavar="cpu|cuda")
    sub.add_argument("--budget-s", type=float, help="about how long it takes (default: 90, with cuda 240)")
    sub.add_argument("--effort", default="full", metavar="quick|full", help="how many sizes to measure")
    sub.add_argument("--gpu", help="with cuda: the GPU's catalogue name, where it cannot be told")
    sub.add_argument("--nvme", type=Path, metavar="DIR", help="read and write files in this folder too")
    sub.add_argument(
        "--nccl-tests", type=Path, nargs="+", default=(), metavar="FILE", help="output of all_reduce_perf, ..."
    )
    sub.add_argument(
        "--import-only",
        action="store_true",
        help="measure nothing: put --nccl-tests into the profile at --out, or make one of the GPU's shipped curves",
    )
    sub.set_defaults(command=_calibrate)


def _add_fit(commands: Any) -> None:
    text = "fit the constants of frameworks on GPUs to published step times (estimator/catalog/stacks.json)"
    sub = commands.add_parser("fit", help=text, description=text)
    sub.add_argument("--runs", type=Path, metavar="FILE", help="CSV of published runs (default: those of this project)")
    sub.add_argument("--write", type=Path, metavar="FILE", required=True, help="JSON to write")
    sub.set_defaults(command=_fit)


def _fit(args: argparse.Namespace) -> int:
    from estimator.time.stack import write_stacks
    from validator.published import read_runs
    from validator.published.cases import TABLE, cases_of, fit_stacks

    cases = cases_of(read_runs(args.runs or TABLE))
    if not cases:
        raise InputError(f"runs is {str(args.runs or TABLE)!r}, of which no run has a step time and can be forecast")

    def say(what: str) -> None:
        sys.stderr.write(f"{what}\n")

    write_stacks(args.write, fit_stacks(cases, say))
    return 0


def _add_publish(commands: Any) -> None:
    text = "write records for the project's validator/records: named after GPU and torch, without the host's name"
    sub = commands.add_parser("publish", help=text, description=text)
    sub.add_argument(
        "--records", type=Path, nargs="+", required=True, help="records files or campaigns' folders, of one machine"
    )
    sub.add_argument("--profile", type=Path, help="its calibrated profile, to be laid beside them")
    sub.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write to")
    sub.set_defaults(command=_publish)


def _doctor(args: argparse.Namespace) -> int:
    """Exit status 1 where something does not work on the GPU."""
    works = True
    for finding in diagnose():
        _say(f"{finding.status:8}{finding.what}: {finding.detail}")
    for finding in examine_gpu():
        _say(f"{finding.status:8}{finding.what}: {finding.detail}")
        works &= finding.status != "missing"
    return 0 if works else 1


def _campaign(args: argparse.Namespace) -> int:
    name, data = read_suite(args.suite)
    if data.get("measure") == "kernels":
        return _kernel_campaign(args, expand_kernels(name, data))
    suite = load_suite(args.suite)
    profile = load_profile(args.profile) if args.profile else None
    wants_gpu = any(needs_gpu(c) for c in suite.combinations)
    device = device_here() if wants_gpu else None
    here = gpu_name(device, args.gpu) if wants_gpu else None
    local = profile if profile is not None and profile.gpu is not None and profile.gpu.arch == "cpu" else None
    if device is None and not args.dry_run and all(needs_gpu(c) for c in suite.combinations):
        raise InputError(
            f"suite {suite.name!r} needs a GPU and torch can use none here; allowed without one: suites of the backends "
            "fake and cpu, or --dry-run"
        )
    place = Place(
        gpu_here=here,
        free_host_bytes=available_memory_bytes(),
        local_gpu=local.gpu if local else None,
        local_host=local.host if local else None,
        nvme_folder=str(args.nvme_folder or args.out / "nvme"),
    )
    plan = expand(suite, place)
    if device is None and not args.dry_run:
        plan = without_gpu(plan)
    if not plan.cases and not plan.boundaries:
        reason = plan.left_out[0].reason if plan.left_out else "it lists none"
        raise InputError(f"suite {suite.name!r} has no case that can run: {reason}")
    if args.dry_run:
        _write(
            {
                "suite": suite.name,
                "about": suite.about,
                "cases": [case.label for case in plan.cases],
                "boundaries": [{"case": b.label, "forecast": b.forecast()} for b in plan.boundaries],
                "left_out": [{**item.settings, "reason": item.reason} for item in plan.left_out],
            }
        )
        return 0
    check_devices(plan, here)
    summary = run_campaign(plan, args.out, args.budget_s, _say, profile)
    for line in summary_lines(summary):
        _say(line)
    _write(asdict(summary))
    return 1 if summary.failed else 0


def _kernel_campaign(args: argparse.Namespace, plan: KernelPlan) -> int:
    if args.dry_run:
        _write(plan_to_dict(plan))
        return 0
    profile = load_profile(args.profile) if args.profile else None
    device = device_here() if plan.needs_gpu else None
    summary = run_kernel_campaign(plan, args.out, args.budget_s, _say, profile, device=device)
    for line in kernel_summary_lines(summary):
        _say(line)
    _write(asdict(summary))
    return 1 if summary.failed else 0


def _calibrate(args: argparse.Namespace) -> int:
    if args.import_only:
        if not args.nccl_tests:
            raise InputError("--import-only is given without --nccl-tests FILE")
        profile = import_nccl_tests(args.out, args.nccl_tests, args.gpu)
    else:
        gpu = None
        if args.device == "cuda":
            name = gpu_name(device_here(), args.gpu)
            gpu = catalog.gpu(name) if name else None
        profile = calibrate(
            device=args.device, budget_s=args.budget_s, out=args.out, effort=args.effort, gpu=gpu, nvme=args.nvme,
            nccl_tests=tuple(args.nccl_tests),
            on_progress=lambda what, done, planned: _say(f"[{done}/{planned}] {what}"),
        )  # fmt: skip
    for line in (*describe(profile), f"profile written to {args.out}"):
        _say(line)
    return 0


def _measure(args: argparse.Namespace) -> int:
    outcomes = measure_many([read_case(path, args.nvme_folder) for path in args.case], Store(args.store), _tell)
    _write([_outcome(o) for o in outcomes])
    return 1 if any(o.status == "failed" for o in outcomes) else 0


def _compare(args: argparse.Namespace) -> int:
    """Each file with the profile beside it, or all with the one given."""
    kernels = _kernel_records(args)
    files: list[RecordFile] = []
    left_out: list[Path] = []
    if not args.records:
        measured = tuple(report for report in Store(args.store).reports() if report.origin != "predicted")
        files = [RecordFile(path=Store(args.store).path, reports=measured, profile=None)]
    elif not kernels or has_step_records(args.records):
        files, left_out = read_record_files(args.records)
    if not any(file.reports for file in files) and not kernels:
        raise InputError("there is no measured report to compare; allowed: a store or records file that holds some")
    for path in left_out:
        if not path.name.endswith(KERNELS_ENDING):
            _say(f"not compared: {path.name}")
    given = load_profile(args.profile) if args.profile else None
    result = compare_sources([(file.reports, [p for p in (given or file.profile,) if p]) for file in files])
    for key, reason in result.refused.items():
        _say(f"no forecast for job {key}: {reason}")
    _write({**result.comparison.to_dict(), "refused": result.refused, "kernels": kernel_comparison(kernels)})
    return 1 if result.comparison.inexact or result.refused else 0


def _kernel_records(args: argparse.Namespace) -> list[KernelRow]:
    """Records of kernels beside their forecasts, each file's by the profile beside it."""
    given = load_profile(args.profile) if args.profile else None
    if not args.records:
        return with_forecasts(Store(args.store).kernels(), given)
    rows: list[KernelRow] = []
    for path in kernel_files(args.records):
        beside = profile_path_of(path)
        profile = given or (load_profile(beside) if beside.exists() else None)
        rows += with_forecasts(import_kernels(path), profile)
    return rows


def _publish(args: argparse.Namespace) -> int:
    _write({"written": [str(path) for path in publish(args.records, args.profile, args.to)]})
    return 0


def _export(args: argparse.Namespace) -> int:
    if args.kernels:
        kernels = Store(args.store).kernels()
        export_kernels(kernels, args.out)
        _write({"written": len(kernels)})
        return 0
    reports = Store(args.store).reports()
    export_reports(reports, args.out)
    _write({"written": len(reports)})
    return 0


def _import(args: argparse.Namespace) -> int:
    if args.kernels:
        kernels = import_kernels(args.records)
        _write({"read": len(kernels), "new": Store(args.store).add_kernels(kernels)})
        return 0
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


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _write(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
