"""The ranks that together are one untrusted party: which heads are whose, and how requests get to all of them.

Under tensor parallelism every rank has the residual rows whole, and of each block a share of the weights: q, k and v of
its own heads, the columns of the output projection for these, and a part of the feed-forward. transformers' linear
layers sum over the ranks behind the last two. Feature permutations are drawn per head, so a rank that gets its own
heads of a request's tensors keeps, unlocks, scores and attends these alone, as `UntrustedParty` does with all of them.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from scx.party.boundary import Request
from scx.party.messages import (
    read_agreement,
    read_request_header,
    source_of,
    write_agreement,
    write_request,
)
from scx.party.plan import Plan

__all__ = ["HEADS", "ParallelRanks", "Ranks", "check_ranks", "hold_shares", "join_heads", "join_ranks", "share_heads"]

HEADS: dict[str, int] = {
    "query": 1,
    "key": 1,
    "value": 1,
    "attention": 1,
    "encoded_keys": 1,
    "scores": 1,
    "output_scale": 1,
    "attention_rows": 2,
    "query_product": 2,
    "key_product": 2,
    "value_product": 2,
}
"""Tensors that cross the boundary with all heads in them -> the dimension along which these lie. Any other is needed by
every rank whole, and comes back from every rank alike."""

_PATIENCE = timedelta(days=7)
_LOADING = timedelta(hours=2)


def check_ranks(size: int, config: Any) -> None:
    """Raises ValueError unless `size` ranks can have equal shares of a model's query and key/value heads."""
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", num_heads)
    if num_heads % size or num_kv_heads % size:
        common = math.gcd(num_heads, num_kv_heads)
        possible = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise ValueError(
            f"--nproc-per-node: {size} ranks do not divide {num_heads} query and {num_kv_heads} key/value heads; "
            f"expected one of {possible}"
        )


def share_heads(name: str, x: Tensor, size: int) -> list[Tensor]:
    """A whole tensor of the name `name` in `HEADS` -> every rank's own heads of it, each in memory of its own."""
    return [share.clone(memory_format=torch.contiguous_format) for share in x.chunk(size, HEADS[name])]


def join_heads(name: str, shares: list[Tensor]) -> Tensor:
    """Undo `share_heads`."""
    return torch.cat(shares, HEADS[name])


def hold_shares(model: nn.Module) -> None:
    """Replace weights that transformers split over the ranks by this rank's shares, plain tensors that can be read.

    Its linear layers take either. Rank 0 has the first rows of a weight that is split by rows.
    """
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if isinstance(weight, DTensor):
                module.register_parameter(name, nn.Parameter(weight.to_local(), requires_grad=False))


class Ranks:
    """One process, which has all heads: there is nobody to pass anything on to."""

    rank = 0

    def placement(self, config: Any) -> dict[str, Any]:
        """What `from_pretrained` must be told to load a model of this configuration."""
        return {}

    def wait(self) -> None:
        """Wait for the ranks that still load."""

    def agree(self, plan: Plan) -> None:
        """Tell the others, who have waited for one another, the plan. For rank 0."""

    def pass_on(self, request: Request) -> Request:
        """Give every rank its own heads of a request's tensors, which are on the CPU. For rank 0, which gets its own
        back."""
        return request

    def gather(self, reply: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ranks' replies, each with its own heads -> on rank 0 the whole reply. Others get their own back."""
        return dict(reply)

    def end(self) -> None:
        """Let the others end. For rank 0."""


class ParallelRanks(Ranks):
    """One of several processes.

    Args:
        group: of gloo, over all of them.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def placement(self, config: Any) -> dict[str, Any]:
        # transformers 5.17 takes a plan that is given for the whole one, and so leaves a head of odd size unsplit.
        plan = {f"model.{name}": style for name, style in (config.base_model_tp_plan or {}).items()}
        return {"distributed_config": DistributedConfig(tp_size=self._size, tp_plan=plan)}

    def wait(self) -> None:
        dist.monitored_barrier(self._group, timeout=_LOADING)

    def agree(self, plan: Plan) -> None:
        if plan.verify:
            raise ValueError(
                "verify: what is inside a feed-forward lies divided over the ranks, and is not gathered to be checked; "
                "start the worker as one rank"
            )
        self._tell(bytes(write_agreement(plan, "")[0]))

    def hear(self) -> Plan:
        """Wait for the plan. For all but rank 0."""
        self.wait()
        return read_agreement(source_of(self._tell()))[0]

    def pass_on(self, request: Request) -> Request:
        self._tell(bytes(write_request(0, request)[0]))
        return replace(request, tensors={name: self._send(name, x) for name, x in request.tensors.items()})

    def take(self) -> Request | None:
        """Wait for the next request; None when there are no more. For all but rank 0."""
        told = self._tell()
        if not told:
            return None
        request, kinds = read_request_header(source_of(told), 0)
        return replace(request, tensors={name: self._receive(name, *kind) for name, kind in kinds.items()})

    def gather(self, reply: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._gather(name, x) if name in HEADS else x for name, x in reply.items()}

    def end(self) -> None:
        self._tell(b"")

    def _tell(self, what: bytes = b"") -> bytes:
        """Rank 0's words, on every rank."""
        length = torch.tensor(len(what))
        dist.broadcast(length, src=0, group=self._group)
        told = torch.tensor(bytearray(what) or bytearray(int(length)), dtype=torch.uint8)
        if told.numel():
            dist.broadcast(told, src=0, group=self._group)
        return told.numpy().tobytes()

    def _send(self, name: str, x: Tensor) -> Tensor:
        if name not in HEADS:
            dist.broadcast(x, src=0, group=self._group)
            return x
        shares = share_heads(name, x, self._size)
        own = torch.empty_like(shares[0])
        dist.scatter(own, shares, src=0, group=self._group)
        return own

    def _receive(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if name not in HEADS:
            x = torch.empty(shape, dtype=dtype)
            dist.broadcast(x, src=0, group=self._group)
            return x
        dim = HEADS[name]
        own = torch.empty(*shape[:dim], shape[dim] // self._size, *shape[dim + 1 :], dtype=dtype)
        dist.scatter(own, src=0, group=self._group)
        return own

    def _gather(self, name: str, x: Tensor) -> Tensor:
        own = x.detach().cpu().contiguous()
        shares = [torch.empty_like(own) for _ in range(self._size)] if self.rank == 0 else None
        dist.gather(own, shares, dst=0, group=self._group)
        return own if shares is None else join_heads(name, shares)


@contextmanager
def join_ranks(size: int, device: torch.device, timeout: float = 60.0) -> Iterator[Ranks]:
    """Be one of the `size` ranks that torchrun started, within a `with` block.

    The model's sums go over gloo between CPUs and over NCCL between GPUs, requests and replies over gloo.

    Args:
        device: this rank's.
        timeout: seconds that a rank waits for the others in the middle of a request. Between requests the others wait
            for rank 0, and end when that is gone.
    """
    if size == 1:
        yield Ranks()
        return
    limit = timedelta(seconds=timeout)
    bound = device if device.type == "cuda" else None
    dist.init_process_group("nccl" if bound else "gloo", timeout=limit, device_id=bound)
    # A process's own limit: all but rank 0 spend the time between requests in their part of the next one.
    patience = limit if dist.get_rank() == 0 else _PATIENCE
    group = dist.new_group(backend="gloo", timeout=patience)
    yield ParallelRanks(group)
    dist.destroy_process_group()  # not after an error: a rank that is lost takes no leave
