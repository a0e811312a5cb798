"""Law 9: saved, loaded in a fresh process, the same outputs, without tracing; and what damaged folders get."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import torchgrow.persistence.folder
import zoo
from damage import reseal
from torchgrow import SavedModelError, load, save, shrink_
from torchgrow.structure.record import RECORD
from torchgrow.tracing.model_call import call
from torchgrow.tracing.prover import Prover
from torchgrow.tracing.tracer import replay

WEIGHTS, STRUCTURE = "model.safetensors", "structure.json"


def grown(name: str) -> nn.Module:
    """A zoo model cut in half, with weights of its own."""
    model, example = zoo.build(name, seed=5), zoo.inputs(name)
    space = zoo.space(name)
    shrink_(model, space, Prover(model, space, example, seed=4).draw(0.5))
    return model.eval()


def same(a: Any, b: Any) -> bool:
    flat = torch.utils._pytree.tree_leaves
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_saved_and_loaded_is_the_same(name: str, tmp_path: Path) -> None:
    model = grown(name)
    if name == "depthwise":
        model.half()
    example = zoo.inputs(name)
    save(model, tmp_path / "deep" / "net")
    again = load(tmp_path / "deep" / "net", lambda: zoo.build(name).to(next(model.parameters()).dtype)).eval()
    if name != "depthwise":
        expected = call(model, example)
        assert same(call(again, example), expected)
    for (key, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b) or key in ("calls", "last")
    save(again, tmp_path / "twice")
    records = [json.loads((tmp_path / at / STRUCTURE).read_text()) for at in ("twice", "deep/net")]
    assert all(record.pop("sha256") for record in records)
    assert records[0] == records[1]
    assert sorted(p.name for p in (tmp_path / "deep" / "net").iterdir()) == [WEIGHTS, STRUCTURE]


FRESH = """
import sys
import torch
import torchgrow
import torchgrow.tracing.verification, torchgrow.tracing.tracer, torchgrow.growth.grower

def refuse(*args, **kwargs):
    raise AssertionError("traced")

for module in (torchgrow, torchgrow.tracing.verification, torchgrow.tracing.tracer, torchgrow.growth.grower):
    for name in ("trace", "replay", "prove", "verify", "Tracer"):
        if callable(getattr(module, name, None)):
            setattr(module, name, refuse)
sys.path.insert(0, sys.argv[1])
import zoo

expected = torch.load(sys.argv[3])
for name, output in expected.items():
    model = torchgrow.load(sys.argv[2] + "/" + name, lambda: zoo.build(name)).eval()
    assert torch.equal(model(zoo.inputs(name)), output), name
print(len(expected))
"""


def test_law_9_in_a_fresh_process_without_the_tracer(tmp_path: Path) -> None:
    expected = {}
    for name in ("residual", "grouped-2", "buffer-pad", "flatten", "depthwise", "group-norm", "tied"):
        model = grown(name)
        save(model, tmp_path / name)
        expected[name] = model(zoo.inputs(name)).detach()
    torch.save(expected, tmp_path / "expected.pt")
    command = [sys.executable, "-W", "error", "-c", FRESH, str(Path(zoo.__file__).parent), str(tmp_path)]
    done = subprocess.run([*command, str(tmp_path / "expected.pt")], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr


def test_a_loaded_model_trains_and_is_a_frame_no_longer(tmp_path: Path) -> None:
    save(grown("residual"), tmp_path / "net")
    model = load(tmp_path / "net", lambda: zoo.build("residual"))
    assert model.training
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.a.weight.detach().clone()  # type: ignore[union-attr, operator]
    model(zoo.inputs("residual")).sum().backward()
    optimizer.step()
    assert not torch.equal(model.a.weight, before)  # type: ignore[arg-type, union-attr]
    assert replay(model, zoo.inputs("residual")).n_units == 6


def test_a_whole_and_a_foreign_model_can_be_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    save(model, tmp_path / "net")
    again = load(tmp_path / "net", lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
    assert same(again(torch.ones(1, 3)), model(torch.ones(1, 3)))


# --- damaged folders ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(grown("grouped"), tmp_path / "net")
    return tmp_path / "net"


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Edit the structure record, its checksum fitting."""

    def damage(folder: Path) -> None:
        record = json.loads((folder / STRUCTURE).read_text())
        change(record)
        (folder / STRUCTURE).write_text(json.dumps(record))
        reseal(folder, STRUCTURE, WEIGHTS)

    return damage


def retensor(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    """Edit the tensors, their checksum fitting."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / WEIGHTS)
        reseal(folder, STRUCTURE, WEIGHTS)

    return damage


def put(value: object, *keys: str) -> Callable[[Path], object]:
    def change(record: dict[str, Any]) -> None:
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    return edit(change)


def attribute(name: str, number: object, module: str = "g") -> Callable[[Path], object]:
    def change(record: dict[str, Any]) -> None:
        record["attributes"] = [a for a in record["attributes"] if a[:2] != [module, name]] + [[module, name, number]]

    return edit(change)


def cut(name: str, at: float) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(len(whole) * at)])

    return damage


RISING = r"structure\.json: kept positions of axis 0 of a\.weight \(8, 3, 1, 1\) are not rising positions in range"
FORM = r"structure\.json is damaged: fields are missing, foreign or of the wrong type"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"is not a saved model: model\.safetensors not found; save one"),
    "no structure": (lambda f: (f / STRUCTURE).unlink(), r"structure\.json not found"),
    "empty weights": (cut(WEIGHTS, 0), r"model\.safetensors is damaged"),
    "weights cut in the header": (cut(WEIGHTS, 0.1), r"model\.safetensors is damaged"),
    "weights cut in the data": (cut(WEIGHTS, 0.9), r"model\.safetensors is damaged"),
    "empty structure": (cut(STRUCTURE, 0), r"structure\.json is damaged"),
    "half a structure": (cut(STRUCTURE, 0.5), r"structure\.json is damaged"),
    "not text": (lambda f: (f / STRUCTURE).write_bytes(b"\xff\xfe\x00"), r"structure\.json is damaged"),
    "deeply nested": (lambda f: (f / STRUCTURE).write_text("[" * 100_000), r"structure\.json is damaged"),
    "a list": (lambda f: (f / STRUCTURE).write_text("[]"), r"has format 'list', this version .* reads 1 and 2 and 3"),
    "another format": (put(5, "format"), r"has format 5, this version of torchgrow reads 1 and 2 and 3 and 4"),
    "a bool for the format": (put(True, "format"), r"has format True"),
    "no attributes": (edit(lambda r: r.pop("attributes")), FORM),
    "a foreign field": (put(1, "extra"), FORM),
    "kept is a list": (put([], "kept"), FORM),
    "kept axes are a list": (put([0], "kept", "a.weight"), FORM),
    "attributes of two": (put([["g", "groups"]], "attributes"), FORM),
    "a bool for a number": (attribute("groups", True), FORM),
    "a float for a number": (attribute("groups", 2.0), FORM),
    "buffers are a list": (put([], "buffers"), FORM),
    "a number for a buffer": (put(1, "buffers", "g.late"), FORM),
    "a parameter called a buffer": (
        lambda f: [put(True, "buffers", "fc.bias")(f), retensor(lambda t: t.update({"fc.bias": torch.ones(5)}))(f)],
        r"fc\.bias is torch.float32 \(5,\)",
    ),
    "a buffer in the place of a module": (
        lambda f: [put(True, "buffers", "g.groups")(f), retensor(lambda t: t.update({"g.groups": torch.ones(5)}))(f)],
        r"foreign \['g\.groups'\]",
    ),
    "a parameter called none": (
        lambda f: [put(None, "buffers", "fc.bias")(f), retensor(lambda t: t.pop("fc.bias"))(f)],
        r"missing \['fc\.bias'\]",
    ),
    "shapes are a list": (put([], "frame_shapes"), FORM),
    "another frame": (put([8, 3, 3, 3], "frame_shapes", "a.weight"), r"cut from a frame with other shapes"),
    "an unknown tensor": (put({"0": [0]}, "kept", "z.weight"), r"no tensor 'z\.weight'; is the frame built as it was"),
    "negative": (put([-1, 0, 1, 2], "kept", "a.weight", "0"), RISING),
    "duplicate": (put([0, 1, 1, 2], "kept", "a.weight", "0"), RISING),
    "falling": (put([3, 2, 1, 0], "kept", "a.weight", "0"), RISING),
    "out of range": (put([0, 1, 2, 8], "kept", "a.weight", "0"), RISING),
    "huge": (put([10**30], "kept", "a.weight", "0"), RISING),
    "a huge list": (put(list(range(100_000)), "kept", "a.weight", "0"), RISING),
    "empty list": (put([], "kept", "a.weight", "0"), RISING),
    "bool positions": (put([False, True, 2, 3], "kept", "a.weight", "0"), RISING),
    "float positions": (put([0.0, 1.0, 2.0, 3.0], "kept", "a.weight", "0"), RISING),
    "text for positions": (put("0123", "kept", "a.weight", "0"), RISING),
    "an axis too many": (put([0], "kept", "a.weight", "4"), r"axis 4 of a\.weight .* are not rising"),
    "an axis twice": (put([0], "kept", "a.weight", "00"), r"axis 00 of a\.weight .* are not rising"),
    "a negative axis": (put([0], "kept", "a.weight", "-1"), r"axis -1 of a\.weight .* are not rising"),
    "a huge axis": (put([0], "kept", "a.weight", "9" * 5000), r"of a\.weight .* are not rising"),
    "other positions": (put([0, 1], "kept", "a.weight", "0"), r"a\.weight is torch.float32 \(4, 3, 1, 1\), but the st"),
    "an unknown module": (attribute("groups", 2, "z"), r"z\.groups = 2 does not fit the frame, where it is None"),
    "an unknown attribute": (attribute("sides", 2), r"g\.sides = 2 does not fit the frame"),
    "not an int of the frame": (attribute("training", 1), r"g\.training = 1 does not fit"),
    "groups beyond the frame": (attribute("groups", 5), r"g\.groups = 5 does not fit the frame, where it is 4"),
    "no groups": (attribute("groups", 0), r"g\.groups = 0 does not fit"),
    "other groups": (attribute("groups", 1), r"channels and groups of g do not fit its weight"),
    "a missing tensor": (retensor(lambda t: t.pop("fc.bias")), r"missing \['fc\.bias'\], foreign \[\]; frame_factory"),
    "a foreign tensor": (retensor(lambda t: t.update(z=torch.ones(1))), r"missing \[\], foreign \['z'\]"),
    "another dtype": (retensor(lambda t: t.update({"fc.bias": t["fc.bias"].double()})), r"fc\.bias is torch\.float64"),
    "another shape": (retensor(lambda t: t.update({"fc.bias": torch.ones(5)})), r"fc\.bias is torch.float32 \(5,\)"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_and_the_frame_stays_whole(name: str, folder: Path) -> None:
    damage, text = DAMAGE[name]
    frame = zoo.build("grouped")
    before = {key: value.clone() for key, value in frame.state_dict().items()}
    assert load(folder, lambda: zoo.build("grouped")) is not None
    damage(folder)
    with pytest.raises(SavedModelError, match=text):
        load(folder, lambda: frame)
    assert all(torch.equal(value, before[key]) for key, value in frame.state_dict().items())
    assert frame.g.groups == 4
    assert RECORD not in vars(frame)


def test_a_missing_folder_and_a_wrong_factory(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SavedModelError, match=r"nowhere is not a saved model: .* not found; save one with"):
        load(tmp_path / "nowhere", lambda: zoo.build("grouped"))
    with pytest.raises(SavedModelError, match=r"nowhere is not .*, or take a checkpoint by torchgrow\.load_checkpoint"):
        load(tmp_path / "nowhere", lambda: zoo.build("grouped"))
    with pytest.raises(SavedModelError, match=r"got a Linear; call torchgrow\.load\(folder, Linear\), or with"):
        load(tmp_path, nn.Linear(2, 2))
    with pytest.raises(SavedModelError, match=r"got a str; call torchgrow\.load\(folder, MyModel\), or with"):
        load(nn.Linear, "net")  # type: ignore[arg-type]
    for wrong in ("net", [nn.Linear(2, 2)]):
        with pytest.raises(SavedModelError, match=r"got a (str|list) for the first; call torchgrow\.save\("):
            save(wrong, tmp_path / "net")  # type: ignore[arg-type]
    with pytest.raises(SavedModelError, match=r"frame_factory must return a torch\.nn\.Module, got str"):
        load(folder, lambda: "net")  # type: ignore[arg-type, return-value]
    with pytest.raises(SavedModelError, match=r"no tensor 'a\.bias'; is the frame built as it was"):
        load(folder, lambda: zoo.build("plain"))
    with pytest.raises(SavedModelError, match=r"cut from a frame with other shapes than this one's"):
        load(folder, lambda: zoo.build("grouped-2"))


def test_buffers_of_a_frame_on_the_meta_device_are_loaded(tmp_path: Path) -> None:
    """Those of a batch norm, say: giving the frame their values took the values away."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model(torch.randn(5, 3))
    save(model, tmp_path / "net")
    with torch.device("meta"):
        frame = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    again = load(tmp_path / "net", lambda: frame)
    assert same(again.state_dict(), model.state_dict())


def test_a_flipped_bit_is_noticed(folder: Path) -> None:
    for name in (WEIGHTS, STRUCTURE):
        whole = (folder / name).read_bytes()
        at = whole.index(b"4", whole.index(b"frame_shapes")) if name == STRUCTURE else len(whole) - 3
        (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(SavedModelError, match=rf"{name} is damaged: its contents do not fit its checksum"):
            load(folder, lambda: zoo.build("grouped"))
        (folder / name).write_bytes(whole)
    load(folder, lambda: zoo.build("grouped"))


def test_a_size_beyond_all_numbers(folder: Path) -> None:
    """Found by benchmarks/fuzz_files.py: the library that reads the file raises a TypeError of its own."""
    data = (folder / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    size = header["a.weight"]["data_offsets"]
    header["a.weight"] |= {"shape": [0, 2**63], "data_offsets": [size[0], size[0]]}
    packed = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(packed).to_bytes(8, "little") + packed + data[start:])
    reseal(folder, STRUCTURE, WEIGHTS)
    with pytest.raises(SavedModelError, match=r"model\.safetensors is damaged"):
        load(folder, lambda: zoo.build("grouped"))


def test_a_record_beyond_all_size_is_not_read(folder: Path) -> None:
    with (folder / STRUCTURE).open("r+b") as file:
        file.truncate(10**12)  # a hole, not a terabyte
    with pytest.raises(SavedModelError, match=r"structure\.json is damaged: 1,000,000,000,000 bytes are more than any"):
        load(folder, lambda: zoo.build("grouped"))


def test_format_1_still_loads(folder: Path) -> None:
    """What version 0.1 wrote: the same, without checksums."""
    model = load(folder, lambda: zoo.build("grouped"))
    record = json.loads((folder / STRUCTURE).read_text())
    assert (record["format"], record.pop("sha256").keys()) == (4, {STRUCTURE, WEIGHTS})
    assert record.pop("extra_state") == {}
    assert record.pop("buffers") == {}
    (folder / STRUCTURE).write_text(json.dumps({**record, "format": 1}))
    again = load(folder, lambda: zoo.build("grouped"))
    assert same(again.state_dict(), model.state_dict())
    save(again, folder)
    assert json.loads((folder / STRUCTURE).read_text())["format"] == 4


# --- saving ---------------------------------------------------------------------------------------------------


def test_an_interrupted_save_leaves_nothing_or_the_old_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real_save, real_rename = save_file, Path.replace
    full = (
        SavedModelError,
        r"net could not be written \(disk full\); what was there before is unchanged\. Make room or",
    )

    def half_a_file(tensors: dict[str, Tensor], path: Path) -> None:
        real_save(tensors, path)
        os.truncate(path, 100)
        raise KeyboardInterrupt

    def no_second_rename(self: Path, target: Path) -> Path:
        if Path(target) == folder and not self.name.endswith(".old"):
            raise OSError("disk full")
        return real_rename(self, target)

    for name, broken, (error, text) in (
        ("save_file", half_a_file, (KeyboardInterrupt, None)),
        ("replace", no_second_rename, full),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(torchgrow.persistence.folder if name == "save_file" else Path, name, broken)
            patch.setattr(torchgrow.persistence.folder, "exchanged", lambda *_: False)  # as where the system cannot
            for target in (folder, tmp_path / "new") if name == "save_file" else (folder,):
                with pytest.raises(error, match=text):
                    save(grown("plain"), target)
        assert [path.name for path in tmp_path.iterdir()] == ["net"]
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems rename twice")
def test_a_kill_in_mid_save_finds_the_old_or_the_new_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two are exchanged in one step: whatever comes right before or after it, one of them has the name."""
    exchange, seen = torchgrow.persistence.folder.exchanged, []
    before = (folder / WEIGHTS).read_bytes()

    def watched(one: Path, other: Path) -> bool:
        seen.append((folder / WEIGHTS).read_bytes())
        done = exchange(one, other)
        seen.append((folder / WEIGHTS).read_bytes())
        assert (one / WEIGHTS).read_bytes() == before
        return done

    monkeypatch.setattr(torchgrow.persistence.folder, "exchanged", watched)
    model = grown("plain")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    save(model, folder)
    assert seen[0] == before != seen[1] == (folder / WEIGHTS).read_bytes()
    assert [path.name for path in folder.parent.iterdir()] == ["net"]


def test_a_saved_folder_is_replaced_and_nothing_else_is(folder: Path, tmp_path: Path) -> None:
    save(grown("plain"), folder)
    load(folder, lambda: zoo.build("plain"))
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(SavedModelError, match=r"net exists and is not a saved model; choose another folder"):
        save(grown("plain"), folder)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SavedModelError, match="exists and is not a saved model"):
        save(grown("plain"), tmp_path / "file")
    assert (folder / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"
