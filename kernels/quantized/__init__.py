"""Linear layers whose weights have 8 or 4 bits; what goes in and out stays floating point."""

import torch

from penstock.kernels import backends
from penstock.kernels.declare import kernel
from penstock.kernels.errors import InvalidInput, LoadError
from penstock.kernels.inputs import FLOATS, Tensor
from penstock.kernels.linear.weights import check_file, load_weights, split_rows
from penstock.kernels.quantized import packed, tiles
from penstock.kernels.quantized.layout import FLOAT_DTYPES, check_quantized, dequantize, quantize_weight
from penstock.kernels.spec import Cost

__all__ = ["QuantizedLinear", "dequantize", "quantize_weight", "quantized_linear"]

MANY_ROWS = 256
"""Rows from which, on a GPU, restoring the weight once and multiplying as usual is taken; a guess, not measured."""


@torch.no_grad()
def quantized_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias, where weight (o, i) of group g is (q - zeros[o, g]) * scales[o, g].

    x: float32, bfloat16 or float16 `[..., in]`. What `quantize_weight` returns: `qweight`: int8 `[out, in]` for `bits` = 8;
    for 4, uint8 `[out, in / 2]`, where byte j of a group holds its weight j in the low half and weight
    j + group_size / 2 in the high half, 0 to 15 each; `scales`, `zeros`: float32 `[out, in / group_size]`, `zeros` None = 0
    for 8 bits and 8 for 4. `group_size`: 32, 64 or 128; None, for 8 bits: one group per row. bias: `[out]` in x's dtype.
    Returns `[..., out]` in x's dtype. No gradients.

    Tolerance against the restored weight, whatever the other rows are: |error| <= t ((|x| @ |scales * 2**bits|) + |bias|)
    with t = 1e-6 in float32, 4e-3 in bfloat16 and 1e-3 in float16. A row of x that is not finite gives no finite answer.
    Raises InvalidInput. Source: Frantar et al. 2022 (GPTQ) for grouped 4-bit weights.
    """
    num_outputs, num_inputs = check_quantized(qweight, scales, zeros, bits, group_size)
    _check(x, qweight, bias, num_outputs, num_inputs)
    rows = x.reshape(-1, num_inputs).contiguous()
    if not len(rows):
        return x.new_empty(*x.shape[:-1], num_outputs)
    usable = backends.torch_or_triton(x.device)
    if x.is_cuda and len(rows) > MANY_ROWS:
        usable = [*usable[1:], usable[0]]
    if bits == 8 and group_size is None and zeros is None and packed.can_multiply_int8(rows, qweight):
        usable = ["packed", *usable]
    backend = backends.choose("quantized_linear", x.device, usable)
    if backend == "triton":
        from penstock.kernels.quantized import triton_matmul

        y = triton_matmul.multiply(rows, qweight, scales, zeros, bias, bits=bits, group_size=group_size)
        return y.view(*x.shape[:-1], num_outputs)
    if backend == "packed":
        y = packed.multiply_int8(rows, qweight, scales)
    else:
        y = tiles.multiply(rows, qweight, scales, zeros, bits=bits, group_size=group_size)
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], num_outputs)


def _check(x: torch.Tensor, qweight: torch.Tensor, bias: torch.Tensor | None, num_outputs: int, num_inputs: int) -> None:
    if x.ndim < 1 or x.shape[-1] != num_inputs:
        raise InvalidInput(f"quantized_linear: x must be [..., {num_inputs}] for this weight; got {list(x.shape)}")
    if x.dtype not in FLOAT_DTYPES or x.device != qweight.device:
        raise InvalidInput(
            f"quantized_linear: x must be float32, bfloat16 or float16 on the weight's device, {qweight.device}; "
            f"got {x.dtype} on {x.device}"
        )
    if bias is not None and (bias.shape != (num_outputs,) or bias.dtype != x.dtype or bias.device != x.device):
        raise InvalidInput(f"quantized_linear: bias must be {x.dtype} [{num_outputs}]; got {bias.dtype} {list(bias.shape)}")


@kernel(
    "quantized_linear",
    inputs={"x": Tensor(dtypes=FLOATS, rank=2, ragged="pack")},
    cost=Cost(base_ms=0.1, per={"x.numel": 1e-5}),
    combine="sum",
    max_batch_size=256,
)
class QuantizedLinear:
    """A linear layer with 8- or 4-bit weights on the device: the rows of all tasks of a batch are one product.

    x: float `[rows, in]` per task, any number of rows (float64 is computed in float32). Returns `out`: `[rows, out]` per
    task in x's dtype. Tolerance: that of `ops.quantized_linear`.

    Options: `file`: a safetensors file with `qweight`, `scales` and perhaps `zeros` and `bias`, as `quantize_weight`
    returns them, set by who runs the worker, never by a task; `bits`, `group_size`.
    """

    def __init__(self, file: str | None = None, bits: int = 8, group_size: int | None = None) -> None:
        check_file("quantized_linear", file)
        self._file, self._bits, self._group_size = file, bits, group_size
        self._weights: dict[str, torch.Tensor] = {}
        self._packed: packed.PackedInt4 | None = None

    def load(self, device: torch.device) -> None:
        """Reads the weights onto `device`. Raises LoadError, also for those that do not go together."""
        ranks = {"qweight": 2, "scales": 2, "zeros": 2, "bias": 1}
        weights = load_weights("quantized_linear", self._file, ranks, device, optional=("zeros", "bias"))
        qweight, scales, zeros = weights["qweight"], weights["scales"], weights.get("zeros")
        try:
            num_outputs, _ = check_quantized(qweight, scales, zeros, self._bits, self._group_size)
        except InvalidInput as error:
            raise LoadError(f"{self._file}: {error}") from error
        if "bias" in weights and weights["bias"].shape != (num_outputs,):
            raise LoadError(f"{self._file}: bias must be [{num_outputs}]; it is {list(weights['bias'].shape)}")
        if self._group_size is not None and self._bits == 4 and packed.can_pack_int4(qweight):
            self._packed = packed.PackedInt4(qweight, scales, zeros, self._group_size)
        self._weights = weights

    def unload(self) -> None:
        """Drops the weights."""
        self._weights, self._packed = {}, None

    def __call__(self, x: torch.Tensor, x_offsets: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        """The answers for all rows x `[total, in]`, one tensor per task."""
        rows = x if x.dtype in FLOAT_DTYPES else x.float()
        bias = self._weights.get("bias")
        bias = None if bias is None else bias.to(rows.dtype)
        if self._packed is not None and rows.dtype == torch.bfloat16 and 1 <= len(rows) <= packed.MAX_ROWS:
            _check(rows, self._weights["qweight"], bias, *self._shape())
            out = self._packed(rows)
            out = out if bias is None else out.add_(bias)
        else:
            weights = {name: weight for name, weight in self._weights.items() if name != "bias"}
            out = quantized_linear(rows, **weights, bias=bias, bits=self._bits, group_size=self._group_size)
        return {"out": split_rows(out.to(x.dtype), x_offsets)}

    def _shape(self) -> tuple[int, int]:
        qweight = self._weights["qweight"]
        return len(qweight), qweight.shape[1] * (8 // self._bits)
