"""A progress bar on stderr for `map`. Knows rich, which is imported only when a bar is wanted."""

from collections.abc import Sized
from contextlib import AbstractContextManager
from typing import Any


class Counter(AbstractContextManager["Counter"]):
    """Counts on a bar, whose end is known if `items` has a length; does nothing if it is not wanted."""

    def __init__(self, items: object, label: str, is_wanted: bool) -> None:
        self._bar: Any = None
        if is_wanted:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True))
            self._line = self._bar.add_task(label, total=len(items) if isinstance(items, Sized) else None)

    def count(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._line)

    def __enter__(self) -> "Counter":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
