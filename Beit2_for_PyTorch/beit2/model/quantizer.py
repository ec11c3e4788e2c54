"""Vector quantizer on the unit sphere with a codebook moved by exponential averages (reference
`norm_ema_quantizer.py`; BEiT v2 section 2.2)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed
from common.device import no_autocast


class Codebook(nn.Module):
    """Unit-norm codes [n_code, code_dim]; `cluster_size` and `embed_avg` are carried for the file format alone."""

    def __init__(self, n_code: int, code_dim: int, kmeans_init: bool):
        super().__init__()
        weight = torch.zeros(n_code, code_dim) if kmeans_init else F.normalize(torch.randn(n_code, code_dim), dim=-1)
        self.register_buffer("weight", weight)
        self.register_buffer("cluster_size", torch.zeros(n_code))
        self.register_buffer("embed_avg", weight.clone())
        self.register_buffer("initted", torch.tensor([0.0 if kmeans_init else 1.0]))


class NormEMAQuantizer(nn.Module):
    """Maps vectors to the nearest code on the unit sphere.

    Args:
        n_code: size of the codebook.
        code_dim: length of a code.
        beta: weight of the commitment loss.
        decay: of the codebook's and the usage counter's exponential averages.
        kmeans_init: set the codebook by 10 rounds of k-means on the first training batch.
    """

    def __init__(self, n_code: int, code_dim: int, beta: float = 1.0, decay: float = 0.99, kmeans_init: bool = False):
        super().__init__()
        self.beta, self.decay = beta, decay
        self.register_buffer("cluster_size", torch.zeros(n_code))  # running use of each code; 0 = unused
        self.embedding = Codebook(n_code, code_dim, kmeans_init)
        self._codes_are_set = False
        self._dead: Tensor | None = None  # bool [n_code]: those that the next training batch gives new places

    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code: z [..., C], any length -> int64 [...]. Changes no state.

        argmin |z - w|^2 = argmax z w - |w|^2 / 2, in fp32: codes of a full codebook lie too close for half precision.
        """
        codes = self.embedding.weight.float()  # [n, C]
        with no_autocast(z.device):
            z = F.normalize(z.float(), dim=-1)
            half_norms = codes.square().sum(dim=1) * -0.5  # [n]
            return torch.addmm(half_norms, z.flatten(0, -2), codes.T).argmax(dim=1).view(z.shape[:-1])

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes; in training also moves the codebook.

        Args:
            z: [B, N, C].

        Returns:
            The codes [B, N, C] with the gradient passed straight through to the normalised z; the commitment loss;
            the indices int64 [B, N].
        """
        z = F.normalize(z, dim=-1)
        if self.training and not self._codes_are_set:  # looked up once: the host waits for the device to answer
            if not self.embedding.initted.item():
                self._init_by_kmeans(z.detach().flatten(0, 1))
            self._codes_are_set = True
        if self.training and self._dead is not None:
            self._revive(z.detach().flatten(0, 1))
        indices = self.nearest(z.detach())
        codes = F.embedding(indices, self.embedding.weight)  # [B, N, C], before the update
        if self.training:
            self._update(z.detach().flatten(0, 1), indices.flatten())
        loss = self.beta * F.mse_loss(codes, z)
        return z + (codes - z).detach(), loss, indices

    @torch.no_grad()
    def _init_by_kmeans(self, samples: Tensor) -> None:
        """Rank 0's k-means for all ranks. (The reference lets every rank keep its own codebook.)"""
        codebook = self.embedding
        means, counts = kmeans(samples, len(codebook.weight))
        if distributed.is_distributed():
            dist.broadcast(means, 0)
            dist.broadcast(counts, 0)
        codebook.weight.copy_(means)
        codebook.cluster_size.copy_(counts)
        codebook.initted.fill_(1)

    @torch.no_grad()
    def _update(self, z: Tensor, indices: Tensor) -> None:
        """W <- normalize(decay W + (1 - decay) mean direction of the vectors assigned to each code)."""
        weight = self.embedding.weight
        # one buffer, one all-reduce: sums in the first columns, counts in the last
        sums = torch.cat((z, torch.ones_like(z[:, :1])), dim=1)  # [B * N, C + 1]
        sums = distributed.all_reduce_sum(weight.new_zeros(len(weight), sums.shape[1]).index_add_(0, indices, sums))
        counts = sums[:, -1]  # [n]
        self.cluster_size.lerp_(counts, 1 - self.decay)
        means = F.normalize(sums[:, :-1] / counts.clamp(min=1).unsqueeze(1), dim=-1)
        means = torch.where(counts.unsqueeze(1) == 0, weight, means)  # an unused code stays
        weight.copy_(F.normalize(weight.lerp(means, 1 - self.decay), dim=-1))

    def revive_unused(self) -> int:
        """Lets the next training batch give the codes that were not used since `reset_usage` a place among its vectors.

        The reference leaves a code where it is that nothing is near to, so it is lost for ever (Dhariwal et al. 2020,
        section 3.1, restart them likewise). The use is the same on all ranks. Returns how many there are.
        """
        self._dead = self.cluster_size == 0
        return int(self._dead.sum())

    @torch.no_grad()
    def _revive(self, z: Tensor) -> None:
        """Puts dead codes onto vectors drawn from rank 0's [M, C], one each; those beyond M wait for the next time."""
        dead = self._dead.nonzero().flatten()[: len(z)]  # an epoch's only one: the host waits for the device
        self._dead = None
        places = z[torch.randperm(len(z))[: len(dead)].to(z.device)].contiguous()
        if distributed.is_distributed() and len(dead):
            dist.broadcast(places, 0)
        self.embedding.weight[dead] = places.to(self.embedding.weight.dtype)

    def perplexity(self) -> float:
        """How many codes it would take, used equally, to be as varied as those in use now: exp of their entropy."""
        sizes = self.cluster_size.cpu().double()  # once an epoch
        shares = sizes / sizes.sum().clamp(min=1e-12)
        return float(torch.special.entr(shares).sum().exp())

    def reset_usage(self) -> None:
        """Forgets the counted use: before an epoch."""
        self.cluster_size.zero_()

    def count_usage(self, indices: Tensor) -> None:
        """Adds the use of codes seen in an evaluation; the codes themselves never move there."""
        self.cluster_size.add_(torch.bincount(indices.flatten(), minlength=len(self.cluster_size)))

    def unused_codes(self) -> int:
        """How many codes were not used on any rank since `reset_usage`."""
        return int((distributed.all_reduce_sum(self.cluster_size) == 0).sum())


@torch.no_grad()
def kmeans(samples: Tensor, clusters: int, rounds: int = 10, means: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Spherical k-means: unit samples [M, C] -> means [clusters, C], counts [clusters] (of the last assignment).

    Starts from samples drawn with torch's global generator, or from `means`; an empty cluster keeps its mean.
    """
    if means is None:
        count = len(samples)
        chosen = torch.randperm(count) if count >= clusters else torch.randint(0, count, (clusters,))
        means = samples[chosen[:clusters].to(samples.device)]
    for _ in range(rounds):
        nearest = (samples @ means.T).argmax(dim=-1)  # [M]
        counts = torch.bincount(nearest, minlength=clusters)
        sums = torch.zeros_like(means).index_add_(0, nearest, samples)
        updated = F.normalize(sums / counts.clamp(min=1).unsqueeze(1), dim=-1)
        means = torch.where(counts.unsqueeze(1) == 0, means, updated)
    return means, counts
