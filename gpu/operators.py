"""Functions that launch kernels, made known to torch.compile."""

from collections.abc import Callable
from functools import wraps

import torch


def operator(*written: str) -> Callable:
    """Decorates a function that returns nothing and writes to the tensors that are named here; its
    arguments have types. torch.compile keeps its call as one operator and does not look inside.

    Called directly otherwise, since an operator takes some ten microseconds of Python to dispatch.
    """

    def decorate(function):
        name = f"image_transformers::{function.__name__}"
        opaque = torch.library.custom_op(name, function, mutates_args=written)

        @wraps(function)
        def call(*arguments):
            return (opaque if torch.compiler.is_compiling() else function)(*arguments)

        return call

    return decorate
