"""The benchmarks of speed measure what they say: whole steps until they are done, and work that has been done."""

import argparse
import itertools
import json
import types
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
import simplejpeg
import torch
import torch.utils.data

from benchmarks import contrastive, input_pipeline, matmul, paper_step, scaling, timed_process, torch_peers, train_step
from mc3_jax import compile as compile_lib, hlo
from mc3_jax.data import records
from tests.test_goals import make_small


class Clock:
    """Stands in for the module `time`: time passes only while `spend` or a `Pending` says so."""

    def __init__(self):
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    time = perf_counter

    def spend(self, seconds: float) -> None:
        self.now_s += seconds


class Pending:
    """What a device has yet to compute, as JAX returns it at once: whoever waits for it waits until `done_s`."""

    def __init__(self, clock: Clock, seconds: float):
        self.clock, self.done_s = clock, clock.now_s + seconds

    def block_until_ready(self) -> "Pending":
        self.clock.now_s = max(self.clock.now_s, self.done_s)
        return self


def options(**values) -> argparse.Namespace:
    """Returns the options of `benchmarks.train_step` that its processes read."""
    return argparse.Namespace(**{
        "batch": 2, "depth": 1, "dtype": "float32", "remat": "none", "scan": False, "chunk_size": 0, "backward_only": False,
    } | values)  # fmt: skip


@pytest.fixture
def served(monkeypatch) -> list[tuple]:
    """What `benchmarks.train_step` serves of small towers: (step, peak_bytes, platform)."""
    found = []
    monkeypatch.setattr(train_step, "serve", lambda *what, **_: found.append(what))
    monkeypatch.setattr(paper_step, "make_config", make_small)
    return found


def test_our_step_ends_when_the_device_is_done(served, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(paper_step, "make_step", lambda config: (None, lambda: {"loss": Pending(clock, 2.0)}))
    train_step.serve_ours(options())
    for i in (1, 2):
        served[0][0]()
        assert clock.now_s == 2.0 * i


def test_our_loss_and_gradient_are_of_every_parameter_and_end_when_the_device_is_done(served, monkeypatch):
    clock, states, found = Clock(), [], []

    def draw_state(model, config):
        states.append(paper_step.plan_state(model, config)[1])  # shapes are enough, since nothing is computed
        return states[0]

    def jit(function, **_):
        def run(params, inputs):
            found.append(jax.eval_shape(function, params, inputs))
            return jax.tree.map(lambda leaf: Pending(clock, 2.0), found[-1])

        return run

    monkeypatch.setattr(paper_step, "draw_state", draw_state)
    monkeypatch.setattr(jax, "jit", jit)
    train_step.serve_gradient(options(batch=8))  # a clip for each of the eight devices
    for i in (1, 2):
        served[0][0]()
        assert clock.now_s == 2.0 * i
    loss, gradient = found[0]
    assert loss.shape == ()
    assert jax.tree.map(np.shape, gradient) == jax.tree.map(np.shape, states[0].params)


@pytest.fixture
def one_thread():
    """PyTorch on one thread: on a busy machine, threads that share out so little work wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def serve_torch(
    served, monkeypatch, *, compiled: bool = False, device: str = "cpu", **values
) -> tuple[torch_peers.ThreeTowers, Callable[[], None]]:
    """Returns PyTorch's model and the step that is served."""
    made, given, make = [], [], torch_peers.ThreeTowers
    monkeypatch.setattr(matmul, "set_up_torch", lambda: device)
    monkeypatch.setattr(torch_peers, "ThreeTowers", lambda *of, **how: made.append(make(*of, **how)) or made[-1])
    # What a step does is the same without compiling, which takes minutes.
    monkeypatch.setattr(torch, "compile", lambda model: given.append(model) or model)
    train_step.serve_torch(options(**values), compiled=compiled)
    assert given == made[:1] * compiled
    return made[0], served[0][0]


def copy_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backward_only", [False, True])
def test_pytorchs_step_computes_every_gradient_and_changes_the_parameters_unless_it_is_without_optimizer(
    compiled, backward_only, served, one_thread, monkeypatch
):
    model, step = serve_torch(served, monkeypatch, compiled=compiled, backward_only=backward_only)
    reached = set()
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: reached.add(name))
    before = copy_parameters(model)
    step()
    after = copy_parameters(model)
    assert reached == set(before)
    # The gradient of a bias may be 0, such as that of keys, which softmax takes away.
    changed = {name for name, value in before.items() if value.ndim > 1 and not torch.equal(value, after[name])}
    assert changed == (set() if backward_only else {name for name, value in before.items() if value.ndim > 1})
    assert all(parameter.grad is None for parameter in model.parameters())  # the next step does not add to it


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pytorchs_layers_compute_in_the_dtype_that_is_asked_for(dtype, served, one_thread, monkeypatch):
    model, step = serve_torch(served, monkeypatch, dtype=dtype)
    found = []
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.register_forward_hook(lambda module, given, output: found.append(output.dtype))
    step()
    assert len(found) > 20
    assert set(found) == {getattr(torch, dtype)}


def test_pytorchs_step_on_a_gpu_waits_for_its_last_update(served, one_thread, monkeypatch):
    for kind in (torch.Tensor, torch.nn.Module):  # there is no GPU here
        monkeypatch.setattr(
            kind, "to", lambda self, *of, to=kind.to, **how: self if of == ("cuda",) else to(self, *of, **how)
        )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(copy_parameters(model) if served else {}))
    model, step = serve_torch(served, monkeypatch, device="cuda")
    before = copy_parameters(model)
    step()
    after = copy_parameters(model)
    assert len(waited) == 2  # after the first step and after this one
    assert all(torch.equal(waited[1][name], value) for name, value in after.items())
    assert not torch.equal(after["video_head.weight"], before["video_head.weight"])
    _, peak_bytes, platform = served[0]
    assert (peak_bytes(), platform) == (7, "gpu")


@pytest.mark.parametrize("is_first_done", [False, True])
def test_seconds_are_those_of_one_step_without_the_first_of_a_line_or_anything_around_them(
    is_first_done, monkeypatch, capsys
):
    clock = Clock()
    first, lines = [] if is_first_done else [1000.0], {"3\n": [100.0, 1.0, 2.0, 6.0], "2\n": [200.0, 4.0, 12.0]}
    left = [*first, *itertools.chain(*lines.values())]

    def stdin() -> Iterator[str]:
        for line in lines:
            clock.spend(10_000.0)  # while other systems have their turn
            yield line

    def peak_bytes() -> int:
        clock.spend(500.0)
        return 7

    monkeypatch.setattr(timed_process, "time", clock)
    monkeypatch.setattr(timed_process, "sys", types.SimpleNamespace(stdin=stdin()))
    timed_process.serve(lambda: clock.spend(left.pop(0)), peak_bytes, "cpu", is_first_done=is_first_done)
    ready, *answers = map(json.loads, capsys.readouterr().out.splitlines())
    assert ready["ready"] == sum(first)
    assert answers == [{"seconds": 3.0, "bytes": 7}, {"seconds": 8.0, "bytes": 7}]
    assert left == []


def test_a_products_rate_is_two_flops_for_each_of_its_multiplications_per_second(monkeypatch, capsys):
    clock = Clock()
    # Seconds of a product [m, n] @ [n, n] by m and n; the second has to be run more than once.
    seconds = {(3, 5): 0.5, (7, 2): 0.0625}
    monkeypatch.setattr(matmul, "time", clock)
    monkeypatch.setattr(matmul, "ON_CPU", (tuple(seconds), 0.1))
    monkeypatch.setattr(matmul, "sys", types.SimpleNamespace(stdin=["1\n", "1\n"]))
    matmul.serve(lambda m, n: lambda num: clock.spend(num * seconds[m, n]), "cpu")
    _, *answers = map(json.loads, capsys.readouterr().out.splitlines())
    # An output has n products and n sums: 2 · 3 · 5² = 150 and 2 · 7 · 2² = 56.
    assert [answer["rates"] for answer in answers] == [[150 / 0.5, 56 / 0.0625]] * 2


@pytest.mark.parametrize(("repeats", "seconds"), [(1, 9.0), (3, 2.0)])
def test_infonce_is_timed_until_the_device_is_done(repeats, seconds, monkeypatch):
    clock, runs_s = Clock(), [9.0, 1.0, 2.0, 4.0]

    def compile_loss():
        clock.spend(100.0)
        return compiled

    def compiled(embeddings):
        return Pending(clock, runs_s.pop(0)), Pending(clock, 0.0)

    compiled.memory_analysis = lambda: types.SimpleNamespace(temp_size_in_bytes=0)
    lowered = types.SimpleNamespace(compile=compile_loss)
    monkeypatch.setattr(contrastive, "time", clock)
    monkeypatch.setattr(jax, "jit", lambda loss: types.SimpleNamespace(lower=lambda embeddings: lowered))
    found = contrastive.measure(4, 0, repeats)
    assert (found["seconds"], found["compile_s"]) == (seconds, 100.0)


@pytest.mark.parametrize(("form", "block_rows", "num_products"), [("whole", 0, 9), ("blocks", 16, 12)])
def test_infonces_flops_are_those_of_the_compiled_program(form, block_rows, num_products):
    # Two rows of 256 have 2 · 2 similarities of 256 products and sums; `count_flops` says how many such products there are.
    assert contrastive.count_flops(2, form) == num_products * (2 * 2 * 256 * 2)
    rows = {name: np.ones((64, contrastive.DIM), np.float32) for name in ("audio", "video", "text")}
    loss = jax.value_and_grad(lambda x: contrastive.contrastive.contrastive_loss(x, 0.05, block_rows=block_rows)[0])
    counts = hlo.count(jax.jit(loss).lower(rows).compile().as_text())
    assert contrastive.count_flops(64, form) == counts.flops


def test_infonces_table_has_the_rate_of_its_flops(tmp_path, monkeypatch):
    answer = json.dumps({"seconds": 2.0, "compile_s": 1.0, "beyond_gib": 0.5})
    done = types.SimpleNamespace(returncode=0, stdout=answer)
    monkeypatch.setattr(contrastive, "subprocess", types.SimpleNamespace(run=lambda *_, **__: done, PIPE=-1))
    monkeypatch.setattr("sys.argv", ["contrastive.py", "--batches=2048", f"--results={tmp_path}/r.md"])
    with pytest.raises(SystemExit, match="0"):
        contrastive.main()
    text = (tmp_path / "r.md").read_text()
    product = 2 * 2048**2 * 256
    assert f"| 2,048 | the whole matrix | 2 | {9 * product / 2 / 1e9:.0f} |" in text
    assert f"| 2,048 | 1024 rows at a time | 2 | {12 * product / 2 / 1e9:.0f} |" in text


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a data set and its clips."""
    folder = tmp_path_factory.mktemp("clips")
    return folder, input_pipeline.make_clips(folder, 8)


def assert_decoded(batch: dict, clips: list[records.Clip]) -> None:
    """Asserts that every row holds the sound of one of the clips and all of this clip's frames."""
    of_sound = {clip.audio.tobytes(): clip for clip in clips}
    for sound, video in zip(batch["audio"], batch["video"], strict=True):
        clip = of_sound[np.asarray(sound).tobytes()]
        assert len(clip.frames) == input_pipeline.NUM_FRAMES
        np.testing.assert_array_equal(np.asarray(video), [simplejpeg.decode_jpeg(frame) for frame in clip.frames])


def test_decode_only_counts_a_clip_when_its_frames_are_decoded(written, monkeypatch):
    _, clips = written
    decoded, real = [], simplejpeg.decode_jpeg
    monkeypatch.setattr(input_pipeline.simplejpeg, "decode_jpeg", lambda file: decoded.append(file) or real(file))
    stream, claimed = input_pipeline.decode_only(clips, 1), 0
    for _ in range(5):
        claimed += next(stream)
        assert len(decoded) >= 4 * claimed
    stream.close()  # once the queue is done, which holds each clip once
    assert decoded == [frame for clip in [*clips, *clips[:5]] for frame in clip.frames]
    assert claimed == 5


def test_our_reader_counts_the_clips_that_it_has_put_onto_the_device(written, monkeypatch):
    folder, clips = written
    placed, waited, put, wait = [], [], jax.device_put, jax.block_until_ready
    monkeypatch.setattr(jax, "device_put", lambda batch: placed.append(put(batch)) or placed[-1])
    monkeypatch.setattr(jax, "block_until_ready", lambda batch: waited.append(batch) or wait(batch))
    stream, claimed = input_pipeline.ours(folder, 3, num_threads=1), 0
    for i in range(3):
        claimed += next(stream)
        assert claimed == sum(len(batch["audio"]) for batch in placed)
        assert i == 0 or waited[-1] is placed[-2]  # copying goes on while the next batch is waited for
    stream.close()
    for batch in placed:
        assert_decoded(batch, clips)


def test_the_peer_counts_the_clips_that_it_has_loaded(written, monkeypatch):
    folder, clips = written
    loaded, real = [], torch.utils.data.DataLoader

    def load(dataset, batch_size, *, num_workers, prefetch_factor, **how):
        for batch in real(dataset, batch_size, **how):  # in this process
            loaded.append(batch)
            yield batch

    monkeypatch.setattr(torch.utils.data, "DataLoader", load)
    stream, claimed = input_pipeline.peer(folder, clips, 3, 2), 0
    for _ in range(3):
        claimed += next(stream)
        assert claimed == sum(len(batch["audio"]) for batch in loaded) == sum(len(batch["video"]) for batch in loaded)
    stream.close()
    for batch in loaded:
        assert_decoded(batch, clips)


@pytest.mark.parametrize(("depth", "of_text"), [(12, 6), (4, 2), (1, 1)])
def test_the_text_tower_has_half_the_blocks_of_the_others(depth, of_text):
    model = paper_step.make_config(batch=2, depth=depth, dtype="float32").model
    assert (model.audio.depth, model.video.depth, model.text.depth) == (depth, depth, of_text)


def test_the_flops_of_all_devices_are_compared_with_the_models(monkeypatch):
    def compile_step(config, topology):
        counts = hlo.Counts(flops=10**12, memory_bytes=2 * 10**9)  # of one of eight devices
        return compile_lib.Report(topology, 8, (8, 1), 32, "refine", 0, 0, 0, 0, 0, counts, 6.4e12, 1.0, 2.0)

    monkeypatch.setattr(compile_lib, "compile_step", compile_step)
    monkeypatch.setattr(scaling.topology_lib, "find_devices", lambda topology: [None] * 8)
    ((row, is_good),) = scaling.count_devices(options(topologies="cpu:8", batch_per_device=4))
    assert is_good
    found = dict(zip(scaling.COUNTED, row, strict=True))
    assert (found["devices"], found["batch"]) == ("cpu:8", "32")
    assert (found["TFLOP per device"], found["of the model's"]) == ("1.00", "1.250")  # 8 · 1 / 6.4
