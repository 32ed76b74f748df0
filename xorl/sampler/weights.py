"""Receives new weights, from a trainer's update group or from disk, into the model in place."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xorl.errors import InvalidRequest
from xorl.sampler.network import Network
from xorl.sync.broadcast import join_group
from xorl_kernels.fp8_quantize import dequantize

GROUP_TIMEOUT_S = 300.0
_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<idx>\d+)\.(?P<part>gate|up|down)_proj\.weight")


class TensorSpec(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class WeightReceiver:
    """This server's end of update groups, and the session in which updates are taken."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._parameters = dict(network.model.named_parameters())
        self._groups: dict[str, torch.distributed.ProcessGroup] = {}
        self._session = False

    def join(self, address: str, port: int, rank: int, world_size: int, name: str, backend: str) -> None:
        if name in self._groups:
            raise InvalidRequest(f"update group {name} exists already; destroy it first")
        try:
            self._groups[name] = join_group(address, port, rank, world_size, name, backend, GROUP_TIMEOUT_S)
        except (RuntimeError, ValueError) as error:  # torch.distributed's errors are RuntimeErrors
            raise InvalidRequest(f"update group {name}: {error}") from error

    def leave(self, name: str) -> None:
        self._group(name)
        del self._groups[name]

    def close(self) -> None:
        """Leave all groups: their threads must not outlive the interpreter."""
        self._groups.clear()

    def begin(self) -> None:
        if self._session:
            raise InvalidRequest("a weight update is open already; end it first")
        self._session = True

    def end(self) -> None:
        if not self._session:
            raise InvalidRequest("no weight update is open; call /begin_weight_update first")
        self._session = False

    def check(self, specs: Sequence[TensorSpec], group_name: str, *, flattened: bool) -> None:
        """Refuse, before anything waits, an announcement whose broadcast could not be received."""
        if not self._session:
            raise InvalidRequest("no weight update is open; call /begin_weight_update first")
        self._group(group_name)
        if flattened:
            _bucket_offsets(specs)

    def receive(self, specs: Sequence[TensorSpec], group_name: str, *, flattened: bool) -> None:
        """Take one announced broadcast and load it; of a bucket with anything wrong in it, nothing is loaded.

        Names and shapes are checked only after the broadcast, so that the sender and the group stay in step.

        Raises:
            InvalidRequest: naming the tensor that does not fit.
        """
        self.check(specs, group_name, flattened=flattened)
        group = self._group(group_name)
        offsets = _bucket_offsets(specs) if flattened else []
        try:
            tensors = self._take_bucket(group, specs, offsets) if flattened else self._take_each(group, specs)
        except RuntimeError as error:
            raise InvalidRequest(f"update group {group_name}: {error}") from error
        self._load(dict(zip((spec.name for spec in specs), tensors, strict=True)))

    def load_folder(self, folder: Path) -> None:
        """Load the safetensors of a checkpoint; the model stays as it was if anything in them does not fit."""
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise InvalidRequest(f"model_path: {folder} has no safetensors files")
        tensors: dict[str, Tensor] = {}
        for file in files:
            try:
                tensors.update(load_file(file))
            except (OSError, SafetensorError) as error:
                raise InvalidRequest(f"model_path: {file}: {error}") from error
        if self._network.tied:
            tensors.pop("lm_head.weight", None)
        missing = self._parameters.keys() - {self._home(name) for name in tensors}
        if missing:
            raise InvalidRequest(f"model_path: {folder} lacks {min(missing)}")
        self._load(tensors)

    def checksums(self) -> tuple[dict[str, str], str]:
        """Of every parameter by name: the first 8 bytes, in hex, of the SHA-256 of its bytes; and of all of them."""
        checksums = {
            name: hashlib.sha256(parameter.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[
                :16
            ]
            for name, parameter in self._parameters.items()
        }
        lines = "".join(f"{name} {checksum}\n" for name, checksum in sorted(checksums.items()))
        return checksums, hashlib.sha256(lines.encode()).hexdigest()[:16]

    def _group(self, name: str) -> "torch.distributed.ProcessGroup":
        if name not in self._groups:
            raise InvalidRequest(f"update group {name} does not exist; there are {sorted(self._groups)}")
        return self._groups[name]

    def _take_bucket(
        self, group: "torch.distributed.ProcessGroup", specs: Sequence[TensorSpec], offsets: Sequence[int]
    ) -> list[Tensor]:
        num_bytes = sum(spec.num_bytes for spec in specs)
        bucket = torch.empty(num_bytes, dtype=torch.uint8, device=self._network.device)
        group.broadcast(bucket, 0).wait()
        return [
            bucket[offset : offset + spec.num_bytes].view(spec.dtype).view(spec.shape)
            for offset, spec in zip(offsets, specs, strict=True)
        ]

    def _take_each(self, group: "torch.distributed.ProcessGroup", specs: Sequence[TensorSpec]) -> list[Tensor]:
        tensors = [torch.empty(spec.shape, dtype=spec.dtype, device=self._network.device) for spec in specs]
        for work in [group.broadcast(tensor, 0) for tensor in tensors]:
            work.wait()
        return tensors

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        copies = [(self._target(name, tensor), tensor) for name, tensor in _dequantized(tensors).items()]
        with torch.no_grad():
            for target, tensor in copies:
                target.copy_(tensor)

    def _target(self, name: str, tensor: Tensor) -> Tensor:
        """The parameter, or the part of one, that a checkpoint's tensor of this name fills."""
        target = self._parameters.get(name)
        if target is None and (match := _EXPERT.fullmatch(name)):
            target = self._expert(match)
        if target is None and name == "lm_head.weight" and self._network.tied:
            raise InvalidRequest(f"{name}: it is tied to the embedding here; send model.embed_tokens.weight alone")
        if target is None:
            raise InvalidRequest(f"{name}: this model has no such weight")
        if target.shape != tensor.shape:
            raise InvalidRequest(f"{name}: shape {list(tensor.shape)}, the model's is {list(target.shape)}")
        return target

    def _home(self, name: str) -> str:
        """The parameter that a checkpoint's tensor goes into."""
        match = _EXPERT.fullmatch(name)
        if name in self._parameters or match is None:
            return name
        return f"{match['experts']}.{'down_proj' if match['part'] == 'down' else 'gate_up_proj'}"

    def _expert(self, match: re.Match[str]) -> Tensor | None:
        """One expert's projection, where transformers stacks all experts of a layer."""
        stacked = self._parameters.get(self._home(match.string))
        if stacked is None or int(match["idx"]) >= len(stacked):
            return None
        expert = stacked[int(match["idx"])]
        if match["part"] == "down":
            return expert
        return expert.chunk(2)[0 if match["part"] == "gate" else 1]


def _dequantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """FP8 weights times their scales, which come with them; the others as they are."""
    plain = dict(tensors)
    for name, codes in tensors.items():
        if codes.dtype.itemsize > 1:
            continue
        scales = plain.pop(f"{name}_scale_inv", None)
        if scales is None:
            scales = plain.pop(f"{name}_scale", None)
        if scales is None:
            raise InvalidRequest(f"{name}: {codes.dtype} needs a scale, {name}_scale_inv, in the same update")
        try:
            plain[name] = dequantize(codes, scales)
        except ValueError as error:
            raise InvalidRequest(f"{name}: {error}") from None
    return plain


def _bucket_offsets(specs: Sequence[TensorSpec]) -> list[int]:
    offsets, offset = [], 0
    for spec in specs:
        if offset % spec.dtype.itemsize:
            raise InvalidRequest(
                f"{spec.name}: offset {offset} is not a multiple of its item size; put wide items first"
            )
        offsets.append(offset)
        offset += spec.num_bytes
    return offsets
