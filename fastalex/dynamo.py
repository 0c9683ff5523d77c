"""torch.compile(model, backend="fastalex"): the operators of this package inside somebody else's model.

Dynamo follows the model's Python and hands over a straight graph of PyTorch's functions: branches decided, modules
dissolved, guards in front.  There, "a convolution followed by a ReLU and by nothing else" is a node with one user.
`PATTERNS` says which functions become which operator.  The new graph runs as Dynamo's would, under ordinary autograd,
so that the operators' own backward serves; or another backend compiles it further.  The model is never touched.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastalex import backend, functional
from fastalex.kernels.geometry import MAX_CELLS
from fastalex.late import after_import
from fastalex.private import FakeTensor, is_written
from fastalex.reference import pair

__all__ = ["Report", "compile_graph", "explain", "fuse", "inputs_of", "is_compiled", "register", "rewritten"]

Model = TypeVar("Model", bound=nn.Module)

CONV, LINEAR, RELU, DROPOUT = "conv2d", "linear", "relu", "dropout"
NORM, POOL = "local_response_norm", "max_pool2d"

# what a node of the graph may call; a string is a method of the tensor
KINDS: dict[Any, str] = {
    torch.conv2d: CONV,
    F.linear: LINEAR,
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), RELU),
    F.dropout: DROPOUT,
    F.local_response_norm: NORM,
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), POOL),
}
SIGNATURES = {
    CONV: inspect.signature(functional.conv2d_relu),
    LINEAR: inspect.signature(lambda input, weight, bias=None: None),
    RELU: inspect.signature(F.relu),
    DROPOUT: inspect.signature(F.dropout),
    NORM: inspect.signature(F.local_response_norm),
    POOL: inspect.signature(functional.max_pool2d),
}

_log = logging.getLogger("fastalex")


@dataclass
class Report:
    """What was replaced and what was left, with the reason; one line each.  `str` gives the text."""

    replaced: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = ((f"replaced ({len(self.replaced)}):", self.replaced), (f"left ({len(self.left)}):", self.left))
        return "\n".join(line for title, lines in parts for line in (title, *(f"  {text}" for text in lines)))


def fuse(model: Model) -> Model:
    """A copy of the model that is compiled with this backend: same class, parameters, state_dict and results.

    It is `copy.deepcopy(model)` and then `model.compile(backend="fastalex")`, which alone compiles the model itself.
    A copy or a pickle of the result is the plain model again.  In PyTorch 2.11 `compile` does nothing for a model that
    is itself a torch.nn.Sequential; `torch.compile(model, backend="fastalex")` compiles it.
    Raises ValueError if the model is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = copy.deepcopy(model)
    model.compile(backend=compile_graph)
    return model


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """What this backend replaces in the call `model(*args, **kwargs)`, and what it leaves, with the reason.

    model: a module, compiled or not, or a function.  The call is made once, as it is, by `torch._dynamo.explain`, which
    resets Dynamo: what was compiled before is compiled again when it is next called.
    """
    return rewritten(model, *args, **kwargs)[1]


def rewritten(model: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[list[fx.GraphModule], Report]:
    """The graphs of a call with the operators in them, and the report; see `explain`."""
    import torch._dynamo

    report = Report()
    model = getattr(model, "_orig_mod", model)
    function = model.forward if isinstance(model, nn.Module) else model
    graphs = torch._dynamo.explain(function)(*args, **kwargs).graphs
    for graph_module in graphs:
        _rewrite(graph_module, report)
    return graphs, report


def is_compiled(model: Any) -> bool:
    """Whether a call of the module goes through Dynamo."""
    return getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod")


def inputs_of(graph_module: fx.GraphModule) -> list[Any]:
    """The fake tensors and sizes for which Dynamo made the graph."""
    return [_value(node) for node in graph_module.graph.nodes if node.op == "placeholder"]


def compile_graph(
    graph_module: fx.GraphModule,
    example_inputs: list[Tensor],
    *,
    options: dict[str, Any] | None = None,
    mode: Any = None,
) -> Callable[..., Any]:
    """The backend: what `torch.compile(model, backend="fastalex", options=options)` calls for each graph.

    options: {"inner": name or function} hands the rewritten graph on to another backend, such as "inductor".
    Raises ValueError for any other option, and for a mode, which no backend but Inductor has.
    """
    unknown = {name: value for name, value in (options or {}).items() if name != "inner"}
    if unknown:
        raise ValueError(f'options of the backend "fastalex" may hold "inner" and nothing else, got {unknown}')
    if mode is not None:
        raise ValueError(
            f'the backend "fastalex" has no mode, got {mode!r}; options={{"inner": "inductor"}} compiles on'
        )
    from torch._dynamo.backends.registry import lookup_backend

    report = Report()
    _rewrite(graph_module, report)
    _log.info("torch.compile, a graph: %s", report)
    return lookup_backend((options or {}).get("inner", "eager"))(graph_module, example_inputs)


def _rewrite(graph_module: fx.GraphModule, report: Report) -> None:
    """The graph, and those inside it (checkpointed parts), with everything replaced that PATTERNS finds."""
    for part in graph_module.modules():
        if isinstance(part, fx.GraphModule):
            _Rewriting(part.graph, report).run()
            part.recompile()


class Fusion(NamedTuple):
    """`nodes`, each the only user of the one before, become one call of `function`."""

    nodes: list[fx.Node]
    function: Callable[..., Any]
    arguments: dict[str, Any]


class _Rewriting:
    """One pass over a graph."""

    def __init__(self, graph: fx.Graph, report: Report):
        self.graph, self.report = graph, report
        self.position: dict[fx.Node, int] = {}
        self.modes: dict[fx.Node, int] = {}  # equal where gradients, autocast and transforms are switched alike
        modes = 0
        for position, node in enumerate(graph.nodes):
            if node.op == "call_function" and _value(node) is None:  # called for its effect
                modes += 1
            self.position[node], self.modes[node] = position, modes

    def run(self) -> None:
        gone: set[fx.Node] = set()
        for node in list(self.graph.nodes):
            pattern = PATTERNS.get(_kind(node))
            if pattern is None or node in gone:
                continue
            found = _fault(node) or pattern(self, node)
            if isinstance(found, str):
                self.report.left.append(f"{_label(node)}: {found}")
            else:
                gone.update(found.nodes)
                self._replace(found)
        self.graph.lint()

    def _replace(self, fusion: Fusion) -> None:
        first, last = fusion.nodes[0], fusion.nodes[-1]
        name = f"fastalex.functional.{fusion.function.__name__}"
        self.report.replaced.append(f"{' + '.join(map(_label, fusion.nodes))} -> {name}")
        # under autocast the library's LRN widens; ours keeps the dtype of what it normalises
        keeps = first if _kind(first) in (CONV, LINEAR) else _arguments(first)["input"]
        with self.graph.inserting_before(first):
            result = self.graph.call_function(fusion.function, (), fusion.arguments)
            if _value(keeps).dtype != _value(last).dtype:
                result = self.graph.call_method("to", (result, _value(last).dtype))
        result.meta = dict(last.meta)
        last.replace_all_uses_with(result)
        for node in reversed(fusion.nodes):
            self.graph.erase_node(node)

    def extend(self, nodes: list[fx.Node], kind: str, accepts: Callable[[fx.Node], bool] = lambda node: True) -> bool:
        """Appends the call that alone takes the result of the last node, if it is of this kind and accepted.

        Its other arguments must be there before the first node, where the fused call will stand.
        """
        first, user = nodes[0], _sole_user(nodes[-1])
        if user is None or _kind(user) != kind or self.modes[user] != self.modes[first] or not accepts(user):
            return False
        if not all(self._comes_before(first, other) for other in user.all_input_nodes if other is not nodes[-1]):
            return False
        nodes.append(user)
        return True

    def _comes_before(self, first: fx.Node, other: fx.Node) -> bool:
        """Whether `other` is computed before `first`, or may be: dynamic graphs read a module's floats where used."""
        if self.position[other] < self.position[first]:
            return True
        source = other.args[0] if other.op == "call_method" and other.target == "item" else None
        if not isinstance(source, fx.Node) or source.op != "placeholder" or is_written(_value(source)):
            return False
        first.prepend(other)
        self.position[other] = self.position[first]
        return True


def _conv2d(graph: _Rewriting, conv: fx.Node) -> Fusion | str:
    nodes, arguments = [conv], _arguments(conv)
    if not graph.extend(nodes, RELU):
        return _no_relu(conv)
    has_norm = graph.extend(nodes, NORM, _is_4d)
    if not graph.extend(nodes, POOL, _is_plain):
        return Fusion(nodes[:2], functional.conv2d_relu, arguments)
    if has_norm:
        norm = _arguments(nodes[2])
        arguments["norm"] = functional.ResponseNorm(norm["size"], norm["alpha"], norm["beta"], norm["k"])
    pool = _arguments(nodes[-1])
    arguments |= {"kernel_size": pool["kernel_size"], "pool_stride": pool["stride"]}
    return Fusion(nodes, functional.conv2d_relu_max_pool2d, arguments)


def _linear(graph: _Rewriting, linear: fx.Node) -> Fusion | str:
    nodes, arguments = [linear], _arguments(linear)
    if not graph.extend(nodes, RELU):
        return _no_relu(linear)
    weight, bias = _value(arguments["weight"]), arguments["bias"]
    if weight.dim() != 2 or (bias is not None and _value(bias).shape != weight.shape[:1]):
        return "its weight is no matrix, or its bias no vector of as many rows"
    drop = {"p": 0.0, "training": False}
    if graph.extend(nodes, DROPOUT, _is_kept):
        drop = {name: _arguments(nodes[2])[name] for name in drop}
    return Fusion(nodes, functional.linear_relu_dropout, arguments | drop)


def _local_response_norm(graph: _Rewriting, norm: fx.Node) -> Fusion | str:
    nodes, arguments = [norm], _arguments(norm)
    if not _is_4d(norm) or not graph.extend(nodes, POOL, _is_plain):
        return Fusion(nodes, functional.local_response_norm, arguments)
    window = {name: _arguments(nodes[1])[name] for name in ("kernel_size", "stride")}
    return Fusion(nodes, functional.lrn_max_pool2d, arguments | window)


def _max_pool2d(graph: _Rewriting, pool: fx.Node) -> Fusion | str:
    arguments = _arguments(pool)
    if arguments["return_indices"]:
        return "it returns indices"
    if _is_large(pool):
        return f"kernel_size {arguments['kernel_size']} has more than {MAX_CELLS} cells"
    return Fusion([pool], functional.max_pool2d, arguments)


PATTERNS = {CONV: _conv2d, LINEAR: _linear, NORM: _local_response_norm, POOL: _max_pool2d}


def _kind(node: fx.Node) -> str:
    return KINDS.get(node.target, "") if node.op in ("call_function", "call_method") else ""


def _arguments(node: fx.Node) -> dict[str, Any]:
    bound = SIGNATURES[_kind(node)].bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _value(node: fx.Node) -> Any:
    """What Dynamo computed for the node: a fake tensor, a number, or None for what is done for its effect."""
    return node.meta.get("example_value")


def _sole_user(node: fx.Node | None) -> fx.Node | None:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def _no_relu(node: fx.Node) -> str:
    user = _sole_user(node)
    if user is None:
        return f"its output has {len(node.users)} users"
    if user.op == "output":
        return "its output is returned"
    if _kind(user) == RELU:
        return "gradients or autocast are switched before its ReLU"
    return f"followed by {_label(user)}, not by ReLU"


def _fault(node: fx.Node) -> str | None:
    """Why the operators cannot run, or not faster than PyTorch's, on the tensors of a call."""
    operands = {name: operand for name, operand in _arguments(node).items() if isinstance(operand, fx.Node)}
    for name, operand in operands.items():
        value = _value(operand)
        if type(value) is Tensor:
            return f"its {name} belongs to a transform of torch.func"
        if value is None or (isinstance(value, Tensor) and type(value) is not FakeTensor):
            return f"its {name} is a {type(value).__name__}"
        if not isinstance(value, Tensor):  # a number
            continue
        if value.layout != torch.strided:
            return f"its {name} is {value.layout}"
        if value.dtype not in (*backend.KERNEL_DTYPES, torch.float64):
            return f"its {name} is {value.dtype}"
        if value.device.type != "cpu" and (reason := backend.refusal(value)):
            return reason
    return None


def _is_4d(node: fx.Node) -> bool:
    return _value(node).dim() == 4


def _is_kept(dropout: fx.Node) -> bool:
    """Whether nobody writes into what a dropout returns: our operator, unlike PyTorch's, needs it for its backward."""
    return not _arguments(dropout)["training"] or not is_written(_value(dropout))


def _is_plain(pool: fx.Node) -> bool:
    """Whether a pooling has nothing but a window and a stride, and windows that end inside the input."""
    arguments = _arguments(pool)
    plain = _numbers(arguments["padding"]) == (0, 0) and _numbers(arguments["dilation"]) == (1, 1)
    if arguments["ceil_mode"]:
        window, stride = (_numbers(arguments[name] or arguments["kernel_size"]) for name in ("kernel_size", "stride"))
        sizes = _value(arguments["input"]).shape[-2:]
        if window is None or stride is None or not all(isinstance(size, int) for size in sizes):
            return False
        plain &= all((size - reach) % step == 0 for size, reach, step in zip(sizes, window, stride, strict=True))
    return plain and not arguments["return_indices"] and not _is_large(pool)


def _is_large(pool: fx.Node) -> bool:
    """Whether a window is PyTorch's own to pool; one that depends on a shape is looked at when it is known."""
    window = _numbers(_arguments(pool)["kernel_size"])
    return window is not None and window[0] * window[1] > MAX_CELLS


def _numbers(value: Any) -> tuple[int, int] | None:
    """(height, width), or None where the graph computes them."""
    parts = value if isinstance(value, tuple | list) else (value,)
    return None if any(isinstance(part, fx.Node) for part in parts) else pair(value)


def _label(node: fx.Node) -> str:
    """`features.0 (Conv2d)` for a layer of torch.nn, `relu() in block (Block)` for what other code calls."""
    method = "." if node.op == "call_method" else ""
    name = f"{method}{getattr(node.target, '__name__', node.target)}()" if node.op.startswith("call") else str(node)
    path, cls = next(reversed(list(node.meta.get("nn_module_stack", {}).values())), ("", None))
    path = path.partition("]")[2].removeprefix(".__self__").removeprefix(".") or "the model"
    if cls is None:
        return name
    is_layer = cls.__module__.startswith("torch.nn.")
    return f"{path} ({cls.__name__})" if is_layer else f"{name} in {path} ({cls.__name__})"


def register() -> None:
    """Tells Dynamo the backend's name, as the entry point of an installed package does.

    Dynamo takes a second to import: where nobody has imported it yet, it is told as soon as somebody does.
    """
    after_import("torch._dynamo.backends.registry", _enter)


def _enter(registry: Any) -> None:
    """As Dynamo's own discovery of entry points does."""
    entry = EntryPoint("fastalex", f"{__name__}:{compile_graph.__name__}", "torch_dynamo_backends")
    registry._BACKENDS.setdefault(entry.name, entry)
