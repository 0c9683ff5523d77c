"""fuse(model): the fused operators inside somebody else's model, with its class, names, weights and results kept.

Every module that has a `forward` of its own is traced by torch.fx, its children as leaves, in training and in
evaluation mode.  Where every call of a convolution is followed by a ReLU and by nothing else, the convolution becomes
a `ConvReLU2d` and the ReLU an `Identity`: both change their class in place, so that parameters, hooks, dtype, device,
memory format, mode and references from an optimizer stay.  The model keeps its own Python code.  Only where a ReLU or
a pooling is a function, or where one ReLU module also serves layers that are not fused, the traced `forward`, less
those calls, shadows the original one, and only if that has no branches for a trace to freeze.
"""

from __future__ import annotations

import ast
import copy
import dis
import importlib
import inspect
import os
import sys
import sysconfig
import textwrap
import types
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as TF
from torch import fx, nn

from fastalex import functional as F
from fastalex.kernels.window_code import MAX_CELLS
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
OF_TORCH = "belongs to torch"
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


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@dataclass(eq=False)
class _Forward:
    """A rewritten forward: a bound method made of source text, so that it can be copied and pickled."""

    owner: nn.Module
    sources: dict[bool, tuple[str, dict[str, Any]]]  # by training mode

    def __post_init__(self) -> None:
        self.compiled = {mode: _compiled(source, names) for mode, (source, names) in self.sources.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled[self.owner.training](self.owner, *args, **kwargs)

    @property
    def __wrapped__(self) -> Any:  # what inspect.signature shows
        return types.MethodType(type(self.owner).forward, self.owner)

    @property
    def __code__(self) -> types.CodeType:  # what torch.export names its guards after
        return self.compiled[self.owner.training].__code__

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self.owner, "sources": self.sources}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()


@dataclass(frozen=True)
class _ModuleName:
    """Stands for an imported module, which cannot be pickled, among the names of a source text."""

    name: str


def _source(graph: fx.Graph) -> tuple[str, dict[str, Any]]:
    code = graph.python_code("self")
    names = {k: _ModuleName(v.__name__) if inspect.ismodule(v) else v for k, v in code.globals.items()}
    return code.src, names


def _compiled(source: str, names: dict[str, Any]) -> Any:
    scope = {k: importlib.import_module(v.name) if isinstance(v, _ModuleName) else v for k, v in names.items()}
    exec(compile(source, "<fastalex.fuse>", "exec"), scope)
    return scope["forward"]


@dataclass(eq=False)
class _Container:
    """A module with a forward of its own: its graphs by training mode, or why they do not say all that it does."""

    module: nn.Module
    name: str
    graphs: dict[bool, fx.Graph] = field(default_factory=dict)
    opaque: str | None = None
    foreign: bool = False  # what runs is not in the source of its class

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({type(self.module).__name__})"


@dataclass(eq=False)
class _Site:
    """A call of a module."""

    container: _Container
    node: fx.Node

    def sole_user(self) -> fx.Node | None:
        return next(iter(self.node.users)) if len(self.node.users) == 1 else None


class _Fusion:
    """One run of `fuse`: finds every call of every module first, then changes modules, then forward methods."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.report = Report()
        self.names: dict[nn.Module, str] = {m: name for name, m in model.named_modules()}
        self.containers = [_traced(m, name) for m, name in self.names.items() if _has_own_forward(m)]
        self.sites: dict[nn.Module, list[_Site]] = defaultdict(list)
        self.partial: dict[nn.Module, list[_Site]] = defaultdict(list)  # of forwards that do more than was traced
        self.called: dict[fx.Node, nn.Module] = {}
        for container in self.containers:
            sites = self.partial if container.opaque else self.sites
            for graph in container.graphs.values():
                for node in graph.nodes:
                    if node.op == "call_module":
                        module = container.module.get_submodule(str(node.target))
                        self.called[node] = module
                        sites[module].append(_Site(container, node))
        self.unseen = self._unseen()
        self.edits: dict[_Container, list[str]] = defaultdict(list)
        self.absorbed: list[nn.Module] = []

    def run(self) -> Report:
        fused = self._conv_and_linear()
        self._norm_and_pool(fused)
        self._functions(fused)
        self._rewrite()
        for container in self.containers:
            if container.opaque not in (None, OF_TORCH) and not container.graphs:
                self.report.left.append(f"{container}: its forward {container.opaque}")
        for lines in (self.report.replaced, self.report.left):  # training and evaluation mode say most things twice
            lines[:] = dict.fromkeys(lines)
        return self.report

    def _unseen(self) -> dict[nn.Module, str]:
        """Modules that code outside the graphs may call, and where."""
        unseen: dict[nn.Module, str] = {}
        for container in self.containers:
            if container.opaque is None:
                continue
            children = {name for name, _ in container.module.named_children()}
            loose = children if container.foreign else children - _only_called(type(container.module), children)
            for path, module in container.module.named_modules(remove_duplicate=False):
                first, _, rest = path.partition(".")
                if path and (not rest or first in loose):
                    unseen.setdefault(module, f"{container}, whose forward {container.opaque}, may call it")
        return unseen

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
        """Fuses them; returns the calls whose result is now after a ReLU that the layer before them did."""
        relus: dict[nn.Module, list[fx.Node]] = {}
        for module in self.names:
            if type(module) in (nn.Conv2d, nn.Linear):
                reason = _layer_fault(module) or self._relu_fault(module) or self._call_fault(module)
                if reason:
                    self._leave(module, reason)
                else:
                    relus[module] = [user for s in self.sites[module] if (user := s.sole_user())]
            elif isinstance(module, nn.Conv2d | nn.Linear) and type(module) not in FUSED.values():
                self._leave(module, f"{type(module).__name__} is a subclass of what could be replaced")

        covered = {node for nodes in relus.values() for node in nodes}
        dropouts = {module: self._dropout_after(module, nodes) for module, nodes in relus.items()}
        for module, nodes in relus.items():
            parts = [self._label(module)]
            for node in nodes:
                if self._absorbed(node, covered):
                    parts.append(self._label(self.called[node]))
                    self.absorbed.append(self.called[node])
                else:
                    parts.append(_call_name(node))
                    self._erase(self._container(module, node), node)
            if isinstance(module, nn.Conv2d):
                self._turn(module, ConvReLU2d, padding=numeric_padding(module))
            else:
                dropout = dropouts[module]
                self._turn(module, LinearReLUDropout, p=0.0 if dropout is None else dropout.p)
                if dropout is not None:
                    parts.append(self._label(dropout))
                    self._turn(dropout, nn.Identity)
            self._replaced(" + ".join(dict.fromkeys(parts)), type(module))
        for relu in dict.fromkeys(self.absorbed):
            self._turn(relu, nn.Identity)
        return covered | {s.node for module in relus for s in self.sites[module]}

    def _call_fault(self, module: nn.Module) -> str | None:
        if module in self.unseen:
            return self.unseen[module]
        return None if self.sites[module] else "no forward that could be traced calls it"

    def _relu_fault(self, module: nn.Module) -> str | None:
        """Why what follows the calls of a layer is not a ReLU alone."""
        for site in self.sites[module] + self.partial[module]:
            user = site.sole_user()
            if user is None:
                return f"its output has {len(site.node.users)} users in {site.container}"
            if user.op == "output":
                return f"its output is returned by {site.container}"
            relu = self.called.get(user)
            if relu is None:
                method = user.op == "call_method" and user.target in ("relu", "relu_")
                if not method and not (user.op == "call_function" and user.target in RELU_FUNCTIONS):
                    return f"followed by {_call_name(user)}, not by ReLU"
            elif type(relu) is not nn.ReLU:
                return f"followed by {self._label(relu)}, not by ReLU"
            elif _is_special(relu):
                return f"followed by {self._label(relu)}, which has a hook or a forward of its own"
        return None

    def _absorbed(self, node: fx.Node, covered: set[fx.Node]) -> bool:
        """Whether this call is of a ReLU module that serves fused layers only."""
        relu = self.called.get(node)
        return relu is not None and relu not in self.unseen and all(s.node in covered for s in self.sites[relu])

    def _container(self, module: nn.Module, user: fx.Node) -> _Container:
        return next(s.container for s in self.sites[module] if s.node in user.all_input_nodes)

    def _dropout_after(self, linear: nn.Module, relus: list[fx.Node]) -> nn.Dropout | None:
        """The dropout that can become part of a fused linear layer."""
        users = {user for relu in relus for user in relu.users}
        if any(len(relu.users) != 1 for relu in relus):
            return None
        modules = {self.called.get(user) for user in users}
        dropout = modules.pop()
        if (
            modules
            or type(linear) is not nn.Linear
            or type(dropout) is not nn.Dropout
            or dropout in self.unseen
            or _is_special(dropout)
        ):
            return None
        if {s.node for s in self.sites[dropout]} != users or dropout.training != linear.training:
            return None
        return dropout

    # normalisation and pooling

    def _norm_and_pool(self, fused: set[fx.Node]) -> None:
        done: set[nn.Module] = set()
        for module in self.names:
            if type(module) is not nn.LocalResponseNorm:
                continue
            pool = self._pool_after(module)
            if pool is not None and not _norm_fault(module):
                inputs = [s.node.all_input_nodes[0] for s in self.sites[module]]
                label = f"{self._label(module)} + {self._label(pool)}"
                self._turn(
                    module,
                    LRNMaxPool2d,
                    norm=F.ResponseNorm(module.size, module.alpha, module.beta, module.k),
                    kernel_size=pool.kernel_size,
                    stride=pool.stride,
                    after_relu=all(node in fused and len(node.users) == 1 for node in inputs),
                )
                self._turn(pool, nn.Identity)
                self._replaced(label, LRNMaxPool2d)
                done |= {module, pool}
        for module in self.names:
            if module in done:
                continue
            if type(module) in (nn.LocalResponseNorm, nn.MaxPool2d):
                reason = _norm_fault(module) if type(module) is nn.LocalResponseNorm else _pool_fault(vars(module))
                if reason is None and "forward" in module.__dict__:
                    reason = "has a forward of its own"
                if reason:
                    self._leave(module, reason)
                    continue
                label = self._label(module)
                groups = {"groups": 1} if type(module) is nn.LocalResponseNorm else {}
                self._turn(module, FUSED[type(module)], **groups)
                self._replaced(label, type(module))
            elif isinstance(module, nn.LocalResponseNorm | nn.MaxPool2d) and type(module) not in FUSED.values():
                self._leave(module, f"{type(module).__name__} is a subclass of what could be replaced")

    def _pool_after(self, norm: nn.Module) -> Any:
        """The max-pool module that every call of this normalisation feeds, if both can become one."""
        if norm in self.unseen or not self.sites[norm] or _is_special(norm):
            return None
        users = {s.sole_user() for s in self.sites[norm]}
        modules = {self.called.get(user) for user in users if user is not None}
        pool: Any = modules.pop() if None not in users and len(modules) == 1 else None
        if type(pool) is not nn.MaxPool2d or pool in self.unseen or _is_special(pool):
            return None
        if {s.node for s in self.sites[pool]} != users or not _is_plain_pool(vars(pool)):
            return None
        return pool

    # forward methods

    def _erase(self, container: _Container, node: fx.Node) -> None:
        self.edits[container].append(_call_name(node))
        node.replace_all_uses_with(node.all_input_nodes[0])
        node.graph.erase_node(node)

    def _functions(self, fused: set[fx.Node]) -> None:
        """F.local_response_norm and F.max_pool2d: as edits of the graphs, or with the reason in the report."""
        for container in self.containers:
            for graph in container.graphs.values():
                gone: set[fx.Node] = set()
                for node in reversed(list(graph.nodes)):  # a pooling comes before the normalisation that it takes in
                    found = None if node in gone else _replacement(node)
                    if found is None:
                        continue
                    function, arguments, old = found
                    name = " + ".join(map(_call_name, old))
                    if container.opaque:
                        self.report.left.append(f"{name} in {container}: its forward {container.opaque}")
                        continue
                    input = old[0].all_input_nodes[0]
                    if function is F.lrn_max_pool2d:
                        arguments["after_relu"] = input in fused and len(input.users) == 1
                    with graph.inserting_before(node):
                        node.replace_all_uses_with(graph.call_function(function, (input,), arguments))
                    for each in reversed(old):
                        graph.erase_node(each)
                    gone.update(old)
                    self.edits[container].append(name)
                    self._replaced(f"{name} in {container}", function)

    def _rewrite(self) -> None:
        for container, edits in self.edits.items():
            sources = {mode: _source(graph) for mode, graph in container.graphs.items()}
            self._turn(container.module, type(container.module), forward=_Forward(container.module, sources))
            what = ", ".join(dict.fromkeys(edits))
            self.report.replaced.append(f"forward of {container}: rewritten without {what}")


def _has_own_forward(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule) or type(module).forward is nn.Module.forward:
        return False
    if type(module) in (*FUSED.values(), LRNMaxPool2d):
        return False
    inside_torch = type(module).__module__.startswith("torch.nn.")
    return bool(module._modules) if inside_torch else True


def _traced(module: nn.Module, name: str) -> _Container:
    container = _Container(module, name)
    if "forward" in module.__dict__:
        container.opaque, container.foreign = "is not its class's", True
    elif type(module).__module__.startswith("torch.nn.") and type(module).forward is not nn.Sequential.forward:
        container.opaque, container.foreign = OF_TORCH, True
    elif inspect.unwrap(type(module).forward) is not type(module).forward:
        container.opaque = "is decorated"
    else:
        for mode in (True, False):
            graph, reason = _trace(module, mode)
            container.opaque = container.opaque or reason
            if graph is not None:
                container.graphs[mode] = graph
    return container


def _trace(module: nn.Module, training: bool) -> tuple[fx.Graph | None, str | None]:
    """The graph of one forward, and why it may not be all that the forward does.

    What the traced code writes goes to a shallow copy; branches are looked for in every function that ran.
    """
    codes: set[types.CodeType] = set()

    def note(frame: types.FrameType, event: str, _: Any) -> None:
        if event == "call":
            codes.add(frame.f_code)

    profiler = sys.getprofile()
    try:
        twin = _twin(module, training)
        before = _contents(twin)
        sys.setprofile(note)
        graph = _Tracer().trace(twin)
    except Exception as error:  # whatever the model's own code raises on being traced
        return None, f"cannot be traced ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    finally:
        sys.setprofile(profiler)
    if _contents(twin) != before:
        return graph, "keeps attributes or makes tensors"
    if any(code.co_filename.endswith(("grad_mode.py", "autocast_mode.py")) for code in codes):
        return graph, "switches autograd or autocast"
    codes = {code for code in codes if _is_users(code)}
    if any("forward" in code.co_names and "super" not in code.co_names for code in codes):
        return graph, "calls the forward of a module instead of the module"
    branching = next(filter(_branches, codes), None)
    if branching is not None:
        return graph, f"branches (in {branching.co_name})"
    return graph, None


def _twin(module: nn.Module, training: bool) -> nn.Module:
    twin = copy.copy(module)
    for key, value in list(twin.__dict__.items()):
        if isinstance(value, dict | list | set):
            twin.__dict__[key] = copy.copy(value)
    twin.training = training
    return twin


def _contents(module: nn.Module) -> dict[str, Any]:
    return {
        key: [id(v) for v in (value.values() if isinstance(value, dict) else value)]
        if isinstance(value, dict | list | set)
        else id(value)
        for key, value in vars(module).items()
    }


LIBRARIES = tuple(os.path.join(path, "") for path in (os.path.dirname(torch.__file__), sysconfig.get_path("stdlib")))


def _is_users(code: types.CodeType) -> bool:
    file = code.co_filename
    if file.startswith("<frozen") or file == __file__ or file.startswith(LIBRARIES[0]):
        return False
    return "site-packages" in file or not file.startswith(LIBRARIES[1])


def _branches(code: types.CodeType) -> bool:
    """Whether it has an `if`, `while`, `with` or `try`; a `for` over modules is a straight line to a trace."""
    names = {instruction.opname for instruction in dis.get_instructions(code)}
    return any(
        ("JUMP" in name and "IF" in name) or name in ("SETUP_WITH", "SETUP_FINALLY", "PUSH_EXC_INFO", "RAISE_VARARGS")
        for name in names
    )


def _only_called(cls: type, children: set[str]) -> set[str]:
    """Those of the children that the source of the class mentions only to call them: `self.child(...)`, or
    `self.child.forward(...)` as LPIPS does."""
    wholesale = {"modules", "children", "named_modules", "named_children", "_modules", "get_submodule", "__dict__"}
    mentioned: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            return set()
        body = [n for n in tree.body[0].body if getattr(n, "name", None) != "__init__"]  # type: ignore[attr-defined]
        nodes = [node for statement in body for node in ast.walk(statement)]
        called = {node.func for node in nodes if isinstance(node, ast.Call)}
        called |= {node.value for node in called if isinstance(node, ast.Attribute) and node.attr == "forward"}
        called |= {  # comparing with None is harmless
            node.left for node in nodes if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot)
        }
        owners = {node.value for node in nodes if isinstance(node, ast.Attribute)}
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                if node.attr in wholesale:
                    return set()
                if node not in called:
                    mentioned.add(node.attr)
            if isinstance(node, ast.Name) and (
                node.id in ("getattr", "vars") or (node.id == "self" and node not in owners)
            ):
                return set()
    return children - mentioned


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
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros":
            return f"padding_mode is {layer.padding_mode!r}"
        if numeric_padding(layer) is None:
            return f'padding="same" with kernel_size {layer.kernel_size} is not symmetric'
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


def _call_name(node: fx.Node) -> str:
    if node.op == "call_function":
        name = "max_pool2d" if node.target is TF.max_pool2d else getattr(node.target, "__name__", node.target)
        return f"{name}()"
    return f".{node.target}()" if node.op == "call_method" else str(node.target)
