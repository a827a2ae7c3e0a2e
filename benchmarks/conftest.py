"""Options of ``pytest benchmarks``; ``python -m benchmarks`` passes them."""

from __future__ import annotations

import pytest

from benchmarks.workloads import SETS, WORKLOADS, select


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("workloads")
    group.addoption("--set", choices=SETS, default="default", help="which workloads")
    group.addoption("--only", default="", help="their names instead, separated by commas")
    group.addoption(
        "--peers", default="", help="names of peers, separated by commas; default: all that cover a workload"
    )
    group.addoption("--seconds", type=float, default=2.0, help="for the rounds of a workload; large ones take longer")
    group.addoption("--one-thread", action="store_true", help="of PyTorch and pycse")
    group.addoption("--times-only", action="store_true", help="no memory")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "workload" in metafunc.fixturenames:
        only = metafunc.config.getoption("only")
        chosen = (
            [w for w in WORKLOADS if w.name in only.split(",")] if only else select(metafunc.config.getoption("set"))
        )
        metafunc.parametrize("workload", chosen, ids=lambda w: w.name)


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    return ("passed", "", "") if report.passed and report.when == "call" else None  # a workload prints its own line
