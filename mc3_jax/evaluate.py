"""Evaluates a run: `python -m mc3_jax.evaluate --config=configs/demo.py --workdir=DIR`.

Embeds a split with the newest checkpoint and with the one at the end of every earlier phase, and measures discovery and
retrieval (`mc3_jax/evals`). Writes `results.json`, `report/index.html` and the newest checkpoint's `embeddings.npz` into DIR.
If no clip of the split is labelled, it measures only how well each clip is retrieved by another of its own modalities.

Weights from elsewhere need no run: `python -m mc3_jax.evaluate --config=configs/eval_ego4d.py --config.checkpoint=FILE`.
A config without phases needs none either: its towers are evaluated with their initial weights.
"""

import contextlib
import json
import pathlib
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from mc3_jax import (
    checkpoint,
    cli,
    config as config_lib,
    evaluate_sounds,
    job as job_lib,
    mesh as mesh_lib,
    metric_writer,
    model as model_lib,
    phases as phases_lib,
    terminal,
    tower_tokenizer,
    training_clips,
    training_facts,
    weights,
    whole_file,
    workdir as workdir_lib,
)
from mc3_jax.data import loader, records, tokenizer as tokenizer_lib
from mc3_jax.evals import controls, discovery, embeddings as embeddings_lib, metrics, report, retrieval, taxonomy


def embed_split(embed, checkpoints_params: dict, batches, mesh) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns every clip's embeddings under each set of parameters, and its labels and controls, in the order of the split.

    Args:
      embed: Function of `model.make_embed_fn`, jitted.
      checkpoints_params: Checkpoint name → parameters on the mesh.
      batches: From `loader.eval_batches`: this process's part of each batch; `valid` marks real rows.
      mesh: Mesh of the devices.

    Returns:
      ({name: {"audio", "video", "text"}: float32 [n, d]}, {"index", "label", "verb_id", "noun_id", "loudness",
      "onset_strength"}: [n]), the same on every process.
    """
    parts: dict[str, list] = {name: [] for name in checkpoints_params}
    known = []
    for batch in batches:
        audio = batch["audio"]
        onsets = controls.onset_strength(audio, records.SAMPLE_RATE_HZ)
        batch |= {"loudness": controls.loudness(audio), "onset_strength": onsets}
        own = {name: np.asarray(batch.pop(name)) for name in (*embeddings_lib.NUMBERS, "valid")}
        # Several processes exchange float32: cast here too, so that a single process gets the same numbers.
        own = {name: value.astype(np.float32) if value.dtype == np.float64 else value for name, value in own.items()}
        gathered = multihost_utils.process_allgather(own, tiled=True)
        valid = np.asarray(gathered.pop("valid"), bool)
        known.append({name: np.asarray(value)[valid] for name, value in gathered.items()})
        placed = mesh_lib.put_batch(mesh, batch)
        for name, params in checkpoints_params.items():
            out = multihost_utils.process_allgather(embed(params, placed), tiled=True)
            parts[name].append({tower: np.asarray(value, np.float32)[valid] for tower, value in out.items()})
    numbers = {name: np.concatenate([part[name] for part in known]) for name in embeddings_lib.NUMBERS}
    order = np.argsort(numbers["index"], kind="stable")
    embeddings = {
        name: {tower: np.concatenate([p[tower] for p in part])[order] for tower in part[0]}
        for name, part in parts.items()
    }
    return embeddings, {name: value[order] for name, value in numbers.items()}


def measure(
    embeddings: dict[str, np.ndarray], known: dict[str, np.ndarray], videos: np.ndarray, config: config_lib.EvalConfig
) -> dict:
    """Returns the metrics of one checkpoint as a nested dict: discovery, controls, their margin and both kinds of retrieval.

    Only retrieval can be measured where all clips sound, as in a list of positives, or where none is labelled. Then
    "discovery" and "controls" are empty and "margin" is None.

    Args:
      embeddings: {"audio", "video", "text"}: [n, d], either of labelled clips only or of clips without labels.
      known: Labels and controls of these clips, as from `embed_split`.
      videos: Video of each clip, as a number, [n].
      config: Sets the bootstrap, the pool of instance retrieval and the seed.

    Raises:
      ValueError: Embeddings that are not finite, or labels that are all 0.
    """
    for tower, value in embeddings.items():
        if bad := int((~np.isfinite(value)).any(1).sum()):
            raise ValueError(
                f"the {tower} embeddings of {bad} of {len(value)} clips are not finite: the weights are damaged or "
                "training has diverged, evaluate other weights"
            )
    labels, verbs = known["label"].astype(np.int64), known["verb_id"]
    draws = {"num_bootstrap": config.num_bootstrap, "seed": config.seed}
    scores = discovery.similarities(embeddings)
    heard = {name: known[name] for name in ("loudness", "onset_strength")}
    named, groups = retrieval.named_groups(labels, verbs, known["noun_id"])
    retrieved = {
        "retrieval": retrieval.retrieve({k: v[named] for k, v in embeddings.items()}, groups, config.seed),
        "instance_retrieval": retrieval.retrieve_instances(embeddings, pool_size=config.instance_pool, seed=config.seed),
    }
    if 0 not in labels:
        return {"discovery": {}, "controls": {}, "margin": None, **retrieved}
    alone = {name: metrics.roc_auc(labels, score) for name, score in heard.items()}
    return {
        "discovery": {pair: discovery.discover(score, labels, verbs, videos, **draws) for pair, score in scores.items()},
        "controls": {**alone, "verb_prior": controls.verb_prior_roc_auc(verbs, labels, config.seed)},
        "margin": discovery.compare(scores["av"], heard, labels, videos, **draws),
        **retrieved,
    }


def _load_run(config: config_lib.Config, workdir: str, mesh) -> dict[str, tuple[int, dict]]:
    """Returns name → (step, parameters) of a run: the checkpoints at the ends of earlier phases, then the newest one."""
    num_clips = training_clips.count(config, workdir_lib.trained_on(workdir))
    phases = phases_lib.plan_phases(config.phases, num_clips, config.data.batch_size)
    steps, stops = checkpoint.agreed_steps(workdir), [phase.stop for phase in phases]
    abstract = mesh_lib.abstract_state(mesh, checkpoint.unflatten(weights.param_shapes(config.model)))
    newest, params = checkpoint.restore_newest_params(workdir, abstract)
    loaded = {}
    for step in [*(s for s in stops if s in steps and s < newest), newest]:
        done = phases_lib.phase_at(phases, step - 1).config.name
        name = done if step in stops else f"{done}, step {step}"
        loaded[name] = (step, params if step == newest else checkpoint.restore_params(workdir, step, abstract))
    return loaded


def _check_labels(config: config_lib.Config, info: records.ClipsInfo) -> None:
    """Raises a ValueError, before anything is computed, if the split has labelled clips but none of them sounds."""

    def counts(split: str) -> tuple[int, int]:
        found = [info.splits[name] for name in split.split("+")]
        positive = sum(each.num_positive for each in found)
        return positive, sum(each.num_labelled for each in found) - positive

    positive, negative = counts(config.eval.split)
    if negative and not positive:
        others = [name for name in info.splits if all(counts(name))]
        fix = f"set --config.eval.split={others[0]}" if others else "convert with labels of both kinds"
        raise ValueError(
            f"split {config.eval.split!r} of {config.data.dir} has {positive} clips labelled as sounding and {negative} as "
            f"not: nothing to measure without clips that sound; {fix}"
        )


def _check_window(config: config_lib.Config, source: loader.ClipSource) -> None:
    """Refuses sounds that are longer than what the audio tower takes, and warns of those that are shorter than it hears."""
    num_samples = config.data.num_samples or source.info.num_samples
    clip_s, heard_s = num_samples / records.SAMPLE_RATE_HZ, model_lib.heard_s(config.model)
    told = f"each clip of {config.data.dir} gives {clip_s:g} s of sound, but the model's window is {heard_s:g} s"
    fix = "set config.data.num_samples" if config.data.num_samples else "convert again with --window"
    if num_samples > model_lib.most_samples(config.model):
        raise ValueError(f"{told}: {fix}")
    if clip_s < heard_s - 0.05 and jax.process_index() == 0:
        print(f"warning: {told}: the rest of its spectrogram is padding, AudioSet's mean; {fix}", file=sys.stderr)


def _find_tokenizer(config: config_lib.Config, path: str) -> str:
    """Returns the folder of the tokenizer that the text tower was trained with: any other gives meaningless embeddings.

    The config's folder may by now hold another tokenizer, or none. Then the copy that came with the weights is used, with a
    warning.

    Args:
      config: Its `data.tokenizer` is tried first.
      path: Path of the weights: a run, or as for `weights.read_checkpoint`.

    Raises:
      ValueError: The config's tokenizer doesn't fit, and the one the tower was trained with can't be found.
    """
    try:
        return tower_tokenizer.find(path, config.data.tokenizer)
    except ValueError as error:
        own = tower_tokenizer.own(path)
        if not own:
            raise ValueError(f"config.data.tokenizer: {error}") from error
        if jax.process_index() == 0:
            print(f"warning: config.data.tokenizer: {error}: using that one", file=sys.stderr)
        return own


def _load_file(config: config_lib.Config, mesh) -> dict[str, tuple[int, dict]]:
    """Returns file name → (0, parameters) of the weights in `config.checkpoint`."""
    flat, notes = weights.read_checkpoint(config.checkpoint, config.model, temporal=config.init.temporal)
    if jax.process_index() == 0:
        print("\n".join(notes), flush=True)
    abstract = mesh_lib.abstract_state(mesh, checkpoint.unflatten(weights.param_shapes(config.model)))
    return {pathlib.Path(config.checkpoint).name: (0, mesh_lib.replace_leaves(abstract, checkpoint.unflatten(flat)))}


def _load_untrained(config: config_lib.Config, mesh) -> dict[str, tuple[int, dict]]:
    """Returns "untrained" → (0, parameters) with which a run of this config would start."""
    initial, _ = weights.read_initial(config)
    flat = weights.complete(initial, config.model, config.seed)
    abstract = mesh_lib.abstract_state(mesh, checkpoint.unflatten(weights.param_shapes(config.model)))
    return {"untrained": (0, mesh_lib.replace_leaves(abstract, checkpoint.unflatten(flat)))}


def evaluate(config: config_lib.Config, workdir: str) -> dict:
    """Measures the end of every phase, writes results and report, and returns the results of the newest checkpoint.

    A model with classes is passed on to `evaluate_sounds`.

    With `config.checkpoint` only those weights are measured, and without phases only the towers' initial weights. In both
    cases the workdir must not hold a run.

    Raises:
      ValueError: No run or checkpoint in the workdir or a run where none may be, weights or data that don't fit, or none of
        the labelled clips sounds.
    """
    if config.model.num_classes:
        return evaluate_sounds.evaluate(config, workdir)
    has_run = _has_run(config)
    if has_run:
        workdir_lib.check_workdir(workdir, config, must_exist=True)
    elif checkpoint.newest_step(workdir):
        raise ValueError(f"{workdir} holds a run: to evaluate other weights, name another --workdir")
    mesh = mesh_lib.make_mesh(fsdp=config.fsdp)
    mesh_lib.check_batch_size(mesh, config.eval.batch_size, "eval.batch_size")
    num_frames = config.model.video.num_frames
    source = loader.open_split(
        config.data.dir, config.eval.split, num_frames, config.eval.folds, option="--config.eval.split"
    )
    _check_labels(config, source.info)
    _check_window(config, source)
    run, trained = _run_of_weights(config, workdir)
    path = config.checkpoint
    untrained = training_facts.read_untrained(path) if path else training_facts.untrained(config)
    tokenize = _make_tokenize(config, workdir if has_run else config.checkpoint or config.init.text, untrained)
    loaded = _load(config, workdir, mesh)
    params = {name: value for name, (_, value) in loaded.items()}
    embeddings, known = _embed_labelled(config, source, tokenize, params, mesh)
    actions = taxonomy.statistics(
        known["label"].astype(np.int64), known["verb_id"], known["noun_id"], source.info.verbs, source.info.nouns
    )
    videos = source.videos[known["index"]]
    results = {
        name: {"step": loaded[name][0]} | measure(value, known, videos, config.eval) for name, value in embeddings.items()
    }
    if jax.process_index() == 0:
        num_seen = _count_seen(config, source, known["index"], run, trained) if run else 0
        _write(config, workdir, source, results, embeddings, known, actions, untrained, num_seen)
    return results[list(results)[-1]]


def _has_run(config: config_lib.Config) -> bool:
    """Returns whether the run in the workdir is evaluated; otherwise `config.checkpoint` or the initial weights are."""
    return not config.checkpoint and len(config.phases) > 0


def _run_of_weights(config: config_lib.Config, workdir: str) -> tuple[str, config_lib.Config]:
    """Returns (workdir of the run that the weights to evaluate belong to, "" if to none; config of their training)."""
    if _has_run(config):
        return workdir, config
    if config.checkpoint and weights.is_run(config.checkpoint):
        return config.checkpoint, weights.read_run_config(config.checkpoint)
    return "", config


def _make_tokenize(config: config_lib.Config, weights_path: str, untrained: list[str]):
    """Returns the tokenizer to evaluate with. If there is none and the text tower is untrained, it returns only zeros.

    Args:
      config: Config of the evaluation.
      weights_path: Run, file or folder that the text tower comes from; "" if the tower is initialised at random.
      untrained: Names of the untrained towers.
    """
    text = config.model.text
    tokenizer = _find_tokenizer(config, weights_path) if weights_path else config.data.tokenizer
    if "text" in untrained and not tokenizer:
        return tokenizer_lib.blank(text.num_tokens)
    return tokenizer_lib.load_tokenizer(tokenizer, text.num_tokens, text.vocab_size)


def _load(config: config_lib.Config, workdir: str, mesh) -> dict[str, tuple[int, dict]]:
    """Returns name → (step, parameters) of everything to evaluate; the results of the last are those that are reported."""
    if _has_run(config):
        return _load_run(config, workdir, mesh)
    return _load_file(config, mesh) if config.checkpoint else _load_untrained(config, mesh)


def _embed_labelled(
    config: config_lib.Config, source: loader.ClipSource, tokenize, params: dict[str, dict], mesh
) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns what `embed_split` returns, reduced to the labelled clips if there are any."""
    batches = loader.eval_batches(
        source, tokenize, batch_size=config.eval.batch_size, num_samples=config.data.num_samples or None,
        process_index=jax.process_index(), process_count=jax.process_count(), num_threads=config.data.num_threads,
        num_workers=config.data.num_workers, prefetch=config.data.prefetch,
    )  # fmt: skip
    embed = jax.jit(model_lib.make_embed_fn(model_lib.make_model(config.model), config.model))
    with contextlib.closing(batches), jax.set_mesh(mesh):
        embeddings, known = embed_split(embed, params, batches, mesh)
    labelled = known["label"] >= 0
    if not labelled.any():
        return embeddings, known
    embeddings = {name: {k: v[labelled] for k, v in e.items()} for name, e in embeddings.items()}
    return embeddings, {name: value[labelled] for name, value in known.items()}


def _count_seen(
    config: config_lib.Config, source: loader.ClipSource, rows: np.ndarray, run: str, trained: config_lib.Config
) -> int:
    """Returns how many of the measured clips `run`, with the config `trained`, was trained on; see `training_clips`."""
    facts = workdir_lib.trained_on(run)
    if config.checkpoint:
        facts.setdefault("data.dir", "")  # not recorded by earlier versions: taken as other data
    return training_clips.count_seen(config, source, rows, trained.data, facts)


def _write(
    config, workdir: str, source, results: dict, embeddings: dict, known: dict, actions: dict, untrained: list[str],
    num_seen: int,
) -> None:  # fmt: skip
    """Writes `embeddings.npz`, `results.json` and the report, and prints the headline of each checkpoint."""
    has_texts = source.has_texts()
    meaningless = [f"no phase uses {' and '.join(untrained)}, whose similarities mean nothing"] * bool(untrained)
    meaningless += ["the clips have no texts: similarities with text mean nothing"] * (not has_texts)
    *before, last = results
    content = {
        "config": config.name, "seed": config.seed, "split": config.eval.split, "data": source.info.name,
        "checkpoint": last, **results[last], "earlier": {name: results[name] for name in before}, "taxonomy": actions,
        "untrained": untrained, "has_texts": has_texts, "num_seen": num_seen,
    }  # fmt: skip
    path = pathlib.Path(workdir) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    clips = (source[int(index)] for index in known["index"])  # one at a time: all would fill the memory
    named = np.array([[getattr(clip, name) for name in embeddings_lib.NAMES] for clip in clips])
    names = dict(zip(embeddings_lib.NAMES, named.T, strict=True))
    embeddings_lib.save(path.parent / embeddings_lib.FILE, embeddings[last], known | names)
    with whole_file.writing(path) as aside:  # after the embeddings: whoever finds it finds both
        aside.write_text(json.dumps(content, indent=1) + "\n")
    where = config.checkpoint or f"after step {results[last]['step']} ({last})"
    labels = known["label"]
    described = f"{len(labels)} " + ("clips without labels" if labels.max() < 0 else "labelled clips")
    facts = (
        f"{source.info.name}, {config.eval.split} split, {described}; seed {config.seed}; "
        f"checkpoint {where}"
        + (f"; {num_seen} of them were trained on" if num_seen else "")
        + "".join(f"; {line}" for line in meaningless)
    )
    chosen = config.eval
    page = report.write(
        pathlib.Path(workdir) / "report", title=f"mc3_jax: {config.name}", facts=facts, results=results,
        embeddings=embeddings, known=known, source=source,
        metric_rows=[] if config.checkpoint else metric_writer.read_metrics(workdir),
        sizes=report.Sizes(chosen.num_examples, chosen.num_clusters, chosen.num_cluster_examples, chosen.seed),
    )  # fmt: skip
    for name, result in results.items():
        print(f"{name}: {_headline(result)}")
    alone = {name: "–" if value is None else f"{value:.3f}" for name, value in results[last]["controls"].items()}
    if num_seen:
        print(f"warning: the run was trained on {num_seen} of these clips, so the results don't show how it generalises")
    for line in meaningless:
        print(line)
    if alone:
        print("controls: " + "  ".join(f"{name} {value}" for name, value in alone.items()))
        print(discovery.describe_margin(results[last]["margin"]))
    else:
        print(("no clip is labelled" if labels.max() < 0 else "all labelled clips sound") + ": discovery is not measured")
    print(f"{path}\n{page}")


def _headline(result: dict) -> str:
    found, said = result["discovery"], []
    if found:
        said += [f"{pair.upper()} ROC-AUC {found[pair]['roc_auc']:.3f}" for pair in ("av", "al")]
        inside = found["av"]["within_verb_roc_auc"]
        said.append("no verb has both labels" if inside is None else f"AV within verbs {inside:.3f}")
    if v2a := result["retrieval"].get("v2a"):
        said.append(f"V→A hit@5 {v2a['hit@5']:.3f} (chance {v2a['chance']['hit@5']:.3f})")
    if not found:
        own = result["instance_retrieval"]["v2a"]
        said.append(f"instance V→A recall@5 {own['recall@5']:.3f} (chance {own['chance']['recall@5']:.3f})")
    return "  ".join(said)


def _as_trained(config: config_lib.Config, workdir: str) -> config_lib.Config:
    """Returns the config with the settings that the weights were trained with, and prints those that the command lacks.

    See `workdir.as_trained` for a run and `training_facts.as_trained` for `config.checkpoint`.
    """
    own: list[str] = []
    if config.checkpoint:
        config, own = training_facts.as_trained(config, cli.overridden())
    elif config.phases:
        config, own = workdir_lib.as_trained(workdir, config, cli.overridden())
    if own and jax.process_index() == 0:
        whose = f"{config.checkpoint} records" if config.checkpoint else f"{workdir} was trained with"
        print(f"{whose} {' '.join(own)}; evaluation uses these settings", flush=True)
    return config


def main(config: config_lib.Config, workdir: str) -> None:
    """Evaluates what the command line names, with the settings it was trained with."""
    with cli.user_errors():
        job_lib.initialize(config.heartbeat_timeout_s)
    if jax.process_count() > 1:
        terminal.interrupt_at_once()  # also while this process waits for another
    with job_lib.ending_together(config.heartbeat_timeout_s), cli.user_errors():
        evaluate(_as_trained(config, workdir), workdir)


if __name__ == "__main__":
    missing = "what to evaluate is missing: --workdir=R of a run, or --config.checkpoint=FILE for other weights"
    cli.run(main, missing=missing)
