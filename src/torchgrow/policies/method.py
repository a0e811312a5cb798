"""`Method`, all ways to grow in one class, as earlier versions had it. Deprecated: it only names a policy."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from ..errors import TorchgrowError
from .default import Default
from .paper import Paper
from .policy import Policy
from .random import Random


@dataclass(frozen=True, kw_only=True)
class Method:
    """Settings of a policy by their earlier names; it goes with the next version: see `torchgrow.policies`.

    Attributes:
        controller, draws, gates: which policy it is: "pressure", "independent" and True are `Paper`; "plan", "ranked"
            and False `Default`; "plan", "independent" and False `Random`. There are no others.
        heat, temperature: `final_inverse_temperature` and `temperature_rises` of `Paper`.
    """

    controller: str = "plan"
    draws: str = "persistent"
    lambda_base: float = 0.5
    layer_lambda_base: float = 0.1
    penalised: str = "present"
    start: float = 0.5
    paced: bool = True
    layer_lag: float = 1.0
    ramp: float = 0.1
    peak: float = 1.0
    hold: float = 0.1
    prune: str = "alike"
    align: int = 8
    settle: float = 0.5
    heat: float = 100.0
    temperature: str = "unit"
    relaxation: str = "sigmoid"
    gates: bool = True
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-6

    @classmethod
    def default(cls) -> Method:
        """`Default()`."""
        own = Default().settings()
        return cls(draws="ranked", gates=False, heat=1.0, **own)

    @classmethod
    def paper(cls, *, layers: bool = False) -> Method:
        """`Paper()`; lambda_1^base is 1.0 where layers grow too, else 0.5."""
        return cls(controller="pressure", draws="independent", align=1, settle=0.0, lambda_base=1.0 if layers else 0.5)

    @classmethod
    def global_(cls) -> Method:
        """`Paper(temperature_rises="global")`."""
        return replace(cls.paper(), temperature="global")

    @classmethod
    def nas(cls) -> Method:
        """`Paper(lambda_base=2.0)`."""
        return replace(cls.paper(), lambda_base=2.0)

    @classmethod
    def random(cls) -> Method:
        """`Random()`."""
        return cls(draws="independent", ramp=0.0, heat=1.0, align=1, settle=0.0, gates=False)


def policy_of(method: Method) -> Policy:
    """The policy of a method.

    Raises:
        TorchgrowError: there is none, or a setting has a value that it cannot have.
    """
    given = asdict(method)
    kinds: dict[tuple[str, str, bool], type[Policy]] = {
        ("pressure", "independent", True): Paper,
        ("plan", "ranked", False): Default,
        ("plan", "independent", False): Random,
    }
    kind = kinds.get((method.controller, method.draws, method.gates))
    if kind is None:
        raise TorchgrowError(
            f"no policy grows by controller={method.controller!r}, draws={method.draws!r} and gates={method.gates}; "
            "give policy=torchgrow.policies.Paper(), Default(), Random() or one of your own (docs/policies.md)"
        )
    given |= {"final_inverse_temperature": method.heat, "temperature_rises": method.temperature}
    return kind(**{name: given[name] for name in kind().settings()})
