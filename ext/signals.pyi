"""Types of the handler of stopping signals."""

from collections.abc import Sequence

def stop_on(numbers: Sequence[int], descriptor: int) -> None: ...
