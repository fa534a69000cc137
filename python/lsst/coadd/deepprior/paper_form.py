# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

"""The deep prior in the form of the paper it comes from, which a restoration is compared with."""

from __future__ import annotations

__all__ = ("paper_form",)

from collections.abc import Sequence

import torch

from .deconvolution import checked_steps, peer_of_latent
from .linear_coadds import PeerImage
from .network import Trunk
from .observation import Observation
from .operators import CellLayout
from .patch_data import PatchData
from .statistics import VisitTensors

_LEARNING_RATE = 2e-3


def paper_form(
    observations: Sequence[Observation],
    layout: CellLayout,
    sigma: float,
    *,
    steps: Sequence[int],
    seed: int,
) -> dict[int, PeerImage]:
    r"""Fit a network that reads the visits to the same visits, and stop early.

    This is the method of Navarro, Hall, Budavari & Sukurdeep (2023, arXiv:2302.02030; also Sukurdeep, Navarro
    & Budavari 2025, arXiv:2504.06463): the visits are the channels of an encoder/decoder of random start, its
    output goes through a ReLU, and Adam lowers the sum over the good pixels of all visits of Huber's function
    of ``(y - K u) / sigma``. The data are read and predicted by the same visits, so only the number of steps
    keeps the noise out. The model is that of the restoration, ``x = r * u`` at the target PSF, with ``u`` the
    output times the noise of the coadd, and the network is `~lsst.coadd.deepprior.network.Trunk`. Where a
    visit is masked or absent its channel holds the mean of the others, which the loss does not see.

    Parameters
    ----------
    observations : `~collections.abc.Sequence` [`~lsst.coadd.deepprior.observation.Observation`]
        The visits; all are kept in memory.
    layout : `~lsst.coadd.deepprior.operators.CellLayout`
        Cells of the patch.
    sigma : `float`
        Sigma of the target PSF in pixels.
    steps : `~collections.abc.Sequence` [`int`]
        Numbers of steps after which an image is wanted.
    seed : `int`
        Seed of the start of the network.

    Returns
    -------
    peers : `dict` [`int`, `~lsst.coadd.deepprior.linear_coadds.PeerImage`]
        Image at the target PSF by number of steps; NaN where no visit sees the sky.

    Raises
    ------
    ValueError
        Raised if there is no positive number of steps, if no visit has a good pixel, or if one is not on the
        layout.
    """
    wanted = checked_steps(steps)
    data = PatchData(observations, layout, sigma)
    sets = data.sets()
    visits = [visit for _, visit in data.visits()]
    noise = float(sets.sensitivity.max()) ** -0.5
    mean = sum(visit.weight * visit.flux for visit in visits) / sets.depth[0].clamp_min(
        torch.finfo(data.dtype).tiny
    )
    channels = torch.stack([torch.where(v.weight > 0, v.flux, mean) for v in visits])[None] / noise
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Trunk(in_channels=len(visits))
        # The last layer of Trunk starts at zero, where a ReLU has no gradient.
        network.exit.reset_parameters()
    network = network.to(device=data.device, dtype=data.dtype)
    optimiser = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE)
    peers = {}
    for step in range(1, wanted[-1] + 1):
        optimiser.zero_grad()
        latent = noise * torch.relu(network(channels))
        latent.backward(_gradient(latent.detach(), visits, data.huber_delta) / sets.n_pixels)
        optimiser.step()
        if step in wanted:
            with torch.no_grad():
                peers[step] = peer_of_latent(data, sets, noise * torch.relu(network(channels)))
    return peers


def _gradient(latent: torch.Tensor, visits: Sequence[VisitTensors], delta: float) -> torch.Tensor:
    """Return the gradient of the sum of Huber's function over all good pixels, (1, y, x)."""
    gradient = torch.zeros_like(latent)
    for visit in visits:
        good = visit.weight > 0
        noise = torch.where(good, visit.variance, 1.0).sqrt()
        residual = (visit.kernel.forward(latent) - visit.flux) / noise
        gradient += visit.kernel.adjoint(good * residual.clamp(-delta, delta) / noise)
    return gradient
