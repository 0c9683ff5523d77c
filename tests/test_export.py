"""torch.export and ONNX."""

import collections
import io

import pytest
import torch
from calls import CALLS, IMAGES, inputs, network
from torch import nn

from fastalex import functional as F

BATCH = {0: torch.export.Dim("batch")}


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_with_any_batch(strict):
    model = network().eval()
    exported = torch.export.export(model, (torch.randn(IMAGES),), dynamic_shapes=(BATCH,), strict=strict)
    names = {str(node.target) for node in exported.graph.nodes}
    assert {"fastalex.conv2d_relu_pool.default", "fastalex.linear_relu_dropout.default"} <= names
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    for program in (exported, exported.run_decompositions(), torch.export.load(file)):
        images = torch.randn(9, *IMAGES[1:])
        torch.testing.assert_close(program.module()(images), model(images))


@pytest.mark.parametrize("name", CALLS)
def test_every_function_exports(name):
    function, _ = CALLS[name]

    class Module(nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    tensors = [t.detach() for t in inputs(name)]
    exported = torch.export.export(Module(), tuple(tensors))
    assert any(str(node.target).startswith("fastalex.") for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(*tensors), function(*tensors))


class Norms(nn.Module):
    """LRN with an even window, which ONNX's cannot express, and a pooling with everything."""

    def forward(self, x):
        x = F.local_response_norm(x, 4, 0.5, 0.6, 1.5, groups=2)
        return F.max_pool2d(x, (3, 2), 2, (1, 1), ceil_mode=True)


def operators(program):
    return collections.Counter(node.op_type for node in program.model.graph)


def onnx_program(model, images):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    return torch.onnx.export(model.eval(), (images,), dynamo=True, dynamic_shapes=(BATCH,), verbose=False)


def assert_runs_the_same(program, model, images):
    runtime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(images), rtol=1e-4, atol=1e-5)


def test_onnx():
    """Nothing but ONNX's own operators, LRN among them, any batch size, onnxruntime's results equal to ours."""
    model = network().eval()
    program = onnx_program(model, torch.randn(IMAGES))
    found = operators(program)
    found.pop("Reshape", None)
    assert found == {"Conv": 3, "LRN": 2, "MaxPool": 2, "Gemm": 3, "Relu": 5}
    with torch.no_grad():
        assert_runs_the_same(program, model, torch.randn(9, *IMAGES[1:]))


def test_onnx_of_what_onnx_has_no_operator_for():
    program = onnx_program(Norms(), torch.randn(3, 8, 9, 9))
    assert "LRN" not in operators(program)
    assert_runs_the_same(program, Norms(), torch.randn(5, 8, 9, 9))


def test_the_graph_that_onnx_gets(monkeypatch):
    """The same without the onnx package: what torch.export sees while an ONNX export runs."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    exported = torch.export.export(network().eval(), (torch.randn(IMAGES),), dynamic_shapes=(BATCH,), strict=False)
    calls = [node for node in exported.graph.nodes if node.op == "call_function"]
    names = collections.Counter(str(node.target) for node in calls)
    assert names["onnx_symbolic._symbolic.default"] == names["aten.max_pool2d.default"] == 2
    assert not any("fastalex" in name for name in names)
    norm = next(node for node in calls if "symbolic" in str(node.target))
    assert norm.args[1] == "LRN"
    assert norm.kwargs["attr_keys"] == ["size", "alpha", "beta", "bias"]
    assert (norm.kwargs["attr_ints"], norm.kwargs["attr_floats"]) == ([5], [0.01, 0.75, 2.0])
