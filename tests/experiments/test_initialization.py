"""Figures 3.1 and 3.2: a network's values as styles and shades, against the thesis's blocks."""

import functools
import json

import numpy as np
import processes
import pytest

from dnntk import InputError
from dnntk.experiments.initialization import InitializationConfig, initialize
from dnntk.figures.initialization import Style

NONE, SOLID, DOUBLE, DASHED, DOUBLE_DASHED = Style
SHAPES = {
    "figures": InitializationConfig(),
    "deep": InitializationConfig(
        arch="cnn", channels=2, d_out=3, height=3, kernel_size=5, depth=40, seed=4
    ),
}
FLAGS = ("--arch=mlp", "--d_in=2", "--d_out=1", "--depth=9", "--seed=3")
BAD_FLAGS = {
    "arch": (["--arch=rnn"], "arch"),
    "d_in": (["--d_in=784"], "d_in"),
    "taken workdir": (["--workdir=taken"], "workdir"),
    "resume another": ([*FLAGS, "--workdir=taken", "--resume"], "resume"),
}


def thesis_styles(depth, d_in, d_out):
    """Sections 3.1 and 4.0.1, block by block, in styles: (W, b) of each layer, W as [out, in]."""

    def blocks(kind, n, m):
        return np.where(np.eye(n, m, dtype=bool), kind, NONE)

    def gap(n, m):
        return np.full((n, m), NONE)

    u, one = np.full((1, d_in), DASHED), np.full(1, DASHED)
    first = np.block([[blocks(DOUBLE, d_in, d_in)], [u], [gap(d_out, d_in)]])
    middle = np.block(
        [
            [blocks(SOLID, d_in, d_in), gap(d_in, 1), gap(d_in, d_out)],
            [u, gap(1, 1), gap(1, d_out)],
            [gap(d_out, d_in), gap(d_out, 1), blocks(SOLID, d_out, d_out)],
        ]
    )
    last = np.block([gap(d_out, d_in), gap(d_out, 1), blocks(SOLID, d_out, d_out)])
    zeros, outputs = np.full(d_in, SOLID), np.full(d_out, SOLID)
    return [
        (first, np.concatenate([zeros, one, np.full(d_out, DOUBLE)])),
        *[(middle, np.concatenate([zeros, one, outputs]))] * (depth - 2),
        (last, np.full(d_out, DOUBLE_DASHED)),
    ]


@functools.cache
def found_in(shape):
    """What `initialize` finds in networks of one of the `SHAPES`."""
    return initialize(SHAPES[shape])


@pytest.fixture(params=SHAPES)
def drawn(request):
    """(configuration, what was found) of one shape, both architectures."""
    return SHAPES[request.param], found_in(request.param)


def test_the_networks_own_parameters_have_the_styles_of_the_thesis(drawn):
    config, found = drawn
    for arch, network in found.items():
        diagram = network.diagram
        d_in = config.d_in if arch == "mlp" else config.channels
        d_out = config.d_out or {"mlp": 2, "cnn": 1}[arch]
        expected = thesis_styles(config.depth, d_in, d_out)
        assert diagram.depth == len(expected) == config.depth
        for lines, boxes, (w, b) in zip(diagram.lines, diagram.boxes, expected, strict=True):
            np.testing.assert_array_equal(lines.T, w)
            np.testing.assert_array_equal(boxes, b)
        assert network.largest_output == 0


def test_units_are_shaded_by_what_the_network_computes(drawn):
    config, found = drawn
    for arch, network in found.items():
        diagram, x = network.diagram, config.inputs(arch)[0]
        copies = [a[..., : x.shape[-1]] for a in diagram.activations[:-1]]
        for copy in copies:  # of the input, in units of C, in every hidden layer
            np.testing.assert_allclose(copy, x.reshape(copy.shape), rtol=1e-6)
        for state in diagram.activations[1:-1]:
            np.testing.assert_array_equal(state[..., x.shape[-1] + 1 :], 1)
        assert not diagram.activations[-1].any()
        assert (diagram.pooled is None) == (arch == "mlp")


def test_a_baseline_is_all_dashed_with_boxes_of_zero():
    config = InitializationConfig(arch="cnn", init="he_uniform", depth=4, height=3, d_out=2)
    network = initialize(config)["cnn"]
    diagram = network.diagram
    assert all((lines == DASHED).all() for lines in diagram.lines)
    assert all((boxes == SOLID).all() for boxes in diagram.boxes)
    assert network.largest_output > 0
    # What its units are shaded by ends in what either form of the network puts out.
    for outputs in network.outputs:
        np.testing.assert_allclose(diagram.pooled, outputs[0], rtol=1e-4, atol=1e-6)
    assert len(diagram.activations) == 5
    assert all((state >= 0).all() for state in diagram.activations[:-1])


def test_configurations_are_checked():
    for change, name in (
        ({"arch": "rnn"}, "arch"),
        ({"init": "zeros"}, "init"),
        ({"depth": 1}, "depth"),
        ({"kernel_size": 4}, "kernel_size"),
        ({"rho": -1.0}, "rho"),
        ({"d_out": 0}, "d_out"),
        ({"width": 17}, "width"),
        ({"channels": 7}, "channels"),
        ({"beta": 1e7}, "beta"),
        ({"scale": float("inf")}, "scale"),
        ({"scale": 1.0}, "scale"),
        ({"scale": 1 + 1e-9}, "scale"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(InputError, match=name):
            InitializationConfig(**change)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """(folder, outcomes) of the script: a small run, and the bad flags."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "taken").mkdir()
    (folder / "taken" / "config.json").write_text('{"depth": 8}')
    cases = {name: flags for name, (flags, _) in BAD_FLAGS.items()}
    cases["run"] = [*FLAGS, "--workdir=out"]
    return folder, processes.outcomes("initialization.py", cases, folder)


def test_the_script_leaves_a_picture_and_the_counts(scripted):
    folder, outcomes = scripted
    out, outcome = folder / "out", outcomes["run"]
    assert outcome.returncode == 0, outcome.stderr
    written = {"config.json", "summary.json", "figure_3_1.png", "figure_3_1.pdf"}
    assert {file.name for file in out.iterdir()} == written
    assert (out / "figure_3_1.png").stat().st_size > 10_000
    assert (out / "figure_3_1.pdf").read_bytes().startswith(b"%PDF")
    found = json.loads((out / "summary.json").read_text())["mlp"]
    # d_in = 2, d_out = 1, nine layers: 2 of C, 3 ones in each of 7 and one at the end.
    assert [found["lines"][s]["count"] for s in ("solid", "double", "dashed")] == [22, 2, 16]
    assert found["lines"]["none"] == {"means": "0", "count": 8 + 7 * 16 + 4 - 40}
    assert [of["count"] for of in found["boxes"].values()] == [2 * 8 + 7, 8, 1, 1]
    assert found["boxes"]["double_dashed"]["means"] == "-C_L"
    assert found["largest_output"] == 0 and "max |f(x)| = 0" in outcome.stdout


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_status_2(name, scripted):
    processes.check_refusal(scripted[1][name], "initialization.py", BAD_FLAGS[name][1])
