"""docs/tour.ipynb runs, and its stored outputs are up to date. To store new ones:
jupyter execute --inplace docs/tour.ipynb"""

import base64
import copy
from itertools import chain

import imageio.v3
import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

TOUR = ROOT / "docs" / "tour.ipynb"


@pytest.fixture(scope="module")
def notebooks():
    """The notebook as it is stored, and executed again in the folder of the documents."""
    stored = nbformat.read(TOUR, as_version=4)
    nbformat.validate(stored)
    executed = copy.deepcopy(stored)
    place = {"metadata": {"path": str(TOUR.parent)}}
    NotebookClient(executed, timeout=120, kernel_name="python3", resources=place).execute()
    return stored, executed


def texts(notebook):
    """What each cell prints."""
    return [
        "".join(output.text for output in cell.get("outputs", []) if output.output_type == "stream")
        for cell in notebook.cells
    ]


def pictures(notebook):
    """The PNG images of each cell."""
    return [
        [
            imageio.v3.imread(base64.b64decode(output.data["image/png"]))
            for output in cell.get("outputs", [])
            if output.output_type != "stream"
        ]
        for cell in notebook.cells
    ]


def test_it_prints_what_is_stored(notebooks):
    stored, executed = map(texts, notebooks)
    assert executed == stored
    assert sum(map(bool, stored)) >= 6
    assert "equal at all positions: True" in "".join(stored)


def test_its_pictures_are_stored(notebooks):
    """Another version of matplotlib may draw them a little differently."""
    stored, executed = map(pictures, notebooks)
    assert list(map(len, stored)) == list(map(len, executed))
    shown = list(chain.from_iterable(stored))
    assert len(shown) == 5
    assert all(picture.std() > 10 for picture in shown)


def test_its_cells_are_short_and_explained(notebooks):
    kinds = [cell.cell_type for cell in notebooks[0].cells]
    assert kinds[:-1] == ["markdown", "code"] * kinds.count("code")
    lengths = [cell.source.count("\n") + 1 for cell in notebooks[0].cells]
    assert max(lengths) <= 24
