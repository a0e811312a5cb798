"""What all tests share: a collector that does not walk through everything imported again and again."""

import gc


def pytest_collection_finish() -> None:
    """What was imported stays for the session; each search of the heap took longer than a small training step."""
    gc.collect()
    gc.freeze()
