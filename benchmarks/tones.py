"""Frames of synthetic tones with known pitch, as CREPE takes them, and its targets; all of it from a seed.

Three quarters of the frames have a pitch, between A1 and A6: harmonics with random spectra, held, with vibrato or
gliding, alone or in white or pink noise. The others are noise alone, or silence.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RATE, FRAME = 16_000, 1024
"""Samples a second, and of a frame."""
BINS, CENTS_PER_BIN, FIRST_CENTS = 360, 20.0, 1997.3794084376191
"""Of CREPE's outputs: how many, how far apart, and the pitch of the first, in cents above 10 Hz."""
BLUR = 25.0
"""Standard deviation of a target, cents."""
LOW, HIGH = 55.0, 1760.0
"""Pitches, Hz."""
VOICED = 0.75
"""Share of frames with a pitch."""
SNRS = (np.inf, 20.0, 10.0, 0.0)
"""Signal to noise, dB."""
HARMONICS, CEILING = 40, 7600.0
"""How many a tone has at most, and where the highest may lie, Hz."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Tones:
    """Frames and what is known of them.

    Attributes:
        frames: normalised samples, float32 [n, 1024].
        pitch: at the middle of the frame, Hz; 0 where there is none; float64 [n].
        snr: signal to noise, dB; infinite without noise, minus infinite without a tone; float64 [n].
    """

    frames: Tensor
    pitch: Tensor
    snr: Tensor

    def targets(self) -> Tensor:
        """What CREPE is trained for, float32 [n, 360]: see `targets`."""
        return targets(self.pitch)

    def __len__(self) -> int:
        return len(self.frames)


def cents(pitch: Tensor) -> Tensor:
    """Of pitches in Hz, above 10 Hz."""
    return 1200 * torch.log2(pitch / 10)


def bins() -> Tensor:
    """Pitches of CREPE's outputs, cents above 10 Hz, float64 [360]."""
    return FIRST_CENTS + CENTS_PER_BIN * torch.arange(BINS, dtype=torch.float64)


def targets(pitch: Tensor) -> Tensor:
    """Gaussians of 25 cents around the pitch; zeros where there is none (Kim et al., 2018, Eq 3).

    Args:
        pitch: Hz, float64 [n]; 0 for none.

    Returns:
        float32 [n, 360].
    """
    away = bins() - cents(pitch)[:, None]
    return torch.where(pitch[:, None] > 0, torch.exp(-(away**2) / (2 * BLUR**2)), 0.0).float()


def decode(scores: Tensor) -> Tensor:
    """Pitch that outputs stand for, Hz: the mean of nine bins around the largest, weighted by their scores.

    As CREPE's own code does it; float [n, 360] to float64 [n].
    """
    middle = scores.argmax(1, keepdim=True)
    near = middle + torch.arange(-4, 5)
    inside = (near >= 0) & (near < BINS)
    near = near.clamp(0, BINS - 1)
    weights = torch.where(inside, scores.double().gather(1, near), 0.0)
    found = (weights * bins()[near]).sum(1) / weights.sum(1)
    return 10 * 2 ** (found / 1200)


def normalised(samples: Array) -> Tensor:
    """Each frame without its mean, over its standard deviation, as torchcrepe does it; [n, 1024]."""
    frames = torch.from_numpy(samples).float()
    frames = frames - frames.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True).clamp(min=1e-10)


def draw(count: int, seed: int) -> Tones:
    """So many frames; the same for the same seed.

    Args:
        count: frames.
        seed: of all draws; other seeds are other frames.
    """
    rng = np.random.default_rng([1024, seed])
    frames, pitches, snrs = np.zeros((count, FRAME)), np.zeros(count), np.zeros(count)
    for index in range(count):
        if rng.random() < VOICED:
            pitches[index], tone = voiced(rng)
            snrs[index] = rng.choice(SNRS)
            level = 0.0 if np.isinf(snrs[index]) else tone.std() * 10 ** (-snrs[index] / 20)
            frames[index] = tone + level * noise(rng)
        else:
            snrs[index] = -np.inf
            frames[index] = noise(rng) * rng.choice((0.0, 1e-4, 0.1))
    return Tones(normalised(frames), torch.from_numpy(pitches), torch.from_numpy(snrs))


def voiced(rng: np.random.Generator) -> tuple[float, Array]:
    """A tone: its pitch at the middle of the frame, Hz, and its samples, [1024]."""
    pitch = LOW * (HIGH / LOW) ** rng.random()
    phase = 2 * np.pi * pitch * np.cumsum(2 ** (bend(rng) / 1200)) / RATE
    count = max(1, min(HARMONICS, int(CEILING / pitch)))
    order = np.arange(1, count + 1)
    size = order ** -rng.uniform(0.5, 2.5) * 10 ** (rng.normal(0, 6, count) / 20)
    if rng.random() < 0.15:  # as of a clarinet
        size[1::2] *= 0.05
    waves = np.sin(order[:, None] * phase + rng.uniform(0, 2 * np.pi, (count, 1)))
    fading = np.exp(-rng.uniform(0, 1.5) * np.linspace(0, 1, FRAME))
    return float(pitch), size @ waves * fading


def bend(rng: np.random.Generator) -> Array:
    """Cents around the pitch over a frame, 0 at its middle, [1024]: none, vibrato, or a glide."""
    time = (np.arange(FRAME) - FRAME // 2) / RATE
    kind = rng.integers(3)
    if kind == 0:
        return np.zeros(FRAME)
    if kind == 1:
        speed, start = 2 * np.pi * rng.uniform(4, 8), rng.uniform(0, 2 * np.pi)
        return rng.uniform(10, 80) * (np.sin(speed * time + start) - np.sin(start))
    return rng.uniform(-1200, 1200) * time


def noise(rng: np.random.Generator) -> Array:
    """White or pink noise with a standard deviation near 1, [1024]."""
    white = rng.normal(size=FRAME)
    if rng.random() < 0.5:
        return white
    spectrum = np.fft.rfft(white)
    pink = np.fft.irfft(spectrum / np.sqrt(np.maximum(1, np.arange(len(spectrum)))), FRAME)
    return np.asarray(pink / pink.std())
