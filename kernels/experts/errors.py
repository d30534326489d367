"""The exceptions of the expert store.

    KernelError
    └── StoreError
        ├── ExpertFileError    a file is missing, cut short, damaged, or not what its neighbours are; for the operator
        ├── ExpertMissing      there is no such layer or expert in the files
        ├── SlotsTooFew        the store cannot hold at once what one call needs at once
        └── StoreClosed        it was closed

Input that a kernel refuses is `InvalidInput`, as everywhere.
"""

from penstock.kernels.errors import KernelError


class StoreError(KernelError):
    """Root of the expert store's exceptions."""


class ExpertFileError(StoreError):
    """A file of experts cannot be read, or does not hold what it should."""


class ExpertMissing(StoreError):
    """A layer or an expert is asked for that no file holds."""


class SlotsTooFew(StoreError):
    """More experts are needed at once than there are slots."""


class StoreClosed(StoreError):
    """The store was closed before, or while, it was asked."""
