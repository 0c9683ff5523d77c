"""What people do with the package `lpips`, in its README, scripts and issues: the same numbers with fastalex.LPIPS."""

import copy

import pytest
import torch

NETS = ("alex", "vgg", "squeeze")


def images(*shape, requires_grad=False):
    return (torch.rand(shape) * 2 - 1).requires_grad_(requires_grad)


def distance_of_a_pair(make):
    """README, basic usage: two images of 64 x 64."""
    loss = make()
    return [loss(*images(2, 1, 3, 64, 64))]


def images_from_zero_to_one(make):
    """README: normalize=True."""
    loss = make()
    return [loss(*torch.rand(2, 1, 3, 64, 64), normalize=True)]


def call_of_forward(make):
    """lpips_2imgs.py: the method itself, and a number out of it."""
    return [torch.tensor(make().forward(*images(2, 1, 3, 64, 64)).item())]


def spatial_map(make):
    """README: spatial=True, a map of the size of the images."""
    loss = make(spatial=True)
    found = loss(*images(2, 2, 3, 64, 48))
    return [found, found.mean()]


def baseline_without_weights(make):
    """README, lpips=False: features as they are."""
    return [make(lpips=False)(*images(2, 2, 3, 64, 64))]


def every_layer(make):
    """retPerLayer=True: the sum, and its parts."""
    total, parts = make()(*images(2, 2, 3, 64, 64), retPerLayer=True)
    return [total, *parts]


def every_layer_as_a_map(make):
    total, parts = make(spatial=True)(*images(2, 1, 3, 64, 64), retPerLayer=True)
    return [total, *parts]


def optimise_an_image(make):
    """lpips_loss.py: the gradient moves the image."""
    loss, target = make(), images(1, 3, 64, 64)
    image = images(1, 3, 64, 64, requires_grad=True)
    optimizer = torch.optim.SGD([image], 1.0)
    out = []
    for _ in range(2):
        distance = loss(image, target)
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
        image.data = image.data.clamp(-1, 1)
        out += [distance.detach(), image.grad.clone()]
    return out


def gradients_of_both(make):
    """Issues: two images of a generator."""
    a, b = images(2, 3, 64, 64, requires_grad=True), images(2, 3, 64, 64, requires_grad=True)
    return [*torch.autograd.grad(make()(a, b).mean(), (a, b))]


def gradient_of_the_second(make):
    """Who gives the target first."""
    a, b = images(2, 3, 64, 64), images(2, 3, 64, 64, requires_grad=True)
    return [*torch.autograd.grad(make()(a, b).mean(), b)]


def loss_of_a_map(make):
    """spatial=True as a loss that is weighted by a mask."""
    a, b = images(1, 3, 64, 64, requires_grad=True), images(1, 3, 64, 64)
    distance = make(spatial=True)(a, b)
    return [*torch.autograd.grad((distance * torch.linspace(0, 1, 64)).mean(), a)]


def one_image_against_many(make):
    """lpips_1dir_allpairs.py, issues: batches of 1 and of N, either way round."""
    loss = make()
    a, b = images(1, 3, 64, 64, requires_grad=True), images(3, 3, 64, 64, requires_grad=True)
    out = []
    for left, right in ((a, b), (b, a)):
        distance = loss(left, right)
        out += [distance, *torch.autograd.grad(distance.sum(), (left, right))]
    return out


def grey_and_unbatched(make):
    """Issues: one channel, and images without a batch, as they broadcast."""
    loss = make()
    grey = images(1, 1, 64, 64, requires_grad=True)
    distance = loss(grey, images(1, 1, 64, 64))
    return [distance, *torch.autograd.grad(distance.sum(), grey), loss(*images(2, 3, 64, 64)), loss(*images(2, 64, 64))]


def odd_sizes(make):
    """Issues: neither square nor a multiple of anything; the smallest that the networks take."""
    loss = make()
    out = []
    for size in ((35, 67), (101, 33), (64, 31 if loss.pnet_type == "alex" else 17)):
        a, b = images(1, 3, *size, requires_grad=True), images(1, 3, *size)
        distance = loss(a, b)
        out += [distance, *torch.autograd.grad(distance.sum(), a)]
    return out


def metric_without_gradients(make):
    """Evaluation: no_grad, a batch, eval()."""
    loss = make().eval()
    with torch.no_grad():
        return [loss(*images(2, 5, 3, 64, 64)).mean()]


def in_double_precision(make):
    """Issues, gradient checks: .double()"""
    loss = make().double()
    a, b = torch.rand(2, 1, 3, 64, 64, dtype=torch.float64)
    a.requires_grad_()
    distance = loss(a, b)
    return [distance, *torch.autograd.grad(distance.sum(), a)]


def copies(make):
    """Issues, data-parallel training: copies of the module, and weights through a state_dict."""
    loss = copy.deepcopy(make())
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    loss.load_state_dict(state, strict=True)
    return [loss(*images(2, 1, 3, 64, 64)), *state.values()]


def train_the_weights(make):
    """trainer.py: gradients of the features' weights and of the whole trunk, without dropout."""
    loss = make(pnet_tune=True, use_dropout=False, eval_mode=False, pretrained=False)
    a, b = images(2, 2, 3, 64, 64)
    loss(a, b).mean().backward()
    wanted = [loss.lin0.model[0].weight, loss.lin4.model[0].weight, next(loss.net.parameters())]
    return [parameter.grad for parameter in wanted]


USES = (
    distance_of_a_pair,
    images_from_zero_to_one,
    call_of_forward,
    spatial_map,
    baseline_without_weights,
    every_layer,
    every_layer_as_a_map,
    optimise_an_image,
    gradients_of_both,
    gradient_of_the_second,
    loss_of_a_map,
    one_image_against_many,
    grey_and_unbatched,
    odd_sizes,
    metric_without_gradients,
    in_double_precision,
    copies,
    train_the_weights,
)


def test_there_are_eighteen():
    assert len(USES) == 18


def check(a, b, deep, gradient):
    """Values within 1e-5 and gradients within 1e-4 of the largest; in float64 1e-9.

    In float32 the deep networks have units whose sum is zero up to rounding, on one side of the ReLU here and on the
    other there: such a unit changes a gradient by more, in the package against float64 as well, by up to 4e-3 of the
    largest element.  There the norm is held to 5e-3.
    """
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert a.abs().max() > 0
    if a.dtype == torch.float64:
        assert (a - b).abs().max() <= 1e-9 * a.abs().max()
    elif gradient and deep:
        assert (a - b).norm() <= 5e-3 * a.norm()
    else:
        assert (a - b).abs().max() <= (1e-4 if gradient else 1e-5) * a.abs().max()


@pytest.mark.parametrize(
    ("use", "net"),
    [
        pytest.param(use, net, marks=() if net == "alex" or use is optimise_an_image else pytest.mark.slow)
        for use in USES
        for net in NETS
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_same_numbers(use, net, both):
    """The same seed for both: the same weights and images."""
    found = []
    for index in (0, 1):
        torch.manual_seed(3)
        found.append(use(lambda index=index, **options: both(net, **options)[index]))
    theirs, ours = found
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        gradient = use is train_the_weights or bool((a < 0).any())  # distances are never negative
        check(a.detach(), b.detach(), net != "alex", gradient)
