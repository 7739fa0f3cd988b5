"""`mc3_jax.load` makes a model of a run, a folder or a checkpoint; its embeddings are those of evaluation."""

import copy
import inspect
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import librosa
import numpy as np
import pytest
import safetensors.numpy

import mc3_jax
from mc3_jax import (
    checkpoint,
    convert,
    embedder,
    evaluate,
    model as model_lib,
    run as run_lib,
    search,
    tower_tokenizer,
    training_facts,
    weights,
)
from mc3_jax.data import loader, tokenizer, transforms
from tests import golden_models, world


@pytest.fixture(scope="module")
def model(finished):
    return mc3_jax.load(finished[1], batch_size=4)


@pytest.fixture(scope="module")
def clips(finished):
    """The first six clips of the test split, and of each (canvas with the frames that evaluation takes, their size)."""
    config = finished[0]
    source = loader.open_split(config.data.dir, "test", config.model.video.num_frames)
    chosen = transforms.choose_frames(source.info.num_intervals, source.info.num_candidates, None)
    picked = [source[i] for i in range(6)]
    frames = []
    for clip in picked:
        canvas = np.zeros((len(chosen), *source.info.canvas_px, 3), np.uint8)
        frames.append((canvas, transforms.decode_frames([clip.frames[i] for i in chosen], canvas, "x")))
    return picked, frames


def test_a_loaded_run_embeds_clips_as_evaluation_does(finished, model, clips):
    config, _, state = finished
    picked, frames = clips
    tokenize = tokenizer.load_tokenizer(config.data.tokenizer, 16, 600)
    source = loader.open_split(config.data.dir, "test", 4)
    batch = next(loader.eval_batches(source, tokenize, batch_size=16, num_threads=1))
    embed = jax.jit(model_lib.make_embed_fn(model_lib.make_model(config.model), config.model))
    inputs = ("audio", "video", "video_size", "text_ids", "text_mask")
    expected = embed(state.params, {name: batch[name] for name in inputs})
    audio = model.embed_audio(np.stack([clip.audio for clip in picked]), 16_000)
    np.testing.assert_allclose(audio, expected["audio"][:6], atol=1e-5)
    text = model.embed_text([clip.narration for clip in picked])
    np.testing.assert_allclose(text, expected["text"][:6], atol=1e-5)
    for i, (canvas, size) in enumerate(frames):
        video = model.embed_video(canvas[:, : size[0], : size[1]])
        np.testing.assert_allclose(video, expected["video"][i], atol=1e-5)


def test_the_readmes_example_runs_as_it_stands(finished, data):
    text = (world.ROOT / "README.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    video = min(data.rglob("*.mp4"))
    found = {"runs/demo/train": finished[1], "kitchen.mp4": str(video)}
    for name, path in found.items():
        assert example.count(f'"{name}"') == 1
        example = example.replace(f'"{name}"', repr(path))
    values = {}
    exec(example, values)
    assert values["audio"].shape == values["video"].shape == (8,)
    assert values["text"].shape == (2, 8)


def test_embeddings_are_of_length_1_and_do_not_depend_on_the_batch(model, clips):
    audio = np.stack([clip.audio for clip in clips[0]])
    whole = model.embed_audio(audio, 16_000)
    assert whole.shape == (6, 8)
    assert isinstance(whole, np.ndarray)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose([model.embed_audio(a, 16_000) for a in audio], whole, atol=1e-6)
    as_float = audio.astype(np.float64) / 32768
    np.testing.assert_allclose(model.embed_audio(as_float, 16_000), whole, atol=1e-5)
    assert model.embed_text([]).shape == (0, 8)
    texts = ["#C C cuts the onion", "#C C drops a cup"]
    np.testing.assert_array_equal(model.embed_text(iter(texts)), model.embed_text(texts))


def test_texts_that_are_not_seen_whole_are_told_in_one_line(model, capsys):
    model.embed_text(["#C C cuts the onion"])
    assert capsys.readouterr().err == ""
    model.embed_text(["#C C cuts the onion", "cuts " * 40 + "\x1b", "🔪"])
    told = "2 of 3 texts are not seen whole: '" + "cuts " * 8 + "' is cut after 16 tokens"
    assert capsys.readouterr().err == f"warning: {told}\n"


def test_a_shape_is_compiled_once_per_power_of_two_up_to_the_batch_size(model, clips):
    audio = np.stack([clip.audio for clip in clips[0]])
    for num in (1, 2, 3, 4, 6):  # compiles batches of 1, 2 and 4 rows
        model.embed_audio(audio[:num], 16_000)
    compiled = model._audio._cache_size()
    for num in (1, 2, 3, 4, 5, 6):
        model.embed_audio(audio[:num], 16_000)
    assert model._audio._cache_size() == compiled
    model.embed_audio(audio[:, :16_000], 16_000)
    assert model._audio._cache_size() == compiled  # short sounds are padded


def test_a_short_sound_is_padded_as_the_loader_pads_it(model, clips):
    audio = np.stack([clip.audio for clip in clips[0]])
    for length in (400, 8_000, 23_999):
        filled = np.stack([transforms.crop_audio(sound[:length], 0, audio.shape[1])[0] for sound in audio])
        expected = model.embed_audio(filled, 16_000)
        np.testing.assert_allclose(model.embed_audio(audio[:, :length], 16_000), expected, atol=1e-6)


@pytest.fixture
def trained_on_1_s(finished, tmp_path) -> str:
    """Workdir of a run with the weights of `finished` that says it was trained on 1 s of each sound, with a window of 1.5."""
    place = shutil.copytree(finished[1], tmp_path / "trained_on_1_s")
    config = json.loads((place / "config.json").read_text())
    config["data"]["num_samples"] = 16_000
    (place / "config.json").write_text(json.dumps(config))
    return str(place)


def test_sounds_shorter_than_the_window_are_embedded_as_in_evaluation(finished, trained_on_1_s, clips, tmp_path):
    config, _, state = finished
    source = loader.open_split(config.data.dir, "test", config.model.video.num_frames)
    options = {"num_threads": 1, "num_samples": 16_000}
    batch = next(loader.eval_batches(source, tokenizer.blank(16), batch_size=8, **options))
    embed = jax.jit(model_lib.make_embed_fn(model_lib.make_model(config.model), config.model))
    inputs = ("audio", "video", "video_size", "text_ids", "text_mask")
    expected = np.asarray(embed(state.params, {name: batch[name] for name in inputs})["audio"])
    sounds = np.stack([clip.audio for clip in clips[0]])
    convert.main(["export", trained_on_1_s, "--to", "folder", "--out", str(tmp_path / "folder")])
    for path in (trained_on_1_s, tmp_path / "folder"):
        again = mc3_jax.load(path, batch_size=8)
        np.testing.assert_allclose(again.embed_audio(sounds[:, 4_000:20_000], 16_000), expected[:6], atol=1e-5)
        filled = np.stack([transforms.crop_audio(sound[:8_000], 0, 16_000)[0] for sound in sounds])
        shorter = again.embed_audio(sounds[:, :8_000], 16_000)
        np.testing.assert_allclose(shorter, again.embed_audio(filled, 16_000), atol=1e-6)
    found = search.embed_moments(again, source, batch_size=8, num_threads=1)
    np.testing.assert_allclose(found.audio[:8], expected, atol=1e-5)
    whole = mc3_jax.load(finished[1])
    assert search._made_of(again, source) != search._made_of(whole, source)
    padded_with_silence = whole.embed_audio(sounds[:, 4_000:20_000], 16_000)
    assert np.abs(padded_with_silence - expected[:6]).max() > 0.01


def test_the_length_of_sounds_in_training_is_recorded_unless_sounds_were_not_looked_at(finished, trained_on_1_s, tmp_path):
    read, folder = training_facts.read_num_samples, tmp_path / "folder"
    assert read(finished[1]) == 24_000  # the data set's
    assert read(trained_on_1_s) == 16_000
    values = json.loads(pathlib.Path(f"{finished[1]}/config.json").read_text())
    run = tmp_path / "run"
    (run / "checkpoints" / "3").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(values))
    assert read(str(run)) == 0  # of an earlier version
    values["data"]["num_samples"] = 99_999
    for phase in values["phases"]:
        phase["pairs"], phase["consensus_weight"] = ["vl"], 0.0
    (run / "config.json").write_text(json.dumps(values))
    assert read(str(run)) == 0
    sizes = golden_models.model_config()
    for recorded in ({}, {"num_samples": 16_000}):
        weights.write_folder(str(folder), {}, sizes, recorded)
        assert read(str(folder)) == recorded.get("num_samples", 0)
    for frames, expected in ((148, 16_000), (199, 0)):
        assert convert._num_samples(str(folder), golden_models.model_config(audio__num_time_frames=frames)) == expected
    assert read(str(golden_models.GOLDEN / "egovlp_tiny.pth")) == 0
    for odd in (24_080, -1, 1.5, "x"):
        weights.write_folder(str(folder), {}, sizes, {"num_samples": odd})
        with pytest.raises(ValueError, match=r"folder/config.json: num_samples must be a whole number from 0 to 24079, got"):
            mc3_jax.load(folder)


def test_sounds_at_another_rate_are_resampled(model, clips):
    audio = clips[0][0].audio / np.float32(32768)
    faster = librosa.resample(audio, orig_sr=16_000, target_sr=44_100, res_type="soxr_hq")
    at_home = model.embed_audio(audio, 16_000)
    assert model.embed_audio(faster, 44_100) @ at_home > 0.999
    assert model.embed_audio(faster[: len(audio)], 16_000) @ at_home < 0.999


def test_a_folder_exported_from_a_run_is_that_run_tokenizer_included(finished, model, clips, tmp_path):
    convert.main(["export", finished[1], "--to", "folder", "--out", str(tmp_path / "model")])
    again = mc3_jax.load(tmp_path / "model", batch_size=4)
    texts = [clip.narration for clip in clips[0]]
    np.testing.assert_array_equal(again.embed_text(texts), model.embed_text(texts))
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    newest = checkpoint.steps_of(finished[1])[-1]
    assert f"Where the weights come from:\n  - full, step {newest}\n" in (tmp_path / "model" / "README.md").read_text()
    convert.main(["import", "--checkpoint", finished[1], "--out", str(tmp_path / "imported")])
    assert weights.read_model_config(str(tmp_path / "imported")) == weights.read_model_config(finished[1])
    assert tower_tokenizer.learned(str(tmp_path / "imported")) == tower_tokenizer.learned(finished[1])


@pytest.fixture(scope="module")
def other_tokenizer(finished, tmp_path_factory):
    """Folder of a tokenizer with the run's tokens, but with their ids in reverse order after the first five."""
    folder = tmp_path_factory.mktemp("other") / "vocabulary"
    shutil.copytree(finished[0].data.tokenizer, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    tokens = list(content["model"]["vocab"])
    content["model"]["vocab"] = dict(zip(tokens, [*range(5), *reversed(range(5, len(tokens)))], strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


def test_a_text_tower_starts_with_the_tokenizer_it_has_learned_or_not_at_all(finished, other_tokenizer, tmp_path):
    config = copy.deepcopy(finished[0])
    config.init.text, config.data.tokenizer = finished[1], other_tokenizer
    with pytest.raises(ValueError, match=r"^config.data.tokenizer: .* not the tokenizer .* that one is in .*; config.init"):
        run_lib.set_up(config, str(tmp_path / "new"))
    place = shutil.copytree(finished[1], tmp_path / "run")
    shutil.rmtree(place / "tokenizer")
    values = json.loads((place / "config.json").read_text())
    values["data"]["tokenizer"] = other_tokenizer  # as if it were overwritten since
    (place / "config.json").write_text(json.dumps(values))
    config.init.text, config.phases = str(place), []
    with pytest.raises(ValueError, match=r"^config.data.tokenizer: .* not the tokenizer .* name that one"):
        evaluate.evaluate(config, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_run_whose_tokenizer_is_gone_uses_its_copy_and_without_one_embeds_all_but_text(
    finished, other_tokenizer, tmp_path, capsys
):
    place = shutil.copytree(finished[1], tmp_path / "run")
    config = json.loads((place / "config.json").read_text())
    config["data"]["tokenizer"] = other_tokenizer  # as if it were overwritten since
    (place / "config.json").write_text(json.dumps(config))
    assert tower_tokenizer.find(str(place)) == f"{place}/tokenizer"
    with pytest.raises(ValueError, match=f"{other_tokenizer} is not the .* trained with: that one is in {place}/tokenizer"):
        mc3_jax.load(str(place), tokenizer=other_tokenizer)
    shutil.rmtree(place / "tokenizer")
    again = mc3_jax.load(str(place))
    assert again.embed_audio(np.zeros(16_000, np.float32), 16_000).shape == (8,)
    with pytest.raises(ValueError, match=f"tokenizer of {place} is gone: {other_tokenizer} .* mc3_jax.load.path, tokenizer="):
        again.embed_text(["#C C cuts the onion"])
    export = ["export", str(place), "--to", "folder", "--out", str(tmp_path / "model")]
    for more, said in (([], "is gone: "), (["--tokenizer", other_tokenizer], "name that one, also for other data; its SHA")):
        with pytest.raises(SystemExit):
            convert.main([*export, *more])
        assert said in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    convert.main([*export, "--tokenizer", ""])
    assert "no tokenizer is included: the tokenizer of" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the tokenizer of .*model is gone: name it"):
        mc3_jax.load(tmp_path / "model").embed_text(["#C C cuts the onion"])
    convert.main([*export, "--tokenizer", finished[0].data.tokenizer])
    assert tower_tokenizer.find(str(tmp_path / "model")) == str(tmp_path / "model")


def test_a_folder_is_used_with_the_tokenizer_that_was_enclosed_and_no_other(finished, other_tokenizer, tmp_path, capsys):
    folder = tmp_path / "model"
    convert.main(["export", finished[1], "--to", "folder", "--out", str(folder)])
    import_text = ["import", "--checkpoint", str(folder), "--out", str(tmp_path / "copy"), "--config", "configs/demo.py"]
    error = f"is not the tokenizer .* was trained with: that one is in {folder}"
    with pytest.raises(ValueError, match=error):
        mc3_jax.load(folder, tokenizer=other_tokenizer)
    with pytest.raises(ValueError, match=error):
        tower_tokenizer.find(str(folder), "absent")
    with pytest.raises(SystemExit):
        convert.main([*import_text, "--tokenizer", other_tokenizer])
    assert "is not the tokenizer that the text tower of" in capsys.readouterr().err
    shutil.copyfile(f"{other_tokenizer}/tokenizer.json", folder / "tokenizer.json")
    with pytest.raises(ValueError, match="the tokenizer in .*model has changed since the export: export again, or name"):
        mc3_jax.load(folder)
    assert tower_tokenizer.find(str(folder), finished[0].data.tokenizer) == finished[0].data.tokenizer
    described = json.loads((folder / "config.json").read_text())
    described.pop("tokenizer_sha256")  # as in a folder of an earlier version
    (folder / "config.json").write_text(json.dumps(described))
    assert tower_tokenizer.find(str(folder)) == str(folder)
    assert tower_tokenizer.find(str(folder), other_tokenizer) == other_tokenizer


def test_towers_that_were_never_trained_are_named_wherever_the_weights_are_used(without_video, tmp_path, capsys):
    told = "the video tower was never trained, since no phase used it and no file initialised it: its embeddings mean nothing"
    folder = tmp_path / "folder"
    assert mc3_jax.load(without_video).untrained == ("video",)
    assert capsys.readouterr().err == f"warning: {without_video}: {told}\n"
    convert.main(["export", without_video, "--to", "folder", "--out", str(folder)])
    assert capsys.readouterr().err == f"warning: {without_video}: {told}\n"
    convert.main(["export", without_video, "--to", "hf_text", "--out", str(tmp_path / "text")])
    assert capsys.readouterr().err == ""  # that one was trained
    described = json.loads((folder / "config.json").read_text())
    assert described["untrained"] == ["video"]
    assert training_facts.read_untrained(str(folder)) == ["video"]
    card = (folder / "README.md").read_text()
    assert f"- Do not use all of it: {told}.\n- Audio: mono" in card
    assert "embed_audio(waveform, 16_000) @ model.embed_text(" in card
    assert "Tri-modal" not in card
    assert "- Video" not in card
    for values, found in (({}, []), ({"untrained": ["text", "audio"]}, ["audio", "text"])):  # none: of an earlier version
        described.pop("untrained", None)
        (folder / "config.json").write_text(json.dumps(described | values))
        assert training_facts.read_untrained(str(folder)) == found
    for odd in ("video", [["video"]], ["image"]):
        (folder / "config.json").write_text(json.dumps(described | {"untrained": odd}))
        with pytest.raises(ValueError, match=r"config.json: untrained must be a list of towers \(audio, video, text\), got "):
            mc3_jax.load(folder)


def test_an_earlier_step_of_a_run_can_be_exported(finished, tmp_path):
    convert.main(["export", finished[1], "--to", "folder", "--step", "3", "--out", str(tmp_path / "early")])
    early, last = (weights.read_checkpoint(str(p), finished[0].model)[0] for p in (tmp_path / "early", finished[1]))
    assert any((early[name] != last[name]).any() for name in early)
    assert json.loads((tmp_path / "early" / "config.json").read_text())["origin"] == ["full, step 3"]


def test_a_foreign_checkpoint_that_lacks_a_tower_or_a_projection_is_no_model(tmp_path):
    sizes = golden_models.model_config()
    with pytest.raises(ValueError, match="holds video and text, no audio tower: .* import --audio FILE"):
        mc3_jax.load(golden_models.GOLDEN / "egovlp_tiny.pth", model=sizes)
    tensors = convert.to_torch_layout(weights.complete({}, sizes, seed=0))
    headless = {name: value for name, value in tensors.items() if not name.startswith("txt_proj.")}
    safetensors.numpy.save_file(headless, tmp_path / "headless.safetensors")
    with pytest.raises(ValueError, match=r"headless.safetensors doesn't fit the model .*: - text/projection/bias \[32\]"):
        mc3_jax.load(tmp_path / "headless.safetensors", model=sizes)


def embed_unchecked(model, *args, tower="audio"):
    """Embeds without the run-time check of argument types, which only exists in tests."""
    return inspect.unwrap(getattr(type(model), f"embed_{tower}"))(model, *args)


def frames(height: int) -> np.ndarray:
    return np.zeros((height, 160, 3), np.uint8)


def test_the_length_of_a_sound_of_another_rate_is_checked_before_it_is_resampled(model, monkeypatch):
    monkeypatch.setattr(embedder.librosa, "resample", lambda *_, **__: pytest.fail("resampled"))
    for shape in ((44_100 * 60,), (44_100, 2), (2, 44_100 * 2)):
        with pytest.raises(ValueError, match="longer than the model|shorter than a"):
            model.embed_audio(np.zeros(shape), 44_100)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.embed_audio(np.zeros(40_000, np.float32), 16_000), r"2.50 s are longer .* window of 1.5\d s"),
        (lambda m: m.embed_audio(np.zeros(100, np.float32), 16_000), "shorter than a spectrogram frame of 400"),
        (lambda m: m.embed_audio(np.zeros((2, 3, 4), np.float32), 16_000), "mix the channels to mono"),
        (lambda m: m.embed_audio(np.zeros((66_150, 2)), 44_100), r"^1 samples.*; \(66150, 2\) looks like channels last: pas"),
        (lambda m: m.embed_audio(np.zeros((900, 300)), 16_000), "shorter than a spectrogram frame of 400$"),
        (lambda m: embed_unchecked(m, [np.zeros(16_000), np.zeros(9_000)], 16_000), "sounds of different lengths: cut"),
        (lambda m: embed_unchecked(m, "chopping.wav", 16_000), "is the path chopping.wav: read it first: .*librosa.load"),
        (lambda m: embed_unchecked(m, np.zeros(24_000), "44100"), "sample_rate must be a positive number of Hz, got '44100'"),
        (lambda m: m.embed_audio(np.zeros(24_000, np.int64), 16_000), "got int64"),
        (lambda m: m.embed_audio(np.full(24_000, np.nan), 16_000), "24000 of its values are NaN"),
        (lambda m: m.embed_audio(np.zeros(24_000), 0), "positive number of Hz, got 0"),
        (lambda m: m.embed_audio(np.zeros(24_000), float("nan")), "positive number of Hz, got nan"),
        (lambda m: m.embed_video(np.zeros((0, 90, 160, 3), np.uint8)), r"empty: \(0, 90, 160, 3\)"),
        (lambda m: m.embed_video(np.zeros((4, 0, 160, 3), np.uint8)), r"empty: \(4, 0, 160, 3\)"),
        (lambda m: m.embed_video(np.zeros((4, 90, 160, 3), np.float32)), "must be uint8"),
        (lambda m: m.embed_video(np.zeros((9, 90, 160, 3), np.uint8)), "9 frames, but the model takes at most 4"),
        (lambda m: embed_unchecked(m, [frames(90), frames(80)], tower="video"), "frames have different sizes: resize them"),
        (lambda m: m.embed_text("#C C cuts"), "must be a list of strings"),
        (lambda m: embed_unchecked(m, ["#C C cuts", None], tower="text"), "list of strings, got None among them"),
    ],
)
def test_bad_input_is_refused_with_the_value_and_the_fix(call, message, model):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_what_lies_in_a_run_or_is_one_without_weights_is_refused_with_what_to_name(finished, tmp_path):
    workdir = pathlib.Path(finished[1])
    for inside in (workdir / "checkpoints", workdir / "checkpoints" / str(checkpoint.steps_of(finished[1])[0])):
        with pytest.raises(ValueError, match=f"{inside} lies in the workdir of a run: name {workdir}; .* export {workdir} "):
            mc3_jax.load(str(inside))
    shutil.copy(workdir / "config.json", tmp_path)
    for read in (mc3_jax.load, weights.read_model_config):
        with pytest.raises(ValueError, match=f"{tmp_path} is the workdir of a run that has saved no checkpoint so far"):
            read(str(tmp_path))


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="absent"):
        mc3_jax.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="config.json cannot be read"):
        mc3_jax.load(pathlib.Path(tmp_path))


@pytest.mark.parametrize(
    ("tower", "field", "value"),
    [("audio", "num_heads", 0), ("audio", "stride_px", 0), ("video", "patch_px", -4), ("text", "depth", 10**8)],
)
def test_sizes_no_model_has_in_a_strangers_folder_are_one_error_with_file_and_field(tower, field, value, tmp_path):
    sizes = golden_models.model_config()
    setattr(getattr(sizes, tower), field, value)
    weights.write_folder(str(tmp_path), {}, sizes)
    with pytest.raises(ValueError, match=rf"config.json: config.model.{tower}.{field} = {value}: must be at"):
        mc3_jax.load(tmp_path)


def test_importing_the_package_does_not_import_jax():
    code = "import sys, mc3_jax, mc3_jax.data.records; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
