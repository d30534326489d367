"""A linear layer with what follows it: bias, activation, residual."""

import torch
from torch.nn import functional

from penstock.kernels import backends
from penstock.kernels.declare import kernel
from penstock.kernels.errors import InvalidInput, shown
from penstock.kernels.inputs import FLOATS, Tensor
from penstock.kernels.linear.weights import check_file, load_weights, rows_for, split_rows
from penstock.kernels.spec import Cost

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


@torch.no_grad()
def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(x @ weight.T + bias) + residual.

    x: float `[..., in]`, weight: `[out, in]`, bias: `[out]`, residual: `[..., out]`, all of one dtype. `activation`: None,
    relu, gelu (by the error function), gelu_tanh (its approximation) or silu. Returns `[..., out]`. No gradients.

    Tolerance: that of `matmul` for the product, |error| <= t (|x| @ |weight.T| + |bias| + |residual|) with t = 2e-6 in
    float32 (float64: 1e-14, bfloat16: 2e-2, float16: 3e-3: the product is rounded before what follows), whatever the other
    rows are. Raises InvalidInput. Source: torch.nn.functional.linear; Hendrycks and Gimpel 2016 (GELU).
    """
    _check(x, weight, bias, activation, residual)
    if activation in ("relu", "gelu_tanh") and bias is not None and x.is_cuda and x.numel():
        # cuBLAS does these two while it writes the product. (torch's "gelu" there is the approximation.)
        rows = x.reshape(-1, x.shape[-1])
        y = torch._addmm_activation(bias, rows, weight.T, use_gelu=activation == "gelu_tanh")
        y, activation = y.view(*x.shape[:-1], len(weight)), None
    else:
        y = functional.linear(x, weight, bias)
    if activation is not None and residual is not None and x.dtype != torch.float64 and _is_fused(x.device):
        from penstock.kernels.linear.triton_epilogue import activate_and_add_

        return activate_and_add_(y, activation, residual)
    y = _activate_(y, activation)
    return y if residual is None else y.add_(residual)


def _is_fused(device: torch.device) -> bool:
    return backends.choose("linear", device, backends.torch_or_triton(device)) == "triton"


def _activate_(y: torch.Tensor, activation: str | None) -> torch.Tensor:
    if activation == "relu":
        return y.relu_()
    if activation == "silu":
        return functional.silu(y, inplace=True)
    if activation is not None:
        torch.ops.aten.gelu_(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y


def check_activation(activation: object) -> None:
    """Raises InvalidInput unless it is None or one of `ACTIVATIONS`."""
    if activation is not None and activation not in ACTIVATIONS:
        raise InvalidInput(f"linear: activation must be {', '.join(ACTIVATIONS)} or none; got {shown(activation)}")


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
) -> None:
    check_activation(activation)
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise InvalidInput(f"linear: x must be [..., in] and weight [out, in]; got {list(x.shape)} and {list(weight.shape)}")
    out_shape = (*x.shape[:-1], len(weight))
    for name, tensor, shape in (("bias", bias, out_shape[-1:]), ("residual", residual, out_shape)):
        if tensor is not None and tensor.shape != shape:
            raise InvalidInput(f"linear: {name} must be {list(shape)}; got {list(tensor.shape)}")
    given = [tensor for tensor in (x, weight, bias, residual) if tensor is not None]
    if not x.is_floating_point() or len({(tensor.dtype, tensor.device) for tensor in given}) > 1:
        kinds = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in given)
        raise InvalidInput(f"linear: all must be of one float dtype on one device; got {kinds}")


@kernel(
    "linear",
    inputs={"x": Tensor(dtypes=FLOATS, rank=2, ragged="pack")},
    cost=Cost(base_ms=0.1, per={"x.numel": 1e-5}),
    combine="sum",
    max_batch_size=256,
)
class LinearLayer:
    """A linear layer with its weights on the device: the rows of all tasks of a batch are one product.

    x: float `[rows, in]` per task, any number of rows; computed in the weights' dtype, returned as x's. Returns `out`:
    `[rows, out]` per task. Tolerance: that of `ops.linear`.

    Options: `file`: a safetensors file with `weight` `[out, in]` and perhaps `bias` `[out]`, set by who runs the worker,
    never by a task; `activation`. Weights as arguments are for direct calls: tasks that bring their own share no product.
    """

    def __init__(self, file: str | None = None, activation: str | None = None) -> None:
        check_file("linear", file)
        check_activation(activation)
        self._file, self._activation = file, activation
        self._weights: dict[str, torch.Tensor] = {}

    def load(self, device: torch.device) -> None:
        """Reads the weights onto `device`. Raises LoadError."""
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        self._weights = load_weights("linear", self._file, {"weight": 2, "bias": 1}, device, optional=("bias",), dtypes=dtypes)

    def unload(self) -> None:
        """Drops the weights."""
        self._weights = {}

    def __call__(self, x: torch.Tensor, x_offsets: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        """The answers for all rows x `[total, in]`, one tensor per task."""
        out = linear(rows_for("linear", x, self._weights["weight"]), **self._weights, activation=self._activation)
        return {"out": split_rows(out.to(x.dtype), x_offsets)}
