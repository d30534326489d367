"""How a program's log lines look: with the time for people and files, with a priority for the journal, which keeps the time.

Knows formats; does not know what is logged. Also has a crash of the interpreter leave its Python stack there.
"""

import faulthandler
import logging
import os
import sys
from collections.abc import Mapping
from typing import Final

_PRIORITIES: Final = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG: Final = 7


class JournalFormatter(logging.Formatter):
    """Every line with the prefix of sd-daemon(3), `<3>` to `<7>`: the journal takes each line for a message of its own."""

    def format(self, record: logging.LogRecord) -> str:
        priority = next((priority for level, priority in _PRIORITIES if record.levelno >= level), _DEBUG)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines() or [""])


def configure(level: str, line_format: str) -> None:
    """Log to stderr for the rest of the process.

    Args:
        level: debug, info, warning or error; line_format: where there is no journal.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JournalFormatter("%(message)s") if is_journal(2) else logging.Formatter(line_format))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    faulthandler.enable(2)


def is_journal(fd: int, env: Mapping[str, str] = os.environ) -> bool:
    """Whether the service manager has connected this descriptor to the journal, and nobody has put something else there."""
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return env.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
