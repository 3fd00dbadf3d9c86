"""What each part of the fast recipe is worth: bits/dim with a part alone, and with it left out.

python -m benchmarks.ablation --dataset mnist --folder ablation

Trains a small model with main.py for every variant and seed, and prints the table in Markdown. A
run whose metrics file is in the folder is not repeated.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.curves import read_curve

MODEL = ["--n_layers", "3", "--n_heads", "3", "--batch_size", "8", "--precision", "auto"]
# Each part of the recipe: flags that add it to the paper's recipe, and that take it from the fast
# one.
PARTS = {
    "Muon and its rates": (
        ["--optimizer", "muon", "--muon_lr", "0.02", "--lr", "4e-3"],
        ["--optimizer", "adam", "--lr", "2e-3"],
    ),
    "neighbours": (["--neighbours"], ["--no-neighbours"]),
    "cosine schedule, warm-up": (
        ["--lr_schedule", "cosine", "--warmup", "100"],
        ["--lr_schedule", "constant", "--warmup", "0"],
    ),
    "no clipping": (["--clip_norm", "0"], ["--clip_norm", "1"]),
    "no dropout": (["--dropout", "0"], ["--dropout", "0.1"]),
}


def main():
    args = parse_arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    print("| | paper, plus | fast, minus |\n|---|---|---|")
    print(row("unchanged", args, [], []))
    for part, (added, removed) in PARTS.items():
        print(row(part, args, added, removed))


def row(part, args, added, removed):
    """A line of the table; both variants are trained with every seed."""
    alone = [train(args, f"{part} alone", ["--recipe", "paper", *added], s) for s in args.seeds]
    without = [train(args, f"no {part}", ["--recipe", "fast", *removed], s) for s in args.seeds]
    return f"| {part} | {describe(alone)} | {describe(without)} |"


def metrics_file(args, name, seed):
    return args.folder / f"{name.replace(' ', '-').replace(',', '')}.{seed}.jsonl"


def train(args, name, flags, seed):
    """The last test bits/dim of a run."""
    metrics = metrics_file(args, name, seed)
    if not metrics.exists():
        unfinished = metrics.with_suffix(".part")
        unfinished.unlink(missing_ok=True)
        command = [sys.executable, "main.py", "--dataset", args.dataset, *MODEL, *flags]
        command += ["--dataset_directory", args.dataset_directory, "--seed", str(seed)]
        command += ["--iterations", str(args.iterations), "--metrics_file", str(unfinished)]
        command += ["--evaluate_images", str(args.evaluate_images)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        unfinished.rename(metrics)
    return read_curve(metrics, "test")[-1]["bits_per_dim"]


def describe(values):
    """Mean and standard deviation."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mnist", help="as of main.py")
    parser.add_argument("--dataset_directory", default=".", help="as of main.py")
    parser.add_argument("--folder", type=Path, required=True, help="for the metrics files")
    parser.add_argument("--iterations", type=int, default=1600)
    parser.add_argument("--evaluate_images", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args()


if __name__ == "__main__":
    main()
