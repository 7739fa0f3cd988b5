"""Trains a run: `python -m mc3_jax.train --config=configs/demo.py --workdir=DIR`. Starting it again resumes it.

This file owns the order of things: what is set up, when a phase begins, when the state is written, when numbers are
read. Order matters in three places, marked below.
"""

import jax

from mc3_jax import checkpoint, cli, config as config_lib, mesh as mesh_lib, metric_writer, phases as phases_lib
from mc3_jax import train_step as step_lib
from mc3_jax.data import loader, tokenizer as tokenizer_lib

_CONFIG, _WORKDIR = cli.define_flags()


def train(config: config_lib.Config, workdir: str) -> step_lib.TrainState:
    """Runs (or resumes) all phases and returns the final state.

    Args:
      config: A validated config.
      workdir: Folder of the run.

    Raises:
      ValueError: The data, the workdir or the devices don't fit the config; one line says how.
    """
    with cli.user_errors():
        checkpoint.check_workdir(workdir, config_lib.to_dict(config))
        mesh = mesh_lib.make_mesh(fsdp=config.fsdp)
        mesh_lib.check_batch_size(mesh, config.data.batch_size)
        tokenize = tokenizer_lib.load_tokenizer(config.data.tokenizer, config.model.text.num_tokens)
        source = loader.open_split(config.data.dir, "train", num_frames=config.model.video.num_frames)
        phases = phases_lib.plan_phases(config.phases, len(source), config.data.batch_size)
    with jax.set_mesh(mesh):
        return _run_phases(config, workdir, mesh, source, tokenize, phases)


if __name__ == "__main__":
    cli.run(train, _CONFIG, _WORKDIR)
