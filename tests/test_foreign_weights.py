"""Caffe's AlexNets: read from its own files and from the ONNX zoo's, and what is refused."""

import copy
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from caffe_files import caffe, field, layers_of, net, zoo_file
from small_models import narrow_twins

import fastalex
from fastalex.data.preprocessing import Preprocessing
from fastalex.foreign.chain import IMAGENET_MEAN, Pixels, fold
from fastalex.tolerances import UNIT_ROUNDOFF

USUAL = Preprocessing.for_photos(3, 227)


@pytest.fixture
def small(monkeypatch):
    return narrow_twins(monkeypatch)


def random_state(name, classes=7):
    """Weights like Caffe's, for its pictures: in [-124, 151], blue first."""
    model = fastalex.AlexNet(classes, variant=name)
    state = {key: torch.randn_like(value) * value[0].numel() ** -0.5 for key, value in model.state_dict().items()}
    state["features.0.weight"] /= 50
    return state


def pictures(count=2):
    """8-bit pictures (N, 3, 227, 227), red first, float64."""
    return torch.randint(256, (count, 3, 227, 227)).double()


def as_caffe(images, mean=IMAGENET_MEAN, scale=1.0):
    return (images.flip(1) - torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1)) * scale


def as_usual(images):
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (USUAL.mean, USUAL.std))
    return (images / 255 - mean) / std


def written(path, layers, **form):
    path.write_bytes(net(layers, **form))
    return path


# ---- arithmetic


@pytest.mark.parametrize("name", ["bvlc_alexnet", "caffenet"])
def test_folding_is_exact(small, name):
    """In float64 through the whole net, where only rounding is left."""
    state = {key: value.double() for key, value in random_state(name).items()}
    images, mean, scale = pictures(), (90.0, 120.0, 133.0), 0.5
    expected = caffe(small[name], state, as_caffe(images, mean, scale))
    model = fastalex.AlexNet(7, variant=name).double().eval()
    model.load_state_dict(state)
    folded = fold(state["features.0.weight"], state["features.0.bias"], Pixels(mean, scale), USUAL)
    assert all(value.dtype == torch.float64 for value in folded)
    model.load_state_dict(dict(zip(("features.0.weight", "features.0.bias"), folded, strict=True)), strict=False)
    with torch.no_grad():
        found = model(as_usual(images))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("name", ["bvlc_alexnet", "caffenet"])
def test_both_forms_of_both_nets(small, tmp_path, name, old, legacy):
    state = random_state(name)
    path = written(tmp_path / "net.caffemodel", layers_of(small[name], state), old=old, legacy=legacy)
    model = fastalex.alexnet(path).eval()
    assert model.variant.name == name
    assert model.num_classes == 7
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert key.startswith("features.0.") or torch.equal(value, state[key])
    images = pictures()
    expected = caffe(small[name], state, as_caffe(images))
    with torch.no_grad():
        found = model.double()(as_usual(images))
    # half a unit in the last place of the first weights, each of which meets values up to three deviations
    torch.testing.assert_close(
        found, expected, rtol=0, atol=8 * UNIT_ROUNDOFF[torch.float32] * expected.abs().max().item()
    )


def test_the_mean_and_the_factor_in_the_file(small, tmp_path):
    state = random_state("caffenet")
    layers = layers_of(small["caffenet"], state)
    transform = field(1, 0.25) + b"".join(field(5, value) for value in (10.0, 20.0, 30.0))
    layers[0]["transform"] = transform
    model = fastalex.alexnet(written(tmp_path / "net.caffemodel", layers)).eval().double()
    images = pictures(1)
    expected = caffe(small["caffenet"], state, as_caffe(images, (10.0, 20.0, 30.0), 0.25))
    with torch.no_grad():
        assert (model(as_usual(images)) - expected).abs().max() < 1e-5 * expected.abs().max()
    layers[0]["transform"] = field(5, 10.0) + field(5, 20.0)
    with pytest.raises(ValueError, match=r"net\.caffemodel: layer data has mean_value \(10\.0, 20\.0\)"):
        fastalex.alexnet(written(tmp_path / "net.caffemodel", layers))


def test_doubles_and_a_net_for_deployment(small, tmp_path):
    state = random_state("bvlc_alexnet")
    layers = layers_of(small["bvlc_alexnet"], state, losses=False)
    layers.append({"name": "prob", "type": "Softmax", "bottom": ["fc8"], "top": ["prob"]})
    model = fastalex.alexnet(written(tmp_path / "net.caffemodel", layers, double=True))
    assert torch.equal(model.classifier[6].weight, state["classifier.6.weight"])


# ---- what is refused


def changed(layers, name, **values):
    layers = copy.deepcopy(layers)
    next(layer for layer in layers if layer["name"] == name).update(values)
    return layers


def without(layers, name):
    """The chain closes over the gap."""
    gone = next(layer for layer in layers if layer["name"] == name)
    rest = [layer for layer in copy.deepcopy(layers) if layer["name"] != name]
    for layer in rest:
        layer["bottom"] = [gone["bottom"][0] if b == gone["top"][0] else b for b in layer["bottom"]]
    return rest


@pytest.mark.parametrize("old", [True, False])
def test_other_nets_are_refused_by_name(small, tmp_path, old):
    good = layers_of(small["bvlc_alexnet"], random_state("bvlc_alexnet"))
    conv1 = next(layer for layer in good if layer["name"] == "conv1")
    bad = conv1["blobs"][0].copy()
    bad[0, 0, 0, 0] = np.nan
    pool = field(2, 3) + field(3, 2)
    cases = [
        (changed(good, "conv1", settings=conv1["settings"] + field(3, 2)), "layer conv1 has padding"),
        (changed(good, "conv1", settings=conv1["settings"] + field(6, 2)), "layer conv1 has stride"),
        (changed(good, "conv1", settings=field(4, 11) + field(13, 4) + field(14, 3)), r"conv1 has stride \(4, 3\)"),
        (changed(good, "norm1", settings=field(1, 5) + field(2, 5e-4)), "layer norm1 has alpha 0.0005"),
        (changed(good, "norm1", settings=field(2, 1e-4) + field(5, 2.0)), "layer norm1 has k 2, bvlc_alexnet has 1"),
        (changed(good, "norm1", settings=field(2, 1e-4) + field(4, 1)), "layer norm1 is: LRN within channels"),
        (changed(good, "pool1", settings=field(1, 1) + pool), "layer pool1 is: average pooling"),
        (changed(good, "pool5", settings=pool + field(12, 1)), "layer pool5 is: global max-pooling"),
        (changed(good, "relu3", settings=field(1, 0.1)), "layer relu3 is: leaky ReLU"),
        (changed(good, "conv3", settings=field(4, 3) + field(18, 2)), "layer conv3 is: dilated convolution"),
        (changed(good, "fc7", settings=field(6, 1)), "layer fc7 is: transposed linear layer"),
        (changed(good, "relu6", type="Sigmoid", settings=b""), "relu6 is: (Sigmoid|V1 layer type 19)"),
        (without(good, "norm2"), "where bvlc_alexnet has LRN, layer pool2 is: max-pooling"),
        (without(good, "fc8"), "where bvlc_alexnet has linear layer, the file has no more"),
        (changed(good, "conv4", bottom=["conv1"]), "layer conv4 takes 'conv1', not 'conv3'"),
        (changed(good, "conv1", blobs=[bad, conv1["blobs"][1]]), "the weight of layer conv1 is not finite"),
        (changed(good, "conv1", blobs=conv1["blobs"][:1]), "layer conv1 has 1 blobs, not weight and bias"),
        (changed(good, "fc7", blobs=[np.ones((48, 64)), np.ones(48), np.ones(1)]), "layer fc7 has 3 blobs"),
        (changed(good, "conv1", blobs=[bad[:8], conv1["blobs"][1]]), r"the weight of layer conv1 is \(8, 3, 11, 11\)"),
        ([], "none of its 0 layers has weights"),
    ]
    for layers, reason in cases:
        with pytest.raises(ValueError, match=reason) as error:
            fastalex.alexnet(written(tmp_path / "net.caffemodel", layers, old=old))
        assert "net.caffemodel" in str(error.value)
        assert "\n" not in str(error.value)


def test_damaged_files(small, tmp_path):
    """Cut off anywhere, and with any byte changed: a ValueError, or other numbers where they lie."""
    variant = small["bvlc_alexnet"]
    whole = net(layers_of(variant, random_state("bvlc_alexnet")), old=True)
    path = tmp_path / "net.caffemodel"
    generator = np.random.default_rng(0)
    # the ends of fields near both ends, where nothing but a few bytes are missing
    ends = [*range(40), *range(len(whole) - 300, len(whole) - 260), *generator.integers(len(whole), size=60)]
    reasons = []
    for end in map(int, ends):
        path.write_bytes(whole[:end])
        reasons.append(why_not(path))
        assert reasons[-1] or end > whole.rindex(b"fc8_split") - 10
    assert sum(map(bool, reasons)) > len(ends) // 2
    for at in [*range(60), *map(int, generator.integers(len(whole), size=60))]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        reasons.append(why_not(path))
    assert all(reason is None or str(path) in reason for reason in reasons)


def why_not(path):
    """Why a file cannot be read; None if it can."""
    try:
        fastalex.foreign.caffe.read(path)
    except ValueError as error:
        return str(error)
    return None


def test_a_blob_that_lies_about_its_size(small, tmp_path):
    good = layers_of(small["caffenet"], random_state("caffenet"))
    whole = net(good)
    shape = small["caffenet"].convs[0].channels
    packed = field(7, field(1, bytes([shape, 3, 11, 11])))
    assert packed in whole
    path = tmp_path / "net.caffemodel"
    for sizes in ([shape, 3, 11, 12], [shape * 2, 3, 11, 11]):
        path.write_bytes(whole.replace(packed, field(7, field(1, bytes(sizes)))))
        with pytest.raises(
            ValueError, match=r"layer conv1 has a blob of shape .* with 4356 numbers: the file is damaged"
        ):
            fastalex.alexnet(path)


def test_the_form_of_2013(tmp_path):
    path = tmp_path / "net.caffemodel"
    path.write_bytes(field(2, field(1, field(1, "conv1") + field(2, "conv"))))
    with pytest.raises(ValueError, match=r"net\.caffemodel is in Caffe's form of 2013: .*upgrade_net_proto_binary"):
        fastalex.alexnet(path)


@pytest.mark.parametrize(("package", "suffix"), [("google.protobuf", "caffemodel"), ("onnx", "onnx")])
def test_a_missing_package_is_named(monkeypatch, tmp_path, package, suffix):
    import sys

    fastalex.foreign.caffe.message.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / f"net.{suffix}").write_bytes(b"")
    with pytest.raises(ImportError, match=r"pip install 'fastalex\[(caffe|onnx)\]'"):
        fastalex.alexnet(tmp_path / f"net.{suffix}")


# ---- the ONNX zoo


@pytest.fixture
def light():
    """The zoo's net with its weights left out, as it comes with the package onnx."""
    onnx = pytest.importorskip("onnx")
    return Path(onnx.__file__).parent / "backend/test/data/light/light_bvlc_alexnet.onnx"


def test_the_zoos_own_file(light):
    model = fastalex.alexnet(light)
    assert (model.variant.name, model.num_classes) == ("bvlc_alexnet", 1000)
    value = torch.tensor(0.02)
    weight, bias = fold(value.expand(96, 3, 11, 11), value.expand(96), Pixels(), USUAL)
    assert torch.equal(model.features[0].weight, weight.float())
    assert torch.equal(model.features[0].bias, bias.float())
    others = [v for k, v in model.state_dict().items() if not k.startswith("features.0.")]
    assert all((v == value).all() for v in others)


def test_the_zoos_graph_computes_the_same(small, light, tmp_path):
    """At 227, as the net was trained, by another implementation."""
    import onnx

    runtime = pytest.importorskip("onnxruntime")
    state = random_state("bvlc_alexnet")
    model = zoo_file(light, state)
    onnx.save(model, tmp_path / "net.onnx")
    loaded = fastalex.alexnet(tmp_path / "net.onnx").eval()
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for image in pictures():
        (expected,) = session.run(None, {"data_0": as_caffe(image[None]).float().numpy()})
        with torch.no_grad():
            found = loaded.double()(as_usual(image[None])).softmax(1)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("opset", [3, 12])
def test_older_and_newer_opsets(small, light, tmp_path, opset):
    """What changed between them: attributes and inputs of Reshape, Gemm and Dropout, and the list of inputs."""
    import onnx

    state = random_state("bvlc_alexnet")
    model = zoo_file(light, state, crop=224, raw=opset == 12)
    model.opset_import[0].version = opset
    for node in model.graph.node:
        if opset == 3 and node.op_type == "Reshape":
            node.attribute.append(onnx.helper.make_attribute("shape", [1, -1]))
            del node.input[1:]
        if opset == 3 and node.op_type == "Gemm":
            node.attribute.append(onnx.helper.make_attribute("broadcast", 1))
        if opset == 3 and node.op_type == "Dropout":
            node.attribute.append(onnx.helper.make_attribute("is_test", 1))
        if opset == 12 and node.op_type == "Dropout":
            del node.attribute[:]
        if opset == 12 and node.op_type == "Gemm":  # transB is one of two ways to write it
            weight = next(t for t in model.graph.initializer if t.name == node.input[1])
            weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight).T.copy(), weight.name))
            del node.attribute[:]
    if opset == 3:
        shapes = [(t.name, t.data_type, t.dims) for t in model.graph.initializer]
        model.graph.input.extend([onnx.helper.make_tensor_value_info(*shape) for shape in shapes])
    onnx.save(model, tmp_path / "net.onnx")
    loaded = fastalex.alexnet(tmp_path / "net.onnx").state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in list(state)[2:])


def test_other_graphs_are_refused(small, light, tmp_path):
    import onnx

    def attribute(op, name, value):
        def change(model):
            node = next(node for node in model.graph.node if node.op_type == op)
            kept = [a for a in node.attribute if a.name != name]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

        return change

    def quantised(model):
        node = next(node for node in model.graph.node if node.op_type == "Conv")
        node.input[1] = "dequantised"

    path = tmp_path / "net.onnx"
    for change, reason in (
        (attribute("Conv", "pads", [2, 2, 2, 2]), "layer n0 has padding 2, bvlc_alexnet has 0"),
        (attribute("Conv", "pads", [0, 0, 1, 1]), r"layer n0 has padding \(0, 0, 1, 1\)"),
        (attribute("Conv", "dilations", [2, 2]), "n0 is: Conv with auto_pad or dilations"),
        (attribute("Conv", "auto_pad", "SAME_UPPER"), "n0 is: Conv with auto_pad or dilations"),
        (attribute("LRN", "bias", 2.0), "layer n2 has k 2, bvlc_alexnet has 1"),
        (attribute("MaxPool", "strides", [3, 3]), "layer n3 has stride 3"),
        (attribute("Gemm", "alpha", 2.0), "n16 is: Gemm with alpha, beta or transA"),
        (quantised, "dequantised of layer n0 is no constant"),
        (lambda model: setattr(model, "producer_name", "pytorch"), "comes from PyTorch, not from Caffe"),
    ):
        model = zoo_file(light, random_state("bvlc_alexnet"))
        change(model)
        onnx.save(model, path)
        with pytest.raises(ValueError, match=reason) as error:
            fastalex.alexnet(path)
        assert str(path) in str(error.value)
    for content in (b"", b"not a graph", path.read_bytes()[:5000]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"net\.onnx"):
            fastalex.alexnet(path)


def test_the_zoos_other_nets_are_refused(light):
    others = sorted(set(light.parent.glob("light_*.onnx")) - {light})
    assert len(others) > 5
    for path in others:
        with pytest.raises(
            ValueError, match=f"{path.name}.*(is none of bvlc_alexnet, caffenet|n0 has kernel_size|takes|no constant)"
        ):
            fastalex.alexnet(path)


def test_a_shape_that_asks_for_too_much(light, tmp_path):
    import onnx

    model = onnx.load(light)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, sizes, reason in (
        ("conv1_w_0", [2**40, 3, 11, 11], "the weight of layer n0 is"),
        ("conv1_w_0", [-5, 3, 11, 11], "cannot be of shape"),
        ("fc8_b_0", [2**40], "the number of classes must be at most 65536"),
    ):
        before = tensors[f"{name}__SHAPE"].raw_data
        tensors[f"{name}__SHAPE"].raw_data = struct.pack(f"<{len(sizes)}q", *sizes)
        onnx.save(model, tmp_path / "net.onnx")
        with pytest.raises(ValueError, match=reason):
            fastalex.alexnet(tmp_path / "net.onnx")
        tensors[f"{name}__SHAPE"].raw_data = before
