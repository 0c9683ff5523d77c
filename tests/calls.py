"""One small call of each function, and one small network, for checks that hold whatever is computed."""

import copy
import io
import pickle

import torch

import fastalex
from fastalex import functional as F
from fastalex.variants import Conv, Variant

NORM = F.ResponseNorm(5, 0.5, 0.75, 2.0)
CONV = [(2, 8, 9, 9), (16, 4, 3, 3), (16,)]
MAPS = [(2, 8, 9, 9)]

# name -> function, shapes of its tensors
CALLS = {
    "conv2d_relu": (lambda x, w, b: F.conv2d_relu(x, w, b, 2, 1, groups=2), CONV),
    "conv2d_relu_max_pool2d": (lambda x, w, b: F.conv2d_relu_max_pool2d(x, w, b, 1, 1, 1, 2), CONV),
    "stage with LRN": (lambda x, w, b: F.conv2d_relu_max_pool2d(x, w, b, 1, 1, 1, 2, norm=NORM), CONV),
    "linear_relu_dropout": (lambda x, w, b: F.linear_relu_dropout(x, w, b, 0.0), [(5, 12), (8, 12), (8,)]),
    "local_response_norm": (lambda x: F.local_response_norm(x, 5, 0.5), MAPS),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2), MAPS),
    "feature_distance": (lambda a, b, w: F.feature_distance(a, b, w), [*MAPS, (1, 8, 9, 9), (8,)]),
    "lrn_max_pool2d": (lambda x: F.lrn_max_pool2d(x, 5, 0.5), MAPS),
}
IN_AUTOCAST_DTYPE = ("conv2d_relu", "conv2d_relu_max_pool2d", "stage with LRN", "linear_relu_dropout")

TINY = Variant(
    "tiny",
    (
        Conv(8, 3, norm=F.ResponseNorm(5, 1e-2, 0.75, 2.0), pool=3),
        Conv(8, 3, padding=1, groups=2, norm=F.ResponseNorm(3, 1e-1, 0.75, 1.0, groups=2), pool=3),
        Conv(8, 3, padding=1),
    ),
    hidden=(12, 10),
    features_size=3,
    init="torch",
)
IMAGES = (4, 3, 17, 17)


def inputs(name, dtype=torch.float32, device=None):
    """The tensors of a call, requiring gradients."""
    return [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in CALLS[name][1]]


def network(dropout=0.0):
    torch.manual_seed(5)
    return fastalex.AlexNet(7, dropout=dropout, variant=TINY)


def outputs_and_gradients(function, tensors):
    """The output, then the gradient of each tensor under a fixed incoming gradient."""
    output = function(*tensors)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, tensors, weights)]


def copy_by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def copy_by_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": copy_by_pickle, "torch.save": copy_by_file}
