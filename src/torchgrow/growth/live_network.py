"""The live network: the model cut from its frame, its folded gates, and the copies that follow it.

A change of structure is computed first and written afterwards by one `Exchange`, all of it or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..errors import StructureError, TorchgrowError
from ..exchange import Exchange
from ..onednn_guard import guard_
from ..policies import Policy
from ..structure.bank import Bank, Change
from ..structure.followers import follower_of, stored_alike
from ..structure.optimizer_slots import Layout
from ..structure.record import Growth
from ..structure.space import WHOLE, Space, live_positions
from ..structure.surgery import named_tensors
from .gates import Fold, Folding, converted
from .plan import Plan
from .watch import Watch


class LiveNetwork:
    """A model that grows, the storage for inactive units, its gates, and the copies that follow it.

    `model` is the frame, at full size; `change` cuts it, and `undo` of `exchange` will bring it back. `layouts` are of
    the optimizers that train it. The gates of `policy` are folded in; the run changes this object in place. `on_step`
    is called after optimizer steps with m dL/dm, float64 [n]. `device`: of the real tensors of a frame on meta.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        layouts: Sequence[Layout],
        policy: Policy,
        on_step: Callable[[Tensor], None],
        device: torch.device,
        exchange: Exchange,
    ) -> None:
        space = plan.space
        self.model, self.space, self.policy = model, space, policy
        self.bank = Bank(
            model, space, seed=plan.seed, device=device, layouts=layouts, exchange=exchange, scales=plan.scales
        )
        self.bank.growth = Growth(plan.updates)
        self.parameters = dict(model.named_parameters())  # the objects stay the same throughout
        self.watch = Watch(space, [layout.optimizer for layout in layouts], self.parameters)
        cut = {n: t for n, t in named_tensors(model).items() if n in self.parameters or n in space.cut_axes}
        self._kinds = {name: (tensor.dtype, tensor.device) for name, tensor in cut.items()}
        self.gated = sorted({name for name, _ in space.fold})
        self.gates = Folding(layouts, on_step, lambda: policy.gate)
        self.followers: list[Bank] = []  # the banks of the copies
        self.wrappers: list[nn.Module] = []  # the copies as they were given, which may be wrappers around a model
        self.copies: list[Bank] = []  # those of the followers that started with the frame's weights

    @property
    def keep(self) -> Tensor:
        """The live units, bool [n]; not a copy."""
        return self.bank.keep

    @property
    def banks(self) -> tuple[Bank, ...]:
        """That of the model, and those of its followers."""
        return (self.bank, *self.followers)

    def raw(self) -> dict[str, Tensor]:
        """Raw contents of the gated parameters, by name; see `Folding.raw`."""
        return self.gates.raw()

    def contents(self) -> dict[str, Tensor]:
        """Contents of all parameters, raw where they are gated."""
        return {**self.parameters, **self.raw()}

    def buffers(self) -> list[Tensor]:
        """Of the model and its followers."""
        return [buffer for bank in self.banks for buffer in bank.model.buffers()]

    def fold(self, keep: Tensor, raw: Mapping[str, Tensor], gate: Tensor | None) -> Fold:
        """Positions of the units of a structure and what is folded there; empty if the policy needs neither."""
        asked = gate is not None or self.policy.sensitive
        space = self.space if asked else replace(self.space, fold={})
        return Fold(space, self.parameters if asked else {}, keep, raw, gated=gate is not None)

    def check(self) -> None:
        """Check that the parameter objects of the model are those that optimizer and bank work on.

        Raises:
            StructureError: a tensor was exchanged or converted, or one of a follower; the message names it.
        """
        now = dict(self.model.named_parameters())
        for name, parameter in self.parameters.items():
            if now.get(name) is not parameter:
                found = "sharded (fully_shard)" if hasattr(now.get(name), "device_mesh") else "exchanged or taken out"
                raise StructureError(
                    f"{name} is not the parameter any more that Grower was given: it was {found} since. "
                    "Write into the objects that are there (load_state_dict without assign=True), and use DDP instead "
                    "of fully_shard"
                )
        tensors = named_tensors(self.model)
        for name, (dtype, device) in self._kinds.items():
            tensor = tensors.get(name)
            if tensor is not None and (tensor.dtype, tensor.device) != (dtype, device):
                raise StructureError(converted(name, tensor, dtype, device))
            if tensor is not None and tensor.is_inference():
                raise StructureError(
                    f"{name} was made under torch.inference_mode() since Grower was given the model, so that it cannot "
                    "be cut; run the forward that makes it under torch.no_grad()"
                )
        for follower in self.followers:
            own = named_tensors(follower.model)
            for name in follower.index:
                here, there = tuple(tensors[name].shape), tuple(own[name].shape) if name in own else None
                if here != there:
                    raise StructureError(
                        f"{name} of a follower is {there or 'missing'}, not {here} as in the network: it was exchanged "
                        "or taken out since follow(). Write into the objects that are there. Nothing was changed"
                    )

    def check_trained(self) -> None:
        """Check that the given optimizers train the network, and no other.

        Raises:
            TrainingError: the last step did not finish, or another optimizer trains it.
        """
        self.check()
        self.gates.recover()
        self.watch.check_trained(self.contents(), self.gates.taken)

    def change(
        self,
        exchange: Exchange,
        keep: Tensor,
        gate: Tensor | None,
        *,
        first: bool,
        last: bool,
        silent: Tensor | None,
        as_is: bool = False,
        shifts: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> bool:
        """Have `exchange` make `keep` the live structure of the model and its followers; nothing is written before.

        Weights will be folded with `gate` (float64 [n]). At the `first` change everything is written; at the `last` the
        hooks come off and the banks are emptied. `silent` units (bool [n]) enter without an effect: the weights by
        which they are read are 0. `as_is`: live units keep their function although they get gates, as raw weights are
        divided by them. Biases take over `shifts` from units that leave (`compensation.shifts_of`). Returns whether a
        tensor will have another shape.
        """
        stays = not first and torch.equal(keep, self.keep) and self.gates.folded_with(gate)
        changes, installed = (
            ([self.bank.unchanged()], None) if stays else self._stage(keep, gate, silent, as_is, shifts)
        )
        reshapes = changes[0].reshapes
        for change in changes:
            change.into(exchange)
        for bank in self.banks:
            _means_anew(exchange, bank, keep)
        raw = {}
        if installed is not None:
            self.gates.install(exchange, *installed)
            raw = installed[0].contents
        self.gates.begin(exchange)
        self.watch.begin(exchange, {**self.contents(), **changes[0].contents(self.parameters), **raw})
        if last:
            self.gates.remove(exchange)
            for bank in self.banks:
                exchange.fields(bank, full={}, slots={})
        else:
            self.gates.attach(exchange)
        return reshapes

    def _stage(
        self, keep: Tensor, gate: Tensor | None, silent: Tensor | None, as_is: bool, shifts: Mapping[str, Tensor]
    ) -> tuple[list[Change], tuple[Fold, list[Tensor], dict[tuple[str, str], Tensor]]]:
        """The staged changes of the network and its followers, and the arguments of `Folding.install`."""
        bank = self.bank
        raw = self.raw() or {name: self.parameters[name].detach() for name in self.gated}
        change = bank.stage(keep, raw, self.gates.raw_copies())
        for name, shift in shifts.items():
            change.add(name, shift)
        fresh = {name: change.swaps[name].new for name in self.gated if not self.space.absent(name, keep)}
        if silent is not None:
            _silence(self.space, change, keep, silent)
        fold = self.fold(keep, fresh, gate)
        factors = fold.factors(gate)
        for name, factor in zip(fold.names, factors, strict=True) if as_is and factors else ():
            for part in (fresh[name], *change.swaps[name].raw_copies().values()):
                part.div_(factor)
        folded = fold.folded(factors)
        followed = [
            _followed(bank, keep, fresh, folded if bank in self.copies else {}, silent) for bank in self.followers
        ]
        copies: dict[tuple[str, str], Tensor] = {}
        for (name, contents), factor in zip(folded.items(), factors, strict=True):
            swap = change.swaps[name]
            copies |= {(name, key): part.clone() for key, part in swap.raw_copies().items()}
            swap.new = contents
            swap.fold_copies(factor)
        return [change, *followed], (fold, factors, copies)

    def follow(self, module: nn.Module) -> None:
        """Take a copy along from now on; see `Grower.follow`.

        Raises:
            StructureError: it does not fit.
            TorchgrowError: it is no module.
        """
        if not isinstance(module, nn.Module):
            raise TorchgrowError(
                "follow takes a torch.nn.Module with weights of its own, such as copy.deepcopy(model) or "
                f"torch.optim.swa_utils.AveragedModel(model), got {type(module).__name__}; an average kept as a "
                "list of tensors cannot be cut along"
            )
        wrapper, inner = module, getattr(module, "module", None)
        if isinstance(inner, nn.Module) and not module.state_dict().keys() & self.bank.tensors.keys():
            module = inner
        own = {id(tensor): name for name, tensor in named_tensors(module).items()}
        for follower in self.followers:
            for tensor in named_tensors(follower.model).values():
                if id(tensor) in own:
                    raise StructureError(
                        f"{own[id(tensor)]} of {type(module).__name__} follows already; call follow once for every copy"
                    )
        exchange = Exchange()
        exchange.remember(module)
        try:
            follower = follower_of(self.bank, module, exchange)
            guard_(follower.model)
            exchange.append(self.followers, follower)
            exchange.append(self.wrappers, wrapper)
            if stored_alike(self.bank, follower):
                exchange.append(self.copies, follower)
            exchange.make()
        except BaseException:
            exchange.undo()
            raise


def _followed(
    bank: Bank, keep: Tensor, raw: Mapping[str, Tensor], folded: Mapping[str, Tensor], silent: Tensor | None
) -> Change:
    """The change to `keep` of a follower; what it still holds as the network's bank does, it gets folded."""
    change = bank.stage(keep)
    if silent is not None:
        _silence(bank.space, change, keep, silent)
    for name in change.swaps.keys() & folded.keys():
        own, value = change.swaps[name].new, folded[name].to(change.swaps[name].new)
        change.swaps[name].new = torch.where(own == raw[name].to(own), value, own)
    return change


def _means_anew(exchange: Exchange, bank: Bank, keep: Tensor) -> None:
    """Statistics that are means over all batches (momentum=None) begin anew where units come that have seen none."""
    for path, norm in bank.model.named_modules():
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.momentum is not None:
            continue
        vector, counted = bank.space.unit_of.get((f"{path}.running_mean", 0)), norm.num_batches_tracked
        came = None if vector is None else live_positions(vector, keep) & ~live_positions(vector, bank.keep)
        if came is not None and counted is not None and bool(came.any()):
            exchange.write(counted, torch.zeros_like(counted))


def _silence(space: Space, change: Change, keep: Tensor, silent: Tensor) -> None:
    """Zero the weights by which units (bool [n]) of a staged structure are read; in a layer among them, its gate's."""
    silent = silent & ~((space.owner >= 0) & silent[space.owner.clamp(min=0)])  # else the layer had no gradients
    for (name, axis), vector in space.columns.items():
        swap = change.swaps.get(name)
        for part in (swap.new, *swap.raw_copies().values()) if swap and not space.absent(name, keep) else ():
            if axis == WHOLE:
                part.mul_(~silent[vector].to(part.device))
                continue
            live = vector[live_positions(space.unit_of[name, axis], keep)]
            positions = torch.nonzero((live >= 0) & silent[live.clamp(min=0)]).flatten()
            part.index_fill_(axis, positions.to(part.device), 0)
