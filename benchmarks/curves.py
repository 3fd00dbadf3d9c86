"""Bits/dim against training images and minutes, from metrics files of main.py: of the training
batches (pale) and of the test or validation images.

python -m benchmarks.curves digits.jsonl --plot curves.png
"""

import json
import os
from bisect import insort
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command_line import OUTPUTS, parse
from cli.flags import flag, switch
from cli.process import run
from engine.figures import new_figure, save_figure
from options import NOT_NEGATIVE, Number
from utils import UserError

FILES = {"nargs": "+", "metavar": "FILE", "type": os.path.expanduser}
SPLITS = ("train", "validation", "test")
FLAGS = {
    "split": flag("draw these records only (default: all)", SPLITS),
    "log": switch("logarithmic images and minutes"),
    "plot": OUTPUTS["plot"],
}
# What the curves are drawn from.
NUMBERS = {
    "iteration": Number(int, 0),
    "start": Number(int, 0),
    "images": Number(int, 0),
    "seconds": NOT_NEGATIVE,
    "bits_per_dim": NOT_NEGATIVE,
}


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, FLAGS, argv, files={**FILES, "help": "--metrics_file of main.py"})
    splits = [args.split] if args.split else SPLITS
    curves = {
        (name, split): points
        for name, file in zip(short_names(args.files), args.files, strict=True)
        for split, points in read_curves(file, splits).items()
    }
    for (name, split), points in curves.items():
        last = points[-1]
        print(f"{name}: {split} {last['bits_per_dim']:.4f} bits/dim after {last['images']:,} "
              f"images, {last['seconds'] / 60:.1f} minutes")  # fmt: skip
    if args.plot:
        plot(curves, args)


def short_names(files: list[str]) -> list[str]:
    """The names without folder and ending, if they differ."""
    stems = [Path(file).stem for file in files]
    return stems if len(set(stems)) == len(stems) else files


def read_curve(path: str | Path, split: str) -> list[dict]:
    """The records of one split by `read_curves`."""
    return read_curves(path, [split])[split]


def read_curves(path: str | Path, splits: Sequence[str]) -> dict[str, list[dict]]:
    """The records of a metrics file, {split: records} for those of the `splits` that it has, with
    the images and seconds since the start.

    Every start of main.py appends to the file and counts its seconds from 0. Of a run that
    continued, the curve is one history: what was written of iterations after its checkpoint is
    left out, and its seconds are added to those at the checkpoint. Of a run from scratch, nothing
    written before belongs to it. An evaluation alone belongs to the iteration that it evaluates.
    Raises `UserError` for a file of something else.
    """
    history, before, last = [], 0.0, None
    for record in read_records(path):
        if record.get("start") == record["iteration"]:
            trained = [r for r in history if r["iteration"] <= record["iteration"]] or [record]
            numbers = {name: trained[-1][name] for name in ("images", "seconds")}
            history = [r for r in history if place(r) != place(record)]
            insort(history, {**record, **numbers}, key=place)
            continue
        if last and is_new_start(record, last):
            start = record.get("start", record["iteration"])
            history = [r for r in history if r["iteration"] <= start and place(r) < place(record)]
            before = history[-1]["seconds"] if history else 0.0
        last = record
        history.append({**record, "seconds": before + record["seconds"]})
    curves = {split: [r for r in history if r["split"] == split] for split in splits}
    if not any(curves.values()):
        known = " or ".join(splits)
        raise UserError(f"{path} has no {known} records: give a --metrics_file of main.py")
    return {split: points for split, points in curves.items() if points}


def place(record: dict) -> tuple[int, bool]:
    """Ascends within a run, which is evaluated after the iteration."""
    return record["iteration"], record["split"] != "train"


def is_new_start(record: dict, last: dict) -> bool:
    """Whether another start of main.py than that of the last record wrote this one. (Records of
    older versions do not have the iteration `start` from which it continued.)"""
    continued = place(record) > place(last) and record["seconds"] >= last["seconds"]
    return not continued or record.get("start") != last.get("start")


def read_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file, without a line that was cut off when a run was killed."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: give a --metrics_file of main.py") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not is_record(record):
            raise UserError(
                f"{path}, line {number}: {line[:60]} is not a record of main.py: a record has "
                f"split, {' or '.join(SPLITS)}, and the numbers {', '.join(NUMBERS)}"
            )
        yield record


def is_record(record: Any) -> bool:
    if not isinstance(record, dict) or record.get("split") not in SPLITS:
        return False
    values = {"start": 0, **record}
    return all(number.accepts(values.get(name)) for name, number in NUMBERS.items())


def plot(curves, args):
    """Two panels: bits/dim against images, and against minutes; each run has a colour."""
    figure = new_figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colours = {name: f"C{n}" for n, name in enumerate(dict.fromkeys(name for name, _ in curves))}
    for (name, split), points in curves.items():
        style = {"color": colours[name], "label": name if args.split else f"{name}, {split}"}
        style["alpha"] = 0.4 if split == "train" else 1
        style["marker"] = "o" if len(points) == 1 else ""  # one point is no line
        bits = [point["bits_per_dim"] for point in points]
        panels[0].plot([point["images"] for point in points], bits, **style)
        panels[1].plot([point["seconds"] / 60 for point in points], bits, **style)
    label = f"{args.split} bits/dim" if args.split else "bits/dim"
    panels[0].set(xlabel="training images seen", ylabel=label)
    panels[1].set(xlabel="minutes")
    for panel in panels:
        panel.grid(alpha=0.3)
        if args.log:
            panel.set_xscale("log")
    panels[1].legend()
    save_figure(figure, args.plot)


if __name__ == "__main__":
    run(main)
