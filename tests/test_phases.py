"""Phases: at which steps they start and stop, what they freeze, what they carry over, how the learning rate changes."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mc3_jax import phases as phases_lib, run as run_lib
from mc3_jax.config import OptimizerConfig, PhaseConfig

PARAMS = {name: {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}} for name in ("audio", "video", "text")}
GRADS = jax.tree.map(lambda p: 0.1 * p, PARAMS)


def test_phases_follow_each_other_and_the_last_continues_beyond_its_end():
    phases = phases_lib.plan_phases([PhaseConfig(name="a", epochs=2), PhaseConfig(name="b", epochs=0.5)], 1000, 100)
    assert [(p.start, p.stop) for p in phases] == [(0, 20), (20, 25)]
    assert [phases_lib.phase_at(phases, s).config.name for s in (0, 19, 20, 24, 25)] == ["a", "a", "b", "b", "b"]


def test_a_phase_without_a_step_is_refused():
    with pytest.raises(ValueError, match="'a': 0.1 epochs of 100 clips are less than one step of batch size 256"):
        phases_lib.plan_phases([PhaseConfig(name="a", epochs=0.1)], 100, 256)


@pytest.mark.parametrize("epochs", [float("inf"), 1e300, 2**31 / 100])
def test_more_steps_than_can_be_counted_are_refused(epochs):
    with pytest.raises(ValueError, match=r"'b': .* epochs of 100 clips are more than 2\*\*31 steps of batch size 1: choose"):
        phases_lib.plan_phases([PhaseConfig(name="a", epochs=1), PhaseConfig(name="b", epochs=epochs)], 100, 1)


def test_learning_rate_warms_up_to_its_peak_and_falls_along_a_cosine_within_its_phase():
    optimizer = OptimizerConfig(learning_rate=0.5, schedule="cosine", warmup_steps=10, final_scale=0.1)
    phase = phases_lib.Phase(PhaseConfig(optimizer=optimizer), 100, 200)
    rate = [float(phases_lib.learning_rate(phase)(step)) for step in range(100, 200)]
    np.testing.assert_allclose(rate[:10], 0.5 * np.arange(1, 11) / 10, rtol=1e-6)
    middle = 0.05 + 0.45 * 0.5 * (1 + np.cos(np.pi * 45 / 90))
    np.testing.assert_allclose(rate[10 + 45], middle, rtol=1e-6)
    assert 0.05 < rate[-1] < 0.052


def test_a_warm_up_longer_than_its_phase_is_reported_and_ends_with_it(capsys):
    optimizer = OptimizerConfig(learning_rate=0.5, warmup_steps=10)
    configs = [PhaseConfig(name, epochs, optimizer=optimizer) for name, epochs in (("a", 11), ("b", 10))]
    phases = phases_lib.plan_phases(configs, 8, 8)
    run_lib._tell_of_short_phases(phases)
    assert "phase 'b' has 10 steps, too few for its warmup_steps = 10: it warms up faster" in capsys.readouterr().err
    rates = [float(phases_lib.learning_rate(phases[1])(step)) for step in range(11, 21)]
    assert max(rates) == rates[-1] == 0.5
    run_lib._tell_of_short_phases(phases[:1])
    assert not capsys.readouterr().err


def test_the_cosine_begins_after_hold_share():
    optimizer = OptimizerConfig(learning_rate=0.5, schedule="cosine", warmup_steps=10, hold_share=0.6)
    phase = phases_lib.Phase(PhaseConfig(optimizer=optimizer), 100, 200)
    rate = np.array([float(phases_lib.learning_rate(phase)(step)) for step in range(100, 200)])
    np.testing.assert_allclose(rate[9:60], 0.5, rtol=1e-6)
    np.testing.assert_allclose(rate[60:], 0.25 * (1 + np.cos(np.pi * np.arange(40) / 40)), atol=1e-6)


@pytest.mark.parametrize("suite", ["soundworld", "ego4d"])
def test_every_row_of_a_suite_has_the_same_rate_at_every_step(suite):
    """Except ImageBind, which trains one tower after the other: it has the schedule twice, each in half the steps."""
    rates = {}
    for name in ("mc3", "cmc", "clap", "cm_acc", "without_align", "without_consensus", "without_contrastive", "image_bind"):
        config = importlib.import_module(f"configs.tables.{name}").get_config(suite)
        size = config.data.batch_size
        phases = phases_lib.plan_phases(config.phases, 4 * 90 * size, size)
        rates[name] = [
            np.asarray(jax.vmap(phases_lib.learning_rate(p))(jnp.arange(p.start, p.stop))) for p in phases
        ]  # fmt: skip
    halves = rates.pop("image_bind")
    wanted = np.concatenate(rates["mc3"])
    for name, parts in rates.items():
        np.testing.assert_allclose(np.concatenate(parts), wanted, rtol=1e-6, err_msg=name)
    assert len(halves[0]) == len(halves[1]) == len(wanted) // 2
    np.testing.assert_array_equal(halves[0], halves[1])
    np.testing.assert_allclose(halves[0][20:], wanted[21::2][10:], rtol=0.02, atol=0.01 * wanted.max())


def test_frozen_towers_get_no_update_and_no_moments():
    phase = PhaseConfig(trainable=("audio",), optimizer=OptimizerConfig(weight_decay=0.1))
    tx = phases_lib.make_optimizer(phase, PARAMS)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert all((leaf == 0).all() for tower in ("video", "text") for leaf in jax.tree.leaves(updates[tower]))
    assert all((leaf != 0).all() for leaf in jax.tree.leaves(updates["audio"]))
    moments = sum(leaf.size for leaf in jax.tree.leaves(tx.init(PARAMS)) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(PARAMS["audio"]))


def test_a_tower_that_the_loss_does_not_look_at_stays_where_it_is():
    """Neither weight decay nor moments of earlier steps may change it."""
    phase = PhaseConfig(pairs=("av",), optimizer=OptimizerConfig(weight_decay=0.1))
    tx = phases_lib.make_optimizer(phase, PARAMS)
    updates, state = tx.update(GRADS | {"text": jax.tree.map(jnp.zeros_like, GRADS["text"])}, tx.init(PARAMS), PARAMS)
    assert all((leaf == 0).all() == (name == "text") for name in PARAMS for leaf in jax.tree.leaves(updates[name]))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for name in ("audio", "video") for leaf in jax.tree.leaves(PARAMS[name]))


def test_only_kernels_decay():
    table = {"position_embedding": jnp.ones((3, 4)), "stacked": {"bias": jnp.ones((2, 4))}}  # biases of scanned blocks
    params = PARAMS | {"audio": PARAMS["audio"] | table}
    grads = jax.tree.map(jnp.ones_like, params)
    decayed = phases_lib.make_optimizer(PhaseConfig(optimizer=OptimizerConfig(weight_decay=0.5)), params)
    plain = phases_lib.make_optimizer(PhaseConfig(), params)
    with_decay, _ = decayed.update(grads, decayed.init(params), params)
    without, _ = plain.update(grads, plain.init(params), params)
    difference = jax.tree.map(lambda a, b: a - b, with_decay, without)["audio"]
    np.testing.assert_allclose(difference["dense"]["kernel"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(difference["dense"]["bias"], 0.0)
    assert (difference["position_embedding"] == 0).all()
    assert (difference["stacked"]["bias"] == 0).all()


@pytest.mark.parametrize("trainable", [("audio", "video", "text"), ("audio",)])
def test_gradients_are_clipped_by_the_norm_of_all_that_learn(trainable):
    phase = PhaseConfig(trainable=trainable, optimizer=OptimizerConfig(clip_norm=0.5))
    tx = phases_lib.make_optimizer(phase, PARAMS)
    _, state = tx.update(jax.tree.map(lambda g: 100 * g, GRADS), tx.init(PARAMS), PARAMS)
    moments = [leaf for path, leaf in jax.tree.leaves_with_path(state) if ".mu" in jax.tree_util.keystr(path)]
    assert len(moments) == 2 * len(trainable)
    np.testing.assert_allclose(optax.tree.norm(moments), 0.5 * (1 - phase.optimizer.b1), rtol=1e-5)


def test_moments_of_other_parameters_are_not_carried():
    tx = phases_lib.make_optimizer(PhaseConfig(), PARAMS)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    frozen = PhaseConfig(name="b", trainable=("audio",))
    with pytest.raises(ValueError, match="'b' keeps the .* other parameters .* audio, video, text.*: set .*reset_opt"):
        phases_lib.carry_moments(frozen, phases_lib.make_optimizer(frozen, PARAMS), PARAMS, state)


@pytest.mark.parametrize("trainable", [("audio", "video", "text"), ("audio",)])
def test_moments_are_carried_between_phases_that_clip_or_decay_and_phases_that_do_not(trainable):
    options = [{}, {"clip_norm": 1e3}, {"weight_decay": 0.5}, {"clip_norm": 1e3, "weight_decay": 0.5}]
    phases = [PhaseConfig(trainable=trainable, optimizer=OptimizerConfig(**each)) for each in options]
    optimizers = [phases_lib.make_optimizer(phase, PARAMS) for phase in phases]
    states = [tx.update(GRADS, tx.init(PARAMS), PARAMS)[1] for tx in optimizers]  # norms are below 1e3, so moments are equal
    for before in states:
        for phase, tx, state in zip(phases, optimizers, states, strict=True):
            kept = phases_lib.carry_moments(phase, tx, PARAMS, before)
            assert jax.tree.structure(kept) == jax.tree.structure(state)  # in which a checkpoint of the phase is saved
            jax.tree.map(np.testing.assert_array_equal, kept, state)


def test_moments_keep_their_names_in_checkpoints():
    """Runs are resumed from checkpoints of earlier versions."""
    places = {}
    for clip_norm in (0.0, 1.0):
        phase = PhaseConfig(optimizer=OptimizerConfig(clip_norm=clip_norm, weight_decay=0.1))
        state = phases_lib.make_optimizer(phase, PARAMS).init(PARAMS)
        places[clip_norm] = {jax.tree_util.keystr(path[:2]) for path, _ in jax.tree.leaves_with_path(state)}
    assert places == {0.0: {"[0].count", "[0].mu", "[0].nu"}, 1.0: {"[1].count", "[1].mu", "[1].nu"}}


def test_a_scale_learns_where_its_phase_says_so():
    params = PARAMS | {"loss": {"log_scale": jnp.float32(2.0)}}
    for learns in (True, False):
        phase = PhaseConfig(trainable=("audio", "text"), learn_scale=learns)
        tx = phases_lib.make_optimizer(phase, params)
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        assert bool(updates["loss"]["log_scale"] != 0) == learns


def test_a_classifier_and_a_scale_that_no_loss_looks_at_stay_where_they_are():
    params = PARAMS | {"classifier": PARAMS["text"], "loss": {"log_scale": jnp.float32(2.0)}}
    for weight in (0.0, 1.0):
        phase = PhaseConfig(
            contrastive_weight=weight, classification_weight=weight, consensus_weight=1.0, learn_scale=True,
            trainable=("audio", "video", "text", "classifier"), optimizer=OptimizerConfig(weight_decay=0.1),
        )  # fmt: skip
        tx = phases_lib.make_optimizer(phase, params)
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        for name in ("classifier", "loss"):
            assert all((leaf != 0).all() == bool(weight) for leaf in jax.tree.leaves(updates[name]))


@pytest.mark.parametrize(
    ("pairs", "consensus_weight", "names"),
    [
        (("al",), 0.0, ("audio", "text")),
        (("av",), 0.0, ("audio", "video")),
        (("vl",), 1.0, ("audio", "video", "text")),
        (("av", "vl"), 0.0, ("audio", "video", "text")),
    ],
)
def test_a_phase_looks_at_the_modalities_of_its_losses(pairs, consensus_weight, names):
    assert phases_lib.modalities(PhaseConfig(pairs=pairs, consensus_weight=consensus_weight)) == names
