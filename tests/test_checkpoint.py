"""A checkpoint is complete and verified, or it doesn't exist: damaged files, full disks, other meshes."""

import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from mc3_jax import checkpoint, cli, integrity, job as job_lib, mesh as mesh_lib, terminal


def make_state(mesh, seed):
    """Returns (state with arrays of several shapes and dtypes, its abstract state), both on `mesh`."""
    rng = np.random.default_rng(seed)
    arrays = {
        "params": {
            "audio": {"kernel": rng.normal(size=(64, 48)).astype(np.float32), "bias": np.zeros(48, np.float32)},
            "video": {"kernel": rng.normal(size=(8, 16, 24)).astype(jax.numpy.bfloat16)},
        },
        "step": np.int32(seed),
    }
    abstract = mesh_lib.abstract_state(mesh, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays))
    return jax.device_put(arrays, jax.tree.map(lambda leaf: leaf.sharding, abstract)), abstract


def make_mesh(shape):
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, mesh_lib.AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def save(workdir, *steps, keep=9, keep_steps=()):
    """Writes a checkpoint of each step; the step is the seed of its state."""
    with checkpoint.Checkpoints(str(workdir), every_steps=1, keep=keep, keep_steps=list(keep_steps)) as checkpoints:
        for step in steps:
            assert checkpoints.is_due(step)
            checkpoints.save(step, make_state(make_mesh((2, 4)), step)[0])


def same_bits(left, right) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints at steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, 1, 2)
    return workdir


def injure(folder: pathlib.Path, path: pathlib.Path, rng) -> str:
    """Flips a bit of a file, or truncates, lengthens or deletes it; returns a description of the damage."""
    content = path.read_bytes()
    kind = rng.choice(["flip", "cut", "delete"] if content else ["lengthen", "delete"])
    if kind == "flip":
        at = int(rng.integers(8 * len(content)))
        changed = bytearray(content)
        changed[at // 8] ^= 1 << at % 8
        path.write_bytes(changed)
    elif kind == "cut":
        path.write_bytes(content[: rng.integers(len(content))])
    elif kind == "lengthen":
        path.write_bytes(b"\0")
    else:
        path.unlink()
    return f"{kind} {path.relative_to(folder)}"


def test_no_damaged_checkpoint_is_loaded_but_the_newest_intact_one(saved, tmp_path, capsys, num_injuries):
    rng = np.random.default_rng(0)
    mesh = make_mesh((1, 1))
    _, abstract = make_state(mesh, 1)
    originals = {step: make_state(mesh, step)[0] for step in (1, 2)}
    folder = checkpoint.checkpoint_dir(str(saved)) / "2"
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert integrity.MANIFEST in names
    for i in range(num_injuries):
        workdir = tmp_path / str(i)
        shutil.copytree(saved, workdir)
        there = checkpoint.checkpoint_dir(str(workdir)) / "2"
        done = injure(there, there / names[i % len(names)], rng)
        with pytest.raises(ValueError, match=f"checkpoint {there} is damaged: "):
            checkpoint.restore_params(str(workdir), 2, abstract["params"])
        step, state = checkpoint.restore_newest(str(workdir), lambda step: abstract)
        assert step == 1, done
        assert same_bits(state, originals[1]), done
        assert f"{there} is damaged: " in capsys.readouterr().err
        assert sorted(os.listdir(there.parent)) == ["1", "2.damaged"]
        shutil.rmtree(workdir)
    step, state = checkpoint.restore_newest(str(saved), lambda step: abstract)
    assert step == 2
    assert same_bits(state, originals[2])


def test_values_that_changed_before_they_were_digested_are_found(tmp_path, monkeypatch):
    real = checkpoint.ocp.save_async

    def broken_memory(path, state):
        kernel = state["params"]["audio"]["kernel"]
        state["params"]["audio"]["kernel"] = kernel.at[5, 7].set(np.nextafter(kernel[5, 7], np.inf))
        return real(path, state)

    monkeypatch.setattr(checkpoint.ocp, "save_async", broken_memory)
    save(tmp_path, 1)
    _, abstract = make_state(make_mesh((2, 4)), 1)
    with pytest.raises(checkpoint.DamagedError, match=r"array params/audio/kernel has other values .* \(1 in all\)"):
        checkpoint.restore(str(tmp_path), 1, abstract)


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (1, 8)])
def test_a_checkpoint_is_verified_when_restored_on_any_mesh(saved, shape):
    original, abstract = make_state(make_mesh(shape), 2)
    assert same_bits(checkpoint.restore(str(saved), 2, abstract), original)
    params = checkpoint.restore_params(str(saved), 2, abstract["params"])
    assert same_bits(params, original["params"])


def test_checksums_depend_on_every_position_and_bit_but_not_on_the_sharding():
    rng = np.random.default_rng(0)
    value = rng.normal(size=(16, 24)).astype(np.float32)
    value[3, 5:7] = 1, 2

    def checksum(array, shape=(1, 1)):
        mesh = make_mesh(shape)
        place = mesh_lib.abstract_state(mesh, jax.ShapeDtypeStruct(array.shape, array.dtype)).sharding
        return integrity.to_hex(*integrity.checksums({"a": jax.device_put(array, place)}))["a"]

    known = checksum(value)
    assert {checksum(value, shape) for shape in ((8, 1), (1, 8), (2, 4))} == {known}
    swapped, negative, zeros = value.copy(), value.copy(), np.zeros((16, 24), np.float32)
    swapped[3, 5:7] = 2, 1
    negative[0, 0] *= -1
    other = [swapped, negative, value.T.copy(), value.reshape(24, 16)[:, ::-1].copy(), zeros, -zeros]
    assert len({known, *map(checksum, other)}) == 1 + len(other)


def test_without_an_intact_checkpoint_a_run_starts_at_step_0(saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "run")
    for step in "12":
        (checkpoint.checkpoint_dir(str(tmp_path / "run")) / step / integrity.MANIFEST).unlink()
    _, abstract = make_state(make_mesh((1, 1)), 1)
    assert checkpoint.restore_newest(str(tmp_path / "run"), lambda step: abstract) == (0, None)
    assert capsys.readouterr().err.count("manifest.json can't be read: No such file or directory") == 2
    save(tmp_path / "run", 1, 2)
    (checkpoint.checkpoint_dir(str(tmp_path / "run")) / "2" / integrity.MANIFEST).write_text("{}")
    assert checkpoint.restore_newest(str(tmp_path / "run"), lambda step: abstract)[0] == 1
    names = sorted(os.listdir(checkpoint.checkpoint_dir(str(tmp_path / "run"))))
    assert names == ["1", "1.damaged", "2.damaged", "2.damaged-2"]


def test_the_newest_and_the_ends_of_phases_are_kept_and_leftovers_go(tmp_path):
    folder = checkpoint.checkpoint_dir(str(tmp_path))
    for leftover in ("3.saving", "3.saving.orbax-checkpoint-tmp", "1.deleting"):
        (folder / leftover).mkdir(parents=True)
    (folder / "2.damaged").mkdir()
    save(tmp_path, 1, 2, 3, 4, 5, keep=2, keep_steps=[2])
    assert sorted(os.listdir(folder)) == ["2", "2.damaged", "4", "5"]


def test_a_process_that_does_not_see_the_checkpoint_damages_none(saved, monkeypatch):
    workdir, steps = str(saved), checkpoint.steps_of(str(saved))
    monkeypatch.setattr(job_lib, "from_process_0", lambda value: 999)
    with pytest.raises(checkpoint.CheckpointError, match="process 0 on .* does not see .*999: mount it there"):
        checkpoint.restore_newest(workdir, lambda step: None)
    assert checkpoint.steps_of(workdir) == steps


def test_a_checkpoint_that_may_not_be_read_is_no_damage(saved, monkeypatch):
    workdir, steps = str(saved), checkpoint.steps_of(str(saved))

    def forbidden(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(integrity, "_digest_file", forbidden)
    _, abstract = make_state(make_mesh((1, 1)), 1)
    with pytest.raises(OSError, match="process 0 on .* can't read .*Permission denied.*is left as it is"):
        checkpoint.restore_newest(workdir, lambda step: abstract)
    assert checkpoint.steps_of(workdir) == steps
    assert not list(checkpoint.checkpoint_dir(workdir).glob("*damaged*"))


@pytest.mark.parametrize("moment", ["before", "between", "within"])
def test_a_checkpoint_that_training_deletes_meanwhile_is_no_damage_and_the_newest_is_taken(
    saved, tmp_path, monkeypatch, moment
):
    shutil.copytree(saved, tmp_path / "run")
    workdir, (_, abstract) = str(tmp_path / "run"), make_state(make_mesh((1, 1)), 1)
    folder = checkpoint.checkpoint_dir(workdir)
    where = {"before": "steps_of", "between": "_verify", "within": "check_shapes"}[moment]  # metadata are read first
    real, gone = getattr(checkpoint, where), []

    def meanwhile(*args):
        found = real(*args)
        if not gone:
            gone.append((folder / "2").rename(folder / "2.deleting"))  # as `Checkpoints` does before it deletes
        return found

    monkeypatch.setattr(checkpoint, where, meanwhile)
    step, params = checkpoint.restore_newest_params(workdir, abstract["params"])
    assert step == 1
    assert same_bits(params, make_state(make_mesh((1, 1)), 1)[0]["params"])
    with pytest.raises(checkpoint.PrunedError, match=r"has no checkpoint of step 2, only of steps \[1\]"):
        checkpoint.restore_params(workdir, 2, abstract["params"])


def test_a_process_that_alone_finds_a_checkpoint_deleted_ends_without_a_collective(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "run")
    workdir, (_, abstract) = str(tmp_path / "run"), make_state(make_mesh((1, 1)), 1)
    told = []

    def meanwhile(path, _):
        path.rename(path.with_name("2.deleting"))
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(job_lib, "from_process_0", told.append)  # the others do not take part: they still read
        raise KeyError("params")

    with monkeypatch.context() as alone:
        alone.setattr(job_lib, "from_process_0", lambda value: True)  # process 0 finds it deleted
        with pytest.raises(checkpoint.PrunedError, match="has no checkpoint of step 2"):
            checkpoint.restore_params(workdir, 2, abstract["params"])
    monkeypatch.setattr(checkpoint, "_load_params", meanwhile)
    with pytest.raises(ValueError, match=r"2 was deleted by the running training .* only steps \[1\] are left; start again$"):
        checkpoint.restore_newest_params(workdir, abstract["params"])
    assert not told


def test_checkpoints_deleted_while_they_are_read_are_reported_as_that_and_not_as_damaged(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "run")
    workdir, (_, abstract) = str(tmp_path / "run"), make_state(make_mesh((1, 1)), 1)
    folder = checkpoint.checkpoint_dir(workdir)

    def meanwhile(path, step, real=checkpoint._verify):
        shutil.copytree(path, folder / str(step + 1))
        shutil.rmtree(path)
        return real(path, step)

    monkeypatch.setattr(checkpoint, "_verify", meanwhile)
    with pytest.raises(checkpoint.PrunedError, match=r"6 was deleted by the running training .* \[1, 7\] are left"):
        checkpoint.restore_newest_params(workdir, abstract["params"])


def test_a_checkpoint_of_another_model_is_no_damage(saved):
    _, abstract = make_state(make_mesh((1, 1)), 1)
    del abstract["params"]["video"]
    with pytest.raises(checkpoint.CheckpointError, match=r"2 can't be restored: its state doesn't .*init.audio="):
        checkpoint.restore(str(saved), 2, abstract)


def test_a_full_disk_is_one_line_and_costs_no_checkpoint(small_disk, capsys):
    with pytest.raises(SystemExit) as ended, cli.user_errors((checkpoint.CheckpointError,)):
        save(small_disk, *range(1, 20), keep=20)
    assert ended.value.code == terminal.USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the checkpoint of step ")
    assert "No space left on device" in line
    assert "start again to resume" in line
    step = checkpoint.steps_of(str(small_disk))[-1]
    assert f"step {step + 1} can't be written" in line
    original, abstract = make_state(make_mesh((1, 1)), step)
    shutil.rmtree(checkpoint.checkpoint_dir(str(small_disk)) / "1")
    found, state = checkpoint.restore_newest(str(small_disk), lambda step: abstract)
    assert found == step
    assert same_bits(state, original)
    save(small_disk, step + 1)
    assert checkpoint.steps_of(str(small_disk))[-1] == step + 1
