"""Random command lines and damaged files: no traceback, no temporary file left, little memory.

1,660 cases. CI always draws the same ones."""

import contextlib
import io
import os
import pickle
import re
import resource
import shutil
import sys
from pathlib import Path

import imageio.v3
import numpy as np
import pytest
import standins
import torch
from helpers import SCRIPTS, TINY, load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import datasets
import utils
from cli import process


def cases(number):
    """The settings of a test with this number of cases."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=number, deadline=None, database=None, suppress_health_check=health)


def run(script, arguments):
    """Exit status and stderr of a script, called in this process."""
    err = io.TextIOWrapper(io.BytesIO())
    out = io.TextIOWrapper(io.BytesIO())
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        old, sys.argv = sys.argv, [script, *arguments]
        try:
            process.run(lambda: SCRIPTS[script](arguments))
        except SystemExit as exit:
            status = exit.code or 0
        finally:
            sys.argv = old
    err.seek(0)
    return status, err.read()


def peak_bytes():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@pytest.fixture
def bounded_memory():
    """Fails if the test raises the peak of memory by a gigabyte or more."""
    before = peak_bytes()
    yield
    assert peak_bytes() - before < 10**9


@pytest.fixture
def prepared(tiny_checkpoint, fast_checkpoint, tmp_path, monkeypatch):
    """Good and bad files for the command lines. Nothing is downloaded."""
    shutil.copy(tiny_checkpoint, tmp_path / "good.pth")
    shutil.copy(tiny_checkpoint, tmp_path / "w.7.pth")
    shutil.copy(fast_checkpoint, tmp_path / "fast.pth")
    (tmp_path / "bad.pth").write_bytes(b"PK\x03\x04 bad")
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "folder" / "train.npy", np.zeros((3, 4, 4), np.uint8))

    def no_network(name, directory, train):
        raise utils.UserError(f"{name} is not here")

    monkeypatch.setattr(datasets, "load_torchvision", no_network)
    monkeypatch.delenv("DISPLAY", raising=False)
    return tmp_path


def flags_of(script):
    """All flags of a script."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        SCRIPTS[script](["--help"])
    return sorted(set(re.findall(r"--[a-z_-]{2,}", out.getvalue())))


LETTERS = st.characters(exclude_characters="\0/", exclude_categories=["Cs"])
NUMBERS = ["0", "1", "2", "3", "-1", "1e3", "nan", "inf", "-inf", "", " 2", "0x1", "1_0", "9" * 30,
           "1e400", "2.5", "1e-320", "1000000000", str(2**62), str(2**63), "³", "٣"]  # fmt: skip
WORDS = [
    "good.pth", "fast.pth", "bad.pth", "w.{}.pth", "w.7.pth", "none.pth", "none.{}.pth", "folder",
    "folder/x", "good.pth/x", "/proc/x", ".", "-", "{}", "{}{}", "{", "}", "{0}", "{1}", "{x}",
    "{0.x}", "{:d}", "{:999999999}", "{!r}", "new/{}.{}.png", "{}.gif", "x.png", "x.pdf",
    "digits", "imagenet64", "cpu", "cuda", "meta", "bf16", "full", "reformer",
    "causal-linear", "native", "adam", "8,8", "64,1", "8,8,3", "0-3",
    "muon", "cosine", "fast", "paper",
    "5-2", "1,,2", "3*", "0-1000000000", "2*1000000000000", "0-2,1*2", "", "a" * 300,
]  # fmt: skip
INDICES = st.from_regex(r"[0-9,*\- ]{0,9}", fullmatch=True)
VALUES = st.sampled_from(NUMBERS) | st.sampled_from(WORDS) | INDICES | st.text(LETTERS, max_size=6)


# Values from 100 up to these are valid, but would take too long.
SLOW = {"--iterations": 2**62, "--accumulate": 10**8}


def takes_too_long(flag, value):
    try:
        return 100 < int(value) <= SLOW.get(flag, 0)
    except (TypeError, ValueError):
        return False


@st.composite
def command_lines(draw, script):
    """Up to four flags, most with a value."""
    arguments = []
    for flag in draw(st.lists(st.sampled_from(flags_of(script)), max_size=4)):
        value = draw(VALUES | st.none())
        if takes_too_long(flag, value):
            value = "2"
        arguments += [flag] if value is None else [flag, value]
    return arguments


def check_outcome(script, status, err, folder):
    assert status in (0, 2, process.YIELDED), err
    assert "Traceback" not in err
    if status == 2:
        assert err.split("\n")[-2].startswith(f"{script}: error: "), err
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@cases(400)
@given(arguments=command_lines("main.py"), saving=st.sampled_from([[], ["--save_to", "y.{}.pth"]]))
def test_command_lines_of_training(arguments, saving, prepared, bounded_memory):
    base = ["--dataset", "digits", *TINY, "--batch_size", "2", "--evaluate_images", "2"]
    if "--evaluate_only" not in arguments:  # which refuses both
        base += ["--iterations", "1", *saving]
    check_outcome("main.py", *run("main.py", base + arguments), prepared)


@cases(400)
@given(
    model=st.sampled_from(["good.pth", "fast.pth"] * 3 + ["w.{}.pth", "-", *WORDS[:14]]),
    arguments=command_lines("prediction.py"),
)
def test_command_lines_of_prediction(model, arguments, prepared, bounded_memory):
    base = [model, "--dataset", "digits", "--offset", "60"]
    check_outcome("prediction.py", *run("prediction.py", base + arguments), prepared)


EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.binary(max_size=12), st.integers(0, 40)), min_size=1, max_size=4
)


def edited(content, edits):
    """The bytes after edits (where, from 0 to 1; new bytes; how many old ones they replace)."""
    for where, new, length in edits:
        at = int(where * len(content))
        content = content[:at] + new + content[at + length :]
    return content


def is_refused(load):
    """Whether `load()` raises a `UserError`, of one line. Other exceptions pass through."""
    message = ""
    try:
        load()
    except utils.UserError as error:
        message = str(error)
    assert "\n" not in message
    return message != ""


ENTRIES = ["model_state", "iteration", "config", "dataset", "optimizer_state", "format_version"]
ENTRIES += ["seed", "first_byte_counts", "state", "param_groups", "params", "name"]
ENTRIES += ["image_shape", "n_layers", "n_heads", "predictor.weight", "pos_embedding.pe", "length"]
ENTRIES += ["settings", "lr", "recipe", "warmup", "neighbours", "width", "channels"]
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
PLAIN |= st.sampled_from([torch.zeros(3), torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64)])
KEYS = st.sampled_from(ENTRIES) | st.integers() | st.text(max_size=2)
NESTED = st.recursive(
    PLAIN,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS, x, max_size=4),
    max_leaves=8,
)


@cases(100)
@given(entries=st.dictionaries(st.sampled_from(ENTRIES), NESTED, max_size=4), whole=st.booleans())
def test_checkpoints_of_anything(entries, whole, prepared, bounded_memory):
    """Random entries, alone or in place of those of a good checkpoint."""
    good = load(prepared / "good.pth") if whole else {}
    torch.save({**good, **entries}, prepared / "x.pth")
    for script, arguments in {
        "prediction.py": ["x.pth", "--offset", "60"],
        "main.py": ["--continue_from", "x.pth", "--dataset", "digits", "--evaluate_only"],
    }.items():
        check_outcome(script, *run(script, [*arguments, "--batch_size", "300"]), prepared)


def array_bytes(array, **kwargs):
    file = io.BytesIO()
    np.save(file, array, **kwargs)
    return file.getvalue()


def image_bytes(extension):
    images = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    return imageio.v3.imwrite("<bytes>", images, extension=extension)


FILES = {
    "train.npy": array_bytes(np.zeros((3, 4, 5), np.uint8)),
    "train/0.png": image_bytes(".png"),
    "train/1.jpg": image_bytes(".jpg"),
    "train/2.gif": image_bytes(".gif"),
}


@pytest.mark.parametrize("name", FILES)
@cases(100)
@given(content=st.binary(max_size=100) | st.none(), edits=EDITS)
def test_data_files(name, content, edits, tmp_path, bounded_memory):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(edited(FILES[name], edits) if content is None else content)

    def load_data():
        data = datasets.load(str(tmp_path), ".", True)
        assert data.images.dtype == torch.uint8
        assert data.images.dim() == 2
        data.first_byte_counts()

    is_refused(load_data)


SHAPES = st.from_regex(r"-?[0-9]{1,19}(, [0-9]{1,3}){0,3}", fullmatch=True)
HEADERS = st.builds(
    "{{'descr': '{}', 'fortran_order': {}, 'shape': ({}), }}".format,
    st.sampled_from(["|u1", "<u1", "<f8", "|O", "|V9", "x", "<u1,<u1", "|S0", "<M8"]),
    st.booleans(),
    SHAPES,
)


@cases(200)
@given(header=HEADERS | st.text(LETTERS, max_size=30))
def test_headers_of_arrays(header, tmp_path, bounded_memory):
    header = header.encode()
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(600)
    (tmp_path / "train.npy").write_bytes(content)
    is_refused(lambda: datasets.load(str(tmp_path), ".", True).first_byte_counts())


@cases(100)
@given(edits=EDITS, names=st.sets(st.sampled_from(["images", "labels"]), min_size=1))
def test_files_of_mnist(edits, names, tmp_path, server, monkeypatch, bounded_memory):
    """With damaged headers, which no checksum protects."""
    standins.serve_mnist(*server, monkeypatch)
    raw = tmp_path / "MNIST" / "raw"
    if not raw.exists():
        standins.write_mnist(tmp_path)
    files = {name: content for name, content in standins.mnist_files().items() if "train" in name}
    for name, content in files.items():
        head = edited(content[:24], edits) + content[24:]
        (raw / name).write_bytes(head if name.split("-")[1] in names else content)
    is_refused(lambda: datasets.load("mnist", tmp_path, True).first_byte_counts())


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@cases(60)
@given(edits=EDITS, hostile=st.booleans())
def test_files_of_cifar10(edits, hostile, tmp_path, server, monkeypatch, bounded_memory):
    """They are pickles, which could execute code: only those with the right checksum are read."""
    standins.serve_cifar(*server, monkeypatch)
    for path in server[0].iterdir():
        path.unlink()
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir(exist_ok=True)
    for name, content in standins.cifar_files().items():
        (folder / name).write_bytes(content)
    good = (folder / "data_batch_3").read_bytes()
    bad = pickle.dumps(Hostile()) if hostile else edited(good, edits)
    unchanged = bad == good
    (folder / "data_batch_3").write_bytes(bad)
    assert is_refused(lambda: datasets.load("cifar10", tmp_path, True)) or unchanged
    assert not Path("executed").exists()
