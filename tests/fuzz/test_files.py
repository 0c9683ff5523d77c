"""Every kind of file that is read: cut, with flipped bytes, filled with others.  Read, or refused in one line."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from caffe_files import layers_of, net, zoo_file
from fuzz_cases import examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_models import narrow_twins

from fastalex import results
from fastalex.alexnet import AlexNet
from fastalex.checkpoint import STATE_FORMAT, ModelCard, load_model, load_state, save_model
from fastalex.data import sources
from fastalex.data.decode import decode
from fastalex.data.pack import pack
from fastalex.data.packed import PackedSet, verify
from fastalex.data.preprocessing import Preprocessing
from fastalex.evaluation.classifier import read_picture
from fastalex.gpu import dispatch
from fastalex.variants import Conv, Variant
from fastalex.weights import alexnet

TINY = Variant("tiny", (Conv(4, 3, stride=2, pool=2),), crop=16, hidden=(4, 4), features_size=2)
LOOKS = Preprocessing(3, 18, 16, (0.5,) * 3, (0.5,) * 3)
# what the command line turns into one line and exit code 2
REFUSALS = (OSError, ValueError, FloatingPointError)


def picture(format, mode="RGB"):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24, 3), np.uint8)).convert(mode)
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


PICTURES = {f"{f} {m}": picture(f, m) for f, m in (("PNG", "RGB"), ("PNG", "P"), ("JPEG", "RGB"), ("JPEG", "L"),
            ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB"), ("WEBP", "RGB"), ("PPM", "RGB"))}  # fmt: skip


@st.composite
def damage(draw, content):
    """The content with some bytes changed, cut, moved or put in."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(found) - 1)))
        kind = draw(st.sampled_from(["flip", "flip", "cut", "put", "zero", "double"]))
        if kind == "flip" and found:
            found[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del found[place:]
        elif kind == "put":
            found[place:place] = draw(st.binary(max_size=12))
        elif kind == "zero":
            found[place : place + 16] = bytes(len(found[place : place + 16]))
        elif kind == "double":
            found[place:place] = found[place : place + 64]
    return bytes(found)


def read_or_refused(function, *args):
    """The result, or None where it was refused in words."""
    try:
        return function(*args)
    except REFUSALS as error:
        assert str(error).strip(), repr(error)  # noqa: PT017
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@examples(80)
@given(st.sampled_from(sorted(PICTURES)), st.data())
def test_pictures(folder, name, data):
    content = data.draw(damage(PICTURES[name]))
    found = read_or_refused(decode, content, 16)
    assert found is None or found.shape == (16, 16, 3)
    path = folder / "picture"
    path.write_bytes(content)
    found = read_or_refused(read_picture, path, LOOKS)
    assert found is None or found.shape[0] == 3


def json_damage(text):
    """A value somewhere in a JSON text replaced by another, a name changed, or a part left out."""

    @st.composite
    def change(draw):
        content = json.loads(text)
        place = content
        for _ in range(draw(st.integers(0, 5))):
            if not isinstance(place, dict | list) or not place:
                break
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if draw(st.booleans()) or not isinstance(place[key], dict | list):
                kind = draw(st.sampled_from(["value", "value", "gone", "more"]))
                if kind == "value":
                    place[key] = draw(WRONG)
                elif kind == "gone":
                    del place[key]
                elif isinstance(place, dict):
                    place["colour"] = place[key]
                else:
                    place.append(place[key])
                break
            place = place[key]
        return json.dumps(content)

    return change()


WRONG = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2**70), st.floats(), st.text(max_size=4), st.just([]), st.just({}),
    st.just([["a"]]),
)  # fmt: skip


@pytest.fixture(scope="module")
def safetensors(folder):
    card = ModelCard(TINY, ("cat", "dog"), LOOKS)
    save_model(folder / "good.safetensors", AlexNet.from_card(card), card)
    return (folder / "good.safetensors").read_bytes()


@examples(80)
@given(st.data())
def test_models(folder, safetensors, data):
    length = int.from_bytes(safetensors[:8], "little")
    header, body = json.loads(safetensors[8 : 8 + length]), safetensors[8 + length :]
    if data.draw(st.booleans()):
        content = data.draw(damage(safetensors))
    else:
        header["__metadata__"]["fastalex"] = data.draw(json_damage(header["__metadata__"]["fastalex"]))
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        content = len(text).to_bytes(8, "little") + text + body
    path = folder / "model.safetensors"
    path.write_bytes(content)
    found = read_or_refused(load_model, path)
    read_or_refused(alexnet, path)
    if found is not None:
        assert AlexNet.from_card(found[1]).variant == found[0].variant


@examples(40)
@given(st.data())
def test_checkpoints_and_states(folder, data):
    card = ModelCard(TINY, ("cat", "dog"), LOOKS)
    file = io.BytesIO()
    torch.save({"format": STATE_FORMAT, "model": AlexNet.from_card(card).state_dict()}, file)
    content = data.draw(damage(file.getvalue()))
    for name, read in (("weights.pth", alexnet), ("state.pt", load_state)):
        (folder / name).write_bytes(content)
        read_or_refused(read, folder / name)


@pytest.fixture(scope="module")
def caffe_files():
    """{suffix: bytes} of Caffe's net, narrow, in each kind of file that it comes in."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("google.protobuf")
    with pytest.MonkeyPatch.context() as patch:
        twins = narrow_twins(patch, 24)
        state = AlexNet(2, variant="bvlc_alexnet").state_dict()
        layers = layers_of(twins["bvlc_alexnet"], state)
        light = Path(onnx.__file__).parent / "backend/test/data/light/light_bvlc_alexnet.onnx"
        return {
            "old.caffemodel": net(layers, old=True, legacy=True),
            "new.caffemodel": net(layers),
            "zoo.onnx": zoo_file(light, state).SerializeToString(),
        }


@examples(60)
@given(st.sampled_from(["old.caffemodel", "new.caffemodel", "zoo.onnx"]), st.data())
def test_caffes_files(folder, caffe_files, name, data):
    """Most of their bytes are weights; what lies between, the layers, is damaged as often as they are."""
    content = caffe_files[name]
    if data.draw(st.booleans()):
        content = data.draw(damage(content))
    else:
        layer = data.draw(st.sampled_from([b"conv", b"pool", b"norm", b"fc", b"relu", b"n0", b"r"]))
        place = max(0, content.find(layer, data.draw(st.integers(0, len(content)))) - 40)
        content = content[:place] + data.draw(damage(content[place : place + 120])) + content[place + 120 :]
    path = folder / name
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        narrow_twins(patch, 24)
        model = read_or_refused(alexnet, path)
    assert model is None or all(value.isfinite().all() for value in model.parameters())


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / "set" / split / name).mkdir(parents=True)
            for i in range(3):
                (root / "set" / split / name / f"{i}.png").write_bytes(PICTURES["PNG RGB"])
    pack(root / "set", root / "packed", size=18, workers=0)
    return root / "packed"


@examples(40)
@given(st.data())
def test_packed_sets(packed, data):
    names = sorted(path.name for path in packed.iterdir() if path.is_file())
    path = packed / data.draw(st.sampled_from([*names, "meta.json", "meta.json"]))
    before = path.read_bytes()
    try:
        if path.name == "meta.json" and data.draw(st.booleans()):
            path.write_text(data.draw(json_damage(before.decode())))
        else:
            path.write_bytes(data.draw(damage(before)))

        def read():
            images = PackedSet(packed, LOOKS, threads=0)
            return [batch for split in ("train", "test") for batch in images.batches(split, [torch.arange(6)])]

        read_or_refused(read)
        read_or_refused(verify, packed)
    finally:
        path.write_bytes(before)


def tar_of(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


@examples(60)
@given(st.sampled_from(["set.tar", "labels.txt", "labels.csv", "synset_words.txt", "data_batch_1"]), st.data())
def test_sources(tmp_path_factory, name, data):
    root = tmp_path_factory.mktemp("source")
    if name == "set.tar":
        content = tar_of({"a.png": PICTURES["PNG RGB"], "a.cls": b"0", "b.png": PICTURES["PNG P"], "b.cls": b"1"})
        (root / name).write_bytes(data.draw(damage(content)))
        found = read_or_refused(sources.find, root)
    elif name == "data_batch_1":
        for number in (1, 2, 3, 4, 5):
            (root / f"data_batch_{number}").write_bytes(data.draw(st.binary(max_size=50)))
        (root / "test_batch").write_bytes(b"\\x80")
        found = read_or_refused(sources.find, root)
    else:
        for split, below in (("train", "n01"), ("val", "")):
            (root / split / below).mkdir(parents=True)
            (root / split / below / "a.png").write_bytes(PICTURES["PNG RGB"])
        text = {"labels.txt": b"a.png 0\n", "labels.csv": b"ImageId,P\na,n01 1 2 3 4\n", "synset_words.txt": b"n01 x\n"}
        (root / name).write_bytes(data.draw(damage(text[name])))
        truth = root / name if name.startswith("labels") else root / "val.txt"
        if not truth.exists():
            truth.write_text("0\n")
        found = read_or_refused(sources.find, root, truth)
    if found is not None:
        for items in found.splits.values():
            assert all(0 <= item.label < len(found.classes) for item in items)
            for item in items:
                read_or_refused(sources.load, found.kind, found.root, item)


@examples(40)
@given(st.data())
def test_tables_of_measurements(folder, data):
    good = json.dumps({"format": dispatch.FORMAT, "measurements": {"cpu": {"a": {"candidate": "library",
                       "milliseconds": {"library": 1.0}, "refused": {}, "batch": 1}}}})  # fmt: skip
    path = folder / "dispatch.json"
    if data.draw(st.booleans()):
        path.write_text(data.draw(json_damage(good)))
    else:
        path.write_bytes(data.draw(damage(good.encode())))
    found = dispatch.read_table(path)
    assert isinstance(found, dict)
    read_or_refused(results.load, path)
