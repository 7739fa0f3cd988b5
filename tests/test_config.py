"""Configs: every file builds and validates; bad values and bad flags end with one line that names the value and the fix."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from absl import flags

from configs import esc, mc3_ego4d
from mc3_jax import cli, config as config_lib, phases as phases_lib, validation

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(path for path in (ROOT / "configs").rglob("*.py") if path.name != "shared.py")


def load(path: pathlib.Path) -> config_lib.Config:
    """Returns what `get_config()` of a config file returns."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_config_file_validates_and_its_docstring_holds_its_command(path):
    validation.validate(load(path))
    assert f"--config={path.relative_to(ROOT)}" in path.read_text().split('"""')[1]


def test_rows_of_the_table_differ_in_their_phases_alone_and_have_one_budget():
    rows = {path.stem: load(path) for path in FILES if path.parent.name == "tables"}
    assert set(rows) == {
        "random", "clap", "cm_acc", "cmc", "image_bind", "without_consensus", "without_contrastive", "without_align", "mc3",
    }  # fmt: skip
    for name, config in rows.items():
        assert config.name == name
        assert dataclasses.replace(config, name="", phases=[]) == dataclasses.replace(rows["mc3"], name="", phases=[])
        assert sum(phase.epochs for phase in config.phases) == (0 if name == "random" else 9)
    rates = {phase.optimizer.learning_rate for config in rows.values() for phase in config.phases}
    assert len(rates) == 1
    terms = {name: [(p.contrastive_weight, p.consensus_weight) for p in config.phases] for name, config in rows.items()}
    assert terms["mc3"] == [(1, 0), (1, 1)]
    assert terms["without_consensus"] == [(1, 0), (1, 0)]
    assert terms["without_contrastive"] == [(1, 0), (0, 1)]
    assert terms["without_align"] == [(1, 1)]
    assert terms["cmc"] == [(1, 0)]


# Trains by each command line on standard input, with its environment variables. Forking for each saves the imports.
FORKS = """
import json, os, sys
from absl import flags
from mc3_jax import cli, train
for line in sys.stdin:
    words, variables, log = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.environ.update(variables)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(log, os.O_WRONLY), 2)
        sys.argv = ["train.py", *words]
        flags.DEFINE_string("profile", "", "")
        cli.run(train.main)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def train_by(tmp_path_factory):
    """A function that trains by a command line and returns (exit status, standard error)."""
    log = tmp_path_factory.mktemp("forks") / "log"
    alone = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # without threads, which a fork would lack
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=alone, text=True
    ) as parent:

        def train_by(*words: str, **variables: str) -> tuple[int, str]:
            log.write_text("")
            print(json.dumps([words, variables, str(log)]), file=parent.stdin, flush=True)
            return int(parent.stdout.readline()), log.read_text()

        yield train_by
        parent.stdin.close()


def test_rows_take_another_suite_by_the_config_files_argument(train_by, tmp_path):
    for suite, message in (("ego4d", "no data folder data/ego4d"), ("moon", "suite 'moon' is neither soundworld nor ego4d")):
        words = [f"--config=configs/tables/mc3.py:{suite}", f"--workdir={tmp_path}/w"]
        status, said = train_by(*words, *(["--config.data.dir=data/ego4d"] if suite == "ego4d" else []))
        assert status == 2
        assert message in said
        assert "Traceback" not in said


def test_the_papers_numbers_stand_in_its_config():
    config = load(ROOT / "configs" / "mc3_ego4d.py")
    align, refine = config.phases
    assert config.data.batch_size == 256
    assert [p.epochs for p in config.phases] == [5, 5]
    assert {p.optimizer.learning_rate for p in config.phases} == {3e-5}
    assert (align.consensus_weight, refine.consensus_weight) == (0.0, 1.0)
    assert refine.contrastive_weight == 1.0
    consensus = refine.consensus
    assert (consensus.anchor, consensus.alpha_video, consensus.alpha_text) == ("audio", 0.5, 1.0)
    for name in ("mc3_ego4d", "eval_ego4d"):
        video = load(ROOT / "configs" / f"{name}.py").model.video
        assert (video.image_size_px, video.resize_px) == (224, 224)


def test_an_override_of_a_phase_changes_no_other_phase_though_they_share_an_optimizer_in_the_file(monkeypatch):
    path = ROOT / "configs" / "tables" / "image_bind.py"
    one, other = load(path).phases
    assert one.optimizer is other.optimizer
    words = ["train", f"--config={path}", "--config.phases[0].optimizer.learning_rate=0.25"]
    monkeypatch.setattr(sys, "argv", words)
    parsed = flags.FlagValues()
    cli._define_flags(parsed)
    parsed(words)
    changed, same = parsed.config.phases
    assert changed == dataclasses.replace(one, optimizer=dataclasses.replace(one.optimizer, learning_rate=0.25))
    assert same == other


def test_help_names_config_and_workdir_and_is_no_fault(train_by, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train"])
    parsed = flags.FlagValues()
    cli._define_flags(parsed)
    assert re.search("--config: .*--workdir: ", parsed.main_module_help(), re.DOTALL)
    assert train_by("--help") == (0, "")


def test_a_config_file_that_exits_is_not_taken_for_a_request_for_help(train_by, tmp_path):
    path = tmp_path / "exits.py"
    path.write_text("import sys\nsys.exit(3)\n")
    assert train_by(f"--config={path}", "--workdir=unused")[0] == 3


FILE = """
from configs import demo
def get_config():
    config = demo.get_config()
    phase, optimizer = config.phases[0], config.phases[0].optimizer
    {}
    return config
"""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("optimizer.warmup_steps = 1e1", "config.phases[0].optimizer.warmup_steps = 10.0: must be int"),
        ("phase.learn_scale = 'no'", "config.phases[0].learn_scale = 'no': must be bool"),
        ("import pathlib; config.data.dir = pathlib.Path('x')", "config.data.dir = PosixPath('x'): must be str"),
        ("import numpy; phase.epochs = numpy.float32(1)", "config.phases[0].epochs = np.float32(1.0): must be float"),
        ("phase.epochs = None", "config.phases[0].epochs = None: must be float"),
        ("phase.pairs = 'av'", "config.phases[0].pairs = 'av': must be tuple"),
        ("config.phases = phase", "must be list"),
        ("config = {}['demo']", "can't be read: KeyError: 'demo'"),
    ],
)
def test_a_config_file_with_values_of_other_types_ends_with_one_line(line, message, train_by, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(FILE.format(line))
    status, said = train_by(f"--config={path}", f"--workdir={tmp_path}/w")
    assert status == 2, said
    assert "Traceback" not in said
    assert message in said.splitlines()[-1]


def test_a_file_that_is_not_there_is_named(train_by, tmp_path):
    status, said = train_by("--config=configs/absent.py", f"--workdir={tmp_path}/w")
    assert status == 2, said
    assert said.splitlines()[-1] == "error: no config file configs/absent.py: name a .py file such as configs/mc3_ego4d.py"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.data, "batch_size", 1), "config.data.batch_size = 1: must be at least 2"),
        (lambda c: setattr(c.model, "dtype", "float64"), "config.model.dtype = 'float64': must be float32 or bfloat16"),
        (lambda c: setattr(c.model.audio, "num_heads", 0), "model.audio.num_heads = 0: must be at least 1"),
        (lambda c: setattr(c.model.audio, "max_mel_mask", -1), "model.audio.max_mel_mask = -1: must be at least 0"),
        (lambda c: setattr(c.model.audio, "max_time_mask", 150), "model.audio.max_time_mask = 150: must be at most 149"),
        (lambda c: setattr(c, "seed", -1), "config.seed = -1: must be from 0 to"),
        (lambda c: setattr(c.data, "clips_per_video", 0), "data.clips_per_video = 0: must be at least 1"),
        (lambda c: setattr(c.data, "num_workers", -1), "data.num_workers = -1: must not be negative"),
        (lambda c: setattr(c.eval, "num_clusters", 0), "eval.num_clusters = 0: must be at least 1"),
        (lambda c: setattr(c.eval, "num_cluster_examples", 0), "eval.num_cluster_examples = 0: must be at least 1"),
        (lambda c: setattr(c.model.audio, "num_time_frames", 9), "num_time_frames = 9: must be at least patch_px = 16"),
        (lambda c: setattr(c.model.text, "depth", 10**9), "model.text.depth = 1000000000: must be at most 1000"),
        (lambda c: setattr(c.model.video, "crop_scale", (1.0,)), r"crop_scale = \(1.0,\): must be \(low, high\) with"),
        (lambda c: setattr(c.model.video, "image_size_px", 225), "image_size_px = 225: must be a multiple of patch_px"),
        (lambda c: setattr(c.model.text, "num_tokens", 513), "num_tokens = 513: must be at most num_positions = 512"),
        (lambda c: setattr(c.phases[0], "epochs", 0), r"phases\[0\].epochs = 0: must be positive"),
        (lambda c: setattr(c.phases[0], "pairs", ("va",)), r"phases\[0\].pairs = \('va',\)"),
        (lambda c: setattr(c.phases[0], "contrastive_weight", 0.0), "the phase has no loss"),
        (lambda c: c.phases.append(c.phases[0]), "must have different names"),
        (lambda c: setattr(c.phases[0].consensus, "anchor", "smell"), "anchor = 'smell': must be one of"),
        (lambda c: setattr(c.phases[0], "pairs", ("av", "av")), r"pairs = \('av', 'av'\): must hold only .* once"),
    ],
)
def test_bad_values_are_refused_with_the_value_and_the_fix(change, message):
    config = config_lib.Config()
    change(config)
    with pytest.raises(ValueError, match=message):
        validation.validate(config)


def test_egovlps_rates_are_the_papers_run_with_another_rate_after_the_first_epoch_of_each_stage():
    paper, other = mc3_ego4d.get_config(), mc3_ego4d.get_config("egovlp_rates")
    validation.validate(other)
    assert dataclasses.replace(other, name=paper.name, phases=paper.phases) == paper
    assert [(p.name, p.epochs, p.optimizer.learning_rate) for p in other.phases] == [
        ("align_first", 1, 3e-5), ("align", 4, 2e-4), ("refine_first", 1, 3e-5), ("refine", 4, 2e-4),
    ]  # fmt: skip
    assert not any(phase.reset_optimizer for phase in other.phases)
    for i, phase in enumerate(other.phases):
        same = dataclasses.replace(phase, name="", epochs=5, optimizer=config_lib.OptimizerConfig(3e-5))
        assert same == dataclasses.replace(paper.phases[i // 2], name="")
    steps = [p.stop for p in phases_lib.plan_phases(other.phases, 250_000, 256)]
    assert abs(steps[-1] - phases_lib.plan_phases(paper.phases, 250_000, 256)[-1].stop) <= 2  # apart from rounding
    with pytest.raises(ValueError, match="'nope' is neither paper nor egovlp_rates"):
        mc3_ego4d.get_config("nope")


CONSENSUS, ADAM = "phases[0].consensus.", "phases[0].optimizer."


@pytest.mark.parametrize(
    ("field", "bad", "good", "says"),
    [
        *[(f"{CONSENSUS}alpha_{name}", (0.0, -0.5), (0.1, 2.0), "positive") for name in config_lib.MODALITIES],
        ("model.text.dropout", (-0.1, 1.0, 1.5), (0.0, 0.9), "from 0 to below 1"),
        ("model.text.num_tokens", (1, 2), (3,), "at least 3"),
        ("model.video.flip_probability", (-0.1, 2.0), (0.0, 1.0), "from 0 to 1"),
        (f"{ADAM}b1", (-0.1, 1.0), (0.0, 0.99), "from 0 to below 1"),
        (f"{ADAM}b2", (-0.1, 1.5), (0.0, 0.9999), "from 0 to below 1"),
        (f"{ADAM}eps", (0.0, -1.0), (1e-12,), "positive"),
        (f"{ADAM}weight_decay", (-0.1,), (0.0, 0.1), "not be negative"),
        (f"{ADAM}clip_norm", (-1.0,), (0.0, 1.0), "not be negative"),
        (f"{ADAM}final_scale", (-0.1, 3.0), (0.0, 1.0), "from 0 to 1"),
        (f"{ADAM}warmup_steps", (-5,), (0, 5), "not be negative"),
        (f"{ADAM}learning_rate", (0.0, -1e-4), (1e-4,), "positive"),
        ("phases[0].consensus_weight", (-1.0,), (0.0, 0.3), "not be negative"),
        ("phases[0].temperature", (0.0, -0.05), (0.05,), "positive"),
        ("data.silence_db", (-1.0,), (0.0, 20.0), "not be negative"),
    ],
)
def test_numbers_have_a_range_and_what_is_outside_or_not_finite_is_refused(field, bad, good, says):
    holder, _, last = field.replace("[0]", "").rpartition(".")
    not_finite = () if isinstance(bad[0], int) else (float("nan"), float("inf"))
    for value in (*bad, *not_finite, *good):
        config = config_lib.Config()
        config.phases[0].optimizer.schedule = "cosine"  # which final_scale needs
        found = config
        for name in holder.split("."):
            found = getattr(found, name)
            found = found[0] if isinstance(found, list) else found
        setattr(found, last, value)
        if value in good:
            validation.validate(config)
            continue
        with pytest.raises(ValueError, match=re.escape(f"config.{field} = {value!r}: must ") + f".*{says}"):
            validation.validate(config)


@pytest.mark.parametrize(
    ("field", "value", "needs", "says"),
    [
        ("optimizer.final_scale", 0.1, {"optimizer.schedule": "cosine"}, "is used with schedule = 'cosine' only: set 0"),
        ("optimizer.hold_share", 0.5, {"optimizer.schedule": "cosine"}, "is used with schedule = 'cosine' only: set 0"),
        ("memory.dictionary_size", 256, {"memory.pool_size": 512}, "is used with a memory.pool_size above 0 only: set 0"),
        (
            "memory.momentum",
            0.5,
            {"memory.pool_size": 512, "memory.dictionary_size": 256},
            "is used with a memory.pool_size above 0 only: set 0.9",
        ),
    ],
)
def test_options_of_a_phase_that_would_have_no_effect_are_refused(field, value, needs, says):
    config = config_lib.Config()

    def put(name, value):
        part, _, last = name.partition(".")
        setattr(getattr(config.phases[0], part), last, value)

    put(field, value)
    with pytest.raises(ValueError, match=re.escape(f"config.phases[0].{field} = {value}: {says}") + "$"):
        validation.validate(config)
    for name, needed in needs.items():
        put(name, needed)
    validation.validate(config)


def test_a_hop_between_windows_needs_a_classifier():
    config = config_lib.Config(eval=config_lib.EvalConfig(hop_samples=8_000))
    with pytest.raises(ValueError, match=r"eval.hop_samples = 8000: is used with a classifier, .*num_classes.*: set 0$"):
        validation.validate(config)


def test_every_float_of_a_config_has_a_range():
    def lacking(kind):
        for field in dataclasses.fields(kind):
            if dataclasses.is_dataclass(field.type):
                yield from lacking(field.type)
            elif field.type is float and field.name not in validation.RANGES.get(kind, {}):
                yield f"{kind.__name__}.{field.name}"

    assert [*lacking(config_lib.Config), *lacking(config_lib.PhaseConfig)] == []


@pytest.mark.parametrize(
    ("change", "used"),
    [
        ({"pairs": ("vl",), "trainable": ("audio",)}, "video, text"),
        ({"pairs": ("al",), "trainable": ("video",)}, "audio, text"),
    ],
)
def test_a_phase_that_would_train_nothing_is_refused(change, used):
    config = config_lib.Config(phases=[config_lib.PhaseConfig(**change)])
    with pytest.raises(ValueError, match=rf"phases\[0\].trainable = .*: nothing would be trained, .* uses only {used}:"):
        validation.validate(config)
    config.phases[0].consensus_weight = 1.0  # the consensus looks at all modalities
    validation.validate(config)


def test_to_dict_holds_every_field():
    def count(value):
        if dataclasses.is_dataclass(value):
            return sum(count(getattr(value, f.name)) for f in dataclasses.fields(value))
        return sum(map(count, value)) if isinstance(value, list) else 1

    def count_dict(value):
        if isinstance(value, dict):
            return sum(map(count_dict, value.values()))
        is_phases = isinstance(value, list) and value and isinstance(value[0], dict)
        return sum(map(count_dict, value)) if is_phases else 1

    config = config_lib.Config()
    assert count(config) == count_dict(config_lib.to_dict(config))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.seed=1", "--config.nope=3"], "error: no config field config.nope: config has name, "),
        (["--config.model.nope.x=3"], "error: no config field config.model.nope.x: config.model has audio, "),
        (
            ["--config.data.dir=x", "--config.data.batchsize=8"],
            "error: no config field config.data.batchsize: did you mean config.data.batch_size?",
        ),
        (["--config.phase[0].epochs=2"], "no config field config.phase[0].epochs: did you mean config.phases?"),
        (["--config.seed.x=2"], "error: no config field config.seed.x: config.seed has no fields"),
        (["--config.data.batch_size=many"], "'many'"),
        (["--config.phases[7].epochs=2"], "phases[7].epochs: config.phases has 2 entries, write config.phases[0] to [1]"),
        (["--config.phases.epochs=2"], "error: no config field config.phases.epochs: config.phases has 2 entries, write"),
        (["--config.phases[0].epochs=-2"], "config.phases[0].epochs = -2.0: must be positive"),
        (["--config.phases=[]"], "error: config.phases can't be set as a whole: set its fields, e.g. --config.phases[0]"),
        (["--config.phases[0]=3"], "error: config.phases[0] can't be set as a whole: set its fields"),
        (["--config.seed=99999999999999999999"], "config.seed = 99999999999999999999: must be from 0 to 2**32 - 1"),
        (["--config.init.audio=", "a.pth", "--config.seed=1"], "error: 'a.pth' is not a flag: write --config.x=value,"),
        (["--workdir={tmp}/w", "--", "--config.seed=7"], "'--config.seed=7' is not a flag"),
        (["--workdir={tmp}/w", "config.seed=7"], "'config.seed=7' is not a flag"),
        (["--workdir={tmp}/w", "--config.data.folds=1,x"], "folds[0] = '1,x': must be int, several values are written as"),
        (["--nope=3"], "nope"),
        ([], "--workdir is missing"),
        (["--workdir={tmp}/w", "--config.data.dir="], "config.data.dir is empty"),
        (["--workdir={tmp}/w", "--config.data.dir={tmp}/absent"], "absent"),
    ],
)
def test_bad_command_lines_end_with_one_line_and_status_2(words, message, train_by, tmp_path):
    status, said = train_by("--config=configs/mc3_ego4d.py", *(word.format(tmp=tmp_path) for word in words))
    assert status == 2, said
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in said


def test_an_option_without_a_value_empties_a_tuple():
    config = esc.get_config()
    assert config.data.folds
    config.data.folds = config.phases[0].pairs = ("",)  # what config_flags makes of --config.data.folds=
    typed = cli._typed(config)
    assert (typed.data.folds, typed.phases[0].pairs, typed.eval.folds) == ((), (), (5,))


def test_an_unknown_field_is_named_also_when_flags_and_values_are_words_of_their_own(train_by):
    status, said = train_by("--config", "configs/demo.py", "--config.sed", "3")
    assert status == 2, said
    assert "error: no config field config.sed: did you mean config.seed?" in said.splitlines()


@pytest.mark.slow  # initialises the towers
def test_a_damaged_shard_ends_training_with_one_line_and_status_2(train_by, data, tmp_path):
    shutil.copytree(data / "clips", tmp_path / "clips")
    for shard in tmp_path.glob("clips/*-train.*"):
        content = bytearray(shard.read_bytes())
        content[110] ^= 0xFF  # in the first record
        shard.write_bytes(content)
    words = [f"--config.data.dir={tmp_path}/clips", f"--config.data.tokenizer={data}/vocabulary"]
    sizes = ("width=16", "depth=1", "num_heads=2")
    towers = [f"--config.model.{tower}.{size}" for tower in config_lib.MODALITIES for size in sizes]
    status, said = train_by("--config=configs/demo.py", f"--workdir={tmp_path}/w", *words, *towers)
    assert status == 2, said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert re.search(rf"{tmp_path}/clips/\S+, record 0 can't be read: .*: run `python -m data_prep.verify {tmp_path}", line)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({}, "localhost:1, but JAX does not recognise the cluster: set JAX_NUM_PROCESSES and JAX_PROCESS_ID as well"),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "must be numbers, got two, 0"),
    ],
)
def test_an_incompletely_described_job_ends_with_one_line_and_starts_no_run(job, message, train_by, tmp_path):
    job = {"JAX_COORDINATOR_ADDRESS": "localhost:1"} | job
    status, said = train_by("--config=configs/demo.py", f"--workdir={tmp_path}/w", **job)
    assert status == 2, said
    assert message in said.splitlines()[-1]
    assert not (tmp_path / "w").exists()


def test_the_command_itself_ends_with_one_line_and_status_2():
    command = [sys.executable, "-m", "mc3_jax.train", "--config=configs/mc3_ego4d.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert [line.split(":")[0] for line in done.stderr.splitlines() if line] == ["error"]
