"""python -m benchmarks: the tables, the check against the baseline, the documents that are made of them."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import baseline, docs, measure
from benchmarks.peers import NAMES, PEERS, too_large
from benchmarks.record import SCHEMA, where
from benchmarks.workloads import Workload, select
from pycse.training.errors import UserError

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
ATTEMPTS = 3  # at a workload: a regression has to show in all of them
SECONDS = 2.0  # of rounds a workload and attempt
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Glob = Annotated[str, typer.Option("--workload", metavar="GLOB", help="Only workloads whose names match.")]
File = Annotated[Path, typer.Option("--baseline", metavar="FILE", help="The baseline.")]


@app.command()
def run(
    full: Annotated[bool, typer.Option("--full", help="Every workload and peer; hours.")] = False,
    short: Annotated[bool, typer.Option("--short", help="The workloads of the check only.")] = False,
    workload: Glob = "*",
    peer: Annotated[
        list[str] | None, typer.Option(help="Only this peer beside pycse and its limits; repeatable.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Where the numbers go.")] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="For the rounds of a workload; large ones take longer.")
    ] = SECONDS,
) -> None:
    """Time everything beside its peers; print one table, write JSON and pictures. About 15 minutes on 2 cores."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    peers = known(peer or [])
    chosen = select("full" if full else "short" if short else "default", workload)
    chosen, skipped = fitting(chosen)
    console.print(f"{date.today()}  {measure.machine()}  commit {measure.commit()}\n")
    options = ["--peers", ",".join(peers), "--seconds", str(seconds)] + (["--set", "full"] if full else [])
    rows, failed = session(chosen, options)
    raised, failed_raised = session([w for w in chosen if w.allocators], [*options, "--times-only"], measure.RAISED)
    results = {
        "schema": SCHEMA,
        **where(),
        "rows": rows,
        "raised": raised,
        "skipped": skipped,
        "missing": {p.name: reason for p in PEERS if (reason := p.missing())},
        "import seconds": measure.import_seconds(),
    }
    everything = workload == "*" and not peers and not short
    if everything and measure.device() == "cpu":
        from benchmarks.profile import profile

        results["profile"] = profile()
    console.print(table(results))
    for name, reason in {**skipped, **results["missing"]}.items():
        console.print(f"left out: {name}: {reason}", highlight=False)
    path = json_file or (RESULTS / f"{measure.device()}-{date.today()}.json" if everything else None)
    if path:
        path.write_text(json.dumps(results, indent=1) + "\n")
        console.print(f"wrote {path}", highlight=False)
        if everything:
            from benchmarks.growth import pictures

            for picture in pictures(results, path.with_suffix("")):
                console.print(f"wrote {picture}", highlight=False)
    if failed or failed_raised:
        raise typer.Exit(1)


@app.command()
def check(workload: Glob = "*", file: File = baseline.FILE) -> None:
    """Fail where a ratio is worse than its baseline by more than the tolerance. Under 3 minutes. On another processor
    than the baseline's, worse ratios are reported only."""
    chosen = select("short", workload)
    known_ratios = baseline.load(file, [w.name for w in chosen])
    comparable = (here := measure.machine()).split(",")[0] == known_ratios["machine"].split(",")[0]
    attempts: dict[str, list[dict[str, float]]] = {}
    suspects = chosen
    for attempt in range(ATTEMPTS):
        if attempt:
            print(f"once more, before it is believed: {', '.join(w.name for w in suspects)}", flush=True)
        rows, failed = checked(suspects)
        if failed:
            raise typer.Exit(1)
        for name, row in rows.items():
            attempts.setdefault(name, []).append(row["ratios"])
        measured = {name: baseline.combined(ratios, max) for name, ratios in attempts.items()}
        worse = baseline.regressions(measured, known_ratios["ratios"])
        suspects = [w for w in chosen if any(r.workload == w.name for r in worse)]
        if not suspects:
            print(
                f"{len(measured)} workloads within {baseline.TOLERANCE:.0%} of {file} (commit {known_ratios['commit']})"
            )
            return
    for regression in worse:
        print(f"slower: {regression}", file=sys.stderr)
    if comparable:
        raise typer.Exit(1)
    print(f"the baseline is of another processor ({known_ratios['machine']}; this is {here}): not counted as a failure")


@app.command()
def compare(
    base: Annotated[str, typer.Option("--base", metavar="REF", help="The commit to stand beside; it is built once.")],
    workload: Glob = "*",
    seconds: Annotated[float, typer.Option(min=0, help="For the rounds of a workload.")] = SECONDS,
) -> None:
    """Time the working tree beside another commit, on the short set or the workloads named; parity is asked for
    first."""
    from benchmarks.compare import Side, compared, package_of

    chosen, skipped = fitting([w for w in select("short", workload) if w.timed and not w.huge])
    commit, site = package_of(base)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"{date.today()}  {measure.machine()}  {measure.commit()} beside {commit}", highlight=False)
    out = Table("workload", "parity", f"{commit} ms", "here ms", f"times as fast as {commit}", "spread")
    for column in out.columns[1:]:
        column.justify = "right"
    with Side(site) as other, Side(None) as here:
        for w in chosen:
            c = compared(other, here, w.name, seconds)
            if c.left_out:
                skipped[w.name] = c.left_out
                continue
            times = (f"{c.timings[side].best * 1e3:.3f}" for side in ("base", "new"))
            spread = max(t.spread for t in c.timings.values())
            out.add_row(w.name, f"{max(c.parity.values()):.0e}", *times, f"{c.ratio:.3f}", f"{spread:.0%}")
    console.print(out)
    for name, reason in skipped.items():
        console.print(f"left out: {name}: {reason}", highlight=False)
    if any("ParityError" in reason for reason in skipped.values()):
        raise typer.Exit(1)


@app.command()
def update(workload: Glob = "*", file: File = baseline.FILE) -> None:
    """Measure the short set and make it the baseline, with date, machine and commit."""
    chosen = select("short", workload)
    attempts: dict[str, list[dict[str, float]]] = {}
    for _ in range(ATTEMPTS):
        rows, failed = checked(chosen)
        if failed:
            raise typer.Exit(1)
        for name, row in rows.items():
            attempts.setdefault(name, []).append(row["ratios"])
    middle = {name: baseline.combined(ratios, statistics.median) for name, ratios in attempts.items()}
    baseline.save(file, where(), middle)
    print(f"wrote {file}")


@app.command(name="docs")
def write_docs(
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Default: the newest results.")
    ] = None,
) -> None:
    """Make the marked tables of README.md and docs/performance.md anew from the JSON."""
    for path in docs.write(json_file or docs.newest(RESULTS)):
        print(f"wrote {path}")


@app.command(name="profile")
def show_profile() -> None:
    """Where the time of one call goes, at B = 64 and N = 8192."""
    from benchmarks.profile import profile

    for N, stages in profile().items():
        print(docs.profile_table({"profile": {N: stages}}, N) + "\n")


def known(peers: list[str]) -> list[str]:
    for name in peers:
        if name not in NAMES:
            raise UserError(f"no peer is called {name!r}; there are {', '.join(NAMES[1:])}")
    return peers


def fitting(chosen: list[Workload]) -> tuple[list[Workload], dict[str, str]]:
    """The workloads that fit into memory, and why others do not run."""
    skipped = {w.name: reason for w in chosen if (reason := too_large(w))}
    if measure.device() == "cpu":
        skipped |= {w.name: "the pattern needs an NVIDIA GPU" for w in chosen if w.pattern == "2:4"}
    else:
        skipped |= {w.name: "a CPU kernel" for w in chosen if w.op.endswith("-rows")}
    return [w for w in chosen if w.name not in skipped], skipped


@app.command()
def steps(seconds: float = typer.Option(10.0, min=0.0, help="For the rounds of a row.")) -> None:
    """Training steps with sentence-transformers: pycse's losses beside its own."""
    from benchmarks import steps as training

    console = Console(width=None if sys.stdout.isatty() else 140)
    tunables = os.environ.get("GLIBC_TUNABLES", "as it comes")
    console.print(f"{date.today()}  {measure.machine()}  commit {measure.commit()}  GLIBC_TUNABLES: {tunables}")
    console.print(training.table(seconds))


@app.command()
def static(
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 3,
    length: Annotated[int, typer.Option("--steps", min=10, help="Of a run.")] = 100,
    eval_file: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Score, sentence1, sentence2 a line; repeatable.")
    ] = None,
) -> None:
    """A static table trained by pycse and by sentence-transformers, for as many steps and for as long: scores."""
    from benchmarks import static_quality

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(f"{date.today()}  {measure.machine()}  commit {measure.commit()}")
    console.print(static_quality.table(seeds, length, tuple(eval_file or ()), console.print))


@app.command()
def ranks(
    processes: Annotated[int, typer.Option(min=1, help="That train one model.")] = 2,
    rows: Annotated[int, typer.Option(min=2, help="Of each process' batch.")] = 512,
    threads: Annotated[int, typer.Option(min=0, help="Of each; 0: cores / processes.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Batches; each is stepped in every way, in turn.")] = 5,
) -> None:
    """Training steps over processes of this machine: what is the loss' communication, and waiting for others."""
    from benchmarks import ranks as training
    from pycse.training.names import bundled_model

    threads = threads or max(1, (os.cpu_count() or 1) // processes)
    measured = training.measured(processes, rows, threads, rounds, bundled_model(), training.texts())
    console = Console(width=None if sys.stdout.isatty() else 140)
    versions = ", ".join(f"{name} {version(name)}" for name in ("sentence-transformers", "transformers"))
    console.print(
        f"{date.today()}  {measured[0].machine} a process, {os.cpu_count()} cores, {versions}, commit "
        f"{measure.commit()}; all-MiniLM-L6-v2, {training.TOKENS} tokens a text at most, {rounds} rounds",
        highlight=False,
    )
    loss, gradient = measured[0].parity
    console.print(f"parity with one process: loss {loss:.0e}, gradient {gradient:.0e}", highlight=False)
    console.print(training.table(measured, rows))
    console.print(training.verdict(measured), highlight=False)


@app.command(name="scaling")
def write_scaling() -> None:
    """Make the marked tables of docs/scaling.md anew: a model's, and bytes counted on 1 to 4 processes."""
    from benchmarks import scaling

    if scaling.write():
        print(f"wrote {scaling.DOCUMENT}")


def checked(chosen: list[Workload]) -> tuple[dict[str, Any], bool]:
    """On one thread, in the processor time that it took: what else runs on the machine counts for little."""
    options = ["--peers", "eager", "--one-thread", "--times-only", "--seconds", str(SECONDS)]
    return session(chosen, [*options, "--benchmark-timer=time.process_time"])


def session(chosen: list[Workload], options: list[str], tunables: str = "") -> tuple[dict[str, Any], bool]:
    """pytest-benchmark on these workloads in a process of its own: their rows by name, and whether anything failed."""
    if not chosen:
        return {}, False
    # A process of its own even where a parallel test run calls it: pytest-benchmark does not measure beside others.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"GLIBC_TUNABLES": tunables} if tunables else {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmark.json"
        arguments = ["-q", "-s", "--no-header", "--tb=short", "--benchmark-quiet", f"--benchmark-json={file}"]
        arguments += [f"-pno:{plugin}" for plugin in ("cacheprovider", "warnings", "logging")]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "pytest", *arguments, "benchmarks/test_workloads.py"]
            + ["--only", ",".join(w.name for w in chosen), *options],
            cwd=ROOT,
            env=environment,
        )
        rows = {}
        if file.exists() and file.stat().st_size:
            rows = {b["extra_info"]["name"]: b["extra_info"] for b in json.loads(file.read_text())["benchmarks"]}
        return rows, done.returncode != 0


def table(results: dict[str, Any]) -> Table:
    """One row a workload; a * marks a peer that computes another loss."""
    out = Table(title="pycse beside its peers", show_lines=False)
    for column in ("workload", "parity", "median ms", "spread", "share of limit", "peak MB", "times as fast as"):
        out.add_column(column, justify="left" if column in ("workload", "times as fast as") else "right")
    for rows, suffix in ((results["rows"], ""), (results["raised"], " raised")):
        for name, row in rows.items():
            memory = row.get("memory", {}).get("pycse")
            peak = "" if memory is None else f"{memory / 1e6:.0f}"
            if "seconds" not in row:
                out.add_row(name, "", "", "", "", peak, "")
                continue
            share = row["share"]
            beside = [f"{peer}{'*' * (peer in row['differs'])} {ratio:.2f}" for peer, ratio in row["ratios"].items()]
            beside += [f"{peer} -" for peer in row["left out"]]
            out.add_row(
                name + suffix,
                f"{row['parity']['pycse']:.0e}" if "pycse" in row["parity"] else "",
                f"{row['seconds']['pycse'] * 1e3:.3f}",
                f"{row['spread']:.0%}",
                "" if share is None else f"{share:.3f}",
                peak,
                ", ".join(beside),
            )
    out.caption = "* another loss, or another gradient; - left out: not installed, needs a GPU or more memory"
    return out


def main() -> None:
    try:
        app(prog_name="python -m benchmarks")
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
