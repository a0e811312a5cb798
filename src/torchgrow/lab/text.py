"""Text as streams of word numbers: three files in a folder, or the text that Python brings along.

Training reads a text in parallel columns, each a stretch of consecutive words, so that a recurrent network can hand
its state from one batch to the next (truncated backpropagation through time).
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from torchgrow import TorchgrowError
from torchgrow.lab.metrics import PERPLEXITY, Metric

UNKNOWN, END = "<unk>", "<eos>"
MOST_WORDS = 10_000  # of the vocabulary, as in the usual form of the Penn Treebank; rarer words are <unk>

_SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
_EVALUATION_COLUMNS = 20
_HELP = (
    "What works: a folder with three text files named like ptb.train.txt, ptb.valid.txt and ptb.test.txt (of the words "
    "train; valid, validation, val or dev; and test, each has one in its name, apart from other letters), words "
    "separated by blanks, one sentence a line; or no folder at all, for the manual that comes with Python"
)


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Three texts as word numbers.

    Attributes:
        train: int64 ``[words]``.
        valid: int64 ``[words]``, what a network is judged by while it trains.
        test: int64 ``[words]``, looked at once, in the end.
        vocabulary: the word of every number.
        steps: words a sample, and so how far gradients reach back in time.
        source: where the texts are from, in words.
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    vocabulary: tuple[str, ...]
    steps: int
    source: str
    metric: Metric = PERPLEXITY

    @property
    def device(self) -> torch.device:
        """Where the texts are, and so where networks train."""
        return self.train.device

    def to(self, device: torch.device) -> "TextData":
        """The same texts on a device."""
        return replace(self, **{split: getattr(self, split).to(device) for split in _SPLITS})

    def example(self) -> Tensor:
        """A small batch to trace a network on, int64 ``[2, steps]``."""
        return self.train[: 2 * self.steps].view(2, self.steps)

    def train_steps(self, batch_size: int, shuffled: bool) -> int:
        """Batches in one epoch of `train_batches`.

        Raises:
            TorchgrowError: the text is too short for one.
        """
        if shuffled:
            steps = (len(self.train) - 1) // self.steps // batch_size
        else:
            steps = (len(self.train) // batch_size - 1) // self.steps
        if steps < 1:
            raise TorchgrowError(
                f"the training text has {len(self.train)} words, too few for one batch of {batch_size} samples of "
                f"{self.steps} words and the word after each; take a longer text, or a larger --subset"
            )
        return steps

    def train_batches(
        self, *, batch_size: int, shuffle: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of training batches; what is left over at the end of the text sits it out.

        Args:
            batch_size: samples a batch.
            shuffle: source of the order of samples. Default: in order, every sample going on in its row where
                that row of the batch before ended.

        Yields:
            int64 words ``[batch_size, steps]``, and the word after each of them, likewise.
        """
        steps = self.train_steps(batch_size, shuffle is not None)
        if shuffle is None:
            yield from _in_columns(self.train, batch_size, self.steps, steps)
            return
        samples = (len(self.train) - 1) // self.steps
        inputs, targets = (self.train[i : i + samples * self.steps].view(samples, self.steps) for i in (0, 1))
        for index in torch.randperm(samples, generator=shuffle)[: steps * batch_size].split(batch_size):
            yield inputs[index.to(self.device)], targets[index.to(self.device)]

    def test_batches(self, split: str = "valid") -> Iterator[tuple[Tensor, Tensor]]:
        """All of the validation or test text in order, in columns; the last batch may be shorter.

        Args:
            split: ``"valid"`` or ``"test"``.

        Yields:
            int64 words ``[columns, steps]``, and the word after each of them, likewise.
        """
        text: Tensor = getattr(self, split)
        columns = min(_EVALUATION_COLUMNS, len(text) // 2)
        yield from _in_columns(text, columns, self.steps, -(-(len(text) // columns - 1) // self.steps))


def _in_columns(text: Tensor, columns: int, steps: int, batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a text into equal columns and walk down all of them at once."""
    length = len(text) // columns
    table = text[: columns * length].view(columns, length)
    for start in range(0, batches * steps, steps):
        end = min(start + steps, length - 1)
        yield table[:, start:end], table[:, start + 1 : end + 1]


def load_text(*, folder: Path | None = None, steps: int = 35, subset: int | None = None) -> TextData:
    """Load three texts into memory.

    The vocabulary is what the training text holds, at most 10,000 words, the most frequent ones; any other word is
    ``<unk>``, and the end of a line ``<eos>``.

    Args:
        folder: with three files, of which one has the word "train" in its name, one "valid", "validation", "val" or
            "dev", one "test". Default: the topics of Python's own help, cut into 90, 5 and 5 %.
        steps: words a sample.
        subset: words of the training text to keep, from its beginning. Default: all.

    Raises:
        TorchgrowError: a folder that is missing or lacks a file, a file that is empty or not text; a subset that is
            not between 1 and the number of training words.
    """
    words = _manual() if folder is None else _files(folder)
    counts = Counter(words["train"])
    known = sorted(counts, key=lambda word: (-counts[word], word))
    needed = [word for word in (UNKNOWN, END) if word not in counts]
    vocabulary = (*needed, *known[: MOST_WORDS - len(needed)])
    if UNKNOWN not in vocabulary:
        vocabulary = (*vocabulary[:-1], UNKNOWN)
    number = {word: i for i, word in enumerate(vocabulary)}
    train, valid, test = (
        torch.tensor([number.get(word, number[UNKNOWN]) for word in words[split]]) for split in _SPLITS
    )
    source = "the manual that comes with Python" if folder is None else str(folder)
    data = TextData(train=train, valid=valid, test=test, vocabulary=vocabulary, steps=steps, source=source)
    if subset is None:
        return data
    if not 1 <= subset <= len(data.train):
        raise TorchgrowError(f"a subset has 1 to {len(data.train)} of the words of the training text, got {subset}")
    return replace(data, train=data.train[:subset])


def _manual() -> dict[str, list[str]]:
    """Python's help topics in alphabetical order, words and punctuation apart, in lower case."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).lower()
    lines = [re.findall(r"\w+|[^\w\s]", line) for line in text.splitlines() if re.search(r"\w", line)]  # no rules of *
    words = [word for line in lines for word in (*line, END)]
    ends = (0, len(words) * 90 // 100, len(words) * 95 // 100, len(words))
    return {split: words[a:b] for split, a, b in zip(_SPLITS, ends[:-1], ends[1:], strict=True)}


def _files(folder: Path) -> dict[str, list[str]]:
    if not folder.is_dir():
        what = "it is a file, not a folder" if folder.exists() else "the folder does not exist"
        raise TorchgrowError(f"no text in {folder}: {what}. {_HELP}")
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    found = f"found {', '.join(names[:5])}" if names else "the folder is empty"
    words = {}
    for split, marks in _SPLITS.items():
        mine = [name for name in names if any(part in marks for part in re.split(r"[^a-z]+", name.lower()))]
        if not mine:
            raise TorchgrowError(f"no {split} text in {folder}: {found}. {_HELP}")
        if len(mine) > 1:
            raise TorchgrowError(
                f"{folder} has {len(mine)} {split} texts, {' and '.join(mine[:3])}; leave one of them in the folder"
            )
        words[split] = _words(folder / mine[0])
    return words


def _words(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TorchgrowError(f"{path} cannot be read as text in UTF-8: {error}. {_HELP}") from error
    words = [word for line in text.splitlines() for word in (*line.split(), END)]
    if sum(word != END for word in words) < 2:
        raise TorchgrowError(f"{path} is empty, or holds a single word; a text to train or judge by has many. {_HELP}")
    return words
