"""What the processes of tests/test_parallel.py do: every check once, between two gloo processes."""

import copy
import re
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastalex
from fastalex.functional import ResponseNorm
from fastalex.parallel import one_weird_trick
from fastalex.variants import Conv, Variant

WORLD = 2
IMAGES = 3  # of each process
TINY = Variant(
    "tiny",
    (Conv(8, 3, norm=ResponseNorm(5, 1e-2, 0.75, 2.0), pool=3), Conv(8, 3, padding=1, groups=2, pool=3)),
    hidden=(12, 10),
    features_size=3,
    init="torch",
)


def network(variant=TINY):
    torch.manual_seed(5)
    return fastalex.AlexNet(7, dropout=0.0, variant=variant)


def data(process=slice(None)):
    """The images and labels of one process, or of all."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(WORLD, IMAGES, 3, 17, 17, generator=generator)
    labels = torch.randint(7, (WORLD, IMAGES), generator=generator)
    if isinstance(process, slice):
        return images.flatten(0, 1), labels.flatten()
    return images[process], labels[process]


def step(model, images, labels, groups=None):
    """One step of SGD; returns the loss."""
    optimizer = torch.optim.SGD(groups or model.parameters(), 0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_gradients(model, reference):
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(
            whole(p.grad), q.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same_weights(state, reference):
    expected = reference.state_dict()
    assert sorted(state) == sorted(expected)
    for name, value in state.items():
        torch.testing.assert_close(whole(value), expected[name], rtol=1e-4, atol=1e-6)


def full_state(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def single(variant=TINY):
    """One process that sees all images: its gradients, then its weights after training."""
    first, trained = network(variant), network(variant)
    images, labels = data()
    F.cross_entropy(first(images), labels).backward()
    step(trained, images, labels)
    return first, trained


def check_ddp(rank):
    first, trained = single()
    model = DistributedDataParallel(network())
    F.cross_entropy(model(data(rank)[0]), data(rank)[1]).backward()
    assert_same_gradients(model.module, first)
    model = DistributedDataParallel(network())
    step(model, *data(rank))
    assert_same_weights(model.module.state_dict(), trained)


def check_ddp_of_a_fused_model(rank):
    def layers():
        torch.manual_seed(3)
        parts = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LocalResponseNorm(5, 0.1), nn.MaxPool2d(3, 2), nn.Flatten()]
        return nn.Sequential(*parts, nn.Linear(8 * 49, 7))

    first, model = layers(), DistributedDataParallel(fastalex.fuse(layers()))
    F.cross_entropy(first(data()[0]), data()[1]).backward()
    F.cross_entropy(model(data(rank)[0]), data(rank)[1]).backward()
    assert_same_gradients(model.module, first)


def check_fsdp(rank):
    """Sharded by layer, two steps, gathered again.  FSDP2 refuses channels_last weights: these are made contiguous."""
    _, trained = single()
    model = network().to(memory_format=torch.contiguous_format)
    for layer in [*model.features, *model.classifier]:
        if list(layer.parameters()):
            fully_shard(layer, mesh=init_device_mesh("cpu", (WORLD,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    step(model, *data(rank))
    assert_same_weights(full_state(model), trained)


def check_one_weird_trick(rank):
    first, trained = single()
    mesh = init_device_mesh("cpu", (WORLD,))
    model = network()
    if rank:  # the weights of the first process are taken
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
    model = one_weird_trick(model, mesh)
    images, labels = data(rank)
    output = model(images)
    torch.testing.assert_close(output, network()(images))
    F.cross_entropy(output, labels).backward()
    hidden = [layer.weight for layer in model.classifier if hasattr(layer, "weight")]
    assert [tuple(w.to_local().shape) for w in hidden] == [(6, 72), (5, 12), (7, 5)]
    assert_same_gradients(model, first)

    for fast in (False, True):
        model = one_weird_trick(network(), mesh)
        features = {"params": model.features.parameters(), "fused": fast}
        classifier = {"params": model.classifier.parameters(), "foreach": fast}
        step(model, images, labels, [features, classifier])
        assert_same_weights(full_state(model), trained)


def check_one_weird_trick_on_torch_modules(rank):
    """torchvision's order: dropout, linear, ReLU as modules of their own."""

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(9)
            self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(3))
            self.classifier = nn.Sequential(
                nn.Dropout(0.0),
                nn.Linear(36, 8, bias=False),
                nn.ReLU(True),
                nn.Dropout(0.0),
                nn.Linear(8, 7, bias=False),
            )

        def forward(self, x):
            return self.classifier(torch.flatten(self.features(x), 1))

    first, model = Theirs(), one_weird_trick(Theirs(), init_device_mesh("cpu", (WORLD,)))
    F.cross_entropy(first(data()[0]), data()[1]).backward()
    F.cross_entropy(model(data(rank)[0]), data(rank)[1]).backward()
    assert_same_gradients(model, first)


def check_one_weird_trick_refuses(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    odd = copy.deepcopy(network())
    odd.classifier[4] = nn.Linear(12, 9)
    model = network()
    norm = copy.deepcopy(network())
    norm.classifier[2] = nn.Softmax(1)
    cases = [
        (nn.Linear(3, 3), mesh, "model must have `features` and a Sequential `classifier`, got Linear"),
        (odd, mesh, "mesh has 2 processes, which must divide the 9 outputs of model.classifier[4]"),
        (norm, mesh, "only ReLU, Dropout and Identity between its linear layers, got Softmax"),
        (model, init_device_mesh("cpu", (1, WORLD)), "mesh must have one dimension, got 2 of shape (1, 2)"),
    ]
    for case, on, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            one_weird_trick(case, on)


CHECKS = {name.removeprefix("check_"): function for name, function in globals().items() if name.startswith("check_")}


def main(rank, rendezvous, failures):
    """Runs every check in this process and puts (name, traceback or None) into the queue of the first."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    for name, check in CHECKS.items():
        try:
            check(rank)
            failures.put((name, None))
        except Exception:
            failures.put((name, f"process {rank}\n{traceback.format_exc()}"))
        dist.barrier()
    dist.destroy_process_group()
