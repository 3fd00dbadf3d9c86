"""Every command of the README, in its order, with few iterations and a stand-in for its data."""

import itertools
import re
import shlex
import subprocess
from pathlib import Path

import imageio.v3
import pytest
import standins
import torch
from conftest import ROOT, require_library

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    (python (?:main|prediction)\.py .*)$", README, re.MULTILINE)
# Later flags win: two iterations of two images, and a few test images.
FEW = ["--iterations", "2", "--batch_size", "2", "--evaluate_images", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all commands: later ones read what earlier ones wrote."""
    return tmp_path_factory.mktemp("readme")


def shortened(words, folder, colour_folder):
    """A command's words for a test: less work, and the data sets that are at hand."""
    words = [str(colour_folder) if word == "path/to/folder" else word for word in words]
    if words[1] == "main.py":
        words += FEW
        if "cifar10" in words:  # its weights have a folder of their own
            words += ["--save_to", "cifar/w.{}.pth", "--continue_from", "cifar/w.{}.pth"]
    if "weights.937500.pth" in words:
        (folder / "weights.2.pth").rename(folder / "weights.937500.pth")
    return words


@pytest.mark.parametrize("command", COMMANDS, ids=[c[7:60].strip() for c in COMMANDS])
def test_command(command, folder, succeed, data_directory, colour_folder, monkeypatch, request):
    monkeypatch.chdir(folder)
    if "theirs" in command or "reformer" in command:
        require_library()
    words = shortened(shlex.split(command), folder, colour_folder)
    directory = data_directory
    if "cifar10" in words:
        directory = folder / "downloads"
        standins.serve_cifar(*request.getfixturevalue("server"), monkeypatch)
    if "--dataset" in words:
        words += ["--dataset_directory", str(directory)]
    monkeypatch.setenv("DATASET_DIRECTORY", str(directory))
    for path in folder.glob("*.png"):
        path.unlink()
    result = succeed(*words[1:])
    check(words, result, folder)


def check(words, result, folder):
    """What the command wrote is there and is what it should be."""
    given = {flag: value for flag, value in itertools.pairwise(words) if flag[:2] == "--"}
    if "--save_to" in given:
        path = folder / given["--save_to"].format(2)
        assert torch.load(path, weights_only=True)["iteration"] == 2
    if words[1] == "main.py":
        assert re.search(r"test \d+\.\d+ bits/dim \(\d+\.\d+ over all bytes\)", result.out)
    if "--metrics_file" in given:
        assert (folder / given["--metrics_file"]).read_text().count("\n") == 2
    if "--save_image" in given:
        names = [given["--save_image"].format(k, i) for k in ("pred", "real") for i in range(10)]
        assert all(imageio.v3.imread(folder / f"{n}.png").shape == (28, 28) for n in names)
    if "--save_gif" in given:
        assert all((folder / given["--save_gif"].format(i)).exists() for i in range(10))
    if words[1] == "prediction.py" and "--save_image" not in given:
        figure = imageio.v3.imread(folder / given.get("--save_grid", "samples.png"))
        assert figure.std() > 10


def test_make_demo(tmp_path):
    """The demo's own commands, in a copy of the project, for a few iterations."""
    if not (ROOT / ".venv" / "installed").exists():
        pytest.fail("run the tests with make test")
    files = subprocess.run(
        ["git", "ls-files", "*.py", "*.txt", "*.npz", "*.cpp", "*.h", "Makefile"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    command = ["make", "demo", "-o", ".venv/installed", "ITERATIONS=3", "MORE_ITERATIONS=5"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "test" in done.stdout
    assert imageio.v3.imread(tmp_path / "demo" / "samples.png").std() > 10
    assert len(imageio.v3.imread(tmp_path / "demo" / "completion.gif")) == 64 - 24 + 1


def test_no_file_the_readme_links_to_is_missing():
    for link in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (Path(ROOT) / link).exists(), link
