"""benchmarks/curves.py on the metrics files of runs."""

import json

import imageio.v3
import pytest
from helpers import DIGITS, finish, records, start_module

from benchmarks import ablation, digit_quality, gpu, sampling_speed, training_speed
from benchmarks import curves as curves_module
from benchmarks.comparison import __main__ as comparison
from benchmarks.curves import read_curve
from cli import process
from utils import UserError

TRAIN = ["main.py", *DIGITS, "--evaluate_frequency", 4, "--log_frequency", 1]


@pytest.fixture
def benchmark(capsys, monkeypatch):
    """Call the main of a benchmark as its command line does; returns its status and stderr."""

    def run(main, *arguments):
        monkeypatch.setattr("sys.argv", ["benchmark"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            process.run(lambda: main(list(arguments)))
        return exit.value.code or 0, capsys.readouterr().err

    return run


def curves(*arguments):
    """Run python -m benchmarks.curves; returns what it prints."""
    return finish(start_module("benchmarks.curves", *arguments))[0]


def write(path, *lines, **more):
    """A metrics file of (iteration, split, seconds, bits/dim), and `more` values in every record;
    with a fifth value, the iteration from which main.py continued."""
    names = "iteration", "split", "seconds", "bits_per_dim", "start"
    records = [{"images": 8 * x[0], **dict(zip(names, x, strict=False)), **more} for x in lines]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
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
    names = ("fast", "train"), ("fast", "test"), ("paper", "train"), ("paper", "test")
    for line, (name, split), images in zip(out, names, (64, 64, 128, 128), strict=True):
        written = [r for r in records(f"{name}.jsonl") if r["split"] == split]
        bits = f"{written[-1]['bits_per_dim']:.4f} bits/dim"
        assert line.startswith(f"{name}: {split} {bits} after {images} images, ")
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


def blue(path):
    """The number of pixels of the first run's colour, or a paler one, in the left third of a
    figure, where no legend is."""
    pixels = imageio.v3.imread(path)[..., :3].astype(int)
    pixels = pixels[:, : pixels.shape[1] // 3]
    return (pixels[..., 2] - pixels[..., 0] > 40).sum()


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_single_point_is_drawn(split, tmp_path):
    """Regression: README's first training command, which evaluates once, gave two empty axes."""
    write(tmp_path / "m.jsonl", (10, split, 2.0, 7))
    assert curves("m.jsonl", "--plot", "c.png") == (
        f"m: {split} 7.0000 bits/dim after 80 images, 0.0 minutes\n"
    )
    assert blue("c.png") > 20


def test_the_training_curve_is_drawn_beside_a_single_evaluation(tmp_path):
    lines = [(10, "train", 1.0, 8), (20, "train", 2.0, 5), (20, "test", 2.5, 4)]
    write(tmp_path / "m.jsonl", *lines)
    curves("m.jsonl", "--plot", "both.png")
    curves("m.jsonl", "--split", "train", "--plot", "train.png")
    assert blue("both.png") > 300
    assert blue("train.png") > 300


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
    assert [p["seconds"] for p in points] == [2, 3, 4]


def test_a_run_that_continued_from_an_older_checkpoint(succeed, tmp_path):
    """Regression: the curve held what the earlier run had written of later iterations, and its
    minutes what that had taken."""
    run = [*TRAIN, "--metrics_file", "m.jsonl"]
    succeed(*run, "--iterations", 7, "--save_to", "w.{}.pth", "--save_frequency", 2)
    earlier = records("m.jsonl")
    succeed(*run, "--iterations", 6, "--continue_from", "w.2.pth")
    points = read_curve("m.jsonl", "train")
    assert [p["iteration"] for p in points] == [1, 2, 3, 4, 5, 6]
    assert [p["bits_per_dim"] for p in points[:2]] == [r["bits_per_dim"] for r in earlier[:2]]
    later = records("m.jsonl")[len(earlier) :]
    assert {record["start"] for record in later} == {2}
    assert points[2]["seconds"] == earlier[1]["seconds"] + later[0]["seconds"]


def test_the_history_of_several_starts(tmp_path):
    """Of one that takes longer to its first record than all before it, and of evaluations alone.

    Regression: an evaluation of an earlier checkpoint, with other batches, ended the curve there.
    """
    file = write(
        tmp_path / "m.jsonl",
        (5, "train", 1, 8, 0),
        (10, "train", 2, 7, 0),
        (15, "train", 9, 6, 10),
        (15, "test", 10, 6, 10),
        (15, "test", 0.5, 5, 15),
        (10, "test", 0.5, 6.5, 10),
    )
    assert [p["seconds"] for p in read_curve(file, "train")] == [1, 2, 11]
    points = [(p["iteration"], p["seconds"], p["bits_per_dim"]) for p in read_curve(file, "test")]
    assert points == [(10, 2, 6.5), (15, 12, 5)]


def test_a_separate_run_is_another_history(tmp_path):
    """Of two runs from scratch that wrote to one file, the curve is that of the second."""
    file = write(tmp_path / "m.jsonl", (5, "test", 1, 8, 0), (10, "test", 2, 7, 0),
                 (7, "test", 1.5, 6, 0), (14, "test", 3, 5, 0))  # fmt: skip
    points = read_curve(file, "test")
    assert [(p["iteration"], p["seconds"]) for p in points] == [(7, 1.5), (14, 3)]


def test_files_of_the_same_name_in_two_folders(tmp_path):
    """Regression: the second one had replaced the first."""
    for folder, bits in ("a", 3), ("b", 2):
        (tmp_path / folder).mkdir()
        record = {"split": "test", "iteration": 1, "images": 16, "seconds": 60}
        (tmp_path / folder / "run.jsonl").write_text(json.dumps({**record, "bits_per_dim": bits}))
    out = curves("a/run.jsonl", "b/run.jsonl")
    assert "a/run.jsonl: test 3.0000 bits" in out
    assert "b/run.jsonl: test 2.0000 bits" in out


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


RECORD = {"iteration": 1, "split": "test", "images": 8, "seconds": 1.0, "bits_per_dim": 3.0}
WRONG = {
    "a number": b"3\n",
    "a list": b"[1, 2]\n",
    "no bits/dim": b'{"iteration": 1, "split": "test", "seconds": 1.0}\n',
    "a text": json.dumps({**RECORD, "seconds": "1"}).encode(),
    "NaN": json.dumps({**RECORD, "bits_per_dim": float("nan")}).encode(),
    "a list as split": json.dumps({**RECORD, "split": []}).encode(),
    "a negative start": json.dumps({**RECORD, "start": -1}).encode(),
    "nesting": b"[" * 100_000,
    "UTF-16": json.dumps(RECORD).encode("utf-16"),
    "an image": b"\x89PNG\r\n\x1a\n\x00\xff\xfe",
    "empty": b"",
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG.keys())
def test_a_file_that_is_no_metrics_file(content, benchmark, tmp_path):
    """Regression: tracebacks, for example of a file that is not UTF-8."""
    (tmp_path / "wrong").write_bytes(content)
    status, err = benchmark(curves_module.main, "wrong", "--plot", "c.png")
    assert status == 2
    assert err.startswith("benchmark: error: wrong")
    assert err.count("\n") == 1
    assert not (tmp_path / "c.png").exists()


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (curves_module.main, ["."], "Is a directory"),
        (curves_module.main, ["m.jsonl", "--plot", "folder/"], "--plot folder/ cannot be written"),
        (curves_module.main, ["m.jsonl", "--plot", "c.xyz"], "--plot c.xyz"),
        (ablation.main, ["--folder", "m.jsonl"], "--folder m.jsonl"),
        (ablation.main, ["--folder", "f", "--iterations", "0"], "--iterations: 0 is out of range"),
        (ablation.main, ["--folder", "f", "--dataset", "none"], "--dataset none"),
        (digit_quality.main, ["w", "--n", "-1"], "--n: -1 is out of range"),
        (digit_quality.main, ["w", "--temperature", "nan"], "--temperature: nan is out of range"),
        (sampling_speed.main, ["--batches", "0"], "--batches: 0 is out of range"),
        (sampling_speed.main, ["--batches", "100000000"], "GB of memory"),
        (sampling_speed.main, ["--device", "tpu"], "--device tpu is unknown"),
        (sampling_speed.main, ["--json", "/dev/null"], "--json /dev/null cannot be written"),
        (training_speed.main, ["--batches", "10000000"], "GB of memory"),
        (training_speed.main, ["--plot", "m.jsonl/c.png"], "--plot m.jsonl/c.png cannot be"),
        (training_speed.main, ["--round", "3"], "did you mean --rounds?"),
        (gpu.main, ["--device", "cpu", "--json", "."], "--json . cannot be written"),
        (comparison.main, ["--batch", "1"], "--batch: 1 is out of range"),
        (comparison.main, ["--results", "none.json"], "none.json"),
        (comparison.main, ["--results", "."], "Is a directory"),
        (comparison.main, ["--results", "m.jsonl"], "is not a file that --json has written"),
    ],
)
def test_wrong_input_is_one_line(main, arguments, words, benchmark, tmp_path):
    """Regression: tracebacks, some of them after minutes."""
    write(tmp_path / "m.jsonl", (1, "test", 1.0, 3))
    status, err = benchmark(main, *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert words in err


def test_a_figure_needs_no_window_system(monkeypatch, benchmark, tmp_path):
    """Regression: an MPLBACKEND of a notebook was a traceback."""
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.delenv("DISPLAY", raising=False)
    write(tmp_path / "m.jsonl", (1, "test", 1.0, 3), (2, "test", 2.0, 2))
    assert benchmark(curves_module.main, "m.jsonl", "--plot", "a/c.PNG")[0] == 0
    assert imageio.v3.imread(tmp_path / "a" / "c.PNG").std() > 1


@pytest.mark.parametrize("tool", ["curves", "digit_quality"])
def test_a_missing_file_is_one_line(tool):
    """Regression: a traceback, and of digit_quality only after its classifier was trained."""
    out, err = finish(start_module(f"benchmarks.{tool}", "missing.pth"), status=2)
    assert err.count("\n") == 1
    assert f"{tool}.py: error: " in err
    assert "missing.pth" in err
    assert not out
