"""The perceptual loss beside the packages that have it: distances, and the gradient of the first image."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import providers
from benchmarks.harness import DTYPES, Case, Expected, NotApplicable, Race, Run, device, tf32
from benchmarks.providers import entries
from fastalex import LPIPS, backend

# eager is the package lpips, compile torch.compile of it
LOSSES = ("fastalex", "eager", "eager-nchw", "compile", "torchmetrics")
FULL_HD = (1, 3, 1080, 1920)
SHAPES = ((64, 3, 64, 64), (1, 3, 256, 256), (16, 3, 256, 256), (4, 3, 512, 512), FULL_HD)
# Of distances.  A gradient is compared in fp32 alone: a ReLU whose input is zero up to rounding changes it by up to
# 4e-3 of its largest element (PyTorch's own against float64), and half precision has many of them.
TOLERANCE = {"fp32": 1e-5, "bf16": 6e-2}
FLIPPED = 5e-3


def cases(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], nets: Sequence[str]) -> list[Case]:
    return [
        Case("lpips", passes, dtype, shape, net)
        for net in nets
        for dtype in dtypes
        for shape in shapes
        for passes in ("forward", "both")
    ]


CUDA = cases(SHAPES, ("fp32", "bf16"), ("alex", "vgg"))
CPU = cases([(4, 3, 256, 256)], ("fp32",), ("alex",))
CPU_LONG = [
    *cases([(16, 3, 64, 64), (1, 3, 512, 512), FULL_HD], ("fp32",), ("alex",)),
    *cases([(4, 3, 256, 256)], ("bf16",), ("alex",)),
    *cases([(1, 3, 256, 256)], ("fp32",), ("vgg",)),
]


@functools.cache
def weights(net: str) -> dict[str, Tensor]:
    """A random trunk whose activations keep their size, and the paper's weights of the features."""
    loss = LPIPS(net=net, pnet_rand=True)
    torch.manual_seed(0)
    for parameter in loss.net.parameters():
        if parameter.dim() == 4:
            nn.init.kaiming_normal_(parameter)
        else:
            nn.init.normal_(parameter, 0.0, 0.1)
    return loss.state_dict()


def loss_of(name: str, net: str) -> nn.Module:
    """The loss of a provider, in NCHW and float32, with the weights of `weights`.  Its parameters are frozen."""
    loss: nn.Module
    if name == "fastalex":
        loss = LPIPS(net=net, pnet_rand=True)
        loss.load_state_dict(weights(net))
        return loss
    try:
        if name == "torchmetrics":
            from torchmetrics.functional.image.lpips import _LPIPS

            loss = _LPIPS(net=net, pnet_rand=True)  # type: ignore[arg-type]
        else:
            import lpips

            loss = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    except ImportError as error:
        raise NotApplicable(f"{error.name} is not installed") from None
    # torchmetrics keeps the scaling out of its state
    missing = loss.load_state_dict(weights(net), strict=False).missing_keys
    assert not missing
    return loss.requires_grad_(False)


def run_of(loss: Any, images: Sequence[Tensor], passes: str) -> Run:
    a, b = images
    if passes == "forward":

        @torch.no_grad()
        def forward() -> Tensor:
            return loss(a, b, normalize=True)

        return forward
    image = a.detach().requires_grad_()

    def both() -> tuple[Tensor, Tensor]:
        distance = loss(image, b, normalize=True)
        return distance.detach(), torch.autograd.grad(distance.sum(), image)[0]

    return both


def prepare(case: Case, names: list[str]) -> Race:
    """Half precision: the loss is converted."""
    dtype = DTYPES[case.dtype]
    generator = torch.Generator(device()).manual_seed(1)
    a, b = torch.rand(2, *case.shape, generator=generator, device=device()).to(dtype)

    def build(name: str) -> Run:
        loss: Any = loss_of(name, case.layer).to(device(), dtype).to(memory_format=providers.layout_of(name))
        images = [providers.placed(x, name) for x in (a, b)]
        if name == "compile":
            loss = providers.compiled(loss, name)
        return run_of(loss, images, case.passes)

    def expected() -> Expected:
        exact = loss_of("fastalex", case.layer).to(device(), torch.float64)
        with tf32("fp32"), backend.use("reference"):
            found = run_of(exact, (a.double(), b.double()), case.passes)()
        tensors = observe(found)
        # distances are held to TOLERANCE in the tests, too; here a gradient is among what is compared
        return Expected(tensors, TOLERANCE[case.dtype] if len(tensors) == 1 else FLIPPED, 0.0)

    def observe(out: Any) -> Sequence[Tensor]:
        tensors = out if isinstance(out, tuple) else (out,)
        return tensors if case.dtype == "fp32" else tensors[:1]

    def flops() -> int:
        with torch.device("meta"), FlopCounterMode(display=False) as counter, backend.use("reference"):
            images = torch.empty(case.shape, requires_grad=case.passes == "both"), torch.empty(case.shape)
            distance = LPIPS(net=case.layer, pnet_rand=True)(*images)
            if case.passes == "both":
                distance.sum().backward()
        return counter.get_total_flops()

    return Race({name: functools.partial(build, name) for name in names}, expected, observe=observe, flops=flops())


def quick(case: Case) -> Sequence[str]:
    """On a GPU without `--long`: a pair of 256 x 256, and a batch of it in bf16."""
    first = (case.dtype, case.shape) in (("fp32", SHAPES[1]), ("bf16", SHAPES[2]))
    return ("fastalex", "eager", "eager-nchw") if first and case.passes == "both" else ()


@entries(CPU, CUDA, LOSSES, cpu_compile=CPU[1:], cpu_long=CPU_LONG, cuda_quick=quick)
def test_lpips(case: Case, provider: str, contest: Any) -> None:
    contest(case, provider, prepare)
