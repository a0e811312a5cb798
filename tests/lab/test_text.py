"""Texts: three files or Python's manual, word numbers, columns that go on from batch to batch, errors with the fix."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from torchgrow import TorchgrowError
from torchgrow.lab.data import load
from torchgrow.lab.text import END, MOST_WORDS, UNKNOWN, TextData, load_text

LINES = {"train": "the cat sat\nthe dog sat\n\nthe end\n", "valid": "the bird sat\n", "test": "a cat\n"}


def write(folder: Path, pattern: str = "ptb.{}.txt", **texts: Any) -> Any:
    folder.mkdir(exist_ok=True)
    for split, text in {**LINES, **texts}.items():
        if text is not None:
            (folder / pattern.format(split)).write_text(text)
    return folder


def read(data: Any, split: str) -> Any:
    return " ".join(data.vocabulary[number] for number in getattr(data, split).tolist())


def numbered(words: int, steps: int) -> TextData:
    """A text whose words are 0, 1, 2, ..."""
    text = torch.arange(words)
    return TextData(train=text, valid=text, test=text, vocabulary=(), steps=steps, source="")


# --- files


@pytest.mark.parametrize("pattern", ["ptb.{}.txt", "{}.txt", "wiki-{}.tokens", "my_{}_text"])
def test_three_files_by_their_names(tmp_path: Path, pattern: str) -> None:
    data = load_text(folder=write(tmp_path / "text", pattern), steps=2)
    assert read(data, "train") == "the cat sat <eos> the dog sat <eos> <eos> the end <eos>"
    assert read(data, "valid") == "the <unk> sat <eos>"
    assert read(data, "test") == "<unk> cat <eos>"
    assert data.vocabulary == (UNKNOWN, END, "the", "sat", "cat", "dog", "end")
    assert data.source == str(tmp_path / "text")


def test_words_that_the_text_itself_calls_unknown_are_one_with_ours(tmp_path: Path) -> None:
    data = load_text(folder=write(tmp_path / "text", train="the <unk> sat\n"))
    assert data.vocabulary.count(UNKNOWN) == 1
    assert read(data, "valid") == "the <unk> sat <eos>"


def test_the_vocabulary_holds_the_most_frequent_words(tmp_path: Path) -> None:
    many = "\n".join(f"w{i} w{i}" if i < MOST_WORDS else f"w{i}" for i in range(MOST_WORDS + 5))
    data = load_text(folder=write(tmp_path / "text", train=many))
    assert len(data.vocabulary) == len(set(data.vocabulary)) == MOST_WORDS
    assert {UNKNOWN, END} < set(data.vocabulary)
    assert f"w{MOST_WORDS}" not in data.vocabulary
    assert read(data, "train").endswith("<unk> <eos>")


def test_validation_val_and_dev_mean_valid(tmp_path: Path) -> None:
    for name in ("val", "dev", "wiki.validation"):
        folder = write(tmp_path / name, valid=None)
        (folder / f"{name}.txt").write_text(LINES["valid"])
        assert read(load_text(folder=folder), "valid") == "the <unk> sat <eos>"


def test_the_manual_needs_no_download() -> None:
    data, again = load("text", steps=20, subset=1000), load("text", steps=20, subset=1000)
    assert isinstance(data, TextData)
    assert isinstance(again, TextData)
    assert (len(data.train), data.steps) == (1000, 20)
    assert len(data.valid) > 5000 < len(data.test)
    assert 1000 < len(data.vocabulary) <= MOST_WORDS
    assert read(data, "train").startswith('the " assert " statement <eos>')
    assert torch.equal(data.train, again.train)


@pytest.mark.parametrize(
    ("texts", "text"),
    [
        (
            {"valid": None},
            "no valid text in .*: found ptb.test.txt, ptb.train.txt. What works: a folder with three .*"
            "train; valid, validation, val or dev; and test",
        ),
        ({"train": None, "valid": None}, "no train text in .*: found ptb.test.txt"),
        ({"train": ""}, "ptb.train.txt is empty, or holds a single word; a text to train or judge by has many"),
        ({"test": "\n\nword\n"}, "ptb.test.txt is empty, or holds a single word"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, texts: dict[str, str], text: str) -> None:
    with pytest.raises(TorchgrowError, match=text):
        load_text(folder=write(tmp_path / "text", **texts))


def test_folders_that_hold_no_text(tmp_path: Path) -> None:
    with pytest.raises(TorchgrowError, match=r"the folder does not exist\. What works: .* or no folder at all"):
        load_text(folder=tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(TorchgrowError, match="it is a file, not a folder"):
        load_text(folder=tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TorchgrowError, match=r"no train text in .*: the folder is empty"):
        load_text(folder=tmp_path / "empty")
    folder = write(tmp_path / "twice")
    (folder / "old.train.txt").write_text("the")
    with pytest.raises(TorchgrowError, match=r"2 train texts, old\.train\.txt and ptb\.train\.txt; leave one"):
        load_text(folder=folder)
    (write(tmp_path / "latin") / "ptb.test.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TorchgrowError, match=r"ptb\.test\.txt cannot be read as text in UTF-8"):
        load_text(folder=tmp_path / "latin")


@pytest.mark.parametrize("subset", [0, 13])
def test_a_subset_out_of_range(tmp_path: Path, subset: int | None) -> None:
    with pytest.raises(TorchgrowError, match=f"a subset has 1 to 12 of the words of the training text, got {subset}"):
        load_text(folder=write(tmp_path / "text"), subset=subset)


# --- batches


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_target_of_a_word_is_the_one_after_it(shuffled: bool) -> None:
    data = numbered(100, steps=4)
    shuffle = torch.Generator().manual_seed(0) if shuffled else None
    batches = list(data.train_batches(batch_size=3, shuffle=shuffle))
    assert len(batches) == data.train_steps(3, shuffled) == 8
    for words, targets in batches:
        assert words.shape == targets.shape == (3, 4)
        assert torch.equal(targets, words + 1)
        assert torch.equal(words[:, 1:], words[:, :-1] + 1)
    seen = torch.cat([words.flatten() for words, _ in batches])
    assert len(seen.unique()) == len(seen)


def test_every_row_goes_on_where_it_ended() -> None:
    batches = [words for words, _ in numbered(100, steps=4).train_batches(batch_size=3)]
    for before, after in pairwise(batches):
        assert torch.equal(after[:, 0], before[:, -1] + 1)
    assert batches[0][:, 0].tolist() == [0, 33, 66]


def test_a_shuffled_epoch_has_another_order_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = ([w for w, _ in numbered(100, 4).train_batches(batch_size=3, shuffle=generator)] for _ in range(2))
    assert not torch.equal(torch.cat(first), torch.cat(second))


@pytest.mark.parametrize("words", [2, 41, 100, 850])
def test_evaluation_sees_every_word_of_every_column(words: int) -> None:
    batches = list(numbered(words, steps=4).test_batches("test"))
    columns = min(20, words // 2)
    assert sum(targets.numel() for _, targets in batches) == columns * (words // columns - 1)
    assert torch.cat([targets for _, targets in batches], 1).unique().numel() == columns * (words // columns - 1)


def test_a_text_too_short_for_a_batch() -> None:
    message = "the training text has 12 words, too few for one batch of 3 samples of 4 words and the word after each"
    for shuffled in (False, True):
        with pytest.raises(TorchgrowError, match=re.escape(message) + "; take a longer text, or a larger --subset"):
            numbered(12, steps=4).train_steps(3, shuffled)
