"""Texts from data stay texts everywhere in a page; a clip's media are in a page once, and small."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import plotly.graph_objects as go
import pytest
import simplejpeg
import soundfile

from benchmarks import table_pages
from mc3_jax.evals import figures, media, page, paper, report, sound_report
from mc3_jax.evaluate_sounds import METRICS
from tests import fake_pages

HOSTILE = fake_pages.HOSTILE
KINDS = {"run": fake_pages.run_page, "suite": fake_pages.suite_page, "sounds": fake_pages.sound_page}


class Parsed(html.parser.HTMLParser):
    """A parsed page: elements, attributes, text outside of scripts, and its JSON by id."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.attributes, self.text, self.data, self._script = [], [], [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self._script = dict(attrs) if tag == "script" else None

    def handle_endtag(self, tag):
        self._script = None if tag == "script" else self._script

    def handle_data(self, data):
        if self._script is None:
            self.text.append(data)
        elif "id" in self._script:
            self.data[self._script["id"]] = json.loads(data)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Kind of page → (its HTML, the same parsed)."""
    made = {}
    for kind, make in KINDS.items():
        text = make(tmp_path_factory.mktemp(kind)).read_text()
        made[kind] = text, Parsed(text)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_texts_are_texts(pages, kind):
    text, parsed = pages[kind]
    scripts = parsed.elements.count("script")
    assert scripts == len(parsed.data) + 2  # Plotly's and the page's own
    assert "b" not in parsed.elements
    assert not [found for found in parsed.attributes if found[1].startswith("on")]
    assert "".join(parsed.text).count(HOSTILE) >= 4
    assert "alert(1)</script>" not in text


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_texts_in_figures_are_escaped_for_plotly_as_well(pages, kind):
    figure_texts = json.dumps({k: v for k, v in pages[kind][1].data.items() if k.startswith("figure-")})
    assert "&lt;/script&gt;" in figure_texts
    assert not re.search(r"<(?!br>)", figure_texts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_loads_nothing_but_itself(pages, kind):
    links = [value for _, name, value in pages[kind][1].attributes if name in ("src", "href") and value[:1] != "#"]
    assert [link for link in links if not link.startswith(("data:", "runs/"))] == []


def test_a_histogram_of_scores_that_are_all_alike_has_bars():
    labels = np.array([0, 1, 0, 1])
    for scores in (np.full(4, 0.99995, np.float32), np.float32([1, 1, 1, 0.9999999])):
        for bar in figures.histogram(scores, labels).data:
            density = np.array(bar.y, float)
            assert bar.width > 0
            assert np.isfinite(density).all()
            np.testing.assert_allclose(density.sum() * bar.width, 1, rtol=1e-3)


def test_embedded_json_keeps_its_value():
    value = {HOSTILE: ["<!--", "]]>", "\u2029", "&lt;", 1.5]}
    shown = page.embed(json.dumps(value, ensure_ascii=False))
    assert not set(shown) & set("<>&\u2028\u2029")
    assert json.loads(shown) == value


def test_each_clip_is_stored_once_and_all_that_is_shown_is_stored(pages):
    for kind in ("run", "sounds"):
        text, parsed = pages[kind]
        stored = {name: value for name, value in parsed.data.items() if name.startswith("media-")}
        sounds = [value["audio"] for value in stored.values()]
        assert len(set(sounds)) == len(sounds) > 8
        for sound in sounds:
            assert text.count(sound) == 1
        shown = {value for _, name, value in parsed.attributes if name == "data-clip"}
        assert {f"media-{index}" for index in shown} <= set(stored)
        assert "base64," not in text.split("<script", maxsplit=1)[0]
    mapped = pages["run"][1].data["map-clips"]["clips"]
    assert {f"media-{clip['index']}" for clip in mapped} <= set(pages["run"][1].data)


def test_a_clip_takes_little_of_the_page(pages):
    data = pages["run"][1].data
    sizes = [len(json.dumps(value)) for name, value in data.items() if name.startswith("media-")]
    assert np.median(sizes) < 15_000  # the sound alone has 48 KB as WAV


def test_only_found_and_missed_show_more_than_one_frame(pages):
    parsed = pages["run"][1]
    counts = [len(value["frames"]) for name, value in parsed.data.items() if name.startswith("media-")]
    assert sorted(set(counts)) == [1, fake_pages.NUM_FRAMES]
    assert counts.count(fake_pages.NUM_FRAMES) == 8
    assert "img" not in [tag for tag, name, _ in pages["sounds"][1].attributes if name == "data-clip"]


def test_a_single_frame_is_that_of_the_middle():
    source = fake_pages.Source(3)
    shown = media.gather(source, [1, 2], [2])
    clip = source[1]
    assert shown[1].frames == [clip.frames[2 * 2 + 1]]
    assert shown[2].frames == source[2].frames[1::2]
    assert (shown[2].middle, shown[1].middle) == (2, 0)


def test_the_papers_table_stands_beside_epic_sounds_alone(pages):
    text, _ = pages["sounds"]  # its data have six classes
    assert "paper: " not in text
    assert "The paper" not in text
    content = {name: dict.fromkeys(METRICS, 0.5) | {"epoch": 1, "phase": "probe"} for name in ("last", "best")}
    tables = [sound_report._metrics_table(content, beside) for beside in (True, False)]
    assert [len(table.rows) for table in tables] == [2 + len(paper.CLASSIFICATION), 2]
    others = [f"class {i}" for i in range(paper.NUM_SOUND_CLASSES)]
    assert not sound_report.are_of_epic_sounds(others)
    theirs = [*paper.FIRST_SOUND_CLASSES, *others[3:]]
    assert sound_report.are_of_epic_sounds(theirs)
    assert not sound_report.are_of_epic_sounds(theirs[:-1])


def test_sound_survives_mp3():
    audio = fake_pages.Source(1)[0].audio
    heard, rate = soundfile.read(io.BytesIO(media.mp3(audio, 16_000)))
    assert rate == 16_000
    assert len(heard) == pytest.approx(len(audio), abs=3000)  # whole frames, and the encoder's delay
    spectra = [np.abs(np.fft.rfft(x[4000:20_000])) for x in (audio / 32768, heard)]
    assert abs(int(spectra[0].argmax()) - int(spectra[1].argmax())) <= 1
    assert media.mp3(audio[:0], 16_000) == b""
    assert len(soundfile.read(io.BytesIO(media.mp3(np.tile(audio, 20), 16_000)))[0]) < 11 * 16_000


def test_large_frames_shrink_and_small_ones_stay_as_they_are():
    large = simplejpeg.encode_jpeg(np.zeros((540, 960, 3), np.uint8))
    small, (width, height) = media.shrink(large)
    assert simplejpeg.decode_jpeg_header(small)[:2] == (height, width)
    assert 120 <= height < 240
    assert width / height == pytest.approx(16 / 9, rel=0.02)
    tiny = simplejpeg.encode_jpeg(np.zeros((72, 96, 3), np.uint8))
    assert media.shrink(tiny) == (tiny, (96, 72))


def test_texts_for_plotly_are_cut_and_escaped():
    assert figures.plain("a <b>&lt;") == "a &lt;b&gt;&amp;lt;"
    assert figures.plain("") == ""
    long = figures.plain("word " * 100, 20, 3)
    assert long.count("<br>") == 2
    assert long.endswith("…")
    assert figures.plain("x" * 99, 20, 1) == "x" * 18 + " …"


def test_long_curves_are_thinned_and_keep_their_ends():
    rng = np.random.default_rng(0)
    labels, scores = np.arange(5000) % 2, rng.normal(size=5000)
    roc = figures.curves({"a": {"av": scores, "al": scores}}, labels)["roc"].data[0]
    assert len(roc.x) <= figures.MAX_POINTS
    assert (roc.x[0], roc.y[0], roc.x[-1], roc.y[-1]) == (0, 0, 1, 1)


def test_columns_of_numbers_are_distinguished_from_those_of_words():
    table = page.Table("t", ("a", "b"), [[page.text("x"), page.number(None)], [page.text("2"), page.number(0.5)]])
    assert table.kinds == ["text", "number"]
    assert page.number(float("nan")) == page.Cell("–")


@pytest.mark.parametrize("missing", [{"retrieval": False}, {"log": False}, {"num_clips": 6}])
def test_a_run_without_groups_or_log_or_with_few_clips_has_a_page(tmp_path, missing):
    parsed = Parsed(fake_pages.run_page(tmp_path, **missing).read_text())
    assert ("Not measured: no verb-noun pair" in "".join(parsed.text)) == ("retrieval" in missing)


def test_clips_without_labels_have_a_page_that_calls_none_of_them_sounding(tmp_path):
    text = fake_pages.run_page(tmp_path, labels=False, log=False).read_text()
    parsed = Parsed(text)
    said = "".join(parsed.text)
    assert "Not measured: no clip is labelled." in said
    assert "Not drawn: no clip is labelled, and there are no training losses." in said
    assert "Not measured: no verb has five labelled clips." in said
    assert re.search(r"0\.200 \(0\.200\).*7\.5 \(7\.5\)", said, re.DOTALL)
    assert not re.search("does not sound|% sound|, sounds|Found|Missed|Correctly rejected", said)
    assert re.search(r"Highest\s+Clips with the highest.*Lowest\s+Clips with the lowest", said, re.DOTALL)
    assert {clip["facts"].split("; ")[-2] for clip in parsed.data["map-clips"]["clips"]} == {"no label"}


def test_a_page_explains_its_words_and_says_of_a_margin_what_its_interval_says(pages):
    for kind, words in (("run", ("AV", "AL", "VL", "within verbs", "verb prior", "onset strength", "V→A")),
                        ("suite", ("AV", "AL", "within verbs", "V→A"))):  # fmt: skip
        text = pages[kind][0]
        assert [word for word in words if f"<dt>{word}</dt>" not in text] == []
    said = "ROC-AUC of AV minus that of the better of loudness (0.500): +0.100, 95 % interval [+0.000, +0.200], "
    said += "which contains 0"
    assert said in pages["run"][0]


def test_found_are_the_positives_with_the_highest_score():
    labels, scores = np.array([1, 0, 1, 1, 0]), np.array([0.1, 0.9, 0.8, 0.3, 0.2])
    found = {kind: rows.tolist() for kind, rows in report.best_and_worst(scores, labels, 2).items()}
    assert found == {"Found": [2, 3], "Missed": [0, 3], "False alarms": [1, 4], "Correctly rejected": [4, 1]}


def test_the_surest_clips_are_shown_rightly_and_wrongly_classified():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    right, wrong = sound_report.surest(probabilities, np.array([0, 1, 1, 0]), 1)
    assert (right.tolist(), wrong.tolist()) == ([0], [3])


def test_the_suite_stands_beside_the_paper_and_links_the_pages_that_are_there(pages):
    text = "".join(pages["suite"][1].text)
    assert "The 95 % interval is over videos" in text
    assert f"{paper.DISCOVERY['MC3']['av'][0]:.3f}" in text
    assert "0.600 ± 0.010" in text
    assert re.search(r"\+0\.050 \[\+0\.010, \+0\.090\]", text)
    links = [value for _, name, value in pages["suite"][1].attributes if name == "href" and value.startswith("runs/")]
    assert links == ["runs/file_2/seed-1/report/index.html"]


@pytest.mark.parametrize(
    ("titles", "pairs"), [(("Random",), ("av", "al")), (("MC3",), ("av",)), (("Random", "MC3"), ("av",))]
)
def test_an_incomplete_suite_has_a_page_and_tables(tmp_path, titles, pairs):
    content = fake_pages.suite_content(titles, pairs)
    page_of = fake_pages.suite_report.write(tmp_path, content)
    assert "Table 3: retrieval" in page_of.read_text()
    assert "Table 3: retrieval" in table_pages.render(content)


def test_the_figure_of_leads_has_a_whisker_for_each_row():
    drawn = figures.leads(fake_pages.suite_content()["leads"]["av"])
    assert isinstance(drawn, go.Figure)
    dots = drawn.data[0]
    np.testing.assert_allclose(np.array(dots.x) - dots.error_x.arrayminus, 0.01, atol=1e-6)
    np.testing.assert_allclose(np.array(dots.x) + dots.error_x.array, 0.09, atol=1e-6)


def test_frames_in_a_page_are_jpeg_files(pages):
    stored = next(value for name, value in pages["run"][1].data.items() if name.startswith("media-"))
    assert simplejpeg.decode_jpeg_header(base64.b64decode(stored["frames"][0]))[:2] == (72, 96)


def test_a_suite_is_markdown_whose_cells_stay_text():
    content = fake_pages.suite_content(titles=("Random", "MC3", "a | b <script>"))
    lines = table_pages.render(content).splitlines()
    assert not any("<script" in line for line in lines)
    row = next(line for line in lines if line.startswith("| a \\| b &lt;script>"))
    header = next(line for line in lines if line.startswith("| row | AV ROC |"))
    assert row.replace("\\|", "").count("|") == header.count("|")
    assert sum(line.startswith("## ") for line in lines) == 5  # Tables 2 and 3, two of leads, the sweep
