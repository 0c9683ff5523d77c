"""Calls in any order with changes of the weights between them: the result is that of a model made at that moment."""

import copy
import io

import torch
from fuzz_cases import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastalex
from fastalex.functional import ResponseNorm
from fastalex.variants import Conv, Variant

TINY = Variant(
    "tiny",
    (Conv(8, 5, stride=2, padding=2, norm=ResponseNorm(5, 1.0), pool=3), Conv(16, 3, padding=1, groups=2, pool=3)),
    crop=32,
    hidden=(12, 8),
    features_size=3,
)


class Torchs(nn.Module):
    """TINY in modules of torch.nn."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.Sequential(nn.LocalResponseNorm(5, 1.0), nn.MaxPool2d(3, 2))),
            *(nn.Conv2d(8, 16, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(3)
        hidden = [nn.Identity(), nn.Linear(144, 12), nn.ReLU(), nn.Identity(), nn.Linear(12, 8), nn.ReLU()]
        self.classifier = nn.Sequential(*hidden, nn.Linear(8, 5))

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def inference(model, images, random):
    with torch.no_grad():
        model(images)


def in_inference_mode(model, images, random):
    with torch.inference_mode():
        model(images)


def training_step(model, images, random):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    optimizer.zero_grad()
    model(images).square().sum().clamp(max=10).backward()
    optimizer.step()


def one_filter(model, images, random):
    weight = random.choice(list(model.parameters()))
    weight.data[random.randrange(len(weight))] *= -1


def one_value_by_numpy(model, images, random):
    weight = random.choice(list(model.parameters()))
    weight.detach().numpy().reshape(-1)[random.randrange(weight.numel())] = 0.5


def in_place(model, images, random):
    with torch.no_grad():
        random.choice(list(model.parameters())).mul_(0.5)


def other_weights(model, images, random):
    model.load_state_dict({name: value + 0.01 for name, value in model.state_dict().items()})


def assigned(model, images, random):
    state = {name: (value * 0.9).clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def channels_last(model, images, random):
    model.to(memory_format=torch.channels_last)


def contiguous(model, images, random):
    model.to(memory_format=torch.contiguous_format)


def there_and_back(model, images, random):
    model.double()(images.double())
    model.float()


def swapped(model, images, random):
    a, b = model.classifier[4], model.classifier[6]
    with torch.no_grad():
        a.weight.data, b.weight.data = a.weight.data.flip(0), b.weight.data.flip(0)


def saved_and_loaded(model, images, random):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file))


def a_copy(model, images, random):
    with torch.no_grad():
        copy.deepcopy(model)(images)


STEPS = [inference, inference, in_inference_mode, training_step, one_filter, one_value_by_numpy, in_place]
STEPS += [other_weights, assigned, channels_last, contiguous, there_and_back, swapped, saved_and_loaded, a_copy]


@examples(25)
@given(
    st.sampled_from(["AlexNet", "fused"]),
    st.lists(st.sampled_from(STEPS), min_size=2, max_size=12),
    st.integers(0, 2**31),
    st.randoms(use_true_random=False),
)
def test_calls_and_edits(kind, steps, seed, random):
    torch.manual_seed(seed)
    theirs = Torchs().eval()
    model = fastalex.fuse(theirs) if kind == "fused" else fastalex.AlexNet(5, 0.0, variant=TINY).eval()
    names = list(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    for step in steps:
        step(model, images, random)
        theirs.load_state_dict(dict(zip(theirs.state_dict(), model.state_dict().values(), strict=True)))
        with torch.no_grad():
            torch.testing.assert_close(model(images), theirs(images), rtol=1e-3, atol=1e-4)
    assert list(model.state_dict()) == names
