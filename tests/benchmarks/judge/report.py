"""The report of the judge's benchmark: table, bounds, page and drawing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from tests.benchmarks.judge.figures import PeerTally, Tally, clopper_pearson
from tests.benchmarks.judge.peers import KAYENTA

RUNS = {0.01: 5000, 0.02: 5000, 0.05: 1000}
"""Rollouts a cell by which a bound on wrong decisions is shown or is not."""
LEAST_RUNS = 5000
"""As `RUNS`, for bounds on right decisions."""
LONG_MIN = 120
"""Minutes that a release with little traffic and no probes may take."""
LITTLE_TRAFFIC = "no change; rate 1.0, minute_rho 0.6, pod_sd 0.03, minute_sd 0.1"
"""One request a second, all else as in the default world."""


def table(tallies: Iterable[Tally]) -> str:
    """Return the table, in Markdown."""
    tallies = list(tallies)
    names = list(dict.fromkeys(name for tally in tallies for name in tally.peers))
    rows = [
        [
            tally.cell.name,
            tally.cell.truth.replace("_", " "),
            str(tally.runs),
            *_figures(tally),
            *(_peer(tally.peers.get(name)) for name in names),
        ]
        for tally in tallies
    ]
    return _markdown(["cell", "truth", "runs", *_COLUMNS, *(f"{name} %" for name in names)], rows)


Bound = tuple[str, str, str]
"""What must hold, what was seen, and `holds`, `FAILS`, or `open`: too few runs to say."""


def bounds(tallies: Iterable[Tally], long: Tally | None = None) -> list[Bound]:
    """Return the bounds of the cells that were run; `long` is one with a plan of `LONG_MIN`."""
    rows = [row for tally in tallies for row in _bounds_of(tally)]
    if long is not None:
        name = f"{long.cell.name}; {LONG_MIN} minutes"
        rows.append((f"false rollback <= 1 %: {name}", *_at_most(long.harmed, long.runs, 0.01)))
        rows.append(_at_least(long, 0.85, name))
    return rows


def page(tallies: Sequence[Tally], long: Tally | None, head: str) -> str:
    """Return the page of the documentation that has all figures, in Markdown."""
    default = [tally for tally in tallies if tally.cell.name.endswith("; default")]
    other = [tally for tally in tallies if not tally.cell.name.endswith("; default")]
    said = [said for _, _, said in bounds(tallies, long)]
    parts = [
        "# Figures of the judge's benchmark",
        "Written by `python tests/benchmarks/judge --out FOLDER`; "
        "[what they mean](judge-benchmark.md).",
        f"{head[0].upper()}{head[1:]}. {len(tallies)} cells, {len(said)} bounds: "
        f"{said.count('holds')} hold, {said.count('open')} are open, {said.count('FAILS')} fail.",
        _worst(tallies),
        "## At 8 requests a second, 8 pods, default noise",
        *_by_truth(default),
        "## In other traffic",
        *_by_truth(other),
    ]
    if long is not None:
        row = [[long.cell.name, *_figures(long)]]
        parts += [f"## In {LONG_MIN} minutes", _markdown(["cell", *_COLUMNS], row)]
    asked = [tally for tally in (*default, *other) if tally.peers]
    if asked:
        names = list(dict.fromkeys(name for tally in asked for name in tally.peers))
        rows = [
            [
                _short(tally),
                f"{100 * tally.harmed / tally.runs:.1f}{_when(tally.harm_min, tally.exposed)}",
                *(_peer(tally.peers.get(name)) for name in names),
            ]
            for tally in asked
        ]
        parts += [
            "## Beside the peers",
            "Rolled back, % @ median minute (exposed requests: median, p97). "
            "What is not rolled back they promote.",
            _markdown(["cell", "judge", *names], rows),
        ]
    parts.append("![Shares rolled back, with intervals](images/judge.svg)")
    return "\n\n".join(parts) + "\n"


def drawing(tallies: Iterable[Tally]) -> str:
    """Return an SVG: the share rolled back, a line a cell of the default traffic, all rules."""
    tallies = [tally for tally in tallies if tally.cell.name.endswith("; default")]
    names = list(dict.fromkeys(name for tally in tallies for name in tally.peers))
    colours = ["#0b5fa5", "#c0392b", "#e67e22", "#8e44ad", "#16a085", "#7f8c8d", "#b7950b",
               "#2c3e50", "#d35400", "#27ae60"]  # fmt: skip
    left, width, line = 330, 560, 22
    top = 60 + 16 * ((len(names) + 1) // 3 + 1)
    height = top + line * len(tallies) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 40}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<text x="10" y="20" font-size="15">Releases rolled back within 30 minutes</text>',
    ]
    for number, name in enumerate(["judge", *names]):
        x, y = 10 + 290 * (number % 3), 40 + 16 * (number // 3)
        parts.append(f'<circle cx="{x + 5}" cy="{y - 4}" r="4" fill="{_of(colours, number)}"/>')
        parts.append(f'<text x="{x + 14}" y="{y}">{escape(name)}</text>')
    for percent in (0, 1, 5, 10, 25, 50, 75, 100):
        x = left + width * (percent / 100) ** 0.5
        parts.append(f'<path d="M{x:.1f} {top - 6}V{height - 30}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 14}" text-anchor="middle">{percent} %</text>')
    for row, tally in enumerate(tallies):
        y = top + line * row + 8
        parts.append(f'<text x="10" y="{y + 4}">{escape(_short(tally))}</text>')
        seen = [(tally.harmed, tally.runs)]
        seen += [(tally.peers[n].harmed, tally.peers[n].runs) for n in names if n in tally.peers]
        for number, (count, runs) in reversed(list(enumerate(seen))):
            colour = _of(colours, number)
            low, high = (left + width * share**0.5 for share in clopper_pearson(count, runs))
            at = left + width * (count / runs) ** 0.5
            parts.append(
                f'<path d="M{low:.1f} {y}H{high:.1f}" stroke="{colour}" stroke-opacity="0.5"/>'
                f'<circle cx="{at:.1f}" cy="{y}" r="4" fill="{colour}"/>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


_COLUMNS = (
    "rolled back %", "95 %", "delay, min: median, p97", "exposed: median, p97",
    "promoted %", "95 %", "at, min", "held %", "single look %",
)  # fmt: skip

_TRUTHS = {
    "good": "Releases without a change:",
    "harm_margin": "Exactly at a margin of harm:",
    "promote_margin": "Exactly at a margin of promotion:",
    "bad": "Worse than a margin:",
}


def _figures(tally: Tally) -> list[str]:
    """Return what `_COLUMNS` name."""
    delays = [tally.delay(0.5), tally.delay(0.97)]
    some = [f"{at:.1f}" if np.isfinite(at) else "never" for at in delays]
    return [
        *_share(tally.harmed, tally.runs),
        ", ".join(some) if np.isfinite(delays[0]) else "-",
        _quantiles(tally.exposed),
        *_share(tally.promoted, tally.runs),
        f"{np.median(tally.promote_min):.1f}" if tally.promote_min else "-",
        f"{100 * tally.undecided / tally.runs:.1f}",
        f"{100 * tally.oracle:.0f}",
    ]


def _by_truth(tallies: Sequence[Tally]) -> list[str]:
    parts: list[str] = []
    for truth, title in _TRUTHS.items():
        rows = [[_short(one), *_figures(one)] for one in tallies if one.cell.truth == truth]
        if rows:
            parts += [title, _markdown(["cell", *_COLUMNS], rows)]
    return parts


def _worst(tallies: Sequence[Tally]) -> str:
    """Return the highest share of wrong decisions, for each kind of release."""
    lines = []
    for truth, decision in (
        ("good", "rolled back"),
        ("harm_margin", "rolled back"),
        ("promote_margin", "promoted"),
    ):
        seen = [
            (one.promoted if decision == "promoted" else one.harmed, one.runs)
            for one in tallies
            if one.cell.truth == truth
        ]
        if seen:
            count, runs = max(seen, key=lambda each: each[0] / each[1])
            title = _TRUTHS[truth].rstrip(":")
            lines.append(f"- {title}: {decision} in at most {_both(count, runs)}")
    return "\n".join(lines)


def _short(tally: Tally) -> str:
    return tally.cell.name.removesuffix("; default").replace(" True", "")


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _of(colours: Sequence[str], number: int) -> str:
    return colours[number % len(colours)]


def _bounds_of(tally: Tally) -> list[Bound]:
    name, runs = tally.cell.name, tally.runs
    truth = tally.cell.truth
    rows: list[Bound] = []
    if truth in ("good", "harm_margin") and tally.cell.world.candidate_noise == 1:
        rows.append((f"false rollback <= 1 %: {name}", *_at_most(tally.harmed, runs, 0.01)))
    if truth == "promote_margin":
        rows.append((f"wrong promotion <= 5 %: {name}", *_at_most(tally.promoted, runs, 0.05)))
    if name.startswith("errors to 1 %"):
        rows.append((f"promoted <= 2 %: {name}", *_at_most(tally.promoted, runs, 0.02)))
    for start, text, seen, holds in (
        ("errors to 5 %", "median <= 5, p97 <= 9 min", _delays(tally), _fast(tally, 5, 9)),
        ("errors to 2 %", "median <= 12, p97 <= 30 min", _delays(tally), _fast(tally, 12, 30)),
        ("ttft +50 %", "median <= 7, p97 <= 12 min", _delays(tally), _fast(tally, 7, 12)),
        ("ttft +30 %; ", "median <= 13, p97 <= 30 min", _delays(tally), _fast(tally, 13, 30)),
        ("ttft +30 %; ", "within 10 points of a single look at 30 min",
         f"{100 * tally.harmed / runs:.1f} and {100 * tally.oracle:.1f} %",
         tally.harmed / runs >= tally.oracle - 0.1),
        ("5 % of requests", "p97 <= 20 min", _delays(tally), _fast(tally, 20, 20)),
        ("5 % of requests", "promoted <= 1 %", _both(tally.promoted, runs),
         tally.promoted <= 0.01 * runs),
    ):  # fmt: skip
        if name.startswith(start) and truth == "bad":
            rows.append((f"{name}: {text}", seen, _said(holds)))
    kayenta = [tally.peers[name] for name in KAYENTA if name in tally.peers]
    if name.startswith("2 % of requests") and kayenta:
        least = min(kayenta, key=lambda peer: peer.promoted / peer.runs)
        rows.append(
            (
                f"{name}: promoted less often than by Kayenta",
                f"{_both(tally.promoted, runs)} and {_both(least.promoted, least.runs)}",
                _said(tally.promoted * least.runs < least.promoted * runs),
            )
        )
    if name in ("no change; default", "no change; surge True"):
        rows.append(_at_least(tally, 0.97, name))
    if name == "no change; rate 1.0, probes 0.5":
        rows.append(_at_least(tally, 0.6, name))
    return rows


def _said(holds: bool) -> str:
    return "holds" if holds else "FAILS"


def _at_most(count: int, runs: int, bound: float) -> tuple[str, str]:
    """Return what was seen and whether the upper end of its interval is below a bound.

    With fewer runs than asked for, an interval on both sides of the bound says nothing.
    """
    low, high = clopper_pearson(count, runs)
    known = runs >= RUNS[bound] or low > bound
    return _both(count, runs), "holds" if high <= bound else "FAILS" if known else "open"


def _fast(tally: Tally, median: float, p97: float) -> bool:
    return tally.delay(0.5) <= median and tally.delay(0.97) <= p97


def _delays(tally: Tally) -> str:
    return f"{tally.delay(0.5):.1f} and {tally.delay(0.97):.1f} min"


def _at_least(tally: Tally, least: float, name: str) -> Bound:
    _, high = clopper_pearson(tally.promoted, tally.runs)
    known = tally.runs >= LEAST_RUNS or high < least
    said = "holds" if tally.promoted >= least * tally.runs else "FAILS" if known else "open"
    return f"promoted >= {100 * least:.0f} %: {name}", _both(tally.promoted, tally.runs), said


def _both(count: int, runs: int) -> str:
    share, interval = _share(count, runs)
    return f"{share} % ({interval})"


def _share(count: int, runs: int) -> tuple[str, str]:
    low, high = clopper_pearson(count, runs)
    return f"{100 * count / runs:.2f}", f"{100 * low:.2f}-{100 * high:.2f}"


def _quantiles(values: Sequence[int]) -> str:
    return f"{np.median(values):.0f}, {np.quantile(values, 0.97):.0f}" if values else "-"


def _peer(tally: PeerTally | None) -> str:
    if tally is None:
        return "-"
    return f"{100 * tally.harmed / tally.runs:.1f}{_when(tally.at_min, tally.exposed)}"


def _when(at_min: Sequence[float], exposed: Sequence[int]) -> str:
    return f" @{np.median(at_min):.0f} ({_quantiles(exposed)})" if at_min else ""
