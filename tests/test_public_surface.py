"""The names and arguments that users' code relies on."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import dnntk

ARGUMENTS = {
    "kernel.arccos0": "var_x var_y cov",
    "kernel.arccos1": "var_x var_y cov",
    "kernel.limit_ntk": "x1 x2 * rho beta d_out kernel_size",
    "DeepNarrowMLP": "depth d_out scale rho beta initialization parametrization",
    "DeepNarrowCNN": "depth d_out scale rho beta initialization parametrization",
    "to_standard": "model variables",
    "empirical_ntk": "model variables x1 x2 * method",
    "empirical_ntk_fn": "apply_fn",
    "ntk.linearize": "apply_fn variables",
    "ntk.taylor_expand": "apply_fn variables degree",
    "ntk.operator": "model_or_apply_fn variables x * block_size",
    "ntk.Operator.matvec": "self v",
    "ntk.Operator.trace": "self key samples",
    "ntk.Operator.eigsh": "self count",
    "ntk.alignment": "kernel y * centred",
    "ntk.cka": "kernel1 kernel2",
    "ntk.effective_dimension": "kernel time",
    "ntk.kernel_movement": "kernel_t kernel_0",
    "KernelFlow": "kernel x_train y_train * loss",
    "KernelFlow.predict": "self x time time_step momentum",
    "KernelFlow.train_predictions": "self time time_step momentum",
    "KernelFlow.max_time_step": "self momentum",
    "KernelFlow.posterior": "self x noise",
    "KernelFlow.sample": "self key x noise samples",
    "KernelFlow.log_marginal_likelihood": "self noise * eval_gradient",
    "KernelFlow.leave_one_out": "self time * ridge",
    "KernelFlow.influence": "self x time",
    "InfiniteDepthFeatures": "count rho beta features",
    "InfiniteDepthKernel": "rho beta rho_bounds beta_bounds",
    "train": "config workdir",
    "predict": "config workdir",
    "solve": "model variables x y * time ridge tolerance max_iterations",
}
# A module imports from its own layer and those before alone. Training and the infinitely deep
# network share one: a `KernelFlow` solves a network, a prediction is compared with a trained run.
LAYERS = (
    *("errors", "checks", "runtime", "runs", "data", "kernel", "networks", "native"),
    *("ntk", "figures", "infinite_depth training", "lyapunov parallel shares"),
    "experiments report estimators",
)
OTHERS = {
    *("Dataset", "DeepNarrowClassifier", "DeepNarrowRegressor", "Diverged"),
    *("InfiniteDepthClassifier", "InfiniteDepthRegressor", "InputError"),
    *(
        "PredictConfig",
        "SolveReport",
        "TrainConfig",
        "TrainResult",
        "initialization_spread",
        "kernel",
    ),
    *("load_dataset", "lyapunov", "parallel"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_functions_take_the_arguments_of_the_contract(name):
    found = dnntk
    for part in name.split("."):
        found = getattr(found, part)
    parameters = inspect.signature(found).parameters
    positional, _, keywords = ARGUMENTS[name].partition("*")
    assert list(parameters)[: len(positional.split())] == positional.split()
    for keyword in keywords.split():
        assert parameters[keyword].kind is inspect.Parameter.KEYWORD_ONLY


def test_the_package_exports_the_contracts_names_and_these():
    assert set(dnntk.__all__) == {name.partition(".")[0] for name in ARGUMENTS} | OTHERS
    assert importlib.import_module("dnntk.kernel").__all__ == ["arccos0", "arccos1", "limit_ntk"]
    for name in dnntk.__all__:
        assert getattr(dnntk, name).__doc__


@pytest.mark.parametrize("name", ["DeepNarrowCNN", "DeepNarrowMLP"])
def test_networks_take_init_and_cnns_a_kernel_size_and_a_pool(name):
    own = {"kernel_size": 5, "pool": 2} if name == "DeepNarrowCNN" else {}
    model = getattr(dnntk, name)(4, 2, 3.0, init="he_uniform", parametrization="standard", **own)
    assert model.initialization == "he_uniform"
    assert {field: getattr(model, field) for field in own} == own


def names_and_exports(path):
    """(names that a module defines or imports, its ``__all__`` or None), without importing it."""
    names, exports = set(), None
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.If):  # imported for type checks alone, and on first use
            names |= {alias.name for one in node.body for alias in getattr(one, "names", ())}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = {one.id for t in targets for one in ast.walk(t) if isinstance(one, ast.Name)}
            names |= found
            exports = eval(ast.unparse(node.value)) if "__all__" in found else exports
    return names, exports


def test_every_module_says_what_it_exports_and_has_it():
    paths = sorted(Path(dnntk.__file__).parent.rglob("*.py"))
    empty = [p for p in paths if p.name == "__init__.py" and p.read_text().count("\n") == 1]
    assert len(paths) > 60
    for path in set(paths) - set(empty):
        names, exports = names_and_exports(path)
        assert exports, f"{path} has no __all__"
        assert set(exports) <= names and len(set(exports)) == len(exports), path


def imported(path):
    """The parts of dnntk, folders or modules at its top, that a module imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "dnntk":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("dnntk."):
            yield node.module.split(".")[1]


def test_no_import_goes_upwards():
    package = Path(dnntk.__file__).parent
    layer_of = {part: i for i, parts in enumerate(LAYERS) for part in parts.split()}
    arrows = {
        (path.relative_to(package).with_suffix("").parts[0], part)
        for path in set(package.rglob("*.py")) - {package / "__init__.py"}
        for part in imported(path)
    }
    assert len(arrows) > 60
    assert not [(by, part) for by, part in arrows if layer_of[part] > layer_of[by]]


def test_every_module_has_a_test_file_of_its_name():
    package, tests = Path(dnntk.__file__).parent, Path(__file__).parent
    modules = {path for path in package.rglob("*.py") if path.name != "__init__.py"}
    # Exceptions are tested where they are raised.
    for path in modules - {package / "errors.py"}:
        folder = tests / path.relative_to(package).parent
        own = [*folder.glob(f"test_{path.stem}.py"), *folder.glob(f"test_{path.stem}_*.py")]
        assert own, f"{path}: expected {folder}/test_{path.stem}.py"


def test_no_file_or_function_is_long():
    root = Path(__file__).parents[1]
    for path in (p for part in ("dnntk", "scripts", "tests") for p in (root / part).rglob("*.py")):
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_the_package_is_read_at_a_glance():
    shown = [p for p in Path(dnntk.__file__).parent.iterdir() if p.name != "__pycache__"]
    assert len(shown) <= 20, sorted(p.name for p in shown)
