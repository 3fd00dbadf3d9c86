"""Full disks, read-only folders, missing permissions, closed pipes, odd names, long runs."""

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY, assert_equal_weights, finish, load, start, start_command

DIGITS = ["--dataset", "digits", *TINY, "--batch_size", 4, "--evaluate_images", 8]
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def limit_files(size):
    """A function that, called in a new process, keeps files from growing beyond `size` bytes: it
    simulates a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_loses_no_training(succeed, tmp_path):
    """Every failed save is a warning and leaves the old checkpoint intact; at the end the run fails
    and names the problem. Once there is space, it continues as if nothing had happened."""
    command = [*DIGITS, "--log_frequency", 1, "--save_frequency", 2]
    succeed("main.py", *command, "--iterations", 8, "--save_to", "whole.8.pth")
    command += ["--save_to", "w.{}.pth", "--continue_from", "w.{}.pth", "--iterations"]
    succeed("main.py", *command, 3)
    process = start("main.py", *command, 8, cwd=tmp_path, preexec_fn=limit_files(20000))
    out, err = finish(process, status=2)
    assert "iteration 8 of 8" in out
    assert err.count("trying again in 2 iterations") == 2, err
    assert err.count("File too large") == 3
    assert err.splitlines()[-1].endswith("older checkpoints are as they were")
    assert sorted(path.name for path in tmp_path.glob("w.*")) == ["w.2.pth", "w.3.pth"]
    succeed("main.py", *command, 8)
    assert_equal_weights("w.8.pth", "whole.8.pth")


def works(command):
    return shutil.which(command[0]) and subprocess.run([*command, "true"]).returncode == 0


def as_a_user():
    """The prefix of a command that runs it without the capabilities of root, if we have them."""
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    if os.geteuid() != 0:
        return []
    if not works(command):
        pytest.skip("we are root and cannot drop its capabilities here")
    return command


def offline():
    """The prefix of a command that runs it without a network, if that is possible."""
    command = ["unshare", "-n"]
    return command if works(command) else []


def test_a_folder_that_becomes_read_only_and_one_that_is_deleted(tmp_path):
    """The run goes on, and saves again as soon as it can; a deleted folder is created again."""
    command = [*DIGITS, "--iterations", 10**6, "--save_frequency", 20, "--log_frequency", 5]
    command = [*as_a_user(), sys.executable, ROOT / "main.py", *command]
    process = start_command([*command, "--save_to", tmp_path / "runs" / "w.{}.pth"])
    for line in process.stdout:
        if line.startswith("iteration 20: saved"):
            (tmp_path / "runs").chmod(0o555)
        if line.startswith("iteration 100 of"):
            (tmp_path / "runs").chmod(0o755)
        if line.startswith("iteration 120: saved"):
            shutil.rmtree(tmp_path / "runs")
        if line.startswith("iteration 160: saved"):
            process.terminate()
            break
    _, err = finish(process, status=143)
    assert "iteration 40: Permission denied; trying again" in err
    assert "iteration 80: Permission denied; trying again" in err
    assert (tmp_path / "runs" / "w.160.pth").exists()


def test_a_user_without_permissions_home_or_network(tiny_checkpoint, tmp_path):
    """In a folder whose name has spaces and non-ASCII letters, the only one that is writable."""
    folder = tmp_path / "größte Läufe 画像"
    folder.mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": "/proc/nowhere", "LC_ALL": "C"}
    main, prediction = (
        [*offline(), *as_a_user(), sys.executable, ROOT / script]
        for script in ("main.py", "prediction.py")
    )
    commands = [
        [*main, *DIGITS, "--iterations", 3, "--save_to", "ü {}.pth", "--metrics_file", "ü.jsonl"],
        [*main, *DIGITS, "--iterations", 5, "--continue_from", "ü {}.pth", "--save_to", "ü {}.pth"],
        [*prediction, "ü {}.pth", "--recurrent", "--save_grid", "Bild 1.png", "--index", "0-2"],
        [*prediction, "ü {}.pth", "--save_image", "é {} {}.png", "--save_gif", "é.gif"],
    ]
    for command in commands:
        done = subprocess.run(
            [str(part) for part in command], cwd=folder, env=environment, capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()
        assert b"Traceback" not in done.stderr
    assert sorted(os.listdir(folder)) == sorted(
        ["ü 3.pth", "ü 5.pth", "ü.jsonl", "Bild 1.png", "é pred 0.png", "é real 0.png", "é.gif"]
    )


def test_training_whose_output_is_closed_saves_and_exits(tmp_path):
    command = [sys.executable, ROOT / "main.py", *DIGITS, "--iterations", 10**6]
    command += ["--log_frequency", 1, "--save_to", tmp_path / "w.{}.pth"]
    command = " ".join(f"'{part}'" for part in command)
    script = f"({command}; echo status $? >&2) 2>&1 >&3 3>&- | cat >&2"
    shell = subprocess.run(
        ["bash", "-c", f"exec 3> >(head -n 5 >/dev/null); {script}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "status 141" in shell.stderr
    assert "Traceback" not in shell.stderr
    assert len(list(tmp_path.glob("w.*.pth"))) == 1


def test_output_to_head(tiny_checkpoint, tmp_path):
    """The work is finished although stdout is closed after a line."""
    flags = [tiny_checkpoint, "--save_grid", "x.png"]
    command = " ".join(f"'{part}'" for part in [sys.executable, ROOT / "prediction.py", *flags])
    shell = subprocess.run(
        ["bash", "-c", f"{command} | head -n 1; {command} --help | head -n 1"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert "Traceback" not in shell.stderr
    assert "Exception" not in shell.stderr
    assert (tmp_path / "x.png").exists()


@ON_LINUX
def test_output_on_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        flags = ["--iterations", 3, "--save_to", tmp_path / "w.pth", "--log_frequency", 1]
        process = start("main.py", *DIGITS, *flags, stdout=full)
        _, err = finish(process)
    assert err.count("the output cannot be written (No space left on device)") == 1
    assert load(tmp_path / "w.pth")["iteration"] == 3


def test_metrics_on_a_full_disk(succeed, full_disk):
    metrics = ["--metrics_file", full_disk / "m.jsonl"]
    result = succeed("main.py", *DIGITS, "--iterations", 2, *metrics)
    assert "metrics of iteration 2 cannot be written (No space left on device)" in result.err


def newest(folder):
    """The checkpoint of the highest iteration, if there is one."""
    return sorted(folder.glob("w.*.pth"), key=lambda path: int(path.name.split(".")[1]))[-1:]


def test_two_runs_that_save_to_one_pattern(tmp_path):
    """Every file is complete and from one of the two, even while both write and delete."""
    command = [*DIGITS, "--iterations", 60, "--save_frequency", 1, "--keep_checkpoints", 5]
    command += ["--save_to", tmp_path / "w.{}.pth", "--log_frequency", 60]
    runs = [start("main.py", *command, "--seed", seed) for seed in (1, 2)]
    seen = 0
    while any(run.poll() is None for run in runs):
        for path in newest(tmp_path):
            seen += load(path)["seed"] in (1, 2)
        time.sleep(0.02)
    for run in runs:
        finish(run)
    assert seen > 5
    left = sorted(os.listdir(tmp_path))
    assert left == sorted(f"w.{i}.pth" for i in range(56, 61))
    assert {load(path)["seed"] for path in tmp_path.iterdir()} <= {1, 2}


def resident_kb(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) if "VmRSS" in status else None


@ON_LINUX
def test_many_iterations_take_no_more_memory():
    command = [*DIGITS, "--iterations", 800, "--log_frequency", 20, "--evaluate_frequency", 50]
    command += ["--save_frequency", 50, "--save_to", "w.{}.pth", "--keep_checkpoints", 2]
    process, sizes = start("main.py", *command), []
    for line in process.stdout:
        if " of 800" in line and int(line.split()[1]) >= 200:
            sizes.append(resident_kb(process))
    finish(process)
    sizes = [size for size in sizes if size]
    assert len(sizes) >= 25
    assert max(sizes) < 1.05 * min(sizes), sizes


@ON_LINUX
@pytest.mark.parametrize("flag", ["--compile", "--no-compile"])
def test_a_thousand_images_take_no_more_memory(flag, tiny_checkpoint, tmp_path):
    """When they are written as files, batch after batch."""
    command = [tiny_checkpoint, "--index", "0-250,0-250,0-250,0-250"]
    command += ["--offset", 1, "--recurrent", "--batch_size", 20, flag, "--save_image", "{}.{}.png"]
    process = start("prediction.py", *command)
    sizes = []
    while process.poll() is None and not (tmp_path / "pred.999.png").exists():
        sizes.append(resident_kb(process))
        time.sleep(0.05)
    finish(process)
    assert len(list(tmp_path.glob("pred.*.png"))) == 1000
    warm = sizes[len(sizes) // 2 :]
    assert len(warm) > 10
    assert max(warm) < 1.05 * min(warm), sizes


def test_what_is_not_finite_first_is_named_at_its_step(call, tmp_path):
    """And nothing is saved after that step."""
    result = call("main.py", *DIGITS, "--iterations", 4, "--save_to", "w.{}.pth")
    assert result.status == 0
    checkpoint = load("w.4.pth")
    name = "transformer.layers.1.attention.query_projection"
    checkpoint["model_state"][f"{name}.weight"].fill_(3e38)
    torch.save(checkpoint, "w.5.pth")
    command = ["main.py", *DIGITS, "--iterations", 9, "--continue_from", "w.5.pth"]
    result = call(*command, "--save_to", "w.{}.pth", "--save_frequency", 1)
    assert result.status == 2
    assert f"iteration 5: the output of {name} is not finite" in result.err
    assert sorted(os.listdir()) == ["w.4.pth", "w.5.pth"]
