"""What a benchmark takes from the command line, and what it prints and writes."""

import json
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from cli.flags import Parser, flag
from engine.figures import check_extension, new_figure, save_figure
from files import check_writable, write_atomically

OUTPUTS = {"json": flag("write the results", "FILE"), "plot": flag("draw the results", "FILE")}


def parse(
    description: str, flags: dict, argv: list[str] | None = None, **positional: dict
) -> Namespace:
    """The arguments of a benchmark, described by the first paragraph of its docstring. Raises a
    `UserError` unless --json and --plot can be written."""
    parser = Parser(description=description.partition("\n\n")[0])
    for name, settings in positional.items():
        parser.add_argument(name, **settings)
    parser.add_flags("options", flags)
    args = parser.parse_args(argv)
    for name in flags.keys() & OUTPUTS.keys():
        if path := getattr(args, name):
            check_writable(path, f"--{name}")
    if getattr(args, "plot", None):
        check_extension(args.plot, "--plot")
    return args


def write_json(results: Any, path: str) -> None:
    text = json.dumps(results, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def print_table(rows: list[dict], columns: dict[str, str]) -> None:
    """Print rows under columns, {key: format}."""
    cells = [list(columns)]
    for row in rows:
        values = [(row.get(key), form) for key, form in columns.items()]
        cells.append(["-" if value is None else format(value, form) for value, form in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def write_comparison(
    records: list[dict], args: Namespace, label: Callable[[dict], str], title: str
) -> None:
    """Write --json, and --plot: a bar for each record with a ratio to the library's time."""
    if args.json:
        write_json(records, args.json)
    if args.plot:
        bars = [record for record in records if record["ratio"]]
        figure = new_figure(figsize=(8, 0.3 * len(bars) + 1), layout="constrained")
        axes = figure.subplots()
        drawn = axes.barh([label(record) for record in bars], [bar["ratio"] for bar in bars])
        axes.bar_label(drawn, fmt="%.1f", padding=2)
        axes.axvline(1, color="black", linewidth=1)
        axes.invert_yaxis()
        axes.set_xlabel(title)
        save_figure(figure, args.plot)
