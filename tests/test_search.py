"""`python -m mc3_jax.search` ranks clips by the model's own embeddings, and names the argument that it can't use."""

import copy
import csv
import re
import shutil

import numpy as np
import pytest
import soundfile

import mc3_jax
from mc3_jax import embedder, search, weights
from mc3_jax.data import loader
from mc3_jax.evals import moments as moments_lib

TEXT = "#C C chops the onion"


def run(finished, out, *args) -> None:
    config, workdir, _ = finished
    search.main(["--model", workdir, "--clips", config.data.dir, "--split", "test", "--out", str(out), *map(str, args)])


@pytest.fixture(scope="module")
def found(finished, tmp_path_factory):
    """Folder with the results of a search for one text."""
    out = tmp_path_factory.mktemp("search") / "found"
    run(finished, out, "--text", TEXT, "--top", 5)
    return out


def test_hits_are_those_of_the_models_own_embeddings(finished, found):
    config, workdir, _ = finished
    source = loader.open_split(config.data.dir, "test", config.model.video.num_frames)
    with np.load(found / moments_lib.FILE, allow_pickle=False) as arrays:
        audio, video, ids = arrays["audio"], arrays["video"], arrays["clip_id"]
    clips = [source[i] for i in range(len(source))]
    assert ids.tolist() == [clip.clip_id for clip in clips]
    model = mc3_jax.load(workdir)
    np.testing.assert_allclose(audio, model.embed_audio(np.stack([clip.audio for clip in clips]), 16_000), atol=1e-5)
    [query] = model.embed_text([TEXT])
    scores = dict(zip(ids, (audio @ query + video @ query) / 2, strict=True))
    with (found / "hits.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert rows[0]["clip_id"] == max(scores, key=scores.get)
    assert {row["query"] for row in rows} == {TEXT}
    for row in rows:
        assert float(row["score"]) == pytest.approx(scores[row["clip_id"]], abs=1e-4)
    page = (found / "index.html").read_text()
    assert "onion" in page
    assert rows[0]["video_uid"] in page


def test_the_query_of_a_long_sound_is_its_loudest_part(finished, tmp_path, capsys):
    model, rate = mc3_jax.load(finished[1]), 8_000
    wave = np.random.default_rng(0).normal(size=5 * rate).astype(np.float32) * 0.01
    wave[2 * rate : 3 * rate + 4_000] *= 20
    soundfile.write(tmp_path / "long.wav", wave, rate, subtype="FLOAT")
    [found] = search.embed_queries(model, [], [str(tmp_path / "long.wav")]).values()
    told = re.search(r"long.wav: its loudest part, from (\S+) to (\S+) s", capsys.readouterr().out)
    start, stop = float(told[1]), float(told[2])
    assert (start, stop) == pytest.approx((2.0, 3.5), abs=0.011)
    place = search._loudest(wave, 12_000)
    np.testing.assert_allclose(found, model.embed_audio(wave[place[0] : place[1]], rate), atol=1e-6)
    assert search._loudest(wave[:12_000], 12_000) == (0, 12_000)


def test_clips_longer_than_the_models_window_are_heard_in_their_middle(finished, capsys):
    config, workdir, _ = finished
    sizes = copy.deepcopy(config.model)
    sizes.audio.num_time_frames = 99
    flat, _ = weights.read_checkpoint(workdir, sizes)
    model = embedder.Embedder(flat, sizes, "", 4)
    source = loader.open_split(config.data.dir, "test", config.model.video.num_frames)
    found = search.embed_moments(model, source, batch_size=8, num_threads=1)
    middles = np.stack([source[i].audio[4_000:20_000] for i in range(3)])
    search._check_window(model, source, "here")
    assert "the clips of here last 1.5 s, but the model's window is 1 s" in capsys.readouterr().err
    np.testing.assert_allclose(found.audio[:3], model.embed_audio(middles, 16_000), atol=1e-5)
    source.clip_samples[0] = 8_000  # as in a data set of sounds, whose length is each its own
    search._check_window(model, source, "here")
    assert "the clips of here last 0.5 to 1.5 s, but the model's window is 1 s" in capsys.readouterr().err
    source.clip_samples[:] = 12_000
    search._check_window(embedder.Embedder(flat, sizes, num_samples=12_000), source, "here")  # as it was trained
    assert capsys.readouterr().err == ""


def test_a_second_query_embeds_no_clip_again_but_another_model_does(finished, found, monkeypatch, capsys, tmp_path):
    config, workdir, _ = finished
    source = loader.open_split(config.data.dir, "test", 4)
    sound = tmp_path / "sound.wav"
    soundfile.write(sound, np.stack([source[3].audio] * 2, axis=1), 16_000)

    def embed(*args, **kwargs):
        raise ValueError("embedded again")

    monkeypatch.setattr(search, "embed_moments", embed)
    run(finished, found, "--sound", sound, "--by", "audio", "--top", 1)
    assert float((found / "hits.csv").read_text().splitlines()[1].split(",")[2]) == pytest.approx(1.0, abs=1e-3)  # itself
    run(finished, found, "--top", 3)
    out = capsys.readouterr().out
    assert moments_lib.AGREEMENT in out
    other = mc3_jax.load(workdir)
    digest = search._made_of(other, source)
    other.params["audio"]["projection"]["bias"] = other.params["audio"]["projection"]["bias"] + 1
    assert search._made_of(other, source) != digest


def test_a_tower_that_was_never_trained_ranks_no_moment(finished, found, without_video, tmp_path, capsys):
    out = shutil.copytree(found, tmp_path / "out")  # its embeddings are those of the same weights
    run(finished, out, "--text", TEXT, "--by", "audio", "--top", 5)
    expected = list(csv.DictReader((out / "hits.csv").open(newline="")))
    other = (finished[0], without_video, finished[2])
    capsys.readouterr()
    run(other, out, "--text", TEXT, "--top", 5)
    said = capsys.readouterr()
    assert said.out.startswith("moments are ranked by their sound alone (--by audio)\n")
    assert said.err.startswith(f"warning: {without_video}: the video tower was never trained")
    rows = list(csv.DictReader((out / "hits.csv").open(newline="")))
    assert rows == [row | {"video": "", "audio_video": ""} for row in expected]
    page = (out / "index.html").read_text()
    assert "<br>sound 0." in page or "<br>sound -0." in page
    assert "sound with frames" not in page
    for args, words in (
        (["--text", TEXT, "--by", "both"], "error: --by both: the video tower was never .*: use --by audio, or name"),
        ([], "error: without --text or --sound: the video tower was never trained, .*: give one of these, or name"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(other, out, *args)
        assert ended.value.code == 2
        assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("args", "untrained", "by", "words"),
    [
        (["--text", "x"], [], "both", ""),
        (["--text", "x", "--by", "video"], ["audio"], "video", ""),
        (["--text", "x"], ["audio"], "video", ""),
        (["--sound", "x"], ["text"], "both", ""),
        ([], ["text"], "both", ""),
        (["--text", "x"], ["text"], "", "--text: the text tower was never .* nothing: ask by --sound, or name another"),
        (["--text", "x"], ["video", "text"], "", "--text: the text tower was never .* nothing: ask by --sound, or name"),
        (["--text", "x", "--sound", "x"], ["audio"], "", "--sound: the audio tower was never .*: ask by --text, or name"),
        (["--text", "x"], ["audio", "video"], "", "--by both: the audio and video towers were .* nothing: name another"),
        (["--text", "x", "--by", "audio"], ["audio"], "", "--by audio: the audio tower was .*: use --by video, or name"),
    ],
)
def test_what_needs_a_tower_that_was_never_trained_is_refused(args, untrained, by, words):
    parsed = search._parse(["--model", "m", "--clips", "c", "--out", "o", *args])
    if not words:
        assert search._choose_score(parsed, untrained) == by
        return
    with pytest.raises(ValueError, match=words):
        search._choose_score(parsed, untrained)


def test_a_model_without_a_tokenizer_answers_sounds_and_says_what_texts_need(finished):
    model = mc3_jax.load(finished[1])
    model._tokenize = None
    with pytest.raises(ValueError, match="--text: .*; here: --tokenizer FOLDER"):
        search.embed_queries(model, [TEXT], [])
    assert search.embed_queries(model, [], []) == {moments_lib.AGREEMENT: None}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--text", " "], "--text ' ' is empty"),
        (["--model", "nowhere", "--sound", "nothing.wav"], "--sound nothing.wav is no file"),  # before the model is read
        (["--sound", "/"], "--sound / is a folder: name a sound file"),
        (["--sound", __file__], "Format not recognised. Give WAV, FLAC, Ogg or MP3; of a video, `ffmpeg -i"),
        (["--top", "0"], "--top must be at least 1, got 0"),
        (["--split", "tests"], "has no split 'tests'"),
        (["--model", "nowhere"], "nowhere"),
        (["--clips", "nowhere"], "no data folder nowhere"),
        (["--model", "nowhere", "--out", __file__], f"--out {__file__} is a file: name a folder"),  # before the model is read
    ],
)
def test_bad_arguments_end_with_one_line_and_status_2(finished, tmp_path, capsys, args, words):
    with pytest.raises(SystemExit) as ended:
        run(finished, tmp_path / "out", *args)
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_ctrl_c_ends_with_one_line_and_status_130(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(embedder, "load", interrupted)
    with pytest.raises(SystemExit) as ended:
        search.main(["--model", "a", "--clips", "b", "--out", "c", "--text", TEXT])
    assert ended.value.code == 130
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("interrupted: run the same command again")
