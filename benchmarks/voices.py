"""Synthetic voices: a train of glottal pulses through the formants of vowels; all of it from a seed.

A speaker is a length of the vocal tract, a habit of pitch, a glottal tilt, breath and jitter; an utterance is a row of
vowels of one speaker, with short pauses, as long as resemblyzer's encoder takes at once.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

RATE, LENGTH = 16_000, 25_600
"""Samples a second, and of an utterance: 1.6 s, of which resemblyzer makes 161 frames and keeps 160."""
LEVEL = 10 ** (-30 / 20)
"""Root mean square of an utterance: -30 dB, to which resemblyzer normalises."""
VOWELS = ((730, 1090, 2440), (530, 1840, 2480), (270, 2290, 3010), (570, 840, 2410), (300, 870, 2240))
"""Formants of a, e, i, o, u, Hz (Peterson and Barney, 1952: men)."""
WIDTHS = (80.0, 100.0, 140.0, 200.0, 250.0)
"""Bandwidths of formants, Hz."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Speaker:
    """What tells one voice from another.

    Attributes:
        pitch: habitual, Hz.
        range: of the pitch over an utterance, semitones.
        tract: factor on formants; above 1 for a shorter vocal tract.
        shifts: further factors on single formants, [5].
        tilt: of the glottal pulse, in (0, 1); more is softer.
        breath: noise, as a share of the pulses.
        jitter: of the pulses' distance, as a share of it.
    """

    pitch: float
    range: float
    tract: float
    shifts: tuple[float, ...]
    tilt: float
    breath: float
    jitter: float


def speaker(seed: int) -> Speaker:
    """The speaker of a seed."""
    rng = np.random.default_rng([1952, seed])
    return Speaker(
        pitch=float(90 * 2.8 ** rng.random()),
        range=float(rng.uniform(0.5, 4)),
        tract=float(rng.uniform(0.9, 1.3)),
        shifts=tuple(float(x) for x in rng.uniform(0.94, 1.06, 5)),
        tilt=float(rng.uniform(0.6, 0.97)),
        breath=float(10 ** rng.uniform(-2.5, -0.7)),
        jitter=float(rng.uniform(0.002, 0.03)),
    )


def pulses(who: Speaker, rng: np.random.Generator) -> Array:
    """Glottal pulses of an utterance, with their breath, [25600]."""
    middle = who.range * rng.normal(0, 0.3)
    course = middle + np.cumsum(rng.normal(0, who.range / 12, LENGTH // 160))
    source, at = np.zeros(LENGTH), 0.0
    while at < LENGTH:
        source[int(at)] = 1.0
        pitch = who.pitch * 2 ** (np.clip(course[int(at) // 160], -6, 6) / 12)
        at += RATE / pitch * max(0.5, 1 + who.jitter * rng.normal())
    source = source + who.breath * rng.normal(size=LENGTH) * 0.1
    return np.asarray(lfilter([1.0], [1.0, -who.tilt], source))


def utterance(who: Speaker, seed: int) -> NDArray[np.float32]:
    """Samples of an utterance, [25600]; the same for the same speaker and seed."""
    rng = np.random.default_rng([1953, seed])
    source, out, at = pulses(who, rng), np.zeros(LENGTH), 0
    while at < LENGTH:
        end = min(LENGTH, at + int(rng.uniform(0.08, 0.3) * RATE))
        if rng.random() < 0.85:  # else a pause
            out[at:end] = sung(who, VOWELS[rng.integers(len(VOWELS))], source[at:end], rng)
        at = end
    out = np.asarray(lfilter([1.0, -0.97], [1.0], out)) + 1e-6 * rng.normal(size=LENGTH)  # radiation at the lips
    return (out * LEVEL / np.sqrt(np.mean(out**2))).astype(np.float32)


def sung(who: Speaker, vowel: tuple[int, int, int], source: Array, rng: np.random.Generator) -> Array:
    """A vowel: the source through five resonances, faded in and out."""
    formants = np.array([*vowel, 3400.0, 4400.0]) * who.tract * np.array(who.shifts) * rng.normal(1, 0.02, 5)
    for formant, width in zip(formants, WIDTHS, strict=True):
        radius = np.exp(-np.pi * width / RATE)
        back = [1.0, -2 * radius * np.cos(2 * np.pi * formant / RATE), radius**2]
        source = np.asarray(lfilter([sum(back)], back, source))
    edge = np.minimum(np.arange(len(source)), np.arange(len(source))[::-1]) / (0.01 * RATE)
    return source * np.clip(edge, 0, 1) * 10 ** (rng.normal(0, 3) / 20)
