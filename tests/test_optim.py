"""`fastalex.optim.SGD`: torch's SGD where nothing is split, torch's weights bit for bit where they are."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from fastalex import backend
from fastalex.optim import SGD
from fastalex.training.optimizer import LARS

OPTIONS = [
    {"momentum": 0.9, "weight_decay": 5e-4},
    {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.3, "maximize": True},
    {"weight_decay": 5e-4},
]


def parameters():
    """A matrix, a bias, a convolution's weight in channels_last."""
    torch.manual_seed(1)
    conv = torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(x) for x in (torch.randn(37, 11), torch.randn(5), conv)]


def gradients(step):
    """The same for every optimizer; those of the convolution come in another layout every other time."""
    generator = torch.Generator().manual_seed(step)
    grads = [torch.randn(p.shape, generator=generator).bfloat16() for p in parameters()]
    return [g.contiguous(memory_format=torch.channels_last) if g.dim() == 4 and step % 2 else g for g in grads]


def take_steps(optimizer, steps=range(4)):
    """Steps with these gradients, in each parameter's dtype."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    for i in steps:
        for parameter, grad in zip(own, gradients(i), strict=True):
            # PyTorch's fused update of a CPU reads both in the order in which they lie
            parameter.grad = torch.empty_like(parameter).copy_(grad) if parameter.dtype == torch.float32 else grad
        optimizer.step()
    return own


def weights(optimizer):
    """fp32, whole."""
    with optimizer.joined():
        return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=0)


# ---- torch's


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_torchs(options, how):
    theirs, ours = (kind(parameters(), 0.1, **options, **how) for kind in (torch.optim.SGD, SGD))
    assert_equal(take_steps(ours), take_steps(theirs))
    assert ours.param_groups[0].keys() == theirs.param_groups[0].keys()
    assert ours.defaults == theirs.defaults
    # each takes up the other's state
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in (theirs, ours)]
    ours.load_state_dict(states[0])
    theirs.load_state_dict(states[1])
    assert_equal(take_steps(ours, range(4, 6)), take_steps(theirs, range(4, 6)))
    assert not ours._joined


def test_differentiable_as_torchs():
    results = []
    for kind in (torch.optim.SGD, SGD):
        start = torch.tensor([1.0, 2.0], requires_grad=True)
        weight = start.clone()
        optimizer = kind([weight.detach()], 0.1, differentiable=True)
        optimizer.param_groups[0]["params"] = [weight]
        weight.retain_grad()
        weight.grad = 2 * start
        optimizer.step()
        results.append(torch.autograd.grad(weight.sum(), start)[0])
    assert torch.equal(*results)


# ---- split


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_split_weights_are_those_of_torchs_fused_update(options):
    theirs, ours = (
        torch.optim.SGD(parameters(), 0.1, fused=True, **options),
        SGD(parameters(), 0.1, **options, split=True),
    )
    expected = take_steps(theirs, range(20))
    halves = take_steps(ours, range(20))
    assert_equal(weights(ours), expected)
    for parameter, whole in zip(halves, expected, strict=True):
        assert parameter.dtype == torch.bfloat16
        assert parameter.stride() == whole.stride()
        # the nearest number; a tie is not likely here
        assert_equal([parameter], [whole.bfloat16()])
    if "momentum" in options:
        buffers = [[o.state[p]["momentum_buffer"] for p in o.param_groups[0]["params"]] for o in (ours, theirs)]
        assert_equal(*buffers)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_kernel_agrees(options):
    """It rounds less often than PyTorch's update on a CPU."""
    ours, same = (SGD(parameters(), 0.1, **options, split=True) for _ in range(2))
    take_steps(ours)
    with backend.use("triton"):
        take_steps(same)
    for a, b in zip(weights(ours), weights(same), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def written_in_place(p, value):
    with torch.no_grad():
        p.fill_(value)


def written_with_copy(p, value):
    with torch.no_grad():
        p.copy_(torch.full_like(p, value))


def written_as_data(p, value):
    p.data.fill_(value)


def replaced_data(p, value):
    p.data = torch.full_like(p, value)


def written_by_numpy(p, value):
    p.detach().view(torch.int16).numpy()[...] = torch.tensor(value).bfloat16().view(torch.int16).item()


def written_through_a_view(p, value):
    p.detach().view(-1)[:] = value


def replaced_storage(p, value):
    with torch.no_grad():
        p.set_(torch.full_like(p, value))


def loaded(p, value):
    module = nn.Module()
    module.p = p
    module.load_state_dict({"p": torch.full_like(p, value, dtype=torch.float32)})


WAYS = [
    *(written_in_place, written_with_copy, written_as_data, replaced_data, written_by_numpy, written_through_a_view),
    *(replaced_storage, loaded),
]


@pytest.mark.parametrize("mode", ["auto", "triton"])
@pytest.mark.parametrize("value", [0.0, 2.5])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_whoever_changes_a_weight_has_changed_it(way, value, mode):
    """The next step starts from what was written, up to the half of its last bit."""
    parameter = nn.Parameter(torch.randn(40))
    optimizer = SGD([parameter], 0.5, split=True)
    with backend.use(mode):
        for _ in range(2):
            parameter.grad = torch.randn(40).bfloat16()
            optimizer.step()
        way(parameter, value)
        assert torch.equal(parameter.detach(), torch.full((40,), value, dtype=torch.bfloat16))
        [whole] = weights(optimizer)
        assert (whole - value).abs().max() <= value * 2**-8 + 2**-134  # half of the last bit, also of zero's
        grad = parameter.grad = torch.randn(40).bfloat16()
        optimizer.step()
    torch.testing.assert_close(weights(optimizer)[0], value - 0.5 * grad.float(), rtol=0, atol=value * 2**-8 + 1e-6)


def test_another_optimizer_has_changed_it():
    parameter = nn.Parameter(torch.ones(8))
    ours, other = SGD([parameter], 0.1, split=True), torch.optim.SGD([parameter], 0.5)
    parameter.grad = torch.ones(8).bfloat16()
    other.step()
    ours.step()
    torch.testing.assert_close(weights(ours)[0], torch.full((8,), 0.4))


def test_a_model_learns_in_halves_what_it_learns_whole():
    """Automatic mixed precision beside it: forward and backward see the same numbers."""
    torch.manual_seed(0)
    images, labels = torch.randn(32, 1, 8, 8), torch.randint(0, 4, (32,))
    whole = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    split = copy.deepcopy(whole)
    losses = []
    for model, optimizer in (
        (whole, torch.optim.SGD(whole.parameters(), 0.05, 0.9, fused=True)),
        (split, SGD(split.parameters(), 0.05, 0.9, split=True)),
    ):
        of_model = []
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            of_model.append(loss.item())
        losses.append(of_model)
    assert losses[1][0] == losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1][-1] < 0.1 * losses[1][0]


# ---- states


def test_a_split_run_goes_on_where_it_was_saved():
    """From bf16 parameters and the optimizer's state, whichever is loaded first."""
    options = {"momentum": 0.9, "split": True}
    optimizer = SGD(parameters(), 0.1, **options)
    own = take_steps(optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": [p.detach() for p in own], "optimizer": optimizer.state_dict()}, file)
    take_steps(optimizer, range(3, 6))
    for optimizer_first in (False, True):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed = SGD([nn.Parameter(torch.zeros_like(p)) for p in parameters()], 0.7, **options)
        if optimizer_first:
            resumed.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for parameter, value in zip(resumed.param_groups[0]["params"], saved["model"], strict=True):
                parameter.copy_(value)
        if not optimizer_first:
            resumed.load_state_dict(saved["optimizer"])
        take_steps(resumed, range(3, 6))
        assert_equal(weights(resumed), weights(optimizer))


def test_joined_is_torchs():
    """fp32 weights, torch's state; from there torch's optimizer goes on, and back."""
    ours = SGD(parameters(), 0.1, momentum=0.9, fused=True, split=True)
    reference = torch.optim.SGD(parameters(), 0.1, momentum=0.9, fused=True)
    take_steps(ours, range(3))
    take_steps(reference, range(3))
    with ours.joined(), ours.joined():
        assert ours.state_dict()["state"].keys() == reference.state_dict()["state"].keys()
        assert ours.state_dict()["state"][0].keys() == {"momentum_buffer"}
        own = ours.param_groups[0]["params"]
        theirs = torch.optim.SGD(own, 0.1, momentum=0.9, fused=True)
        theirs.load_state_dict(ours.state_dict())
        take_steps(theirs, range(3, 5))
        ours.load_state_dict(theirs.state_dict())
    take_steps(ours, range(5, 7))
    assert_equal(weights(ours), take_steps(reference, range(3, 7)))


def test_joined_keeps_memory_and_gradients():
    ours = SGD(parameters(), 0.1, momentum=0.9, split=True)
    own = take_steps(ours, range(1))
    before = [(p.data_ptr(), ours.state[p]["lower_half"].data_ptr(), p.grad) for p in own]

    def change_and_fail():
        assert all(p.dtype == torch.float32 and p.grad is None for p in own)
        with torch.no_grad():
            own[1].fill_(1 / 3)
        raise KeyError

    with pytest.raises(KeyError), ours.joined():
        change_and_fail()
    assert [(p.data_ptr(), ours.state[p]["lower_half"].data_ptr(), p.grad) for p in own] == before
    assert torch.equal(weights(ours)[1], torch.full((5,), 1 / 3))


def test_a_split_optimizer_takes_torchs_state():
    theirs = torch.optim.SGD(parameters(), 0.3, momentum=0.9, foreach=True)
    take_steps(theirs, range(2))
    ours = SGD(parameters(), 0.1, momentum=0.5, split=True)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.3
    for a, b in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        assert_equal([ours.state[a]["momentum_buffer"]], [theirs.state[b]["momentum_buffer"]])
        assert ours.state[a]["lower_half"].dtype == torch.int16


@pytest.mark.parametrize("split", [False, True])
def test_copies_and_pickles(split):
    ours = SGD(parameters(), 0.1, momentum=0.9, split=split)
    take_steps(ours, range(2))
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    others = [copy.deepcopy(ours), torch.load(file, weights_only=False)]
    expected = take_steps(ours, range(2, 4))
    for other in others:
        assert_equal(take_steps(other, range(2, 4)), expected)
        assert_equal(weights(other), weights(ours))


def test_parameters_that_become_something_else():
    ours = SGD(parameters(), 0.1, split=True)
    own = take_steps(ours)
    before = weights(ours)
    own[2].data = own[2].data.contiguous()  # in another order
    assert_equal(weights(ours), before)
    ours.state.clear()
    assert_equal(weights(ours), [p.float() for p in own])
    own[0].data = own[0].data.float()
    with pytest.raises(RuntimeError, match=r"shape \(37, 11\) has become torch.float32"):
        weights(ours)
    own[0].grad = torch.zeros_like(own[0])
    with pytest.raises(RuntimeError, match="has become"):
        ours.step()


# ---- what surrounds an optimizer


def test_groups_schedules_and_closures():
    """A group added later, momentum that a schedule moves, a closure that evaluates anew."""
    found = []
    for kind, extra in ((torch.optim.SGD, {"fused": True}), (SGD, {"split": True})):
        first, second, third = parameters()
        optimizer = kind([first], 0.1, momentum=0.9, **extra)
        optimizer.add_param_group({"params": [second, third], "lr": 0.01, "weight_decay": 0.1})
        schedules = [OneCycleLR(optimizer, 0.2, total_steps=8), StepLR(optimizer, 2)]
        losses = []
        for i in range(6):

            def closure(i=i, optimizer=optimizer, losses=losses):
                assert torch.is_grad_enabled()
                optimizer.zero_grad()
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        torch.manual_seed(i)
                        p.grad = torch.randn_like(p, dtype=torch.float32).bfloat16().to(p.dtype)
                losses.append(i)
                return i

            assert optimizer.step(closure) == i
            for schedule in schedules:
                schedule.step()
        assert losses == list(range(6))
        found.append((optimizer, [first, second, third]))
    (theirs, expected), (ours, _) = found
    assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in theirs.param_groups]
    assert_equal(weights(ours), expected)


def test_hooks_run_once():
    torch.optim.SGD(parameters(), 0.1)  # wraps its own step
    ours = SGD(parameters(), 0.1)
    ran = []
    ours.register_step_pre_hook(lambda *_: ran.append("before"))
    ours.register_step_post_hook(lambda *_: ran.append("after"))
    take_steps(ours, range(1))
    assert ran == ["before", "after"]


@pytest.mark.parametrize("mode", ["auto", "triton"])
def test_gradient_scaler(mode):
    """A step with an infinite gradient is left out, the others are torch's."""
    results = []
    for kind, extra in ((torch.optim.SGD, {"fused": True}), (SGD, {"split": True})):
        [weight, *_] = parameters()
        optimizer = kind([weight], 2.0**-4, momentum=0.5, **extra)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        with backend.use(mode):
            for i in range(6):
                optimizer.zero_grad()
                factor = gradients(i)[0] if i != 2 else torch.full_like(gradients(i)[0], torch.inf)
                scaler.scale((weight * factor.to(weight.dtype)).float().sum()).backward()
                scaler.step(optimizer)
                scaler.update()
        assert scaler.get_scale() == 2.0**11
        results.append(weights(optimizer)[0] if kind is SGD else weight.detach())
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_what_autograd_saved_is_gone_after_a_step():
    weight = nn.Parameter(torch.ones(4))
    optimizer = SGD([weight], 0.1, split=True)
    with backend.use("triton"):
        loss = (weight * weight).sum()
        loss.backward(retain_graph=True)
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_lars_factors_in_the_kernel():
    """Of fp32 weights that are not split, in one launch; the gradients stay as they are."""
    found = []
    for mode in ("auto", "triton"):
        own = parameters()[:2]
        groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(own, (0.1, 0.0), strict=True)]
        optimizer = LARS(groups, 0.5, 0.9, trust=0.02, layers=[own])
        for i in range(3):
            for parameter, grad in zip(own, gradients(i), strict=False):
                parameter.grad = grad.float()
            with backend.use(mode):
                optimizer.step()
            if mode == "triton":
                assert torch.equal(own[0].grad, gradients(i)[0].float())
        found.append([p.detach() for p in own])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ---- refusals


@pytest.mark.parametrize(
    ("parameter", "options", "message"),
    [
        (torch.zeros(3), {"foreach": True}, "split and foreach exclude each other"),
        (torch.zeros(3), {"differentiable": True}, "split and differentiable exclude each other"),
        (torch.zeros(3, dtype=torch.float16), {}, "split takes float32 and bfloat16 parameters, got torch.float16"),
        (torch.zeros(3, dtype=torch.float64), {}, r"got torch.float64 in a parameter of shape \(3,\)"),
        (torch.zeros(3, dtype=torch.complex64), {}, "got torch.complex64"),
        (torch.zeros(3, 4)[:, ::2], {}, r"without holes in memory, got strides \(4, 2\)"),
        (torch.zeros(1).expand(3), {}, "without holes in memory"),
    ],
)
def test_refusals(parameter, options, message):
    with pytest.raises(ValueError, match=message):
        SGD([nn.Parameter(parameter)], 0.1, split=True, **options)


def test_refused_groups_are_not_kept():
    memory = torch.zeros(10)
    first, second = nn.Parameter(memory[:6]), nn.Parameter(memory[5:])
    with pytest.raises(ValueError, match=r"parameter 0 \(6,\) and parameter 1 \(5,\) share memory"):
        SGD([first, second], 0.1, split=True)
    assert first.dtype == second.dtype == torch.float32
    ours = SGD([first], 0.1, split=True)
    with pytest.raises(ValueError, match="float64"):
        ours.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.float64))]})
    assert len(ours.param_groups) == 1
    with pytest.raises(ValueError, match="more than one parameter group"):
        ours.add_param_group({"params": [first]})


def test_refused_steps():
    ours = SGD([nn.Parameter(torch.zeros(4, 3))], 0.1, split=True)
    with ours.joined(), pytest.raises(RuntimeError, match=r"within joined\(\)"):
        ours.step()
    [parameter] = ours.param_groups[0]["params"]
    parameter.grad = torch.zeros(4, 3, dtype=torch.bfloat16).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        ours.step()


def test_torchs_own_refusals():
    for options in ({"lr": -1}, {"momentum": -1}, {"weight_decay": -1}, {"nesterov": True}):
        for split in (False, True):
            with pytest.raises(ValueError, match=r"Invalid|Nesterov"):
                SGD(parameters(), **options, split=split)
