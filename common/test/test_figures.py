"""A figure's Chinese is drawn with a font that has it, or a note says that none here has."""

import warnings

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import font_manager, pyplot

from common.run import figures

RARE = "\u1d81"  # matplotlib brings a font that has it, beside its usual one


def drawn(text: str) -> np.ndarray:
    with figures.fonts_for([text]):
        figure = pyplot.figure(figsize=(1, 1))
        figure.text(0.2, 0.3, text, fontsize=40)
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba()).copy()
        pyplot.close(figure)
    return pixels


def test_a_font_that_has_the_script_is_taken_and_one_that_is_missing_is_told(monkeypatch, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(figures, "WIDE_FONTS", ())
        box = drawn(RARE)
        assert f"no font here has {RARE}: boxes in the picture" in capsys.readouterr().out
        monkeypatch.setattr(figures, "WIDE_FONTS", ("Not Installed", "STIXGeneral"))
        assert not np.array_equal(drawn(RARE), box)
        assert capsys.readouterr().out == ""
        drawn("plain words")
    assert capsys.readouterr().out == ""


def test_a_font_installed_after_matplotlib_listed_its_fonts_is_found(monkeypatch, capsys):
    manager = font_manager.fontManager
    wide = next(font.fname for font in manager.ttflist if font.fname.endswith("STIXGeneral.ttf"))
    monkeypatch.setattr(figures, "WIDE_FONTS", ("STIXGeneral",))
    seen = drawn(RARE)
    monkeypatch.setattr(manager, "ttflist", [font for font in manager.ttflist if font.name != "STIXGeneral"])
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    assert not np.array_equal(drawn(RARE), seen)
    assert "no font here has" in capsys.readouterr().out
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [wide, __file__])  # this file is none
    assert np.array_equal(drawn(RARE), seen)
    assert capsys.readouterr().out == ""
