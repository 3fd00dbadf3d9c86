"""--export: a checkpoint without the optimiser's moments, to be passed on."""

import re

import pytest
import torch
from helpers import TINY, load

from models import ImageTransformer, ModelConfig

AT_ZERO = "the checkpoint has no moments of the optimiser: they start at zero\n"


@pytest.fixture(params=["tiny_checkpoint", "fast_checkpoint"])
def exported(request, succeed, tmp_path):
    """A checkpoint of each recipe, and the path of its export."""
    source = request.getfixturevalue(request.param)
    out = succeed("main.py", "--continue_from", source, "--export", "weights/w.pth").out
    assert "wrote weights/w.pth" in out
    return source, tmp_path / "weights" / "w.pth"


def evaluation(succeed, path):
    flags = ["--evaluate_only", "--evaluate_images", 20]
    return re.search(r"test .*", succeed("main.py", "--continue_from", path, *flags).out)[0]


def test_an_export_has_all_entries_but_the_moments(exported):
    before, after = (load(path) for path in exported)
    assert after.keys() == before.keys()
    groups = after["optimizer_state"].pop("param_groups")
    assert groups == before["optimizer_state"].pop("param_groups")
    assert before.pop("optimizer_state")["state"]
    assert after.pop("optimizer_state") == {"state": {}}
    weights, expected = after.pop("model_state"), before.pop("model_state")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert torch.equal(after.pop("first_byte_counts"), before.pop("first_byte_counts"))
    assert after == before


def test_an_export_is_as_large_as_its_weights(exported):
    size = sum(w.numel() * 4 for w in load(exported[1])["model_state"].values())
    assert exported[1].stat().st_size < size + 60_000  # names, settings and padding
    assert exported[1].stat().st_size < 0.75 * exported[0].stat().st_size


def test_an_export_is_evaluated_and_sampled_as_its_checkpoint(exported, succeed, tmp_path):
    assert evaluation(succeed, exported[0]) == evaluation(succeed, exported[1])
    for name, path in zip("ab", exported, strict=True):
        flags = ["--offset", 20, "--save_image", f"{name}.{{}}.{{}}.png"]
        assert "start at zero" not in succeed("prediction.py", path, *flags).out
    images = [(tmp_path / f"{name}.pred.0.png").read_bytes() for name in "ab"]
    assert images[0] == images[1]


def test_a_run_that_continues_from_an_export_says_that_moments_start_at_zero(exported, succeed):
    flags = ["--iterations", 40, "--evaluate_images", 2, "--save_to"]
    out = succeed("main.py", "--continue_from", exported[1], *flags, "next.pth").out
    assert out.count(AT_ZERO) == 1
    moments = load("next.pth")["optimizer_state"]["state"].values()
    start = load(exported[0])["iteration"]
    assert {int(each["step"]) for each in moments if "step" in each} == {40 - start}
    assert AT_ZERO not in succeed("main.py", "--continue_from", exported[0], *flags, "own.pth").out


def test_an_export_loads_as_the_original_loads_checkpoints(succeed, tiny_checkpoint):
    """It gives the state of the optimiser to load_state_dict, and then takes steps."""
    succeed("main.py", "--continue_from", tiny_checkpoint, "--export", "w.pth")
    data = torch.load("w.pth", map_location="cpu")
    model = ImageTransformer(ModelConfig(**data["config"]))
    model.load_state_dict(data["model_state"])
    optimizer = torch.optim.RAdam(model.parameters())
    optimizer.load_state_dict(data["optimizer_state"])
    model.nll(torch.zeros(1, 64, dtype=torch.int64)).sum().backward()
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 1


def test_a_damaged_export_is_refused(call, exported):
    """An export has the optimizer_state, without moments: a file that lacks it is not one of ours.
    torch itself loads a flipped bit as another weight."""
    content = load(exported[1])
    del content["optimizer_state"]
    torch.save(content, "w.pth")
    result = call("main.py", "--continue_from", "w.pth")
    assert (result.status, "no optimizer_state" in result.err) == (2, True)
    weight = content["model_state"]["predictor.weight"].numpy().tobytes()
    content = bytearray(exported[1].read_bytes())
    content[content.index(weight)] ^= 1
    exported[1].write_bytes(content)
    result = call("prediction.py", exported[1])
    assert (result.status, "checksum" in result.err) == (2, True)


def test_an_export_replaces_exports_only(exported, call, succeed, tmp_path):
    """Regression: it replaced any file, such as an earlier checkpoint, another program's weights or
    a README."""
    (tmp_path / "other.md").write_text("mine")
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pth")
    (tmp_path / "earlier.pth").write_bytes(exported[0].read_bytes())
    for name in ("other.md", "other.pth", "earlier.pth"):
        content = (tmp_path / name).read_bytes()
        result = call("main.py", "--continue_from", exported[0], "--export", name)
        assert (result.status, "would replace" in result.err) == (2, True)
        assert (tmp_path / name).read_bytes() == content
    (tmp_path / "empty.pth").touch()  # as mktemp makes it
    for name in ("empty.pth", exported[1]):
        succeed("main.py", "--continue_from", exported[0], "--export", name)


def test_the_newest_of_a_pattern_is_exported(succeed, tiny_checkpoint, tmp_path):
    (tmp_path / "t.30.pth").write_bytes(tiny_checkpoint.read_bytes())
    (tmp_path / "t.31.pth").write_bytes(b"damaged")
    out = succeed("main.py", "--continue_from", "t.{}.pth", "--export", "w.{}.pth").out
    assert "wrote w.30.pth" in out
    assert load("w.30.pth")["iteration"] == 30


def test_an_export_does_not_tell_where_a_folder_was(succeed, colour_folder, tmp_path):
    command = ["main.py", *TINY, "--dataset", colour_folder, "--iterations", 1]
    succeed(*command, "--save_to", "c.pth")
    succeed("main.py", "--continue_from", "c.pth", "--export", "w.pth")
    assert str(colour_folder.parent).encode() not in (tmp_path / "w.pth").read_bytes()
    assert load("w.pth")["dataset"]["name"] == f"./{colour_folder.name}"
    succeed("prediction.py", "w.pth", "--dataset", colour_folder)
    (tmp_path / colour_folder.name).symlink_to(colour_folder)
    assert "was trained on" not in succeed("prediction.py", "w.pth").out
