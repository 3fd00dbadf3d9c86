"""What the tests share: calling the scripts, small data sets and checkpoints."""

import functools
import http.server
import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import main
import prediction
from cli import process

ROOT = Path(__file__).parent.parent
SCRIPTS = {"main.py": main.main, "prediction.py": prediction.main}

# Where the tests marked `cuda` run; TEST_DEVICE=cpu runs most of them without a GPU.
DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))

# A model that trains and samples in seconds.
TINY = ["--n_layers", "2", "--n_heads", "2", "--d_query", "8", "--mixtures", "3"]


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


def require_library():
    """Skip a test where pytorch-fast-transformers is missing; in CI that is a failure."""
    if find_spec("fast_transformers") is None and os.environ.get("CI") != "true":
        pytest.skip("pytorch-fast-transformers is not installed: make reference")


def start(script, *arguments, **kwargs):
    """Start a script as a process of its own."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{**pipes, **kwargs})


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A checkpoint of a tiny model on `digits`, 30 iterations old."""
    folder = tmp_path_factory.mktemp("tiny")
    arguments = ["--dataset", "digits", *TINY, "--iterations", 30, "--batch_size", 8, "--lr", 1e-2]
    arguments += ["--save_to", folder / "tiny.{}.pth", "--evaluate_images", 8]
    main.main([str(argument) for argument in arguments])
    return folder / "tiny.30.pth"


@pytest.fixture(scope="session")
def fast_checkpoint(tmp_path_factory):
    """As `tiny_checkpoint`, of a run with --recipe fast, 10 iterations old."""
    folder = tmp_path_factory.mktemp("fast")
    arguments = ["--dataset", "digits", *TINY, "--recipe", "fast", "--iterations", 10]
    arguments += ["--save_to", folder / "fast.{}.pth", "--evaluate_images", 8]
    main.main([str(argument) for argument in arguments])
    return folder / "fast.10.pth"


@pytest.fixture(scope="session")
def colour_folder(tmp_path_factory):
    """A data set of 12 + 4 colour images of 6 x 5, as train.npy and test.npy."""
    return write_colour_images(tmp_path_factory.mktemp("colour"), height=6, width=5)


def write_colour_images(folder, height, width):
    """Write 12 + 4 random images to train.npy and test.npy; returns the folder."""
    random = np.random.default_rng(0)
    for split, n in (("train", 12), ("test", 4)):
        images = random.integers(0, 256, (n, height, width, 3), np.uint8)
        np.save(folder / f"{split}.npy", images)
    return folder


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory):
    """Where MNIST is: DATASET_DIRECTORY or ../shared/data if it is there, else a stand-in of the
    embedded digits, enlarged, in MNIST's file format."""
    for folder in (os.getenv("DATASET_DIRECTORY", ""), ROOT.parent / "shared" / "data"):
        if (Path(folder) / "MNIST" / "raw" / "t10k-images-idx3-ubyte").exists():
            return Path(folder).resolve()
    from standins import write_mnist

    return write_mnist(tmp_path_factory.mktemp("data"))


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
