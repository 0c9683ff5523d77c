"""Who takes part: fastalex, eager PyTorch, torch.compile, and inference engines where they are installed."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import DTYPES, Case, Expected, NotApplicable, Race, Run, device, tf32
from fastalex import timing
from fastalex.gpu import dispatch

# Of an operation.  Without a suffix, memory is channels_last.
OPERATION = ("fastalex", "fastalex-nchw", "eager", "eager-nchw", "compile", "compile-max-autotune")
MODEL = (*OPERATION, "fastalex-graph", "tensorrt", "onnxruntime", "openvino")
TRAINING = ("fastalex", "fastalex-graph", "eager", "eager-nchw", "compile", "compile-max-autotune")
# of whole models, without `--long`
QUICK = ("fastalex", "fastalex-graph", "eager", "compile")

# The largest error of a correct result, relative to its largest element.  In half precision eager rounds after each of
# some ten operations, and it is no error to be timed for that.
TOLERANCE = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 1e-2, "bf16": 6e-2}
# Where there are convolutions.  A library may take Winograd's F(4x4, 3x3) for them: of 64,000 elements, sums of 9 x 384
# random products in simulated fp32, the worst differed by 1.7e-5 of the largest, and a layer has 100 times as many.
# The weight gradient of conv1 adds 387,200 products in any order: sqrt(387200) * 2**-24 = 3.7e-5.
CONVOLUTION = {**TOLERANCE, "fp32": 1e-4}
# The share of gradients that may go to another cell of a pooling window, because its value is equal up to rounding.
ALMOST_TIES = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 2e-2, "bf16": 1e-1}

NO_GPU = "needs a CUDA device"


def unavailable(provider: str, where: str, dtype: str) -> str | None:
    """Why a provider cannot take part here, or None if it can."""
    needs_package = {
        "tensorrt": ("tensorrt", "onnx"),
        "onnxruntime": ("onnxruntime", "onnx"),
        "openvino": ("openvino",),
        "torchvision": ("torchvision", "PIL"),
        "torchmetrics": ("torchmetrics", "torchvision"),
    }
    if where == "cpu":
        if provider in ("tensorrt", "fastalex-graph", "compile-max-autotune", *FORCED):
            return NO_GPU
        if provider == "compile" and shutil.which(os.environ.get("CXX", "g++")) is None:
            return "torch.compile needs a C++ compiler here"
        if provider == "onnxruntime" and dtype != "fp32":
            return f"has no {dtype} on a CPU"
    elif provider in ("onnxruntime", "openvino"):
        return "runs on CPUs here"
    missing = [name for name in needs_package.get(provider, ()) if importlib.util.find_spec(name) is None]
    return f"{missing[0]} is not installed" if missing else None


def entries(
    cpu: Sequence[Case],
    cuda: Sequence[Case],
    names: Sequence[str],
    cpu_compile: Sequence[Case] = (),
    cpu_long: Sequence[Case] = (),
    cuda_quick: Callable[[Case], Sequence[str]] = lambda case: (),
) -> pytest.MarkDecorator:
    """Parameters (case, provider): the cases of this machine for every provider, the others as skipped.

    cpu_compile: the cases in which torch.compile takes part on a CPU, where it compiles for about 10 s.
    cpu_long: further cases for a CPU, with torch.compile, that `--long` asks for.
    cuda_quick: the providers of a case that a GPU measures without `--long`.
    """
    here = cuda if device() == "cuda" else [*cpu, *cpu_long]
    elsewhere = [case for case in cuda if case not in here]
    out = []
    for case in here:
        for name in names:
            reason = unavailable(name, device(), case.dtype)
            if device() == "cpu" and name == "compile" and case not in (*cpu_compile, *cpu_long):
                continue
            marks = [pytest.mark.skip(reason=f"{name}: {reason}")] if reason else []
            if case in cpu_long if device() == "cpu" else name not in cuda_quick(case):
                marks.append(pytest.mark.long)
            out.append(pytest.param(case, name, id=f"{case}-{name}", marks=marks))
    for case in elsewhere:
        out.append(pytest.param(case, "any", id=f"{case}-any", marks=pytest.mark.skip(reason=NO_GPU)))
    return pytest.mark.parametrize(("case", "provider"), out)


def half_at_128(case: Case) -> Sequence[str]:
    """The providers that take part in an operation's case without `--long`."""
    quick = (case.shape[0], case.dtype) == (128, "fp16") and case.passes in ("forward", "both")
    return ("fastalex", "eager", "eager-nchw") if quick else ()


def layout_of(name: str) -> torch.memory_format:
    return torch.contiguous_format if name.endswith("nchw") else torch.channels_last


def placed(tensor: Tensor, name: str) -> Tensor:
    """A copy in the memory format of a provider, whose memory is counted whole."""
    return tensor.clone(memory_format=layout_of(name) if tensor.dim() == 4 else torch.contiguous_format)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers, made on the device."""
    return torch.randn(shape, generator=torch.Generator(device()).manual_seed(seed), device=device())


def compiled(function: Callable[..., Any], name: str, cudagraphs: bool = False) -> Callable[..., Any]:
    """torch.compile for fixed shapes; CUDA graphs, where max-autotune has them, only for whole-model inference."""
    torch._dynamo.reset()
    mode = None
    if name == "compile-max-autotune":
        mode = "max-autotune" if cudagraphs else "max-autotune-no-cudagraphs"
    return torch.compile(function, dynamic=False, mode=mode)


# ------------------------------------------------------------------------------------------------------ operations
def passes(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor | None, which: str) -> Run:
    """What is timed: the output ("forward"), the gradients ("backward"), or output and gradients ("both")."""
    if which == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*inputs)

        return forward
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def both() -> tuple[Tensor, ...]:
        out = function(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    if which == "both":
        return both
    # the graph is used again and again, so the compiler must not give its buffers away
    with torch._functorch.config.patch(donated_buffer=False):
        out = function(*leaves)
        torch.autograd.grad(out, leaves, grad, retain_graph=True)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def far_from_zero(channels: int) -> Tensor:
    """A bias of 8 and -8 in turn: sums of unit variance then lie on the same side of the ReLU whatever the rounding."""
    return torch.tensor([8.0, -8.0]).repeat(channels // 2)


def operation_race(
    case: Case,
    names: Sequence[str],
    *,
    inputs: Sequence[Tensor],
    ours: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    bytes: Callable[[int, int], int] = lambda inputs, output: 0,
    tolerance: Mapping[str, float] = TOLERANCE,
    almost_ties: bool = False,
) -> Race:
    """The race of one operation.

    inputs: float32 tensors; they are rounded to the case's dtype, and every provider and the reference start from
    the rounded ones.  bytes(bytes of all inputs, bytes of the output): what must be moved.
    """
    dtype = DTYPES[case.dtype]
    given = [tensor.to(device(), dtype) for tensor in inputs]
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    with torch.device("meta"):
        output = eager(*(torch.empty(t.shape, dtype=dtype) for t in given))
    grad = normal(*output.shape, seed=1).to(dtype)

    def build(name: str) -> Run:
        function = ours if name.startswith("fastalex") else eager
        if name.startswith("compile"):
            function = compiled(eager, name)
        return passes(function, [placed(t, name) for t in given], placed(grad, name), case.passes)

    def expected() -> Expected:
        with tf32("fp32"):
            exact = passes(reference, [t.to(wide) for t in given], grad.to(wide), case.passes)()
        tensors = exact if isinstance(exact, tuple) else (exact,)
        ties = ALMOST_TIES[case.dtype] if almost_ties and case.passes != "forward" else 0.0
        return Expected(tensors, tolerance[case.dtype], ties)

    def flops() -> int:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            eager(*(torch.empty(t.shape, dtype=dtype) for t in given))
        # the gradients of input and weight take what the forward pass takes, each
        return counter.get_total_flops() * {"forward": 1, "backward": 2, "both": 3}[case.passes]

    return Race(
        {name: functools.partial(build, name) for name in names},
        expected,
        bytes=bytes(sum(t.nbytes for t in given), output.nbytes),
        flops=flops(),
        within=forced,
    )


FORCED = ("fastalex-batch_tiled", "fastalex-descriptors", "fastalex-spatial", "fastalex-split_k")


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Within the block one of `FORCED` has our Triton convolution by that algorithm, and our kernels for its gradients.

    Raises NotApplicable out of the block where that algorithm takes no such convolution.
    """
    if name not in FORCED:
        yield
        return
    algorithm = name.removeprefix("fastalex-")
    kernels = ("triton_descriptors", "triton") if algorithm == "descriptors" else ("triton",)
    blocks = ("space_to_depth_descriptors", "space_to_depth_triton")[-len(kernels) :]
    with contextlib.ExitStack() as stack:
        for operation, names in (
            ("conv2d_relu", (f"space_to_depth_{algorithm}", f"triton_{algorithm}")),
            # the library's for the pictures' gradient, which nobody needs
            ("conv2d_input_grad", (*kernels, "library")),
            ("conv2d_weight_grad", (*blocks, *kernels)),
        ):
            stack.enter_context(dispatch.force(operation, *names))
        try:
            yield
        except RuntimeError as error:
            if "no forced candidate can run" in str(error):
                raise NotApplicable(str(error)) from None
            raise


# ---------------------------------------------------------------------------------------------------------- engines
class OnnxResponseNorm(torch.autograd.Function):
    """nn.LocalResponseNorm as ONNX's operator LRN, whose formula is the same; torch would export a dozen operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        return nn.functional.local_response_norm(x, size, alpha, beta, k)

    @staticmethod
    def symbolic(g: Any, x: Any, size: int, alpha: float, beta: float, k: float) -> Any:
        return g.op("LRN", x, size_i=size, alpha_f=alpha, beta_f=beta, bias_f=k)


class OnnxResponseNormModule(nn.Module):
    def __init__(self, norm: nn.LocalResponseNorm) -> None:
        super().__init__()
        self.parameters_of_norm = (norm.size, norm.alpha, norm.beta, norm.k)

    def forward(self, x: Tensor) -> Tensor:
        return OnnxResponseNorm.apply(x, *self.parameters_of_norm)


def onnx_file(model: nn.Sequential, images: Tensor) -> bytes:
    """The model as ONNX, in the exporter that needs only the onnx package."""
    layers = [OnnxResponseNormModule(m) if isinstance(m, nn.LocalResponseNorm) else m for m in model]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # it is deprecated, and says so in many ways; the other has no LRN
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        names = {"input_names": ["images"], "output_names": ["logits"]}
        torch.onnx.export(nn.Sequential(*layers).eval(), (images,), path, dynamo=False, **names)  # type: ignore[arg-type]
        return path.read_bytes()


def onnxruntime_run(model: nn.Sequential, images: Tensor) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(onnx_file(model, images), options, providers=["CPUExecutionProvider"])
    given = {"images": images.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(None, given)[0])


def openvino_run(model: nn.Sequential, images: Tensor, dtype: str) -> Run:
    import openvino

    core = openvino.Core()
    converted = core.read_model(model=onnx_file(model, images))
    # without the hint it would lower the precision of its own accord where the processor is faster for it
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {"fp32": "f32"}.get(dtype, dtype),
    }
    request = core.compile_model(converted, "CPU", settings).create_infer_request()
    given = images.contiguous().numpy()
    return lambda: torch.from_numpy(request.infer([given], share_inputs=True)[0])


def tensorrt_run(model: nn.Sequential, images: Tensor, dtype: str) -> Run:
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(onnx_file(model, images)):
        raise RuntimeError(f"TensorRT does not take the model: {parser.get_error(0)}")
    config = builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)
    flag = {"tf32": "TF32", "fp16": "FP16", "bf16": "BF16"}.get(dtype)
    if flag is not None:
        config.set_flag(getattr(tensorrt.BuilderFlag, flag))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT could not build an engine")
    context = tensorrt.Runtime(logger).deserialize_cuda_engine(plan).create_execution_context()
    given = images.contiguous()
    logits = torch.empty(tuple(context.get_tensor_shape("logits")), device="cuda")
    context.set_tensor_address("images", given.data_ptr())
    context.set_tensor_address("logits", logits.data_ptr())

    def run() -> Tensor:
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return logits

    # `given` and the engine live as long as the function does
    run.kept = (given, context)  # type: ignore[attr-defined]
    return run


def graphed(run: Run) -> Run:
    """A CUDA graph of the run, as somebody would deploy it; its result lies where the capture left it."""
    graph, out = timing.capture(run)

    def replay() -> Any:
        graph.replay()
        return out

    return replay
