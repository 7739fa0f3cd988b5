"""Synthesises SoundWorld's single sounds: struck, rubbed and rustling things, running water, machines, sounds from outside.

Each is a mono waveform at `RATE_HZ`, of about unit RMS while it sounds, and depends only on its arguments and the random
generator. FFTs, sines and exponentials are computed in float32, which takes half the time of float64.
"""

import functools

import numpy as np
import scipy.fft

from data_prep.soundworld.taxonomy import MATERIALS, Material, Noun

RATE_HZ = 24000  # half of 48 kHz; the clips are analysed up to 8 kHz


def _normal(n: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(n, np.float32)


def _seconds(n: int) -> np.ndarray:
    """Returns the times of `n` samples."""
    return (np.arange(n) / RATE_HZ).astype(np.float32)


def shaped_noise(n: int, gain_of_hz, rng: np.random.Generator) -> np.ndarray:
    """Returns `n` samples of Gaussian noise with a spectrum `gain_of_hz(hz)`, scaled to unit RMS."""
    return unit_rms(equalise(_normal(n, rng), gain_of_hz))


def equalise(x: np.ndarray, gain_of_hz) -> np.ndarray:
    """Returns a waveform filtered without delay by `gain_of_hz`, a gain as a function of frequency."""
    size = scipy.fft.next_fast_len(len(x), real=True)  # a prime length would cost ten times as much
    hz = scipy.fft.rfftfreq(size, 1 / RATE_HZ).astype(np.float32)
    return scipy.fft.irfft(scipy.fft.rfft(x.astype(np.float32), size) * gain_of_hz(hz).astype(np.float32), size)[: len(x)]


def unit_rms(x: np.ndarray) -> np.ndarray:
    """Returns the waveform scaled to RMS 1."""
    return x / max(float(np.sqrt(np.mean(x * x))), 1e-12)


def _band(low_hz: float, high_hz: float, order: int = 2):
    """Returns a smooth band-pass gain as a function of frequency."""
    return lambda hz: (
        1 / np.sqrt((1 + (low_hz / np.maximum(hz, 1.0)) ** (2 * order)) * (1 + (hz / high_hz) ** (2 * order)))
    )


class Instance:
    """The timbre of one object: its material's modes, scaled by its size, with detuning, weights and damping of its own."""

    def __init__(self, noun: Noun, rng: np.random.Generator):
        self.material: Material = MATERIALS[noun.material]
        m = self.material
        num = len(m.ratios)
        base = m.fundamental_hz / noun.size**0.7 * np.exp(rng.normal(0, 0.10))
        self.modes_hz = np.minimum(base * np.array(m.ratios) * np.exp(rng.normal(0, 0.03, num)), 0.45 * RATE_HZ)
        self.weights = np.exp(rng.normal(0, 0.5, num)) / np.sqrt(1 + np.arange(num))
        self.decays_s = m.decay_s * np.exp(rng.normal(0, 0.25)) / (1 + 0.35 * np.arange(num))
        self.tilt_db = m.tilt_db + rng.normal(0, 0.8)

    def ring(self, rng: np.random.Generator) -> np.ndarray:
        """Returns the sound of one blow: a noise burst and decaying modes."""
        m = self.material
        n = int(RATE_HZ * min(max(1.2 * self.decays_s.max(), 0.05), 0.8))
        t = _seconds(n)
        weights = self.weights * np.exp(rng.normal(0, 0.3, len(self.weights)))  # they depend on where it is hit
        decay = np.exp(np.float32(-6.9 / self.decays_s)[:, None] * t)
        modes = np.float32(weights) @ (decay * np.sin(np.float32(2 * np.pi * self.modes_hz)[:, None] * t))
        length = int(RATE_HZ * (0.012 + 0.5 * min(m.decay_s, 0.05)))
        burst = np.zeros(n, np.float32)
        centre = 2.5 * self.modes_hz[0]
        noise = shaped_noise(min(length * 4, n), _band(0.3 * centre, 2.5 * centre, 1), rng)
        burst[: len(noise)] = noise * np.exp(-5 * np.arange(len(noise)) / length)
        share = np.sqrt(m.noise)
        blow = share * burst / np.sqrt((burst**2).sum()) + np.sqrt(1 - m.noise) * modes / np.sqrt((modes**2).sum())
        return blow * np.sqrt(n) * np.minimum(1.0, (n - np.arange(n)) / 60)

    def friction(self, speed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the sound of rubbing: noise coloured by the material and its modes, rough with grains, times `speed`."""
        n = len(speed)

        def colour(hz):
            gain = (np.maximum(hz, 80.0) / 1000.0) ** (self.tilt_db / 6.02) * _band(120.0, 9500.0)(hz)
            for mode, weight in zip(self.modes_hz, self.weights, strict=True):
                width = mode * (0.04 + 0.012 / self.material.decay_s)
                gain = gain * (1 + 2.5 * weight / (1 + ((hz - mode) / width) ** 2))
            return gain

        grains = rng.poisson(self.material.grain_hz / RATE_HZ, n) * rng.exponential(1.0, n)
        smooth = _normal(n, rng)
        source = 0.6 * smooth + unit_rms(grains - grains.mean())
        return unit_rms(equalise(source, colour)) * speed

    def rustle(self, speed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the sound of crumpling: crackles of heavy-tailed size at random times, the denser the higher `speed` is."""
        n = len(speed)
        rate = 0.25 * self.material.grain_hz + 25.0
        cracks = (rng.random(n) < rate / RATE_HZ * speed) * rng.pareto(2.2, n) * rng.choice([-1, 1], n)
        low = 1.5 * self.modes_hz[0]
        high = 4.0 * low * 2 ** (self.tilt_db / 6.0) + 800.0
        hush = shaped_noise(n, _band(low, high), rng) * speed
        return unit_rms(unit_rms(equalise(cracks, _band(low, high))) + 0.35 * hush)

    def liquid(self, speed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the sound of running water: bubbles that ring and rise in pitch, and a hiss that the object colours."""
        n = len(speed)
        out = np.zeros(n, np.float32)
        bubble_n = int(0.05 * RATE_HZ)
        t = _seconds(bubble_n)
        weights = speed / max(speed.sum(), 1e-9)
        count = int(90 * n / RATE_HZ)
        starts = rng.choice(n, size=count, p=weights) if speed.sum() > 0 else []
        centre = 900.0 * (300.0 / self.modes_hz[0]) ** 0.25
        for start in starts:
            hz = centre * np.exp(rng.normal(0, 0.45))
            bubble = np.exp(-t * rng.uniform(60, 180)) * np.sin(2 * np.pi * hz * t * (1 + rng.uniform(1, 5) * t))
            stop = min(start + bubble_n, n)
            out[start:stop] += rng.exponential(1.0) * bubble[: stop - start]
        hiss = shaped_noise(n, lambda hz: _band(1200.0, 7000.0, 1)(hz) * self._body(hz), rng) * speed
        return unit_rms(unit_rms(out) + 0.5 * hiss)

    def _body(self, hz):
        mode = self.modes_hz[0]
        return 1 + 2.0 / (1 + ((hz - mode) / (0.1 * mode)) ** 2)


def _formants(formants, hz):
    return sum(weight / (1 + ((hz - at) / (0.12 * at)) ** 2) for at, weight in formants)


def talk(n: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a talking voice: glottal pulses of wandering pitch, filtered by formants that change with every syllable."""
    pitch = rng.choice([110.0, 200.0]) * np.exp(rng.normal(0, 0.1))
    out = np.zeros(n, np.float32)
    start = 0
    while start < n:
        length = int(RATE_HZ * rng.uniform(0.12, 0.28))
        m = min(length, n - start)
        glide = pitch * np.exp(rng.normal(0, 0.08) + rng.normal(0, 0.1) * np.linspace(-1, 1, m))
        pulse = np.mod(np.cumsum(glide) / RATE_HZ, 1.0) - 0.5
        first, second = rng.uniform(300, 800), rng.uniform(900, 2300)
        formants = ((first, 1.0), (second, 0.5), (2700.0, 0.2))
        syllable = equalise(pulse, functools.partial(_formants, formants)) * np.hanning(m)
        if rng.random() < 0.85:
            out[start : start + m] = unit_rms(syllable) if m > 50 else 0.0
        start += length
    return unit_rms(out)


def traffic(n: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the sound of passing cars: low noise that swells and fades."""
    t = _seconds(n)
    swell = 0.4 + np.exp(-(((t - rng.uniform(0, t[-1])) / rng.uniform(0.5, 1.5)) ** 2))
    return unit_rms(shaped_noise(n, lambda hz: _band(40.0, 500.0, 1)(hz) + 0.03 * _band(500, 4000)(hz), rng) * swell)


def music(n: int, rng: np.random.Generator) -> np.ndarray:
    """Returns plucked chords at a steady tempo."""
    out = np.zeros(n, np.float32)
    scale = 220.0 * 2 ** (rng.integers(-5, 6) / 12) * 2 ** (np.array([0, 2, 4, 7, 9, 12, 14, 16]) / 12)
    beat = int(RATE_HZ * rng.uniform(0.22, 0.4))
    t = _seconds(2 * beat)
    decay = np.exp(-3.5 * t)
    for start in range(int(rng.integers(beat)), n, beat):
        for hz in rng.choice(scale, 2, replace=False).tolist():
            note = sum(np.sin(2 * np.pi * hz * k * t) / k**1.5 for k in (1, 2, 3, 4)) * decay
            stop = min(start + len(note), n)
            out[start:stop] += note[: stop - start]
    return unit_rms(out)


def clatter(n: int, rng: np.random.Generator, nouns: tuple[Noun, ...]) -> np.ndarray:
    """Returns the sound of somebody busy elsewhere: an object of any material, struck at irregular intervals."""
    thing = Instance(nouns[rng.integers(len(nouns))], rng)
    gap = rng.uniform(0.18, 0.6)
    out = np.zeros(n, np.float32)
    start = rng.uniform(0, gap)
    while start * RATE_HZ < n:
        add(out, int(start * RATE_HZ), thing.ring(rng) * rng.uniform(0.4, 1.0))
        start += gap * rng.uniform(0.5, 1.6)
    return unit_rms(out)


def footsteps(n: int, rng: np.random.Generator) -> np.ndarray:
    """Returns steps on a floor, about two a second."""
    out = np.zeros(n, np.float32)
    gap = rng.uniform(0.42, 0.6)
    m = int(0.12 * RATE_HZ)
    for start in np.arange(rng.uniform(0, gap), n / RATE_HZ, gap):
        step = shaped_noise(m, _band(70.0, 900.0), rng) * np.exp(-np.arange(m) / (0.025 * RATE_HZ))
        add(out, int(start * RATE_HZ), step)
    return unit_rms(out)


def wind(n: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the sound of wind in gusts."""
    gust = 0.6 + 0.4 * np.sin(2 * np.pi * rng.uniform(0.3, 0.9) * _seconds(n) + rng.uniform(0, 6))
    return unit_rms(shaped_noise(n, _band(60.0, rng.uniform(250, 600), 1), rng) * gust)


def machine(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the sound of a washer, blender, fan or TV."""
    t = _seconds(n)
    if kind == "tv":
        return unit_rms(talk(n, rng) + 0.6 * music(n, rng))
    base, noise_hz, noise_level, beat_hz = {
        "washer": (50.0, 700.0, 0.7, 1.4), "blender": (310.0, 5000.0, 0.5, 3.1), "fan": (95.0, 1800.0, 1.0, 9.9)
    }[kind]  # fmt: skip
    base *= float(np.exp(rng.normal(0, 0.05)))
    hum = sum(np.sin(2 * np.pi * base * k * t + rng.uniform(0, 6)) / k for k in range(1, 9))
    hiss = shaped_noise(n, _band(150.0, noise_hz, 1), rng)
    return unit_rms((unit_rms(hum) + noise_level * hiss) * (1 + 0.3 * np.sin(2 * np.pi * beat_hz * t)))


def room_tone(n: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the background noise of a quiet room: noise that falls by 4 to 7 dB per octave, and mains hum."""
    slope = rng.uniform(4, 7) / 6.02
    noise = shaped_noise(n, lambda hz: (np.maximum(hz, 60.0) / 60.0) ** -slope, rng)
    hum = np.sin(2 * np.pi * 50.0 * _seconds(n)) * rng.uniform(0, 0.5)
    return unit_rms(noise + hum)


def add(out: np.ndarray, start: int, sound: np.ndarray) -> None:
    """Adds a sound to `out` in place, beginning at sample `start`; what lies outside `out` is cut off."""
    skip = max(-start, 0)
    stop = min(start + len(sound), len(out))
    if stop > start + skip:
        out[start + skip : stop] += sound[skip : stop - start]
