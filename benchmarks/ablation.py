"""What each part of the fast recipe is worth: bits/dim with a part alone, and with it left out.

python -m benchmarks.ablation --dataset mnist --folder ablation

Trains a small model with main.py for every variant and seed, and prints the table in Markdown. A
run whose metrics file is in the folder is not repeated.
"""

import statistics
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from benchmarks.command_line import parse
from benchmarks.curves import read_curve
from cli.flags import DATA, flag
from cli.process import run
from engine.recipes import choose_recipe
from files import check_writable
from options import COUNT, SEED
from utils import UserError

MAIN = Path(__file__).parent.parent / "main.py"
MODEL = ["--n_layers", "3", "--n_heads", "3", "--batch_size", "8", "--precision", "auto"]
FLAGS = {
    "dataset": flag("as of main.py", "NAME|FOLDER", "mnist"),
    "dataset_directory": DATA["dataset_directory"],
    "folder": flag("for the metrics files", "FOLDER", required=True),
    "iterations": flag("of each run", COUNT, 1600),
    "evaluate_images": flag("test images of each evaluation", COUNT, 1000),
    "seeds": flag("of the runs of each variant", SEED, [0, 1, 2], nargs="+"),
}


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, FLAGS, argv)
    check_writable(metrics_file(args, "unchanged alone", 0), "--folder")
    print("| | paper, plus | fast, minus |\n|---|---|---|")
    print(row("unchanged", args, [], []), flush=True)
    for part, (added, removed) in parts(args.iterations).items():
        print(row(part, args, added, removed), flush=True)


def parts(iterations: int) -> dict[str, tuple[list[str], list[str]]]:
    """Each part of the recipe for grey images: flags that add it to the paper's recipe, and that
    take it from the fast one."""
    recipe = choose_recipe({"recipe": "fast"}, {}, iterations)
    muon = ["--optimizer", "muon", "--muon_lr", str(recipe["muon_lr"]), "--lr", str(recipe["lr"])]
    return {
        "Muon and its rates": (muon, ["--optimizer", "adam", "--lr", "2e-3"]),
        "neighbours": (["--neighbours"], ["--no-neighbours"]),
        "cosine schedule, warm-up": (
            ["--lr_schedule", "cosine", "--warmup", "100"],
            ["--lr_schedule", "constant", "--warmup", "0"],
        ),
        "no clipping": (["--clip_norm", "0"], ["--clip_norm", "1"]),
        "no dropout": (["--dropout", "0"], ["--dropout", "0.1"]),
    }


def row(part: str, args: Namespace, added: list[str], removed: list[str]) -> str:
    """A line of the table; both variants are trained with every seed."""
    alone = [train(args, f"{part} alone", ["--recipe", "paper", *added], s) for s in args.seeds]
    without = [train(args, f"no {part}", ["--recipe", "fast", *removed], s) for s in args.seeds]
    return f"| {part} | {describe(alone)} | {describe(without)} |"


def metrics_file(args: Namespace, name: str, seed: int) -> Path:
    return Path(args.folder) / f"{name.replace(' ', '-').replace(',', '')}.{seed}.jsonl"


def train(args: Namespace, name: str, flags: list[str], seed: int) -> float:
    """The last test bits/dim of a run. Raises a `UserError` with the run's own message."""
    metrics = metrics_file(args, name, seed)
    if not metrics.exists():
        unfinished = metrics.with_suffix(".part")
        unfinished.unlink(missing_ok=True)
        flags = [*flags, "--seed", str(seed), "--metrics_file", str(unfinished)]
        for same in ("dataset", "dataset_directory", "iterations", "evaluate_images"):
            flags += [f"--{same}", str(getattr(args, same))]
        done = subprocess.run([sys.executable, MAIN, *MODEL, *flags], capture_output=True)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").splitlines() or ["no message"]
            raise UserError(f"the run {name}, seed {seed}, failed: {lines[-1]}")
        unfinished.rename(metrics)
    return read_curve(metrics, "test")[-1]["bits_per_dim"]


def describe(values: list[float]) -> str:
    """Mean and standard deviation."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    run(main)
