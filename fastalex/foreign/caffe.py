"""Caffe's own files: `.caffemodel`, a NetParameter of protocol buffers, in its `layers` and its `layer` form.

Read with the package protobuf and without Caffe.  `MESSAGES` holds what is needed of BVLC/caffe's
src/caffe/proto/caffe.proto; other fields, of losses, data sources and fillers, are skipped as unknown ones are.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastalex.foreign.chain import CONVOLUTION, LINEAR, LRN, MAX_POOL, RELU, Layer, Pixels, state_of

# {message: its fields}; a star is "repeated", a number after a colon the default.  Numbers in bulk are declared as the
# bytes as which they are packed, so that none of 60 million passes through Python; Caffe writes no other form.
# Enumerations are the integers that they are in the file.
MESSAGES = {
    "Shape": "int64* dim=1",
    "Blob": "int64 num=1  int64 channels=2  int64 height=3  int64 width=4  bytes* data=5  Shape shape=7"
    "  bytes* double_data=8",
    "Transform": "float scale=1:1  float* mean_value=5",
    "Convolution": "uint64* pad=3  uint64* kernel_size=4  uint64 group=5:1  uint64* stride=6  uint64* pad_h=9"
    "  uint64* pad_w=10  uint64* kernel_h=11  uint64* kernel_w=12  uint64* stride_h=13  uint64* stride_w=14"
    "  uint64* dilation=18",
    "InnerProduct": "bool transpose=6",
    "Norm": "uint64 local_size=1:5  float alpha=2:1  float beta=3:0.75  int32 norm_region=4  float k=5:1",
    "Pooling": "int32 pool=1  uint64* kernel_size=2  uint64* stride=3  uint64* pad=4  uint64* kernel_h=5"
    "  uint64* kernel_w=6  uint64* stride_h=7  uint64* stride_w=8  uint64* pad_h=9  uint64* pad_w=10"
    "  bool global_pooling=12",
    "Slope": "float negative_slope=1",
    "Oldest": "string name=1",
    "Layers": "Oldest layer=1  string* bottom=2  string* top=3  string name=4  int32 type=5  Blob* blobs=6"
    "  Convolution convolution_param=10  InnerProduct inner_product_param=17  Norm lrn_param=18"
    "  Pooling pooling_param=19  Slope relu_param=30  Transform transform_param=36",
    "Layer": "string name=1  string type=2  string* bottom=3  string* top=4  Blob* blobs=7"
    "  Transform transform_param=100  Convolution convolution_param=106  InnerProduct inner_product_param=117"
    "  Norm lrn_param=118  Pooling pooling_param=121  Slope relu_param=123",
    "Net": "string name=1  Layers* layers=2  Layer* layer=100",
}
# V1LayerParameter.LayerType, by the names that took their place
V1_TYPES = {1: "Accuracy", 4: "Convolution", 6: "Dropout", 8: "Flatten", 14: "InnerProduct", 15: "LRN", 17: "Pooling"}
V1_TYPES |= {18: "ReLU", 20: "Softmax", 21: "SoftmaxWithLoss", 22: "Split"}


@functools.cache
def message(name: str) -> type[Any]:
    """The class of a message in `MESSAGES`.  Raises ImportError where protobuf is missing."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError as error:
        raise ImportError("Caffe's files need the protobuf package: pip install 'fastalex[caffe]'") from error
    file = descriptor_pb2.FileDescriptorProto(name="fastalex.proto", package="fastalex", syntax="proto2")
    for title, fields in MESSAGES.items():
        made = file.message_type.add(name=title)
        for kind, star, label, number, default in re.findall(r"(\w+)(\*?) (\w+)=(\d+)(?::(\S+))?", fields):
            entry = made.field.add(name=label, number=int(number), label=3 if star else 1)
            if kind in MESSAGES:
                entry.type_name = f".fastalex.{kind}"
            else:
                entry.type = getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{kind.upper()}")
            if default:
                entry.default_value = default
    # a pool of our own: Caffe's names may lie in the default one
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"fastalex.{name}"))


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """The state_dict in a `.caffemodel` and the name of its variant; see `chain.state_of`.

    The mean and the factor that its data layer names are folded in, else ImageNet's mean.  Raises ValueError, naming
    file and layer, for damaged files and other nets, ImportError where protobuf is missing.
    """
    net = message("Net")()  # which says what to install where protobuf is missing
    from google.protobuf.message import DecodeError

    try:
        net.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} is damaged or no .caffemodel: {error}") from None
    if any(layer.HasField("layer") for layer in net.layers):
        raise ValueError(f"{path} is in Caffe's form of 2013: Caffe's upgrade_net_proto_binary renews it")
    found = [*net.layers, *net.layer]
    return state_of([_layer(layer, path) for layer in found], _pixels(found, path), path)


def _layer(source: Any, path: Path) -> Layer:
    kind = source.type if isinstance(source.type, str) else V1_TYPES.get(source.type, f"V1 layer type {source.type}")
    settings: dict[str, Any] = {}
    dims = {"Convolution": 4, "InnerProduct": 2}.get(kind, 0)
    blobs = enumerate(source.blobs if dims else ())
    parameters = [_blob(blob, 1 if i else dims, f"{path}: layer {source.name}") for i, blob in blobs]
    if kind == "Convolution":
        conv = source.convolution_param
        kind = CONVOLUTION if set(conv.dilation) <= {1} else "dilated convolution"
        settings = {**_window(conv), "groups": conv.group}
    elif kind == "Pooling":
        pool = source.pooling_param
        kind = MAX_POOL if pool.pool == 0 else "average pooling" if pool.pool == 1 else "stochastic pooling"
        kind = f"global {kind}" if pool.global_pooling else kind
        settings = _window(pool)
    elif kind == "LRN":
        norm = source.lrn_param
        kind = LRN if norm.norm_region == 0 else "LRN within channels"
        settings = {"size": norm.local_size, "alpha": norm.alpha, "beta": norm.beta, "k": norm.k}
    elif kind == "ReLU":
        kind = "leaky ReLU" if source.relu_param.negative_slope else RELU
    elif kind == "InnerProduct":
        kind = "transposed linear layer" if source.inner_product_param.transpose else LINEAR
    bottom, top = (names[0] if names else "" for names in (source.bottom, source.top))
    return Layer(source.name, kind, bottom, top, settings, tuple(parameters))


def _window(source: Any) -> dict[str, Any]:
    """Window, step and padding: one number where height and width have the same."""
    found = {}
    for name, field, default in (("kernel_size", "kernel_size", 0), ("stride", "stride", 1), ("padding", "pad", 0)):
        stem = field.partition("_")[0]
        values = [*getattr(source, field), *getattr(source, f"{stem}_h"), *getattr(source, f"{stem}_w")]
        found[name] = default if not values else values[0] if len(set(values)) == 1 else tuple(values)
    return found


def _blob(source: Any, dims: int, where: str) -> Tensor:
    """A tensor of `dims` dimensions.  Files from before 2015 have four, filled up with ones in front."""
    shape = list(source.shape.dim) if source.HasField("shape") else None
    if shape is None:
        shape = [source.num, source.channels, source.height, source.width]
    chunks, dtype = (source.data, "<f4") if source.data else (source.double_data, "<f8")
    content = b"".join(chunks)
    if min(shape, default=0) < 0 or math.prod(shape) * int(dtype[2]) != len(content):
        count = f"{len(content) // int(dtype[2])} numbers"
        raise ValueError(f"{where} has a blob of shape {tuple(shape)} with {count}: the file is damaged")
    while len(shape) > dims and shape[0] == 1:
        shape = shape[1:]
    return torch.tensor(np.frombuffer(content, dtype).reshape(shape))


def _pixels(layers: Sequence[Any], path: Path) -> Pixels:
    """What the data layers subtract and multiply with; the training's and the test's do the same."""
    pixels = Pixels()
    for layer in layers:
        if layer.HasField("transform_param"):
            mean, scale = tuple(layer.transform_param.mean_value), layer.transform_param.scale
            if len(mean) not in (0, 1, 3) or not all(map(math.isfinite, (*mean, scale))):
                raise ValueError(f"{path}: layer {layer.name} has mean_value {mean} and scale {scale}")
            blue, green, red = mean * 3 if len(mean) == 1 else mean or pixels.mean
            return Pixels((blue, green, red), scale)
    return pixels
