"""`SGD`: torch.optim.SGD, and with `split=True` the same update at 18 bytes per weight instead of 32.

Automatic mixed precision keeps fp32 weights, and in every step casts them for the forward pass and their gradients
back: 6 + 6 bytes per weight beside the 20 of the update.  A step could write the low-precision copy while it has the
weight at hand.  But a copy can be stale.  Weights change in ways that nobody is told of (`.data`, NumPy's view of the
memory), a tensor's version counts only some of them, and to compare the copy costs as much as to cast it anew.

So there is no copy.  A split weight is kept in two halves that together are the fp32 number: the nearest bf16 number,
which is the model's parameter, and 16 bits in the optimizer's state ("lower_half").  The model runs in bf16, nothing is
cast, gradients come in bf16, and the update reads both halves and writes both.  Nothing is stored twice, so nothing can
be stale: whoever writes into the parameter, in whatever way, has changed the weight.  What he wrote is what forward
computes with and what the next step starts from, up to the half of its last bit that the lower half still adds.

Rounding to nearest sends ties away from zero, where PyTorch's casts send them to even: of 2^32 numbers, 65,537 round to
each even bf16 number, one too many for 16 bits.  So forward sees another neighbour of one weight in 131,072.  fp16 has
fewer exponents than fp32 and no such split.

`joined()` puts the weights together, exactly, for whatever wants fp32: evaluation, saving, another optimizer.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from fastalex import backend, gpu
from fastalex.cpu.sgd import join_halves, sgd_, split_halves
from fastalex.kernels.geometry import is_packed, lies_like, refuse_shared_memory
from fastalex.ops.common import device_of

__all__ = ["SGD"]


class SGD(torch.optim.SGD):
    """torch.optim.SGD (formulas, arguments, param_groups, state_dict and results), with two additions.

    split: keep each weight in two halves (see above).  The parameters, fp32 or bf16, become bf16 in place, so build
    the optimizer where you would call `model.to(torch.bfloat16)`: before DistributedDataParallel, compilation and
    capture.  Momentum buffers stay fp32.  On a GPU one launch updates all parameters of a group, in fp64 arithmetic
    rounded to fp32 as torch's fused SGD; elsewhere PyTorch's fused update does, on each weight put together.
    GradScaler treats the optimizer as a fused one.  A learning rate that is a tensor on the device is read there: a
    captured CUDA graph follows it.

    `factors` may be overridden, as LARS does: each parameter's gradient, decay included, is multiplied by its factor.

    Raises ValueError as torch's does, and with split for foreach or differentiable, for parameters of other dtypes, of
    subclasses (DTensor), with holes in their memory, or that share it.  A step raises RuntimeError for sparse
    gradients with split, and within `joined`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        split: bool = False,
    ) -> None:
        for name, value in (("foreach", foreach), ("differentiable", differentiable)):
            if split and value:
                raise ValueError(f"split and {name} exclude each other, got both")
        self.split = split
        self._joined = False
        self._tables: dict[Any, Any] = {}
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        if split:
            self._step_supports_amp_scaling = True

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "split": self.split}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._joined, self._tables = False, {}
        if self.split:
            self._step_supports_amp_scaling = True

    # -- the halves

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a split optimizer splits the group's parameters."""
        if self._joined:
            raise RuntimeError("add_param_group cannot be called within joined()")
        super().add_param_group(param_group)
        if not self.split:
            return
        parameters = self.param_groups[-1]["params"]
        try:
            for parameter in parameters:
                check_splittable(parameter)
            every = [p for group in self.param_groups for p in group["params"]]
            refuse_shared_memory({f"parameter {i} {tuple(p.shape)}": p for i, p in enumerate(every)})
        except ValueError:
            self.param_groups.pop()
            raise
        for parameter in parameters:
            if parameter.dtype == torch.float32:
                high, low = split_halves(parameter.detach())
                grad, parameter.grad = parameter.grad, None
                parameter.data = high
                parameter.grad = None if grad is None else grad.to(torch.bfloat16)
            else:
                low = torch.zeros_like(parameter, dtype=torch.int16)
            self.state[parameter]["lower_half"] = low

    def _lower_half(self, parameter: Tensor) -> Tensor:
        """In the order of the parameter's memory; zeros if somebody has cleared the state."""
        if parameter.dtype != torch.bfloat16:
            raise RuntimeError(
                f"a split parameter of shape {tuple(parameter.shape)} has become {parameter.dtype}: "
                "let it be bfloat16, or use joined()"
            )
        state = self.state[parameter]
        low = state.get("lower_half")
        if low is None or not lies_like(low, parameter):
            fresh = torch.zeros_like(parameter, dtype=torch.int16)
            low = state["lower_half"] = fresh if low is None else fresh.copy_(low)
        return low

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Within the block, the parameters are the fp32 weights, and the state is torch.optim.SGD's; then split again.

        Whatever happens to the weights within the block holds afterwards.  bf16 parameters and lower halves keep their
        memory, so that CUDA graphs find them.  Gradients stay outside.  Does nothing without `split`.
        """
        if not self.split or self._joined:
            yield
            return
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        halves = {p: (p.data, self._lower_half(p), p.grad) for p in every}
        for parameter, (high, low, _) in halves.items():
            del self.state[parameter]["lower_half"]
            parameter.grad = None
            parameter.data = join_halves(high, low)
        self._joined = True
        try:
            yield
        finally:
            self._joined = False
            for parameter, (high, low, grad) in halves.items():
                for half, value in zip((high, low), split_halves(parameter.data.float()), strict=True):
                    half.copy_(value)
                parameter.grad = None
                parameter.data = high
                parameter.grad = grad
                self.state[parameter]["lower_half"] = low

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, and takes torch's; a split optimizer's lower halves go with the parameters saved beside them."""
        # joined, because torch gives what it loads the dtype of the parameter
        with self.joined():
            super().load_state_dict(state_dict)
            loaded = {p: state.pop("lower_half", None) for p, state in self.state.items()}
        for parameter, low in loaded.items():
            if self.split and not self._joined and low is not None:
                self.state[parameter]["lower_half"].copy_(low)

    # -- the step

    def factors(self) -> Mapping[Tensor, Tensor]:
        """What multiplies the gradient and the decay of each parameter in the step under way; here nothing does."""
        return {}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update.  closure: computes the loss anew, which is returned."""
        if self._joined:
            raise RuntimeError("step cannot be called within joined()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            factors = self.factors()
            for number, group in enumerate(self.param_groups):
                self._step_group(number, group, factors)
        return loss

    def _step_group(self, number: int, group: dict[str, Any], factors: Mapping[Tensor, Tensor]) -> None:
        parameters: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Any] = []
        sparse = self._init_group(group, parameters, grads, buffers)
        if not parameters:
            return
        if self.split and sparse:
            raise RuntimeError("split does not take sparse gradients")
        options: dict[str, Any] = {
            key: group[key] for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        }
        scaling: dict[str, Any] = {key: getattr(self, key, None) for key in ("grad_scale", "found_inf")}
        if self.split or (factors and all(map(is_for_the_kernel, parameters, grads))):
            self._step_at_once(number, group, options | scaling, parameters, grads, factors)
            return
        if factors:
            for parameter, grad in zip(parameters, map(local, grads), strict=True):
                if group["maximize"]:
                    grad.neg_()
                grad.add_(local(parameter), alpha=group["weight_decay"]).mul_(factors[parameter])
            options |= {"weight_decay": 0.0, "maximize": False}  # they are in the gradients now
        sgd(
            parameters,
            grads,
            buffers,
            **options,
            **scaling,
            has_sparse_grad=sparse,
            foreach=group["foreach"],
            fused=group["fused"],
        )
        if group["momentum"] != 0:
            for parameter, buffer in zip(parameters, buffers, strict=True):
                self.state[parameter]["momentum_buffer"] = buffer

    def _step_at_once(
        self,
        number: int,
        group: dict[str, Any],
        options: dict[str, Any],
        parameters: list[Tensor],
        grads: list[Tensor],
        factors: Mapping[Tensor, Tensor],
    ) -> None:
        """One launch for all parameters that are alike; usually all of the group."""
        alike = defaultdict(list)
        for parameter, grad in zip(parameters, grads, strict=True):
            state = self.state[parameter]
            buffer = state.get("momentum_buffer") if group["momentum"] != 0 else None
            first = buffer is None
            if group["momentum"] != 0 and (buffer is None or not lies_like(buffer, parameter)):
                # zeros: a step that GradScaler skips leaves them
                fresh = torch.zeros_like(parameter, dtype=torch.float32)
                buffer = state["momentum_buffer"] = fresh if buffer is None else fresh.copy_(buffer)
            if not (is_packed(grad) and lies_like(grad, parameter)):
                grad = torch.empty_like(parameter, dtype=grad.dtype).copy_(grad)
            low = self._lower_half(parameter) if self.split else None
            alike[parameter.device, grad.dtype, first].append((parameter, grad, buffer, low))
        for (device, dtype, first), tensors in alike.items():
            weights, gradients, buffers, lows = map(list, zip(*tensors, strict=True))
            kernel = takes_kernel(weights[0])
            run: Any = gpu.sgd.sgd_ if kernel else sgd_
            table = self._tables.setdefault((number, device, dtype), gpu.sgd.Table()) if kernel else None
            of_device = {name: as_read_on(device, value) for name, value in options.items()}
            with device_of(weights[0]):
                run(
                    weights,
                    gradients,
                    buffers if group["momentum"] != 0 else None,
                    lows if self.split else None,
                    **of_device,
                    first=first,
                    factors=torch.stack([factors[w] for w in weights]).float() if factors else None,
                    table=table,
                )
            # what a graph of autograd has saved of them is no longer there
            torch.autograd.graph.increment_version(weights)


def as_read_on(device: torch.device, value: Any) -> Any:
    """A number, or a tensor of one on the device."""
    if not isinstance(value, Tensor) or value.device == device:
        return value
    return value.item() if value.is_cpu else value.to(device, non_blocking=True)


def is_for_the_kernel(parameter: Tensor, grad: Tensor) -> bool:
    """Whether the kernel updates a weight that is not split; PyTorch updates all others."""
    return (
        parameter.dtype == torch.float32
        and not grad.is_sparse
        and is_plain(parameter)
        and is_packed(parameter)
        and takes_kernel(parameter)
    )


def takes_kernel(parameter: Tensor) -> bool:
    return not backend.takes_reference("SGD", parameter) and backend.takes_triton("SGD", parameter)


def check_splittable(parameter: Tensor) -> None:
    """Raises ValueError for a parameter that cannot be split."""
    name = f"a parameter of shape {tuple(parameter.shape)}"
    if parameter.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"split takes float32 and bfloat16 parameters, got {parameter.dtype} in {name}")
    if not is_plain(parameter):
        raise ValueError(f"split takes plain tensors, got {type(parameter.data).__name__} in {name}")
    if not is_packed(parameter):
        raise ValueError(f"split takes parameters without holes in memory, got strides {parameter.stride()} in {name}")


def is_plain(parameter: Tensor) -> bool:
    return type(parameter.data) is Tensor and parameter.layout == torch.strided


def local(tensor: Any) -> Tensor:
    """The tensor itself, or this process's part of a DTensor, sharing its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
