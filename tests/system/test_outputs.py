"""The files that the scripts write: formats, links, full disks, what killed processes leave."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, load, start
from PIL import Image

import datasets
import files
import prediction
from engine import figures, pictures

LOSSY = {".gif", ".jpg", ".jpeg", ".webp"}
ALL_GIVEN = ["--offset", 64, "--index", 3]


def refused(call, *command):
    """The message of a command that must be refused before it samples or trains."""
    result = call(*command)
    assert result.status == 2, result
    assert result.err.count("\n") == 1
    assert "error: " in result.err
    return result.err


@pytest.mark.parametrize("extension", pictures.FORMATS)
def test_every_image_extension_is_written(extension, succeed, tiny_checkpoint, colour_folder):
    """Regression: .PNG, .JPG and .tif ended in a traceback after sampling."""
    grey = datasets.load("digits", ".", False).images[3].view(8, 8).numpy()
    colour = np.load(colour_folder / "test.npy")[3]
    succeed("prediction.py", tiny_checkpoint, *ALL_GIVEN, "--save_image", f"g.{{}}.{{}}{extension}")
    flags = ["--dataset", colour_folder, *TINY, "--index", 3, "--offset", 90]
    succeed("prediction.py", "-", *flags, "--save_image", f"c.{{}}.{{}}{extension.upper()}")
    for path, image in ((f"g.real.0{extension}", grey), (f"c.pred.0{extension.upper()}", colour)):
        with Image.open(path) as file:
            assert file.format == pictures.FORMATS[extension]
            read = np.asarray(file.convert("L" if image.ndim == 2 else "RGB")).astype(int)
        difference = np.abs(read - image).mean()
        assert difference < 60 if extension in LOSSY else difference == 0


@pytest.mark.parametrize("name", ["{}.{}.pdf", "{}.{}.qoi", "{}.{}.xyz", "{}.{}.pth.gz"])
def test_other_image_extensions_are_refused_before_sampling(
    name, call, tiny_checkpoint, monkeypatch, tmp_path
):
    """Regression: some that were accepted could not be written after sampling."""
    monkeypatch.setattr(prediction, "complete_images", None)
    err = refused(call, "prediction.py", tiny_checkpoint, "--save_image", name)
    assert ".png" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("extension", figures.EXTENSIONS)
def test_every_figure_extension_is_written(extension, succeed, tiny_checkpoint, tmp_path):
    name = f"f.{extension.upper()}"
    succeed("prediction.py", tiny_checkpoint, *ALL_GIVEN, "--save_grid", name)
    if extension in ("jpg", "jpeg", "png", "tif", "tiff", "webp"):
        with Image.open(name) as file:
            assert file.size[0] > 100
    else:
        start = {"pdf": b"%PDF", "svg": b"<?xml", "svgz": b"\x1f\x8b"}.get(extension, b"%!PS")
        assert (tmp_path / name).read_bytes().startswith(start)


def test_a_full_disk_loses_one_output_and_not_the_others(full_disk, tiny_checkpoint, tmp_path):
    """Regression: a figure that could not be written lost the others, "[Errno 28]" named no file,
    and an animation left "Exception ignored" on the terminal."""
    process = start(
        "prediction.py", tiny_checkpoint, "--offset", 60, "--save_gif", full_disk / "a.gif",
        "--save_grid", full_disk / "a.png", "--save_surprisal", "s.png",
        "--save_image", "{}.{}.png", cwd=tmp_path,
    )  # fmt: skip
    _, err = process.communicate()
    assert process.returncode == 1
    assert err.splitlines() == [
        "warning: 2 outputs could not be written; the error is that of the first",
        f"prediction.py: error: {full_disk}/a.gif: No space left on device",
    ]
    assert {p.name for p in tmp_path.iterdir()} == {"full", "s.png", "pred.0.png", "real.0.png"}
    assert os.listdir(full_disk) == ["filler"]


def test_a_gif_of_given_bytes_only(succeed, tiny_checkpoint, tmp_path):
    """Regression: --offset equal to the number of bytes, one frame, was a traceback."""
    succeed("prediction.py", tiny_checkpoint, *ALL_GIVEN, "--save_gif", "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 1
        assert gif.info["duration"] == 6000


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "qt4agg"])
def test_pictures_in_files_ignore_the_backend(backend, tiny_checkpoint, tmp_path):
    """Regression: MPLBACKEND, inherited from a notebook, was a traceback before sampling."""
    environment = {**os.environ, "MPLBACKEND": backend}
    outputs = ["--save_grid", "g.png", "--save_surprisal", "s.png"]
    command = ["prediction.py", tiny_checkpoint, *ALL_GIVEN]
    process = start(*command, *outputs, cwd=tmp_path, env=environment)
    assert process.communicate()[1] == ""
    assert {path.name for path in tmp_path.iterdir()} == {"g.png", "s.png"}
    process = start(*command, "--plot", cwd=tmp_path, env=environment)
    assert process.communicate()[1].startswith("prediction.py: error: --plot finds no display")
    assert process.returncode == 2


TRAIN = ["main.py", "--dataset", "digits", *TINY, "--iterations", 1, "--evaluate_images", 2]
OUTPUTS = ["--save_grid", "--save_surprisal", "--save_gif", "--save_image", "--save_to",
           "--metrics_file", "--export"]  # fmt: skip


def command_of(flag, checkpoint, path):
    """A command that writes `path`, and the name that the flag gives it."""
    if flag == "--export":
        return ["main.py", "--continue_from", checkpoint, flag, path]
    if flag in ("--save_to", "--metrics_file"):
        return [*TRAIN, flag, path]
    path = f"{path}{{}}.{{}}.png" if flag == "--save_image" else path
    given = [] if flag == "--save_surprisal" else ALL_GIVEN
    return ["prediction.py", checkpoint, *given, flag, path]


def name_of(flag):
    names = {"--save_gif": "x.gif", "--save_image": "xreal.0.png", "--metrics_file": "x.jsonl"}
    return names.get(flag, "x.pth" if flag in ("--save_to", "--export") else "x.png")


def given_name(flag):
    return "x" if flag == "--save_image" else name_of(flag)


@pytest.mark.parametrize("flag", OUTPUTS)
def test_what_is_not_a_regular_file_is_refused(flag, call, tiny_checkpoint, tmp_path):
    """Regression: a device was replaced by a file, which as root destroys /dev/null."""
    path = tmp_path / name_of(flag)
    os.mkfifo(path)
    err = refused(call, *command_of(flag, tiny_checkpoint, tmp_path / given_name(flag)))
    assert f"{flag} {path} cannot be written (it is not a regular file)" in err
    assert path.is_fifo()
    path.rename(tmp_path / "pipe")
    path.symlink_to(tmp_path / "pipe")
    refused(call, *command_of(flag, tiny_checkpoint, tmp_path / given_name(flag)))
    path.unlink()
    path.symlink_to(path)
    err = refused(call, *command_of(flag, tiny_checkpoint, tmp_path / given_name(flag)))
    assert f"{flag} {path} cannot be written (Too many levels of symbolic links)" in err


@pytest.mark.parametrize("flag", OUTPUTS)
@pytest.mark.parametrize("exists", [True, False])
def test_links_are_followed(flag, exists, succeed, tiny_checkpoint, tmp_path):
    """Regression: a link to another disk was replaced, and the disk kept the old file."""
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "target", tmp_path / name_of(flag)
    if exists and flag != "--save_to":  # which replaces only a checkpoint that it continues
        target.write_bytes(b"")
    link.symlink_to("disk/target")
    succeed(*command_of(flag, tiny_checkpoint, given_name(flag)))
    assert link.is_symlink()
    assert target.stat().st_size > 50
    assert os.listdir(tmp_path / "disk") == ["target"]


WRITER = """
import sys, time, files
def write(file):
    file.write(b"half")
    print("writing", flush=True)
    time.sleep(100)
files.write_atomically(sys.argv[1], write)
"""


def start_writing(path):
    command = [sys.executable, "-c", WRITER, str(path)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def test_what_killed_processes_left_is_removed(succeed, tiny_checkpoint, tmp_path):
    """Regression: twelve kills during an export left twelve files of 23 MB."""
    writers = [start_writing(tmp_path / f"{n}.pth") for n in range(3)]
    assert [writer.stdout.readline() for writer in writers] == ["writing\n"] * 3
    for killed in writers[:2]:
        killed.kill()
        killed.wait()
    foreign = tmp_path / "unfinished-elsewhere-0a1b2c3d.tmp"  # too new to be given up
    old = tmp_path / "unfinished-elsewhere-0a1b2c3e.tmp"
    foreign.touch()
    old.touch()
    os.utime(old, (0, 0))
    (tmp_path / "w.1.pth.tmp").touch()  # the user's
    assert len(list(tmp_path.glob("*.tmp"))) == 6
    succeed(*command_of("--export", tiny_checkpoint, tmp_path / "x.pth"))
    left = set(tmp_path.glob("*.tmp")) - {foreign, tmp_path / "w.1.pth.tmp"}
    assert len(left) == 1  # that of the living writer
    assert left.pop().read_bytes() == b""  # in its buffer
    writers[2].send_signal(signal.SIGINT)
    writers[2].wait()
    assert len(list(tmp_path.glob("unfinished-*"))) == 1


def test_an_interrupted_output_leaves_nothing(call, tiny_checkpoint, monkeypatch, tmp_path):
    """Regression: Ctrl-C while a GIF was written."""

    def interrupt(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupt)
    result = call("prediction.py", tiny_checkpoint, *ALL_GIVEN, "--save_gif", "a.gif")
    assert result.status == 130
    assert result.err == "prediction.py: interrupted\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["{:>1000000000}", "{:01000000000d}", "{0}", "{!r}", "{:6.3f}"])
@pytest.mark.parametrize("flag", ["--save_image", "--save_gif"])
def test_names_are_padded_with_a_few_zeros_only(field, flag, call, tiny_checkpoint):
    """Regression: a format made a name of a gigabyte, which the error then repeated."""
    pattern = f"{{}}.{field}.png" if flag == "--save_image" else f"{field}.gif"
    err = refused(call, "prediction.py", tiny_checkpoint, flag, pattern)
    assert pattern in err
    assert "{:06d}" in err


def test_numbers_may_have_leading_zeros(succeed, tiny_checkpoint, tmp_path):
    flags = [*ALL_GIVEN, "--save_image", "{}.{:03d}.png", "--save_gif", "{:04d}.gif"]
    succeed("prediction.py", tiny_checkpoint, *flags)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"pred.000.png", "real.000.png", "0000.gif"}


def test_the_word_of_a_name_is_not_padded(call, tiny_checkpoint):
    refused(call, "prediction.py", tiny_checkpoint, "--save_image", "{:06d}.{}.png")


def test_one_file_for_two_outputs_is_refused(call, tiny_checkpoint):
    """Regression: the second replaced the first in silence."""
    flags = ["--save_grid", "a.png", "--save_surprisal", "./a.png"]
    assert "a.png is also" in refused(call, "prediction.py", tiny_checkpoint, *flags)


def test_the_checkpoint_is_not_replaced(call, tiny_checkpoint):
    """Regression: the picture took the place of the weights that had drawn it."""
    for flags in (["w", "--save_grid", "./w"], ["w.{}.png", "--save_grid", "w.1.png"]):
        for name in ("w", "w.1.png"):
            shutil.copy(tiny_checkpoint, name)
        err = refused(call, "prediction.py", *flags, "--offset", 0)
        assert "would replace the checkpoint" in err


def test_a_folder_is_refused(call, tiny_checkpoint, tmp_path):
    """Regression: `--save_grid out/` wrote a file named out."""
    (tmp_path / "there").mkdir()
    for path in ("out/", "there", "there/"):
        err = refused(call, "prediction.py", tiny_checkpoint, "--save_grid", path)
        assert f"--save_grid {path} cannot be written (it is a folder)" in err


def test_diverged_weights_have_no_surprisal(call, tiny_checkpoint, tmp_path):
    """Regression: with huge finite weights --save_surprisal drew NaN and exited with 0."""
    checkpoint = load(tiny_checkpoint)
    for weights in checkpoint["model_state"].values():
        weights.mul_(1e30)
    torch.save(checkpoint, "diverged.pth")
    err = refused(call, "prediction.py", "diverged.pth", "--save_surprisal", "s.png")
    assert "diverged" in err
    assert not (tmp_path / "s.png").exists()
