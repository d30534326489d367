"""Arrays and numbers as they travel: C order, little endian, one of the protocol's dtypes.

Knows numpy, and torch if the program has imported it; does not know kernels.
"""

import sys
from typing import Any, Final

import numpy as np

from penstock.client.errors import InvalidInput

Array = np.ndarray[Any, np.dtype[Any]]

SIMPLE = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
NUMPY_DTYPES: Final[dict[str, np.dtype[Any]]] = {name: np.dtype(name).newbyteorder("<") for name in SIMPLE}
WIRE_DTYPES: Final[dict[np.dtype[Any], str]] = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


def is_torch_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _from_torch(tensor: Any, name: str) -> tuple[str, Array]:
    torch = sys.modules["torch"]
    tensor = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype == "bfloat16":
        return dtype, tensor.view(torch.int16).numpy()
    if dtype not in NUMPY_DTYPES:
        raise InvalidInput(f"{name!r}: tensors of dtype {dtype} cannot travel; possible are {', '.join(SIMPLE)}, bfloat16")
    return dtype, tensor.numpy()


def _from_python(value: object, name: str, dtypes: tuple[str, ...] | None) -> Array:
    """Numbers and nested lists; they have no dtype of their own, so they take one that the kernel accepts."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError) as e:
        raise InvalidInput(f"{name!r} is no array: {e}") from None
    kind = array.dtype.kind
    if kind not in "biuf":
        raise InvalidInput(f"{name!r} wants numbers, got {describe(value)}")
    if kind == "u":
        raise InvalidInput(f"{name!r}: the integer is too large for int64")
    wanted = {"b": "bool", "i": "int64", "f": "float32"}[kind]
    if dtypes is not None and wanted not in dtypes:
        preferred = ("int64", "float32", "float64", *dtypes)  # whole numbers must not end as float16
        fitting = (d for d in preferred if d in dtypes and d in NUMPY_DTYPES)
        wanted = next((d for d in fitting if np.can_cast(array.dtype, d, "same_kind")), wanted)
    return array.astype(NUMPY_DTYPES[wanted])


def to_array(value: object, name: str, dtypes: tuple[str, ...] | None = None) -> tuple[str, Array]:
    """Any tensor argument as (wire dtype, C-contiguous little-endian array; bfloat16 as its 16-bit patterns).

    Raises:
        InvalidInput: not numbers, or a dtype that cannot travel.
    """
    if is_torch_tensor(value):
        return _from_torch(value, name)
    array: Array
    if isinstance(value, np.ndarray | np.generic) or hasattr(value, "__array__"):
        array = np.asarray(value)
    else:
        array = _from_python(value, name, dtypes)
    dtype = WIRE_DTYPES.get(array.dtype)
    if dtype is None:
        if array.dtype.name == "bfloat16":  # of the ml_dtypes package
            return "bfloat16", np.asarray(array, order="C").view(np.int16)
        dtype = array.dtype.newbyteorder("<").name if array.dtype.kind in "biuf" else ""
        if dtype not in NUMPY_DTYPES:
            raise InvalidInput(
                f"{name!r}: arrays of dtype {array.dtype} cannot travel; possible are {', '.join(SIMPLE)}, bfloat16"
            )
        array = array.astype(NUMPY_DTYPES[dtype])
    return dtype, np.asarray(array, order="C")


def describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of dtype {value.dtype}"
    return f"{type(value).__name__} {value!r:.40}"
