"""Tables as packed batches: `[total rows, columns]` with the bounds of each task's rows.

Knows how column names and lists of texts are checked and how rows are split back; shared by the column kernels.
"""

import re
from collections.abc import Sequence

import torch

from penstock.kernels.errors import InvalidInput, listed, shown
from penstock.kernels.expression import Columns
from penstock.kernels.inputs import Tensor

COLUMN = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
MAX_COLUMNS = 1024
MAX_TEXTS = 64

TABLE = Tensor(dtypes=("float32", "float64"), rank=2, ragged="pack")
"""The input of every column kernel: one table per task, `[rows, columns]`; tasks of a batch may differ in rows."""


def named_columns(owner: str, table: torch.Tensor, columns: object) -> Columns:
    """name -> column `[total]` of `table` `[total, len(columns)]`. Raises InvalidInput."""
    names = text_list(owner, "columns", columns, limit=MAX_COLUMNS)
    for name in names:
        if not COLUMN.fullmatch(name):
            raise InvalidInput(f"{owner}: a column's name is letters, digits and _, 64 at most; got {shown(name)}")
    if len(set(names)) != len(names):
        raise InvalidInput(f"{owner}: column names must differ; got {listed(names)}")
    if table.shape[1] != len(names):
        raise InvalidInput(f"{owner}: the table has {table.shape[1]} columns, but {len(names)} names are given")
    return dict(zip(names, table.unbind(1), strict=True))


def text_list(owner: str, what: str, value: object, limit: int = MAX_TEXTS) -> list[str]:
    """`value` as a list of 1 to `limit` texts. Raises InvalidInput."""
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise InvalidInput(f"{owner}: {what} must be a list of texts; got {shown(value)}")
    if not 1 <= len(value) <= limit:
        raise InvalidInput(f"{owner}: {what} must hold 1 to {limit} texts; got {len(value)}")
    return list(value)


def sizes_of(offsets: torch.Tensor) -> list[int]:
    """Rows per task, from the bounds int64 `[batch + 1]`."""
    return [int(size) for size in offsets.diff().tolist()]


def true_rows(mask: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The rows where `mask` `[total]` is true, and how many of them each task has, as a tensor `[batch]` and on the host.

    `offsets`: int64 `[batch + 1]`, beside the mask. Waits for a device once, because the shape of what follows depends on it.
    """
    if mask.device.type == "cpu":
        rows = mask.nonzero().squeeze(1)
        sizes = torch.searchsorted(rows, offsets).diff()
        return rows, sizes, sizes.tolist()
    so_far = mask.cumsum(0)
    sizes = torch.nn.functional.pad(so_far, (1, 0))[offsets].diff()
    counts: list[int] = sizes.tolist()
    rows = torch.searchsorted(so_far, torch.arange(1, sum(counts) + 1, device=mask.device))
    return rows, sizes, counts


def split_rows(rows: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """`rows` `[total, ...]` as views of `sizes` rows, one per task."""
    return list(torch.split_with_sizes(rows, list(sizes)))
