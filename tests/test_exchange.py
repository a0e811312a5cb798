"""Exchanging many objects together: all writes or none, whatever comes in between; signals wait in order."""

import os
import signal
from typing import Any

import pytest
import torch
from torch import nn

from torchgrow.exchange import Exchange, trainable, uninterrupted


class Refusing(dict[str, int]):
    """A dict that refuses one key."""

    def __setitem__(self, key: str, value: int) -> None:
        if key == "refused":
            raise MemoryError("none left")
        super().__setitem__(key, value)


def test_what_fails_takes_all_back() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    parameter.grad = gradient = torch.ones(2, 3)
    thing, items, settings = nn.Linear(2, 2), [1], {"a": 1, "b": 2}
    exchange = Exchange()
    exchange.write(parameter, torch.zeros(5))
    exchange.give_gradient(parameter, torch.zeros(5))
    exchange.fields(thing, in_features=7, other=3)
    exchange.append(items, 2)
    exchange.fill(settings, {"c": 3})
    exchange.drop(settings, "a")
    exchange.put(Refusing(), "refused", 1)
    with pytest.raises(MemoryError):
        exchange.make()
    assert torch.equal(parameter, torch.ones(2, 3))
    assert parameter.grad is gradient
    assert (thing.in_features, hasattr(thing, "other"), items, settings) == (2, False, [1], {"a": 1, "b": 2})


def test_what_is_made_can_be_taken_back() -> None:
    parameter, items = nn.Parameter(torch.ones(2)), [1]
    exchange = Exchange()
    exchange.write(parameter, torch.zeros(5))
    exchange.append(items, 2)
    exchange.make()
    assert (tuple(parameter.shape), items) == ((5,), [1, 2])
    exchange.undo()
    assert torch.equal(parameter, torch.ones(2))
    assert items == [1]


NUMBERS = (signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def received() -> Any:
    """Numbers of the signals that came, in order; the handler of SIGALRM raises."""
    came: list[int] = []

    def handler(number: int, frame: Any) -> None:
        came.append(number)
        if number == signal.SIGALRM:
            raise TimeoutError

    before = [signal.signal(number, handler) for number in NUMBERS]
    yield came
    for number, old in zip(NUMBERS, before, strict=True):
        signal.signal(number, old)


def test_all_signals_wait_and_come_in_order(received: list[int]) -> None:
    """Of whatever kind, and all of them, though the handler of the second one raises."""
    handlers = [signal.getsignal(number) for number in NUMBERS]

    def block() -> None:
        with uninterrupted(), uninterrupted():
            for number in NUMBERS:
                os.kill(os.getpid(), number)
            assert received == []

    with pytest.raises(TimeoutError):
        block()
    assert received == list(NUMBERS)
    assert [signal.getsignal(number) for number in NUMBERS] == handlers


def test_handlers_come_back_when_the_block_fails(received: list[int]) -> None:
    def block() -> None:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    assert received == [signal.SIGTERM]


def test_gradients_are_on_again_whatever_was_left() -> None:
    """As when an exception comes while `torch.no_grad` switches them on again."""

    def block() -> None:
        with trainable():
            torch.set_grad_enabled(False)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    assert torch.is_grad_enabled()
    with torch.no_grad():
        with trainable():
            assert not torch.is_grad_enabled()
        assert not torch.is_grad_enabled()
