"""Splits the layers of a network over the ranks."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from xorl.engine.ranks import Ranks

SHARE = 0.7
"""Of the free memory, what weights, gradients and moments may take on a device that holds all of them."""


def is_to_be_sharded(
    mode: Literal["auto", "always", "never"], network: nn.Module, ranks: Ranks, device: torch.device
) -> bool:
    """Whether each rank keeps a part of the layers only; on all ranks the same. `network` is not on `device` yet."""
    if ranks.size == 1 or mode == "never":
        return False
    if mode == "always":
        return True
    return ranks.any(device.type == "cuda" and _needed_bytes(network) > SHARE * torch.cuda.mem_get_info(device)[0])


def _needed_bytes(network: nn.Module) -> int:
    """Trained weights have a gradient, the one of a request and two moments beside them."""
    return sum((5 if p.requires_grad else 1) * p.numel() * p.element_size() for p in network.parameters())


def shard(network: PreTrainedModel, dtype: torch.dtype, ranks: Ranks, device: torch.device) -> None:
    """Leave each rank its part of every layer, and put that on `device`; layers are whole only while they compute.

    Embedding, final norm and head stay whole on every rank. Gradients of the layers are summed over the ranks in each
    backward; those of the rest are not.
    """
    body = network.base_model
    layers = body.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    mesh = init_device_mesh(device.type, (ranks.size,))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
    whole = set(body.parameters()) - set(layers.parameters())
    fully_shard(body, mesh=mesh, reshard_after_forward=True, mp_policy=precision, ignored_params=whole)
    for module in body.modules():
        if isinstance(module, FSDPModule):  # sums, and not of what gloo cannot scale
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    nn.Module.to(network, device)
    network.enable_input_require_grads()  # so that every backward passes through all layers, on all ranks


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same memory; all of one that is not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def whole(tensor: Tensor) -> Tensor:
    """All ranks' parts together, for which all must ask; a tensor that is not sharded as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.full_tensor()


def parted_like(part: Tensor, model: Tensor) -> Tensor:
    """A tensor of which `part` is this rank's, sharded as `model` is."""
    if not isinstance(model, DTensor):
        return part
    return DTensor.from_local(
        part, model.device_mesh, model.placements, run_check=False, shape=model.shape, stride=model.stride()
    )
