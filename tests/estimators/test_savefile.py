import hashlib
import json
import os

import numpy as np
import pytest
from mutations import set_entry
from numpy.testing import assert_array_equal

from dnntk import InputError
from dnntk.estimators import savefile
from dnntk.estimators.infinite_depth import InfiniteDepthClassifier, InfiniteDepthRegressor

ARRAYS = {
    "b": np.array([[1.5, -0.0, np.nan]]),
    "a": np.arange(5.0),
    "single": np.array([0.1, -np.inf, 1e-45], np.float32),
    "none": np.zeros((0, 3)),
    "one": np.array(-0.5, np.float32),
}
NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model"


@pytest.fixture(scope="module")
def model():
    x = np.random.default_rng(0).normal(size=(6, 4))
    return InfiniteDepthClassifier(time=10.0).fit(x, ["a", "b", "c"] * 2)


@pytest.fixture
def saved(model, path):
    """The bytes of a saved estimator."""
    model.save(path)
    return path.read_bytes()


def _refused(path, content, what=InfiniteDepthClassifier.load):
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        what(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(path))
    return str(caught.value)


def _with_header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _parts(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_arrays_and_description_come_back_to_the_bit(path):
    about = {"inf": float("inf"), "text": "\0 ☃ \udc80", "many": list(range(100))}
    savefile.write(path, "thing", ARRAYS, about)
    arrays, found = savefile.read(path, "thing")
    assert found == about
    assert set(arrays) == set(ARRAYS)
    for name, expected in ARRAYS.items():
        assert arrays[name].dtype == expected.dtype
        assert arrays[name].shape == expected.shape
        assert arrays[name].tobytes() == expected.tobytes()
        assert arrays[name].flags.writeable


def test_the_layout_is_that_of_safetensors(path):
    savefile.write(path, "thing", ARRAYS, {})
    header, data = _parts(path.read_bytes())
    assert all(isinstance(text, str) for text in header.pop("__metadata__").values())
    for name, expected in ARRAYS.items():
        entry = header[name]
        values = np.frombuffer(data[slice(*entry["data_offsets"])], expected.dtype)
        assert entry["dtype"] == NAMES[expected.dtype]
        assert_array_equal(values.reshape(entry["shape"]), expected)


def test_the_same_content_is_the_same_file(path, tmp_path):
    savefile.write(path, "thing", ARRAYS, {"a": 1})
    savefile.write(tmp_path / "other", "thing", dict(reversed(ARRAYS.items())), {"a": 1})
    assert path.read_bytes() == (tmp_path / "other").read_bytes()


def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch):
    savefile.write(path, "thing", ARRAYS, {"version": "old"})

    def no_room(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(InputError, match="No space left"):
        savefile.write(path, "thing", ARRAYS, {"version": "new"})
    assert savefile.read(path, "thing")[1] == {"version": "old"}
    assert list(path.parent.iterdir()) == [path]


def test_places_that_hold_no_file_are_refused(path, saved):
    folder = path.parent / "folder"
    folder.mkdir()
    os.mkfifo(path.parent / "pipe")
    for place in (folder, path.parent / "pipe", path.parent / "none", path / "below"):
        with pytest.raises(InputError):
            savefile.read(place, "thing")
    for place in (folder, folder / "none" / "file", path / "below"):
        with pytest.raises(InputError, match="expected a file that can be written"):
            savefile.write(place, "thing", ARRAYS, {})


def test_every_truncation_and_extension_is_refused(saved, path):
    for length in {*range(0, 64), *range(64, len(saved), 37), len(saved) - 1}:
        _refused(path, saved[:length])
    for more in (b"\0", b" ", saved, bytes(1000)):
        _refused(path, saved + more)


def test_every_flipped_bit_is_refused(saved, path):
    rng = np.random.default_rng(1)
    for place in {*range(0, 40), *rng.integers(0, len(saved), 300).tolist()}:
        changed = bytearray(saved)
        changed[place] ^= 1 << int(rng.integers(8))
        _refused(path, bytes(changed))


def test_random_bytes_are_refused(saved, path):
    rng = np.random.default_rng(2)
    for size in range(0, 200):
        _refused(path, rng.bytes(size))
        changed = bytearray(saved)
        start = int(rng.integers(len(saved)))
        changed[start : start + size + 1] = rng.bytes(size + 1)
        _refused(path, bytes(changed))


def _entry(**changes):
    return {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]} | changes


METADATA = {"about": "{}", "format": "dnntk", "kind": "k", "sha256": "0" * 64, "version": "1"}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"null",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 10_000,
        {},
        {"__metadata__": []},
        {"__metadata__": METADATA | {"about": 3}},
        {"__metadata__": METADATA | {"more": "x"}},
        {"__metadata__": METADATA},
        {"__metadata__": METADATA, "x": None},
        {"__metadata__": METADATA, "x": {}},
        {"__metadata__": METADATA, "x": _entry(dtype="O")},
        {"__metadata__": METADATA, "x": _entry(dtype=["F64"])},
        {"__metadata__": METADATA, "x": _entry(shape=[True, 2])},
        {"__metadata__": METADATA, "x": _entry(shape=[-1, -2])},
        {"__metadata__": METADATA, "x": _entry(shape=[2.0])},
        {"__metadata__": METADATA, "x": _entry(shape=[1] * 9)},
        {"__metadata__": METADATA, "x": _entry(shape=[10**15], data_offsets=[0, 8 * 10**15])},
        {"__metadata__": METADATA, "x": _entry(shape=[2**62] * 8)},
        {"__metadata__": METADATA, "x": _entry(shape=[10**400])},
        {"__metadata__": METADATA, "x": _entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0])},
        {"__metadata__": METADATA, "x": _entry(data_offsets=[0, 8])},
        {"__metadata__": METADATA, "x": _entry(data_offsets=[-16, 0])},
        {"__metadata__": METADATA, "x": _entry(), "y": _entry()},
        {"__metadata__": METADATA | {"version": "2"}, "x": _entry()},
        {"__metadata__": METADATA | {"format": "x" * 10**6}, "x": _entry()},
    ],
    ids=lambda header: repr(header)[-60:],
)
def test_hostile_headers_are_refused(header, path):
    _refused(path, _with_header(header, bytes(16)), lambda path: savefile.read(path, "k"))


def test_a_length_beyond_the_file_is_refused(path):
    for length in (0, 3, 17, 2**40, 2**64 - 1):
        _refused(path, length.to_bytes(8, "little") + b"{}")


def test_another_version_says_so(saved, path):
    header, data = _parts(saved)
    header["__metadata__"]["version"] = "2"
    assert "found version '2'" in _refused(path, _with_header(header, data))


def test_a_header_spelt_otherwise_is_refused(saved, path):
    """Even with the right checksum of the right content: no byte is without a meaning."""
    header, data = _parts(saved)
    assert "checksum" in _refused(path, _with_header(header, data))


def _forged(saved, path, change):
    """A file with a right checksum whose description or arrays were changed."""
    arrays, about = savefile.read(path, "InfiniteDepthClassifier")
    change(arrays, about)
    savefile.write(path, "InfiniteDepthClassifier", arrays, about)
    return path.read_bytes()


def _without(key):
    return lambda arrays, about: about.pop(key)


def _array(name, to):
    return lambda arrays, about: arrays.__setitem__(name, to)


@pytest.mark.parametrize(
    "change",
    [
        *[_without(key) for key in ("parameters", "kernel", "record", "labels", "labels_type")],
        _without("features"),
        set_entry("parameters", to=[]),
        set_entry("parameters", to={"no_such": 1}),
        set_entry("parameters", "rho", to={"nested": 1}),
        set_entry("parameters", "rho", to=["a"]),
        set_entry("kernel", to=3),
        set_entry("kernel", "rho", to="1.0"),
        set_entry("kernel", "rho", to=-1.0),
        set_entry("kernel", "beta", to=float("nan")),
        set_entry("kernel", "beta", to=True),
        set_entry("kernel", "d_out", to=7),
        set_entry("kernel", "kernel_size", to=4),
        set_entry("kernel", "image_shape", to=[10**9, 10**9]),
        set_entry("kernel", "image_shape", to=[-2, -2]),
        set_entry("kernel", "image_shape", to="22"),
        set_entry("record", "n_iter_", to=0.5),
        set_entry("record", "converged_", to="yes"),
        set_entry("labels", to=[]),
        set_entry("labels", to="abc"),
        set_entry("labels", to=["a", "b"]),
        set_entry("labels", to=["a", "b", "b"]),
        set_entry("labels", to=["a", "b", 3]),
        set_entry("labels", to=[["a"], ["b"], ["c"]]),
        set_entry("labels", to=[None] * 3),
        set_entry("labels_type", to="int8"),
        set_entry("labels_type", to="U1000000000000"),
        set_entry("labels_type", to="V8"),
        set_entry("labels_type", to=["str"]),
        set_entry("labels_type", to=None),
        set_entry("features", to=["a"]),
        set_entry("features", to=[1, 2, 3, 4]),
        set_entry("features", to=4),
        _array("x_train", np.ones(6)),
        _array("x_train", np.ones((7, 4))),
        _array("x_train", np.full((6, 4), np.nan)),
        _array("coefficients", np.full((6, 3), np.inf)),
        _array("coefficients", np.ones((6, 2))),
        lambda arrays, about: arrays.pop("x_train"),
    ],
)
def test_forged_estimators_are_refused(change, saved, path):
    message = _refused(path, _forged(saved, path, change))
    assert "expected a fitted InfiniteDepthClassifier" in message


def test_a_forged_large_filter_is_refused(saved, path):
    def change(arrays, about):
        about["kernel"] |= {"image_shape": [2, 2, 1], "kernel_size": 10**6 + 1}

    assert "kernel_size" in _refused(path, _forged(saved, path, change))


def test_labels_that_no_file_can_hold_are_refused(model, path):
    x = np.zeros((4, 2))
    x[::2] = 1
    strange = InfiniteDepthRegressor.__new__(InfiniteDepthClassifier)
    strange.__dict__ = model.__dict__ | {"classes_": np.array(["2020-01-01"] * 3, "datetime64[D]")}
    with pytest.raises(InputError, match="labels that are strings, numbers or bools"):
        strange.save(path)
    assert not path.exists()


def test_the_checksum_covers_everything_but_itself(saved):
    header, data = _parts(saved)
    claimed = header["__metadata__"].pop("sha256")
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert hashlib.sha256(text + data).hexdigest() == claimed
