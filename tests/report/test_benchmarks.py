"""Measurements of the benchmark as a table of the report."""


def test_a_benchmark_is_a_table_with_its_peer_and_its_promise(made):
    _, page = made
    start = page.cells.index("step <1>")
    assert page.cells[start + 1 : start + 6] == [
        *("0.2 s [0.1, 0.4]", "PyTorch loop: 2 s [1, 4]", "0.1 x", "fast", "NO")
    ]
    assert "2 GB" in page.cells and "0 of 1 promises met" in page.cells
