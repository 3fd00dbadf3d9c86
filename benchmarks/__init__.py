import signal
import sys

if sys.argv[0] == "-m":  # python -m benchmarks.x is about to import torch
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while it does: no traceback
