"""How often the judge is wrong and how fast it is right, beside other tools' rules.

    python tests/benchmarks/judge [--runs 5000] [--peer-runs 1000] [--cell TEXT] [--out FOLDER]

Simulated rollouts of one plan (4, 4 and 22 minutes at 10, 25 and 50 %), judged by one
specification; the clock starts with the candidate's first request. Traffic and cells are in
`parameters.yaml`, fixed before the judge was tuned; its digest is printed. The single look is a
test that knows the truth about noise and looks once, at the end. A bound is open where fewer runs
than asked for cannot tell; of cells at a margin of promotion, where the bound is 5 % and not 1 %,
1,000 runs are. All that takes about 80 minutes on 2 free cores, 300 runs 10 minutes;
`--cell` takes those whose names contain a text (and may be given more than once). With `--keep`,
what was measured before with the same traffic, specification, code, runs and seed is not measured
again. It exits with 1 if a bound fails.

One cell is measured a second time, with a plan of 120 minutes instead of 30: a release with little
traffic and no probes. JUDGE_BENCHMARK_MINUTES in the environment does that to any.

`docs/judge-figures.md` and `docs/images/judge.svg` are what `--out` writes.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.benchmarks.judge.fast import SPEC
from tests.benchmarks.judge.figures import Tally, measure, measure_peers, tuned_peers
from tests.benchmarks.judge.kept import Kept, judge_digest, peers_digest
from tests.benchmarks.judge.peers import PEERS
from tests.benchmarks.judge.report import LITTLE_TRAFFIC, LONG_MIN, bounds, drawing, page, table
from tests.benchmarks.judge.traffic import DIGEST, MINUTES, PLAN, Cell, cells

from trainyard.canonical import canonical_json


def main() -> int:
    """Print the table and what holds; write a page and a drawing if a folder is given.

    Returns 1 if a bound fails, 0 if all hold or are open.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=5000, help="rollouts a cell (5000)")
    parser.add_argument(
        "--promote-runs", type=int, default=1000, help="of cells at a margin of promotion (1000)"
    )
    parser.add_argument("--peer-runs", type=int, default=1000, help="of them, for the peers (1000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time (cores)")
    parser.add_argument("--cell", action="append", default=[], help="part of a cell's name")
    parser.add_argument("--list", action="store_true", help="print the names of all cells")
    parser.add_argument("--keep", type=Path, default=None, help="folder for each cell's figures")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the page and the drawing"
    )
    args = parser.parse_args()
    chosen = [c for c in cells() if not args.cell or any(part in c.name for part in args.cell)]
    if args.list:
        print("\n".join(cell.name for cell in chosen))
        return 0
    spec = hashlib.sha256(canonical_json(SPEC.model_dump(mode="json"))).hexdigest()[:12]
    steps = ", ".join(f"{weight} % for {seconds / 60:g} min" for weight, seconds in PLAN)
    measured = f"traffic {DIGEST}, specification {spec}, plan {steps}"
    head = (
        f"{measured}; {args.runs} runs a cell ({args.promote_runs} at margins of promotion, "
        f"{args.peer_runs} for the peers), seed {args.seed}"
    )
    print(head, flush=True)
    of = f"{measured}, seed {args.seed}, code {judge_digest()}"
    kept = Kept(args.keep, of)
    rules = Kept(args.keep, f"peers, {measured}, seed {args.seed}, code {peers_digest()}")
    tallies = _measure_all(args, chosen, kept, rules)
    long = None
    if MINUTES not in os.environ:
        kept = Kept(args.keep, f"{of}, {LONG_MIN} minutes")
        for cell in chosen:
            if cell.name == LITTLE_TRAFFIC:
                long = kept.tally(cell, args.runs) or _measure_long(cell, args.runs, args.seed)
                kept.keep_tally(long)
    checked = bounds(tallies, long)
    print("\n".join([head, "", table(tallies), ""]))
    print("\n".join(f"- {said}: {text}: {seen}" for text, seen, said in checked))
    if args.out is not None:
        (args.out / "images").mkdir(parents=True, exist_ok=True)
        (args.out / "judge-figures.md").write_text(page(tallies, long, head), encoding="utf-8")
        (args.out / "images" / "judge.svg").write_text(drawing(tallies), encoding="utf-8")
    return int(any(said == "FAILS" for _, _, said in checked))


def _measure_all(
    args: argparse.Namespace, chosen: Sequence[Cell], kept: Kept, rules: Kept
) -> list[Tally]:
    tallies: list[Tally] = []
    peers = (*PEERS, *tuned_peers(args.peer_runs, args.seed)) if args.peer_runs else ()
    runs = {
        cell.name: args.promote_runs if cell.truth == "promote_margin" else args.runs
        for cell in chosen
    }
    # What has no 5,000 runs comes last.
    ordered = sorted(chosen, key=lambda cell: -runs[cell.name])
    with ProcessPoolExecutor(args.jobs) as pool:
        known = {cell.name: kept.tally(cell, runs[cell.name]) for cell in ordered}
        asked = {cell.name: rules.peers(cell, args.peer_runs) for cell in ordered}
        measured = {
            cell.name: pool.submit(measure, cell, runs[cell.name], seed=args.seed)
            for cell in ordered
            if known[cell.name] is None
        }
        measured_peers = {
            cell.name: pool.submit(measure_peers, cell, args.peer_runs, seed=args.seed, peers=peers)
            for cell in ordered
            if asked[cell.name] is None
        }
        for cell in ordered:
            tally = known[cell.name] or measured[cell.name].result()
            kept.keep_tally(tally)
            tallies.append(tally)
            print(table([tally]).splitlines()[-1], flush=True)
        for tally in tallies:
            name = tally.cell.name
            tally.peers = (
                asked[name] if name not in measured_peers else measured_peers[name].result()
            )
            rules.keep_peers(tally.cell, args.peer_runs, tally.peers)
    place = {cell.name: number for number, cell in enumerate(chosen)}
    tallies.sort(key=lambda tally: place[tally.cell.name])
    return tallies


def _measure_long(cell: Cell, runs: int, seed: int) -> Tally:
    # The length of the plan is in every array of the simulation: another process has another.
    os.environ[MINUTES] = str(LONG_MIN)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, cell, runs, seed=seed).result()


if __name__ == "__main__":
    sys.exit(main())
