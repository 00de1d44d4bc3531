"""Print the results in a folder as Markdown: ``python -m benchmarks.gpu.tables DIR``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["tables"]

_Row = Mapping[str, Any]
_Column = Callable[[_Row], str]


def tables(folder: Path) -> str:
    """All tables of a run, with its conditions and what went wrong."""
    data = json.loads((folder / "results.json").read_text())
    lines = [*_conditions(data)]
    for name, part in data["parts"].items():
        lines += ["", f"## {name}", "", _status(part), ""]
        good = [row for row in part["rows"].values() if "error" not in row]
        lines += _TABLES[name](good, part)
        lines += [f"- {key}: {row['error']}" for key, row in part["rows"].items() if "error" in row]
    return "\n".join(lines)


def _conditions(data: Mapping[str, Any]) -> list[str]:
    about = data["about"]
    if "device" not in about:
        return [f"Nothing was measured. {about.get('error', '')}"]
    device = about["device"]
    if isinstance(device, dict):
        device = ", ".join(f"{k} {v}" for k, v in device.items())
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    code = f"commit {about['commit']}, source {about['source_sha256']}"
    precision = f"fp32 products: {about['float32_matmul_precision']}"
    return [f"{about['date']}; {device}; {versions}; {code}; {precision}."]


def _status(part: _Row) -> str:
    spent = f", {part['seconds']:.1f} s" if "seconds" in part else ""
    error = f" ({part['error']})" if "error" in part else ""
    left_out = f"; no time for {', '.join(part['left_out'])}" if "left_out" in part else ""
    clocks = "".join(
        f"; {key} {low:g} to {high:g}, median {middle:g}"
        for key, (low, middle, high) in part.get("clocks", {}).items()
    )
    return f"Status: {part['status']}{spent}{error}{left_out}{clocks}"


def _table(rows: Iterable[_Row], columns: Mapping[str, _Column]) -> list[str]:
    """A table; what a row does not have is left empty."""
    head = ["| " + " | ".join(columns) + " |", "|---|" + "--:|" * (len(columns) - 1)]

    def cell(row: _Row, column: _Column) -> str:
        try:
            return column(row)
        except (KeyError, TypeError, ZeroDivisionError):
            return ""

    return head + [
        "| " + " | ".join(cell(row, one) for one in columns.values()) + " |" for row in rows
    ]


_TIME: dict[str, _Column] = {
    "ms (range)": lambda r: f"{r['ms']:.3g} ({r['ms_min']:.3g}-{r['ms_max']:.3g})",
    "n": lambda r: f"{r['n']}",
    "Python ms": lambda r: (
        f"{r['host_ms']:.3g}" + " (not all in advance)" * (r.get("ahead") is False)
    ),
}


def _relative(rows: Iterable[_Row], first: str, *same: str) -> list[_Row]:
    """The rows with their speed relative to that of ``first``, where the ``same`` are equal."""
    rows = list(rows)

    def known(row: _Row) -> float | None:
        wanted = [first, *(row.get(key) for key in same)]
        found = [one for one in rows if [one.get(key) for key in ("form", *same)] == wanted]
        return found[0]["ms"] / row["ms"] if found and "ms" in found[0] and "ms" in row else None

    return [{**row, "speed": known(row)} for row in rows]


_SPEED: dict[str, _Column] = {"speed": lambda r: f"{r['speed']:.2f}x"}


def _gpt(rows: list[_Row], part: _Row) -> list[str]:
    return _table(
        _relative(rows, "full rank", "width"),
        {
            "form": lambda r: r["form"],
            "width": lambda r: f"{r['width']:,}",
            "FLOPs": lambda r: f"{r['flops_relative']:.3f}x",
            "tokens/s": lambda r: f"{r['tokens_per_second']:,.0f}",
            **_SPEED,
            "TFLOP/s": lambda r: f"{r['tflops']:.1f}",
            "peak GB": lambda r: f"{r['peak_bytes'] / 1e9:.2f}",
            **_TIME,
        },
    )


def _equal_time(rows: list[_Row], part: _Row) -> list[str]:
    text = part.get("text", {})
    lines = [", ".join(f"{k} {v}" for k, v in text.items()), ""] if text else []
    lines += _table(
        [{**row, "name": name} for name, row in part["rows"].items() if "error" not in row],
        {
            "run": lambda r: r["name"],
            "rate": lambda r: f"{r['rate']:g}",
            "seconds": lambda r: f"{r['seconds']:.1f}",
            "of these cuts": lambda r: f"{r['cut_seconds']:.2f} ({len(r['cuts'])})",
            "steps": lambda r: f"{r['steps']:,}",
            "expected": lambda r: f"{r['steps_expected']:,}",
            "PFLOP": lambda r: f"{r['flops'] / 1e15:.3g}",
            "FLOPs a step": lambda r: f"{r['flops_relative_per_step']:.3f}x",
            "peak GB": lambda r: f"{r['peak_bytes'] / 1e9:.2f}",
            "loss": lambda r: f"{r['loss']:.4f}",
        },
    )
    return [*lines, "", "Held-out loss after seconds (PFLOP):", "", *_curves(part["rows"])]


def _curves(rows: Mapping[str, _Row]) -> list[str]:
    """The points of each run."""
    number = max((len(row.get("points", [])) for row in rows.values()), default=0)

    def point(i: int) -> _Column:
        def text(row: _Row) -> str:
            if i >= len(row["points"]):
                return ""
            one = row["points"][i]
            return f"{one['loss']:.4f} at {one['seconds']:.1f} ({one['flops'] / 1e15:.3g})"

        return text

    columns: dict[str, _Column] = {"run": lambda r: r["name"]}
    columns |= {str(i): point(i) for i in range(number)}
    return _table([{**row, "name": name} for name, row in rows.items()], columns)


def _cuts(rows: list[_Row], part: _Row) -> list[str]:
    columns: dict[str, _Column] = {"function": lambda r: r["function"]}
    columns["size"] = lambda r: f"{r['rows']} x {r['columns']}"
    times = {key: column for key, column in _TIME.items() if key != "Python ms"}
    return _table(rows, columns | times)  # these functions wait for the device themselves


def _products(rows: list[_Row], part: _Row) -> list[str]:
    return _table(
        _relative(rows, "full", "width", "tokens"),
        {
            "form": lambda r: r["form"],
            "width": lambda r: f"{r['width']:,}",
            "tokens": lambda r: f"{r['tokens']:,}",
            **_SPEED,
            "TFLOP/s": lambda r: f"{r['flops'] / r['ms'] / 1e9:.1f}",
            **_TIME,
        },
    )


def _convolutions(rows: list[_Row], part: _Row) -> list[str]:
    return _table(
        _relative(rows, "plain", "channels"),
        {
            "form": lambda r: r["form"],
            "channels": lambda r: f"{r['channels']}",
            "pixels": lambda r: f"{r['pixels']} x {r['pixels']}",
            **_SPEED,
            "TFLOP/s": lambda r: f"{r['flops'] / r['ms'] / 1e9:.1f}",
            **_TIME,
        },
    )


def _resnet(rows: list[_Row], part: _Row) -> list[str]:
    return _table(
        [{**row, "name": name} for name, row in part["rows"].items() if "error" not in row],
        {
            "form": lambda r: r["name"],
            "batch": lambda r: f"{r['batch']:,}",
            "seconds an epoch": lambda r: ", ".join(f"{s:.3g}" for s in r["epoch_seconds"]),
            "Python ms a step": lambda r: f"{r['host_ms_a_step']:.3g}",
            "images": lambda r: f"{r['images']:,}",
            "GFLOP a step": lambda r: f"{r['flops_a_step'] / 1e9:.3g}",
            "trainable": lambda r: f"{r['trainable']:,}",
        },
    )


def _compiled(rows: list[_Row], part: _Row) -> list[str]:
    return _table(
        rows,
        {
            "form": lambda r: r["form"],
            "execution": lambda r: r["execution"],
            "width": lambda r: f"{r['width']:,}",
            "tokens/s": lambda r: f"{r['tokens_per_second']:,.0f}",
            "first step, s": lambda r: f"{r['first_step_seconds']:.1f}",
            **_TIME,
        },
    )


_TABLES: dict[str, Callable[[list[_Row], _Row], list[str]]] = {
    "gpt": _gpt,
    "equal_time": _equal_time,
    "cuts": _cuts,
    "products": _products,
    "convolutions": _convolutions,
    "resnet": _resnet,
    "compiled": _compiled,
}

if __name__ == "__main__":
    print(tables(Path(sys.argv[1])))
