"""Synthetic tones and voices are what their labels say, and CREPE's targets and decoding are inverse to each other."""

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tones(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("tones")


@pytest.fixture
def voices(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("voices")


def heard(samples: Any, rate: int = 16_000, window: int = 512) -> float:
    """Pitch around the middle, Hz, by YIN (de Cheveigné and Kawahara, 2002): it knows of no label."""
    middle, differences = len(samples) // 2, [0.0]
    for lag in range(1, 330):
        begin = middle - (window + lag) // 2
        one, other = samples[begin : begin + window], samples[begin + lag : begin + lag + window]
        differences.append(float(((one - other) ** 2).sum()))
    curve = np.array(differences)
    curve[1:] *= np.arange(1, len(curve)) / np.maximum(np.cumsum(curve[1:]), 1e-12)
    curve[0] = 1.0
    low = np.flatnonzero(curve < 0.15)
    at = int(low[0]) if len(low) else int(curve.argmin())
    while at + 1 < len(curve) and curve[at + 1] < curve[at]:
        at += 1
    before, here, after = curve[at - 1], curve[at], curve[min(at + 1, len(curve) - 1)]
    return rate / (at + 0.5 * (before - after) / max(before - 2 * here + after, 1e-12))


def test_tones_have_the_pitch_of_their_label(tones: Any) -> None:
    """Held, with vibrato and gliding ones, at the middle of the frame."""
    drawn = tones.draw(300, 5)
    clean = torch.isinf(drawn.snr) & (drawn.pitch > 0)
    assert clean.sum() > 40
    found = torch.tensor([heard(frame.double().numpy()) for frame in drawn.frames[clean]], dtype=torch.float64)
    away = 1200 * torch.log2(found / drawn.pitch[clean])
    assert away.median().abs() < 3
    assert (away.abs() < 50).double().mean() > 0.95


def test_tones_come_from_the_seed(tones: Any) -> None:
    """And the first of many are those of few."""
    many, few, others = tones.draw(30, 3), tones.draw(12, 3), tones.draw(12, 4)
    assert torch.equal(many.frames[:12], few.frames)
    assert torch.equal(many.pitch[:12], few.pitch)
    assert not torch.isclose(few.pitch, others.pitch).any() or (few.pitch == 0).any()
    assert not torch.equal(few.frames, others.frames)


def test_frames_are_normalised_as_torchcrepe_does_it(tones: Any) -> None:
    samples = np.random.default_rng(0).normal(3, 7, (4, tones.FRAME))
    samples[2] = 0.0
    frames = torch.tensor(samples).float()
    frames -= frames.mean(dim=1, keepdim=True)
    frames /= torch.max(torch.tensor(1e-10), frames.std(dim=1, keepdim=True))
    assert torch.equal(tones.normalised(samples), frames)
    assert torch.equal(frames[2], torch.zeros(tones.FRAME))
    drawn = tones.draw(200, 1).frames
    sounding = drawn.abs().amax(1) > 0
    assert 0 < (~sounding).sum() < 40  # silence is among them
    assert torch.allclose(drawn[sounding].std(1), torch.ones(int(sounding.sum())), atol=1e-3)


def test_noise_is_as_loud_as_its_label_says(tones: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A held tone is the same a period later, white noise is another: half the power of the difference is its own."""
    tone = np.sin(2 * np.pi * 500 / tones.RATE * np.arange(tones.FRAME))  # a period is 32 samples
    monkeypatch.setattr(tones, "voiced", lambda rng: (500.0, tone))
    monkeypatch.setattr(tones, "noise", lambda rng: rng.normal(size=tones.FRAME))
    drawn = tones.draw(400, 2)
    power = ((drawn.frames[:, 32:] - drawn.frames[:, :-32]) ** 2).mean(1) / 2
    for snr in tones.SNRS:
        share = 0.0 if math.isinf(snr) else 1 / (1 + 10 ** (snr / 10))
        assert power[drawn.snr == snr].mean() == pytest.approx(share, abs=1e-6, rel=0.05)
    assert torch.equal(drawn.pitch == 0, drawn.snr == -math.inf)


def test_pink_noise_has_less_at_high_frequencies(tones: Any) -> None:
    """Half of the noises are white, with as much in the upper half; both have a standard deviation of 1."""
    rng = np.random.default_rng(2)
    made = np.stack([tones.noise(rng) for _ in range(100)])
    assert made.std(1) == pytest.approx(1, abs=0.15)
    size = np.abs(np.fft.rfft(made)) ** 2
    upper = size[:, 256:].sum(1) / size.sum(1)
    pink = upper < 0.25
    assert 30 < pink.sum() < 70
    assert upper[~pink] == pytest.approx(0.5, abs=0.1)


def test_targets_are_gaussians_around_the_pitch(tones: Any) -> None:
    """Worked by hand: at a bin's own pitch 1, a bin further exp(-20^2 / (2 25^2)); nothing where there is no tone."""
    pitch = 10 * 2 ** ((1997.3794084376191 + 20 * 100) / 1200)
    one, none = tones.targets(torch.tensor([pitch, 0.0], dtype=torch.float64))
    assert one.shape == (360,)
    assert one[99:102].tolist() == pytest.approx([math.exp(-0.32), 1.0, math.exp(-0.32)])
    assert torch.equal(none, torch.zeros(360))


def test_decoding_gives_the_pitch_of_a_target(tones: Any) -> None:
    """Also at the first and the last bin, where half of the nine are missing."""
    pitch = torch.tensor([55.0, 440.0, 443.3, 1760.0], dtype=torch.float64)
    assert (tones.cents(tones.decode(tones.targets(pitch))) - tones.cents(pitch)).abs().max() < 1
    edges = torch.zeros(2, 360)
    edges[0, 0] = edges[1, 359] = 1.0
    assert torch.allclose(tones.cents(tones.decode(edges)), tones.bins()[[0, 359]])


def test_voices_are_of_their_speaker(voices: Any) -> None:
    """Pulses come at the habitual pitch; a shorter vocal tract sounds brighter; every utterance is as loud."""
    who = voices.Speaker(150.0, 1.0, 1.0, (1.0,) * 5, 0.9, 0.001, 0.005)
    source = voices.pulses(who, np.random.default_rng(1))
    count = int((np.diff(source) > 0.4).sum())
    assert count == pytest.approx(1.6 * 150, rel=0.15)
    short = voices.Speaker(150.0, 1.0, 1.3, (1.0,) * 5, 0.9, 0.001, 0.005)
    centres = []
    for one in (who, short):
        made = voices.utterance(one, 7)
        assert np.sqrt(np.mean(made.astype(float) ** 2)) == pytest.approx(10**-1.5, rel=1e-4)
        size = np.abs(np.fft.rfft(made)) ** 2
        centres.append(float((size * np.arange(len(size))).sum() / size.sum()))
    assert centres[1] > 1.1 * centres[0]
    assert np.array_equal(voices.utterance(who, 7), voices.utterance(who, 7))
    assert not np.array_equal(voices.utterance(who, 7), voices.utterance(who, 8))
    assert voices.speaker(1) == voices.speaker(1) != voices.speaker(2)
