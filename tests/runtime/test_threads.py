"""Products on threads of our own."""

import threading

import numpy as np
import pytest
import threadpoolctl

from dnntk.runtime import threads


def limits():
    pools = threadpoolctl.threadpool_info()
    return {pool["num_threads"] for pool in pools if pool["user_api"] == "blas"}


def test_every_row_is_taken_once_in_order():
    for m in (0, 1, threads.ROWS_A_CORE, 7 * threads.ROWS_A_CORE + 3):
        parts = threads.by_rows(m, np.arange(m).__getitem__)
        assert np.array_equal(np.concatenate(parts), np.arange(m))


def test_blas_takes_one_thread_meanwhile_and_as_many_as_before_afterwards():
    before = limits()
    with threads.one_blas_thread():
        assert limits() == {1}
        assert set().union(*threads.on_cores(lambda _: limits(), range(3))) == {1}
        assert limits() == {1}
    assert limits() == before


def test_the_last_of_several_threads_out_restores_what_the_first_found():
    before = limits()
    turn = threading.Barrier(2, timeout=30)
    seen = []

    def other():
        with threads.one_blas_thread():
            turn.wait()
            turn.wait()  # the first is out
            seen.append(limits())

    thread = threading.Thread(target=other)
    with threads.one_blas_thread():
        thread.start()
        turn.wait()
    turn.wait()
    thread.join()
    assert seen == [{1}]
    assert limits() == before


def test_an_error_of_one_core_is_raised_and_leaves_the_others_usable():
    def fail(rows):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        threads.by_rows(10, fail)
    assert threads.on_cores(abs, [-1, -2]) == [1, 2]
