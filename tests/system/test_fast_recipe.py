"""--recipe and the flags that it sets, through the command line."""

import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers import (
    DIGITS,
    TINY,
    assert_equal_weights,
    help_of,
    load,
    losses,
    records,
    require_library,
)

from engine.recipes import COLOUR, Settings
from models import ImageTransformer, ModelConfig

FAST = ["main.py", *DIGITS, "--recipe", "fast"]
NAMES = [field.name for field in fields(Settings) if field.name != "recipe"]


def train(succeed, *flags):
    """The settings and the config of a run of two iterations."""
    Path("w.pth").unlink(missing_ok=True)
    succeed("main.py", *DIGITS, "--iterations", 2, "--save_to", "w.pth", *flags)
    checkpoint = load("w.pth")
    return checkpoint["settings"], checkpoint["config"]


def test_paper_is_the_default(succeed):
    """With the settings and the model that there were before there were recipes."""
    settings, config = train(succeed)
    assert settings == {
        "recipe": "paper", "optimizer": "radam", "lr": 1e-4, "muon_lr": 0.02, "mean_rate": 0.03,
        "weight_decay": 0.01, "clip_norm": 1.0, "lr_schedule": "constant", "warmup": 0,
        "validation": 0,
    }  # fmt: skip
    assert (config["dropout"], config["neighbours"], config["width"]) == (0.1, False, 0)
    assert train(succeed, "--recipe", "paper") == (settings, config)


def test_fast_sets_what_the_help_says(call, succeed):
    """And nothing else."""
    settings, config = train(succeed, "--recipe", "fast", "--lr", 4e-3, "--muon_lr", 0.02)
    paper, plain = train(succeed, "--recipe", "paper")
    out = " ".join(call("main.py", "--help").out.split("options:")[1].split())
    out = re.sub(r",( fast:)? [^,(]+ for colour images", "", out)
    defaults = re.compile(r"\(default: ([^,)]+)(?:, fast: ([^,)]+))?\)")
    for name in NAMES:
        default, fast = defaults.search(out.rsplit(f" --{name} ", 1)[1]).groups()
        assert str(paper[name]) == default, name
        assert str(settings[name]) == (fast or default), name
    assert "(default: 0.1, fast: 0.0)" in help_of(call, "main.py", "dropout")
    text = help_of(call, "main.py", "recipe")
    assert "fast: Muon, a cosine schedule, no dropout, no clipping, --neighbours, and" in text
    assert "(default: paper)" in text
    changed = {name for name in config if config[name] != plain[name]}
    assert changed == {"dropout", "neighbours", "width", "channels"}
    assert (config["dropout"], config["neighbours"]) == (0.0, True)
    assert (config["width"], config["channels"]) == (8, 1)


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--optimizer", "adam"], "optimizer", "adam"),
        (["--no-neighbours"], "neighbours", False),
        (["--lr", 1e-3], "lr", 1e-3),
        (["--muon_lr", 0.5], "muon_lr", 0.5),
        (["--mean_rate", 0.5], "mean_rate", 0.5),
        (["--lr_schedule", "constant"], "lr_schedule", "constant"),
        (["--warmup", 0], "warmup", 0),
        (["--weight_decay", 0], "weight_decay", 0),
        (["--dropout", 0.1], "dropout", 0.1),
        (["--n_layers", 1], "n_layers", 1),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_each_part_can_be_overridden(succeed, flags, name, value):
    """And the others stay; a value of 0 is one, too."""
    fast = {k: v for part in train(succeed, "--recipe", "fast") for k, v in part.items()}
    own = {k: v for part in train(succeed, "--recipe", "fast", *flags) for k, v in part.items()}
    changed = {k for k in fast if own[k] != fast[k]}
    assert own[name] == value
    assert changed == {name} | ({"width", "channels"} if name == "neighbours" else set())


def test_every_part_of_the_fast_recipe_can_be_had_without_it(succeed):
    """The recipe is its flags: to the bit."""
    succeed(*FAST, "--iterations", 4, "--save_to", "recipe.pth")
    flags = ["--optimizer", "muon", "--lr", 6e-3, "--muon_lr", 0.03, "--lr_schedule", "cosine"]
    flags += ["--warmup", 100, "--clip_norm", 0, "--dropout", 0, "--neighbours"]
    succeed("main.py", *DIGITS, *flags, "--iterations", 4, "--save_to", "flags.pth")
    assert_equal_weights("recipe.pth", "flags.pth")


def test_the_rates_of_the_fast_recipe_fall_with_the_length_of_the_run(call):
    """Regression: those of long runs were too high. What a flag says stays as it is."""
    expected = {400: (0.006, 0.03), 1600: (0.004, 0.02), 13000: (0.0021, 0.011)}

    def rates_of(iterations, *flags):
        Path("w.pth").unlink(missing_ok=True)
        saving = ["--yield_frequency", 1, "--save_to", "w.pth"]
        assert call(*FAST, "--iterations", iterations, *saving, *flags).status == 75
        settings = load("w.pth")["settings"]
        return settings["lr"], settings["muon_lr"]

    for iterations, rates in expected.items():
        assert rates_of(iterations) == rates
    assert rates_of(10**6, "--lr", 0.5) == (0.5, 0.0029)


def test_a_run_continues_with_its_own_recipe_and_settings(call, succeed):
    """Without the flag, and with it; another is refused, by its name."""
    command = [*FAST, "--iterations", 8, "--lr", 1e-3, "--warmup", 3, "--save_to"]
    succeed(*command, "whole.pth")
    succeed(*command, "w.{}.pth", "--save_frequency", 4)
    again = ["main.py", *DIGITS, "--iterations", 8, "--continue_from", "w.4.pth", "--save_to"]
    succeed(*again, "next.pth")
    succeed(*again, "same.pth", "--recipe", "fast")
    for name in ("next.pth", "same.pth"):
        assert load(name)["settings"] == load("whole.pth")["settings"]
        assert_equal_weights(name, "whole.pth")
    for flags in (["--recipe", "paper"], ["--optimizer", "radam"], ["--no-neighbours"]):
        result = call(*again, "no.pth", *flags)
        assert result.status == 2
        assert f"{' '.join(flags)} contradicts the checkpoint" in result.err


def test_dropout_may_change_on_the_way(succeed):
    """Also from the recipe's none; the rest of the model is the checkpoint's."""
    succeed(*FAST, "--iterations", 1, "--save_to", "w.pth")
    more = ["main.py", *DIGITS, "--continue_from", "w.pth", "--save_to", "w.pth"]
    succeed(*more, "--iterations", 2, "--dropout", 0.2)
    config = load("w.pth")["config"]
    assert (config["dropout"], config["neighbours"]) == (0.2, True)
    succeed(*more, "--iterations", 3)
    assert load("w.pth")["config"] == config


def test_records_carry_rates_and_images(succeed, tmp_path):
    """Of every iteration, by the schedule; images are those of all processes and parts."""
    flags = ["--iterations", 8, "--warmup", 3, "--log_frequency", 1, "--accumulate", 2]
    succeed(*FAST, *flags, "--metrics_file", "m.jsonl", "--evaluate_frequency", 5)
    written = records("m.jsonl")
    assert all(record["images"] == 16 * record["iteration"] for record in written)
    assert {record["split"] for record in written} == {"train", "test"}
    for record in written:
        if record["split"] == "train":
            i = record["iteration"]
            factor = min(1, i / 3) * 0.5 * (1 + math.cos(math.pi * (i - 1) / 8))
            assert math.isclose(record["lr"], 6e-3 * factor)
            assert math.isclose(record["muon_lr"], 0.03 * factor)
    succeed("main.py", *DIGITS, "--iterations", 1, "--metrics_file", "paper.jsonl")
    first = records("paper.jsonl")[0]
    assert (first["lr"], first["images"]) == (1e-4, 8)
    assert "muon_lr" not in first


def test_rates_change_on_a_continued_run(succeed, tmp_path):
    """And stay changed when it continues once more."""
    constant = [*DIGITS, "--recipe", "fast", "--lr_schedule", "constant", "--warmup", 0]
    succeed("main.py", *constant, "--iterations", 1, "--save_to", "w.pth")
    more = ["main.py", *DIGITS, "--continue_from", "w.pth", "--save_to", "w.pth"]
    more += ["--metrics_file", "m.jsonl", "--log_frequency", 1]
    succeed(*more, "--iterations", 2, "--lr", 0.5, "--muon_lr", 0.25)
    succeed(*more, "--iterations", 3)
    written = [record for record in records("m.jsonl") if record["split"] == "train"]
    assert [(r["iteration"], r["lr"], r["muon_lr"]) for r in written] == [
        (2, 0.5, 0.25), (3, 0.5, 0.25),
    ]  # fmt: skip


def test_the_schedule_ends_with_the_run(succeed, tmp_path):
    """A run that continues over more iterations takes the rates of the longer schedule."""
    cosine = ["--lr_schedule", "cosine", "--metrics_file", "m.jsonl", "--log_frequency", 1]
    cosine += ["--save_to", "w.{}.pth", "--continue_from", "w.{}.pth"]
    succeed("main.py", *DIGITS, *cosine, "--iterations", 4)
    succeed("main.py", *DIGITS, *cosine, "--iterations", 8)
    rates = [r["lr"] for r in records("m.jsonl") if r["split"] == "train"]
    ends = [4] * 4 + [8] * 4
    for i, (rate, end) in enumerate(zip(rates, ends, strict=True)):
        assert math.isclose(rate, 1e-4 * 0.5 * (1 + math.cos(math.pi * i / end)))


def test_samples_of_a_model_with_neighbours(succeed, fast_checkpoint, colour_folder, tmp_path):
    """Grey and colour, by the recurrence, compiled and not, and by recomputing: the same images."""
    colour = ["--dataset", colour_folder, *TINY, "--batch_size", 4, "--recipe", "fast"]
    succeed("main.py", *colour, "--iterations", 3, "--save_to", "colour.pth")
    variants = (["--compile"], ["--no-compile"], ["--recompute", "--compile"])
    for checkpoint in (fast_checkpoint, "colour.pth"):
        images = []
        for i, flags in enumerate(variants):
            sample = ["prediction.py", checkpoint, "--index", "0-3", "--offset", 20, *flags]
            succeed(*sample, "--device", "cpu", "--save_image", f"{i}.{{}}.{{}}.png")
            images.append([(tmp_path / f"{i}.pred.{n}.png").read_bytes() for n in range(3)])
        assert images[0] == images[1] == images[2]


@pytest.mark.parametrize("compile", ["--compile", "--no-compile"])
def test_bfloat16_samples_of_a_model_with_neighbours(succeed, fast_checkpoint, compile):
    """Regression: the last inputs of a layer were kept in bfloat16, which the compiled sampler
    refused."""
    command = ["prediction.py", fast_checkpoint, "--recurrent", "--index", "0-4", "--offset", 0]
    succeed(*command, "--precision", "bf16", compile)


@pytest.mark.parametrize("attention_type", ["causal-linear", "full"])
def test_muon_trains_the_papers_architecture(succeed, attention_type):
    """The checkpoint has the weights of the original, which its loader reads strictly."""
    flags = ["--optimizer", "muon", "--attention_type", attention_type]
    train(succeed, *flags)
    checkpoint = load("w.pth")
    sizes = {"n_layers": 2, "n_heads": 2, "d_query": 8, "mixtures": 3}
    plain = ImageTransformer(ModelConfig(64, attention_type=attention_type, **sizes))
    assert list(plain.state_dict()) == list(checkpoint["model_state"])
    plain.load_state_dict(checkpoint["model_state"], strict=True)
    groups = checkpoint["optimizer_state"]["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    assert numbers == list(range(sum(1 for _ in plain.parameters())))


def test_bfloat16_trains_the_fast_recipe(succeed, tmp_path):
    """As float32 does, within a fiftieth."""
    bits = {}
    for precision in ("fp32", "bf16"):
        file = tmp_path / f"{precision}.jsonl"
        flags = ["--iterations", 6, "--warmup", 0, "--precision", precision]
        succeed(*FAST, *flags, "--metrics_file", file, "--log_frequency", 1)
        bits[precision] = losses(file).values()
    for a, b in zip(*bits.values(), strict=True):
        assert math.isclose(a, b, rel_tol=0.02)


def attention_of(checkpoint):
    return load(checkpoint)["config"]["attention_type"]


def test_colour_images_get_gated_attention(succeed, colour_folder):
    """By the fast recipe, unless another attention is given; a run that began with another one
    keeps it. Grey images have the paper's attention in either recipe."""
    colour = ["main.py", "--dataset", colour_folder, *TINY, "--batch_size", 4, "--iterations", 1]
    succeed(*colour, "--save_to", "paper.pth")
    succeed(*colour, "--recipe", "fast", "--save_to", "fast.pth")
    given = ["--attention_type", "causal-linear", "--save_to", "given.{}.pth"]
    succeed(*colour, "--recipe", "fast", *given)
    succeed(*colour, "--iterations", 2, "--continue_from", "given.1.pth", "--save_to", "more.pth")
    train(succeed, "--recipe", "fast")
    found = [attention_of(f"{name}.pth") for name in ("paper", "fast", "given.1", "more", "w")]
    assert found == ["causal-linear", "gated-linear", *["causal-linear"] * 3]


def test_colour_images_get_higher_rates(succeed, colour_folder):
    """By the fast recipe. A run that began before the means' rate was stored goes on as it was."""
    colour = ["main.py", "--dataset", colour_folder, *TINY, "--batch_size", 4, "--recipe", "fast"]
    succeed(*colour, "--iterations", 2, "--save_to", "w.pth")
    entries = load("w.pth")
    assert entries["settings"]["lr"] == 1.5 * COLOUR["fast"]["lr"]
    assert entries["settings"].pop("mean_rate") == COLOUR["fast"]["mean_rate"]
    torch.save(entries, "old.pth")
    for name, rate in (("w.pth", COLOUR["fast"]["mean_rate"]), ("old.pth", 0.03)):
        more = ["--iterations", 3, "--continue_from", name, "--save_to", "more.{}.pth"]
        succeed(*colour, *more)
        stored = load("more.3.pth")["settings"]
        assert (stored["lr"], stored["mean_rate"]) == (entries["settings"]["lr"], rate)
        Path("more.3.pth").unlink()


def test_the_library_trains_colour_images_by_the_fast_recipe(succeed, colour_folder):
    """It has no gated attention."""
    require_library()
    flags = ["--dataset", colour_folder, *TINY, "--batch_size", 4, "--iterations", 1]
    flags += ["--recipe", "fast", "--no-neighbours", "--backend", "fast-transformers"]
    succeed("main.py", *flags, "--save_to", "theirs.pth")
    assert attention_of("theirs.pth") == "causal-linear"
