"""The tables of docs/performance.md from the kept figures: python -m benchmarks.performance."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.page import table, update

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/performance"
PAGE = ROOT / "docs/performance.md"
PEERS = {
    "block": {"textbook": "textbook", "se": "SE", "cbam": "CBAM", "eca": "ECA", "gc": "GC"},
    "head": {"textbook": "textbook", "eigh": "`eigh`"},
}
PARTS = {"blocks": "four blocks", "head": "head", "row_conv": "excitation"}
TARGETS = {
    "inference": {"gsop_resnet50_net1": 1.06, "gsop_resnet50_net2": 1.11},
    "training": {"gsop_resnet50_net1": 1.07, "gsop_resnet50_net2": 1.13},
    "compiled": {"gsop_resnet50_net1": 1.05, "gsop_resnet50_net2": 1.10},
}


def ratio(timing: Mapping[str, float], digits: int = 2) -> str:
    """Median, and quartiles."""
    return f"{timing['ratio']:.{digits}f}× ({timing['low']:.{digits}f}–{timing['high']:.{digits}f})"


def milliseconds(seconds: float, digits: int = 1) -> str:
    """Of seconds."""
    return f"{1e3 * seconds:.{digits}f}"


def megabytes(count: float) -> str:
    """Millions of bytes."""
    return f"{count / 1e6:.0f}"


def blocks_table(result: Mapping[str, Any]) -> str:
    """Blocks and heads: time of ours, and of others relative to it."""
    tables = []
    for kind, peers in PEERS.items():
        lines: list[list[str]] = []
        for row in (row for row in result["rows"] if row["kind"] == kind):
            others = row["alternatives"]
            ours, textbook = others["ours"], others["textbook"]
            line = [
                f"{row['channels']}×{row['size']}×{row['size']}",
                "forward and backward" if row["training"] else "inference",
                milliseconds(row["floor"]),
                milliseconds(ours["seconds"]),
                *(ratio(others[name]) for name in peers),
            ]
            if row["training"]:
                less = ours["saved_bytes"] / textbook["saved_bytes"]
                line += [f"{megabytes(ours['saved_bytes'])} MB, {less:.2f}× the textbook's"]
            else:
                line += [""]
            lines.append(line)
        header = ["map", "pass", "floor (ms)", "ours (ms)", *(f"{name} / ours" for name in peers.values())]
        tables.append(table([*header, "kept for the gradient"], lines))
    return "\n\n".join(tables)


def floors(blocks: Mapping[str, Any], training: bool) -> dict[str, float]:
    """Seconds that the blocks and the head of a network take at least."""
    rows = [row for row in blocks["rows"] if row["training"] == training]
    of_blocks = [row["floor"] for row in rows if row["kind"] == "block"]
    (of_head,) = (row["floor"] for row in rows if row["kind"] == "head")
    return {
        "gsop_resnet50_net1": sum(of_blocks),
        "gsop_resnet50_net2": sum(of_blocks[:3]) + of_head,
        "isqrt_resnet50": of_head,
    }


def models_table(result: Mapping[str, Any], blocks: Mapping[str, Any] | None = None) -> str:
    """Whole networks: time and memory relative to the twin, beside arithmetic and the floors of their blocks."""
    lines = []
    twin_macs, twin_params = (result["cost"]["twin"][key] for key in ("macs", "params"))
    for way, timings in result["ways"].items():
        floor_of = floors(blocks, "training" in way) if blocks else {}
        for name, timing in timings.items():
            cost, target = result["cost"][name], TARGETS.get(way, {}).get(name)
            least = floor_of.get(name)
            floor = f"{1 + least / timings['twin']['seconds']:.3f}×" if least else ""
            memory = ""
            if "peak_bytes" in timing:
                extra = 4 * max(0, cost["params"] - twin_params)
                relative = (timing["peak_bytes"] - extra) / timings["twin"]["peak_bytes"]
                memory = f"{megabytes(timing['peak_bytes'])} MB, {relative:.3f}× without the extra parameters'"
            lines.append(
                [
                    way,
                    name,
                    milliseconds(timing["seconds"]),
                    f"{cost['macs'] / twin_macs:.3f}×",
                    floor,
                    ratio(timing, 3),
                    f"≤ {target:.2f}×" if target else "",
                    memory,
                ]
            )
    header = ["way", "network", "ms", "arithmetic / twin's", "floor / twin's", "time / twin's", "aim", "peak memory"]
    return table(header, lines)


def bfloat16_table(exact: Mapping[str, Any], rounded: Mapping[str, Any]) -> str:
    """Time relative to the twin, with products in float32, and with their operands rounded to bfloat16."""
    lines = []
    for way, timings in exact["ways"].items():
        for name, timing in timings.items():
            times = [milliseconds(timing["seconds"]), ratio(timing), ratio(rounded["ways"][way][name])]
            lines.append([way, name, *times])
    return table(["way", "network", "ms", "time / twin's", 'time / twin\'s, with `"medium"`'], lines)


def pieces_table(exact: Mapping[str, Any], rounded: Mapping[str, Any] | None = None) -> str:
    """Each piece by itself; beside it, if given, with operands of float32 products rounded to bfloat16."""
    results = [exact, rounded] if rounded else [exact]
    header = ["of", "piece", "ms", 'ms, with `"medium"`'][: 2 + len(results)]
    rows = [
        [label, name, *(milliseconds(result[part][name], 2) for result in results)]
        for part, label in PARTS.items()
        for name in exact[part]
    ]
    return table(header, rows)


def about(result: Mapping[str, Any]) -> str:
    """The machine."""
    machine = result["machine"]
    versions = f"Python {machine['python']}, torch {machine['torch']}, timm {machine['timm']}"
    device = f"{machine['device']}, {machine['threads']} threads, {machine['capability']}"
    return f"{device}; {versions}; batch {result['batch']}."


def contents() -> dict[str, str]:
    """What the page says, by the names of its markers."""
    files = ("blocks", "models", "models_bfloat16", "models_bfloat16_medium", "pieces", "pieces_medium")
    blocks, models, exact, rounded, pieces, pieces_rounded = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in files
    )
    return {
        "blocks": blocks_table(blocks),
        "blocks' machine": about(blocks),
        "models": models_table(models, blocks),
        "models' machine": about(models),
        "bfloat16": bfloat16_table(exact, rounded),
        "pieces": pieces_table(pieces, pieces_rounded),
    }


def main() -> None:
    """Write the tables into the page."""
    PAGE.write_text(update(PAGE.read_text(encoding="utf-8"), contents()), encoding="utf-8")


if __name__ == "__main__":
    main()
