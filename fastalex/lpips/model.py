"""LPIPS, the perceptual loss of Zhang et al. 2018, with the arguments, results and weights of the package `lpips`.

Images go through torchvision's AlexNet, VGG16 or SqueezeNet; the distance is that of their features, each pixel's
channels normalised, weighted by what was fitted to people's judgements.  Here it is one node of the autograd graph
(`fastalex.ops.lpips`) that keeps features and window codes, where the package keeps four times as much.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn

from fastalex import backend, ops
from fastalex import functional as F
from fastalex.nn import ConvReLU2d, MaxPool2d
from fastalex.ops.common import call
from fastalex.ops.trunks import TRUNKS, Conv, Fire, Pool
from fastalex.reference import unit_vectors
from fastalex.weights import download, plain_state, read_pickle

LIN = Path(__file__).with_name("lin.npz")
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# torchvision's IMAGENET1K_V1
TRUNK_WEIGHTS = {
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "squeeze": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
}


class ScalingLayer(nn.Module):
    """(images - shift) / scale: from [-1, 1] to what the trunks were trained on."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        return (input - self.shift) / self.scale


class FireModule(nn.Module):
    """SqueezeNet's: a 1x1 convolution, then 1x1 and 3x3 ones side by side, each with ReLU."""

    def __init__(self, fire: Fire) -> None:
        super().__init__()
        self.squeeze = ConvReLU2d(fire.inputs, fire.squeeze, 1)
        self.expand1x1 = ConvReLU2d(fire.squeeze, fire.expand, 1)
        self.expand3x3 = ConvReLU2d(fire.squeeze, fire.expand, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        squeezed = self.squeeze(input)
        return torch.cat([self.expand1x1(squeezed), self.expand3x3(squeezed)], 1)


class TrunkNetwork(nn.Module):
    """The convolutions, in slices that end with a feature, under the names of the package."""

    def __init__(self, net: str) -> None:
        super().__init__()
        trunk = TRUNKS[net]
        self.N_slices = len(trunk.channels)
        for number in range(1, self.N_slices + 1):
            self.add_module(f"slice{number}", nn.Sequential())
        for layer, index, number in zip(trunk.layers, trunk.indices, trunk.slices, strict=True):
            if isinstance(layer, Conv):
                module: nn.Module = ConvReLU2d(layer.inputs, layer.channels, layer.kernel, layer.stride, layer.padding)
            elif isinstance(layer, Pool):
                module = MaxPool2d(layer.kernel, layer.stride, ceil_mode=layer.ceil)
            else:
                module = FireModule(layer)
            self.get_submodule(f"slice{number}").add_module(str(index), module)

    def forward(self, input: Tensor) -> list[Tensor]:
        """Scaled images (N, 3, H, W) -> the features."""
        found = []
        for number in range(1, self.N_slices + 1):
            input = self.get_submodule(f"slice{number}")(input)
            found.append(input)
        return found


class NetLinLayer(nn.Module):
    """The weights of one feature's channels, as the 1x1 convolution that they are in the package."""

    def __init__(self, channels: int, use_dropout: bool) -> None:
        super().__init__()
        convolution = nn.Conv2d(channels, 1, 1, bias=False)
        self.model = nn.Sequential(*([nn.Dropout()] if use_dropout else []), convolution)

    @property
    def weight(self) -> Tensor:
        return self.model[-1].weight  # type: ignore[return-value]

    @property
    def drops(self) -> bool:
        """Whether a call would drop channels."""
        return self.training and len(self.model) > 1

    def forward(self, input: Tensor) -> Tensor:
        return self.model(input)


class LPIPS(nn.Module):
    """LPIPS: images (N, 3, H, W) twice -> distances (N, 1, 1, 1).  Arguments as of `lpips.LPIPS`, in its order.

    pretrained: the weights of the features are those of the paper (they ship with fastalex), else random.
    net: "alex", "vgg" or "squeeze".
    version: "0.1", the only one here; the package has an older one with a bug.
    lpips: weigh the channels; without it every feature counts as it is.
    spatial: return maps (N, 1, H, W) of the size of the images.
    pnet_rand: the trunk is random; else torchvision's ImageNet weights, downloaded once to torch's hub directory.
    pnet_tune: the trunk is trained too.
    use_dropout: before the weights, while training them.
    model_path: a file of other weights of the features, as torch.save wrote it.
    eval_mode: start in evaluation mode.  With False, or with random weights, the weights of the features need
        gradients; the package's always do, and cost every user a gradient that nobody reads.
    verbose: say what is loaded.
    trunk: a file of trunk weights to take instead of a download: torchvision's of the whole network.

    Parameters are float32, `.to(torch.bfloat16)` and `.double()` work; images and weights must have one dtype.
    Under autocast the convolutions run in its dtype and distances are float32.
    Raises ValueError for unknown arguments, FileNotFoundError and OSError where weights are missing.

    Source: https://github.com/richzhang/PerceptualSimilarity, BSD-2; its notice is fastalex/lpips/LICENSE.
    """

    def __init__(
        self,
        pretrained: bool = True,
        net: str = "alex",
        version: str = "0.1",
        lpips: bool = True,
        spatial: bool = False,
        pnet_rand: bool = False,
        pnet_tune: bool = False,
        use_dropout: bool = True,
        model_path: str | Path | None = None,
        eval_mode: bool = True,
        verbose: bool = False,
        *,
        trunk: str | Path | None = None,
    ) -> None:
        super().__init__()
        name = {"vgg16": "vgg"}.get(net, net)
        if name not in TRUNKS:
            raise ValueError(f"net must be one of {', '.join(TRUNKS)}, got {net!r}")
        if version != "0.1":
            raise ValueError(f"version must be '0.1', got {version!r}")
        self.pnet_type, self.pnet_tune, self.pnet_rand = name, pnet_tune, pnet_rand
        self.spatial, self.lpips, self.version = spatial, lpips, version
        self.chns = list(TRUNKS[name].channels)
        self.L = len(self.chns)
        self.scaling_layer = ScalingLayer()
        self.net = TrunkNetwork(name)
        if not pnet_rand:
            self._load_trunk(trunk, verbose)
        self.net.requires_grad_(pnet_tune)
        # in this order the library takes them as they are, every time
        self.net.to(memory_format=torch.channels_last)
        if lpips:
            lins = [NetLinLayer(channels, use_dropout) for channels in self.chns]
            for number, lin in enumerate(lins):
                self.add_module(f"lin{number}", lin)
            # the package has them twice in its state_dict, too
            self.lins = nn.ModuleList(lins)
            if pretrained:
                self._load_lins(model_path, verbose)
            self.lins.requires_grad_(not pretrained or not eval_mode)
        if eval_mode:
            self.eval()

    def _load_trunk(self, path: str | Path | None, verbose: bool) -> None:
        """torchvision's weights of the whole network, of which the convolutions up to the last feature are taken."""
        if path is None:
            found = download(f"the trunk of {self.pnet_type}", TRUNK_WEIGHTS[self.pnet_type])
        else:
            if not Path(path).is_file():
                raise FileNotFoundError(f"trunk must be an existing file, got {str(path)!r}")
            found = plain_state(read_pickle(Path(path)), Path(path))
        if verbose:
            print(f"trunk: {path or TRUNK_WEIGHTS[self.pnet_type]}")
        state = {}
        for name in self.net.state_dict():
            own = "features." + name.partition(".")[2]
            if own not in found:
                raise ValueError(
                    f"the trunk weights {path or 'of torchvision'} lack {own}: they are not of {self.pnet_type}"
                )
            state[name] = found[own]
        self.net.load_state_dict(state)

    def _load_lins(self, path: str | Path | None, verbose: bool) -> None:
        if verbose:
            print(f"weights of the features: {path or LIN}")
        if path is None:
            with np.load(LIN) as file:
                for number, lin in enumerate(self._lins()):
                    weight = torch.from_numpy(file[f"{self.pnet_type}.lin{number}"])
                    lin.weight.data.copy_(weight.view(1, -1, 1, 1))
            return
        if not Path(path).is_file():
            raise FileNotFoundError(f"model_path must be an existing file, got {str(path)!r}")
        state = plain_state(read_pickle(Path(path)), Path(path))
        for number, lin in enumerate(self._lins()):
            found = [value for name, value in state.items() if name.startswith(f"lin{number}.")]
            if len(found) != 1 or found[0].numel() != self.chns[number]:
                raise ValueError(
                    f"{path} has no weights lin{number} for the {self.chns[number]} channels of {self.pnet_type}"
                )
            lin.weight.data.copy_(found[0].view(1, -1, 1, 1))

    # ------------------------------------------------------------------------------------------------------- calls
    if TYPE_CHECKING:

        @overload
        def __call__(
            self, in0: Tensor, in1: Tensor, retPerLayer: Literal[False] = False, normalize: bool = False
        ) -> Tensor: ...
        @overload
        def __call__(
            self, in0: Tensor, in1: Tensor, retPerLayer: Literal[True], normalize: bool = False
        ) -> tuple[Tensor, list[Tensor]]: ...
        @overload
        def __call__(
            self, in0: Tensor, in1: Tensor, retPerLayer: bool, normalize: bool = False
        ) -> Tensor | tuple[Tensor, list[Tensor]]: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def forward(
        self, in0: Tensor, in1: Tensor, retPerLayer: bool = False, normalize: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """The distance of each pair of images: (N, 1, 1, 1), with `spatial` (N, 1, H, W).

        in0, in1: (N, 3, H, W) in [-1, 1], with `normalize` in [0, 1]; grey (N, 1, H, W), and without a batch; one of
        them may have a batch of 1.  retPerLayer: also a list of what each feature adds.  Gradients flow to both images.
        Raises ValueError for shapes that do not fit, RuntimeError for a dtype or device that is not the weights'.
        """
        in0, in1 = self._images(in0, "in0"), self._images(in1, "in1")
        if in0.shape[0] != in1.shape[0] and 1 not in (in0.shape[0], in1.shape[0]):
            raise ValueError(
                f"in0 and in1 must have one batch, or one of them a batch of 1, got {in0.shape[0]} and {in1.shape[0]}"
            )
        size = in0.shape[2:]
        if in0.shape[2:] != in1.shape[2:] or self._needs_modules(in0):
            return self._by_modules(in0, in1, retPerLayer, normalize)
        if in0.shape[0] != in1.shape[0]:
            # the distance is symmetric; an image that is compared with many gets the sum of their gradients
            if in0.shape[0] == 1:
                in0, in1 = in1, in0
            if F._needs_grad(in1):
                in1 = in1.expand(in0.shape)
        dtype = torch.promote_types(in0.dtype, in1.dtype)
        in0, in1 = in0.to(dtype), in1.to(dtype)
        return self._result(self._operator(in0, in1, [], normalize), size, retPerLayer)

    @torch.no_grad()
    def features(self, image: Tensor, normalize: bool = False) -> list[Tensor]:
        """What `distance` compares an image with, for a target that stays: a list of maps (N, C, H', W'), no graph.

        image, normalize: as of `forward`.
        """
        image = self._images(image, "image")
        if self._needs_modules(image):
            return self.net(self._scaled(image, normalize))
        return call(ops.lpips_features, image, self._scaling(), self._trunk(image), self.pnet_type, normalize)

    @overload
    def distance(
        self, image: Tensor, features: Sequence[Tensor], retPerLayer: Literal[False] = False, normalize: bool = False
    ) -> Tensor: ...
    @overload
    def distance(
        self, image: Tensor, features: Sequence[Tensor], retPerLayer: Literal[True], normalize: bool = False
    ) -> tuple[Tensor, list[Tensor]]: ...
    @overload
    def distance(
        self, image: Tensor, features: Sequence[Tensor], retPerLayer: bool, normalize: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]: ...
    def distance(
        self, image: Tensor, features: Sequence[Tensor], retPerLayer: bool = False, normalize: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """`forward(image, target)` for a target of which `features(target)` was kept.  Gradients flow to the image.

        Raises ValueError for features that are not those of an image of this size.
        """
        image, features = self._images(image, "image"), list(features)
        sizes = TRUNKS[self.pnet_type].feature_sizes(image.shape[2:])
        expected = [(channels, *size) for channels, size in zip(self.chns, sizes, strict=True)]
        batches = {f.shape[0] for f in features}
        if [tuple(f.shape[1:]) for f in features] != expected or len(batches) != 1:
            raise ValueError(
                f"features must be {len(expected)} maps (N, {expected[0][0]}, {expected[0][1]}, {expected[0][2]}), ... "
                f"as loss.features makes them of an image of {tuple(image.shape[2:])}, "
                f"got {[tuple(f.shape) for f in features]}"
            )
        others = batches.pop()
        if image.shape[0] != others:
            if 1 not in (image.shape[0], others):
                raise ValueError(f"image has a batch of {image.shape[0]}, features have {others}")
            image = image.expand(max(image.shape[0], others), -1, -1, -1)
        if self._needs_modules(image):
            own = self.net(self._scaled(image, normalize))
            return self._sum(self._heads(own, features, image.shape[2:]), retPerLayer)
        return self._result(self._operator(image, None, features, normalize), image.shape[2:], retPerLayer)

    # ------------------------------------------------------------------------------------------------- the operator
    def _operator(self, image: Tensor, other: Tensor | None, features: list[Tensor], normalize: bool) -> Tensor:
        parameters = self._trunk(image)
        if features and features[0].dtype != parameters[0].dtype:
            raise RuntimeError(f"features are {features[0].dtype}, the network computes in {parameters[0].dtype}")
        weights = [lin.weight.flatten() for lin in self._lins()]
        needs = [F._needs_grad(image), other is not None and F._needs_grad(other)]
        return call(
            ops.lpips, image, other, features, self._scaling(), parameters, weights,
            self.pnet_type, [normalize, self.spatial, *needs],
        )[0]  # fmt: skip

    def _scaling(self) -> list[Tensor]:
        return [self.scaling_layer.shift, self.scaling_layer.scale]

    def _lins(self) -> list[NetLinLayer]:
        """The weights of the features; none with lpips=False."""
        return list(self.lins) if self.lpips else []  # type: ignore[arg-type]

    def _trunk(self, image: Tensor) -> list[Tensor]:
        """The trunk's parameters, in the dtype of the computation."""
        found: list[Tensor] = list(self.net.parameters())
        dtype = F.autocast_dtype(image)
        if dtype is None or found[0].dtype == torch.float64:
            return found
        return [parameter.to(dtype) for parameter in found]

    def _result(self, distances: Tensor, size: Sequence[int], per_layer: bool) -> Any:
        """The package's shapes out of the operator's."""
        images = distances.shape[0]
        dtype = self.scaling_layer.scale.dtype if F.autocast_dtype(distances) is None else distances.dtype
        if self.spatial:
            sizes = TRUNKS[self.pnet_type].feature_sizes(size)
            parts = distances.split([h * w for h, w in sizes], 1)
            maps = [part.view(images, 1, *of) for part, of in zip(parts, sizes, strict=True)]
            return self._sum([upsample(one, size).to(dtype) for one in maps], per_layer)
        total = distances.sum(1).to(dtype).view(images, 1, 1, 1)
        if not per_layer:
            return total
        return total, [one.view(images, 1, 1, 1) for one in distances.to(dtype).unbind(1)]

    # ---------------------------------------------------------------------------------------------- module by module
    def _needs_modules(self, image: Tensor) -> bool:
        """Whether something needs more than the fused operator: training the network itself, or the reference mode."""
        dropout = any(lin.drops for lin in self._lins())
        trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())
        return dropout or trained or backend.takes_reference("lpips", image)

    def _by_modules(self, in0: Tensor, in1: Tensor, per_layer: bool, normalize: bool) -> Any:
        own, other = (self.net(self._scaled(image, normalize)) for image in (in0, in1))
        return self._sum(self._heads(own, other, in0.shape[2:]), per_layer)

    def _scaled(self, image: Tensor, normalize: bool) -> Tensor:
        scaled = self.scaling_layer(2 * image - 1 if normalize else image)
        return scaled.contiguous(memory_format=torch.channels_last)

    def _heads(self, own: Sequence[Tensor], other: Sequence[Tensor], size: Sequence[int]) -> list[Tensor]:
        """What each feature adds: (N, 1, 1, 1), or maps of this size."""
        found, lins = [], self._lins()
        for number, (a, b) in enumerate(zip(own, other, strict=True)):
            lin = lins[number] if lins else None
            if F.autocast_dtype(a) is not None:
                a, b = a.float(), b.float()
            if lin is not None and lin.drops:
                distance = lin((unit_vectors(a) - unit_vectors(b)).square())
                distance = distance if self.spatial else distance.mean((2, 3), keepdim=True)
            else:
                weight = None if lin is None else lin.weight.flatten().to(a.dtype)
                distance = F.feature_distance(a, b, weight, spatial=self.spatial)
                distance = distance[:, None] if self.spatial else distance.view(-1, 1, 1, 1)
            found.append(upsample(distance, size) if self.spatial else distance)
        return found

    def _sum(self, parts: list[Tensor], per_layer: bool) -> Any:
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return (total, parts) if per_layer else total

    def _images(self, image: Tensor, name: str) -> Tensor:
        """(N, 3, H, W), of every shape that broadcasts to it.  Raises what `forward` does."""
        shape = tuple(image.shape)
        if image.dim() < 4:
            image = image[(None,) * (4 - image.dim())]
        if image.dim() != 4 or image.shape[1] not in (1, 3):
            raise ValueError(f"{name} must be (N, 3, H, W), (N, 1, H, W), or without N, got shape {shape}")
        trunk = TRUNKS[self.pnet_type]
        if any(min(size) < 1 for size in trunk.sizes(image.shape[2:])):
            smallest = trunk.smallest()
            raise ValueError(
                f'{name} must be at least {smallest} x {smallest} for net="{self.pnet_type}", got shape {shape}'
            )
        scale = self.scaling_layer.scale
        if image.device != scale.device:
            raise RuntimeError(f"{name} is on {image.device}, the weights are on {scale.device}")
        if torch.promote_types(image.dtype, scale.dtype) != scale.dtype and F.autocast_dtype(image) is None:
            raise RuntimeError(f"{name} is {image.dtype}, the weights are {scale.dtype}")
        if not image.is_floating_point():
            image = image.to(scale.dtype)
        return image if image.shape[1] == 3 else image.expand(-1, 3, -1, -1)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module's, also of the state_dict of torchmetrics' network, which has no scaling layer in it."""
        state = {f"scaling_layer.{name}": value for name, value in self.scaling_layer.state_dict().items()}
        for name, value in state_dict.items():
            slices = re.match(r"net\.slices\.(\d+)\.", name)
            state[f"net.slice{int(slices[1]) + 1}.{name[slices.end() :]}" if slices else name] = value
        return super().load_state_dict(state, strict, assign)


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    return nn.functional.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
