"""The whole network: eager twins of fastalex's models, and races over inference and training steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import providers
from benchmarks.harness import DTYPES, Case, Expected, Race, Run, check, checked_while_building, device, tf32
from fastalex import AlexNet, backend
from fastalex.check.eager import eager_twin
from fastalex.variants import Variant, find_variant

# pictures that are compared with the float64 reference
CHECKED = 4
# The largest error of a correct gradient of the first hidden layer, relative to its largest element, and the share of
# elements that may differ by more, because a ReLU had an input of 0 up to rounding.
GRADIENT_TOLERANCE = {"fp32": providers.CONVOLUTION["fp32"], "tf32": 2e-2, "fp16": 2e-2, "bf16": 5e-2}
FLIPPED = 0.02


def images_and_labels(case: Case) -> tuple[Tensor, Tensor]:
    images = providers.normal(*case.shape, seed=1)
    return images, torch.randint(1000, case.shape[:1], generator=torch.Generator().manual_seed(1)).to(device())


def new_model(variant: str | Variant, dropout: float) -> AlexNet:
    torch.manual_seed(0)
    with torch.device(device()):
        model = AlexNet(dropout=dropout, variant=find_variant(variant))
    return model.to(memory_format=torch.channels_last)


def flops(variant: str | Variant, shape: Sequence[int], backward: bool) -> int:
    """Of the convolutions and linear layers; the gradient of the pictures is not needed.

    Each gradient takes what the forward pass takes.  (PyTorch's counter would count the weight gradient of a
    convolution in groups as if it had one.)
    """

    def forward(network: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            network(images)
        return counter.get_total_flops()

    with torch.device("meta"):
        twin = eager_twin(AlexNet(dropout=0.0, variant=find_variant(variant)))
        images = torch.empty(tuple(shape))
        if not backward:
            return forward(twin)
        first = next(i for i, layer in enumerate(twin) if isinstance(layer, nn.Conv2d))
        return 3 * forward(twin) - forward(twin[: first + 1])


def autocast(name: str, dtype: str, pure: bool) -> Any:
    """Mixed precision where a model is not converted to the dtype as a whole."""
    return torch.autocast(device(), DTYPES[dtype], enabled=not pure and DTYPES[dtype] != torch.float32)


def inference_race(case: Case, names: list[str], variant: str | Variant) -> Race:
    """Logits of the batch.  Half precision: the model is converted; on a CPU, where eager's normalisation takes no
    bfloat16, eager and compiled models run under autocast instead."""
    images, _ = images_and_labels(case)
    dtype = DTYPES[case.dtype]

    def build(name: str) -> Run:
        model = new_model(variant, 0.0).eval()
        twin = not name.startswith("fastalex")
        network: Any = eager_twin(model).eval() if twin else model
        if name == "onnxruntime":
            return providers.onnxruntime_run(network, images)
        if name == "openvino":
            return providers.openvino_run(network, images, case.dtype)
        if name == "tensorrt":
            return providers.tensorrt_run(network, images, case.dtype)
        pure = not (twin and device() == "cpu")
        given = providers.placed(images, name)
        if pure:
            network, given = network.to(dtype), given.to(dtype)
        network = network.to(memory_format=providers.layout_of(name))
        if name.startswith("compile"):
            network = providers.compiled(network, name, cudagraphs=True)

        @torch.no_grad()
        def run() -> Tensor:
            with autocast(name, case.dtype, pure):
                return network(given)

        return providers.graphed(run) if name == "fastalex-graph" else run

    def expected() -> Expected:
        with backend.use("reference"), torch.no_grad():
            exact = new_model(variant, 0.0).eval().double()(images[:CHECKED].double())
        return Expected((exact,), providers.CONVOLUTION[case.dtype])

    return Race(
        {name: functools.partial(build, name) for name in names},
        expected,
        observe=lambda logits: (logits[:CHECKED],),
        # torch.compile has graphs of its own there
        replayed=("fastalex-graph", "compile-max-autotune"),
        flops=flops(variant, case.shape, backward=False),
    )


def training_race(
    case: Case, names: list[str], variant: str | Variant, *, dropout: float = 0.5, update: bool = True
) -> Race:
    """A training step: forward, loss, backward and, with `update`, fused SGD with momentum and weight decay.

    Half precision: autocast over float32 parameters with `update`, the converted model without.  Loss and the
    gradient of the first hidden layer are checked without dropout before the step is timed.  (At the paper's initial
    weights the gradients of the convolutions cancel so far that bfloat16 leaves nothing of conv1's, eager's included;
    their kernels are checked layer by layer in `test_conv_relu.py`.)
    """
    images, labels = images_and_labels(case)
    dtype = DTYPES[case.dtype]
    pure = not update

    def gradient(network: Callable[[Tensor], Tensor], model: nn.Module, given: Tensor, name: str) -> list[Tensor]:
        with autocast(name, case.dtype, pure):
            loss = F.cross_entropy(network(given).float(), labels)
        loss.backward()
        hidden = next(module for module in model.modules() if isinstance(module, nn.Linear))
        assert hidden.weight.grad is not None
        return [loss.detach(), hidden.weight.grad]

    @functools.cache
    def expected() -> Expected:
        with tf32("fp32"), backend.use("reference"):
            model = new_model(variant, 0.0).eval()
            return Expected(gradient(model, model, images, "reference"), GRADIENT_TOLERANCE[case.dtype], FLIPPED)

    def build(name: str) -> Run:
        model: Any = new_model(variant, dropout)
        if not name.startswith("fastalex"):
            model = eager_twin(model)
        given = providers.placed(images, name)
        if pure:
            model, given = model.to(dtype), given.to(dtype)
        model = model.to(memory_format=providers.layout_of(name))
        network = providers.compiled(model, name) if name.startswith("compile") else model
        check(gradient(network, model.eval(), given, name), expected())
        model.train().zero_grad()
        if not update:

            def run() -> None:
                model.zero_grad()
                gradient(network, model, given, name)

            return run
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            with autocast(name, case.dtype, pure):
                loss = F.cross_entropy(network(given).float(), labels)
            loss.backward()
            optimizer.step()

        return providers.graphed(step) if name == "fastalex-graph" else step

    return Race(
        {name: functools.partial(build, name) for name in names},
        checked_while_building(expected),
        observe=lambda nothing: (),
        replayed=("fastalex-graph",),
        flops=flops(variant, case.shape, backward=True),
    )
