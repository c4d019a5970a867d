"""What callers give as an array: the same numbers, or one line that says what is wrong."""

import decimal
import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dnntk.checks import check_count, check_deviation, checked_array, host_numbers, host_times
from dnntk.errors import InputError


class Foreign:
    """An array of another library's, which NumPy is not given."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("no numpy() of what requires grad.\nUse detach()")

    def __repr__(self):
        return "tensor([[1.,\n 2.]])"


class Frame:
    """A table with a column that holds missing numbers: NumPy sees objects."""

    def __init__(self, *values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.array([self.values], object)


class Missing:
    def __float__(self):
        raise TypeError("float() argument must be a real number, not 'NAType'")


GOOD = {
    "integers beyond int32": (np.array([[2**32, 1]]), [[2**32, 1]]),
    "unsigned integers": (np.array([[2**63 + 2**40]], np.uint64), [[2**63 + 2**40]]),
    "Python's integers beyond int64": ([[2**70, 1]], [[2**70, 1]]),
    "big-endian": (np.array([[1, 2.5]], ">f8"), [[1, 2.5]]),
    "big-endian integers": (np.array([[2**40, 2]], ">i8"), [[2**40, 2]]),
    "longdouble": (np.array([[1, 2.5]], np.longdouble), [[1, 2.5]]),
    "objects": (np.array([[1, fractions.Fraction(1, 2)]], object), [[1, 0.5]]),
    "decimals": ([[decimal.Decimal("0.5"), 2]], [[0.5, 2]]),
    "a table": (Frame(1, 2.5, True), [[1, 2.5, 1]]),
    "bools": (np.array([[True, False]]), [[1, 0]]),
    "half precision": (np.array([[0.5, 2]], np.float16), [[0.5, 2]]),
    "bfloat16": (np.array([[0.5, 2]], jnp.bfloat16), [[0.5, 2]]),
    "JAX's integers": (jnp.array([[3, -1]]), [[3, -1]]),
    "JAX's half precision": (jnp.array([[3, -1]], jnp.float16), [[3, -1]]),
    "lists of JAX's": ([[jnp.float32(1), 2]], [[1, 2]]),
    "a mask that hides nothing": (np.ma.array([[1.0, 2]], mask=[[0, 0]]), [[1, 2]]),
}
BAD = {
    "masked": (np.ma.array([[1.0, 2]], mask=[[0, 1]]), "masked.*filled"),
    "masked in a list": ([[1.0, 2], np.ma.array([1.0, 2], mask=[0, 1])], "masked.*filled"),
    "a masked number": ([[1.0, np.ma.masked]], "masked.*filled"),
    "another library's": (Foreign(), "numbers, got tensor.*detach"),
    "a missing number": (Frame(1, Missing()), "NAType"),
    "None": ([[1, None]], "NoneType"),
    "text": ([["1", "2"]], "numbers, got"),
    "text among objects": (np.array([["1", 2]], object), "str among"),
    "dates": (np.array([["2020-01-01"]], "M8[D]"), "datetime64"),
    "ragged": ([[1, 2], [3]], "numbers, got"),
    "records": (np.zeros((2, 1), "f4,f4"), "numbers, got"),
    "too large for a float": ([[10**400]], "too large"),
    "a longdouble beyond float64": (np.array([[np.longdouble("1e400")]]), "finite.*inf"),
    "complex": (np.array([[1j]]), "real"),
    "complex objects": (np.array([[1j, 1]], object), "real"),
    "random keys": (jax.random.key(0), "numbers, got"),
    "not finite": (np.full((40, 40), np.nan), "finite.*nan"),
    "a mapping": ({"a": 1}, "numbers, got"),
}


@pytest.mark.parametrize("name", GOOD)
def test_an_array_keeps_its_numbers_whatever_holds_them(name):
    value, expected = GOOD[name]
    found = checked_array("x", value)
    assert isinstance(found, jax.Array) and found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.array(expected, np.float32))
    host = host_numbers("x", value)
    assert host.dtype == np.float64 and not np.shares_memory(host, value)
    np.testing.assert_array_equal(host, np.array(expected, float))
    with jax.enable_x64(True):
        wide = checked_array("x", value)
        narrow = any(word in name for word in ("half", "float16", "lists of JAX's"))
        assert wide.dtype == (np.float32 if narrow else np.float64)
        np.testing.assert_array_equal(wide, np.array(expected, float))


@pytest.mark.parametrize("check", [checked_array, host_numbers])
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_array_of_numbers_gets_one_short_line(name, check):
    value, words = BAD[name]
    with pytest.raises(InputError, match=f"^x.*{words}") as caught:
        check("x", value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_a_number_beyond_float32_is_said_to_be_so():
    with pytest.raises(InputError, match=r"x must be finite in float32, got 1e\+300"):
        checked_array("x", np.array([[1, 1e300]]))
    with jax.enable_x64(True):
        assert checked_array("x", np.array([[1, 1e300]]))[0, 1] == 1e300


def test_integers_may_stay_such_where_jax_holds_them():
    kept = checked_array("x", np.array([[3, 2**31 - 1]]), keep_integers=True)
    assert kept.dtype == jnp.int32 and kept[0, 1] == 2**31 - 1
    with pytest.raises(InputError, match="x must be integers within int32, got 4294967296"):
        checked_array("x", np.array([[3, 2**32]]), keep_integers=True)
    assert checked_array("x", np.array([True]), keep_integers=True).dtype == bool


def test_arrays_of_jax_may_be_traced_and_strictly_typed():
    x = jnp.array([1.0, 2.0])
    assert checked_array("x", x) is x
    with jax.numpy_dtype_promotion("strict"):
        found = jax.jit(lambda a: checked_array("x", [a, 2 * a]) + checked_array("x", [[1, 2]]))(x)
        np.testing.assert_array_equal(found, [[2, 4], [3, 6]])
    half = jax.grad(lambda a: checked_array("x", a).sum())(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        jax.vmap(lambda a: checked_array("x", a))(jnp.arange(3)), [0, 1, 2]
    )


def test_single_numbers_of_any_library_become_pythons():
    for value in (3, np.int64(3), np.array(3), jnp.int32(3)):
        assert type(check_count("n", value)) is int and check_count("n", value) == 3
    for value in (2, np.float32(2), decimal.Decimal(2), np.longdouble(2)):
        assert type(check_deviation("n", value)) is float and check_deviation("n", value) == 2
    assert isinstance(check_deviation("n", jnp.float32(2)), jax.Array)
    assert host_times([jnp.float32(2), np.inf]) == [2, np.inf]
    for value in (True, 3.0, "3", None, np.arange(30).reshape(6, 5), 0, np.ma.masked):
        with pytest.raises(InputError, match="^n must be a positive integer, got") as caught:
            check_count("n", value)
        assert "\n" not in str(caught.value)
    for value in ("3", None, np.ones((9, 9)), -1, np.nan, np.inf, 1j, np.ma.masked, Foreign()):
        with pytest.raises(InputError, match="^n, a standard deviation, must be") as caught:
            check_deviation("n", value)
        assert "\n" not in str(caught.value)
