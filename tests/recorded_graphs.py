"""A CUDA graph for CPU tensors: what is captured does not happen, and every replay writes to the memory of the capture.

As on a GPU, a capture fails where the host reads a tensor, numbers that Python knew stay what they were, and random
numbers are those of the generator's state at the replay.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero")


class Graph:
    def __init__(self):
        self.calls = []
        self.replays = 0

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, outputs in self.calls:
            for old, new in zip(outputs, tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recording(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph, self.before = graph, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function._schema.name in READS:
            raise RuntimeError(f"{function} is not permitted when a stream is capturing")
        for number, argument in enumerate(function._schema.arguments):
            declared = argument.alias_info is not None and argument.alias_info.is_write
            if declared or argument.name in ("running_mean", "running_var"):  # written without a word of it
                given = args[number] if number < len(args) else kwargs.get(argument.name)
                self.before += [(t, t.clone()) for t in tree_leaves(given) if isinstance(t, torch.Tensor)]
        result = function(*args, **kwargs)
        self.graph.calls.append((function, args, kwargs, tree_leaves(result)))
        return result


@contextlib.contextmanager
def capture(graph, capture_error_mode):
    random = torch.get_rng_state()
    with Recording(graph) as recording:
        yield
    with torch.no_grad():
        for tensor, value in reversed(recording.before):
            tensor.copy_(value)
    torch.set_rng_state(random)


class Stream:
    def wait_stream(self, other):
        pass


def install(monkeypatch):
    """Lets torch.cuda capture what runs on the CPU; returns the graphs that were made."""
    graphs = []

    def make():
        graphs.append(Graph())
        return graphs[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return graphs
