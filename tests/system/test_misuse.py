"""Wrong commands: status 2, one line that names the problem and a solution, nothing written."""

import os
import re

import numpy as np
import pytest
import torch
from helpers import TINY, help_of, load, require_library, start

import utils

DIGITS = ["--dataset", "digits", *TINY, "--iterations", "2"]


@pytest.fixture
def prepared(tmp_path, tiny_checkpoint, fast_checkpoint):
    """A folder with many kinds of damaged or wrong files, and two good checkpoints."""
    good = tiny_checkpoint.read_bytes()
    (tmp_path / "good.pth").write_bytes(good)
    (tmp_path / "fast.pth").write_bytes(fast_checkpoint.read_bytes())
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "half.pth").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"weights": 1}, tmp_path / "foreign.pth")
    checkpoint = load(tiny_checkpoint)
    torch.save({**checkpoint, "format_version": 99}, tmp_path / "future.pth")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "only.txt").write_text("no images")
    for name, array in {
        "float": np.zeros((2, 4, 4)),
        "colour": np.zeros((2, 8, 8, 3), np.uint8),
    }.items():
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            np.save(tmp_path / name / f"{split}.npy", array)
    (tmp_path / "mixed").mkdir()
    np.save(tmp_path / "mixed" / "train.npy", np.zeros((2, 4, 4), np.uint8))
    np.save(tmp_path / "mixed" / "test.npy", np.zeros((2, 4, 5), np.uint8))
    return tmp_path


# Arguments, and what the line must name.
TRAINING = [
    ("--n_layer 3", "did you mean --n_layers?"),
    ("--evaluate_every 3", "or --evaluate_frequency?"),
    ("--n_layers 0", "--n_layers"),
    ("--n_heads 3 --d_query 3 --dataset digits", "multiple of 4"),
    ("--mixtures 0", "--mixtures"),
    ("--dropout 1", "--dropout"),
    ("--lr 0", "--lr"),
    ("--lr nan", "nan"),
    ("--lr inf", "inf"),
    ("--weight_decay -1", "--weight_decay"),
    ("--optimizer sgd", "sgd"),
    ("--recipe slow", "slow"),
    ("--lr_schedule linear", "linear"),
    ("--warmup -1", "--warmup"),
    ("--warmup 1.5", "'1.5'"),
    ("--warmup nan", "'nan'"),
    ("--muon_lr 0", "--muon_lr"),
    ("--muon_lr inf", "inf"),
    ("--muon_lr 0.1", "--muon_lr has no effect with --optimizer radam"),
    ("--recipe fast --optimizer adam --muon_lr 0.1", "--muon_lr has no effect"),
    ("--attention_type linear", "causal-linear"),
    ("--attention_type reformer", "reformer"),
    ("--attention_dropout 0.2", "--attention_type full"),
    ("--softmax_temp 0.2", "--attention_type full"),
    ("--attention_type gated-linear --softmax_temp 0.2", "--attention_type full"),
    ("--attention_type gated-linear --bits 8", "reformer"),
    ("--bits 8", "reformer"),
    ("--unmasked_reformer", "reformer"),
    ("--iterations 0", "--iterations"),
    ("--log_frequency x", "'x'"),
    ("--keep_checkpoints 2", "--save_to"),
    ("--save_to folder", "folder"),
    ("--save_to /proc/no/w.{}.pth", "/proc/no"),
    ("--metrics_file /proc/no/m.jsonl", "/proc/no"),
    ("--device cuda:99", "cuda:99"),
    ("--precision fp16", "fp16"),
    ("--dataset nowhere", "nowhere"),
    ("--dataset folder", "folder"),
    ("--dataset float", "float64"),
    ("--dataset mixed", "4x5"),
    ("--dataset imagenet64 --dataset_directory folder", "train_data.npy"),
    ("--evaluate_only", "--continue_from"),
    ("--evaluate_only --continue_from w.{}.pth", "w.{}.pth"),
    ("--continue_from missing.pth", "missing.pth"),
    ("--continue_from foreign.pth", "foreign.pth"),
    ("--continue_from future.pth", "newer"),
    ("--continue_from folder", "folder"),
    ("--continue_from good.pth --n_layers 5", "5"),
    ("--continue_from good.pth --dataset mnist", "mnist"),
    ("--continue_from good.pth --dataset colour", "digits"),
    ("--continue_from good.pth --seed 9", "9"),
    ("--continue_from good.pth --optimizer adam", "adam"),
    ("--continue_from good.pth --muon_lr 0.1", "--muon_lr has no effect with --optimizer radam"),
    ("--continue_from good.pth --neighbours", "--neighbours contradicts"),
    ("--continue_from fast.pth --recipe paper", "--recipe paper contradicts"),
    ("--continue_from fast.pth --optimizer radam", "--optimizer radam contradicts"),
    # A flag is named as it is typed: the value of this one is False.
    ("--continue_from fast.pth --no-neighbours", "--no-neighbours contradicts"),
    ("--continue_from good.pth --bits 16", "--bits has no effect with --attention_type"),
    ("--save_frequency 5", "--save_frequency has no effect without --save_to"),
    ("--evaluate_only --continue_from good.pth --lr 0.1", "--lr has no effect"),
    ("--evaluate_only --continue_from good.pth --save_to w.pth", "--save_to has no effect"),
    ("--evaluate_only --continue_from good.pth --dataset mnist-10k", "28x28"),
    ("--export w.pth", "--export needs --continue_from"),
    ("--export w.pth --continue_from w.{}.pth", "w.{}.pth"),
    ("--export good.pth --continue_from good.pth", "replace the checkpoint"),
    ("--export folder --continue_from good.pth", "folder"),
    ("--export /proc/no/w.pth --continue_from good.pth", "/proc/no"),
    ("--export w.pth --continue_from good.pth --lr 1", "--lr has no effect with --export"),
    ("--export w.pth --continue_from good.pth --no-compile", "--no-compile has no effect"),
    ("--save_to new/", "new/ is a folder: add the name of a file"),
]

PREDICTION = [
    ("", "model"),
    ("missing.pth", "missing.pth"),
    ("empty.pth", "empty.pth"),
    ("half.pth", "half.pth"),
    ("text.pth", "text.pth"),
    ("foreign.pth", "foreign.pth"),
    ("folder", "folder"),
    ("good.pth extra", "extra"),
    ("good.pth --recurent", "--recurrent"),
    ("good.pth --recurrent --recompute", "--recompute"),
    ("good.pth --n_heads 4", "2"),
    ("good.pth --attention_type full", "causal-linear"),
    ("good.pth --neighbours", "--neighbours contradicts"),
    ("fast.pth --no-neighbours", "--no-neighbours contradicts"),
    ("good.pth --recipe fast", "--recipe"),
    ("good.pth --dataset mnist-10k", "28x28"),
    ("good.pth --dataset colour", "8x8x3"),
    ("good.pth --dataset mnist-10k --offset 0", "whose dataset is digits"),
    ("good.pth --index 5-2", "5-2"),
    ("good.pth --index -1", "-1"),
    ("good.pth --index 0-1000000000", "1000000"),
    ("good.pth --index 7*1000000000000", "1000000"),
    ("good.pth --index 300", "299"),
    ("good.pth --offset 65", "64"),
    ("good.pth --temperature 0", "--temperature"),
    ("good.pth --temperature nan", "nan"),
    ("good.pth --image_shape 28,28", "8x8"),
    ("good.pth --save_image out.png", "{}"),
    ("good.pth --save_image {}.png", "{}"),
    ("good.pth --save_image /proc/no/{}.{}.png", "/proc/no"),
    ("good.pth --save_gif one.gif --index 0-2", "{}"),
    ("good.pth --save_gif {}.{}.gif", "at most one {}"),
    ("good.pth --save_gif {}.png", ".gif"),
    ("good.pth --save_grid grid.xyz", ".xyz"),
    ("good.pth --save_grid folder/only.txt/grid.png", "folder/only.txt"),
    ("good.pth --save_grid all.png --index 0-250", "250"),
    ("good.pth --plot", "--save_grid"),
    ("good.pth --save_surprisal map.xyz", "--save_surprisal map.xyz"),
    ("good.pth --save_surprisal map.png --index 0-250", "250"),
    ("good.pth --save_surprisal map.png --offset 3", "--offset has no effect"),
    ("good.pth --save_surprisal map.png --recurrent", "--recurrent has no effect"),
    ("good.pth --save_surprisal map.png --temperature 1", "--temperature has no effect"),
    ("good.pth --save_surprisal map.png --save_grid g.png --offset 0", "another offset"),
    ("good.pth --force_cpu --device cuda", "cuda"),
    ("good.pth --load_pytorch", "--load_pytorch"),
    ("good.pth --precision half", "half"),
    ("- --dataset digits --n_heads 5 --d_query 5", "25"),
    ("- --dataset digits --load_pytorch", "--load_pytorch has no effect"),
    ("good.pth --offset 0 --training_set", "--training_set has no effect"),
    ("good.pth --gif_seconds 3", "--gif_seconds has no effect without --save_gif"),
    ("good.pth --save_gif x.gif --gif_seconds 0", "--gif_seconds"),
    ("good.pth --save_gif x.gif --gif_seconds 1e6", "at most 600"),
    # Softmax keeps every key and value: the compiled sampler has no such state.
    ("- --dataset digits --attention_type full --device cpu --compile", "--compile has"),
    ("- --dataset digits --attention_type full --device cpu --no-compile", "--no-compile has"),
]


def snapshot(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.mark.parametrize(
    ("script", "arguments", "names"),
    [("main.py", *case) for case in TRAINING] + [("prediction.py", *case) for case in PREDICTION],
)
def test_one_line_and_status_2(script, arguments, names, prepared, call, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    before = snapshot(prepared)
    result = call(script, *arguments.split())
    assert result.status == 2, result
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith(f"{script}: error: ")
    assert names in result.err
    assert "Traceback" not in result.err + result.out
    assert snapshot(prepared) == before


def test_yielding_needs_a_checkpoint(call, tmp_path):
    """Regression: it exited with 75, "start me again", but had saved nothing: a queue would have
    restarted it forever."""
    result = call("main.py", *DIGITS, "--yield_frequency", 1)
    assert result.status == 2
    assert "--yield_frequency needs --save_to" in result.err
    assert result.err.count("\n") == 1
    assert result.out == ""


@pytest.mark.parametrize("command", [["main.py"], ["prediction.py", "-"]], ids=lambda c: c[0])
@pytest.mark.parametrize(
    ("flag", "names"),
    [("--compile", "native"), ("--no-compile", "native"), ("--neighbours", "--no-neighbours")],
)
def test_what_the_other_backend_has_not_is_refused(command, flag, names, call):
    """Regression: --no-compile was silently ignored. The library has no short convolutions, so that
    a model with neighbours would be another one."""
    require_library()
    model = ["--dataset", "digits", *TINY, "--backend", "fast-transformers"]
    result = call(*command, *model, flag)
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert flag in result.err
    assert names in result.err


def test_tensorboard_missing(call, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    result = call("main.py", *DIGITS, "--log_dir", "board")
    assert result.status == 2
    assert "pip install tensorboard" in result.err


def test_no_compiler(call, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    result = call("main.py", *DIGITS, "--compile")
    assert result.status == 2
    assert "C++ compiler" in result.err


@pytest.mark.parametrize("script", ["main.py", "prediction.py"])
def test_help(call, script):
    result = call(script, "--help")
    assert result.status == 0
    assert "machine:" in result.out
    assert "None" not in result.out


@pytest.mark.parametrize("script", ["main.py", "prediction.py"])
def test_help_says_where_the_default_folder_comes_from(call, script):
    """Regression: it showed the current value of the environment variable as a fixed default."""
    entry = help_of(call, script, "dataset_directory")
    assert "(default: the environment variable DATASET_DIRECTORY, else ./data)" in entry


def test_help_names_the_parts_of_a_figure_as_they_are_drawn(call):
    """Regression: it named the real image before the completions; the figure has it after them."""
    assert "given part, completions, real image" in help_of(call, "prediction.py", "save_grid")


def test_help_shows_defaults_as_they_are_typed(call):
    """Regression: that of --index read [0], which cannot be typed; that of --seed was missing."""
    assert "(default: 0)" in help_of(call, "prediction.py", "index")
    assert "(default: 0)" in help_of(call, "prediction.py", "seed")
    assert "[0]" not in call("prediction.py", "--help").out


def test_the_environment_variable_of_the_data_sets(tmp_path):
    """It is the default of --dataset_directory."""
    environment = {**os.environ, "DATASET_DIRECTORY": str(tmp_path / "mine")}
    process = start("main.py", "--dataset", "imagenet64", env=environment)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert str(tmp_path / "mine" / "imagenet-64x64" / "train_data.npy") in err


def test_the_flags_of_the_original_keep_their_defaults(call):
    out = " ".join(call("main.py", "--help").out.split())
    for flag, default in {
        "n_layers": 4, "n_heads": 6, "d_query": 32, "dropout": 0.1, "attention_dropout": 0.1,
        "bits": 32, "rounds": 4, "chunk_size": 32, "optimizer": "radam", "lr": 0.0001,
        "weight_decay": 0.01, "mixtures": 10, "iterations": 100, "batch_size": 4,
        "save_frequency": 3000, "evaluate_frequency": 3000, "yield_frequency": 10**9,
    }.items():  # fmt: skip
        entry = out.rsplit(f" --{flag} ", 1)[1].split(" --")[0]
        assert re.search(rf"\(default: {default}[,)]", entry), entry


@pytest.mark.parametrize("command", [["main.py"], ["prediction.py", "-"]])
def test_bfloat16_where_it_is_slow_is_a_warning(command, call, monkeypatch, tmp_path):
    """And where the CPU has instructions for it there is none."""
    flags = tmp_path / "cpuinfo"
    flags.write_text("flags : fpu avx2 avx512f\n")
    monkeypatch.setattr(utils, "CPU_INFO", flags)
    model = [*command, "--dataset", "digits", *TINY, "--device", "cpu", "--precision", "bf16"]
    model += ["--iterations", 1, "--evaluate_images", 2] if command[0] == "main.py" else []
    result = call(*model)
    assert (result.status, result.err.count("no bfloat16 instructions")) == (0, 1)
    flags.write_text("flags : fpu avx512f avx512_bf16\n")
    result = call(*model)
    assert (result.status, "instructions" in result.err) == (0, False)
