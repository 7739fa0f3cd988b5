"""Whether the accelerator computes what the CPU does: `python -m benchmarks.devices_agree`.

Computes the loss and the gradient of the refine phase from decoded clips, at the paper's widths, with few blocks and random
parameters. The reference is the CPU in float32, which computes attention by matrix products. The accelerator computes them
  * in float32, with matrix products at full precision, as the reference does;
  * in float32 by the forms of attention that a GPU uses in bfloat16, with XLA's attention where cuDNN's would be, which has
    no float32;
  * in bfloat16, as in training.
Prints the relative error of the loss and of each tower's gradient, and ends with status 1 if one is above its limit, `MOST`.
The limit for float32 allows for rounding; that for bfloat16 is twice the CPU's own largest error in it, 0.028 of text's
gradient.

Without an accelerator, the CPU is compared with itself. Then the first comparison can find nothing, and the third only what
goes wrong in bfloat16; the second finds faults in the GPU's forms of attention, except in cuDNN itself.
"""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Iterator, Mapping
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import paper_step, record
from mc3_jax import config as config_lib, model as model_lib, train_step as step_lib
from mc3_jax.models import attention

GPU_FORM = "float32, the GPU's attention"
MOST = {"float32": 1e-3, GPU_FORM: 1e-3, "bfloat16": 0.06}  # how the accelerator computes → largest relative error


@contextlib.contextmanager
def gpu_form() -> Iterator[None]:
    """Makes models built and traced in this context use the GPU's forms of attention, on any device and in float32."""
    plain = jax.nn.dot_product_attention

    def without_cudnn(query, key, value, *, implementation, **lengths):
        return plain(query, key, value, implementation="xla", **lengths)

    with (
        mock.patch.object(attention, "choose_form", return_value="cudnn"),
        mock.patch.object(jax.nn, "dot_product_attention", without_cudnn),
    ):
        yield


def make_batch(config: config_lib.Config) -> dict[str, np.ndarray]:
    """Returns decoded clips of noise, each brighter and louder than the one before.

    If all had the same brightness and loudness, their embeddings would be so alike that rounding to bfloat16 would change a
    tenth of text's gradient.
    """
    batch = paper_step.make_batch(config)
    for name in ("audio", "video"):
        share = np.linspace(0.1, 1, len(batch[name])).reshape(-1, *[1] * (batch[name].ndim - 1))
        batch[name] = (share * batch[name]).astype(batch[name].dtype)
    return batch


def outputs(config: config_lib.Config, params: dict, device: jax.Device) -> dict[str, np.ndarray]:
    """Returns {"loss": scalar, "gradient, TOWER": vector of all the tower's gradients}, as a device computes them."""
    model, phase = model_lib.make_model(config.model), paper_step.refine(config)
    phase.config.temperature = 0.5  # an untrained model's embeddings are alike: a small temperature would magnify rounding
    mesh = jax.sharding.Mesh(np.array([[device]]), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.default_device(device), jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        params = jax.device_put(params, device)
        batch = jax.device_put(make_batch(config), device)
        loss = step_lib.make_loss_fn(model, config, phase.config)
        options = step_lib.compiler_options(device)
        step = jax.jit(jax.value_and_grad(lambda p, b: loss(p, jnp.int32(0), b)[0]), compiler_options=options)
        value, gradient = step(params, batch)
    towers = {name: jax.tree.leaves(gradient[name]) for name in ("audio", "video", "text")}
    flat = {name: np.concatenate([np.ravel(np.asarray(leaf)) for leaf in leaves]) for name, leaves in towers.items()}
    return {"loss": np.asarray(value)} | {f"gradient, {name}": vector for name, vector in flat.items()}


def compare(batch: int, depth: int, device: jax.Device) -> dict[tuple[str, str], float]:
    """Returns {(name of `outputs`, way of `MOST`): relative error}.

    Args:
      batch: Clips of a step.
      depth: Blocks of the audio and of the video tower; the text tower has half as many.
      device: Device that is compared with the CPU.
    """
    cpu = jax.devices("cpu")[0]
    configs = {dtype: paper_step.make_config(batch=batch, depth=depth, dtype=dtype) for dtype in ("float32", "bfloat16")}
    model = configs["float32"].model
    with jax.default_device(cpu):  # outside of any mesh, whose devices would take precedence
        params = jax.tree.map(np.asarray, model_lib.init_params(model_lib.make_model(model), model, 0))
    wanted, errors = outputs(configs["float32"], params, cpu), {}
    for way in MOST:
        with gpu_form() if way == GPU_FORM else contextlib.nullcontext():
            found = outputs(configs["bfloat16" if way == "bfloat16" else "float32"], params, device)
        for name, value in found.items():
            errors[name, way] = float(np.linalg.norm(value - wanted[name]) / np.linalg.norm(wanted[name]))
    return errors


def judge(errors: Mapping[tuple[str, str], float]) -> list[str]:
    """Returns, in words, which errors of `compare` are above their limit or not a number."""
    return [f"{name} in {way}: {error:.1e}" for (name, way), error in errors.items() if not error <= MOST[way]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.devices_agree", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--depth", type=int, default=2, help="blocks of audio and video; text has half")
    parser.add_argument("--results", type=pathlib.Path, help="file to append to instead of RESULTS.md; '' only prints")
    args = parser.parse_args()
    device = jax.devices()[0]
    errors = compare(args.batch, args.depth, device)
    missed = judge(errors)
    text = f"Depth {args.depth}, batch {args.batch}; {device.device_kind} against the CPU.\n\n" + record.markdown(
        ["", "computed in", "relative error", "at most"],
        [[name, way, f"{error:.1e}", f"{MOST[way]:.0e}"] for (name, way), error in errors.items()],
    )
    text += f"\n\nMissed: {'; '.join(missed)}." if missed else ""
    record.append("The accelerator against the CPU", text, "jaxlib", path=args.results)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
