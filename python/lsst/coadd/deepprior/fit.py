# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The fit of the network: what it learns from one patch, and how its weights move.

The encoder reads one set of visits and the loss is taken on others, so that fitting their noise does not pay
(Lehtinen et al. 2018, arXiv:1803.04189, with known PSFs).
"""

from __future__ import annotations

__all__ = (
    "N_TURNS",
    "SplitLoss",
    "WeightAverage",
    "corrected",
    "latent_image",
    "load_weights_state",
    "make_trunk",
    "mean_latent_image",
    "one_cycle",
    "weights_state",
)

import itertools
import math

import torch

from .baselines import maximum_likelihood
from .batches import Batches
from .network import Features, Trunk, encoder_features, latent_and_slope
from .operators import CellConvolution
from .patch_data import PatchData
from .statistics import VisitSets

N_TURNS = 8
"""Number of ways to turn and mirror an image of square pixels."""


def make_trunk(seed: int, device: torch.device, dtype: torch.dtype) -> Trunk:
    """Make a network with a random start that depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Trunk().to(device=device, dtype=dtype)


def corrected(net: Trunk, features: Features) -> torch.Tensor:
    """Return z of one set: the base plus the gated correction of the network."""
    return features.start + features.gate * net(features.channels[None])[0]


def latent_image(net: Trunk, features: Features) -> torch.Tensor:
    """Return the latent image u of one set, (y, x), in nJy."""
    with torch.no_grad():
        return latent_and_slope(corrected(net, features), features.noise)[0]


def mean_latent_image(net: Trunk, features: Features) -> torch.Tensor:
    """Return the latent image u of one set, (y, x), in nJy, with the mean of the network over shifts.

    The network works at half resolution, and what the data are blind to can differ between the four pixels
    that it makes of one. The mean over the shifts by a pixel has no such pattern (cycle spinning, Coifman &
    Donoho 1995, Lecture Notes in Statistics 103, 125).
    """
    with torch.no_grad():
        correction = torch.zeros_like(features.start)
        for dy, dx in itertools.product((0, 1), (0, 1)):
            correction += net.tile_by_tile(features.channels, dy, dx)
        correction *= 0.25
        return latent_and_slope(features.start + features.gate * correction, features.noise)[0]


def _turned(channels: torch.Tensor, turn: int) -> torch.Tensor:
    """Rotate by ``turn % 4`` right angles, and mirror where ``turn >= 4``."""
    rotated = torch.rot90(channels, turn % 4, (-2, -1))
    return rotated.flip(-1) if turn >= 4 else rotated


def _turned_back(image: torch.Tensor, turn: int) -> torch.Tensor:
    """Undo `_turned`."""
    return torch.rot90(image.flip(-1) if turn >= 4 else image, -(turn % 4), (-2, -1))


class SplitLoss:
    r"""What a network learns from the splits of a patch.

    The gradient of the loss with respect to z is :math:`(c A u - N)\,du/dz`, with N the matched image of the
    clipped data and c the part of the prediction that has data. It is taken on the visits that the encoder
    did not read, and divided by :math:`\sqrt{1 + (du/dz)^2 D}`, D the diagonal scale of A, so that bright
    stars do not own the fit.

    Parameters
    ----------
    data : `~lsst.coadd.deepprior.patch_data.PatchData`
        The visits.
    encoder, loss : `torch.Tensor`, (split, group), bool
        Groups of visits on the two sides of every split.
    base_steps : `int`
        Steps of maximum likelihood behind the features.
    batches : `~lsst.coadd.deepprior.batches.Batches`, optional
        How many splits are prepared and linearised at once.
    """

    def __init__(
        self,
        data: PatchData,
        encoder: torch.Tensor,
        loss: torch.Tensor,
        base_steps: int,
        batches: Batches | None = None,
    ) -> None:
        if bool((encoder & loss).any()):
            raise ValueError("The two sides of a split must not share a group of visits.")
        self._data = data
        self._batches = Batches() if batches is None else batches
        self._features: Features = Features.joined(
            self._batches.map(
                lambda some: encoder_features(
                    maximum_likelihood(data, data.sets(encoder[some]), steps=base_steps)
                ),
                len(encoder),
            )
        )
        self._sets: VisitSets = data.sets(loss)
        self._gram: CellConvolution = self._sets.gram
        self._scale = self._gram.forward(torch.ones_like(self._features.start))
        self._coverage: torch.Tensor | None = None
        self._seen: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._sets)

    def refresh(self, net: Trunk) -> float:
        """Linearise the loss side of every split at that split's own model.

        Parameters
        ----------
        net : `~lsst.coadd.deepprior.network.Trunk`
            The network.

        Returns
        -------
        objective : `float`
            Robust objective of a pixel on the visits that the encoder did not read, the mean of all splits.
        """

        def linearise(some: slice) -> tuple[torch.Tensor, ...]:
            models = torch.stack([latent_image(net, self._features[k]) for k in range(some.start, some.stop)])
            statistics = self._data.linearise(self._sets[some], models)
            return statistics.coverage, statistics.seen, statistics.objective

        parts = self._batches.map(linearise, len(self))
        self._coverage, self._seen, objective = (torch.cat(images) for images in zip(*parts, strict=True))
        return float(objective.mean())

    def backward(self, net: Trunk, split: int, turn: int) -> None:
        """Add the gradient of one split to the parameters of the network.

        Parameters
        ----------
        net : `~lsst.coadd.deepprior.network.Trunk`
            The network.
        split : `int`
            The split.
        turn : `int`
            Which of the `N_TURNS` turned and mirrored versions of the features the network reads; turning
            them at random keeps it from learning the noise of a patch by heart.
        """
        if self._coverage is None or self._seen is None:
            raise RuntimeError("The loss must be linearised by refresh() before its gradient is taken.")
        one = self._features[split]
        z = one.start + one.gate * _turned_back(net(_turned(one.channels, turn)[None])[0], turn)
        with torch.no_grad():
            latent, slope = latent_and_slope(z, one.noise)
            prediction = self._coverage[split] * self._gram[split].forward(latent)
            gradient = (prediction - self._seen[split]) * slope * one.covered
            gradient /= torch.sqrt(1.0 + slope.square() * self._scale[split])
        z.backward(gradient / gradient.numel())


class WeightAverage:
    """Running mean of the weights of a network (Polyak & Juditsky 1992), the network that is used.

    Parameters
    ----------
    net : `~lsst.coadd.deepprior.network.Trunk`
        The network.
    decay : `float`
        Weight of the past in one step; less in the first steps.
    """

    def __init__(self, net: Trunk, decay: float) -> None:
        self._decay = decay
        self.weights = {name: p.detach().clone() for name, p in net.named_parameters()}

    def update(self, net: Trunk, step: int) -> None:
        """Take in the weights after a step, counted from 0."""
        decay = min(self._decay, (1.0 + step) / (10.0 + step))
        for name, parameter in net.named_parameters():
            self.weights[name].lerp_(parameter.detach(), 1.0 - decay)

    def copy_to(self, net: Trunk) -> None:
        """Give a network the mean weights."""
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(self.weights[name])


def one_cycle(step: int, steps: int) -> float:
    """Return the relative learning rate of a step: a linear rise in 5 % of the steps and a cosine decay."""
    warm_up = max(1, steps // 20)
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / steps)))


def weights_state(net: Trunk, average: WeightAverage, optimizer: torch.optim.Adam) -> dict[str, torch.Tensor]:
    """Return copies of all that the steps of a fit change.

    Parameters
    ----------
    net : `~lsst.coadd.deepprior.network.Trunk`
        The network.
    average : `WeightAverage`
        Running mean of its weights.
    optimizer : `torch.optim.Adam`
        What moves its weights.

    Returns
    -------
    state : `dict` [`str`, `torch.Tensor`]
        Weights, their running mean, and the optimiser's means of the gradient and of its square, by the names
        of the parameters with ``weights.``, ``average.``, ``mean.`` and ``square.`` before them.
    """
    state: dict[str, torch.Tensor] = {}
    for name, parameter in net.named_parameters():
        moments = optimizer.state.get(parameter, {})
        tensors = {
            "weights": parameter.detach(),
            "average": average.weights[name],
            "mean": moments.get("exp_avg", torch.zeros_like(parameter)),
            "square": moments.get("exp_avg_sq", torch.zeros_like(parameter)),
        }
        state |= {f"{kind}.{name}": tensor.clone() for kind, tensor in tensors.items()}
    return state


def load_weights_state(
    state: dict[str, torch.Tensor], net: Trunk, average: WeightAverage, optimizer: torch.optim.Adam, step: int
) -> None:
    """Go on from what `weights_state` returned after a number of steps.

    Raises
    ------
    ValueError
        Raised if the state is of another network.
    """
    expected = {name: tensor.shape for name, tensor in weights_state(net, average, optimizer).items()}
    if {name: state[name].shape for name in expected if name in state} != expected:
        raise ValueError("The state is of another network.")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(state[f"weights.{name}"])
            average.weights[name].copy_(state[f"average.{name}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": state[f"mean.{name}"].to(parameter.device, copy=True),
                "exp_avg_sq": state[f"square.{name}"].to(parameter.device, copy=True),
            }
