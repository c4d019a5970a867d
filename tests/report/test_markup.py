"""No text of a file becomes markup."""

from report_pages import EVIL, Page, png, write

from dnntk.report import write_report


def test_nothing_in_a_file_or_its_name_becomes_markup(tmp_path):
    name = EVIL.replace("/", "\u2215")
    run = write(
        tmp_path / "runs" / name,
        config={EVIL: EVIL, "arch": EVIL, "depth": [EVIL], "dataset": EVIL, "classes": EVIL},
        summary={EVIL: {EVIL: EVIL}, "rows": [{EVIL: EVIL}], "train_loss": EVIL},
        metrics=[{"step": i, "train_loss": 1.0 + i, EVIL: EVIL} for i in range(3)],
        bench={"benchmark": EVIL, "rows": [{"what": EVIL, "median": 1, "unit": EVIL}]},
    )
    (run / f"{name}.png").write_bytes(png())
    (run / "javascript:alert(1).pdf").write_bytes(b"%PDF")
    (run / f"{name}.pdf").write_bytes(b"%PDF")
    page = Page(write_report([tmp_path], tmp_path, heading=EVIL, progress=False))
    assert page.words.count(EVIL) > 10 and len(page.images) == 1
    allowed = {"class", "id", "href", "src", "alt", "width", "height", "aria-label", "role", "open"}
    allowed |= {"scope", "tabindex", "lang", "charset", "http-equiv", "content", "name"}
    drawn = {"viewbox", "d", "x", "y", "text-anchor", "transform"}
    assert {key for _, attributes in page.elements for key in attributes} <= allowed | drawn
