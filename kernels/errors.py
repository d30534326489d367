"""The exceptions of this package.

    KernelError
    ├── InvalidInput    a task's input is refused; the message is for the task's sender
    ├── LoadError       a kernel's resident state (weights, tokenizer) cannot be had; for the operator
    └── SpecError       a declaration is wrong; for the kernel's author
        └── RegistryError   the set of kernels to offer is wrong: names, options, modules; for the operator

Any other exception that leaves a kernel is a failure of the kernel. Messages quote what came through `shown` and
`listed`, so that they stay short whatever came.
"""

from collections.abc import Collection
from itertools import islice


class KernelError(Exception):
    """Root of this package's exceptions."""


class InvalidInput(KernelError):
    """The input of a task is refused; the message says what was expected and what came."""


class LoadError(KernelError):
    """Weights or other files of a kernel are missing or of a kind that is not implemented."""


class SpecError(KernelError):
    """A kernel is declared wrongly."""


class RegistryError(SpecError):
    """The kernels asked for do not exist, clash, or take no such option."""


def shown(value: object, limit: int = 80) -> str:
    """`value` as it is written in Python, cut at `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def listed(names: Collection[str], limit: int = 20) -> str:
    """`names` separated by commas, the first `limit` of them."""
    rest = len(names) - limit
    return ", ".join(islice(names, limit)) + (f" and {rest} more" if rest > 0 else "")
