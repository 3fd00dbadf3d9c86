"""Runs main.py again and again, killing it (SIGKILL) at random moments, then lets it finish.

python tests/killing.py KILLS ARGUMENTS...    prints how often it was killed

Each run is a fork of this process, which has imported torch, so that it starts at once.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch._dynamo  # noqa: F401 - the optimisers import it, which would delay each start

import main
from cli.process import run


def start(arguments):
    child = os.fork()
    if child == 0:
        sys.argv = ["main.py", *arguments]
        run(main.main)
    return child


def kill_until_done(kills, arguments):
    """How many times a running process was killed, at most `kills`; then the run has finished."""
    pattern = Path(arguments[arguments.index("--save_to") + 1].replace("{}", "*"))
    moments, seconds = random.Random(0), 0.5
    for killed in range(kills):
        before = sorted(pattern.parent.glob(pattern.name))
        child = start(arguments)
        time.sleep(moments.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        if os.WIFEXITED(os.waitpid(child, 0)[1]):
            return killed
        # Adapts to the machine, so that about two thirds of the processes live long enough to save.
        seconds *= 1.25 if sorted(pattern.parent.glob(pattern.name)) == before else 0.9
    status = os.waitpid(start(arguments), 0)[1]
    assert status == 0, status
    return kills


if __name__ == "__main__":
    print("killed", kill_until_done(int(sys.argv[1]), sys.argv[2:]))
