"""Every data set as one uint8 tensor of shape (images, bytes), with the shape of an image."""

import mmap
import os
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from image_files import allocate, check_is_file, describe, load_image_files
from options import choose
from utils import UserError, device_memory, is_out_of_memory, one_line, say, to_device

NAMES = ("mnist", "fashion-mnist", "cifar10", "imagenet64", "mnist-10k", "digits")
EMBEDDED = Path(__file__).parent / "digits"
MNIST_10K = EMBEDDED / "mnist-10k.npz"
# A data set is kept on a GPU if it takes at most this fraction of the GPU's memory.
FRACTION_OF_DEVICE_MEMORY = 0.1


@dataclass(frozen=True)
class ImageDataset:
    """Images as bytes r1 g1 b1 r2 ..., row by row; shape (H, W) or (H, W, 3)."""

    name: str
    images: torch.Tensor  # (images, bytes), uint8
    image_shape: tuple[int, ...]
    mapping: mmap.mmap | None = None  # the file that `images` is read from, if it is mapped
    subset: np.ndarray | None = None  # the numbers of the images to train on, if not all

    def __len__(self) -> int:
        return len(self.images if self.subset is None else self.subset)

    def hold_out(self, n: int, seed: int) -> "tuple[ImageDataset, ImageDataset]":
        """The data set without n images, and these images, which depend on the seed. With a larger
        n they begin with the same ones."""
        if n >= len(self):
            problem = f"--validation {n} leaves none of the {len(self)} training images"
            raise UserError(f"{problem} of {self.name}: give fewer")
        order = np.random.default_rng(seed).permutation(len(self))
        held_out = self.images[torch.from_numpy(order[:n])]
        training = replace(self, subset=np.sort(order[n:]))
        return training, ImageDataset(self.name, held_out, self.image_shape)

    def first_byte_counts(self) -> torch.Tensor:
        """How often each byte is the first of an image, (256,), int64."""
        first = self.images[:, 0] if self.subset is None else self.images[self.subset, 0]
        return torch.bincount(first.long(), minlength=256)

    def batch(self, iteration: int, batch_size: int, seed: int | None) -> torch.Tensor:
        """The images (batch_size, bytes) of a training iteration, counted from 0.

        A function of its arguments alone, so a restart continues exactly where the run stopped:
        batches are consecutive parts of an endless sequence of permutations, one per epoch, each
        drawn from (seed, epoch). Without a seed the order is the file's.
        """
        self.check_file()
        n = len(self)
        positions = np.arange(iteration * batch_size, (iteration + 1) * batch_size)
        epochs, places = positions // n, positions % n
        order = [
            permutation(seed, epoch, n)[places[epochs == epoch]] for epoch in np.unique(epochs)
        ]
        order = np.concatenate(order)
        if self.subset is not None:
            order = self.subset[order]
        return self.images[to_device(torch.from_numpy(order), self.images.device)]

    def check_file(self) -> None:
        """Raise a `UserError` if the mapped file has become shorter: reading what is gone would
        end the process with SIGBUS, which Python cannot handle."""
        if self.mapping and self.mapping.size() < len(self.mapping):
            raise UserError(
                f"a file of {self.name} has become shorter while it was in use: restore it, and "
                "replace files in use by renaming the new ones"
            )

    def on_device_if_small(self, device: torch.device) -> "ImageDataset":
        """The same data set with its images in the memory of a GPU, if they are few enough, so that
        only the order of a batch has to be copied there."""
        limit = FRACTION_OF_DEVICE_MEMORY * device_memory(device)
        if device.type == "cpu" or self.images.nbytes > limit:
            return self
        return replace(self, images=self.images.to(device), mapping=None)


@lru_cache(maxsize=2)
def permutation(seed: int | None, epoch: int, n: int) -> np.ndarray:
    """The order of n images in an epoch; the file's order if the seed is None."""
    if seed is None:
        return np.arange(n)
    return np.random.default_rng((seed, int(epoch))).permutation(n)


def load(name: str, directory: Path | str, train: bool) -> ImageDataset:
    """The training or test images of the data set `name`, one of NAMES or a folder's path.

    Data sets of torchvision are downloaded to `directory` if they are not there yet. Raises
    `UserError`, naming the file, if it is missing, damaged or of the wrong shape.
    """
    try:
        images = read(name, directory, train)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"the data set {name} does not fit in memory ({one_line(error)}): save its images with "
            "numpy.save, in C order, as train.npy and test.npy, of which only the images of a "
            "batch are read"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch has no read-only tensors
        tensor = torch.from_numpy(images).flatten(1)
    mapping = getattr(images, "_mmap", None)  # of numpy's memmap, which has no public name for it
    return ImageDataset(name, tensor, images.shape[1:], mapping)


def read(name: str, directory: Path | str, train: bool) -> np.ndarray:
    """As `load`, as an array (images, H, W) or (images, H, W, 3), uint8."""
    if name in TORCHVISION:
        return load_torchvision(name, directory, train)
    if name == "mnist-10k":
        return np.load(MNIST_10K)["train" if train else "test"]
    if name == "digits":
        return load_digits(train)
    if name == "imagenet64":
        file = "train_data.npy" if train else "val_data.npy"
        return load_array(Path(directory) / "imagenet-64x64" / file, shape=(64, 64, 3))
    return load_folder(Path(name), "train" if train else "test")


def load_matching(
    name: str, directory: Path | str, train: bool, shape: tuple[int, ...] | None
) -> ImageDataset:
    """The training or test images of the data set `name`. Their shape must be `shape`, that of a
    checkpoint (None for any)."""
    dataset = load(name, directory, train)
    if shape and dataset.image_shape != shape:
        raise UserError(
            f"--dataset {dataset.name} has images of {describe(dataset.image_shape)} and the "
            f"checkpoint's have {describe(shape)}: give a data set of that shape"
        )
    return dataset


def load_both(
    name: str, directory: Path | str, shape: tuple[int, ...] | None
) -> tuple[ImageDataset, ImageDataset]:
    """The training and the test images by `load_matching`; both must have one shape."""
    train, test = (load_matching(name, directory, split, shape) for split in (True, False))
    if train.image_shape != test.image_shape:
        raise UserError(
            f"--dataset {train.name} has training images of {describe(train.image_shape)} and "
            f"test images of {describe(test.image_shape)}: they must have one shape"
        )
    return train, test


def choose_name(given: str | None, stored: str | None, may_differ: bool = False) -> str:
    """The name or, for a folder, the absolute path of the data set that was given, else of the one
    that the checkpoint was trained on (`stored`, None without a checkpoint), else mnist.

    With `may_differ` a data set other than the stored one is reported; else it is a `UserError`,
    except for a folder, which may have moved.
    """
    if given and given not in NAMES and not Path(given).is_dir():
        raise UserError(f"--dataset {given} is neither a folder nor one of {', '.join(NAMES)}")
    names = [{"dataset": full_name(name)} if name else {} for name in (given, stored)]
    moved = None not in (given, stored) and not {given, stored} & set(NAMES)
    name = choose("dataset", *names, {"dataset": "mnist"}, may_change=may_differ or moved)
    if may_differ and stored and name != full_name(stored):
        say(f"the images are those of {name}; the model was trained on {stored}")
    return name


def full_name(name: str) -> str:
    """The name of a data set, or the absolute path of its folder."""
    return name if name in NAMES else str(Path(name).resolve())


def portable_name(name: str) -> str:
    """The name of a data set without the path of its folder."""
    return name if name in NAMES else f"./{Path(name).name}"


IDX_FILES = "{0}-images-idx3-ubyte and {0}-labels-idx1-ubyte"
MNIST_FILES = IDX_FILES.format("t10k"), IDX_FILES.format("train")
# Class in torchvision.datasets, folder under the data set directory, files of test and training.
TORCHVISION = {
    "mnist": ("MNIST", "MNIST/raw", MNIST_FILES),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw", MNIST_FILES),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", ("test_batch", "data_batch_1 to data_batch_5")),
}


def load_torchvision(name: str, directory: Path | str, train: bool) -> np.ndarray:
    import torchvision.datasets  # takes seconds, and only these data sets need it

    class_name, folder, files = TORCHVISION[name]
    dataset_class = getattr(torchvision.datasets, class_name)
    folder = Path(directory) / folder
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        return np.asarray(dataset_class(directory, train=train, download=True).data)
    except Exception as error:  # torchvision raises many types of exceptions
        if is_out_of_memory(error):
            raise
        reason = one_line(error, longest=1000)
        if is_downloaded(dataset_class, directory):
            raise UserError(
                f"{folder} cannot be read ({reason}): delete {files[train]} there "
                "to download them again"
            ) from None
        embedded = "; --dataset mnist-10k needs no download" if name == "mnist" else ""
        damaged = damaged_file(dataset_class, folder)
        problem = f"{damaged} is damaged" if damaged else f"{name} is not complete in {directory}"
        raise UserError(
            f"{problem} and the download failed ({reason}): fetch "
            f"{', '.join(addresses(dataset_class))} on a machine with a network and put "
            f"{'them, unpacked,' if name != 'cifar10' else 'its unpacked files'} in {folder}, "
            f"or give --dataset_directory{embedded}"
        ) from None
    finally:
        for path in new_folders:
            with suppress(OSError):  # it holds the downloaded files
                path.rmdir()


def is_downloaded(dataset_class: type, directory: Path | str) -> bool:
    """Whether torchvision finds all files and so would not download them."""
    try:
        dataset_class(directory, download=False)
    except RuntimeError as error:
        return "not found" not in str(error)
    except Exception:
        pass
    return True


def damaged_file(dataset_class: type, folder: Path) -> Path | None:
    """The first file of CIFAR-10 whose checksum differs from torchvision's, or None."""
    from torchvision.datasets.utils import check_integrity

    if not hasattr(dataset_class, "train_list"):
        return None  # for MNIST, torchvision has checksums of the compressed files only
    for name, md5 in dataset_class.train_list + dataset_class.test_list:
        if (folder / name).exists() and not check_integrity(folder / name, md5):
            return folder / name
    return None


def addresses(dataset_class: type) -> list[str]:
    """Where torchvision downloads a data set from."""
    if hasattr(dataset_class, "url"):
        return [dataset_class.url]
    return [dataset_class.mirrors[0] + file for file, _ in dataset_class.resources]


def load_digits(train: bool) -> np.ndarray:
    """1,797 handwritten digits of 8x8, embedded here; every sixth is a test image."""
    images = np.load(EMBEDDED / "digits.npz")["images"]
    test = np.arange(len(images)) % 6 == 0
    return images[~test if train else test]


def load_folder(folder: Path, split: str) -> np.ndarray:
    """train.npy and test.npy, or folders train/ and test/ of image files, under `folder`."""
    if not folder.is_dir():
        raise UserError(f"the data set's folder {folder} does not exist: give it with --dataset")
    array, images = folder / f"{split}.npy", folder / split
    if os.path.lexists(array):
        if images.is_dir():
            say(f"{array} is read, and not the folder {images}")
        return load_array(array)
    if images.is_dir():
        return load_image_files(images)
    raise UserError(
        f"the data set {folder} has neither {split}.npy nor a folder {split}: "
        "it needs train.npy and test.npy, which prepare.py makes of pictures, or train/ and test/ "
        "with image files"
    )


def load_array(path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """The images of a .npy file, memory-mapped: only the pages that are used are read. An array in
    Fortran order, where an image is spread over the whole file, is copied into memory."""
    check_is_file(path)
    try:
        # Read-only: writable pages count as used memory, and the file may be larger than that.
        with np.errstate(over="ignore"):  # a damaged header may have huge sizes
            array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy raises many types for damaged headers
        raise UserError(
            f"{path} cannot be read as a numpy array ({one_line(error)}): "
            "save one uint8 array there with numpy.save"
        ) from None
    if array.dtype != np.uint8:
        raise UserError(f"{path} holds {array.dtype}: the images must be uint8 (0 to 255)")
    if not array.flags.c_contiguous:
        mapped, array = array, allocate(array.shape)
        np.copyto(array, mapped)
    if shape and array.shape[1:] == (np.prod(shape),):
        array = array.reshape(-1, *shape)
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim not in (3, 4) or array.shape[3:] not in ((), (3,)):
        raise UserError(
            f"{path} has the shape {array.shape}: it must be (images, height, width) "
            "or (images, height, width, 3)"
        )
    if shape and array.shape[1:] != shape:
        raise UserError(f"{path} has images of {array.shape[1:]}: they must be {shape}")
    if len(array) == 0 or array[0].size < 2:
        raise UserError(f"{path} has the shape {array.shape}: it holds no images")
    return array


def write_array(file: BinaryIO, images: np.ndarray) -> None:
    """Write an array for `load_array`, as numpy.save does, which hides why a disk refuses it."""
    images = np.ascontiguousarray(images)
    header = np.lib.format.header_data_from_array_1_0(images)
    np.lib.format.write_array_header_1_0(file, header)
    file.write(images.data)
