"""What the benchmarks count."""

import pytest

from benchmarks.models import eager_twin, flops
from fastalex import AlexNet
from fastalex.describe import describe


@pytest.mark.parametrize("variant", ["paper", "torchvision"])
def test_flops_of_a_training_step_know_groups(variant):
    layers = {layer.name: layer.flops for layer in describe(variant).layers}
    forward = sum(layers.values())
    assert flops(variant, (3, 3, 224, 224), backward=False) == 3 * forward
    assert flops(variant, (3, 3, 224, 224), backward=True) == 3 * (3 * forward - layers["conv1"])


def test_an_eager_twin_lies_where_its_model_does():
    twin = eager_twin(AlexNet(variant="paper").to("meta"))
    assert {parameter.device.type for parameter in twin.parameters()} == {"meta"}
