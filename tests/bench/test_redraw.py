"""`python -m bench figures`: every figure of the docs, from the committed rows."""

from __future__ import annotations

import pytest
from figure_texts import drawn_texts
from matplotlib.image import imread
from typer.testing import CliRunner

from bench.__main__ import app
from bench.redraw import DRAWINGS
from bench.results import FIGURES, FOLDER

_EACH = [
    # the sum of its tensors is computed at three lengths: a minute on a busy machine
    pytest.param(name, marks=pytest.mark.slow) if name == "longcontext.png" else name
    for name in DRAWINGS
]


@pytest.mark.parametrize("name", _EACH)
def test_a_committed_figure_is_drawn_again_and_readable(name, tmp_path):
    assert (FIGURES / name).exists()
    with drawn_texts() as texts:
        DRAWINGS[name](FOLDER, tmp_path / "new" / name)
    assert max(map(len, texts)) > 100  # a caption
    pixels = imread(tmp_path / "new" / name)
    assert pixels.shape[1] == 1600  # twice the width of a README
    edge = pixels[[0, -1], :, :3], pixels[:, [0, -1], :3]
    assert all((side == 1.0).all() for side in edge), "white, on a dark page too"
    assert pixels[..., :3].std() > 0.05  # something is drawn
    assert pixels.shape[2] == 3 or (pixels[..., 3] == 1.0).all()


def test_the_command_draws_all_of_them(monkeypatch, tmp_path):
    monkeypatch.setattr("bench.redraw.DRAWINGS", {"growth.png": DRAWINGS["growth.png"]})
    done = CliRunner().invoke(app, ["figures", "--to", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0 and "growth.png" in done.output.replace("\n", "")
    assert [file.name for file in tmp_path.iterdir()] == ["growth.png"]


def test_texts_on_one_another_or_cut_off_are_found(tmp_path):
    from matplotlib.figure import Figure

    for places in ((0.5, 0.5), (0.5, 0.99)):
        figure = Figure(figsize=(4, 3))
        for number, x in enumerate(places):
            figure.text(x, 0.5 - 0.3 * (places[0] != places[1]) * number, "a text")
        with drawn_texts(), pytest.raises(AssertionError, match=r"is on|is cut off"):
            figure.savefig(tmp_path / "x.png", dpi=100)
