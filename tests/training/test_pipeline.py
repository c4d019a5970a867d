"""Layers over stages and batches over devices: the same network, whatever the mesh.

Eight host devices need a process of their own, as does every mesh of ``scripts/train.py``.
"""

import json
import shutil

import jax
import numpy as np
import optax
import optax.contrib
import processes
import pytest
from networks import drawn

from dnntk import TrainConfig
from dnntk.errors import InputError
from dnntk.networks.models import DeepNarrowCNN, DeepNarrowMLP
from dnntk.training import gradient_flow, pipeline, placement

SMALL = ("--depth=13", "--steps=12", "--checkpoint_every=4", "--eval_every=2", "--scale=20")
RUNS = {
    "mlp": ("--dataset=digits", "--batch_size=100", "--time_step=0.09"),
    "cnn": ("--dataset=digits", "--arch=cnn", "--optimizer=adam", "--lr=1e-2", "--batch_size=64"),
}
MESHES = {"mlp": ("depth:4",), "cnn": ("data:2,depth:4",)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of all runs, {run/mesh: Outcome})."""
    folder = tmp_path_factory.mktemp("meshes")
    cases = {
        f"{name}/{mesh}": (*SMALL, *flags, f"--mesh={mesh}", f"--workdir={name}/{mesh}")
        for name, flags in RUNS.items()
        for mesh in ("data:1", *MESHES[name])
    }
    return folder, processes.outcomes("train.py", cases, folder)


def curve(workdir):
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([[line[key] for key in ("step", "train_loss", "test_loss")] for line in lines])


@pytest.mark.parametrize(
    ("name", "mesh"), [(name, mesh) for name, meshes in MESHES.items() for mesh in meshes]
)
def test_every_mesh_has_the_loss_curve_of_one_device(trained, name, mesh):
    folder, ended = trained
    for case in (f"{name}/data:1", f"{name}/{mesh}"):
        assert ended[case].returncode == 0, ended[case].stderr
    alone, own = curve(folder / name / "data:1"), curve(folder / name / mesh)
    assert len(own) > 6 and own[-1, 1] < own[0, 1]
    np.testing.assert_allclose(own, alone, rtol=2e-5, atol=1e-7)
    summary = json.loads((folder / name / mesh / "summary.json").read_text())
    sizes = pipeline.parse_mesh(mesh)
    assert summary["device"].startswith(f"{sizes['data'] * sizes['depth']} x")


def test_a_checkpoint_goes_on_on_another_mesh(trained):
    folder, _ = trained
    cases = {}
    for mesh in ("data:1", "data:2,depth:4"):
        workdir = folder / "moved" / mesh
        shutil.copytree(folder / "mlp" / "depth:4", workdir)
        shutil.rmtree(workdir / "checkpoints" / "12")
        cases[mesh] = ("--resume", f"--mesh={mesh}", f"--workdir={workdir}")
    for mesh, outcome in processes.outcomes("train.py", cases, folder).items():
        assert outcome.returncode == 0, outcome.stderr
        assert "from step 8" in outcome.stderr + outcome.stdout
        moved, stayed = curve(folder / "moved" / mesh), curve(folder / "mlp" / "depth:4")
        np.testing.assert_allclose(moved, stayed, rtol=2e-5, atol=1e-7)


CODE = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp, numpy as np
from dnntk.networks import layers
from dnntk.training import gradient_flow, pipeline, placement
from dnntk.networks.models import DeepNarrowMLP

stages, examples = 4, 32
mesh = pipeline.make_mesh("depth:4")
model, x = DeepNarrowMLP(400, 1, 5.0), np.random.default_rng(0).random((examples, 20), np.float32)
variables = jax.jit(model.init)(jax.random.key(0), x[:1])
whole = sum(a.nbytes for a in jax.tree.leaves(variables))
params = placement.put_state(variables["params"], mesh)
frozen = placement.put_state({"initial": variables["initial"]}, mesh)
held = {}
for leaf in jax.tree.leaves((params, frozen)):
    for shard in leaf.addressable_shards:
        held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
# Every time that a stage really goes through its layers, it says so.
worked = []
middle_layers = pipeline.middle_layers
def counted(network, h, own, segment, present):
    jax.debug.callback(lambda stage: worked.append(int(stage)), jax.lax.axis_index("depth"))
    return middle_layers(network, h, own, segment, present)
pipeline.middle_layers = counted
gradient_flow.make_predict(model, mesh)(params, frozen, x, examples)
jax.effects_barrier()
print(json.dumps({"whole": whole, "held": list(held.values()), "worked": worked}))
"""


def test_stages_hold_their_own_layers_and_rest_only_where_they_must(tmp_path):
    done = processes.outcomes(None, {"": ["-"]}, tmp_path, code=CODE)[""]
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    stages, count = 4, 16
    assert len(found["held"]) == stages
    assert max(found["held"]) < 1.05 * found["whole"] / stages
    ticks = stages + count - 1
    assert {s: found["worked"].count(s) for s in range(stages)} == dict.fromkeys(
        range(stages), count
    )
    idle = 1 - len(found["worked"]) / (stages * ticks)
    assert idle == pytest.approx((stages - 1) / (count + stages - 1))


@pytest.mark.parametrize(
    ("model", "examples", "loss"),
    [
        # Stages of two layers; of three and two; of one and none.
        (DeepNarrowCNN(6, 1, 3.0, kernel_size=5, pool=2), 24, "cross_entropy"),
        (DeepNarrowMLP(7, 1, 2.0, parametrization="standard"), 7, "squared"),
        (DeepNarrowMLP(3, 2, 5.0), 1, "cross_entropy"),
    ],
)
def test_outputs_and_steps_are_those_of_the_plain_network(model, examples, loss):
    shape = (3,) if isinstance(model, DeepNarrowMLP) else (4, 6, 1)
    dice = np.random.default_rng(examples)
    x = dice.random((examples, *shape), np.float32)
    y = dice.random((examples, model.d_out), np.float32)
    frozen = drawn(model, x, seed=1)
    params = frozen.pop("params")
    ended = []
    for text in ("data:1", "depth:2"):
        # Its norms are a layer's and the whole network's.
        optimizer = optax.lamb(1e-2)
        if examples == 7:  # asks for a second gradient
            optimizer = optax.contrib.sam(optimizer, optax.sgd(0.1), opaque_mode=True)
        mesh = pipeline.make_mesh(text)
        own, kept = (placement.put_state(tree, mesh) for tree in (params, frozen))
        opt_state = jax.jit(optimizer.init)(own)
        state = gradient_flow.TrainState(own, placement.put_state(opt_state, mesh))
        step, batch = (
            gradient_flow.make_step(model, optimizer, mesh, loss=loss),
            placement.put_batch(x, y, mesh),
        )
        losses = []
        for _ in range(3):
            state, value = step(state, kept, batch)
            losses.append(float(value))
        ended.append((losses, gradient_flow.make_predict(model, mesh)(state.params, kept, x, 5)))
    np.testing.assert_allclose(ended[1][0], ended[0][0], rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(ended[1][1], ended[0][1], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("shape", [(32, 64), (7, 11, 29), (5,)])
def test_a_large_sum_over_devices_takes_no_memory_of_its_size(monkeypatch, shape):
    monkeypatch.setattr(pipeline, "LARGE_BYTES", 1 << 10)
    monkeypatch.setattr(pipeline, "PART_BYTES", 1 << 8)
    mesh = jax.make_mesh((2,), (pipeline.DATA,))
    own, over = jax.sharding.PartitionSpec(pipeline.DATA), {"mesh": mesh, "check_vma": False}
    x = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    sums = jax.shard_map(
        lambda x: pipeline.psum(x[0], pipeline.DATA)[None], in_specs=own, out_specs=own, **over
    )
    given = jax.device_put(x, jax.sharding.NamedSharding(mesh, own))
    compiled = jax.jit(sums, donate_argnums=0).lower(given).compile()
    np.testing.assert_array_equal(compiled(given), np.broadcast_to(x[0] + x[1], x.shape))
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 11


@pytest.mark.parametrize(
    "text", ["depth", "data:0", "data:2,data:2", "rows:2", "data:-1", "data:2;depth:2", "data:1e9"]
)
def test_a_bad_mesh_is_refused(text):
    with pytest.raises(InputError, match="mesh: expected data:N,depth:M"):
        TrainConfig(mesh=text)


def test_too_few_devices_are_told():
    with pytest.raises(InputError, match="needs 6 devices, 2 are there"):
        pipeline.make_mesh("data:3,depth:2")
