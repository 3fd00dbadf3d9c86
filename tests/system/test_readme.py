"""Every command of README.md and docs/, in order, with few iterations and stand-ins for data."""

import itertools
import re
import shlex
import shutil
import subprocess
import sys

import imageio.v3
import numpy as np
import pytest
import standins
from helpers import (
    ROOT,
    finish,
    load,
    records,
    require_library,
    run_two,
    start_command,
    write_colour_images,
)

from cli.sampling_flags import index_list

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = "python", "torchrun", "make", "pip", "sh"
# Later flags win: two iterations of two images, and a few test images.
FEW = ["--iterations", "2", "--batch_size", "2", "--evaluate_images", "2"]


def code_lines(text):
    """The lines of a document's code blocks, indented or fenced, unchanged."""
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line


def read_commands(text):
    """The commands of a document, each a list of its lines; a backslash continues a line."""
    commands, continued = [], False
    for line in code_lines(text):
        if continued:
            commands[-1].append(line)
        elif line.split()[:1] and line.split()[0] in PROGRAMS:
            commands.append([line])
        else:
            continue
        continued = line.endswith("\\")
    return commands


def join(lines):
    """The lines of a command as one line, without their backslashes."""
    return " ".join(line.removesuffix("\\").strip() for line in lines)


COMMANDS = [
    (path.relative_to(ROOT), command)
    for path in DOCUMENTS
    for command in read_commands(path.read_text())
]
RUN = [
    pytest.param(join(lines), id=f"{path.stem}-{join(lines)[:50]}")
    for path, lines in COMMANDS
    if {"main.py", "prediction.py", "prepare.py"} & set(join(lines).split())
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all commands, which may read the trained weights and what earlier commands
    wrote."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "weights", folder / "weights")
    (folder / "path/to/photos").mkdir(parents=True)
    for n in range(100):  # of which ten become test images
        pixels = np.full((60, 80, 3), 2 * n, np.uint8)
        imageio.v3.imwrite(folder / f"path/to/photos/{n}.jpg", pixels)
    return folder


@pytest.fixture(scope="module")
def colour_folder(tmp_path_factory):
    """Images of CIFAR-10's shape, as weights/cifar10-subset.pth needs them."""
    return write_colour_images(tmp_path_factory.mktemp("colour"), height=32, width=32)


def shortened(words, folder, colour_folder):
    """The words of a command, changed to do less work with the data sets that a test has."""
    words = [str(colour_folder) if word == "path/to/folder" else word for word in words]
    if "main.py" in words and "--export" not in words:
        words += FEW[2:] if "--evaluate_only" in words else FEW
    if "weights.937500.pth" in words:
        (folder / "weights.2.pth").rename(folder / "weights.937500.pth")
    return words


@pytest.mark.parametrize("command", RUN)
def test_command(command, folder, succeed, data_directory, colour_folder, monkeypatch, request):
    monkeypatch.chdir(folder)
    if "theirs" in command or "reformer" in command:
        require_library()
    words = shortened(shlex.split(command), folder, colour_folder)
    if words[0] == "torchrun":
        run_in_two_processes(words, folder, monkeypatch)
        return
    directory = data_directory
    if "cifar10" in words:
        directory = folder / "downloads"
        standins.serve_cifar(*request.getfixturevalue("server"), monkeypatch)
    for path in folder.glob("*.png"):
        path.unlink()
    no_data = {"--export", "prepare.py"} & set(words)
    data = [] if no_data else ["--dataset_directory", directory]
    result = succeed(*words[1:], *data)
    check(words, result.out, folder)


def run_in_two_processes(words, folder, monkeypatch):
    """Run a torchrun command on the embedded digits, in a folder of its own."""
    folder = folder / "torchrun"
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    words = [*words[script - 1 :], "--dataset", "digits"]
    words += ["--index", "0-3"] if words[1] == "prediction.py" else []
    check(words, run_two(*words[1:]), folder)


def check(words, out, folder):
    """Whether the command wrote what it should."""
    given = {flag: value for flag, value in itertools.pairwise(words) if flag[:2] == "--"}
    images = range(len(index_list(given.get("--index", "0"))))
    if words[1] == "prepare.py":
        shape = int(given["--size"]), int(given["--size"])
        assert np.load(folder / words[3] / "train.npy").shape[1:3] == shape
        return
    if "--save_to" in given:
        path = folder / given["--save_to"].format(2)
        assert load(path)["iteration"] == 2
    if "--export" in words:
        assert load(folder / given["--export"])["iteration"] == 2
    elif words[1] == "main.py":
        assert re.search(r"(test|validation) \d+\.\d+ bits/dim \(\d+\.\d+ over all bytes\)", out)
    if "--metrics_file" in given:
        first, *_, last = records(folder / given["--metrics_file"])
        assert first["split"] == "train"
        assert (last["split"], last["iteration"]) == ("test", 2)
    if "--samples" in given:
        assert imageio.v3.imread(folder / given["--samples"].format(2)).std() > 10
    if "--save_image" in given:
        names = [given["--save_image"].format(k, i) for k in ("pred", "real") for i in images]
        paths = [folder / (name.removesuffix(".png") + ".png") for name in names]
        shape = (8, 8) if given.get("--dataset") == "digits" else (28, 28)
        assert all(imageio.v3.imread(path).shape == shape for path in paths)
    if "--save_gif" in given:
        assert all((folder / given["--save_gif"].format(i)).exists() for i in images)
    if "--save_surprisal" in given:
        assert imageio.v3.imread(folder / given["--save_surprisal"]).std() > 10
    files = given.keys() & {"--save_image", "--save_gif", "--save_surprisal"}
    if words[1] == "prediction.py" and ("--save_grid" in given or not files):
        figure = imageio.v3.imread(folder / given.get("--save_grid", "samples.png"))
        assert figure.std() > 10


@pytest.mark.parametrize(("path", "lines"), COMMANDS, ids=[join(c)[:60] for _, c in COMMANDS])
def test_commands_can_be_read_and_pasted(path, lines):
    """No line is over 100 columns, and {} and * are quoted: a shell might replace them."""
    assert max(len(line) for line in lines) <= 100
    unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "", join(lines))
    assert not re.search(r"[{}*?\[\]|<>$]", unquoted), unquoted


def test_the_python_of_the_documents(tmp_path):
    """README's lines, then the block of docs/python.md, which prints four lines of its own: what it
    imports prints nothing, and the size of the state does not change."""
    lines = (ROOT / "README.md").read_text().splitlines()
    first = lines.index("    from prediction import load_model, sample_images")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    code = "\n".join(line.strip() for line in lines[first : first + 3])
    code += "\nassert digits.shape == (60, 28, 28) and digits.float().std() > 50\n"
    code += block + "\nprint(digits.float().std() > 50)"
    out, err = finish(start_command([sys.executable, "-c", code], cwd=ROOT))
    bits, before, after, drawn = out.splitlines()
    assert re.fullmatch(r"0\.\d{4} bits/dim, 0\.\d{4} over all bytes", bits)
    assert before.partition(": ")[2] == after.partition(": ")[2] != ""
    assert drawn == "tensor(True)"
    assert err == ""


def test_make_demo(tmp_path):
    """In a copy of the project, with few iterations."""
    if not (ROOT / ".venv" / "installed").exists():
        pytest.fail("run the tests with make test")
    files = ["*.py", "*.txt", "*.npz", "*.cpp", "*.h", "Makefile"]
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *files],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    command = ["make", "demo", "-o", ".venv/installed", "ITERATIONS=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "test" in done.stdout
    assert imageio.v3.imread(tmp_path / "demo" / "samples.png").std() > 10
    assert len(imageio.v3.imread(tmp_path / "demo" / "completion.gif")) > 100


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_no_file_a_document_links_to_is_missing(document):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", document.read_text()):
        file, _, section = link.partition("#")
        path = document.parent / file if file else document
        assert path.exists(), link
        if section:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert section in [anchor(heading) for heading in headings], link


def anchor(heading):
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
