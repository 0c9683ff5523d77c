"""Several processes: convolutions data-parallel, fully connected layers tensor-parallel ("one weird trick").

The convolutions of AlexNet hold 4 % of its parameters and do 92 % of its arithmetic, the fully connected layers the
other way round.  Averaging the gradients of the latter would move 234 MB per step in float32; splitting those layers
moves two of their inputs and the logits instead, 57 kB per image each way (9216 + 4096 + 1000 floats).

Source: A. Krizhevsky, One weird trick for parallelizing convolutional neural networks, arXiv:1404.5997, scheme (a).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastalex import functional as F
from fastalex.nn import LinearReLUDropout

__all__ = ["one_weird_trick"]


def one_weird_trick(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The model with `features` under DistributedDataParallel and `classifier`'s linear layers split over the mesh.

    Changes the model in place and returns it.  Call it in every process of `mesh`, which has one dimension, after
    moving the model to its device and before making the optimizer; the weights of its first process are taken.  Each
    process feeds its own images, the same number in each, gets their logits and takes the mean of their losses; after
    `backward` every gradient is that of the mean over all processes, as with DistributedDataParallel.

    Each hidden layer gathers its input and computes its share of the output features; the last layer computes its
    share of the sums and scatters the logits.  The parameters of the classifier become DTensors: give them and the
    plain ones of `features` to the optimizer as two parameter groups; only the group of `features` can be `fused`.
    `torch.distributed.checkpoint.state_dict.get_model_state_dict` gives the names and, with `full_state_dict=True`,
    the tensors of the model that was passed in.  torch.amp.GradScaler and clip_grad_norm_ take plain tensors or
    DTensors, not a mixture: prefer bfloat16 to float16, and clip the two parts apart.  Processes must seed their
    random numbers differently, else the dropout masks of their shares are equal.

    model: an AlexNet, torchvision's included, or any other with a `features` module and a Sequential `classifier` of
        two linear layers or more with only elementwise modules between them.
    Raises ValueError for another model, a mesh of more than one dimension, or hidden layers that the size of the mesh
    does not divide.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim} of shape {tuple(mesh.shape)}")
    features, classifier = getattr(model, "features", None), getattr(model, "classifier", None)
    if not isinstance(features, nn.Module) or not isinstance(classifier, nn.Sequential):
        raise ValueError(f"model must have `features` and a Sequential `classifier`, got {type(model).__name__}")
    linears = {i: layer for i, layer in enumerate(classifier) if isinstance(layer, nn.Linear)}
    if len(linears) < 2 or type(list(linears.values())[-1]) is not nn.Linear:
        raise ValueError(
            "model.classifier must hold two linear layers or more, the last an nn.Linear without an activation, "
            f"got {', '.join(type(layer).__name__ for layer in linears.values()) or 'none'}"
        )
    *hidden, last = linears
    between = [m for m in classifier[hidden[0] : last] if not isinstance(m, nn.Linear | ELEMENTWISE)]
    if between:
        raise ValueError(
            f"model.classifier must have only ReLU, Dropout and Identity between its linear layers, "
            f"got {', '.join(type(m).__name__ for m in between)}"
        )
    for i in hidden:
        if linears[i].out_features % mesh.size():
            raise ValueError(
                f"mesh has {mesh.size()} processes, which must divide the {linears[i].out_features} outputs of "
                f"model.classifier[{i}]"
            )
    model.features = DistributedDataParallel(features, process_group=mesh.get_group())
    for i in hidden:
        classifier[i] = ColumnParallel(linears[i], mesh, first=i == hidden[0])
    classifier[last] = RowParallel(linears[last], mesh)
    return model


ELEMENTWISE = nn.ReLU | nn.Dropout | nn.Identity


class _Parallel(nn.Module):
    """A linear layer whose weight is split along one of its dimensions; `bias` is split, whole or None."""

    weight: Any  # Parameters that are DTensors
    bias: Any

    def __init__(self, layer: nn.Linear, mesh: DeviceMesh, weight: int, bias: Any):
        super().__init__()
        self.mesh = mesh
        self.weight = _distributed(layer.weight, mesh, Shard(weight))
        self.bias = None if layer.bias is None else _distributed(layer.bias, mesh, bias)
        self.train(layer.training)

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, bias={self.bias is not None}, processes={self.mesh.size()}"


class ColumnParallel(_Parallel):
    """A hidden layer: gathers its input, (images / processes, ...) if `first`, else (images, features / processes),
    and returns (images, out_features / processes)."""

    def __init__(self, layer: nn.Linear, mesh: DeviceMesh, *, first: bool):
        super().__init__(layer, mesh, 0, Shard(0))
        self.first = first
        self.p = layer.p if isinstance(layer, LinearReLUDropout) else None

    def forward(self, input: Tensor) -> Tensor:
        if self.first:  # undoes RowParallel's: the convolutions' gradients are averaged by DistributedDataParallel
            input = _ScaleGradient.apply(input, self.mesh.size())
        part = DTensor.from_local(input, self.mesh, (Shard(0 if self.first else 1),))
        whole = part.redistribute(placements=(Replicate(),)).to_local(grad_placements=(Partial(),))
        weight, bias = self.weight.to_local(), None if self.bias is None else self.bias.to_local()
        if self.p is None:
            return TF.linear(whole, weight, bias)
        return F.linear_relu_dropout(whole, weight, bias, self.p, self.training)


class RowParallel(_Parallel):
    """The last layer: (images, in_features / processes) -> (images / processes, out_features)."""

    def __init__(self, layer: nn.Linear, mesh: DeviceMesh):
        super().__init__(layer, mesh, 1, Replicate())

    def forward(self, input: Tensor) -> Tensor:
        sums = DTensor.from_local(TF.linear(input, self.weight.to_local()), self.mesh, (Partial(),))
        output = sums.redistribute(placements=(Shard(0),))
        if self.bias is not None:
            bias = self.bias
            if torch.is_grad_enabled():  # without gradients, PyTorch 2.11 refuses the following
                # redistributing what is whole already does nothing forward, and sums the processes' gradients backward
                bias = bias.redistribute(placements=(Replicate(),))
            output = output + bias.to(output.dtype)
        # the processes' losses are means over their own images, and the loss is the mean of those
        return _ScaleGradient.apply(output.to_local(), 1 / self.mesh.size())


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None


def _distributed(parameter: Tensor, mesh: DeviceMesh, placement: Any) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(parameter.detach(), mesh, (placement,)), parameter.requires_grad)
