"""Every data set as one uint8 tensor of shape (images, bytes), with the shape of an image."""

import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from options import choose
from utils import UserError, device_memory, one_line, say, to_device

NAMES = ("mnist", "fashion-mnist", "cifar10", "imagenet64", "mnist-10k", "digits")
EMBEDDED = Path(__file__).parent / "digits"
MNIST_10K = EMBEDDED / "mnist-10k.npz"
# A GPU keeps a data set that takes at most this fraction of its memory.
RESIDENT = 0.1


@dataclass(frozen=True)
class ImageDataset:
    """Images as bytes r1 g1 b1 r2 ..., row by row; shape (H, W) or (H, W, 3)."""

    name: str
    images: torch.Tensor  # (images, bytes), uint8
    image_shape: tuple

    def __len__(self):
        return len(self.images)

    def first_byte_counts(self):
        """How often each byte is the first of an image, (256,), int64."""
        return torch.bincount(self.images[:, 0].long(), minlength=256)

    def batch(self, iteration, batch_size, seed):
        """The images (batch_size, bytes) of a training iteration, counted from 0.

        A function of its arguments alone, so a restart continues exactly where the run stopped:
        batches are consecutive parts of an endless sequence of permutations, one per epoch, each
        drawn from (seed, epoch). Without a seed the order is the file's.
        """
        n = len(self)
        positions = np.arange(iteration * batch_size, (iteration + 1) * batch_size)
        epochs, places = positions // n, positions % n
        order = [
            permutation(seed, epoch, n)[places[epochs == epoch]] for epoch in np.unique(epochs)
        ]
        order = torch.from_numpy(np.concatenate(order))
        return self.images[to_device(order, self.images.device)]

    def resident(self, device):
        """The same data set with its images in the memory of a GPU, if they are few enough, so that
        only the order of a batch has to be copied there."""
        if device.type == "cpu" or self.images.nbytes > RESIDENT * device_memory(device):
            return self
        return replace(self, images=self.images.to(device))


@lru_cache(maxsize=2)
def permutation(seed, epoch, n):
    """The order of n images in an epoch; the file's order if the seed is None."""
    if seed is None:
        return np.arange(n)
    return np.random.default_rng((seed, int(epoch))).permutation(n)


def load(name, directory, train):
    """The training or test images of the data set `name`, one of NAMES or a folder's path.

    Data sets of torchvision are downloaded to `directory` if they are not there yet. Raises
    `UserError`, naming the file, if it is missing, damaged or of the wrong shape.
    """
    if name in TORCHVISION:
        images = load_torchvision(name, directory, train)
    elif name == "mnist-10k":
        images = torch.from_numpy(np.load(MNIST_10K)["train" if train else "test"])
    elif name == "digits":
        images = load_digits(train)
    elif name == "imagenet64":
        file = "train_data.npy" if train else "val_data.npy"
        images = load_array(Path(directory) / "imagenet-64x64" / file, shape=(64, 64, 3))
    else:
        images = load_folder(Path(name), "train" if train else "test")
    return ImageDataset(name, images.flatten(1), tuple(images.shape[1:]))


def load_matching(name, directory, train, shape):
    """The training or test images of the data set `name`. Their shape must be `shape`, that of a
    checkpoint (None for any)."""
    dataset = load(name, directory, train)
    if shape and dataset.image_shape != shape:
        raise UserError(
            f"--dataset {dataset.name} has images of {describe(dataset.image_shape)} and the "
            f"checkpoint's have {describe(shape)}: give a data set of that shape"
        )
    return dataset


def load_both(name, directory, shape):
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


def portable_name(name):
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


def load_torchvision(name, directory, train):
    import torchvision.datasets  # takes seconds, and only these data sets need it

    class_name, folder, files = TORCHVISION[name]
    dataset_class = getattr(torchvision.datasets, class_name)
    folder = Path(directory) / folder
    try:
        return torch.as_tensor(dataset_class(directory, train=train, download=True).data)
    except Exception as error:  # torchvision raises many types of exceptions
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


def is_downloaded(dataset_class, directory):
    """Whether torchvision finds all files and so would not download them."""
    try:
        dataset_class(directory, download=False)
    except RuntimeError as error:
        return "not found" not in str(error)
    except Exception:
        pass
    return True


def damaged_file(dataset_class, folder):
    """The first file of CIFAR-10 whose checksum differs from torchvision's, or None."""
    from torchvision.datasets.utils import check_integrity

    if not hasattr(dataset_class, "train_list"):
        return None  # for MNIST, torchvision has checksums of the compressed files only
    for name, md5 in dataset_class.train_list + dataset_class.test_list:
        if (folder / name).exists() and not check_integrity(folder / name, md5):
            return folder / name
    return None


def addresses(dataset_class):
    """Where torchvision downloads a data set from."""
    if hasattr(dataset_class, "url"):
        return [dataset_class.url]
    return [dataset_class.mirrors[0] + file for file, _ in dataset_class.resources]


def load_digits(train):
    """1,797 handwritten digits of 8x8, embedded here; every sixth is a test image."""
    images = np.load(EMBEDDED / "digits.npz")["images"]
    test = np.arange(len(images)) % 6 == 0
    return torch.from_numpy(images[~test if train else test])


def mnist_10k_labels():
    """The labels (10000,), int64, of the training images of mnist-10k."""
    return torch.from_numpy(np.load(MNIST_10K)["train_labels"]).long()


def load_folder(folder, split):
    """train.npy and test.npy, or folders train/ and test/ of image files, under `folder`."""
    if not folder.is_dir():
        raise UserError(f"the data set's folder {folder} does not exist: give it with --dataset")
    if (folder / f"{split}.npy").exists():
        return load_array(folder / f"{split}.npy")
    if (folder / split).is_dir():
        return load_image_files(folder / split)
    raise UserError(
        f"the data set {folder} has neither {split}.npy nor a folder {split}: "
        "it needs train.npy and test.npy, or train/ and test/ with image files"
    )


def load_array(path, shape=None):
    """The images of a .npy file, memory-mapped: only the pages that are used are read."""
    try:
        # Read-only: writable pages count as used memory, and the file may be larger than that.
        with np.errstate(over="ignore"):  # a damaged header may have huge sizes
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: put the images there as a numpy array") from None
    except Exception as error:  # numpy raises many types for damaged headers
        reason = one_line(error)
        raise UserError(f"{path} cannot be read as a numpy array ({reason})") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is an archive: save one array there with numpy.save")
    if array.dtype != np.uint8:
        raise UserError(f"{path} holds {array.dtype}: the images must be uint8 (0 to 255)")
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch has no read-only tensors
        return torch.from_numpy(array)


def load_image_files(folder):
    """All image files below `folder`, in the order of their names; hidden files are ignored."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise UserError(f"{folder} holds no image files")
    images = np.empty((0,))
    for i, path in enumerate(files):
        image = read_image(path)
        if i == 0:
            images = np.empty((len(files), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise UserError(
                f"{path} is {describe(image.shape)} but {files[0]} is "
                f"{describe(images.shape[1:])}: all images must have one size"
            )
        images[i] = image
    return torch.from_numpy(images)


def read_image(path):
    """An image file as uint8, (H, W) or (H, W, 3)."""
    import imageio.v3

    try:
        image = imageio.v3.imread(path, plugin="pillow")
    except Exception as error:  # each of imageio's readers raises other types
        reason = one_line(error)
        raise UserError(f"{path} cannot be read as an image ({reason})") from None
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise UserError(
            f"{path} is {describe(image.shape)}, {image.dtype}: "
            "convert it to grey or RGB with 8 bits per channel"
        )
    return image


def describe(shape):
    return "x".join(map(str, shape))
