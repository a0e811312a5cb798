"""A search for the shape of a recipe's network, the training of its winner, and the run folder they leave behind."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import torchgrow
from torchgrow import Search, TorchgrowError, TrainingError, Trial, measure
from torchgrow.lab import processes, report
from torchgrow.lab.checkpoints import Checkpoints
from torchgrow.lab.data import Data
from torchgrow.lab.devices import chosen, random_kept, random_state, set_random_state
from torchgrow.lab.display import Display, short
from torchgrow.lab.environment import environment
from torchgrow.lab.fitted import Fitted
from torchgrow.lab.from_recipe import example, extent, make_network, make_optimizer, with_data
from torchgrow.lab.own_networks import told_apart
from torchgrow.lab.recipes import Recipe, from_json
from torchgrow.lab.recipes.recipe import MOST_SEED
from torchgrow.lab.run import Result, as_before, checked, result_of, score_of, table, train_network
from torchgrow.lab.run_folder import RunFolder, check_new, default_out, resuming, where_it_stopped
from torchgrow.lab.train import Epoch, fit

SEARCHED = "searched"
"""What the winner is called in records, once it is trained to the end."""


def search(
    recipe: Recipe,
    *,
    console: Console,
    out: Path | None = None,
    folder: Path | None = None,
    download: bool = False,
    candidates: int | None = None,
    rungs: Sequence[float] = (),
    anew: bool = False,
    beside: Sequence[str] = ("uniform",),
    validate: bool = False,
    device: str = "auto",
) -> Path:
    """Search the shape of a recipe's network at its budget, train the winner, write the run folder, print the tables.

    Trials train as the recipe says, so a rung lies where its schedule is then: "wsd" suits, whose rate is constant for
    the rungs. All begin with the recipe's seed, as a run of the winner's shape alone would.

    Args:
        recipe: what to search for.
        console: where to show it.
        out: the run folder to write; default: a free name under ``runs/``.
        folder: where the data is; see `torchgrow.lab.data.load`.
        download: whether the data may be downloaded.
        candidates: how many shapes; None: as many as cost less than one dense training, see `torchgrow.search`.
        rungs: as for `torchgrow.search`; none: its own.
        anew: train the winner from new weights, of the seed after the recipe's; else it goes on from what it has.
        beside: other networks to train, as for `torchgrow.lab.run.run`.
        validate: judge by training images that are not trained on instead of the test images.
        device: where to train, one of `torchgrow.lab.names.DEVICES`.

    Returns:
        the run folder: as of `torchgrow.lab.run.run`; ``search.json`` has the trials, ``network/`` the winner.

    Raises:
        TorchgrowError: bad data, an infeasible budget, an ``out`` that exists, a loss that is not finite.
    """
    _check(recipe)
    names = checked(beside)
    if out:
        check_new(out)  # before it costs data and tracing
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    recipe, data = with_data(recipe, console, folder, download=download, held_out=validate, device=chosen(device))
    how = {"candidates": candidates, "rungs": list(rungs), "anew": anew, "validate": validate}
    found = _search(recipe, data, _Trials(recipe, data), how)  # what is wrong with it leaves no folder
    record = {**recipe.as_json(), **told_apart(recipe)}
    run_folder = RunFolder(out or default_out(f"searched-{recipe.name}"))
    begun = {"data": folder and str(folder.absolute()), "beside": names, "checkpoint_every": None}
    run_folder.write_json("environment.json", environment(data.device))
    run_folder.write_json("config.json", {**record, "run": begun, "search": how})
    return _go(recipe, data, run_folder, found, console)


def resume(run: Path, *, console: Console, folder: Path | None = None, device: str = "auto") -> Path:
    """Go on with a search that was stopped, by whatever: it ends as if it had not been.

    Args:
        run: the folder that it was to end up with, or its ``.partial``.
        console: where to show it.
        folder: where the data is; default: where it was.
        device: where to train, as for `search`.

    Returns:
        the run folder, as `search` does.

    Raises:
        TorchgrowError: it is finished, no search, damaged, or another process is at it.
    """
    run = run if run.name else run.resolve()  # "." has no name
    run_folder = RunFolder(run.with_name(run.name.removesuffix(".partial")), resume=True)
    config = run_folder.read_json("config.json")
    recipe, begun, how = from_json(config), config.get("run"), config.get("search")
    if not isinstance(begun, dict) or not isinstance(how, dict):
        raise TorchgrowError(f"{run} is a run without a search; go on with it by: {resuming(run, {})}")
    as_before(run_folder, recipe, device, console)
    folder = folder or (Path(begun["data"]) if begun["data"] else None)
    recipe, data = with_data(recipe, console, folder, held_out=how["validate"], device=chosen(device))
    return _go(recipe, data, run_folder, _search(recipe, data, _Trials(recipe, data), how), console)


def _check(recipe: Recipe) -> None:
    """Refuse what is not searched for.

    Raises:
        TorchgrowError: a recipe with weights or on the meta device, or several processes.
    """
    if recipe.weights or recipe.meta:
        raise TorchgrowError(
            f"recipe {recipe.name!r} begins with {'weights' if recipe.weights else 'a frame on the meta device'}, and "
            "a search cuts its trials from frames with new weights; leave that out"
        )
    with processes.joined():
        if processes.size() > 1:
            raise TorchgrowError("a search runs in one process; start it without torchrun")


@dataclass(eq=False)
class _Trials:
    """Trains trials for a search, and finds in the run folder what was trained before a stop.

    A record is written before the checkpoint of its epoch, so a rung is done where its records are.
    """

    recipe: Recipe
    data: Data
    run_folder: RunFolder | None = None
    display: Display | None = None

    def train(self, trial: Trial, more: int) -> float:
        """As `torchgrow.search` wants it: so many epochs more; the mean training loss of these, infinite if it is."""
        run_folder, until = self.run_folder, trial.done + more
        assert run_folder is not None
        assert self.display is not None
        known = len(run_folder.epochs(named(trial)))
        if trial.losses and math.isinf(trial.losses[-1]):
            return math.inf
        if known < until:
            frame = measure(make_network(self.recipe.build, 1.0, self.data.device), self.data.example())
            self.display.start(named(trial), epochs=until, frame=frame, limits={}, full={})
            try:
                for record in self.epochs(trial, until):
                    if record.epoch > known:  # after a stop one epoch is trained again, from the checkpoint before it
                        run_folder.append(record)
                        self.display.epoch(record)
            except TrainingError as error:  # this shape does not train at such a rate; others may
                self.display.say(str(error))
                return math.inf
        losses = [record.loss for record in run_folder.epochs(named(trial))[trial.done : until]]
        return sum(losses) / len(losses)

    def epochs(self, trial: Trial, until: int) -> Iterator[Epoch]:
        """What is left of a trial's training up to an epoch, with random numbers of its own."""
        if "training" not in trial.memory:
            torch.manual_seed(self.recipe.seed)
            trial.memory |= {"training": self._training(trial), "random": random_state()}
        training: Iterator[Epoch] = trial.memory["training"]
        record = None
        while record is None or record.epoch < until:
            with random_kept():
                set_random_state(trial.memory["random"])
                record = next(training)
                trial.memory["random"] = random_state()
            yield record

    def _training(self, trial: Trial) -> Iterator[Epoch]:
        assert trial.model is not None
        assert self.run_folder is not None
        assert self.display is not None
        optimizer = make_optimizer(trial.model, self.recipe)
        checkpoints = Checkpoints(folder=self.run_folder.path / "checkpoints" / f"trial-{trial.number}")
        watched = partial(fit, on_step=self.display.step, checkpoints=checkpoints)
        return watched(named(trial), trial.model, optimizer, self.data, self.recipe)


def named(trial: Trial) -> str:
    """What a trial is called in records."""
    return f"trial={trial.number}"


def _search(recipe: Recipe, data: Data, trials: _Trials, how: dict[str, Any]) -> tuple[Search, _Trials]:
    """The search as a recipe has it, not begun."""
    build = partial(make_network, recipe.build_grown or recipe.build, 1.0, data.device)
    inputs, carried = example(build(), data)
    steps, samples = extent(build(), data, recipe)
    found = torchgrow.search(
        build,
        recipe.budget,
        example_inputs=inputs,
        train=trials.train,
        length=recipe.epochs,
        samples=steps * samples,
        candidates=how["candidates"],
        **({"rungs": how["rungs"]} if how["rungs"] else {}),
        seed=recipe.seed,
        protect=recipe.freeze,
        carried=carried,
        depth=recipe.depth,
    )
    return found, trials


def _go(recipe: Recipe, data: Data, run_folder: RunFolder, begun: tuple[Search, _Trials], console: Console) -> Path:
    """Search, train the winner and the others, and finish the run folder."""
    found, trials = begun
    frame = measure(make_network(recipe.build, 1.0, data.device), data.example())
    limits = asdict(recipe.budget.limits(found.frame_cost))
    run_folder.write_json("frame.json", {**asdict(frame), "limits": limits, "widths": {}, "blocks": {}})
    try:
        with run_folder:
            with Display(console) as display:
                trials.run_folder, trials.display = run_folder, display
                display.say(
                    f"{len(found.trials)} shapes of {recipe.budget}, compared after "
                    f"{', '.join(map(str, found.rungs))} of {found.length} epochs; with a whole training at most "
                    f"{found.most:.2f} of a dense training's FLOPs"
                )
                for trial in found:
                    display.say(str(trial))
                results = _results(recipe, data, run_folder, found, trials)
            pictures = report.draw(run_folder.path)
    except BaseException as error:
        again = f"Go on from there with: {resuming(run_folder.out, {'search': True})}"
        if told := where_it_stopped(error, run_folder, again):
            console.print(told, soft_wrap=True)
        raise
    shares = {key: value / found.dense_flops for key, value in _spent(found, results).items()}
    console.print(_trials_table(found), table(results))
    console.print(
        f"{SEARCHED}: training FLOPs and seconds are those of all trials and of the winner's training; "
        f"{shares['search']:.2f} and {shares['winner']:.2f} of one dense training's FLOPs, {shares['all']:.2f} in all.",
        soft_wrap=True,
    )
    console.print("Pictures:", *(f"  {run_folder.out / picture}" for picture in pictures), sep="\n", soft_wrap=True)
    console.print(f"Everything about this search: {run_folder.out}", soft_wrap=True)
    return run_folder.out


def _results(recipe: Recipe, data: Data, run_folder: RunFolder, found: Search, trials: _Trials) -> dict[str, Result]:
    """Results of the winner and of the networks beside it, those first that were asked for beside."""
    display, config = trials.display, run_folder.read_json("config.json")
    assert display is not None
    done = {name: Result(**fields) for name, fields in run_folder.read_json("results.json").items()}
    names = config["run"]["beside"]
    if SEARCHED not in done:
        done[SEARCHED] = _winner(recipe, data, run_folder, found, trials, anew=config["search"]["anew"])
        run_folder.write_json("results.json", {name: asdict(result) for name, result in done.items()})
    run_folder.write_json("search.json", described(found))
    for name in names:
        if name not in done:
            done[name] = train_network(name, recipe, data, run_folder, display, done, None)
            run_folder.write_json("results.json", {name: asdict(result) for name, result in done.items()})
    results = {name: done[name] for name in (*names, SEARCHED)}
    run_folder.write_json("results.json", {name: asdict(result) for name, result in results.items()})
    return results


def _winner(recipe: Recipe, data: Data, run_folder: RunFolder, found: Search, trials: _Trials, *, anew: bool) -> Result:
    """Train the winner to the end, on from what it has or anew; its records count the whole search's cost."""
    trial, display = found.winner, trials.display
    assert display is not None
    flops = found.training_flops
    seconds = sum(one.seconds for trial in found.trials for one in run_folder.epochs(named(trial))[-1:])
    whole = recipe.epochs + recipe.then
    frame = measure(make_network(recipe.build, 1.0, data.device), data.example())
    display.start(SEARCHED, epochs=whole, frame=frame, limits={}, full={})
    if anew:
        recipe = replace(recipe, seed=(recipe.seed + 1) % (MOST_SEED + 1))
        model = found.fresh(trial, recipe.seed)
        torch.manual_seed(recipe.seed)
        checkpoints = Checkpoints(folder=run_folder.path / "checkpoints" / SEARCHED)
        records = fit(SEARCHED, model, make_optimizer(model, recipe), data, recipe, checkpoints=checkpoints)
    else:
        assert trial.model is not None
        model, own = trial.model, run_folder.epochs(named(trial))
        flops, seconds = flops - trial.training_flops, seconds - own[-1].seconds
        for record in own[len(run_folder.epochs(SEARCHED)) :]:  # after a stop some are there
            run_folder.append(_counted(record, flops, seconds))
        here = trial.done < whole or "training" not in trial.memory  # after a stop the model is as it began
        records = trials.epochs(trial, whole) if here else iter(())
    known = len(run_folder.epochs(SEARCHED))
    for record in records:
        if record.epoch > known:
            run_folder.append(_counted(record, flops, seconds))
            display.epoch(_counted(record, flops, seconds))
    last = run_folder.epochs(SEARCHED)[-1]
    result = result_of(model, data, last)
    display.say(f"{SEARCHED:<12} {score_of(result):<10} {short(result.params):>6} parameters, trial {trial.number}")
    torchgrow.save(model, run_folder.path / "network")
    return result


def _counted(record: Epoch, flops: int, seconds: float) -> Epoch:
    """A record of the winner, with what was spent besides."""
    return replace(
        record, network=SEARCHED, training_flops=record.training_flops + flops, seconds=record.seconds + seconds
    )


def _spent(found: Search, results: dict[str, Result]) -> dict[str, int]:
    """Training FLOPs of all trials, of what the winner was trained after that, and of both."""
    whole = results[SEARCHED].training_flops or 0
    return {"search": found.training_flops, "winner": whole - found.training_flops, "all": whole}


def described(found: Search) -> dict[str, Any]:
    """A search that is over, as JSON holds it."""
    trials = [
        {
            "name": trial.name,
            "params": trial.cost.params,
            "flops": trial.cost.flops,
            "widths": trial.widths,
            "depths": trial.depths,
            "losses": [loss if math.isfinite(loss) else None for loss in trial.losses],
            "epochs": trial.done,
            "training_flops": trial.training_flops,
        }
        for trial in found.trials
    ]
    costs = {"training_flops": found.training_flops, "dense_training_flops": found.dense_flops}
    return {"rungs": list(found.rungs), "winner": found.winner.number, **costs, "trials": trials}


def _trials_table(found: Search) -> Table:
    """The trials side by side, with the mean training loss of every rung; the winner has a star."""
    grid = Fitted()
    heads = ("trial", "shape", "blocks", "parameters", "FLOPs", *(f"loss to\nepoch {rung}" for rung in found.rungs))
    for column in heads:
        grid.add_column(column, justify="left" if column in heads[:3] else "right", no_wrap=column != "shape")
    for trial in found.trials:
        mark = "*" if trial is found.winner else ""
        blocks, losses = "-".join(map(str, trial.depths.values())), [f"{loss:.4f}" for loss in trial.losses]
        cost = trial.cost
        grid.add_row(f"{trial.number}{mark}", trial.name, blocks, short(cost.params), short(cost.flops), *losses)
    return grid
