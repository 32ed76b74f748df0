"""Writes and reads checkpoints: DCP for training state, PEFT or Hugging Face format for inference.

A checkpoint is a folder with a manifest; it is written beside its place and renamed into it, so that half of one is
never seen.
"""

import datetime
import errno
import hashlib
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from xorl.engine.adapters import TrainedModel
from xorl.engine.export import whole_parameters
from xorl.engine.model import BaseModel
from xorl.engine.ranks import Ranks
from xorl.errors import CheckpointError, InvalidRequest, StorageFull
from xorl.types import MANIFEST, Manifest


def save_training(
    model: TrainedModel,
    base: BaseModel,
    *,
    model_id: str,
    name: str,
    directory: Path,
    replace: bool,
    user_metadata: dict[str, str] | None,
) -> int:
    """Write weights and optimizer state; returns the checkpoint's size in bytes."""
    ranks, state = base.ranks, _training_state(model)
    with _publishing(directory, replace, ranks) as draft:
        with _quiet_dcp():
            dcp.save(state, checkpoint_id=draft, process_group=ranks.host_group, no_dist=ranks.size == 1)
        return ranks.from_first(lambda: _write_manifest(draft, "training", model, base, model_id, name, user_metadata))


def load_training(model: TrainedModel, base: BaseModel, directory: Path, *, optimizer: bool) -> None:
    """Restore what `save_training` wrote, to the bit, an adapter's alpha with it; drops accumulated gradients.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model; nothing was changed.
    """
    ranks = base.ranks
    manifest = ranks.from_first(lambda: _verified(directory, model, base))
    state = {key: torch.empty_like(value) for key, value in _training_state(model).items()}
    try:
        with _quiet_dcp():
            dcp.load(state, checkpoint_id=directory, process_group=ranks.host_group, no_dist=ranks.size == 1)
    except (CheckpointException, OSError, ValueError) as error:
        raise CheckpointError(f"{manifest.name}: {_reason(error)}") from error
    model.spec = manifest.lora
    model.reset()
    current = _training_state(model) if optimizer else _parameters(model)
    with torch.no_grad():
        for key, value in current.items():
            value.copy_(state[key])


def save_sampler(
    model: TrainedModel, base: BaseModel, *, model_id: str, name: str, directory: Path, replace: bool
) -> int:
    """Write what an inference server loads: PEFT's two files, or the whole model when full weights are trained."""
    with _publishing(directory, replace, base.ranks) as draft:
        state = whole_parameters(base) if model.spec is None else None

        def write() -> int:
            if state is None:
                _save_peft(model, base, draft)
            else:
                base.network.save_pretrained(draft, state_dict=state)
                _copy_tokenizer(Path(base.path), draft)
            return _write_manifest(draft, "sampler", model, base, model_id, name, None)

        return base.ranks.from_first(write)


def read_manifest(directory: Path) -> Manifest:
    try:
        return msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{directory.name}: there is no such checkpoint") from None
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{directory.name}/{MANIFEST}: {error}") from error


def verify(directory: Path, manifest: Manifest) -> None:
    """Raise CheckpointError naming the first file that is missing or not what was written."""
    for file, digest in manifest.files.items():
        path = directory / file
        if not path.is_file():
            raise CheckpointError(f"{manifest.name}/{file}: the file is missing")
        if _sha256(path) != digest:
            raise CheckpointError(f"{manifest.name}/{file}: its checksum differs from the manifest's")


def _verified(directory: Path, model: TrainedModel, base: BaseModel) -> Manifest:
    manifest = read_manifest(directory)
    _refuse_other_model(model, base, manifest)
    verify(directory, manifest)
    return manifest


def _refuse_other_model(model: TrainedModel, base: BaseModel, manifest: Manifest) -> None:
    if Path(manifest.base_model).name != Path(base.path).name:  # a folder may have moved
        raise CheckpointError(f"{manifest.name}: its base model is {manifest.base_model}, served is {base.path}")
    if model.spec is None or manifest.lora is None:
        if model.spec is not manifest.lora:
            kinds = ("full weights", "a LoRA adapter")
            stored, wanted = kinds[manifest.lora is not None], kinds[model.spec is not None]
            raise CheckpointError(f"{manifest.name}: it holds {stored}, the model trains {wanted}")
        return
    for field in ("rank", "target_modules"):
        stored, wanted = getattr(manifest.lora, field), getattr(model.spec, field)
        if stored != wanted:
            raise CheckpointError(f"{manifest.name}: its lora {field} is {stored}, the model's is {wanted}")


def _parameters(model: TrainedModel) -> dict[str, Tensor]:
    return {f"parameter.{name}": parameter.detach() for name, parameter in model.parameters.items()}


def _training_state(model: TrainedModel) -> dict[str, Tensor]:
    return _parameters(model) | model.optimizer_state()


def _save_peft(model: TrainedModel, base: BaseModel, directory: Path) -> None:
    assert model.spec is not None
    config = LoraConfig(
        r=model.spec.rank,
        lora_alpha=model.spec.alpha,  # pyright: ignore[reportArgumentType]  PEFT multiplies, so a fraction is fine
        target_modules=sorted(model.spec.target_modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.path,
        inference_mode=True,
    )
    config.save_pretrained(str(directory))
    tensors = {}
    for name, parameter in model.parameters.items():
        tensors[f"base_model.model.{name}.weight"] = parameter.detach().cpu().contiguous()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def _copy_tokenizer(source: Path, directory: Path) -> None:
    for pattern in ("tokenizer*", "vocab*", "merges*", "special_tokens*", "chat_template*"):
        for file in source.glob(pattern):
            shutil.copy(file, directory)


def _write_manifest(
    directory: Path,
    kind: Literal["training", "sampler"],
    model: TrainedModel,
    base: BaseModel,
    model_id: str,
    name: str,
    user_metadata: dict[str, str] | None,
) -> int:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    size_bytes = sum(path.stat().st_size for path in files)
    manifest = Manifest(
        kind=kind,
        model_id=model_id,
        name=name,
        base_model=base.path,
        time=datetime.datetime.now(datetime.UTC).isoformat(),
        step=model.num_steps,
        lora=model.spec,
        size_bytes=size_bytes,
        files={str(path.relative_to(directory)): _sha256(path) for path in files},
        user_metadata=user_metadata,
    )
    (directory / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    return size_bytes


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _publishing(directory: Path, replace: bool, ranks: Ranks) -> Iterator[Path]:
    """A folder beside `directory` for all ranks to write into; it takes that name when the block ends well, else it
    vanishes."""
    draft = directory.with_name(f".{directory.name}.{ranks.from_first(lambda: uuid.uuid4().hex)}")
    try:
        ranks.from_first(lambda: _begin(draft, directory, replace))
        yield draft
        ranks.from_first(lambda: _publish(draft, directory))
    except (OSError, SafetensorError, CheckpointException) as error:
        reason = _reason(error)
        if os.strerror(errno.ENOSPC) in reason:  # safetensors gives no number
            raise StorageFull(f"checkpoint {directory.name}: no space left on the disk") from error
        raise CheckpointError(f"checkpoint {directory.name}: {reason}") from error
    finally:
        if ranks.is_first:
            shutil.rmtree(draft, ignore_errors=True)


def _begin(draft: Path, directory: Path, replace: bool) -> None:
    if directory.exists() and not replace:
        raise InvalidRequest(f"path: checkpoint {directory.name} exists already; choose another name or overwrite it")
    draft.mkdir(parents=True)


def _publish(draft: Path, directory: Path) -> None:
    _sync_to_disk(draft)
    if directory.exists():
        old = directory.with_name(f"{draft.name}.old")
        directory.rename(old)
        try:
            draft.rename(directory)
        except OSError:
            old.rename(directory)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        draft.rename(directory)


def _reason(error: BaseException) -> str:
    """What went wrong; DCP's own text is a traceback."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    return "; ".join(str(cause) or type(cause).__name__ for cause in causes)


@contextmanager
def _quiet_dcp() -> Iterator[None]:
    with warnings.catch_warnings():  # DCP announces that it runs in one process, which is what we asked for
        warnings.simplefilter("ignore")
        yield


def _sync_to_disk(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
