"""Leaves weights on disk for servers that cannot join an update group, and has them loaded from there."""

import json
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PretrainedConfig

from xorl.engine.commands import Endpoint
from xorl.quantization import BLOCK, Fp8
from xorl.sync.produce import Plan, in_new_memory, tensors_in
from xorl.sync.targets import Target, Targets
from xorl.sync.verify import Expected

UNREADABLE = "Failed to get weights iterator"
"""SGLang's words for having found no weights, so that the old ones are intact; after any other failure they are not."""


class Shelf:
    """Hugging Face folders with the weights of the last syncs.

    A server takes the folder that it loaded for its model's from then on, so one stays until all have had another.
    """

    def __init__(self, root: Path, config: PretrainedConfig) -> None:
        self._root = root
        self._config = config
        self._used: dict[Endpoint, Path] = {}

    def deliver(self, plan: Plan, targets: Targets, version: str, expected: Sequence[Expected]) -> None:
        """Write the weights once and have all who are in load them; who fails is out.

        Raises:
            NonFinite: a weight is; nobody has loaded anything.
        """
        folder = self._root / secrets.token_hex(8)
        try:
            save(plan, folder, self._config, expected)
            targets.each(lambda target: _load(target, folder, version))
        except (OSError, SafetensorError) as error:
            for target in targets.live:
                target.fail(f"{folder}: {error}")
        finally:
            self._used |= {target.endpoint: folder for target in targets.live if target.whole}
            self._clear()

    def _clear(self) -> None:
        """Also what another run of this trainer left behind."""
        for folder in self._root.glob("*"):
            if folder not in self._used.values():
                shutil.rmtree(folder, ignore_errors=True)


def save(plan: Plan, folder: Path, config: PretrainedConfig, expected: Sequence[Expected] = ()) -> None:
    """Write the weights as a model of Hugging Face's, a file for each bucket, and tell `expected` of them.

    Raises:
        NonFinite: a weight is.
    """
    for each in expected:
        each.clear()
    folder.mkdir(parents=True)
    files: dict[str, str] = {}
    for number, bucket in enumerate(plan.buckets, 1):
        file = f"model-{number:05}-of-{len(plan.buckets):05}.safetensors"
        tensors = tensors_in(bucket, in_new_memory(plan.packer(bucket)))
        for each in expected:
            each.add(bucket, tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    fields = config.to_dict() | ({} if plan.fp8 is None else {"quantization_config": _describe(plan.fp8)})
    (folder / "config.json").write_text(json.dumps(fields))


def _load(target: Target, folder: Path, version: str) -> None:
    target.touched = True
    try:
        target.receiver.update_from_disk(str(folder), version, flush_cache=False)
    except Exception as error:
        target.touched = UNREADABLE not in str(error)
        raise
    target.whole = True


def _describe(fp8: Fp8) -> dict[str, object]:
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": BLOCK if fp8.form == "block" else None,
        "modules_to_not_convert": list(fp8.not_converted),
    }
