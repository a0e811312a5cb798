"""Damaging saved folders: what tests and benchmarks do to their files."""

import contextlib
import copy
import hashlib
import json
import random
from pathlib import Path
from typing import Any

from torchgrow.persistence.folder import SEAL, digest


def reseal(folder: Path, record_name: str, tensors_name: str) -> None:
    """Make the checksums of a folder fit again, so that what reads it has to look at the contents."""
    record = json.loads((folder / record_name).read_bytes())
    if isinstance(record, dict) and SEAL in record:
        del record[SEAL]
        tensors = hashlib.sha256((folder / tensors_name).read_bytes()).hexdigest()
        seal = {record_name: digest(record), tensors_name: tensors}
        (folder / record_name).write_text(json.dumps({**record, SEAL: seal}))


# --- mutations ---

NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "0",
        "../../x",
        "\x00",
        "!tensor",
        "inf",
        [],
        {},
        [[]],
        [0],
        [0, 0],
        {"": 0},
    ),
    *(
        {"": 0},
        {"!tensor": "x"},
        {"!tuple": []},
        {"!dict": [[0, 1]]},
        {"!float": "nan"},
        {"!evil": 1},
        "__import__('os')",
    ),
]
"""What may stand anywhere in a damaged record."""


def mutate(value: Any, draw: random.Random) -> Any:
    """A copy of a JSON value in which one place, drawn at random, is damaged."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []
    _collect(value, places)
    if not places:
        return draw.choice(NASTY)
    inner, key = draw.choice(places)
    found, how = inner[key], draw.randrange(8)
    if how == 0:
        del inner[key]
    elif how == 1 and isinstance(inner, dict):
        inner[draw.choice(["x", "", key + "x", "!tensor", "0", "format"])] = inner.pop(key)
    elif how == 2 and isinstance(found, (int, float)) and not isinstance(found, bool):
        inner[key] = found + draw.choice([-1, 1, 0.5, 2**40])
    elif how == 3 and isinstance(found, list) and found:
        draw.shuffle(found)
    elif how == 4 and isinstance(found, list) and found:
        found.insert(draw.randrange(len(found)), copy.deepcopy(draw.choice(found)))
    elif how == 5:  # something from elsewhere
        elsewhere, at = draw.choice(places)
        inner[key] = copy.deepcopy(elsewhere[at])
    elif how == 6 and isinstance(found, str) and found:
        at = draw.randrange(len(found))
        inner[key] = found[:at] + chr(ord(found[at]) ^ 1) + found[at + 1 :]
    else:
        inner[key] = copy.deepcopy(draw.choice(NASTY))
    return value


def _collect(value: Any, places: list[tuple[Any, Any]]) -> None:
    """All (container, key) in a JSON value."""
    if isinstance(value, (dict, list)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        places += [(value, key) for key in keys]
        for key in keys:
            _collect(value[key], places)


def damage(folder: Path, names: tuple[str, str], draw: random.Random) -> str:
    """Damage a saved folder in one of many ways; most have fitting checksums afterwards. Returns what was done."""
    record_name, tensors_name = names
    how = draw.choice(["record"] * 6 + ["header"] * 2 + ["cut", "flip", "flip sealed", "noise", "missing"])
    name = draw.choice(names)
    path = folder / name
    if how == "record":
        record = json.loads((folder / record_name).read_text())
        for _ in range(draw.choice([1, 1, 1, 2, 5])):
            record = mutate(record, draw)
        (folder / record_name).write_text(json.dumps(record))
        reseal(folder, record_name, tensors_name)
    elif how == "header":
        whole = (folder / tensors_name).read_bytes()
        length = int.from_bytes(whole[:8], "little")
        start = 8 + length
        header = json.dumps(mutate(json.loads(whole[8 : 8 + length]), draw)).encode()
        length = draw.choice([len(header)] * 8 + [0, 2**63, len(header) + 10**6])
        (folder / tensors_name).write_bytes(length.to_bytes(8, "little") + header + whole[start:])
        reseal(folder, record_name, tensors_name)
    elif how == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        if how == "cut":
            data = data[: draw.randrange(len(data))]
        elif how == "noise":
            at = draw.randrange(len(data))
            data[at : at + 64] = draw.randbytes(64)
        else:
            for _ in range(draw.choice([1, 1, 4])):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        if how == "flip sealed":
            with contextlib.suppress(ValueError, RecursionError):
                reseal(folder, record_name, tensors_name)
    return how
