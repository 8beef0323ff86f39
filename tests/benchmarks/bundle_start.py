"""How much sooner a server is ready when it starts from its bundle than when it compiles.

    python tests/benchmarks/bundle_start.py [--times 3]

The demonstration model on lane `cpu`, with real vLLM: one kind of start finds its caches empty, as
a server finds them that nobody brought anything; the other finds a copy of the bundle, and may not
compile. They take turns. The bundle of so small a model is compiled in seconds; what matters most
is the ratio. It ends with an error if a start that had the bundle did not use it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.lane_world import LANE, LaneYard, compile_model, train

from trainyard.materialize import materialize_bundle

LONGEST_START_S = 600.0


def seconds_to_ready(made: LaneYard, cache_dir: Path, *, cache_only: bool) -> float:
    """Return the seconds from the start of a server's process to its first healthy answer.

    Raises:
        SystemExit: it was to use the bundle, and did not.
    """
    before = LANE.snapshot(cache_dir)
    began = time.perf_counter()
    process = made.start(cache_dir, cache_only=cache_only)
    try:
        process.wait_healthy(LONGEST_START_S)
        took = time.perf_counter() - began
        proof = made.proof(process, cache_dir, before)
    finally:
        process.stop(0)
    if cache_only and not proof.used_bundle:
        raise SystemExit(f"It did not start from its bundle: {proof.reason}")
    return took


def main() -> None:
    """Print one line a kind of start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args()
    compiling: list[float] = []
    restored: list[float] = []
    with tempfile.TemporaryDirectory(prefix="trainyard-bench-") as name:
        folder = Path(name)
        train(folder, {"r1": 3})
        made = compile_model(folder)
        for number in range(args.times):
            place = folder / f"start-{number}"
            empty = place / "empty" / "cache"
            empty.mkdir(parents=True)
            compiling.append(seconds_to_ready(made, empty, cache_only=False))
            cache_dir = materialize_bundle(made.store, made.bundle, place / "bundle" / "cache")
            restored.append(seconds_to_ready(made, cache_dir, cache_only=True))
            shutil.rmtree(place)
    usual = statistics.median(compiling)
    print("seconds from the start of the process to the first healthy answer")
    for what, took in (("empty caches", compiling), ("bundle", restored)):
        median = statistics.median(took)
        print(
            f"{what:12} median {median:6.2f} s, worst {max(took):6.2f} s of {len(took)}; "
            f"{median / usual:.2f} of a start that compiles"
        )


if __name__ == "__main__":
    main()
