"""Stand-ins for data sets that torchvision downloads, in the formats it reads."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile

import numpy as np
import torchvision

import datasets


def digits(shape):
    """The embedded digits, (1797, *shape): enlarged by repetition and cut to size."""
    both = [datasets.load("digits", ".", train).images.view(-1, 8, 8).numpy() for train in (0, 1)]
    images = np.concatenate(both).repeat(4, 1).repeat(4, 2)[:, : shape[0], : shape[1]]
    return images if len(shape) == 2 else images[..., None].repeat(3, -1)


def idx(array):
    """Bytes of an array in MNIST's idx format."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist_files():
    """The four files of MNIST: {name: bytes}."""
    images = digits((28, 28))
    files = {}
    for split, part in (("train", images[:300]), ("t10k", images[300:400])):
        files[f"{split}-images-idx3-ubyte"] = idx(part)
        files[f"{split}-labels-idx1-ubyte"] = idx(np.zeros(len(part), np.uint8))
    return files


def write_mnist(directory):
    """Write MNIST's files, also as those of Fashion-MNIST, into `directory`, as after a download;
    returns the directory."""
    for data_set in ("MNIST", "FashionMNIST"):
        raw = directory / data_set / "raw"
        raw.mkdir(parents=True)
        for name, content in mnist_files().items():
            (raw / name).write_bytes(content)
    return directory


def serve_mnist(folder, address, monkeypatch):
    """Put the compressed files into `folder` and make torchvision fetch them from `address`."""
    resources = []
    for name, content in mnist_files().items():
        packed = gzip.compress(content)
        (folder / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [address])
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)


def cifar_files():
    """The files of CIFAR-10's archive: {name: bytes}."""
    rows = digits((32, 32, 3)).transpose(0, 3, 1, 2).reshape(-1, 3072)  # channels first, as there
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    files = {}
    for i, name in enumerate(names):
        batch = {"data": rows[20 * i : 20 * i + 20], "labels": [0] * 20}
        files[name] = pickle.dumps(batch)
    files["batches.meta"] = pickle.dumps({"label_names": [str(i) for i in range(10)]})
    return files


def serve_cifar(folder, address, monkeypatch):
    """As `serve_mnist`, for CIFAR-10's archive."""
    files = cifar_files()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (folder / "cifar-10-python.tar.gz").write_bytes(archive.getvalue())
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "url", f"{address}cifar-10-python.tar.gz")
    monkeypatch.setattr(cifar, "tgz_md5", hashlib.md5(archive.getvalue()).hexdigest())
    train = [[name, sums[name]] for name in sums if name.startswith("data")]
    monkeypatch.setattr(cifar, "train_list", train)
    monkeypatch.setattr(cifar, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(cifar, "meta", meta)
