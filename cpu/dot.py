"""Whether this CPU should multiply bfloat16 numbers in pairs: dot.cpp."""

from functools import cache

import torch

from cpu.build import load_library

# The source and its sizes.
COMPARISON = "dot.cpp", {"BF16": 1, "DOT": 1, "WEIGHT_BYTES": 0}


@cache
def multiplies_pairs() -> bool:
    """Whether the instruction for pairs is there and fast, which is measured once. Raises
    `UserError` if nothing can be compiled."""
    library, _ = load_library(*COMPARISON)
    faster = torch.empty(1, dtype=torch.int64)
    library.call("compare", faster)
    return bool(faster)
