"""The paper's train step at the sizes a benchmark asks for, on clips of noise.

JAX is imported where it is used: PyTorch's process (`benchmarks.train_step`) takes the config and the inputs from here, and
its time and memory must not hold JAX's.
"""

import concurrent.futures
import functools

import numpy as np

NUM_SAMPLES, CANVAS_PX = 24_000, (256, 344)  # clips of 1.5 s, video of 4:3


def make_config(*, batch: int, depth: int, dtype: str, remat: str = "none", scan: bool = False, chunk_size: int = 0):
    """Returns `configs/mc3_ego4d.py` at these sizes.

    Args:
      batch: Clips of a step.
      depth: Blocks of the audio and of the video tower; the text tower has half as many.
      dtype, remat: As in `config.ModelConfig`.
      scan: `config.ModelConfig.scan_layers`.
      chunk_size: As in `config.DataConfig`.
    """
    from configs import mc3_ego4d

    config = mc3_ego4d.get_config()
    config.data.batch_size, config.data.chunk_size = batch, chunk_size
    config.model.dtype, config.model.remat, config.model.scan_layers = dtype, remat, scan
    config.model.audio.depth = config.model.video.depth = depth
    config.model.text.depth = max(depth // 2, 1)
    # With "zeros" the output of time attention is 0: no comparison would see a fault in it, and a GPU may multiply zeros
    # faster than the weights that training has.
    config.model.video.time_init = "random"
    return config


def make_inputs(config) -> dict[str, np.ndarray]:
    """Returns the towers' inputs as they are after preparation: log-mel [b, time, mel], frames [b, t, y, x, 3], token ids."""
    rng = np.random.default_rng(0)
    b, audio, video, text = config.data.batch_size, config.model.audio, config.model.video, config.model.text
    size = video.image_size_px
    return {
        "audio": rng.standard_normal((b, audio.num_time_frames, audio.num_mel), np.float32),
        "video": rng.standard_normal((b, video.num_frames, size, size, 3), np.float32),
        "text_ids": rng.integers(1000, 2000, (b, text.num_tokens)).astype(np.int32),
        "text_mask": np.ones((b, text.num_tokens), np.int32),
    }


def make_batch(config) -> dict[str, np.ndarray]:
    """Returns decoded clips as the loader yields them: noise of the paper's sizes, another text for each clip."""
    from mc3_jax import train_step as step_lib

    rng = np.random.default_rng(0)
    shapes = step_lib.batch_shapes(config, NUM_SAMPLES, CANVAS_PX)
    batch = {name: np.ones(shape.shape, shape.dtype) for name, shape in shapes.items()}
    batch["video"] = rng.integers(0, 256, shapes["video"].shape, np.uint8)
    batch["audio"] = rng.integers(-3000, 3000, shapes["audio"].shape).astype(np.int16)
    batch["text_ids"] = rng.integers(1000, 2000, shapes["text_ids"].shape).astype(np.int32)
    batch["video_size"] = np.tile(np.int32(CANVAS_PX), (config.data.batch_size, 1))
    batch["row"] = np.arange(config.data.batch_size, dtype=np.int32)
    return batch


def refine(config):
    """Returns the paper's second phase, as if it were the whole run."""
    from mc3_jax import phases as phases_lib

    return phases_lib.Phase(config.phases[1], 0, 1_000_000)


def plan_state(model, config) -> tuple:
    """Returns a function that makes a new state of `refine`, and that state's shapes on all devices."""
    import jax

    from mc3_jax import mesh as mesh_lib, train_step as step_lib

    init = functools.partial(step_lib.init_state, model, config, refine(config))
    return init, mesh_lib.abstract_state(mesh_lib.make_mesh(), jax.eval_shape(init))


def draw_state(model, config):
    """Returns a new state of `refine` on all devices; to be called within the mesh of `mc3_jax.mesh.make_mesh`."""
    from mc3_jax import train_step as step_lib

    return step_lib.draw_state(*plan_state(model, config))


def make_step(config) -> tuple:
    """Returns (compiled, run): training's own step of `refine`, and a function that runs it once and returns its metrics.

    Every run goes on from the state that the last one left, on the same batch. To be called within the mesh of
    `mc3_jax.mesh.make_mesh`. As in training, the step is compiled while the state is drawn, and the two share a compilation
    cache.
    """
    from mc3_jax import mesh as mesh_lib, model as model_lib, train_step as step_lib

    model, mesh = model_lib.make_model(config.model), mesh_lib.make_mesh()
    shapes = mesh_lib.abstract_batch(mesh, step_lib.batch_shapes(config, NUM_SAMPLES, CANVAS_PX))
    init, abstract = plan_state(model, config)
    lowered = step_lib.jit_train_step(model, config, refine(config), abstract).lower(abstract, shapes, np.int32(0))
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        compiling = thread.submit(lowered.compile)
        state, step = step_lib.draw_state(init, abstract), 0
        batch = mesh_lib.put_batch(mesh, make_batch(config))
        compiled = compiling.result()

    def run():
        nonlocal state, step
        state, metrics, _ = compiled(state, batch, np.int32(step))
        step += 1
        return metrics

    return compiled, run
