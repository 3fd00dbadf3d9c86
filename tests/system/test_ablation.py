"""benchmarks/ablation.py: which runs it does, and the table of them."""

import json
import re
from types import SimpleNamespace

from helpers import finish, records, start_module

from benchmarks.ablation import metrics_file, parts


def test_the_table_of_all_variants_and_a_run_that_was_missing(tmp_path):
    """The finished runs are not repeated; the missing one is trained."""
    args, names = SimpleNamespace(folder=tmp_path), []
    for part in ("unchanged", *parts(2)):
        names += [f"{part} alone", f"no {part}"]
    for number, name in enumerate(names):
        for seed in (3, 4):
            record = {"split": "test", "iteration": 2, "seconds": 1.0, "images": 32}
            record["bits_per_dim"] = number + seed / 10
            metrics_file(args, name, seed).write_text(json.dumps(record) + "\n")
    metrics_file(args, "no neighbours", 4).unlink()
    flags = ["--iterations", 2, "--evaluate_images", 4, "--seeds", 3, 4, "--folder", tmp_path]
    out, _ = finish(start_module("benchmarks.ablation", "--dataset", "digits", *flags))
    lines = out.splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == ["unchanged", *parts(2)]
    assert rows[0] == ["unchanged", "0.350 ± 0.071", "1.350 ± 0.071"]
    trained = records(metrics_file(args, "no neighbours", 4))[-1]
    assert trained["iteration"] == 2
    mean = (5.3 + trained["bits_per_dim"]) / 2
    assert re.fullmatch(rf"{mean:.3f} ± \d\.\d{{3}}", rows[2][2])


def test_every_variant_is_a_command_that_trains(call):
    """Flags that contradict each other would only be found after hours."""
    for added, removed in parts(1).values():
        for recipe, flags in (("paper", added), ("fast", removed)):
            result = call(
                "main.py", "--dataset", "digits", "--recipe", recipe, *flags,
                *("--n_layers", 1, "--n_heads", 1, "--iterations", 1, "--evaluate_images", 2),
            )  # fmt: skip
            assert result.status == 0, result.err
