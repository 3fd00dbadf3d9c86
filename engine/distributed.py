"""Data parallelism: processes started by torchrun and connected by torch.distributed.

In a single process every function here is trivial.
"""

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils import UserError, is_first_process, one_line


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Connect the processes of torchrun until the end. A lost one is a ConnectionError."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1":
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        # gloo for CPU tensors and objects, NCCL for the gradients on GPUs.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    except ValueError as error:  # the variable may be left over from another program
        problem = f"WORLD_SIZE is {world}, but torchrun's other variables are not valid ("
        raise UserError(f"{problem}{one_line(error)}): use torchrun, or unset WORLD_SIZE") from None
    try:
        yield
    except RuntimeError as error:  # torch has no class for the errors of gloo
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise ConnectionError(f"another process has ended ({one_line(error)})") from None
    finally:
        gc.collect()  # a DistributedDataParallel that outlives its group aborts
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(n: int) -> slice:
    """This process's part of n items, a slice; the parts' sizes differ by at most one."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def total(*numbers: float) -> list[float]:
    """The sums of numbers over all processes."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    all_reduce(sums)
    return sums.tolist()


def all_reduce(tensor: torch.Tensor) -> None:
    """Replace a tensor by its sum over all processes."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def any_of(flag: Any) -> bool:
    """Whether the flag is set in any process."""
    return total(bool(flag))[0] > 0


def gather(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensors of all processes, concatenated, in the first process; None in the others."""
    if world_size() == 1:
        return tensor
    parts = [None] * world_size() if is_first_process() else None
    dist.gather_object(tensor, parts)
    return torch.cat(parts) if parts else None


def check_agreement(what: str, value: Any) -> None:
    """Raise a `UserError` if processes have different values, as with folders of their own."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    if len(set(values)) > 1:
        raise UserError(f"the processes differ in {what}: {values}; they must see the same files")


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process of each machine runs first, to do work once (such as a download)."""
    waits = world_size() > 1 and os.environ.get("LOCAL_RANK") != "0"
    if waits:
        dist.barrier()
    yield
    if world_size() > 1 and not waits:
        dist.barrier()


def parallel(module: nn.Module, device: torch.device, find_unused: bool = False) -> nn.Module:
    """The module, with its gradients averaged over the processes."""
    if world_size() == 1:
        return module
    ids = [device] if device.type == "cuda" else None
    options = {"broadcast_buffers": False, "find_unused_parameters": find_unused}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases of torch rename an option
        return DistributedDataParallel(module, device_ids=ids, **options)


def no_sync(module: nn.Module, enabled: bool = True) -> AbstractContextManager:
    """The context of a backward pass whose gradients are not averaged yet."""
    return module.no_sync() if enabled and world_size() > 1 else nullcontext()
