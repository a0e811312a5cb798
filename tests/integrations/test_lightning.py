"""Laws of growing inside Lightning: resumed bit for bit, on the budget however it ends, grown once."""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from borrowed import BUDGET, KilledError, X, Y, net, on_budget, same
from torchgrow import TorchgrowError, portable_


@pytest.fixture
def lightning() -> Iterator[Any]:
    framework = pytest.importorskip("lightning.pytorch")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for text in (
            "treespec",
            "num_workers",
            "Be aware that when using",
            "Checkpoint directory",
            "logged in the",
            "resuming from a checkpoint that",
            "will run with no optimizer",
        ):
            warnings.filterwarnings("ignore", message=f".*{text}")
        yield framework


class Plain:
    """What a task of `fit` has of its own: nothing."""


def fit(
    L: Any,
    *callbacks: Any,
    epochs: int = 6,
    ckpt: Path | None = None,
    tested: Path | None = None,
    module: Any = None,
    task: type = Plain,
    samples: tuple[Tensor, Tensor] = (X, Y),
    **settings: Any,
) -> Any:
    """Train, with a checkpoint that was validated before, on another module."""

    class Base(L.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = portable_(net())

        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: list[Tensor], number: int) -> None:
            self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)]

    class Task(task, Base):  # type: ignore[misc]
        pass

    torch.manual_seed(5)
    data = DataLoader(TensorDataset(*samples), batch_size=16, shuffle=False)
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, **settings}
    saves = any(isinstance(one, L.callbacks.ModelCheckpoint) for one in callbacks)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), enable_checkpointing=saves, **settings
    )
    if tested is not None:
        trainer.validate(Task(), data, ckpt_path=tested, verbose=False)
    trainer.fit(Task() if module is None else module, data, data, ckpt_path=ckpt)
    return trainer


def lightning_grow(**settings: Any) -> Any:
    from torchgrow.integrations.lightning import GrowCallback

    return GrowCallback(BUDGET, X[:2], net="net", **settings)


def killer(L: Any, epoch: int) -> Any:
    class Killer(L.Callback):  # type: ignore[misc]
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == epoch:
                raise KilledError

    return Killer()


@pytest.mark.parametrize("order", ["alone", "average first", "average last"])
def test_lightning_goes_on_bit_for_bit(lightning: Any, tmp_path: Path, order: str) -> None:
    def callbacks() -> tuple[Any, list[Any]]:
        average = [lightning.callbacks.EMAWeightAveraging(decay=0.9)] if order != "alone" else []
        grow = lightning_grow(updates=6)
        return grow, [*average, grow] if order == "average first" else [grow, *average]

    grow, used = callbacks()
    straight = fit(lightning, *used)
    assert on_budget(grow.grower)
    with pytest.raises(KilledError):
        fit(
            lightning,
            *callbacks()[1],
            killer(lightning, 3),
            lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True),
        )
    again, used = callbacks()
    resumed = fit(lightning, *used, ckpt=tmp_path / "last.ckpt")
    assert same(straight.lightning_module, resumed.lightning_module)
    assert again.grower.history[-1].widths == grow.grower.history[-1].widths
    assert len(again.grower.history) == 7


def test_lightning_loads_checkpoints(lightning: Any, tmp_path: Path) -> None:
    checkpoint = lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    trainer = fit(lightning, grow := lightning_grow(), checkpoint)
    module = trainer.lightning_module
    loaded = type(module).load_from_checkpoint(tmp_path / "last.ckpt")
    assert same(loaded, module)
    fit(lightning, lightning.callbacks.ModelCheckpoint(tmp_path / "plain", save_last=True), module=loaded, epochs=1)
    with pytest.raises(TorchgrowError, match="no run of GrowCallback to go on with"):
        fit(lightning, lightning_grow(), ckpt=tmp_path / "plain" / "last.ckpt")
    assert on_budget(grow.grower)


def test_lightning_takes_over_a_run_whose_epochs_are_over(lightning: Any, tmp_path: Path) -> None:
    """Lightning trains nothing then; the network is still the saved one, brought to its budget."""
    checkpoint = lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    whole = fit(lightning, lightning_grow(), checkpoint)
    again = fit(lightning, grow := lightning_grow(), ckpt=tmp_path / "last.ckpt")
    assert on_budget(grow.grower)
    assert len(grow.grower.history) > 1
    assert same(again.lightning_module, whole.lightning_module)
    fit(lightning, longer := lightning_grow(), ckpt=tmp_path / "last.ckpt", epochs=8)
    assert on_budget(longer.grower)


def test_lightning_ends_on_the_budget_and_grows_once(lightning: Any) -> None:
    stop = lightning.callbacks.EarlyStopping("loss", patience=0, min_delta=1.0)
    grow = lightning_grow(updates=20)
    trainer = fit(lightning, grow, stop, epochs=20)
    assert trainer.current_epoch < 5
    assert on_budget(grow.grower)
    cost, grower = grow.grower.cost(), grow.grower
    fit(lightning, grow, module=trainer.lightning_module, epochs=2)
    assert grow.grower is grower
    assert grower.cost() == cost


def test_lightning_goes_on_from_the_checkpoint_of_fit_alone(lightning: Any, tmp_path: Path) -> None:
    """What `validate(ckpt_path=...)` loads is no run that the next `fit` goes on with."""
    save = lightning.callbacks.ModelCheckpoint(tmp_path, monitor="loss", save_top_k=-1, filename="{epoch}")
    whole = fit(lightning, first := lightning_grow(), save)
    again = fit(lightning, grow := lightning_grow(), tested=tmp_path / "epoch=3.ckpt")
    assert [e.widths for e in grow.grower.history] == [e.widths for e in first.grower.history]
    assert same(again.lightning_module, whole.lightning_module)
    grower = first.grower
    fit(lightning, first, tested=tmp_path / "epoch=3.ckpt", module=whole.lightning_module, epochs=1)
    assert first.grower is grower


class Two:
    """A part that grows and one that does not, with an optimizer each; the second steps in every other batch."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.head: Any = nn.Linear(3, 3)

    def training_step(self: Any, batch: list[Tensor], number: int) -> None:
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.head(self.net(batch[0])), batch[1]))
        first.step()
        if number % 2:
            second.step()

    def configure_optimizers(self: Any) -> Any:
        return [torch.optim.Adam(self.net.parameters(), 2e-3), torch.optim.Adam(self.head.parameters(), 2e-3)]


class Shared(Two):
    def configure_optimizers(self: Any) -> Any:
        return torch.optim.Adam(self.parameters())


class Without(Two):
    def configure_optimizers(self: Any) -> Any:
        return None


def test_lightning_grows_a_part_with_an_optimizer_of_its_own(lightning: Any, tmp_path: Path) -> None:
    straight = fit(lightning, grow := lightning_grow(), task=Two)
    assert on_budget(grow.grower)
    assert grow.grower.optimizers == tuple(straight.optimizers[:1])
    save = lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    with pytest.raises(KilledError):
        fit(lightning, lightning_grow(), killer(lightning, 3), save, task=Two)
    assert same(
        fit(lightning, lightning_grow(), ckpt=tmp_path / "last.ckpt", task=Two).lightning_module,
        straight.lightning_module,
    )


def test_lightning_counts_batches_where_the_module_steps_by_itself(lightning: Any) -> None:
    class Sizes(lightning.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, *_: Any) -> None:
            made.append(len(grow.grower.history) - 1)

    made: list[int] = []
    fit(lightning, grow := lightning_grow(every_n_steps=4), Sizes(), task=Two)
    assert made == [number // 4 for number in range(24)]
    fit(lightning, grow := lightning_grow(), task=Two, epochs=-1, max_steps=36)
    assert grow.grower.updates == 5


def test_lightning_names_the_optimizer_it_needs(lightning: Any) -> None:
    shared = r"the Adam of configure_optimizers trains net='net' and other parameters too.* Give each an optimizer"
    for task, text in ((Shared, shared), (Without, r"needs an optimizer that trains what grows, .* of net='net'")):
        with pytest.raises(TorchgrowError, match=text):
            fit(lightning, lightning_grow(), task=task)


def test_lightning_refuses_an_average_that_cannot_follow(lightning: Any) -> None:
    with pytest.raises(TorchgrowError, match=r"StochasticWeightAveraging .* use lightning\S+EMAWeightAveraging"):
        fit(lightning, lightning_grow(), lightning.callbacks.StochasticWeightAveraging(1e-3))


def test_lightning_goes_on_after_an_exception(lightning: Any) -> None:
    grow = lightning_grow()
    with pytest.raises(KilledError):
        fit(lightning, grow, killer(lightning, 3), module=(module := fit(lightning, epochs=0).lightning_module))
    assert not grow.grower.finished
    done = len(grow.grower.history)
    fit(lightning, grow, module=module)
    assert on_budget(grow.grower)
    assert len(grow.grower.history) > done


def test_lightning_by_steps(lightning: Any) -> None:
    grow = lightning_grow(every_n_steps=5)
    fit(lightning, grow)
    assert grow.grower.updates == 6 * 4 // 5
    assert on_budget(grow.grower)


def test_lightning_of_one_epoch_goes_on_bit_for_bit(lightning: Any, tmp_path: Path) -> None:
    """All samples are one, since Lightning keeps no place within an epoch."""
    samples = X[:1].repeat(64, 1), Y[:1].repeat(64)
    straight = fit(lightning, grow := lightning_grow(), epochs=1, samples=samples)
    assert on_budget(grow.grower)
    assert grow.grower.updates == 4
    save = lightning.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    fit(lightning, lightning_grow(), save, epochs=1, samples=samples)
    resumed = fit(lightning, again := lightning_grow(), ckpt=tmp_path / "step=2.ckpt", epochs=1, samples=samples)
    assert same(straight.lightning_module, resumed.lightning_module)
    assert len(again.grower.history) == len(grow.grower.history)


def test_lightning_plans_as_long_as_the_trainer_goes_on(lightning: Any) -> None:
    """Of `max_epochs` and `max_steps` what comes first; where neither ends `fit`, the user says so."""
    for given, settings, planned in (
        ({"epochs": -1, "max_steps": 24}, {}, 6),
        ({"epochs": 100, "max_steps": 22}, {}, 6),
        ({"epochs": 3, "max_steps": 1000}, {}, 3),
        ({"epochs": -1, "max_steps": 12, "accumulate_grad_batches": 2}, {}, 6),
        ({"epochs": -1, "max_steps": 24}, {"every_n_steps": 4}, 6),
        ({"epochs": -1, "max_time": {"seconds": 2}}, {"updates": 3, "every_n_steps": 4}, 3),
    ):
        grow = lightning_grow(**settings)
        fit(lightning, grow, **given)
        assert grow.grower.updates == planned
        assert on_budget(grow.grower)
    for settings in ({}, {"every_n_steps": 4}):
        with pytest.raises(TorchgrowError, match="nothing says how many updates this training has room for"):
            fit(lightning, lightning_grow(**settings), epochs=-1, max_time={"minutes": 2})
