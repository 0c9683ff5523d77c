"""What the forward of a module does, as far as a trace tells, and a forward rewritten from such a trace.

torch.fx runs a forward once and sees one straight line of calls.  `trace` adds whether that line is all there is:
a branch, an attribute that is kept, a switch of autograd, a forward called past its module would make it a half-truth.
"""

from __future__ import annotations

import ast
import copy
import dis
import inspect
import sys
import textwrap
import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

OF_TORCH = "belongs to torch"
LIBRARIES = {*sys.stdlib_module_names, "torch"}


@dataclass(eq=False)
class Container:
    """A module with a forward of its own: its graphs by training mode, or why they do not say all that it does."""

    module: nn.Module
    name: str
    graphs: dict[bool, fx.Graph] = field(default_factory=dict)
    opaque: str | None = None
    foreign: bool = False  # what runs is not in the source of its class

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({type(self.module).__name__})"

    def touched(self) -> list[nn.Module]:
        """Modules below this one that code outside the graphs may call."""
        if self.opaque is None:
            return []
        children = {name for name, _ in self.module.named_children()}
        loose = children if self.foreign else children - _only_called(type(self.module), children)
        below = [(path.split("."), m) for path, m in self.module.named_modules(remove_duplicate=False) if path]
        return [module for path, module in below if len(path) == 1 or path[0] in loose]


def trace(module: nn.Module, name: str) -> Container:
    """The graphs of the module's forward in training and in evaluation mode, its children as leaves."""
    cls = type(module)
    container = Container(module, name)
    if "forward" in module.__dict__:
        container.opaque, container.foreign = "is not its class's", True
    elif cls.__module__.startswith("torch.nn.") and cls.forward is not nn.Sequential.forward:
        container.opaque, container.foreign = OF_TORCH, True
    elif inspect.unwrap(cls.forward) is not cls.forward:
        container.opaque = "is decorated"
    else:
        for training in (True, False):
            graph, reason = _trace_mode(module, training)
            container.opaque = container.opaque or reason
            if graph is not None:
                container.graphs[training] = graph
    return container


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace_mode(module: nn.Module, training: bool) -> tuple[fx.Graph | None, str | None]:
    """The graph of one forward, and why it may not be all that the forward does.

    What the traced code writes goes to a shallow copy; branches are looked for in every function that ran.
    """
    ran: dict[types.CodeType, str] = {}  # the module in which the code was written

    def note(frame: types.FrameType, event: str, _: Any) -> None:
        if event == "call":
            ran[frame.f_code] = frame.f_globals.get("__name__", "")

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
    if {"torch.autograd.grad_mode", "torch.amp.autocast_mode"} & set(ran.values()):
        return graph, "switches autograd or autocast"
    codes = [code for code, where in ran.items() if where.partition(".")[0] not in LIBRARIES and where != __name__]
    if any("forward" in code.co_names and "super" not in code.co_names for code in codes):
        return graph, "calls the forward of a module instead of the module"
    branching = next(filter(_branches, codes), None)
    return graph, None if branching is None else f"branches (in {branching.co_name})"


def _twin(module: nn.Module, training: bool) -> nn.Module:
    twin = copy.copy(module)
    twin.__dict__.update({key: copy.copy(v) for key, v in vars(module).items() if isinstance(v, dict | list | set)})
    twin.training = training
    return twin


def _contents(module: nn.Module) -> dict[str, Any]:
    return {
        key: [id(v) for v in (value.values() if isinstance(value, dict) else value)]
        if isinstance(value, dict | list | set)
        else id(value)
        for key, value in vars(module).items()
    }


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
        harmless = {node.func for node in nodes if isinstance(node, ast.Call)}
        harmless |= {node.value for node in harmless if isinstance(node, ast.Attribute) and node.attr == "forward"}
        harmless |= {  # comparing with None
            node.left for node in nodes if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot)
        }
        owners = {node.value for node in nodes if isinstance(node, ast.Attribute)}
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                if node.attr in wholesale:
                    return set()
                if node not in harmless:
                    mentioned.add(node.attr)
            if isinstance(node, ast.Name) and (
                node.id in ("getattr", "vars") or (node.id == "self" and node not in owners)
            ):
                return set()
    return children - mentioned


@dataclass(eq=False)
class RewrittenForward:
    """A bound method made of source text, so that it can be copied and pickled."""

    owner: nn.Module
    sources: dict[bool, tuple[str, dict[str, Any]]]  # by training mode: the text, and what its names stand for

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


def rewritten(container: Container) -> RewrittenForward:
    """The container's graphs, as they are now, as a method of its module."""
    return RewrittenForward(container.module, {mode: _source(graph) for mode, graph in container.graphs.items()})


def _source(graph: fx.Graph) -> tuple[str, dict[str, Any]]:
    code = graph.python_code("self")
    # modules cannot be pickled, so the text imports them
    imports = [f"import {v.__name__} as {k}\n" for k, v in code.globals.items() if inspect.ismodule(v)]
    return "".join(imports) + code.src, {k: v for k, v in code.globals.items() if not inspect.ismodule(v)}


def _compiled(source: str, names: dict[str, Any]) -> Any:
    scope = dict(names)
    exec(compile(source, "<fastalex.fuse>", "exec"), scope)
    return scope["forward"]


def has_own_forward(module: nn.Module) -> bool:
    """Whether its forward is worth a trace: it calls other modules, or may."""
    if isinstance(module, torch.jit.ScriptModule) or type(module).forward is nn.Module.forward:
        return False
    return bool(module._modules) or not type(module).__module__.startswith("torch.nn.")


def call_name(node: fx.Node) -> str:
    if node.op == "call_function":
        name = "max_pool2d" if node.target is torch.nn.functional.max_pool2d else getattr(node.target, "__name__", "")
        return f"{name or node.target}()"
    return f".{node.target}()" if node.op == "call_method" else str(node.target)
