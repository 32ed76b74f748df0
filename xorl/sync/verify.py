"""Compares what servers hold after a sync with what they were sent.

A server of one rank on a CPU hashes the bytes of its parameters, which can be foretold: it puts q, k and v, gate and
up, and the experts of a layer side by side, in the order in which they are sent. A hash made on a GPU, or of a rank's
share, cannot; there, servers that were sent the same are compared with each other, and one alone stays unverified.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from xorl.sync.plan import Bucket
from xorl.sync.receiver import Checksums, ServerInfo
from xorl.sync.targets import Target, Targets
from xorl_kernels.fp8_quantize import dequantize

_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.\d+\.(?P<part>gate|up|down)_proj\.weight")
_PARTS = re.compile(r"(?P<before>.*\.)(?P<part>[qkv]|gate|up)_proj(?P<after>\.\w+)")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Expected:
    """Checksums of all parameters, as one server's names have them: the first 8 bytes of SHA-256, in hex."""

    def __init__(self, info: ServerInfo) -> None:
        self._name = _our_name if info.dequantizes else _fused_name
        self._dtype = _DTYPES.get(info.dtype or "")
        self._fp8_dtype = self._dtype if info.dequantizes else torch.bfloat16  # SGLang's checker dequantises into that
        self._hashes: dict[str, hashlib._Hash] = {}

    def clear(self) -> None:
        self._hashes.clear()

    def add(self, bucket: Bucket, tensors: Mapping[str, Tensor]) -> None:
        """Note what is sent; weights that servers put side by side must come in that order."""
        for item in bucket.items:
            values, dtype = tensors[item.values.name], self._dtype
            if item.scales is not None:
                values, dtype = dequantize(values, tensors[item.scales.name]), self._fp8_dtype
            flat = values.to(dtype or values.dtype).cpu().flatten().view(torch.uint8)
            self._hashes.setdefault(self._name(item.values.name), hashlib.sha256()).update(flat.numpy().data)

    def difference(self, theirs: Mapping[str, str]) -> str | None:
        """The first parameter that is other than it was sent.

        Raises:
            LookupError: the server has other names for its parameters than are known here.
        """
        for name, expected in self._hashes.items():
            if name not in theirs:
                raise LookupError(name)
            if theirs[name] != expected.hexdigest()[:16]:
                return name
        return None


def is_foretold(info: ServerInfo) -> bool:
    return info.device == "cpu" and (info.tp_size or 1) == 1


def verify(targets: Targets, expected: Mapping[Target, Expected]) -> None:
    """Ask all for their checksums; who holds something else than it was sent is out of the sync.

    Args:
        targets: who were sent the same.
        expected: what those must hold of whom that can be told.
    """
    found: dict[Target, Checksums] = {}

    def ask(target: Target) -> None:
        found[target] = target.receiver.checksums()

    targets.each_may_refuse(ask)
    for target in targets.live:
        if target in found and target in expected:
            _check(target, expected[target], found[target])
    others = [target for target in targets.live if target in found and target not in expected]
    alike: dict[object, list[Target]] = {}
    for target in others:
        alike.setdefault((target.info.device, target.info.tp_size, target.info.dtype), []).append(target)
    for peers in alike.values():
        _compare(peers, found)


def _check(target: Target, expected: Expected, found: Checksums) -> None:
    try:
        name = expected.difference(found.ranks[0])
    except LookupError as error:
        target.remarks.append(f"not verified: it has no parameter {error.args[0]}, so its names are unknown here")
        return
    if name is not None:
        target.fail(f"{target.receiver.address}: {name} is not what was sent, by its checksum")


def _compare(peers: Sequence[Target], found: Mapping[Target, Checksums]) -> None:
    if len(peers) == 1:
        peers[0].remarks.append("not verified: its checksums cannot be foretold, and no other server is like it")
    elif len({found[peer].whole for peer in peers}) > 1:
        for peer in peers:
            peer.fail(f"{peer.receiver.address}: it and others like it hold different weights, by their checksums")


def _our_name(name: str) -> str:
    """`xorl sampler`'s, which are transformers'."""
    match = _EXPERT.fullmatch(name)
    return name if match is None else f"{match['experts']}.{'down' if match['part'] == 'down' else 'gate_up'}_proj"


def _fused_name(name: str) -> str:
    """SGLang's."""
    if match := _EXPERT.fullmatch(name):
        return f"{match['experts']}.{'w2' if match['part'] == 'down' else 'w13'}_weight"
    if match := _PARTS.fullmatch(name):
        return f"{match['before']}{'gate_up' if len(match['part']) > 1 else 'qkv'}_proj{match['after']}"
    return name
