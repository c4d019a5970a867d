"""Figure 5.1 small, end to end: the curves, linear theory, the shares, resuming, the script."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from networks import initialized

from dnntk import DeepNarrowCNN, DeepNarrowMLP, InputError, empirical_ntk, figures, to_standard
from dnntk.experiments.accumulation import AccumulationConfig, accumulate
from dnntk.shares import accumulated, coefficients, layer_shares
from dnntk.training import trainer as training_run

# At C = infinity linear theory is all there is.
SMALL = AccumulationConfig(
    dataset="digits",
    classes=(3, 5, 8),
    output=1,
    depth=12,
    scale=np.inf,
    train_examples=9,
    steps=40,
    points=2,
    draws=3000,
)
FLAGS = (
    "--dataset=digits",
    "--classes=3,5,8",
    "--output=1",
    "--depth=12",
    "--scale=inf",
    "--train_examples=9",
    "--steps=40",
    "--points=2",
    "--draws=3000",
)
BAD_FLAGS = {
    "depth": (["--depth=1"], "depth"),
    "no images": (["--arch=cnn"], "dataset"),
    "too many points": (["--points=1000", "--workdir=new"], "points"),
    "output": (["--output=1", "--workdir=newer"], "output"),
    "time_step": (["--time_step=nan"], "time_step"),
    "taken workdir": (["--workdir=out"], "workdir"),
    "resume another": ([*FLAGS, "--steps=5", "--workdir=out", "--resume"], "resume"),
}
MLP = DeepNarrowMLP(10, 2, 30.0, rho=1.3, beta=0.7)
CNN = DeepNarrowCNN(4, 2, 30.0, rho=0.4, beta=0.7)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(folder, result) of one run."""
    folder = tmp_path_factory.mktemp("small") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *_: None)  # the script's test looks at pictures
        return folder, accumulate(SMALL, folder, progress=False)


def moved(model, x, size=0.3, dtype=np.float64):
    """The model's variables, away from initialization."""
    variables = jax.tree.map(np.asarray, initialized(model, x, seed=3))
    rng = np.random.default_rng(4)
    params = jax.tree.map(lambda d: size * rng.standard_normal(d.shape), variables["params"])
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), variables | {"params": params})


def literal_curve(model, variables, x):
    """Figure 5.1 by the thesis's matrices in NumPy: [depth, n, d_out] and [depth - 1, n]."""
    _, literal = to_standard(model, variables)
    p = jax.tree.map(np.asarray, literal["params"])
    middle = zip(p["middle"]["kernel"], p["middle"]["bias"], strict=True)
    curve, off, h = [], [], x
    for kernel, bias in [(p["first"]["kernel"], p["first"]["bias"]), *middle]:
        h = np.maximum(h @ kernel + bias, 0)
        curve.append(h[:, -model.d_out :] - model.scale)
        off.append(h[:, -model.d_out - 1] == 0)
    curve.append(h @ p["last"]["kernel"] + p["last"]["bias"])
    return np.stack(curve), np.stack(off)


def test_the_curve_is_that_of_the_literal_matrices(x64):
    x = np.random.default_rng(0).uniform(0.1, 1, (5, 3))
    variables = moved(MLP, x)
    expected, expected_off = literal_curve(MLP, variables, x)
    assert 0.1 < expected_off.mean() < 0.9 and np.abs(expected).max() > 0.1
    curve, off = accumulated(MLP, variables, x)
    np.testing.assert_allclose(curve, expected, atol=1e-12 * MLP.scale)
    np.testing.assert_array_equal(off, expected_off)
    single = jax.tree.map(lambda a: a.astype(np.float32), (variables, x))
    curve, _ = accumulated(MLP, *single)
    assert curve.dtype == np.float32
    # As float32 carries the deviation and never C.
    np.testing.assert_allclose(curve, expected, atol=30 * np.finfo(np.float32).eps)


def test_both_forms_of_a_cnn_have_one_curve_and_it_ends_in_the_output(x64):
    x = np.random.default_rng(1).uniform(0, 1, (3, 4, 5, 2))
    variables = moved(CNN, x, size=0.2)
    curve, off = accumulated(CNN, variables, x)
    literal, literal_off = accumulated(*to_standard(CNN, variables), x)
    assert curve.shape == (CNN.depth, 3, 2) and off.shape == (CNN.depth - 1, 3)
    np.testing.assert_allclose(curve, literal, atol=1e-11)
    np.testing.assert_allclose(off, literal_off, atol=1e-12)
    np.testing.assert_allclose(curve[-1], jax.jit(CNN.apply)(variables, x), atol=1e-13)


def test_a_cnns_shares_add_up_to_its_own_kernel(x64):
    rng = np.random.default_rng(2)
    x_train, x = rng.uniform(0, 1, (4, 4, 5, 2)), rng.uniform(0, 1, (3, 4, 5, 2))
    variables = jax.jit(CNN.init)(jax.random.key(3), x)
    alpha = rng.standard_normal((4, 3))
    shares = layer_shares(CNN, variables, x_train, x, alpha)
    assert shares.shape == (CNN.depth, 3, 3)
    kernel = empirical_ntk(CNN, variables, x, x_train, outputs="diagonal")[:, :, 1]
    np.testing.assert_allclose(shares.sum(0), kernel @ alpha, rtol=1e-9)


def test_a_layers_share_is_what_the_docstring_says(x64):
    rng = np.random.default_rng(3)
    x_train, x, alpha = (
        rng.uniform(0, 1, (4, 3)),
        rng.uniform(0, 1, (2, 3)),
        rng.normal(size=(4, 1)),
    )
    variables = jax.jit(MLP.init)(jax.random.key(6), x)
    start = jax.tree.map(np.asarray, variables["initial"])
    units = [start["first"]["kernel"] / MLP.scale, *start["middle"]["kernel"]]
    biases = [start["first"]["bias"], *start["middle"]["bias"]]
    inner, small = x @ x_train.T, MLP.scale**-2
    expected = [small * (inner + 1)]
    for u, v in zip(units, biases, strict=True):
        m, m_train = (np.maximum(points @ u + v, 0) for points in (x, x_train))
        expected.append(inner + MLP.d_out + np.outer(m, m_train) + small)
    shares = layer_shares(MLP, variables, x_train, x, alpha)
    np.testing.assert_allclose(shares, np.stack(expected) @ alpha / MLP.depth, atol=1e-12)


def test_coefficients_are_those_of_gradient_descent():
    rng = np.random.default_rng(5)
    features = rng.standard_normal((6, 4))  # singular: two directions are never learnt
    kernel, y, rate, alpha = features @ features.T, rng.standard_normal(6), 0.6, np.zeros(6)
    assert 1 < rate * np.linalg.eigvalsh(kernel / 6)[-1] < 2
    for _ in range(7):
        alpha = alpha + rate / 6 * (y - kernel @ alpha)
    np.testing.assert_allclose(coefficients(kernel, y, rate, 7)[:, 0], alpha, atol=1e-12)
    finer = coefficients(kernel, y, rate * 1e-4, 70_000)
    np.testing.assert_allclose(finer[:, 0], finer[:, 1], rtol=1e-3)


def test_at_infinite_scale_theory_is_exact(small):
    _, found = small
    assert found.summary["difference_from_theory"] < 1e-11
    assert 1e-3 < found.summary["difference_from_line"]
    assert not jax.config.jax_enable_x64


def test_shares_are_distributed_around_the_limits_prediction(small):
    _, found = small
    error = found.drawn.std(0) / np.sqrt(len(found.drawn))
    assert (np.abs(found.drawn.mean(0) - found.limit) < 4 * error).all()
    for drawn in found.drawn.T:
        values, counts = np.unique(drawn.round(9), return_counts=True)
        # The atom: the unit is off in half of the draws, 4 standard errors allowed.
        assert abs(counts.max() / len(drawn) - 0.5) < 2 / np.sqrt(len(drawn)), values
    np.testing.assert_allclose(found.line[-1], found.limit)
    np.testing.assert_allclose(found.shares.mean(0), found.trained[-1] * 12 / 11, rtol=1e-9)


def test_resuming_does_not_train_again(small, monkeypatch):
    folder, whole = small
    lines = (folder / "training" / "metrics.jsonl").read_text()
    monkeypatch.setattr(figures, "draw", lambda *_: None)
    monkeypatch.setattr(training_run.Run, "_train", lambda *_: 0.0)
    again = accumulate(SMALL, folder, resume=True, progress=False)
    np.testing.assert_array_equal(again.trained, whole.trained)
    np.testing.assert_array_equal(again.drawn, whole.drawn)
    assert (folder / "training" / "metrics.jsonl").read_text() == lines


def test_configurations_are_checked():
    for change, name in (
        ({"output": -2}, "output"),
        ({"scale": -3.0}, "scale"),
        ({"points": 0}, "points"),
        ({"draws": 0}, "draws"),
        ({"train_examples": 5000}, "train_examples"),
        ({"steps": 0}, "steps"),
        ({"rho": -1.0}, "rho"),
        ({"dtype": "float16"}, "dtype"),
    ):
        with pytest.raises(InputError, match=name):
            AccumulationConfig(**change)
    with pytest.raises(InputError, match="init"):
        accumulated(MLP.clone(initialization="he_uniform"), {}, np.zeros((1, 3)))


@pytest.fixture(scope="module")
def scripted(small):
    """(folder, outcome) of the script, which goes on with the small run, and of the bad flags."""
    folder = small[0].parent
    for name in ("curves.npz", "summary.json"):
        (small[0] / name).unlink()
    cases = {"good": [*FLAGS, "--workdir=out", "--resume"]}
    cases |= {name: flags for name, (flags, _) in BAD_FLAGS.items()}
    found = processes.outcomes("accumulation.py", cases, folder, first="good")
    outcome = found.pop("good")
    assert outcome.returncode == 0, outcome.stderr
    return folder, outcome, found


def test_the_script_leaves_pictures_curves_and_numbers(scripted):
    folder, outcome, _ = scripted
    out = folder / "out"
    for stem in ("figure_5_1", "shares"):
        assert (out / f"{stem}.png").stat().st_size > 10_000
        assert (out / f"{stem}.pdf").read_bytes().startswith(b"%PDF")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["scale"] == "inf" and summary["steps"] == 40
    assert 0 < summary["difference_from_theory"] < 1e-11
    classes = [point["label"].split(",")[0] for point in summary["points"]]
    assert classes == ["class 5", "class 8"]
    assert [point["target"] for point in summary["points"]] == [1, 0]
    with np.load(out / "curves.npz") as curves:
        assert curves["trained"].shape == curves["theory"].shape == curves["line"].shape == (12, 2)
        assert curves["drawn"].shape == (3000, 2)
        assert summary["points"][0]["trained"] == curves["trained"][-1, 0]
    assert "of the largest output from linear theory" in outcome.stdout


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_status_2(name, scripted):
    outcome = scripted[2][name]
    assert outcome.returncode == 2, outcome.stderr
    line = outcome.stderr.strip()
    assert "\n" not in line and BAD_FLAGS[name][1] in line and line.startswith("accumulation.py")
