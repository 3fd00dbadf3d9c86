"""Several processes that work as one: started by torchrun, joined by torch.distributed.

Every function here does nothing, or the plain thing, in a process that runs alone.
"""

import gc
import os
import warnings
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from utils import UserError


@contextmanager
def joined(device):
    """Join the processes that torchrun started; leave them at the end. Raises ConnectionError
    where one of them is lost."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo carries what processors agree upon, NCCL the gradients of GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ConnectionError(f"another process is gone ({reason})") from None
    finally:
        gc.collect()  # a parallel model that outlived its group would end the process in abort()
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(n):
    """The part of n things that is this process's, a slice: the parts differ by one at most."""
    return slice(n * rank() // world(), n * (rank() + 1) // world())


def total(*numbers):
    """The sums of numbers over all processes."""
    if world() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return tuple(sums.tolist())


def add_up(tensor):
    """Replace a tensor by its sum over all processes."""
    if world() > 1:
        dist.all_reduce(tensor)


def any_of(flag):
    """Whether the flag is set in one of the processes."""
    return bool(flag) if world() == 1 else total(float(bool(flag)))[0] > 0


def gather(tensor):
    """The tensors of all processes, one after the other, in the first process; None elsewhere."""
    if world() == 1:
        return tensor
    parts = [None] * world() if rank() == 0 else None
    dist.gather_object(tensor, parts)
    return torch.cat(parts) if rank() == 0 else None


def check_agreement(what, value):
    """A `UserError` where the processes have different values, as where folders are not shared."""
    values = [value]
    if world() > 1:
        values = [None] * world()
        dist.all_gather_object(values, value)
    if len(set(values)) > 1:
        raise UserError(f"the processes differ in {what}: {values}; they must see the same files")


@contextmanager
def first_process_first():
    """Lets the first process of each machine do alone what the others then find done."""
    waits = world() > 1 and os.environ.get("LOCAL_RANK") != "0"
    if waits:
        dist.barrier()
    yield
    if world() > 1 and not waits:
        dist.barrier()


def parallel(module, device, find_unused=False):
    """The module with gradients averaged over the processes."""
    if world() == 1:
        return module
    ids = [device] if device.type == "cuda" else None
    options = {"broadcast_buffers": False, "find_unused_parameters": find_unused}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch rename an option
        return DistributedDataParallel(module, device_ids=ids, **options)


def without_exchange(module, wanted=True):
    """The context of a backward pass whose gradients are not averaged yet."""
    return module.no_sync() if wanted and world() > 1 else nullcontext()
