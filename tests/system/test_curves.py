"""benchmarks/curves.py on the metrics files of runs."""

import json

import imageio.v3
import pytest
from helpers import DIGITS, finish, records, start_module

from benchmarks.curves import read_curve
from utils import UserError

TRAIN = ["main.py", *DIGITS, "--evaluate_frequency", 4, "--log_frequency", 1]


def curves(*arguments):
    """Run python -m benchmarks.curves; returns what it prints."""
    return finish(start_module("benchmarks.curves", *arguments))[0]


def write(path, *lines):
    """A metrics file of (iteration, split, seconds, bits/dim)."""
    names = "iteration", "split", "seconds", "bits_per_dim"
    path.write_text("".join(f"{json.dumps(dict(zip(names, x, strict=True)))}\n" for x in lines))
    return path


def test_a_figure_and_the_last_values(succeed, tmp_path):
    """Of two runs, one of which continued."""
    succeed(*TRAIN, "--recipe", "fast", "--iterations", 8, "--metrics_file", "fast.jsonl")
    parts = [
        "--metrics_file",
        "paper.jsonl",
        "--continue_from",
        "w.{}.pth",
        "--save_to",
        "w.{}.pth",
    ]
    for iterations in (8, 16):
        succeed(*TRAIN, *parts, "--iterations", iterations)
    out = curves("fast.jsonl", "paper.jsonl", "--plot", "curves.png").splitlines()
    for line, name, images in zip(out, ("fast", "paper"), (64, 128), strict=True):
        bits = records(f"{name}.jsonl")[-1]["bits_per_dim"]
        assert line.startswith(f"{name}: {bits:.4f} bits/dim after {images} images, ")
    image = imageio.v3.imread(tmp_path / "curves.png")
    assert image.shape[0] > 300
    assert image.std() > 1
    points = read_curve("paper.jsonl", "test")
    assert [(p["iteration"], p["images"]) for p in points] == [(i, 8 * i) for i in (4, 8, 12, 16)]
    seconds = [p["seconds"] for p in points]
    assert seconds == sorted(seconds)
    points = read_curve("paper.jsonl", "train")
    assert [p["iteration"] for p in points] == list(range(1, 17))
    assert curves("fast.jsonl", "--split", "train", "--log", "--plot", "log.pdf")
    assert (tmp_path / "log.pdf").exists()


def test_the_time_of_a_continued_run_adds_up(tmp_path):
    """Each start writes the seconds since its own beginning."""
    file = write(tmp_path / "m.jsonl", (5, "train", 1.0, 8), (10, "test", 2.0, 7),
                 (15, "train", 0.5, 6), (20, "test", 1.5, 5), (30, "test", 0.25, 4))  # fmt: skip
    points = read_curve(file, "test")
    assert [(p["iteration"], p["seconds"]) for p in points] == [(10, 2.0), (20, 3.5), (30, 3.75)]


def test_what_a_killed_run_did_again_is_counted_once(tmp_path):
    """Its later record stands; the curve goes forward only."""
    file = write(tmp_path / "m.jsonl", (10, "test", 2.0, 7), (20, "test", 4.0, 6.5),
                 (20, "test", 1.0, 6), (30, "test", 2.0, 5))  # fmt: skip
    points = read_curve(file, "test")
    assert [(p["iteration"], p["bits_per_dim"]) for p in points] == [(10, 7), (20, 6), (30, 5)]


def test_files_of_the_same_name_in_two_folders(tmp_path):
    """Regression: the second one had replaced the first."""
    for folder, bits in ("a", 3), ("b", 2):
        (tmp_path / folder).mkdir()
        record = {"split": "test", "iteration": 1, "images": 16, "seconds": 60}
        (tmp_path / folder / "run.jsonl").write_text(json.dumps({**record, "bits_per_dim": bits}))
    out = curves("a/run.jsonl", "b/run.jsonl")
    assert "a/run.jsonl: 3.0000 bits" in out
    assert "b/run.jsonl: 2.0000 bits" in out


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    """As a run leaves it that is killed while writing."""
    file = write(tmp_path / "m.jsonl", (10, "test", 2.0, 7), (20, "test", 1.0, 6))
    first, last = file.read_text().splitlines()
    file.write_text(f'{first}\n{{"iterat\n{last}\n')
    assert [p["iteration"] for p in read_curve(file, "test")] == [10, 20]


def test_a_file_without_records_of_the_split(tmp_path):
    file = write(tmp_path / "m.jsonl", (10, "train", 2.0, 7))
    with pytest.raises(UserError, match="has no test records"):
        read_curve(file, "test")


@pytest.mark.parametrize("tool", ["curves", "digit_quality"])
def test_a_missing_file_is_one_line(tool):
    """Regression: a traceback, and of digit_quality only after its classifier was trained."""
    out, err = finish(start_module(f"benchmarks.{tool}", "missing.pth"), status=2)
    assert err.count("\n") == 1
    assert f"{tool}.py: error: " in err
    assert "missing.pth" in err
    assert not out
