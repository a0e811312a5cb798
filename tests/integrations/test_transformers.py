"""Laws of growing inside the Trainer of transformers: resumed bit for bit, on the budget however it ends."""

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import torchgrow
from borrowed import KilledError, on_budget, same
from torchgrow import Budget, TorchgrowError


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
