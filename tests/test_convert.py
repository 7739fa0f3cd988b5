"""`python -m mc3_jax.convert`: imports checkpoints, exports to the sources' own modules, bit for bit both ways."""

import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

import mc3_jax
from mc3_jax import checkpoint, config as config_lib, convert, model as model_lib, tower_tokenizer, weights
from mc3_jax.data import tokenizer as tokenizer_lib
from mc3_jax.models import checkpoint_files
from tests import golden_models, world
from tests.models import torch_models

GOLDEN = golden_models.GOLDEN
CONFIG_FILE = """
from mc3_jax.config import Config
from tests import golden_models

def get_config():
    return Config(model=golden_models.model_config())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of this project that the command made from the video and text towers of EgoVLP and an AST."""
    root = tmp_path_factory.mktemp("convert")
    (root / "tiny.py").write_text(CONFIG_FILE)
    done = world.run(
        "mc3_jax.convert", "import", "--video", GOLDEN / "egovlp_config.pth", "--text", GOLDEN / "egovlp_tiny.pth",
        "--audio", GOLDEN / "ast_tiny_148.pth", "--config", root / "tiny.py", "--out", root / "folder",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "head of 7 outputs is skipped, since embed_dim is 32" in done.stdout
    return root / "folder"


def assert_equal_bits(found, expected):
    """Asserts that every parameter of `found` equals that of `expected`, bit for bit."""
    for name, value in found.items():
        assert value.tobytes() == expected[name].tobytes(), name


def flat(folder):
    return weights.read_checkpoint(str(folder), golden_models.model_config())[0]


def test_what_is_imported_computes_what_the_originals_computed(folder):
    params, sizes = flat(folder), golden_models.model_config()
    model = model_lib.make_model(sizes)
    golden = golden_models.egovlp_outputs()
    inputs = {"video": golden["video"]}
    out = jax.jit(model.apply)({"params": checkpoint.unflatten(params)}, **inputs)["video"]
    np.testing.assert_allclose(out, golden_models.normalize(golden["video_embedding"]), atol=1e-5, rtol=0)
    text = {"text_ids": golden["input_ids"], "text_mask": golden["attention_mask"]}
    out = jax.jit(model.apply)({"params": checkpoint.unflatten(params)}, **text)["text"]
    np.testing.assert_allclose(out, golden_models.normalize(golden["text_embedding"]), atol=1e-5, rtol=0)


def torch_model():
    """Returns EgoVLP's model with action2sound's audio model, in the sizes of the golden checkpoints, with random weights."""
    video, text = golden_models.EGOVLP["video"], golden_models.EGOVLP["text"]
    return torch_models.FrozenInTime(
        torch_models.VideoModel(48, 2, 4, 16, num_frames=video["num_frames"]),
        transformers.DistilBertModel(
            transformers.DistilBertConfig(
                dim=48, n_layers=2, n_heads=4, hidden_dim=192, vocab_size=120,
                max_position_embeddings=text["max_position_embeddings"],
            )
        ),
        torch_models.AudioModel(48, 2, 4, 168, label_dim=32),
        embed_dim=32,
    ).eval()  # fmt: skip


def assert_computes_the_golden_outputs(model):
    golden, ast = golden_models.egovlp_outputs(), golden_models.ast_outputs()
    with torch.no_grad():
        video = model.video_model(torch.from_numpy(golden["video"]).permute(0, 1, 4, 2, 3))
        ids, mask = (torch.from_numpy(golden[name].astype(np.int64)) for name in ("input_ids", "attention_mask"))
        first = model.text_model(ids, mask).last_hidden_state[:, 0]
        audio = model.audio_model.features(torch.from_numpy(ast["spectrogram_148"]))
        np.testing.assert_allclose(video, golden["video_features"], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(model.vid_proj(video), golden["video_embedding"], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(model.txt_proj(first), golden["text_embedding"], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(audio, ast["features_148"], atol=1e-5, rtol=1e-5)


def test_an_exported_pth_loads_strictly_into_the_original_modules_and_recomputes_the_golden_outputs(folder, tmp_path):
    path = tmp_path / "out.pth"
    convert.main(["export", str(folder), "--to", "pth", "--out", str(path)])
    state = torch.load(path, weights_only=True)["state_dict"]
    assert all(name.startswith("module.") for name in state)
    model = torch_model()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()}, strict=True)
    assert_computes_the_golden_outputs(model)


def test_an_exported_pth_has_the_names_and_shapes_of_the_originals_files(folder, tmp_path):
    convert.main(["export", str(folder), "--to", "pth", "--out", str(tmp_path / "out.pth")])
    shapes = {n: v.shape for n, v in checkpoint_files.read_tensors(tmp_path / "out.pth").items()}
    egovlp = {n: v.shape for n, v in checkpoint_files.read_tensors(GOLDEN / "egovlp_tiny.pth").items()}
    assert {n: s for n, s in shapes.items() if ".audio_model." not in n} == egovlp
    ast = {
        n.replace("module.", "module.audio_model.", 1): v.shape
        for n, v in checkpoint_files.read_tensors(GOLDEN / "ast_tiny_148.pth").items()
    }
    audio = {n: s for n, s in shapes.items() if ".audio_model." in n}
    assert set(audio) == set(ast)
    # The golden AST's heads have 7 labels and 10 image classes, ours the joint space's width and ImageNet's 1,000 classes.
    sized_otherwise = ("head.", "head_dist.", "mlp_head.1.")
    for name, shape in ast.items():
        assert any(part in name for part in sized_otherwise) or audio[name] == shape, name


def test_exported_safetensors_load_strictly_without_prefix(folder, tmp_path):
    convert.main(["export", str(folder), "--to", "safetensors", "--out", str(tmp_path / "out.safetensors")])
    tensors = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    model = torch_model()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()}, strict=True)
    assert_computes_the_golden_outputs(model)


def test_the_sizes_that_an_exported_file_lacks_are_told_as_options(folder, tmp_path, capsys):
    convert.main(["export", str(folder), "--to", "safetensors", "--out", str(tmp_path / "out.safetensors")])
    told = re.findall(r"--config\.model\.(?:(\w+)\.)?(\w+)=(\d+)", capsys.readouterr().out)
    found, wanted = config_lib.ModelConfig(), weights.read_model_config(str(folder))
    for tower, name, value in told:
        setattr(getattr(found, tower) if tower else found, name, int(value))
    for name in ("dtype", "attention"):
        setattr(found, name, getattr(wanted, name))
    found.text.dropout, found.video.time_init = wanted.text.dropout, wanted.video.time_init
    assert found == wanted != config_lib.ModelConfig()
    assert convert._sizes_as_options(config_lib.ModelConfig(dtype="float32")) == ""


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_round_trip_through_their_layout_is_bit_exact(kind, folder, tmp_path):
    path = tmp_path / f"out.{kind}"
    convert.main(["export", str(folder), "--to", kind, "--out", str(path)])
    back, _ = weights.read_checkpoint(str(path), golden_models.model_config())
    assert_equal_bits(flat(folder), back)


@pytest.mark.parametrize(("kind", "opened_as"), [("hf_text", "DistilBertModel"), ("hf_audio", "ASTModel")])
def test_hugging_face_opens_an_exported_folder_whole_and_computes_the_golden_outputs(kind, opened_as, folder, tmp_path):
    convert.main(["export", str(folder), "--to", kind, "--out", str(tmp_path / "hf")])
    model, report = transformers.AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(model).__name__ == opened_as
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    golden, ast = golden_models.egovlp_outputs(), golden_models.ast_outputs()
    with torch.no_grad():
        if kind == "hf_text":
            ids, mask = (torch.from_numpy(golden[name].astype(np.int64)) for name in ("input_ids", "attention_mask"))
            found = model.eval()(ids, mask).last_hidden_state[mask.bool()]
            expected = golden["text_hidden"][golden["attention_mask"].astype(bool)]
        else:
            hidden = model.eval()(torch.from_numpy(ast["spectrogram_148"])).last_hidden_state
            found, expected = hidden[:, :2].mean(1), ast["features_148"]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    tower = kind.removeprefix("hf_")
    back, _ = weights.read_towers({tower: str(tmp_path / "hf")}, golden_models.model_config())
    assert set(back) == {name for name in flat(folder) if name.startswith(f"{tower}/")}
    assert_equal_bits(back, flat(folder))
    heads = safetensors.numpy.load_file(tmp_path / "hf" / "projection.safetensors")
    assert {name.split(".")[0] for name in heads} == ({"txt_proj"} if kind == "hf_text" else {"mlp_head"})


def test_a_folder_of_ours_holds_sizes_weights_and_a_card_and_copies_bit_for_bit(folder, tmp_path):
    convert.main(["export", str(folder), "--to", "folder", "--out", str(tmp_path / "copy")])
    assert_equal_bits(flat(folder), flat(tmp_path / "copy"))
    described = json.loads((folder / "config.json").read_text())
    assert described["format"] == "mc3_jax"
    assert weights.read_model_config(str(folder)) == golden_models.model_config()
    card = (folder / "README.md").read_text()
    assert 'mc3_jax.load("folder")' in card
    assert "ast_tiny_148.pth" in card
    assert "newly initialised: norm, projection" in card


def test_parameters_that_no_file_holds_are_those_that_training_would_start_from(folder):
    sizes = golden_models.model_config()
    fresh, params = checkpoint.flatten(model_lib.init_params(model_lib.make_model(sizes), sizes, 0)), flat(folder)
    for name in ("audio/norm/scale", "audio/projection/kernel"):
        np.testing.assert_array_equal(params[name], fresh[name])


def test_a_tower_may_come_from_another_file_than_the_rest(folder, tmp_path):
    (tmp_path / "tiny.py").write_text(CONFIG_FILE)
    arguments = ["import", "--checkpoint", str(folder), "--video", str(GOLDEN / "egovlp_tiny.pth")]
    convert.main([*arguments, "--config", str(tmp_path / "tiny.py"), "--out", str(tmp_path / "mixed")])
    assert_equal_bits(flat(tmp_path / "mixed"), flat(folder))


def test_towers_that_no_file_gave_are_recorded_as_never_trained_and_stay_so(tmp_path):
    (tmp_path / "tiny.py").write_text(CONFIG_FILE)
    start, copy = tmp_path / "start", tmp_path / "copy"
    convert.main(["import", "--video", f"{GOLDEN}/egovlp_tiny.pth", "--config", f"{tmp_path}/tiny.py", "--out", str(start)])
    convert.main(["import", "--checkpoint", str(start), "--text", f"{GOLDEN}/egovlp_tiny.pth", "--out", str(copy),
                  "--config", f"{tmp_path}/tiny.py"])  # fmt: skip
    for folder, untrained in ((start, ["audio", "text"]), (copy, ["audio"])):
        assert json.loads((folder / "config.json").read_text())["untrained"] == untrained
    assert '\nmodel.embed_video(frames)\n```' in (start / "README.md").read_text()
    example = '\nmodel.embed_video(frames) @ model.embed_text(["#C C cuts the onion"]).T\n```'
    assert example in (copy / "README.md").read_text()


def test_a_folder_of_ours_that_is_the_only_source_brings_its_sizes_along(folder, tmp_path, capsys):
    convert.main(["import", "--checkpoint", str(folder), "--text", f"{folder}/", "--out", str(tmp_path / "copy")])
    assert weights.read_model_config(str(tmp_path / "copy")) == golden_models.model_config()
    assert_equal_bits(flat(folder), flat(tmp_path / "copy"))
    described = json.loads((folder / "config.json").read_text())
    described["model"]["num_classes"] = 3  # as in a run that classifies; only towers are imported
    (tmp_path / "copy" / "config.json").write_text(json.dumps(described))
    assert convert._read_sizes("", [str(tmp_path / "copy")])[0] == golden_models.model_config()
    capsys.readouterr()
    (tmp_path / "tiny.py").write_text(CONFIG_FILE.replace("config()", "config(text__num_heads=6)"))
    tiny = str(tmp_path / "tiny.py")
    with pytest.raises(SystemExit):
        convert.main(["import", "--text", str(folder), "--config", tiny, "--out", str(tmp_path / "none")])
    said = f"num_heads = 4, but the config 6: set it to 4; the sizes are those of --config {tiny}\n"
    assert capsys.readouterr().err.endswith(said)
    assert not (tmp_path / "none").exists()


def test_a_text_tower_is_imported_with_the_tokenizer_in_its_folder_unless_told_otherwise(folder, tmp_path, capsys):
    plain, ours, theirs, again = (tmp_path / name for name in ("plain", "ours", "theirs", "again"))
    (tmp_path / "tiny.py").write_text(CONFIG_FILE)
    convert.main(["export", str(folder), "--to", "hf_text", "--out", str(plain)])
    assert f"no tokenizer is included: {folder} has none; name one by --tokenizer FOLDER" in capsys.readouterr().out
    # As in distilbert-base-uncased: only the model's config.json says which kind of tokenizer it is.
    (plain / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cut", "onion"]))
    text = ["import", "--checkpoint", str(folder), "--config", str(tmp_path / "tiny.py"), "--text"]
    convert.main([*text, str(plain), "--out", str(ours)])
    assert f"the tokenizer in {plain} is included" in capsys.readouterr().out
    digest = tokenizer_lib.tokenizer_digest(plain)
    assert tower_tokenizer.learned(str(ours)) == [digest, tokenizer_lib.tokenizer_digest(ours)]
    assert tower_tokenizer.find(str(ours)) == str(ours)

    convert.main(["export", str(ours), "--to", "hf_text", "--out", str(theirs)])
    convert.main([*text, str(theirs), "--out", str(again)])
    assert f"the tokenizer in {theirs} is included" in capsys.readouterr().out
    assert tower_tokenizer.find(str(again)) == str(again)

    assert convert._find_tokenizer(str(plain), "", golden_models.model_config()) == ""
    assert f"no tokenizer is included: the one in {plain} is skipped\n" in capsys.readouterr().out
    before = (again / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit):  # the tokenizer in --out would be mistaken for this model's
        convert.main([*text, str(plain), "--tokenizer", "", "--out", str(again)])
    assert f"--out {again} holds a tokenizer, which would be mistaken" in capsys.readouterr().err
    assert (again / "model.safetensors").read_bytes() == before
    (plain / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(116))]))
    with pytest.raises(SystemExit):
        convert.main([*text, str(plain), "--out", str(tmp_path / "none")])
    assert "has 121 tokens but" in (said := capsys.readouterr().err)
    assert "or give --tokenizer '' to include none" in said


def test_a_folder_of_ours_with_another_number_of_heads_is_refused_though_every_shape_fits(folder):
    with pytest.raises(ValueError, match=r"folder has model.text.num_heads = 4, but the config 6: set it to 4"):
        weights.read_checkpoint(str(folder), golden_models.model_config(text__num_heads=6))


def test_an_encoder_with_another_activation_is_refused_though_every_shape_fits(folder, tmp_path):
    theirs = tmp_path / "theirs"
    convert.main(["export", str(folder), "--to", "hf_text", "--out", str(theirs)])
    described = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(described | {"activation": "relu"}))
    with pytest.raises(ValueError, match="theirs has the activation 'relu', but the text tower here has exact GELU"):
        weights.read_towers({"text": str(theirs)}, golden_models.model_config())


@pytest.mark.parametrize("sizes", [{"num_mel": 48}, {"stride_px": 8}])
def test_a_hugging_face_folder_says_how_many_rows_its_position_grid_has(folder, tmp_path, sizes):
    config, theirs = golden_models.model_config(), tmp_path / "theirs"
    convert.main(["export", str(folder), "--to", "hf_audio", "--out", str(theirs)])
    rows, columns = weights.model_lib.make_model(config).audio_tower.grid
    wanted = golden_models.model_config(**{f"audio__{name}": value for name, value in sizes.items()})
    more_rows, more_columns = weights.model_lib.make_model(wanted).audio_tower.grid
    assert more_rows != rows
    _, [note] = weights.read_towers({"audio": str(theirs)}, wanted)
    assert f"position grid {rows}x{columns} cut or stretched to {more_rows}x{more_columns}" in note
    described = json.loads((theirs / "config.json").read_text())
    for odd in (0, "16", None):
        (theirs / "config.json").write_text(json.dumps(described | {"frequency_stride": odd}))
        with pytest.raises(ValueError, match=f"theirs has frequency_stride = {odd!r}: it must be a whole number above 0"):
            weights.read_towers({"audio": str(theirs)}, wanted)


def test_weights_that_are_not_finite_are_refused_by_name(folder, tmp_path):
    params = flat(folder)
    params["text/projection/bias"] = params["text/projection/bias"] * np.float32(np.nan)
    weights.write_folder(str(tmp_path / "broken"), params, golden_models.model_config())
    message = r"broken, text tower, has values that are NaN or infinite in projection/bias \(1 such\)"
    with pytest.raises(ValueError, match=message):
        mc3_jax.load(str(tmp_path / "broken"))


def test_show_says_what_a_checkpoint_holds(folder, capsys):
    convert.main(["show", str(GOLDEN / "egovlp_tiny.pth")])
    convert.main(["show", str(folder)])
    convert.main(["show", str(folder / "model.safetensors")])
    shown = capsys.readouterr().out
    assert "video: egovlp layout with projection, 45 tensors" in shown
    assert "'num_time_frames': 148" in shown
    assert "text: mc3_jax layout with projection, 30 tensors" in shown


def test_the_workdir_of_a_run_is_never_written_over(folder, tmp_path, capsys):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "config.json").write_text("its own")
    for arguments in (["import", "--checkpoint", str(folder)], ["export", str(folder), "--to", "folder"]):
        with pytest.raises(SystemExit):
            convert.main([*arguments, "--out", str(tmp_path)])
        assert "is the workdir of a run: choose another folder" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "its own"


@pytest.mark.parametrize(("kind", "name"), [("pth", "x"), ("safetensors", "x"), ("folder", "x/m"), ("hf_audio", "x/m")])
def test_a_full_disk_is_one_line_that_names_the_file(kind, name, folder, small_disk, capsys):
    with pytest.raises(SystemExit) as ended:
        convert.main(["export", str(folder), "--to", kind, "--out", str(small_disk / "x")])
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(f"No space left on device: '{small_disk}/{name}|can't be written, .*full .*: '{small_disk}/x'", line)


def test_weights_of_another_kind_are_never_written_over(folder, tmp_path, capsys):
    own = shutil.copytree(folder, tmp_path / "own")
    text = tmp_path / "text"
    convert.main(["export", str(own), "--to", "hf_text", "--out", str(text)])
    for kind, out in (("hf_text", own), ("hf_audio", own), ("hf_audio", text), ("folder", text), ("pth", own),
                      ("folder", own / "model.safetensors")):  # fmt: skip
        before = {path: path.read_bytes() for path in tmp_path.glob("*/*")}
        with pytest.raises(SystemExit):
            convert.main(["export", str(own), "--to", kind, "--out", str(out)])
        told = capsys.readouterr().err
        assert re.search(r"error: --out \S+ (holds a model of|is a folder, but --to pth|is a file, but --to)", told)
        assert {path: path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file()} == before
    for kind, out in (("hf_text", text), ("folder", own)):  # over weights of the same kind
        convert.main(["export", str(own), "--to", kind, "--out", str(out)])
    assert_equal_bits(flat(own), flat(folder))


def test_a_config_file_that_fails_is_one_line_with_its_name(tmp_path):
    (tmp_path / "broken.py").write_text("def get_config():\n    return nothing\n")
    with pytest.raises(ValueError, match=r"broken.py can't be read: NameError: name 'nothing' is not defined"):
        convert._read_config(str(tmp_path / "broken.py"))


# One case runs the command, the others run in this process, which saves the imports.
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "--out", "{tmp}/x"], "name what to import"),
        (["import", "--video", "{tmp}/absent.pth", "--out", "{tmp}/x"], "absent.pth"),
        (["import", "--video", "{tmp}/page.pth", "--out", "{tmp}/x"], "page.pth"),
        (["import", "--video", "{golden}/egovlp_tiny.pth", "--out", "{tmp}/x"], "! encoder"),
        (["import", "--video", "{golden}/egovlp_tiny.pth", "--config", "{tmp}/no.py", "--out", "{tmp}/x"], "no.py"),
        (["export", "{tmp}", "--to", "pth", "--out", "{tmp}/x"], "neither a folder of"),
        (["show", "{tmp}/page.pth"], "page.pth"),
    ],
)
def test_bad_input_ends_with_one_line_and_status_2(arguments, message, tmp_path, capsys):
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>Not found</html>")
    arguments = [argument.format(tmp=tmp_path, golden=GOLDEN) for argument in arguments]
    if message == "! encoder":
        done = world.run("mc3_jax.convert", *arguments)
        status, said = done.returncode, done.stderr
        assert "; the sizes are the paper's; name others by --config FILE" in said
    else:
        with pytest.raises(SystemExit) as ended:
            convert.main(arguments)
        status, said = ended.value.code, capsys.readouterr().err
    assert status == 2, said
    lines = [line for line in said.splitlines() if line.strip()]
    assert len(lines) == 1, said
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not (tmp_path / "x").exists()


@pytest.mark.large
def test_base_size_checkpoints_are_imported_within_a_minute_and_4_gb(tmp_path):
    """At the real sizes of EgoVLP (16 temporal positions) and AST, random weights without optimizer; needs 3 GB of disk."""
    model = torch_models.FrozenInTime(
        torch_models.VideoModel(768, 12, 12, 196, num_frames=16),
        transformers.DistilBertModel(transformers.DistilBertConfig()),
        torch_models.AudioModel(768, 12, 12, 168, label_dim=256),
        embed_dim=256,
    )
    torch.save({"state_dict": {f"module.{n}": v for n, v in model.state_dict().items()}}, tmp_path / "base.pth")
    del model
    # VmHWM and not ru_maxrss, which a process inherits from the one that started it.
    code = (
        "import sys, time; from mc3_jax import convert; begin = time.monotonic(); convert.main(sys.argv[1:]); "
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM')); "
        "print(time.monotonic() - begin, int(peak.split()[1]) / 2**20)"
    )
    arguments = ["import", "--checkpoint", str(tmp_path / "base.pth"), "--out", str(tmp_path / "folder")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    seconds, gigabytes = map(float, done.stdout.splitlines()[-1].split())
    print(f"\nbase import: {seconds:.1f} s, {gigabytes:.2f} GiB")
    assert seconds < 60
    assert gigabytes < 4
    config = weights.read_model_config(str(tmp_path / "folder"))
    assert config == config_lib.ModelConfig()
    params, _ = weights.read_checkpoint(str(tmp_path / "folder"), config)
    counts = [sum(v.size for n, v in params.items() if n.startswith(p)) for p in ("video/e", "text/e", "audio/")]
    assert counts == [114_177_792, 66_362_880, 85_583_872]
    assert mc3_jax.__version__ in (tmp_path / "folder" / "README.md").read_text()
