"""The ONNX model zoo's AlexNets, `bvlcalexnet-3.onnx` to `-12.onnx`: Caffe's bvlc_alexnet after a trip through Caffe2.

Read with the package onnx.  The weights are those of `bvlc_alexnet.caffemodel`.  The graph of these files takes crops
of 224 where the net was trained with 227; they are loaded as the net that was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalex.foreign.chain import CONVOLUTION, LINEAR, LRN, MAX_POOL, RELU, Layer, Pixels, state_of

KINDS = {"Conv": CONVOLUTION, "Relu": RELU, "LRN": LRN, "MaxPool": MAX_POOL, "Gemm": LINEAR}


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """The state_dict in an `.onnx` file of Caffe's AlexNet and the name of its variant; see `chain.state_of`.

    Raises ValueError, naming file and layer, for damaged files, other nets, quantised ones, and what PyTorch exported:
    nothing in a graph says which pictures it takes, and those of the zoo are taken for Caffe's.  ImportError where
    onnx is missing.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("ONNX files need the onnx package: pip install 'fastalex[onnx]'") from error
    try:
        model = onnx.load(path)
    except Exception as error:  # whatever the package trips over in foreign bytes
        raise ValueError(f"{path} is damaged or no ONNX file: {error}") from None
    if model.producer_name == "pytorch":
        raise ValueError(f"{path} comes from PyTorch, not from Caffe: load the weights that it was exported from")
    constants: dict[str, Any] = {tensor.name: tensor for tensor in model.graph.initializer}
    layers = []
    for node in model.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant" and "value" in attributes:
            constants[node.output[0]] = attributes["value"]
        elif node.op_type == "ConstantOfShape":
            shape = _tensor(constants.get(node.input[0]), f"{path}: the shape of {node.output[0]}")
            value = torch.zeros(1)
            if "value" in attributes:
                value = _tensor(attributes["value"], f"{path}: {node.output[0]}")
            try:  # a view: the shape in a damaged file may ask for any amount
                constants[node.output[0]] = value.reshape(()).expand(shape.tolist())
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"{path}: {node.output[0]} cannot be of shape {shape.tolist()}: {error}") from None
        else:
            layers.append(_layer(node, attributes, constants, path))
    return state_of(layers, Pixels(), path)


def _layer(node: Any, attributes: dict[str, Any], constants: dict[str, Any], path: Path) -> Layer:
    name = node.name or (node.output[0] if node.output else node.op_type)
    kind = KINDS.get(node.op_type, node.op_type)
    settings: dict[str, Any] = {}
    parameters: list[Tensor] = []
    if kind in (CONVOLUTION, LINEAR):
        for source in node.input[1:]:
            parameters.append(_tensor(constants.get(source), f"{path}: {source} of layer {name}"))
            if not parameters[-1].is_floating_point():
                raise ValueError(f"{path}: {source} of layer {name} is {parameters[-1].dtype}, no weights")
    if kind in (CONVOLUTION, MAX_POOL):
        size = attributes.get("kernel_shape") or (parameters[0].shape[2:] if parameters else ())
        settings = {
            "kernel_size": _one(size),
            "stride": _one(attributes.get("strides", (1, 1))),
            "padding": _padding(attributes.get("pads", (0, 0, 0, 0)), rounds_up=kind == MAX_POOL),
            "groups": attributes.get("group", 1),
        }
        if attributes.get("auto_pad", b"NOTSET") != b"NOTSET" or set(attributes.get("dilations", (1,))) != {1}:
            kind = f"{node.op_type} with auto_pad or dilations"
    elif kind == LRN:
        settings = {"size": attributes.get("size"), "alpha": attributes.get("alpha", 1e-4)}
        settings |= {"beta": attributes.get("beta", 0.75), "k": attributes.get("bias", 1.0)}
    elif kind == LINEAR:
        if any(attributes.get(key, value) != value for key, value in {"alpha": 1.0, "beta": 1.0, "transA": 0}.items()):
            kind = "Gemm with alpha, beta or transA"
        elif not attributes.get("transB", 0) and parameters and parameters[0].dim() == 2:
            parameters[0] = parameters[0].t()
    bottom, top = (names[0] if names else "" for names in (node.input, node.output))
    return Layer(name, kind, bottom, top, settings, tuple(parameters))


def _tensor(source: Any, what: str) -> Tensor:
    """The numbers of a constant.  Raises ValueError for anything else."""
    import onnx

    if isinstance(source, Tensor):
        return source
    if source is None:
        raise ValueError(f"{what} is no constant (of a quantised file, for example): it cannot be used")
    try:
        return torch.tensor(onnx.numpy_helper.to_array(source))
    except Exception as error:  # whatever the package trips over in foreign bytes
        raise ValueError(f"{what} cannot be read: {error}") from None


def _one(values: Sequence[int]) -> Any:
    """One number where height and width have the same."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def _padding(pads: Sequence[int], *, rounds_up: bool) -> Any:
    """One number where all four are the same.

    Caffe's pooling rounds the number of windows up: in ONNX that is a pixel more behind the end, without effect on
    the sizes of a 227x227 crop.
    """
    half = len(pads) // 2
    before, after = pads[:half], pads[half:]
    return _one(before if rounds_up and {b - a for a, b in zip(before, after, strict=False)} == {1} else pads)
