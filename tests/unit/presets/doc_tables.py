"""Writes the tables of docs/presets.md anew: python -m tests.unit.presets.doc_tables."""

from __future__ import annotations

from pathlib import Path

from trainyard.presets.known import NOT_YET, presets

PAGE = Path(__file__).parents[3] / "docs" / "presets.md"
BEGIN = "<!-- table: python -m tests.unit.presets.doc_tables -->\n"
END = "<!-- end of the table -->\n"


def tables() -> str:
    """Return the tables of presets and of what has none yet."""
    lines = ["## What there is", "", "| preset | target | lane | instance | cores | SDK | source |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for preset in presets():
        for target in preset.spec.targets:
            sdk = target.neuron.sdk if target.neuron else ""
            lines.append(
                f"| `{preset.name}` | `{target.name}` | `{target.lane}` | {target.instance} | "
                f"{target.tensor_parallel_size} | {sdk} | {preset.source} |"
            )
    lines += ["", "## What is not supported yet", "", "| what | where | why | source |",
              "|---|---|---|---|"]  # fmt: skip
    lines += [f"| {each.what} | {each.where} | {each.reason} | {each.source} |" for each in NOT_YET]
    return "\n".join([*lines, ""])


def written(page: str) -> str:
    """Return the page with its tables made anew."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}{tables()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
