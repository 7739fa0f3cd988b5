"""Synthesises the sound of a SoundWorld video: actions, synchronous with the picture, machines, the room, distractors.

The sounds are summed and get a room's short reverberation. A recorder's automatic gain then brings every action to a level
that does not depend on whether it sounded, so that loudness says next to nothing about the label.
"""

import functools

import numpy as np
import scipy.signal
import soxr

from data_prep.soundworld import plan, taxonomy, voices
from data_prep.soundworld.voices import RATE_HZ, add

_ROOM_TONE_DB = -24.0  # relative to the usual level of an action
_AMBIENCE_DB = -12.0
_GAIN_WINDOW_S = 0.4  # the gain of an action holds for its clip and a quarter of this on either side


def _gain(db: float) -> float:
    return 10.0 ** (db / 20.0)


def isolated_action(segment: plan.Segment) -> np.ndarray:
    """Returns the sound of an action alone, without reverberation: mono at `RATE_HZ`, unit RMS, until 0.6 s after `stop_s`.

    The verb determines how and when the object is excited, the material and size of the noun its timbre.
    """
    rng = np.random.default_rng([segment.seed, 20])
    verb = taxonomy.VERBS[segment.verb]
    thing = voices.Instance(taxonomy.NOUNS[segment.noun], rng)
    n = int((segment.stop_s - segment.start_s + 0.6) * RATE_HZ)
    times = segment.start_s + np.arange(0, n, 64) / RATE_HZ
    speed = np.interp(np.arange(n), np.arange(0, n, 64), segment.pose(times).speed)
    out = np.zeros(n, np.float32)
    for kind, weight in verb.sound.items():
        if kind == "impact":
            blows = [thing.ring(rng) for _ in range(3)]
            track = np.zeros(n, np.float32)
            for at, strength in segment.contacts():
                blow = blows[rng.integers(3)]
                add(track, int((at - segment.start_s) * RATE_HZ), blow * strength * np.exp(rng.normal(0, 0.15)))
            out += weight * voices.unit_rms(track)
        else:
            out += weight * voices.unit_rms(getattr(thing, kind)(speed, rng))
    return voices.unit_rms(out)


def _reverberate(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the sound in a room: the direct sound and an exponentially decaying tail."""
    length = int(rng.uniform(0.15, 0.45) * RATE_HZ)
    tail = rng.standard_normal(length, np.float32) * np.exp(np.arange(length, dtype=np.float32) * (-6.9 / length))
    tail *= rng.uniform(0.15, 0.45) / np.sqrt((tail**2).sum())
    tail[0] += 1.0
    return scipy.signal.oaconvolve(x, tail)[: len(x)]


@functools.lru_cache(maxsize=8)
def _load_ambience(path: str) -> np.ndarray:
    try:
        import librosa  # imports numba, which a world without recordings does not need

        with open(path, "rb") as f:  # an open file, since with a path librosa also tries other programs
            recording = librosa.load(f, sr=RATE_HZ, mono=True)[0]
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} can't be read as a recording: {error}") from error
    if not len(recording):
        raise ValueError(f"{path} holds no sound")
    return recording


def _ambience(files: list[str], n: int, rng: np.random.Generator) -> np.ndarray:
    """Returns `n` samples of real recordings, one after the other, cross-faded."""
    out, start, fade = np.zeros(n, np.float32), 0, int(0.05 * RATE_HZ)
    ramp = np.linspace(0, 1, fade)
    while start < n:
        recording = voices.unit_rms(np.array(_load_ambience(files[rng.integers(len(files))])))
        if len(recording) > 2 * fade:
            recording[:fade] *= ramp
            recording[-fade:] *= ramp[::-1]
        add(out, start, recording)
        start += max(len(recording) - fade, fade)
    return out


def _mix(video: plan.Video, ambience_files: list[str]) -> np.ndarray:
    """Returns the whole sound of a video before the recorder's gain, mono at `RATE_HZ`."""
    rng = np.random.default_rng([video.seed, 21])
    n = int(video.duration_s * RATE_HZ)
    heard = np.zeros(n, np.float32)
    for segment in video.segments:
        if segment.action_db is not None:
            add(heard, int(segment.start_s * RATE_HZ), _gain(segment.action_db) * isolated_action(segment))
        if segment.machine:
            own = np.random.default_rng([segment.seed, 22])
            hum = voices.machine(segment.machine, int((segment.stop_s - segment.start_s + 0.3) * RATE_HZ), own)
            add(heard, int((segment.start_s - 0.15) * RATE_HZ), hum * _gain(own.normal(-1.0, 3.0)) * _fade(len(hum)))
    for distractor in video.distractors:
        own = np.random.default_rng([distractor.seed, 23])
        length = max(int((distractor.stop_s - distractor.start_s) * RATE_HZ), 1000)
        extra = (taxonomy.NOUNS,) if distractor.kind == "clatter" else ()
        noise = getattr(voices, distractor.kind)(length, own, *extra)
        add(heard, int(distractor.start_s * RATE_HZ), _gain(distractor.level_db) * noise * _fade(length))
    heard = _reverberate(heard, rng) + _gain(_ROOM_TONE_DB) * voices.room_tone(n, rng)
    if ambience_files:
        heard += _gain(_AMBIENCE_DB) * _ambience(ambience_files, n, rng)
    return heard


def _fade(n: int) -> np.ndarray:
    """Returns `n` gains of 1 that rise and fall in ramps of 80 ms at both ends."""
    i = np.arange(n, dtype=np.float32)
    return np.minimum(np.minimum(i, i[::-1]) / (0.08 * RATE_HZ), 1.0)


def _level(video: plan.Video, heard: np.ndarray) -> np.ndarray:
    """Returns the sound after the recorder's gain: RMS `level_db` around each action, gliding gain from one to the next."""
    times, gains = [], []
    for segment in video.segments:
        # Usually the clip: from 0.5 s before the narration to 1.0 s after it.
        start, stop = int((segment.narration_s - 0.5) * RATE_HZ), int((segment.narration_s + 1.0) * RATE_HZ)
        part = heard[max(start, 0) : stop]
        gain = 1.0
        for _ in range(4):  # the limiter in `synthesize` lowers loud peaks, and the gain makes up for it
            limited = np.tanh(part * gain)
            gain *= _gain(segment.level_db) / (np.sqrt(np.mean(limited * limited)) + 1e-6)
        times += [segment.narration_s - 0.5 - _GAIN_WINDOW_S / 4, segment.narration_s + 1.0 + _GAIN_WINDOW_S / 4]
        gains += [20 * np.log10(gain)] * 2
    order = np.argsort(times)
    coarse = np.arange(0, len(heard), 256)
    db = np.interp(coarse / RATE_HZ, np.array(times)[order], np.array(gains)[order])
    # Interpolated in dB every 256 samples (11 ms), converted to factors there; the factors are interpolated for each sample.
    return heard * np.interp(np.arange(len(heard)), coarse, 10.0 ** (db / 20.0)).astype(np.float32)


def synthesize(video: plan.Video, ambience_files: list[str]) -> np.ndarray | None:
    """Returns the sound of a video, float32 [channels, samples] at its sample rate, from `audio_start_s` on.

    Args:
      video: Plan of the video.
      ambience_files: Real recordings to mix in quietly; may be empty.

    Returns:
      The waveform, or None where the video has no audio.

    Raises:
      ValueError: An ambience file can't be read as a recording or holds no sound.
    """
    if not video.has_audio:
        return None
    wave = _level(video, _mix(video, ambience_files))[int(video.audio_start_s * RATE_HZ) :]
    wave = np.tanh(soxr.resample(wave.astype(np.float32), RATE_HZ, video.sample_rate_hz, quality="MQ"))
    if video.num_channels == 1:
        return wave[None]
    rng = np.random.default_rng([video.seed, 24])
    balance = rng.uniform(0.85, 1.0, 2)
    delay = int(rng.integers(0, 20))
    return np.stack([wave * balance[0], np.roll(wave, delay) * balance[1]]).astype(np.float32)
