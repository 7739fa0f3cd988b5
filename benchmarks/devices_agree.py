"""Whether the accelerator computes what the CPU does: `python -m benchmarks.devices_agree`.

Computes the loss and the gradient of the refine phase from decoded clips, at the paper's widths, with few blocks and random
parameters: in float32 on the CPU, and on the accelerator in float32 (matrix products at full precision) and in bfloat16.
Prints the relative error of the loss and of each tower's gradient, and ends with status 1 if one is above its limit, `MOST`.
The limit for float32 allows for rounding; that for bfloat16 is twice the error of the CPU's own bfloat16.
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import paper_step, record
from mc3_jax import config as config_lib, model as model_lib, train_step as step_lib

MOST = {"float32": 1e-3, "bfloat16": 0.1}


def outputs(config: config_lib.Config, params: dict, device: jax.Device) -> dict[str, np.ndarray]:
    """Returns {"loss": scalar, "gradient, TOWER": vector of all the tower's gradients}, as a device computes them."""
    model, phase = model_lib.make_model(config.model), paper_step.refine(config)
    phase.config.temperature = 0.5  # an untrained model's embeddings are alike: a small temperature would magnify rounding
    mesh = jax.sharding.Mesh(np.array([[device]]), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.default_device(device), jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        params = jax.device_put(params, device)
        batch = jax.device_put(paper_step.make_batch(config), device)
        loss = step_lib.make_loss_fn(model, config, phase.config)
        options = step_lib.compiler_options(device)
        step = jax.jit(jax.value_and_grad(lambda p, b: loss(p, jnp.int32(0), b)[0]), compiler_options=options)
        value, gradient = step(params, batch)
    towers = {name: jax.tree.leaves(gradient[name]) for name in ("audio", "video", "text")}
    flat = {name: np.concatenate([np.ravel(np.asarray(leaf)) for leaf in leaves]) for name, leaves in towers.items()}
    return {"loss": np.asarray(value)} | {f"gradient, {name}": vector for name, vector in flat.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.devices_agree", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--depth", type=int, default=2, help="blocks of audio and video; text has half")
    parser.add_argument("--results", type=pathlib.Path, help="file to append to instead of RESULTS.md; '' only prints")
    args = parser.parse_args()
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    configs = {dtype: paper_step.make_config(batch=args.batch, depth=args.depth, dtype=dtype) for dtype in MOST}
    model = configs["float32"].model
    with jax.default_device(cpu):  # outside of any mesh, whose devices would take precedence
        params = jax.tree.map(np.asarray, model_lib.init_params(model_lib.make_model(model), model, 0))
    wanted, rows, missed = outputs(configs["float32"], params, cpu), [], []
    for dtype, most in MOST.items():
        found = outputs(configs[dtype], params, device)
        for name, value in found.items():
            error = float(np.linalg.norm(value - wanted[name]) / np.linalg.norm(wanted[name]))
            rows.append([name, dtype, f"{error:.1e}", f"{most:.0e}"])
            missed += [f"{name} in {dtype}: {error:.1e}"] if not error <= most else []
    text = f"Depth {args.depth}, batch {args.batch}; {device.device_kind} against the CPU.\n\n" + record.markdown(
        ["", "computed in", "relative error", "at most"], rows
    )
    text += f"\n\nMissed: {'; '.join(missed)}." if missed else ""
    record.append("The accelerator against the CPU", text, "jaxlib", path=args.results)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
