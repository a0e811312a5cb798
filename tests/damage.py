"""Damaging saved folders: what tests and benchmarks do to their files."""

import json
from pathlib import Path

from torchgrow.files import SEAL, _digest_of_file, digest


def reseal(folder: Path, record_name: str, tensors_name: str) -> None:
    """Make the checksums of a folder fit again, so that what reads it has to look at the contents."""
    record = json.loads((folder / record_name).read_bytes())
    if isinstance(record, dict) and SEAL in record:
        del record[SEAL]
        seal = {record_name: digest(record), tensors_name: _digest_of_file(folder / tensors_name)}
        (folder / record_name).write_text(json.dumps({**record, SEAL: seal}))
