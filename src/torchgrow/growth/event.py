"""Events: what an update did. The history of a run is a list of them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..persistence.plain_data import Field


@dataclass(frozen=True)
class Event:
    """What one update did; event 0 is the seed.

    If `load_state_dict` has changed the structure since, the event describes the new one.

    Attributes:
        update: number of the update.
        params: parameters of the network after it.
        flops: FLOPs of the network after it, for one sample.
        widths: live units per group.
        pressure: lambda of Eq 4 until the next update (`Paper`); 0 for other policies.
        temperature: mean beta per group; empty where the policy has none.
        born: units present for the first time.
        regrown: units that came back with their old weights.
        detached: units that left.
        seconds: wall-clock time of the update.
    """

    update: int
    params: int
    flops: int
    widths: dict[str, int]
    pressure: float
    temperature: dict[str, float]
    born: int
    regrown: int
    detached: int
    seconds: float


def read_event(field: Field) -> Event:
    """One event of a saved history."""
    saved = field.fields(event_field.name for event_field in fields(Event))
    counts = {name: saved[name].whole() for name in ("update", "params", "flops", "born", "regrown", "detached")}
    return Event(
        widths={name: width.whole() for name, width in saved["widths"].fields().items()},
        pressure=saved["pressure"].number(),
        temperature={name: beta.number(low=0) for name, beta in saved["temperature"].fields().items()},
        seconds=saved["seconds"].number(low=0),
        **counts,
    )
