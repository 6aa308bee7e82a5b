"""The tables at the end of benchmarks/gpu.py, from the rows that its workers wrote."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def print_tables(rows: Sequence[Row]) -> None:
    """Print what was found as Markdown tables, then what failed."""
    by_section: dict[str, list[Row]] = {}
    for row in rows:
        by_section.setdefault(row["section"], []).append(row)
    for section, show in (("correct", _correct), ("operation", _operations), ("network", _networks)):
        if section in by_section:
            print("\n" + _table(show(by_section[section])))
    _print_kernel_sizes(by_section.get("network", []))
    if "failure" in by_section:
        print("\nfailed or left out:")
        for row in by_section["failure"]:
            print(f"- {row['part']}: {row['why']}")
    else:
        print("\nnothing failed")


def _correct(rows: Sequence[Row]) -> list[list[str]]:
    worst: dict[tuple[str, str], list[float]] = {}
    wrong: dict[tuple[str, str], int] = {}
    for row in rows:
        key = row["operation"], row["dtype"]
        kept = worst.setdefault(key, [0.0, 0.0])
        worst[key] = [max(kept[0], row["kernels_error"]), max(kept[1], row["plain_error"])]
        wrong[key] = wrong.get(key, 0) + (not row["good"])
    heading = ["operation", "dtype", "worst error", "of the plain form", "verdict"]
    body = [
        [*key, f"{ours:.1e}", f"{plain:.1e}", f"{wrong[key]} WRONG" if wrong[key] else "good"]
        for key, (ours, plain) in worst.items()
    ]
    return [heading, *body]


def _operations(rows: Sequence[Row]) -> list[list[str]]:
    heading = ["operation", "shape", "form", "forward ms", "of copy rate", "backward ms", "of copy rate"]
    body = [
        [row["name"], "x".join(map(str, row["shape"][1:])), row["form"], f"{row['forward_ms']:.3f}",
         f"{row['forward_share_of_copy']:.0%}", f"{row['backward_ms']:.3f}", f"{row['backward_share_of_copy']:.0%}"]
        for row in rows
    ]  # fmt: skip
    return [heading, *body]


def _networks(rows: Sequence[Row]) -> list[list[str]]:
    plain = {row["name"]: row for row in rows if row["form"] == "plain"}
    each = ["ms", "floor ms", "of copy rate", "against plain", "MiB"]
    heading = ["network", "form", *(f"forward {word}" for word in each), *(f"step {word}" for word in each)]
    return [[*heading, "step MiB of plain"], *(_network(row, plain.get(row["name"])) for row in rows)]


def _network(row: Row, plain: Row | None) -> list[str]:
    cells = [row["name"], row["form"]]
    for part in ("forward", "step"):
        time_ms = row[f"{part}_ms"]
        floor = row.get(f"{part}_floor_ms")
        # What the kernels move, over the time: the plain form moves more.
        moved = row.get(f"{part}_moved_ms") if row["form"].startswith("kernels") else None
        cells += [
            f"{time_ms:.2f}",
            "" if floor is None else f"{floor:.2f}",
            "" if moved is None else f"{moved / max(time_ms, 1e-9):.0%}",
            "" if plain is None or plain is row else f"{plain[f'{part}_ms'] / max(time_ms, 1e-9):.2f} x",
            f"{row[f'{part}_peak_mib']:.0f}",
        ]
    has_share = plain is not None and plain is not row and plain["step_peak_mib"]
    return [*cells, f"{row['step_peak_mib'] / plain['step_peak_mib']:.2f}" if plain and has_share else ""]


def _print_kernel_sizes(rows: Sequence[Row]) -> None:
    """Print the time of k = 5 over that of k = 3."""
    steps = {(row["name"], row["form"]): row["step_ms"] for row in rows}
    for (name, form), milliseconds in steps.items():
        small = steps.get((name.replace("k5", "k3"), form))
        if name.endswith("k5") and small:
            print(f"{name} {form}: a step takes {milliseconds / small:.2f} times that of k = 3")


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first one a heading, as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
