"""Files as Caffe writes them, from the numbers in its caffe.proto and with no package, and Caffe's arithmetic."""

import struct

import numpy as np
import torch
from torch.nn import functional as F

# field numbers of LayerParameter, of V1LayerParameter, and the latter's numbers for types
NEW = {"name": 1, "type": 2, "bottom": 3, "top": 4, "blobs": 7, "transform": 100}
NEW |= {"Convolution": 106, "InnerProduct": 117, "LRN": 118, "Pooling": 121, "ReLU": 123, "Dropout": 108}
OLD = {"name": 4, "type": 5, "bottom": 2, "top": 3, "blobs": 6, "transform": 36}
OLD |= {"Convolution": 10, "InnerProduct": 17, "LRN": 18, "Pooling": 19, "ReLU": 30, "Dropout": 12}
TYPES = {"Convolution": 4, "Data": 5, "Dropout": 6, "InnerProduct": 14, "LRN": 15, "Pooling": 17, "ReLU": 18}
TYPES |= {"Sigmoid": 19, "Softmax": 20, "SoftmaxWithLoss": 21, "Split": 22, "Accuracy": 1}


def varint(value):
    value &= 2**64 - 1
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def field(number, value):
    """One field: whole numbers as varints, floats in four bytes, text and bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def blob(values, *, legacy=False, double=False):
    """A BlobProto; `legacy`: four sizes, filled up with ones in front."""
    values = np.asarray(values)
    packed = field(8, values.astype("<f8").tobytes()) if double else field(5, values.astype("<f4").tobytes())
    if legacy:
        shape = (1,) * (4 - values.ndim) + values.shape
        return b"".join(field(i + 1, size) for i, size in enumerate(shape)) + packed
    return packed + field(7, field(1, b"".join(map(varint, values.shape))))


def layers_of(variant, state, *, losses=True):
    """[{name, type, bottom, top, settings, blobs}] of a training net: data, the chain, loss, and what Caffe inserts."""
    values = iter([value.numpy() for value in state.values()])
    layers = [{"name": "data", "type": "Data", "bottom": [], "top": ["data", "label"]}] if losses else []
    top = "data"
    if losses:
        layers.append({"name": "label_split", "type": "Split", "bottom": ["label"], "top": ["label_0", "label_1"]})

    def add(name, type, settings=b"", blobs=(), *, in_place=False):
        nonlocal top
        layers.append({"name": name, "type": type, "bottom": [top], "settings": settings, "blobs": list(blobs)})
        top = top if in_place else name
        layers[-1]["top"] = [top]

    for i, conv in enumerate(variant.convs, 1):
        # num_output, pad, kernel_size, group, stride, weight_filler
        settings = field(1, conv.channels) + (field(3, conv.padding) if conv.padding else b"")
        settings += field(4, conv.kernel_size) + field(5, conv.groups) + field(6, conv.stride)
        settings += field(7, field(1, "gaussian") + field(6, 0.01))
        add(f"conv{i}", "Convolution", settings, [next(values), next(values)])
        add(f"relu{i}", "ReLU", in_place=True)
        norm, pool = (
            (f"norm{i}", "LRN", field(1, 5) + field(2, 1e-4) + field(3, 0.75)),
            (f"pool{i}", "Pooling", field(1, 0) + field(2, 3) + field(3, 2)),
        )
        for step in (pool, norm) if variant.pool_first else (norm, pool):
            if conv.norm if step is norm else conv.pool:
                add(*step)
    for i in (6, 7, 8):
        weight = next(values)
        add(f"fc{i}", "InnerProduct", field(1, len(weight)), [weight, next(values)])
        if i < 8:
            add(f"relu{i}", "ReLU", in_place=True)
            add(f"drop{i}", "Dropout", field(1, 0.5), in_place=True)
    if losses:
        layers.append({"name": "fc8_split", "type": "Split", "bottom": ["fc8"], "top": ["fc8_0", "fc8_1"]})
        layers.append({"name": "accuracy", "type": "Accuracy", "bottom": ["fc8_0", "label_0"], "top": ["accuracy"]})
        layers.append({"name": "loss", "type": "SoftmaxWithLoss", "bottom": ["fc8_1", "label_1"], "top": ["loss"]})
    return layers


def net(layers, *, old=False, legacy=False, double=False):
    """The bytes of a .caffemodel: `old` in V1LayerParameters, in the field `layers`."""
    numbers = OLD if old else NEW
    content = field(1, "AlexNet")
    for layer in layers:
        inner = field(numbers["name"], layer["name"])
        inner += field(numbers["type"], TYPES[layer["type"]] if old else layer["type"])
        for side in ("bottom", "top"):
            inner += b"".join(field(numbers[side], name) for name in layer[side])
        inner += b"".join(
            field(numbers["blobs"], blob(b, legacy=legacy, double=double)) for b in layer.get("blobs", [])
        )
        if layer.get("settings"):
            inner += field(numbers[layer["type"]], layer["settings"])
        if layer.get("transform"):
            inner += field(numbers["transform"], layer["transform"])
        content += field(2 if old else 100, inner)
    return content


def caffe(variant, state, pixels):
    """The logits of Caffe's net, layer by layer in torch's plain functions, for what it calls a picture (BGR)."""

    def lrn(x):
        squares = F.pad(x**2, (0, 0, 0, 0, 2, 2)).unfold(1, 5, 1).sum(-1)
        return x / (1 + 1e-4 / 5 * squares) ** 0.75

    values = iter([value.to(pixels.dtype) for value in state.values()])
    x = pixels
    for conv in variant.convs:
        x = F.relu(F.conv2d(x, next(values), next(values), conv.stride, conv.padding, 1, conv.groups))
        if conv.norm and not variant.pool_first:
            x = lrn(x)
        if conv.pool:
            x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        if conv.norm and variant.pool_first:
            x = lrn(x)
    x = torch.flatten(x, 1)
    for i in range(3):
        x = F.linear(x, next(values), next(values))
        x = F.relu(x) if i < 2 else x
    return x


def zoo_file(light, state, crop=227, raw=True):
    """The zoo's graph around these weights, which lie in it as in the zoo's own files."""
    import onnx

    model = onnx.load(light)
    graph = model.graph
    values = iter(state.values())
    names = [node.input[i] for node in graph.node if node.op_type in ("Conv", "Gemm") for i in (1, 2)]
    nodes = [node for node in graph.node if node.op_type != "ConstantOfShape"]
    del graph.node[:], graph.initializer[:], graph.input[1:]
    graph.node.extend(nodes)
    inputs = state["classifier.1.weight"].shape[1]
    graph.initializer.append(onnx.helper.make_tensor("OC2_DUMMY_1", 7, [2], [1, inputs]))
    for name in names:
        value = next(values).numpy()
        made = onnx.numpy_helper.from_array(value, name)
        if not raw:
            made = onnx.helper.make_tensor(name, 1, value.shape, value.ravel().tolist())
        graph.initializer.append(made)
    for i in (2, 3):
        graph.input[0].type.tensor_type.shape.dim[i].dim_value = crop
    del graph.output[0].type.tensor_type.shape.dim[:]
    return model
