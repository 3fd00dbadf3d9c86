"""Every kind of data set, its order in training, and the errors for damaged ones."""

import os
import subprocess
import sys

import numpy as np
import pytest
import standins
import torch
from helpers import ROOT

import datasets
from benchmarks import digit_quality
from utils import UserError


def test_digits_are_embedded():
    train, test = (datasets.load("digits", "nowhere", split) for split in (True, False))
    assert train.images.shape == (1497, 64)
    assert test.images.shape == (300, 64)
    assert train.images.dtype == torch.uint8
    assert train.image_shape == (8, 8)
    assert {tuple(x) for x in train.images.tolist()}.isdisjoint(map(tuple, test.images.tolist()))


def test_mnist_10k_is_embedded():
    """And nothing is downloaded."""
    train, test = (datasets.load("mnist-10k", "nowhere", split) for split in (True, False))
    assert train.images.shape == (10000, 784)
    assert test.images.shape == (1000, 784)
    assert train.images.dtype == test.images.dtype == torch.uint8
    assert train.image_shape == test.image_shape == (28, 28)
    assert digit_quality.mnist_10k_labels().bincount().min() > 800


def test_mnist_10k_holds_the_first_images_of_mnist(data_directory):
    if len(datasets.load("mnist", data_directory, True)) != 60000:
        pytest.skip("only a stand-in of MNIST is here")
    for train in (True, False):
        embedded = datasets.load("mnist-10k", "nowhere", train).images
        whole = datasets.load("mnist", data_directory, train).images
        assert torch.equal(embedded, whole[: len(embedded)])
    raw = data_directory / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    labels = torch.tensor(list(raw.read_bytes()[8:10008]))
    assert torch.equal(digit_quality.mnist_10k_labels(), labels)


def test_mnist_is_read_as_bytes(data_directory):
    test = datasets.load("mnist", data_directory, False)
    raw = (data_directory / "MNIST" / "raw" / "t10k-images-idx3-ubyte").read_bytes()
    assert test.images.numpy().tobytes() == raw[16:]
    assert test.image_shape == (28, 28)


def test_mnist_is_downloaded_on_first_use(server, monkeypatch, tmp_path):
    standins.serve_mnist(*server, monkeypatch)
    data = datasets.load("mnist", tmp_path / "data", True)
    assert np.array_equal(data.images.view(-1, 28, 28), standins.digits((28, 28))[:300])


def test_cifar10_is_downloaded_and_read_as_r_g_b(server, monkeypatch, tmp_path):
    """CIFAR-10's files hold planes; the model reads r1 g1 b1 r2 g2 b2 ..."""
    standins.serve_cifar(*server, monkeypatch)
    data = datasets.load("cifar10", tmp_path / "data", False)
    assert data.image_shape == (32, 32, 3)
    assert np.array_equal(data.images.view(-1, 32, 32, 3), standins.digits((32, 32, 3))[100:120])


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_failed_download_says_what_to_fetch(name, server, monkeypatch, tmp_path, call):
    """Regression: it left empty folders behind."""
    serve = standins.serve_mnist if name == "mnist" else standins.serve_cifar
    serve(*server, monkeypatch)
    for path in server[0].iterdir():
        path.unlink()
    result = call("main.py", "--dataset", name, "--dataset_directory", "new/data")
    file = "train-images-idx3-ubyte.gz" if name == "mnist" else "cifar-10-python.tar.gz"
    assert result.status == 2
    assert server[1] + file in result.err
    assert "in new/data" in result.err
    assert ("--dataset mnist-10k needs no download" in result.err) == (name == "mnist")
    assert not (tmp_path / "new").exists()


def test_damaged_mnist_files_are_named(tmp_path):
    standins.write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="train-images-idx3-ubyte"):
        datasets.load("mnist", tmp_path, True)


@pytest.mark.parametrize("damage", [lambda x: x[:500], lambda x: x[:500] + b"x" + x[501:]])
def test_damaged_files_of_cifar10_are_named(damage, server, monkeypatch, tmp_path):
    standins.serve_cifar(*server, monkeypatch)
    datasets.load("cifar10", tmp_path, True)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_4"
    path.write_bytes(damage(path.read_bytes()))
    (server[0] / "cifar-10-python.tar.gz").unlink()
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    with pytest.raises(UserError, match="data_batch_4 is damaged"):
        datasets.load("cifar10", tmp_path, True)


def test_imagenet64_is_memory_mapped_in_either_shape(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    (tmp_path / "imagenet-64x64").mkdir()
    np.save(tmp_path / "imagenet-64x64" / "train_data.npy", images)
    np.save(tmp_path / "imagenet-64x64" / "val_data.npy", images.reshape(3, -1))
    for train in (True, False):
        data = datasets.load("imagenet64", tmp_path, train)
        assert data.image_shape == (64, 64, 3)
        assert np.array_equal(data.images, images.reshape(3, -1))


def test_a_missing_folder_is_named(tmp_path):
    """Regression: a missing folder was reported as files missing inside it."""
    with pytest.raises(UserError, match="gone does not exist: give it with --dataset"):
        datasets.load(str(tmp_path / "gone"), ".", True)


def save_array(folder, array):
    np.save(folder / "train.npy", array)
    return "train.npy"


def save_bytes(folder, content):
    (folder / "train.npy").write_bytes(content)
    return "train.npy"


HUGE = "{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999, 300, 400), }"
DAMAGES = {
    "float": lambda d: save_array(d, np.zeros((3, 4, 5))),
    "flat": lambda d: save_array(d, np.zeros((3, 20), np.uint8)),
    "two-channels": lambda d: save_array(d, np.zeros((3, 4, 5, 2), np.uint8)),
    "none": lambda d: save_array(d, np.zeros((0, 4, 5), np.uint8)),
    "objects": lambda d: save_array(d, np.array([{}, []], dtype=object)),
    "scalar": lambda d: save_array(d, np.uint8(3)),
    "structured": lambda d: save_array(d, np.zeros((3, 4, 5), "u1,u1")),
    "no-array": lambda d: save_bytes(d, b"not an array"),
    "empty-file": lambda d: save_bytes(d, b""),
    "larger-than-the-file": lambda d: save_bytes(
        d, b"\x93NUMPY\x01\x00" + bytes([len(HUGE), 0]) + HUGE.encode()
    ),
    "pipe": lambda d: os.mkfifo(d / "train.npy") or "train.npy",
    "broken-link": lambda d: (d / "train.npy").symlink_to("gone") or "train.npy",
    "empty-folder": lambda d: (d / "train").mkdir() or "train",
    "nothing": lambda d: str(d),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_an_error_that_names_the_file(damage, tmp_path):
    name = damage(tmp_path)
    with pytest.raises(UserError) as error:
        datasets.load(str(tmp_path), ".", True)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_batches_go_through_every_image_once_an_epoch(colour_folder):
    """The original never shuffled. Batches are cut from an endless sequence, so that an epoch has
    no smaller last batch."""
    data = datasets.load(str(colour_folder), ".", True)
    seen = torch.cat([data.batch(i, 5, seed=1) for i in range(12)])  # 60 images, 5 epochs
    everything = sorted(map(tuple, data.images.tolist()))
    epochs = [epoch.tolist() for epoch in seen.split(12)]
    assert all(sorted(map(tuple, epoch)) == everything for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_batch_depends_on_iteration_size_and_seed_alone(colour_folder):
    data = datasets.load(str(colour_folder), ".", True)
    assert torch.equal(data.batch(7, 5, 1), data.batch(7, 5, 1))
    assert not torch.equal(data.batch(7, 5, 1), data.batch(7, 5, 2))
    assert data.batch(0, 100, 1).shape == (100, 90)


def test_without_a_seed_the_order_is_the_files(colour_folder):
    data = datasets.load(str(colour_folder), ".", True)
    assert torch.equal(data.batch(3, 5, None), data.images[[3, 4, 5, 6, 7]])


def test_arrays_in_fortran_order(tmp_path):
    """MATLAB's order, which numpy.save keeps: read right, or refused if the copy does not fit."""
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    np.save(tmp_path / "train.npy", np.asfortranarray(images))
    data = datasets.load(str(tmp_path), ".", True)
    assert np.array_equal(data.images, images.reshape(5, -1))
    header = {"descr": "|u1", "fortran_order": True, "shape": (10**8, 64, 64)}
    with (tmp_path / "train.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 10**8 * 64 * 64)  # no blocks of the disk are used
    with pytest.raises(UserError, match=r"does not fit in memory \(409.6 GB"):
        datasets.load(str(tmp_path), ".", True)


def test_images_stay_in_the_memory_of_a_gpu_if_they_are_few(monkeypatch):
    """On a device whose tensors have no values; batches are drawn there."""
    data, device = datasets.load("digits", ".", True), torch.device("meta")
    assert data.on_device_if_small(torch.device("cpu")) is data
    copy = data.on_device_if_small(device)
    assert copy.images.device == copy.batch(3, 5, 0).device == device
    assert (copy.image_shape, len(copy)) == (data.image_shape, len(data))
    monkeypatch.setattr(datasets, "device_memory", lambda device: 9 * data.images.nbytes)
    assert data.on_device_if_small(device) is data


@pytest.mark.skipif(sys.platform != "linux", reason="needs the memory limits of Linux")
def test_images_larger_than_memory(tmp_path):
    """imagenet64 is memory-mapped: an epoch over a file four times as large as the memory limit of
    the process."""
    folder = tmp_path / "imagenet-64x64"
    folder.mkdir()
    size = 2**30 // 12288  # one GiB
    for split in ("train", "val"):
        shape = (size, 64, 64, 3)
        array = np.lib.format.open_memmap(folder / f"{split}_data.npy", "w+", np.uint8, shape)
        array[::1000, 0, 0, 0] = 7
        del array
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, datasets
torch.set_num_threads(1)
used = int(open("/proc/self/status").read().split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 2**28, used + 2**28))
try:
    bytearray(2**29)
except MemoryError:
    print("limited")
data = datasets.load("imagenet64", {str(tmp_path)!r}, True)
total = sum(int(data.batch(i, 1000, 0)[:, 0].sum()) for i in range(len(data) // 1000))
peak = int(open("/proc/self/status").read().split("VmData:")[1].split()[0]) * 1024 - used
print(len(data), data.first_byte_counts()[7].item(), peak < 2**28)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    expected = f"limited\n{size} {-(-size // 1000)} True\n"
    assert done.stdout == expected, done.stderr
