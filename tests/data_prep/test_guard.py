"""Whatever a video does to its decoder costs only its own clips: real children crash, hang, eat memory and lie."""

import collections
import concurrent.futures
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data_prep import decoder_answers, guard, media, narrated, shards
from data_prep.windows import Window
from mc3_jax.data import records
from tests.data_prep import test_media

ROOT = pathlib.Path(__file__).parents[2]
LIMITS = guard.Limits()
SIDE = test_media.HEIGHT


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Folder with the videos `short.mp4`, `long.mp4`, and `large.mp4` with 4K frames."""
    made = tmp_path_factory.mktemp("videos")
    test_media.write(made / "short.mp4", seconds=3.0)
    test_media.write(made / "long.mp4", seconds=40.0, fps=10)
    test_media.write(made / "large.mp4", seconds=2.0, fps=3, size=(3840, 2160))
    return made


@pytest.fixture(autouse=True)
def no_child_of_another_test():
    guard.stop()
    yield
    guard.stop()


LONG = (0.5, 1.0, 12.0, 12.5, 24.0, 24.5, 36.0)  # three pairs of clips that overlap, and one by itself


def windows_at(times_s) -> list[Window]:
    return [test_media.window(t) for t in times_s]


def cut(path, times_s, limits: guard.Limits = LIMITS, side: int = SIDE) -> list[media.Cut | str]:
    found = list(guard.cut_windows(path, windows_at(times_s), short_side_px=side, limits=limits))
    assert sorted(i for i, _ in found) == list(range(len(times_s)))
    return [part for _, part in sorted(found, key=lambda pair: pair[0])]


def assert_equal(a: media.Cut | str, b: media.Cut | str):
    if isinstance(a, str) or isinstance(b, str):
        assert a == b
        return
    assert (a.frames, a.height, a.width) == (b.frames, b.height, b.width)
    for x, y in ((a.audio, b.audio), (a.frame_times_us, b.frame_times_us)):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(x, y)


def child() -> int:
    """Returns the pid of the idle child process."""
    (decoder,) = guard._idle
    return decoder.pid


def assert_gone(pid: int, seconds: float = 20.0):
    """Asserts that the process ends within `seconds` and is no zombie."""
    deadline = time.monotonic() + seconds
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline, f"{pid} is still there"
        time.sleep(0.02)


def test_a_child_cuts_what_this_process_cuts_and_lives_on(folder):
    pids = set()
    for name, times, stereo in (
        ("short.mp4", (1.9, 0.5, 5.0, 1.2), False), ("short.mp4", (1.9,), True), ("long.mp4", LONG, False),
        ("absent.mp4", (1.0,), False),
    ):  # fmt: skip
        options = {"short_side_px": SIDE, "stereo": stereo}
        here = list(media.cut_windows(folder / name, windows_at(times), **options))
        there = list(guard.cut_windows(folder / name, windows_at(times), **options, limits=LIMITS))
        assert [i for i, _ in here] == [i for i, _ in there]
        for (_, a), (_, b) in zip(here, there, strict=True):
            assert_equal(a, b)
        pids.add(child())
    assert len(pids) == 1
    assert list(guard.cut_windows(folder / "short.mp4", [], short_side_px=SIDE, limits=LIMITS)) == []


def test_when_the_child_crashes_the_clips_before_and_after_are_kept(folder):
    whole = cut(folder / "long.mp4", LONG)
    first = child()
    found = {}
    for i, part in guard.cut_windows(folder / "long.mp4", windows_at(LONG), short_side_px=SIDE, limits=LIMITS):
        if not found:
            os.kill(first, signal.SIGSEGV)  # answers already in the pipe are kept
        found[i] = part
    lost = [i for i, part in found.items() if isinstance(part, str)]
    assert sorted(found) == list(range(len(LONG)))
    assert {found[i] for i in lost} <= {"decoder crashed: signal SIGSEGV"}
    assert len(lost) <= 2  # a pair
    for i in set(found) - set(lost):
        assert_equal(found[i], whole[i])
    assert_gone(first, 0.0)
    assert child() != first
    ((_, here),) = media.cut_windows(folder / "short.mp4", windows_at((1.0,)), short_side_px=SIDE)
    assert_equal(cut(folder / "short.mp4", (1.0,))[0], here)


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGKILL, "was killed, perhaps because memory ran out: use fewer --num_workers or a smaller --memory_limit"),
     (signal.SIGTERM, "was ended from outside by SIGTERM"), (signal.SIGINT, "was ended from outside by SIGINT")],
)  # fmt: skip
def test_a_child_that_is_killed_from_outside_is_no_fault_of_the_video(folder, number, words):
    cut(folder / "short.mp4", (1.0,))
    pid = child()
    answers = guard.cut_windows(folder / "long.mp4", windows_at(LONG), short_side_px=SIDE, limits=LIMITS)
    next(answers)
    os.kill(pid, number)
    with pytest.raises(ChildProcessError, match=f"^the decoder of {folder / 'long.mp4'} {words}$"):
        list(answers)
    assert_gone(pid, 0.0)


# A child that runs as another user, who may read less than this one: root may read everything.
NOBODY = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from data_prep import decoder_child, media
if not os.geteuid():
    os.setuid(65534)
decoder_child.main()
"""


def test_a_file_that_the_machine_cannot_read_is_distinguished_from_a_damaged_one(folder, tmp_path, monkeypatch):
    (tmp_path / "disk.mp4").symlink_to("/proc/self/mem")  # reading it is an input error
    (tmp_path / "damaged.mp4").write_bytes((folder / "short.mp4").read_bytes()[:-2000])
    refused = link(tmp_path, "refused.mp4", "damaged.mp4")
    reasons = {
        "disk": "video file can't be read: Input/output error",
        "damaged": "video file can't be opened: Invalid data found when processing input",
    }
    assert {name: cut(tmp_path / f"{name}.mp4", (1.0,))[0] for name in reasons} == reasons
    guard.stop()
    monkeypatch.setattr(guard, "COMMAND", (sys.executable, "-c", NOBODY))
    (tmp_path / "damaged.mp4").chmod(0)
    assert cut(refused, (1.0, 2.0)) == ["video file can't be read: Permission denied"] * 2


# A child whose decoder does what the file's name says, before it decodes or, with `*_late`, after two clips.
ODD_CHILD = f"""
import ctypes, os, sys, time
import numpy as np
sys.path.insert(0, {str(ROOT)!r})
from data_prep import decoder_child, media, streams

def misbehave(name):
    if name.startswith("crash"):
        ctypes.string_at(0)
    elif name.startswith("hang"):
        time.sleep(1000)
    elif name.startswith("spin"):
        while True:
            pass
    elif name.startswith("eat"):
        kept = [b"x" * (1 << 24) * (time.sleep(0.01) is None) for _ in range(10_000)]
    elif name.startswith("ask"):
        kept = [np.zeros(1 << 30, np.uint8) for _ in range(100)]  # and never touched
    elif name.startswith("raise"):
        print("many words", file=sys.stderr)
        raise KeyError("a bug")
    elif name.startswith("print"):
        os.write(1, b"words of a library" * 100)

def cut_windows(path, windows, **kwargs):
    for number, (i, cut) in enumerate(cut_good(path, windows, **kwargs)):
        if number == 2 * ("_late" in path.name):
            misbehave(path.name)
        yield i, cut

class Streams:
    length_s = streams.length_s

    def probe(path, kinds):
        misbehave(path.name)
        return streams.probe(path, kinds)

cut_good, media.cut_windows = media.cut_windows, cut_windows
decoder_child.streams = Streams
decoder_child.main()
"""


@pytest.fixture
def odd_child(monkeypatch):
    monkeypatch.setattr(guard, "COMMAND", (sys.executable, "-c", ODD_CHILD))


def link(folder: pathlib.Path, name: str, video: str) -> pathlib.Path:
    """Returns the path of a link `name` in `folder` to the video."""
    path = folder / name
    if not path.exists():
        path.symlink_to(folder / video)
    return path


QUICK = guard.Limits(video_cpu_s=1.0, clip_cpu_s=0.0)  # three seconds of wall clock


@pytest.mark.parametrize(
    ("name", "limits", "reason"),
    [
        ("crash", LIMITS, "decoder crashed: signal SIGSEGV"),
        ("raise", LIMITS, "decoder crashed: KeyError: 'a bug'"),
        ("hang", QUICK, "decoder took too long: more than 3 s"),
        ("spin", QUICK, "decoder took too long: more than 1 s of CPU time"),
        ("eat", guard.Limits(memory_mb=300), "decoder ran out of memory: limit 300 MiB"),
        ("ask", guard.Limits(memory_mb=300), "decoder ran out of memory: limit 300 MiB"),
    ],
)
def test_a_video_that_harms_its_decoder_costs_itself_and_the_next_gets_a_new_one(
    folder, odd_child, monkeypatch, name, limits, reason
):
    if name == "spin":
        monkeypatch.setattr(guard, "_WALL_PER_CPU", 60.0)  # the CPU limit comes first, even on a busy machine
    good = cut(folder / "short.mp4", (0.5, 1.9))
    first, begin_s = child(), time.monotonic()
    assert cut(link(folder, f"{name}.mp4", "short.mp4"), (0.5, 1.9), limits) == [reason] * 2
    assert time.monotonic() - begin_s < 30
    assert_gone(first, 0.0)
    for a, b in zip(cut(folder / "short.mp4", (0.5, 1.9)), good, strict=True):
        assert_equal(a, b)
    assert child() != first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lost"),
    [
        # The second child dies at the last clip.
        ("crash_late", dict.fromkeys((2, 3, 6), "decoder crashed: signal SIGSEGV")),
        ("hang_late", dict.fromkeys((2, 3, 4, 5, 6), "decoder took too long: more than 3 s")),  # no second child
    ],
)
def test_the_clips_before_the_harm_are_kept_and_those_behind_are_tried_once(folder, odd_child, name, lost):
    good = cut(folder / "long.mp4", LONG)
    found = cut(link(folder, f"{name}.mp4", "long.mp4"), LONG, QUICK)
    for i, part in enumerate(found):
        if i in lost:
            assert part == lost[2]
        else:
            assert_equal(part, good[i])


@pytest.mark.slow
def test_a_video_that_hangs_holds_its_worker_as_long_as_one_clip_may_take(folder, odd_child, monkeypatch):
    monkeypatch.setattr(guard, "_WALL_PER_CPU", 1.0)
    limits = guard.Limits(video_cpu_s=1.0, clip_cpu_s=1.5)  # 11.5 s for the seven
    found = cut(link(folder, "hang_late.mp4", "long.mp4"), LONG, limits)
    assert [part for part in found if isinstance(part, str)] == ["decoder took too long: more than 2.5 s for one clip"] * 5


def test_a_file_is_probed_in_a_child_too(folder, odd_child, monkeypatch):
    monkeypatch.setattr(guard, "_WALL_PER_CPU", 1.0)
    (folder / "text.mp4").write_text("no video")
    reasons = {
        "short": None,
        "text": "video file can't be opened: Invalid data found when processing input",
        "absent": "video file is missing",
        "crash": "decoder crashed: signal SIGSEGV",
        "hang": "decoder took too long: more than 2 s",
        "eat": "decoder ran out of memory: limit 300 MiB",
    }
    for name in ("crash", "hang", "eat"):
        link(folder, f"{name}.mp4", "short.mp4")
    limits = guard.Limits(video_cpu_s=2.0, memory_mb=300)
    assert {name: guard.probe(folder / f"{name}.mp4", KINDS, limits) for name in reasons} == reasons
    assert guard.length_s(folder / "short.mp4", KINDS, limits) == pytest.approx(3.0, abs=0.1)
    odd = [f'{{"reason": null, "length_s": {value}}}' for value in ("NaN", "Infinity", "[1]", '"long"', "true", "7")]
    for word in ("b'[]\\n'", "b'{}\\n'", "b'{\"reason\": \"\"}\\n'", *(repr(f"{line}\n".encode()) for line in odd)):
        guard.stop()
        monkeypatch.setattr(guard, "COMMAND", liar(word))
        assert guard.probe(folder / "short.mp4", KINDS).startswith(NONSENSE)


def test_a_video_costs_so_many_children_and_no_more(folder, odd_child, monkeypatch):
    monkeypatch.setattr(guard, "_MAX_CHILDREN", 3)
    crash = "decoder crashed: signal SIGSEGV"
    assert cut(link(folder, "crash.mp4", "long.mp4"), np.arange(0.5, 38.0, 2.0)) == [crash] * 19
    started = []
    decoder = guard.Decoder
    monkeypatch.setattr(guard, "Decoder", lambda command: (started.append(command), decoder(command))[1])
    found = cut(link(folder, "crash_late.mp4", "long.mp4"), np.arange(0.5, 38.0, 2.0))
    assert [part == crash for part in found] == [False, False, True] * 2 + [False, False] + [True] * 11
    assert len(started) == 3


def test_a_child_that_does_not_even_read_is_given_up(folder, monkeypatch):
    monkeypatch.setattr(guard, "_WALL_PER_CPU", 0.5)
    cut(folder / "short.mp4", (1.0,))
    pid = child()
    os.kill(pid, signal.SIGSTOP)
    times = np.linspace(0.5, 100.0, 10_000)  # a request of megabytes, of which a pipe holds 64 KiB
    assert set(cut(folder / "short.mp4", times, QUICK)) == {"decoder took too long: more than 0.5 s"}
    assert_gone(pid, 0.0)


def test_threads_have_a_child_each(folder):
    path, times = folder / "long.mp4", LONG[:3]
    expected = cut(path, times)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: cut(path, times), range(4)))
    for parts in found:
        for a, b in zip(parts, expected, strict=True):
            assert_equal(a, b)
    assert 1 <= len(guard._idle) <= 2


def test_the_limits_grow_with_the_clips():
    assert guard.Limits(60.0, 10.0).cpu_s(0) == 60
    assert guard.Limits(60.0, 0.25).cpu_s(5) == 62


def test_what_a_library_prints_is_no_answer(folder, odd_child):
    assert_equal(cut(link(folder, "print.mp4", "short.mp4"), (1.0,))[0], cut(folder / "short.mp4", (1.0,))[0])


def test_pictures_that_do_not_fit_into_the_limit_cost_their_clips(folder):
    (whole,) = cut(folder / "large.mp4", (0.7,))
    assert isinstance(whole, media.Cut)
    told = cut(folder / "large.mp4", (0.7, 0.8), guard.Limits(memory_mb=70))
    assert told == ["decoder ran out of memory: limit 70 MiB"] * 2
    assert_equal(cut(folder / "large.mp4", (0.7,))[0], whole)


def liar(*words: str) -> tuple[str, ...]:
    """Returns the command of a child that is ready and answers each request with `words`, Python expressions of bytes."""
    writes = "".join(f"    os.write(1, {word})\n" for word in words)
    code = f"import os, sys\nos.write(1, b'{{\"ready\": true}}\\n')\nwhile sys.stdin.readline():\n{writes}"
    return (sys.executable, "-c", code)


KINDS = ("video", "audio")
NONSENSE = "decoder's answer is invalid: "


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["b'\\xff\\xd8 no JSON\\n'"], NONSENSE),
        (["b'[' * 500_000 + b'\\n'"], NONSENSE),
        (["b'7\\n'"], NONSENSE + "not a JSON object"),
        (["bytes(300_000)"] * 7, NONSENSE + "a line of more than 1048576 bytes"),
        (['b\'{"index": 9, "reason": "x"}\\n\''], NONSENSE + "index is '9', not a whole number from 0 to 1"),
        (['b\'{"index": 1, "reason": "\\\\u001b"}\\n\''], NONSENSE + "the reason is empty"),
        (['b\'{"index": 1, "reason": "x"}\\n\''] * 2, NONSENSE + "window 1 was answered twice"),
        (["b'{\"index\": 0, \"jpegs\": [%s]}\\n' % b', '.join([b'%d' % 2**60] * 16)"], NONSENSE + "jpegs is '1152"),
        (["b'{\"index\": 0, \"jpegs\": [%s]}\\n' % b', '.join([b'-1'] * 16)"], NONSENSE + "jpegs is '-1'"),
        (["b'half a li'", "exit()"], "decoder crashed: exit status 0"),
        (["os._exit(3)"], "decoder crashed: exit status 3"),
    ],
)
def test_a_child_that_lies_is_an_error_of_that_video(tmp_path, monkeypatch, words, reason):
    monkeypatch.setattr(guard, "COMMAND", liar(*words))
    (tmp_path / "a.mp4").touch()
    told = cut(tmp_path / "a.mp4", (1.0, 2.0))
    assert all(isinstance(part, str) for part in told)
    assert any(part.startswith(reason) for part in told), told
    assert guard._idle == []


ANSWER = {"index": 0, "jpegs": [9] * 16, "times_us": [0] * 16, "height": 2, "width": 2, "audio": 48_000}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"jpegs": [9] * 15}, "jpegs is not a list of 16 numbers"),
        ({"jpegs": "9" * 16}, "jpegs is not a list of 16 numbers"),
        ({"jpegs": [0] * 16}, "jpegs is '0', not a whole number from 1"),
        ({"jpegs": [True] * 16}, "jpegs is 'True'"),
        ({"jpegs": [9.0] * 16}, "jpegs is '9.0'"),
        ({"jpegs": [1 << 26] * 16 + [1]}, "jpegs is not a list of 16 numbers"),
        ({"jpegs": [(1 << 26) + 1] + [1] * 15}, "jpegs is '67108865'"),
        ({"times_us": [1 << 63] * 16}, "times_us is"),
        ({"times_us": None}, "times_us is not a list of 16 numbers"),
        ({"height": 0}, "height is '0'"),
        ({"width": 65536}, "width is '65536'"),
        ({"audio": 47_998}, "audio is '47998', not a whole number from 48000 to 48000"),
        ({"index": -1}, "index is '-1'"),
        ({"index": None}, "index is 'None'"),
    ],
)
def test_an_answer_is_what_can_be_true_of_the_window(change, words):
    assert decoder_answers.check_answer(json.dumps(ANSWER).encode(), windows_at((1.0,))) == ANSWER
    with pytest.raises(ValueError, match=words):
        decoder_answers.check_answer(json.dumps({**ANSWER, **change}).encode(), windows_at((1.0,)))


def test_a_decoder_that_cannot_start_is_no_fault_of_the_videos(folder, monkeypatch):
    monkeypatch.setattr(guard, "COMMAND", (sys.executable, "-c", "import no_such_module_here"))
    with pytest.raises(ChildProcessError, match="can't be started: .*No module named 'no_such_module_here'"):
        cut(folder / "short.mp4", (1.0,))


def test_a_caller_that_stops_early_leaves_no_child(folder):
    cut(folder / "short.mp4", (1.0,))
    pid = child()
    answers = guard.cut_windows(folder / "long.mp4", windows_at(LONG), short_side_px=SIDE, limits=LIMITS)
    next(answers)
    answers.close()
    assert_gone(pid, 0.0)
    assert guard._idle == []


# Cuts the same 17 clips twice and prints the reasons for lost ones, the number of idle children, or the error.
CUT_TWICE = """
import resource, sys
kind, hard = map(int, sys.argv[2:])
resource.setrlimit(kind, (hard, hard))
from data_prep import guard
from data_prep.windows import Window
windows = [Window(0.5 + 0.05 * i, 1.5 + 0.05 * i, ()) for i in range(17)]
try:
    for _ in range(2):
        cuts = guard.cut_windows(sys.argv[1], windows, short_side_px=0, limits=guard.Limits())
        print([cut for _, cut in cuts if isinstance(cut, str)], len(guard._idle))
except ChildProcessError as error:
    print(error)
"""


def cut_twice(path: pathlib.Path, kind: int, hard: int) -> list[str]:
    command = [sys.executable, "-c", CUT_TWICE, str(path), str(kind), str(hard)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize(
    ("kind", "hard", "words"),
    [
        (resource.RLIMIT_CPU, 100, r"100 s of CPU time here \(`ulimit -H -t`\), .* needs 23\d: .* a smaller --cpu_limit"),
        (resource.RLIMIT_DATA, 5 << 30, r"5120 MiB of data here \(`ulimit -H -d`\), .* 6144: .* a smaller --memory_limit"),
        (resource.RLIMIT_AS, 5 << 30, r"5120 MiB of address space here \(`ulimit -H -v`\), .* a smaller --memory_limit"),
    ],
)
def test_a_limit_of_the_machine_that_is_too_low_is_no_fault_of_the_video(folder, kind, hard, words):
    path = folder / "short.mp4"
    [told] = cut_twice(path, kind, hard)
    assert re.fullmatch(f"the decoder of {path} can't work: a process may use only {words}", told), told


def test_a_conversion_ends_at_its_start_if_the_machine_limits_decoders_too_much(folder, tmp_path):
    rows = "".join(f"short,{0.5 + 0.05 * i},stirs\n" for i in range(17))
    (tmp_path / "mine.csv").write_text(f"video,time_s,text\n{rows}")
    command = [sys.executable, "-m", "data_prep.own_videos", "--videos", folder, "--narrations", tmp_path / "mine.csv"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "out"], cwd=ROOT, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (100, 100)),
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "error: a process may use only 100 s of CPU time here (`ulimit -H -t`), but a decoder needs 235: raise that limit, "
        "or use another machine or a smaller --cpu_limit\n"
    )
    assert not list((tmp_path / "out").rglob("*.*"))


def test_under_a_limit_of_cpu_time_each_video_has_a_child_of_its_own(folder):
    assert cut_twice(folder / "short.mp4", resource.RLIMIT_CPU, 300) == ["[] 0"] * 2


def test_a_soft_limit_is_lifted_for_the_decoder(folder):
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (128 << 30, hard))
    try:
        assert isinstance(cut(folder / "short.mp4", (1.0,))[0], media.Cut)
        assert resource.prlimit(child(), resource.RLIMIT_AS)[0] == hard
        assert resource.prlimit(child(), resource.RLIMIT_DATA)[0] == 6 << 30
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


REFUSED_CHILD = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from data_prep import decoder_child
setrlimit = resource.setrlimit

def refuse(kind, limits):
    if kind == resource.RLIMIT_DATA:
        raise ValueError("not allowed")
    setrlimit(kind, limits)

resource.setrlimit = refuse
decoder_child.main()
"""


def test_a_kernel_that_refuses_a_limit_is_no_fault_of_the_video(folder, monkeypatch):
    monkeypatch.setattr(guard, "COMMAND", (sys.executable, "-c", REFUSED_CHILD))
    with pytest.raises(ChildProcessError, match=r"can't work: the kernel refuses .* 7\d s and 2048 MiB: not allowed"):
        cut(folder / "short.mp4", (1.0,))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how"), [("short", "ends"), ("short", "killed"), ("hang", "killed"), ("spin", "killed")]
)
def test_a_child_ends_with_its_parent(folder, tmp_path, name, how):
    link(folder, f"{name}.mp4", "short.mp4")
    code = f"""
import pathlib, sys, time
from data_prep import guard
from data_prep.windows import Window
guard.COMMAND = (sys.executable, "-c", {ODD_CHILD!r})
decoder = guard._take()
guard._idle.append(decoder)
pathlib.Path("pid.tmp").write_text(str(decoder.pid))
pathlib.Path("pid.tmp").rename("pid")
windows = [Window(0.5, 1.5, (1.0,))]
list(guard.cut_windows({str(folder / name)!r} + ".mp4", windows, short_side_px=96, limits=guard.Limits()))
pathlib.Path("done").touch()
time.sleep({1000 * (how == "killed")})
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env)
    wait_for(tmp_path / ("done" if name == "short" else "pid"))
    pid = int((tmp_path / "pid").read_text())
    if how == "killed":
        time.sleep(0.5 * (name != "short"))
        assert pathlib.Path(f"/proc/{pid}").exists()
        parent.kill()
    parent.wait(timeout=30)
    assert_gone(pid)


def wait_for(path: pathlib.Path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_every_narration_of_harmful_videos_is_a_clip_or_a_row(folder, tmp_path, odd_child, monkeypatch):
    monkeypatch.setattr(guard, "_WALL_PER_CPU", 1.0)
    videos = {"short": 3, "crash": 4, "long": 5, "raise_late": 6, "eat": 1, "hang": 2, "absent": 2}
    for uid in ("crash", "raise_late", "eat", "hang"):
        link(folder, f"{uid}.mp4", "long.mp4")
    items = tuple(
        {
            "video_uid": uid,
            "narrations": [
                {"clip_id": f"{uid}_{k}", "source": "s", "time_s": 0.5 + 0.2 * k, "text": "#C C stirs", "label": -1,
                 "verb_id": 0, "noun_id": 0} for k in range(count)
            ],
        }
        for uid, count in videos.items()
    )  # fmt: skip
    settings = {
        "video_dir": str(folder), "window_s": [0.5, 1.0], "num_intervals": 4, "num_candidates": 4, "short_side_px": SIDE,
        "jpeg_quality": 90, "cpu_limit_s": [2.0, 0.5], "memory_limit_mb": 300,
    }  # fmt: skip
    task = shards.ShardTask("train", 0, 1, items, sum(videos.values()))
    report = shards.write_shard(task, str(tmp_path), "clips", narrated.make_clips, settings)
    info = records.ClipsInfo(
        name="clips", window_s=(0.5, 1.0), num_intervals=4, num_candidates=4, short_side_px=SIDE, canvas_px=(SIDE, SIDE),
        num_samples=24_000, verbs=["do"], nouns=["it"], splits={},
    )  # fmt: skip
    info = shards.finish([report], tmp_path, info, [], sum(videos.values()))
    rows = [json.loads(line) for line in (tmp_path / records.REJECTED_FILE).read_text().splitlines()]
    told = collections.Counter((r["video_uid"], r["reason"], r["detail"]) for r in rows)
    assert told == {
        ("crash", "decoder crashed", "signal SIGSEGV"): 4,
        ("raise_late", "decoder crashed", "KeyError: 'a bug'"): 4,
        ("eat", "decoder ran out of memory", "limit 300 MiB"): 1,
        ("hang", "decoder took too long", "more than 2.5 s for one clip"): 2,
        ("absent", "video file is missing", ""): 2,
    }
    assert info.splits["train"].num_clips == 3 + 5 + 2
    assert len({r["clip_id"] for r in rows}) == len(rows)
