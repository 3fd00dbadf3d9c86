"""The fixtures that all tests share: calling the scripts, small data sets and checkpoints."""

import functools
import http.server
import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import standins
import torch
from helpers import DEVICE, DIGITS, ROOT, SCRIPTS, TINY, write_colour_images  # noqa: F401

import main
from cli import process
from utils import LOG


def pytest_runtest_setup(item):
    missing = DEVICE.type == "cuda" and not torch.cuda.is_available()
    if missing and item.get_closest_marker("cuda"):
        pytest.skip("needs a GPU")


@dataclass
class Result:
    status: int
    out: str
    err: str


@pytest.fixture
def call(capsys, monkeypatch):
    """Call a script in this process as its command line does: call("main.py", "--lr", 1)."""

    def run(script, *arguments):
        arguments = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            process.run(lambda: SCRIPTS[script](arguments))
        return Result(exit.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def succeed(call):
    """As `call`, for a command that must end with status 0."""

    def run(script, *arguments):
        result = call(script, *arguments)
        assert result.status == 0, result.err
        return result

    return run


def train_tiny(folder, iterations, *flags):
    """The checkpoint of a run on `digits`."""
    arguments = [*DIGITS, "--iterations", iterations, "--save_to", folder / "w.{}.pth", *flags]
    main.main([str(argument) for argument in arguments])
    return folder / f"w.{iterations}.pth"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A checkpoint of a tiny model on `digits`, 30 iterations old."""
    return train_tiny(tmp_path_factory.mktemp("tiny"), 30, "--lr", 1e-2)


@pytest.fixture(scope="session")
def fast_checkpoint(tmp_path_factory):
    """As `tiny_checkpoint`, of a run with --recipe fast, 10 iterations old."""
    return train_tiny(tmp_path_factory.mktemp("fast"), 10, "--recipe", "fast")


@pytest.fixture(scope="session")
def colour_folder(tmp_path_factory):
    """A data set of 12 + 4 colour images of 6 x 5, as train.npy and test.npy."""
    return write_colour_images(tmp_path_factory.mktemp("colour"), height=6, width=5)


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory):
    """Where MNIST is: DATASET_DIRECTORY or, in CI, ../shared/data if it is there; else a stand-in
    of the embedded digits, enlarged, in MNIST's file format."""
    folders = [os.getenv("DATASET_DIRECTORY", "")]
    if os.getenv("CI") == "true":
        folders.append(ROOT.parent / "shared" / "data")
    for folder in filter(None, folders):
        if (Path(folder) / "MNIST" / "raw" / "t10k-images-idx3-ubyte").exists():
            return Path(folder).resolve()
    return standins.write_mnist(tmp_path_factory.mktemp("data"))


@pytest.fixture
def server(tmp_path):
    """A folder, and the loopback address under which its files are served."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()


@pytest.fixture
def full_disk(tmp_path):
    """A folder on a file system of 64 KiB that has no space left."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    with open(folder / "filler", "wb", buffering=0) as filler, suppress(OSError):
        while filler.write(bytes(1024)):
            pass
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Compiled libraries are cached in a temporary folder, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
    """What a test writes under a relative path does not end up in the project."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def shown_messages(monkeypatch):
    """Messages and warnings are printed, as in a script."""
    monkeypatch.setattr(LOG, "handlers", [process.MessageHandler()])
    monkeypatch.setattr(LOG, "propagate", False)
    LOG.setLevel("INFO")
