"""The losses that MC3 is compared with, as phases: what they train and keep, on a mesh, in chunks and resumed."""

import copy
import functools

import jax
import numpy as np
import pytest

from mc3_jax import (
    checkpoint,
    mesh as mesh_lib,
    model as model_lib,
    objective,
    phases as phases_lib,
    run as run_lib,
    train,
    train_step as step_lib,
    validation,
    weights,
)
from mc3_jax.config import MemoryConfig
from mc3_jax.data import loader, tokenizer
from tests import test_fits, world
from tests.test_train import assert_equal_bits


def clap(phase):
    phase.pairs, phase.trainable, phase.consensus_weight = ("al",), ("audio", "text"), 0.0
    phase.temperature, phase.learn_scale = 0.07, True


def cm_acc(phase):
    phase.pairs, phase.trainable, phase.consensus_weight = ("av",), ("audio", "video"), 0.0
    phase.memory = MemoryConfig(pool_size=32, dictionary_size=16)


def image_bind(phase):
    phase.pairs, phase.trainable, phase.consensus_weight = ("av",), ("audio",), 0.0
    phase.temperature = 0.05


ROWS = {"CLAP": clap, "CM-ACC": cm_acc, "ImageBind": image_bind}


def two_steps(row):
    """Returns (state before, state after, metrics of each step) of two steps of a row's phase on eight devices."""
    config = test_fits.small_config()
    ROWS[row](config.phases[1])
    validation.validate(config)
    mesh, model = mesh_lib.make_mesh(), model_lib.make_model(config.model)
    phase = phases_lib.Phase(config.phases[1], 0, 100)
    init = functools.partial(step_lib.init_state, model, config, phase)
    abstract = mesh_lib.abstract_state(mesh, jax.eval_shape(init))
    with jax.set_mesh(mesh):
        state = jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()
        before = jax.tree.map(np.array, state)  # a copy, as the first step donates the state
        batch, seen = mesh_lib.put_batch(mesh, test_fits.batch()), []
        step = step_lib.jit_train_step(model, config, phase, state)
        for number in range(2):
            state, metrics, health = step(state, batch, np.int32(number))
            assert health.taken
            seen.append(jax.device_get(metrics))
    return before, jax.device_get(state), seen


@pytest.mark.large
@pytest.mark.parametrize("row", ROWS)
def test_what_a_row_does_not_train_stays_and_what_it_trains_moves(row):
    before, after, metrics = two_steps(row)
    learning = {"CLAP": {"audio", "text", "loss"}, "CM-ACC": {"audio", "video"}, "ImageBind": {"audio"}}[row]
    for name in before.params:
        old, new = (jax.tree.leaves(state.params[name]) for state in (before, after))
        assert any((a != b).any() for a, b in zip(old, new, strict=True)) == (name in learning)
    if row == "CLAP":
        np.testing.assert_allclose(metrics[0]["temperature"], 0.07, rtol=1e-6)
        np.testing.assert_allclose(metrics[1]["temperature"], 0.07, rtol=1e-2)
        assert metrics[1]["temperature"] != metrics[0]["temperature"]
    if row == "CM-ACC":
        assert after.memory["steps"] == 2
        for name in ("audio", "video"):
            assert np.count_nonzero(np.abs(after.memory["pool"][name]).sum(1)) == 32
            np.testing.assert_allclose(np.linalg.norm(after.memory["dictionary"][name], axis=1), 1, rtol=1e-5)


def test_a_learned_scale_stops_at_a_hundred_and_can_come_down_again():
    for log_scale, limited in ((4.0, 4.0), (7.0, np.log(100))):
        params = objective.limit({"loss": {"log_scale": jax.numpy.float32(log_scale)}, "audio": {}})
        np.testing.assert_allclose(params["loss"]["log_scale"], limited, rtol=1e-6)
    phase = copy.deepcopy(test_fits.small_config().phases[0])
    clap(phase)
    rng = np.random.default_rng(0)
    x = {name: rng.normal(size=(8, 4)).astype(np.float32) for name in ("audio", "text")}
    x = {name: jax.numpy.asarray(v / np.linalg.norm(v, axis=1, keepdims=True)) for name, v in x.items()}

    def loss(log_scale):
        return objective.phase_loss(x, phase, loss_params={"log_scale": log_scale})[0]

    assert jax.grad(loss)(jax.numpy.log(jax.numpy.float32(100))) > 0  # random pairs: the scale is too large


def test_the_encoders_of_a_memory_start_with_the_weights_that_are_read(tmp_path):
    config = test_fits.small_config()
    for tower in (config.model.audio, config.model.video, config.model.text):
        tower.depth = 1
    cm_acc(config.phases[0])
    phases = [phases_lib.Phase(config.phases[0], 0, 100)]
    read = weights.complete({}, config.model, config.seed + 1)  # other random values stand for the files of config.init
    mesh, model = mesh_lib.make_mesh(devices=jax.devices()[:1]), model_lib.make_model(config.model)
    source = object.__new__(loader.ClipSource)  # no clip is read from it
    run = run_lib.Run(config, str(tmp_path), mesh, model, phases, source, {}, tokenizer.blank(6), None, read)
    with jax.set_mesh(mesh):
        step, state = train._first_state(run)
    assert step == 0
    momentum = checkpoint.flatten(jax.device_get(state.memory["momentum"]))
    assert {name.split("/")[0] for name in momentum} == {"audio", "video"}
    for name, leaf in checkpoint.flatten(jax.device_get(state.params)).items():
        np.testing.assert_array_equal(leaf, read[name])
        if name in momentum:
            np.testing.assert_array_equal(momentum[name], leaf, err_msg=name)


def test_a_memory_keeps_towers_of_its_pairs_alone_whatever_the_consensus_looks_at():
    config = test_fits.small_config()
    cm_acc(config.phases[0])
    config.phases[0].consensus_weight = 1.0
    model = model_lib.make_model(config.model)
    params = jax.eval_shape(lambda: model_lib.init_params(model, config.model, 0))
    memory = jax.eval_shape(lambda params: objective.init_memory(config, config.phases[0], params), params)
    assert memory["momentum"].keys() == memory["pool"].keys() == {"audio", "video"}
    batch = jax.eval_shape(test_fits.batch)
    for chunk_size in (0, 8):
        config.data.chunk_size = chunk_size
        grad_fn = step_lib.make_grad_fn(model, config, config.phases[0])
        grads, (terms, after) = jax.eval_shape(grad_fn, params, jax.ShapeDtypeStruct((), np.int32), batch, memory)
        assert grads.keys() == params.keys()
        assert {"consensus", "contrastive_av"} <= terms.keys()
        assert jax.tree.structure(after) == jax.tree.structure(memory)


def test_without_pairs_there_is_no_contrastive_term():
    phase = test_fits.small_config().phases[1]
    phase.pairs, phase.consensus_weight = (), 2.0
    rng = np.random.default_rng(0)
    x = {name: rng.normal(size=(8, 4)).astype(np.float32) for name in ("audio", "video", "text")}
    x = {name: jax.numpy.asarray(v / np.linalg.norm(v, axis=1, keepdims=True)) for name, v in x.items()}
    loss, (terms, _) = objective.phase_loss(x, phase)
    assert loss == 2 * terms["consensus"] > 0
    assert "contrastive" not in terms


def test_a_state_without_memory_is_saved_without_an_entry_for_it():
    state = step_lib.TrainState(np.int32(3), {"audio": np.ones(2)}, ())
    assert step_lib.to_tree(state).keys() == {"step", "params", "opt_state"}
    assert step_lib.to_tree(state.replace(memory={"steps": np.int32(1)})).keys() == {"step", "params", "opt_state", "memory"}


def gradients(row, *, fsdp=1, chunk_size=0):
    """Returns ((gradients, loss), memory after the step) of a row's phase on eight devices."""
    config = test_fits.small_config(scan_layers=chunk_size > 0)
    ROWS[row](config.phases[1])
    config.phases = config.phases[1:]
    config.data.chunk_size = chunk_size
    mesh, model = mesh_lib.make_mesh(fsdp=fsdp), model_lib.make_model(config.model)
    phase = phases_lib.Phase(config.phases[0], 0, 100)
    init = functools.partial(step_lib.init_state, model, config, phase)
    places = jax.tree.map(lambda leaf: leaf.sharding, mesh_lib.abstract_state(mesh, jax.eval_shape(init)))
    grad_fn = step_lib.make_grad_fn(model, config, phase.config)
    with jax.set_mesh(mesh):
        state = jax.jit(init, out_shardings=places)()
        batch = mesh_lib.put_batch(mesh, test_fits.batch())
        grads, (terms, memory) = jax.jit(grad_fn)(state.params, state.step, batch, state.memory)
    return (jax.device_get(grads), float(terms["loss"])), jax.device_get(memory)


@pytest.mark.large
@pytest.mark.parametrize("row", ["CLAP", "CM-ACC"])
def test_in_chunks_and_sharded_a_row_has_the_same_gradient_and_memory(row):
    whole, memory = gradients(row)
    parts, same = gradients(row, fsdp=4, chunk_size=8)
    test_fits.assert_equal(parts, whole)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(memory), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.large
def test_a_run_through_every_kind_of_phase_is_resumed_bit_for_bit_and_evaluated_by_its_towers(data, tmp_path):
    config = world.small_config(data)
    config.fsdp, config.save.every_steps = 2, 1
    first, second, third = (copy.deepcopy(config.phases[0]) for _ in range(3))
    first.name, first.pairs, first.trainable, first.learn_scale = "bind", ("vl",), ("video", "text"), True
    second.name, second.reset_optimizer = "audio", True
    image_bind(second)
    third.name, third.reset_optimizer = "active", True
    cm_acc(third)
    config.phases = [first, second, third]
    for phase in config.phases:
        phase.epochs = 0.5
    validation.validate(config)
    state = train.train(run_lib.set_up(config, str(tmp_path / "run")))
    stops = [phase.stop for phase in run_lib.set_up(config, str(tmp_path / "run")).phases]
    assert int(state.memory["steps"]) == stops[2] - stops[1]
    for step in (stops[0], stops[2] - 1):
        for path in checkpoint.checkpoint_dir(str(tmp_path / "run")).iterdir():
            if int(path.name) > step:
                path.rename(tmp_path / f"{step}-{path.name}")
        assert_equal_bits(train.train(run_lib.set_up(config, str(tmp_path / "run"))), state)
    shapes = {name: state.params[name] for name in ("audio", "video", "text")}
    abstract = mesh_lib.abstract_state(mesh_lib.make_mesh(), jax.eval_shape(lambda: shapes))
    params = checkpoint.restore_params(str(tmp_path / "run"), stops[2], abstract)
    assert_equal_bits(params, shapes)


def _consensus_alone(phase):
    phase.contrastive_weight, phase.consensus_weight = 0.0, 1.0


BAD = {
    "pool_size": (lambda p: setattr(p.memory, "pool_size", 24), r"phases\[1\].memory.pool_size = 24: .* multiple of .* 16"),
    "dictionary_size": (lambda p: setattr(p.memory, "dictionary_size", 0), "memory.dictionary_size = 0: must be a multiple"),
    "momentum": (lambda p: setattr(p.memory, "momentum", 1.0), "memory.momentum = 1.0: must be from 0 to below 1"),
    "scale": (lambda p: (setattr(p, "learn_scale", True), setattr(p, "temperature", 0.005)), "0.005: must be at least 0.01"),
    "no pairs": (lambda p: setattr(p, "pairs", ()), "the phase has no loss"),
    "no term": (_consensus_alone, "memory.pool_size = 32: is used by the contrastive term only"),
}


@pytest.mark.parametrize(
    ("row", "message"), [("CM-ACC", "True: needs a contrastive loss whose negatives"), ("ImageBind", "which no loss")]
)
def test_masking_equal_narrations_needs_a_phase_with_text_and_without_memory(row, message):
    config = test_fits.small_config()
    config.phases[1].mask_same_text = True
    validation.validate(config)
    ROWS[row](config.phases[1])
    with pytest.raises(ValueError, match=rf"phases\[1\].mask_same_text = .*{message}"):
        validation.validate(config)


@pytest.mark.parametrize("case", BAD)
def test_invalid_settings_of_a_memory_are_refused(case):
    config = test_fits.small_config()
    cm_acc(config.phases[1])
    change, message = BAD[case]
    change(config.phases[1])
    with pytest.raises(ValueError, match=message):
        validation.validate(config)
