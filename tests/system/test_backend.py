"""--backend fast-transformers through the command line: interchangeable with the native layers."""

import imageio.v3
import numpy as np
import pytest
from helpers import DIGITS, records, require_library

OTHER = ["--backend", "fast-transformers"]


@pytest.fixture(autouse=True)
def library():
    require_library()


@pytest.mark.parametrize("attention_type", ["causal-linear", "full"])
@pytest.mark.parametrize("first", [[], OTHER], ids=["native-first", "theirs-first"])
def test_a_checkpoint_of_one_backend_continues_in_the_other(
    attention_type, first, succeed, tmp_path
):
    """Both give the same bits/dim and, from the same seed, the same images."""
    second = [] if first else OTHER
    train = ["main.py", *DIGITS, "--attention_type", attention_type, "--iterations", 6]
    succeed(*train, *first, "--save_to", "w.{}.pth")
    images = {}
    for name, backend in {"first": first, "second": second}.items():
        evaluate = ["main.py", "--continue_from", "w.6.pth", "--evaluate_only", *backend]
        succeed(*evaluate, "--metrics_file", f"{name}.jsonl")
        sample = ["prediction.py", "w.6.pth", "--index", "0-3", "--offset", 20, "--recurrent"]
        succeed(*sample, *backend, "--save_image", f"{name}.{{}}.{{}}.png")
        files = sorted(tmp_path.glob(f"{name}.pred.*.png"))
        images[name] = np.stack([imageio.v3.imread(path) for path in files])
    bits = [records(f"{name}.jsonl")[-1]["bits_per_dim"] for name in ("first", "second")]
    assert abs(bits[0] - bits[1]) < 1e-4
    assert np.array_equal(images["first"], images["second"])
    succeed(*train, *second, "--continue_from", "w.6.pth", "--iterations", 8)


def test_the_reformer_trains_and_samples(call, succeed, tmp_path):
    reformer = [*OTHER, "--attention_type", "reformer"]
    flags = ["--bits", 4, "--rounds", 2, "--chunk_size", 8, "--unmasked_reformer"]
    succeed("main.py", *DIGITS, *reformer, *flags, "--iterations", 3, "--save_to", "r.pth")
    succeed("prediction.py", "r.pth", *OTHER, "--offset", 50, "--save_grid", "r.png")
    assert (tmp_path / "r.png").exists()
    for extra, names in ((["--recurrent", *OTHER], "no recurrent form"), ([], "--backend")):
        result = call("prediction.py", "r.pth", *extra)
        assert result.status == 2
        assert names in result.err


@pytest.mark.parametrize(
    ("flags", "names"),
    [(["--compile"], "--compile"), (["--precision", "bf16"], "fp32")],
    ids=["compile", "bf16"],
)
def test_what_the_library_cannot_do_is_refused(call, flags, names):
    result = call("main.py", *DIGITS, *OTHER, *flags)
    assert result.status == 2
    assert names in result.err
