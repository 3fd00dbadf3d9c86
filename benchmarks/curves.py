"""Bits/dim against training images and minutes, from metrics files of main.py.

python -m benchmarks.curves paper.jsonl fast.jsonl --plot curves.png
"""

import argparse
import json
from pathlib import Path

from cli.process import run
from utils import UserError


def main():
    args = parse_arguments()
    curves = {
        name: read_curve(file, args.split)
        for name, file in zip(short_names(args.files), args.files, strict=True)
    }
    for name, points in curves.items():
        last = points[-1]
        print(f"{name}: {last['bits_per_dim']:.4f} bits/dim after {last['images']:,} images, "
              f"{last['seconds'] / 60:.1f} minutes")  # fmt: skip
    if args.plot:
        plot(curves, args)


def short_names(files):
    """The names without folder and ending, if they differ."""
    stems = [Path(file).stem for file in files]
    return stems if len(set(stems)) == len(stems) else files


def read_curve(name, split):
    """The records of one split of a metrics file, with the images and seconds since its start.

    A run that continues counts its seconds from 0 again and repeats the iterations since its
    checkpoint: the seconds are summed, and the records of later iterations that the earlier run has
    written are left out. So is a line that was cut off when a run was killed.
    """
    points, before, last = {}, 0.0, 0.0
    for line in Path(name).read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["seconds"] < last:  # the run was continued
            before += last
            points = {i: point for i, point in points.items() if i < record["iteration"]}
        last = record["seconds"]
        if record["split"] == split:
            points[record["iteration"]] = {**record, "seconds": before + last}
    if not points:
        raise UserError(f"{name} has no {split} records")
    return [points[iteration] for iteration in sorted(points)]


def plot(curves, args):
    """Two panels: bits/dim against images, and against minutes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for name, points in curves.items():
        bits = [point["bits_per_dim"] for point in points]
        panels[0].plot([point["images"] for point in points], bits, label=name)
        panels[1].plot([point["seconds"] / 60 for point in points], bits, label=name)
    panels[0].set_xlabel("training images seen")
    panels[1].set_xlabel("minutes")
    panels[0].set_ylabel(f"{args.split} bits/dim")
    for panel in panels:
        panel.grid(alpha=0.3)
        if args.log:
            panel.set_xscale("log")
    panels[1].legend()
    figure.savefig(args.plot, dpi=150)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="--metrics_file of main.py")
    parser.add_argument("--split", choices=["train", "test"], default="test")
    parser.add_argument("--log", action="store_true", help="logarithmic images and minutes")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
