"""Weights of other programs, and files that are damaged or lie: loaded, or one line that names file and field."""

import json
from dataclasses import replace

import pytest
import torch
from small_models import narrow

import fastalex
from fastalex.card import METADATA_KEY, ModelCard
from fastalex.checkpoint import load_model, load_state, save_model
from fastalex.data.preprocessing import Preprocessing
from fastalex.training.recipes import demo_variant
from fastalex.variants import VARIANTS, Variant
from fastalex.weights import alexnet


@pytest.fixture(scope="module")
def small():
    """torchvision's architecture under its own name, an eighth as wide."""
    torch.manual_seed(0)
    return fastalex.AlexNet(5, variant=narrow("torchvision"))


def in_module(state):
    return {f"module.{name}": value for name, value in state.items()}


WRAPPINGS = {
    "state_dict": lambda s: s,
    "references": lambda s: {"model": s, "epoch": 1, "optimizer": {"state": {}}},
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": 0.1},
    "DataParallel": in_module,
    "imagenet example": lambda s: {"arch": "alexnet", "best_acc1": torch.tensor(0.5), "state_dict": in_module(s)},
    "features only": lambda s: {name.replace("features.", "features.module."): v for name, v in s.items()},
    "compiled": lambda s: {f"_orig_mod.{name}": value for name, value in s.items()},
    "EMA": lambda s: {"model_ema": {"n_averaged": torch.tensor(7), **in_module(s)}},
    "Lightning": lambda s: {"state_dict": {f"model.{n}": v for n, v in s.items()}, "pytorch-lightning_version": "2"},
    "half": lambda s: {name: value.half() for name, value in s.items()},
    "bfloat16": lambda s: {"net": {name: value.bfloat16() for name, value in s.items()}},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
@pytest.mark.parametrize("ending", ["pth", "pth.tar", "ckpt"])
def test_what_other_programs_save(small, wrap, ending, tmp_path):
    path = tmp_path / f"weights.{ending}"
    torch.save(wrap(small.state_dict()), path)
    model = alexnet(path, variant=small.variant)
    for a, b in zip(model.parameters(), small.parameters(), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


REFUSED = {
    "no bytes": (b"", "holds no weights that PyTorch reads"),
    "a page": (b"<html>404</html>", "holds no weights that PyTorch reads"),
    "a list": ([1, 2], "holds a list, not a state_dict"),
    "nothing": ({}, "holds no weights"),
    "a number": ({"model": {"features.0.weight": 3}}, "its entry 'features.0.weight' is a int"),
    "integers": ({"features.0.weight": torch.ones(2, dtype=torch.int8)}, r"features\.0\.weight is torch\.int8"),
    "another network": ({"features.0.weight": torch.ones(2)}, "fit no variant"),
    "a scalar": ({"classifier.6.weight": torch.tensor(1.0)}, "fit no variant"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_none_of_them(content, message, tmp_path):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        alexnet(path)
    assert str(path) in str(caught.value)


def test_the_variant_that_fits_is_named():
    model = fastalex.AlexNet(7, variant="torchvision")
    with pytest.raises(RuntimeError, match=r'fit variant "torchvision", not "paper": build AlexNet\(7, variant="torch'):
        fastalex.AlexNet(7).load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        model.load_state_dict({})
    assert "fit variant" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- descriptions
@pytest.fixture(scope="module")
def described(tmp_path_factory):
    variant = demo_variant(channels=3)
    card = ModelCard(variant, ("cat", "dog"), Preprocessing.for_photos(3, variant.crop))
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    save_model(path, card.build(), card)
    return path


def rewritten(path, target, change):
    """The file with other metadata."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    meta = json.loads(header["__metadata__"][METADATA_KEY])
    meta = change(meta) or meta
    header["__metadata__"][METADATA_KEY] = json.dumps(meta)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    target.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    return target


def test_what_was_written_is_read(described, tmp_path):
    load_model(rewritten(described, tmp_path / "same.safetensors", lambda meta: None))


WRONG = [None, -1, 0.5, float("nan"), "frist", [], ["a", "b"], {}, True]


# fields for which one of these is a legal value
LEGAL = ("dropout", "std", "bias", "mean", "name", "classes", "norm", "pool")


def places(value, path=()):
    if isinstance(value, dict):
        return [p for key, inner in value.items() for p in [(*path, key), *places(inner, (*path, key))]]
    if isinstance(value, list):
        return [p for i, inner in enumerate(value[:1]) for p in [(*path, i), *places(inner, (*path, i))]]
    return []


def test_no_wrong_value_makes_another_network(described, tmp_path):
    """Every field with every wrong value: refused, in words that name the file, or the same as without."""
    x = torch.randn(1, 3, 64, 64)
    model, card = load_model(described)
    meta = json.loads(card.to_json())
    with torch.no_grad():
        expected = model(x)
        for place in places(meta):
            for value in WRONG:

                def change(meta, place=place, value=value):
                    for key in place[:-1]:
                        meta = meta[key]
                    meta[place[-1]] = value

                path = rewritten(described, tmp_path / "wrong.safetensors", change)
                try:
                    found, other = load_model(path)
                except ValueError as error:
                    assert str(path) in str(error)  # noqa: PT017
                    continue
                what = ".".join(map(str, place))
                if not any(name in what for name in LEGAL):
                    assert other == card, f"{what} = {value!r} was accepted"
                    assert torch.equal(found(x), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda meta: meta["variant"].update(relu="frist"),
            r"variant\.relu must be one of 'first', 'last', got 'frist'",
        ),
        (lambda meta: meta["variant"]["convs"][0].update(stride=1.5), r"variant\.convs\[0\]\.stride must be a whole"),
        (lambda meta: meta["variant"].update(colour=1), r"variant has a field 'colour'"),
        (lambda meta: meta["variant"].pop("relu"), r"variant lacks the field 'relu'"),
        (lambda meta: meta["preprocessing"].update(crop=None), r"preprocessing\.crop must be a whole number"),
        (lambda meta: meta["preprocessing"].update(std=[0.0, 1, 1]), r"preprocessing\.std must be above 0"),
        (lambda meta: meta["variant"]["convs"][0].update(bias=2**64), r"bias must be a finite number, got 18446744"),
        (lambda meta: meta["variant"].update(hidden_std=10**400), r"hidden_std must be a finite number of at least 0"),
        (lambda meta: meta.update(classes=[]), "classes must be one name or more"),
        (lambda meta: [meta], "must be an object with fields"),
    ],
)
def test_the_field_is_named(change, message, described, tmp_path):
    def only_lists(meta):
        result = change(meta)
        return result if isinstance(result, list) else None

    path = rewritten(described, tmp_path / "wrong.safetensors", only_lists)
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_variants_of_ones_own_are_checked():
    with pytest.raises(ValueError, match="relu must be one of 'first', 'last', got 'middle'"):
        Variant("mine", VARIANTS["paper"].convs, relu="middle")
    with pytest.raises(ValueError, match="stride must be a whole number of at least 1, got 0"):
        replace(VARIANTS["paper"].convs[0], stride=0)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x02]."], ids=["empty", "half", "a list"])
def test_states_that_are_none(content, tmp_path):
    path = tmp_path / "state.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.pt cannot be read"):
        load_state(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="holds a list"):
        load_state(path)
