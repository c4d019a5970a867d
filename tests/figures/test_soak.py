"""Every kill is a mark at the step it came at."""

from dnntk.figures.soak import soak_figure


def test_every_kill_is_a_mark():
    killed_by = ("SIGKILL", None), ("SIGKILL", None), ("SIGKILL", "SIGTERM")
    rows = [
        {"good": number != 1, "kills": len(kinds) - kinds.count(None)}
        | {"sittings": [{"step": 3 + i, "killed_by": kind} for i, kind in enumerate(kinds)]}
        for number, kinds in enumerate(killed_by)
    ]
    (axes,) = soak_figure(rows, 9).axes
    killed, stopped = axes.lines
    assert killed.get_xydata().tolist() == [[0, 3], [1, 3], [2, 3]]
    assert stopped.get_xydata().tolist() == [[2, 4]]
    assert axes.get_title() == "3 runs, 4 kills, 1 wrong"
