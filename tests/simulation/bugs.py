"""The list of bugs that can be planted, and how: a method of the product is replaced."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bug:
    """`text`: what it breaks."""

    name: str
    part: str
    text: str
    plant: Callable[[], None]


BUGS: dict[str, Bug] = {}


def plant(name: str) -> None:
    """Change the product of this process."""
    BUGS[name].plant()


def bug(part: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(function: Callable[[], None]) -> Callable[[], None]:
        name = function.__name__.replace("_", "-")
        BUGS[name] = Bug(name, part, (function.__doc__ or "").strip(), function)
        return function

    return add


def change(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method by what `make` makes of it."""
    setattr(owner, name, make(getattr(owner, name)))


def disable(owner: Any, name: str, answer: Any = None) -> None:
    """The method does nothing, and says this."""
    setattr(owner, name, lambda *args, **kwargs: answer)
