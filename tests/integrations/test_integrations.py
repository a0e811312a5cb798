"""Laws of growing inside other people's loops: resumed bit for bit, on the budget however it ends, grown once.

Needs lightning, transformers and accelerate, each only for its own tests.
"""

import copy
import itertools
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchgrow
from borrowed import on_budget, same
from torchgrow import Budget, Grower, TorchgrowError, portable_
from torchgrow.integrations.borrowed_loop import BorrowedLoop, one_process

BUDGET = Budget(params="50%")
X, Y = torch.randn(64, 6, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 3


class KilledError(Exception):
    pass


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


# --- what they share; needs no framework ---


def test_a_loop_that_begins_twice_grows_once() -> None:
    loop, model = BorrowedLoop(BUDGET, None, None, {}), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert loop.begin(model, [optimizer], X[:2], 3) == {}
    first = loop.grower
    assert first is not None
    for due in (0, 0, 1):
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        loop.update(due)
    assert len(first.history) == 2
    loop.begin(model, [optimizer], X[:2], 3)
    assert loop.grower is first
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    loop.begin(model, [other], X[:2], 3)
    assert loop.grower is not first
    assert loop.grower is not None
    assert len(loop.grower.history) == 2
    other.step()
    assert loop.update(0) is False
    loop.update(1)
    assert len(loop.grower.history) == 3
    loop.end()
    final, cost = loop.grower, loop.grower.cost()
    loop.begin(model, [torch.optim.SGD(model.parameters(), lr=0.1)], X[:2], 3)
    loop.end()
    assert loop.grower is final
    assert final.cost() == cost


def test_what_a_loop_refuses() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TorchgrowError, match=r"nothing says how many updates .* GrowCallback\(\.\.\., updates=20\)"):
        BorrowedLoop(BUDGET, None, None, {}).begin(model, [optimizer], X[:2], None)
    with pytest.raises(TorchgrowError, match="updates=0 must be a whole number >= 1"):
        BorrowedLoop(BUDGET, 0, None, {}).begin(model, [optimizer], X[:2], 3)
    assert model[0].out_features == 32
    one_process(1, "this loop")
    with pytest.raises(TorchgrowError, match="this loop has 2: it wraps the model once"):
        one_process(2, "this loop")
    with pytest.raises(TorchgrowError, match="every_n_steps=0 must be a whole number >= 1"):
        BorrowedLoop(BUDGET, None, 0, {})


def test_a_loop_of_one_epoch_plans_by_steps(caplog: pytest.LogCaptureFixture) -> None:
    for epochs, steps, room, every in (
        (1, 24, 12, 2),
        (1, 4, 4, 1),
        (1, 1, 1, None),
        (2, 24, 2, None),
        (None, 9, None, None),
    ):
        loop = BorrowedLoop(BUDGET, None, None, {})
        caplog.clear()
        assert loop.plan(epochs, steps) == room
        assert loop.every_n_steps == every
        assert ("updates come every" in caplog.text) == (every is not None)
    other = BorrowedLoop(BUDGET, None, None, {})
    other.go_on({"offset": 1, "every_n_steps": 2})
    assert (other.offset, other.every_n_steps) == (1, 2)
    for every in (24, 50):
        with pytest.warns(
            UserWarning, match=rf"room for {24 // every} updates .*={every}: .* Give every_n_steps=2 or less"
        ):
            assert BorrowedLoop(BUDGET, None, every, {}).plan(6, 24) == 24 // every


def test_a_loop_that_ends_early_says_what_is_untrained() -> None:
    loop, model = BorrowedLoop(BUDGET, None, None, {}), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop.begin(model, [optimizer], X[:2], 1000)
    for due in (0, 1, 2):
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        loop.update(due)
    with pytest.warns(UserWarning, match=r"after 2 of 1000 planned updates: \d+ of \d+ units .* updates=3\) or fewer"):
        loop.end()
    assert loop.grower is not None
    assert on_budget(loop.grower)


# --- Lightning ---


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


# --- transformers ---


@pytest.fixture
def transformers() -> Iterator[Any]:
    framework = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    framework.logging.set_verbosity_error()
    framework.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield framework


WORDS = torch.randint(50, (64, 12), generator=torch.Generator().manual_seed(1))
TEXTS = [{"input_ids": w, "attention_mask": torch.ones(12, dtype=torch.long), "labels": w[0] % 3} for w in WORDS]


def bert(transformers: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, num_labels=3,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def trainer(transformers: Any, folder: Path, *callbacks: Any, epochs: int = 6, **settings: Any) -> Any:
    settings = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_strategy": "no", **settings}
    arguments = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        use_cpu=True,
        **settings,
    )
    model = bert(transformers)
    made = transformers.Trainer(model, arguments, train_dataset=TEXTS, eval_dataset=TEXTS, callbacks=list(callbacks))
    made.remove_callback(transformers.PrinterCallback)
    return made


def trainer_grow(**settings: Any) -> Any:
    from torchgrow.integrations.transformers import GrowCallback

    return GrowCallback(Budget(params="70%"), **settings)


def at_step(transformers: Any, step: int) -> Any:
    class Killer(transformers.TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step == step:
                raise KilledError

    return Killer()


def test_trainer_of_one_epoch_grows_while_it_trains(transformers: Any, tmp_path: Path) -> None:
    trainer(transformers, tmp_path, grow := trainer_grow(), epochs=1).train()
    assert grow.grower.updates == 4
    assert on_budget(grow.grower)


@pytest.mark.parametrize(("every", "step"), [(None, 12), (None, 5), (None, 7), (3, 10)])
def test_trainer_goes_on_bit_for_bit(transformers: Any, tmp_path: Path, every: int | None, step: int) -> None:
    """Also from within an epoch, and with updates at the same steps."""

    class Made(transformers.TrainerCallback):  # type: ignore[misc]
        def __init__(self, grow: Any) -> None:
            self.grow, self.counts = grow, list[int]()

        def on_step_end(self, *_: Any, **given: Any) -> None:
            self.counts.append(len(self.grow.grower.history))

    straight = trainer(transformers, tmp_path / "a", grow := trainer_grow(every_n_steps=every), whole := Made(grow))
    straight.train()
    assert on_budget(grow.grower)
    saves: dict[str, Any] = {"save_strategy": "steps", "save_steps": step}
    with pytest.raises(KilledError):
        trainer(transformers, tmp_path, trainer_grow(every_n_steps=every), at_step(transformers, step), **saves).train()
    resumed = trainer(transformers, tmp_path, again := trainer_grow(every_n_steps=every), rest := Made(again))
    resumed.train(resume_from_checkpoint=True)
    assert rest.counts == whole.counts[step:]
    assert same(straight.model, resumed.model)
    assert len(again.grower.history) == len(grow.grower.history)


def test_trainer_names_the_folder_of_the_run(transformers: Any, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        trainer(transformers, tmp_path / "a", trainer_grow(), at_step(transformers, 8), save_strategy="epoch").train()
    source = str(tmp_path / "a" / "checkpoint-8")
    with pytest.raises(TorchgrowError, match=r"is not there with the run of GrowCallback: name the checkpoint"):
        trainer(transformers, tmp_path / "b", trainer_grow()).train(resume_from_checkpoint=source)
    with pytest.raises(KilledError):
        trainer(
            transformers, tmp_path / "b", trainer_grow(seed=1), at_step(transformers, 8), save_strategy="epoch", seed=7
        ).train()
    with pytest.raises(TorchgrowError, match=r"is not that of the checkpoint the weights are from"):
        trainer(transformers, tmp_path / "b", trainer_grow(seed=1)).train(resume_from_checkpoint=source)
    right = trainer(transformers, tmp_path / "b", grow := trainer_grow(resume_from=source))
    right.train(resume_from_checkpoint=source)
    assert on_budget(grow.grower)


def test_trainer_loads_the_best_of_the_last_structure(transformers: Any, tmp_path: Path) -> None:
    found: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    found |= {"metric_for_best_model": "loss", "greater_is_better": True}  # as if the earliest were the best
    made = trainer(transformers, tmp_path, grow := trainer_grow(updates=4), **found)
    made.train()
    assert on_budget(grow.grower)
    changed = max(e.update for a, e in itertools.pairwise(grow.grower.history) if a.widths != e.widths)
    assert made.state.best_global_step > 4 * changed


def test_trainer_ends_on_the_budget_and_grows_once(transformers: Any, tmp_path: Path) -> None:
    found: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    found |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    stop = transformers.EarlyStoppingCallback(1)
    made = trainer(transformers, tmp_path, grow := trainer_grow(updates=9), stop, epochs=20, **found)
    made.train()
    assert made.state.global_step < 12
    assert on_budget(grow.grower)
    cost, grower = grow.grower.cost(), grow.grower
    made.train()
    assert grow.grower is grower
    assert (
        grower.cost()
        == cost
        == torchgrow.measure(made.model, {k: v[None] for k, v in TEXTS[0].items() if k != "labels"})
    )


def test_trainer_of_an_encoder_and_a_decoder(transformers: Any, tmp_path: Path) -> None:
    """Whose decoder makes its inputs of the labels."""
    made = trainer(transformers, tmp_path, grow := trainer_grow(), epochs=2)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    made.model = made.model_wrapped = transformers.T5ForConditionalGeneration(config)
    made.train_dataset = [{"input_ids": w, "labels": w} for w in WORDS]
    made.train()
    assert on_budget(grow.grower)


def test_from_pretrained(transformers: Any, tmp_path: Path) -> None:
    from torchgrow.integrations.pretrained import from_pretrained

    made = trainer(transformers, tmp_path / "run", trainer_grow(), epochs=2)
    made.train()
    made.save_model(tmp_path / "small")
    batch = {"input_ids": WORDS[:2]}
    right = made.model.eval()(**batch).logits
    for kind in (transformers.BertForSequenceClassification, transformers.AutoModelForSequenceClassification):
        assert torch.equal(from_pretrained(kind, tmp_path / "small")(**batch).logits, right)
    made.model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert torch.equal(from_pretrained(type(made.model), tmp_path / "parts")(**batch).logits, right)
    with pytest.raises(torchgrow.SavedModelError, match="the frame has no tensor"):
        from_pretrained(transformers.BertModel, tmp_path / "small")
    state = load_file(tmp_path / "small" / "model.safetensors")
    del state["classifier.bias"]
    save_file(state, tmp_path / "small" / "model.safetensors")
    with pytest.raises(torchgrow.SavedModelError, match=r"does not fit Bert.*: missing \['classifier.bias'\], foreign"):
        from_pretrained(type(made.model), tmp_path / "small")
    with pytest.raises(torchgrow.SavedModelError, match=r"has no model\.safetensors"):
        from_pretrained(transformers.BertModel, tmp_path)


def test_from_pretrained_where_files_have_other_names(transformers: Any, tmp_path: Path) -> None:
    """transformers may write other names than the model's own, as of ViT, and translates them when it loads."""
    from torchgrow.integrations.pretrained import from_pretrained

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    x = torch.randn(2, 3, 16, 16)
    for share in ("100%", "80%"):
        model = transformers.ViTForImageClassification(config).eval()
        torchgrow.prune_(model, x, budget=Budget(params=share))
        model.save_pretrained(tmp_path / share)
        for kind in (transformers.ViTForImageClassification, transformers.AutoModelForImageClassification):
            found = from_pretrained(kind, tmp_path / share)
            assert type(found) is transformers.ViTForImageClassification
            assert same(found, model)
            assert torch.equal(found(x).logits, model(x).logits)


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Data without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(TEXTS)


def test_trainer_with_data_of_no_length(transformers: Any, tmp_path: Path) -> None:
    """It counts as many epochs as there are integers, for each of which an update was planned, for ever."""

    def streamed(grow: Any) -> Any:
        made = trainer(transformers, tmp_path, grow, max_steps=12)
        made.train_dataset = Stream()
        return made

    with pytest.raises(TorchgrowError, match=r"nothing says how many updates .*: its data has no length"):
        streamed(trainer_grow()).train()
    for settings, planned in (({"every_n_steps": 4}, 3), ({"updates": 2}, 2)):
        grow = trainer_grow(**settings)
        streamed(grow).train()
        assert grow.grower.updates == planned
        assert on_budget(grow.grower)


# --- accelerate ---


def test_accelerate_saves_and_loads(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def begin() -> tuple[Any, nn.Module, Any, Grower]:
        torch.manual_seed(7)
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        grower = Grower(model, optimizer, example_inputs=X[:2], budget=BUDGET, updates=6)
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(grower)
        return accelerator, model, optimizer, grower

    def train(accelerator: Any, model: nn.Module, optimizer: Any, grower: Grower, epochs: int) -> None:
        for _ in range(epochs):
            for number in range(4):
                optimizer.zero_grad()
                accelerator.backward(nn.functional.cross_entropy(model(X[number::4]), Y[number::4]))
                optimizer.step()
            grower.update()

    straight, broken = begin(), begin()
    train(*straight, 5)
    train(*broken, 2)
    broken[0].save_state(tmp_path)
    resumed = begin()
    resumed[0].load_state(tmp_path)
    assert resumed[3].widths() == broken[3].widths()
    train(*resumed, 3)
    assert same(straight[1], resumed[1])
    frame = portable_(net())
    frame.load_state_dict(copy.deepcopy(resumed[1].state_dict()))
    assert same(frame, resumed[1])
