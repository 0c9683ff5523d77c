"""fuse(model): the fused operators inside somebody else's model, with its class, names, weights and results kept.

Every module that has a `forward` of its own is traced by torch.fx, its children as leaves, in training and in
evaluation mode.  Where every call of a convolution is followed by a ReLU and by nothing else, the convolution becomes
a `ConvReLU2d` and the ReLU an `Identity`: both change their class in place, so that parameters, hooks, dtype, device,
memory format, mode and references from an optimizer stay.  The model keeps its own Python code.  Only where a ReLU or
a pooling is a function, or where one ReLU module also serves layers that are not fused, the traced `forward`, less
those calls, shadows the original one, and only if that has no branches for a trace to freeze.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as TF
from torch import fx, nn

from fastalex import functional as F
from fastalex.forwards import OF_TORCH, Container, call_name, has_own_forward, rewritten, trace
from fastalex.kernels.geometry import MAX_CELLS
from fastalex.nn import (
    ConvReLU2d,
    LinearReLUDropout,
    LocalResponseNorm,
    LRNMaxPool2d,
    MaxPool2d,
    has_hooks,
    numeric_padding,
)
from fastalex.reference import pair

__all__ = ["Report", "fuse", "unfuse"]

FUSED = {
    nn.Conv2d: ConvReLU2d,
    nn.Linear: LinearReLUDropout,
    nn.LocalResponseNorm: LocalResponseNorm,
    nn.MaxPool2d: MaxPool2d,
}
RELU_FUNCTIONS = (TF.relu, TF.relu_, torch.relu, torch.relu_)


@dataclass(eq=False)
class Change:
    """A module that changed its class or attributes, and what it takes to change it back."""

    module: nn.Module
    cls: type
    before: dict[str, Any]
    added: list[str]

    def undo(self) -> None:
        self.module.__class__ = self.cls
        for name in self.added:
            self.module.__dict__.pop(name, None)
        self.module.__dict__.update(self.before)


@dataclass
class Report:
    """What `fuse` replaced and what it left, with the reason; one line each.  `str` gives the text."""

    replaced: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        parts = ((f"replaced ({len(self.replaced)}):", self.replaced), (f"left ({len(self.left)}):", self.left))
        return "\n".join(line for title, lines in parts for line in (title, *(f"  {text}" for text in lines)))


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model with the modules of `fastalex.nn` in it; `str(model.fastalex_report)` says what changed and what not.

    Conv2d + ReLU become ConvReLU2d, Linear + ReLU (+ Dropout) LinearReLUDropout, LocalResponseNorm + MaxPool2d
    LRNMaxPool2d, each of the last two alone its namesake, as modules or as functions (a ReLU also as a method of the
    tensor).  The name of a layer, its parameters and the state_dict stay as they are, and results too, to rounding;
    dropout draws from another stream.  What could change a result is left alone, with the reason in the report: an
    activation with another user, hooks that would see other tensors, subclasses, other padding modes, a `forward`
    that branches or cannot be traced.

    The model must be called through `forward`: code outside it that takes a layer's activation before the ReLU finds
    it after the ReLU.  A forward is judged, and where it is rewritten kept, with the values that plain attributes have
    at the time of the call.  Later changes of the p or the mode of a Dropout that became part of a LinearReLUDropout
    are made there.  Fuse before torch.compile or DistributedDataParallel; nn.DataParallel cannot replicate a rewritten
    forward.  The fused layers take batches (N, C, H, W) of floating-point numbers, have no second derivatives, and LRN
    keeps its dtype under autocast (see `fastalex.functional`).

    inplace: change the model itself instead of a deep copy.  A model that is fused already is fused anew.
    Raises ValueError if the model is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not inplace:
        model = copy.deepcopy(model)
    if hasattr(model, "fastalex_report"):
        unfuse(model)
    model.__dict__["fastalex_report"] = _Fusion(model).run()
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """The same model with its original modules and forward methods back, in place; weights stay as they are now.

    Raises ValueError for a model that did not come from `fuse`.
    """
    report = getattr(model, "fastalex_report", None)
    if not isinstance(report, Report):
        raise ValueError(f"model must come from fastalex.fuse, got {type(model).__name__} without a fastalex_report")
    for change in reversed(report.changes):
        change.undo()
    del model.fastalex_report
    return model


class _Fusion:
    """One run of `fuse`: finds every call of every module first, then changes modules, then forward methods."""

    def __init__(self, model: nn.Module):
        self.report = Report()
        self.names: dict[nn.Module, str] = {m: name for name, m in model.named_modules()}
        self.containers = [
            trace(m, name)
            for m, name in self.names.items()
            if has_own_forward(m) and type(m) not in (*FUSED.values(), LRNMaxPool2d)
        ]
        self.unseen: dict[nn.Module, str] = {}  # modules that code outside the graphs may call, and where
        self.calls: dict[nn.Module, list[fx.Node]] = defaultdict(list)
        self.called: dict[fx.Node, nn.Module] = {}
        self.home: dict[fx.Graph, Container] = {}
        for container in self.containers:
            for module in container.touched():
                self.unseen.setdefault(module, f"{container}, whose forward {container.opaque}, may call it")
            for graph in container.graphs.values():
                self.home[graph] = container
                for node in graph.nodes:
                    if node.op == "call_module":
                        module = container.module.get_submodule(str(node.target))
                        self.called[node] = module
                        self.calls[module].append(node)
        self.edits: dict[Container, list[str]] = defaultdict(list)

    def run(self) -> Report:
        for module in self.names:
            if isinstance(module, tuple(FUSED)) and type(module) not in (*FUSED, *FUSED.values()):
                self._leave(module, f"{type(module).__name__} is a subclass of what could be replaced")
        rectified = self._conv_and_linear()
        self._norm_and_pool(rectified)
        self._functions(rectified)
        for container, edits in self.edits.items():
            self._turn(container.module, type(container.module), forward=rewritten(container))
            what = ", ".join(dict.fromkeys(edits))
            self.report.replaced.append(f"forward of {container}: rewritten without {what}")
        for container in self.containers:
            if container.opaque not in (None, OF_TORCH) and not container.graphs:
                self.report.left.append(f"{container}: its forward {container.opaque}")
        for lines in (self.report.replaced, self.report.left):  # training and evaluation mode say most things twice
            lines[:] = dict.fromkeys(lines)
        return self.report

    def _label(self, module: nn.Module) -> str:
        return f"{self.names[module] or 'the model'} ({type(module).__name__})"

    def _replaced(self, what: str, by: Any) -> None:
        self.report.replaced.append(f"{what} -> fastalex.{by.__module__.partition('.')[2]}.{by.__name__}")

    def _leave(self, module: nn.Module, reason: str) -> None:
        self.report.left.append(f"{self._label(module)}: {reason}")

    def _turn(self, module: nn.Module, cls: type, **attributes: Any) -> None:
        own = module.__dict__
        before = {name: own[name] for name in attributes if name in own}
        added = [name for name in attributes if name not in own]
        self.report.changes.append(Change(module, type(module), before, added))
        module.__class__ = cls
        own.update(attributes)

    # convolutions and linear layers

    def _conv_and_linear(self) -> set[fx.Node]:
        """Fuses them; returns the calls whose results are now those of a ReLU."""
        relus: dict[nn.Module, list[fx.Node]] = {}
        for module in self.names:
            if type(module) in (nn.Conv2d, nn.Linear):
                reason = _layer_fault(module) or self._relu_fault(module) or self.unseen.get(module)
                if reason or not self.calls[module]:
                    self._leave(module, reason or "no forward that could be traced calls it")
                else:
                    relus[module] = [user for node in self.calls[module] if (user := _sole_user(node))]

        covered = {node for nodes in relus.values() for node in nodes}
        dropouts = {module: self._dropout_after(module, nodes) for module, nodes in relus.items()}
        absorbed: list[nn.Module] = []
        for module, nodes in relus.items():
            parts = [self._label(module)]
            for node in nodes:
                relu = self.called.get(node)
                if relu is not None and relu not in self.unseen and covered.issuperset(self.calls[relu]):
                    parts.append(self._label(relu))
                    absorbed.append(relu)
                else:
                    parts.append(call_name(node))
                    self._erase(node)
            if isinstance(module, nn.Conv2d):
                self._turn(module, ConvReLU2d, padding=numeric_padding(module))
            else:
                dropout = dropouts[module]
                self._turn(module, LinearReLUDropout, p=0.0 if dropout is None else dropout.p)
                if dropout is not None:
                    parts.append(self._label(dropout))
                    self._turn(dropout, nn.Identity)
            self._replaced(" + ".join(dict.fromkeys(parts)), type(module))
        for relu in dict.fromkeys(absorbed):
            self._turn(relu, nn.Identity)
        return covered.union(*(self.calls[module] for module in relus))

    def _relu_fault(self, module: nn.Module) -> str | None:
        """Why what follows the calls of a layer is not a ReLU alone."""
        for node in self.calls[module]:
            user = _sole_user(node)
            if user is None:
                return f"its output has {len(node.users)} users in {self.home[node.graph]}"
            if user.op == "output":
                return f"its output is returned by {self.home[node.graph]}"
            relu = self.called.get(user)
            if relu is None:
                method = user.op == "call_method" and user.target in ("relu", "relu_")
                if not method and not (user.op == "call_function" and user.target in RELU_FUNCTIONS):
                    return f"followed by {call_name(user)}, not by ReLU"
            elif type(relu) is not nn.ReLU:
                return f"followed by {self._label(relu)}, not by ReLU"
            elif _is_special(relu):
                return f"followed by {self._label(relu)}, which has a hook or a forward of its own"
        return None

    def _fed_by(self, nodes: list[fx.Node], cls: type) -> Any:
        """The module of this class that takes the results of all these calls, and nothing else, if there is one."""
        users = {_sole_user(node) for node in nodes}
        modules = {self.called.get(user) for user in users if user is not None}
        module = modules.pop() if len(modules) == 1 and None not in users else None
        if module is None or type(module) is not cls or module in self.unseen or _is_special(module):
            return None
        return module if set(self.calls[module]) == users else None

    def _dropout_after(self, linear: nn.Module, relus: list[fx.Node]) -> Any:
        """The dropout that can become part of a fused linear layer."""
        dropout = self._fed_by(relus, nn.Dropout) if type(linear) is nn.Linear else None
        return dropout if dropout is not None and dropout.training == linear.training else None

    # normalisation and pooling

    def _norm_and_pool(self, rectified: set[fx.Node]) -> None:
        for module in self.names:
            if type(module) is nn.LocalResponseNorm:
                pool = self._pool_after(module)
                if pool is not None:
                    inputs = [node.all_input_nodes[0] for node in self.calls[module]]
                    label = f"{self._label(module)} + {self._label(pool)}"
                    self._turn(
                        module,
                        LRNMaxPool2d,
                        norm=F.ResponseNorm(module.size, module.alpha, module.beta, module.k),
                        kernel_size=pool.kernel_size,
                        stride=pool.stride,
                        after_relu=all(node in rectified and len(node.users) == 1 for node in inputs),
                    )
                    self._turn(pool, nn.Identity)
                    self._replaced(label, LRNMaxPool2d)
        for module in self.names:
            if type(module) in (nn.LocalResponseNorm, nn.MaxPool2d):
                reason = _norm_fault(module) if type(module) is nn.LocalResponseNorm else _pool_fault(vars(module))
                if reason or "forward" in module.__dict__:
                    self._leave(module, reason or "has a forward of its own")
                    continue
                label = self._label(module)
                groups = {"groups": 1} if type(module) is nn.LocalResponseNorm else {}
                self._turn(module, FUSED[type(module)], **groups)
                self._replaced(label, type(module))

    def _pool_after(self, norm: nn.Module) -> Any:
        """The max-pool that can become part of this normalisation."""
        if norm in self.unseen or not self.calls[norm] or _is_special(norm) or _norm_fault(norm):
            return None
        pool = self._fed_by(self.calls[norm], nn.MaxPool2d)
        return pool if pool is not None and _is_plain_pool(vars(pool)) else None

    # forward methods

    def _erase(self, node: fx.Node) -> None:
        self.edits[self.home[node.graph]].append(call_name(node))
        node.replace_all_uses_with(node.all_input_nodes[0])
        node.graph.erase_node(node)

    def _functions(self, rectified: set[fx.Node]) -> None:
        """F.local_response_norm and F.max_pool2d: as edits of the graphs, or with the reason in the report."""
        for container in self.containers:
            for graph in container.graphs.values():
                gone: set[fx.Node] = set()
                for node in reversed(list(graph.nodes)):  # a pooling comes before the normalisation that it takes in
                    found = None if node in gone else _replacement(node)
                    if found is None:
                        continue
                    function, arguments, old = found
                    name = " + ".join(map(call_name, old))
                    if container.opaque:
                        self.report.left.append(f"{name} in {container}: its forward {container.opaque}")
                        continue
                    input = old[0].all_input_nodes[0]
                    if function is F.lrn_max_pool2d:
                        arguments["after_relu"] = input in rectified and len(input.users) == 1
                    with graph.inserting_before(node):
                        node.replace_all_uses_with(graph.call_function(function, (input,), arguments))
                    for each in reversed(old):
                        graph.erase_node(each)
                    gone.update(old)
                    self.edits[container].append(name)
                    self._replaced(f"{name} in {container}", function)


def _sole_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_special(module: nn.Module) -> bool:
    """Whether somebody looks at the module's tensors or changed what it computes."""
    return has_hooks(module) or "forward" in module.__dict__


def _layer_fault(layer: Any) -> str | None:
    """Why a Conv2d or Linear cannot take the ReLU into itself."""
    if "forward" in layer.__dict__:
        return "has a forward of its own"
    if layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "has a hook that sees its output before the ReLU"
    if not layer.weight.is_floating_point():
        return f"its weight is {layer.weight.dtype}"
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        return f"padding_mode is {layer.padding_mode!r}"
    return None


def _norm_fault(norm: Any) -> str | None:
    return None if isinstance(norm.size, int) and norm.size >= 1 else f"size is {norm.size!r}"


def _pool_fault(pool: dict[str, Any]) -> str | None:
    """Why fastalex does not take a window that torch may take."""
    for name in ("kernel_size", "stride", "padding", "dilation"):
        value = pool[name]
        if not isinstance(value, int) and not (isinstance(value, tuple | list) and len(value) == 2):
            return f"{name} is {value!r}"
    rows, columns = pair(pool["kernel_size"])
    if rows * columns > MAX_CELLS:
        return f"kernel_size {pool['kernel_size']} has more than {MAX_CELLS} cells"
    return None


def _is_plain_pool(pool: dict[str, Any]) -> bool:
    plain = pair(pool["padding"]) == (0, 0) and pair(pool["dilation"]) == (1, 1)
    return plain and not pool["ceil_mode"] and not pool["return_indices"] and _pool_fault(pool) is None


def _replacement(node: fx.Node) -> tuple[Any, dict[str, Any], list[fx.Node]] | None:
    """The function that stands for this call (and the one before it), its arguments, and the calls it replaces."""
    if node.op != "call_function" or len(node.all_input_nodes) != 1:
        return None
    if node.target in (TF.max_pool2d, TF.max_pool2d_with_indices):
        pool = _arguments(F.max_pool2d, node)
        pool["return_indices"] = node.target is TF.max_pool2d_with_indices
        if _pool_fault(_stepped(pool)):
            return None
        norm = node.all_input_nodes[0]
        found = _replacement(norm)
        if found and found[0] is F.local_response_norm and len(norm.users) == 1 and _is_plain_pool(_stepped(pool)):
            geometry = {"kernel_size": pool["kernel_size"], "stride": pool["stride"]}
            return F.lrn_max_pool2d, {**found[1], **geometry}, [norm, node]
        return F.max_pool2d, pool, [node]
    if node.target is TF.local_response_norm:
        return F.local_response_norm, _arguments(F.local_response_norm, node), [node]
    return None


def _stepped(pool: dict[str, Any]) -> dict[str, Any]:
    return {**pool, "stride": pool["kernel_size"] if pool["stride"] is None else pool["stride"]}


def _arguments(function: Any, node: fx.Node) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != "input"}
