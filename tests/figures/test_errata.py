"""Each statement is a line with its three values."""

from dnntk.figures.errata import errata_figure


def test_every_statement_shows_what_is_printed_what_is_true_and_what_was_measured():
    rows = [
        {"statement": name, "setting": "d = 5", "depth": 1000, "printed": 2.0 + i}
        | {"corrected": 11.0 + i, "measured": 11.5 + i, "standard_error": 0.1}
        for i, name in enumerate(("Theorem 3.1", "Theorem 4.1"))
    ]
    (axes,) = errata_figure(rows).axes
    printed, corrected, measured = axes.lines[:3]
    for line, name in ((printed, "printed"), (corrected, "corrected"), (measured, "measured")):
        assert line.get_xdata().tolist() == [row[name] for row in rows]
        assert line.get_ydata().tolist() == [1, 0]  # the first statement on top
    ends = [segment[:, 0].tolist() for segment in axes.collections[0].get_segments()]
    assert ends == [[row["measured"] - 0.3, row["measured"] + 0.3] for row in rows]
    assert [text.get_text() for text in axes.texts] == [f"{r['statement']}\nd = 5" for r in rows]
