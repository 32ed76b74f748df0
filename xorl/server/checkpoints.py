"""Finds checkpoints: their names and URIs on the wire, their folders on disk."""

import datetime
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args
from urllib.parse import quote

import msgspec

from xorl.errors import Forbidden, InvalidRequest, UnknownId
from xorl.server.schema import MODEL_ID_PATTERN, CheckpointRow
from xorl.server.store import Store
from xorl.types import MANIFEST, Manifest

Kind = Literal["weights", "sampler_weights"]
Scheme = Literal["xorl", "tinker"]

NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}")
RESERVED = "000000"
"""The name of the checkpoint that other servers of this API write for each new model."""


class CheckpointRef(NamedTuple):
    model_id: str
    kind: Kind
    name: str

    @property
    def checkpoint_id(self) -> str:
        return f"{self.kind}/{self.name}"

    def uri(self, scheme: Scheme) -> str:
        return f"{scheme}://{self.model_id}/{self.kind}/{self.name}"

    @property
    def native_uri(self) -> str:
        """With the scheme of the client whose kind of id this model has."""
        return self.uri("tinker" if ":" in self.model_id else "xorl")


def parse(path: str, model_id: str, field: str) -> CheckpointRef:
    """Read any accepted spelling: a URI M/weights/N, or weights/M/N, weights/N, M/N, N; M is `model_id` if not named.

    Raises:
        InvalidRequest: naming `field`.
    """
    scheme, separator, rest = path.partition("://")
    parts = (rest if separator else path).split("/")
    kinds = get_args(Kind)
    kind = "weights"
    if separator and (scheme not in get_args(Scheme) or len(parts) != 3 or parts[1] not in kinds):
        raise InvalidRequest(
            f"{field}: {path!r} is not xorl:// or tinker://<model>/weights/<name> (or sampler_weights)"
        )
    match parts:
        case [model, middle, name] if middle in kinds:
            model_id, kind = model, middle
        case [first, model, name] if first in kinds:
            model_id, kind = model, first
        case [first, name] if first in kinds:
            kind = first
        case [model, name]:
            model_id = model
        case [name]:
            pass
        case _:
            raise InvalidRequest(f"{field}: {path!r} is not a checkpoint")
    if not re.fullmatch(MODEL_ID_PATTERN.strip("^$"), model_id):
        raise InvalidRequest(f"{field}: {model_id!r} is not a model id")
    return CheckpointRef(model_id, kind, checked_name(name, field))  # pyright: ignore[reportArgumentType]


def checked_name(name: str, field: str) -> str:
    if not NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest(
            f"{field}: {name!r} is no checkpoint name: letters, digits and ._- but no slash, at most 128"
        )
    return name


def new_name(prefix: str) -> str:
    """A name that nothing else has, and that sorts by time."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{prefix}-{now:%Y%m%d-%H%M%S-%f}-{uuid.uuid4().hex[:4]}"


class Checkpoints:
    """The folders below `root`: <model>/weights/<name> and <model>/sampler_weights/<name>."""

    def __init__(self, root: Path, store: Store) -> None:
        self._root = root.resolve()
        self._store = store

    def directory(self, ref: CheckpointRef) -> Path:
        return self._model_directory(ref.model_id) / ref.kind / ref.name

    def saved(self, ref: CheckpointRef, ttl_seconds: float | None) -> None:
        """Note how long a checkpoint that has just been written is kept."""
        self._store.set_expiry(self.directory(ref), time.time() + ttl_seconds if ttl_seconds else None)

    def manifest(self, ref: CheckpointRef) -> Manifest:
        self.remove_expired()
        manifest = _read(self.directory(ref))
        if manifest is None:
            there = ", ".join(row.checkpoint_id for row in self.rows(ref.model_id)) or "none"
            raise UnknownId(f"checkpoint {ref.native_uri} does not exist; model {ref.model_id} has {there}")
        return manifest

    def rows(self, model_id: str) -> list[CheckpointRow]:
        """Newest first. A folder without a readable manifest is not a checkpoint."""
        self.remove_expired()
        rows = [self._row(ref, manifest) for ref, manifest in self._found(model_id)]
        return sorted(rows, key=lambda row: row.time, reverse=True)

    def has_any(self, model_id: str) -> bool:
        return any(True for _ in self._found(model_id))

    def delete(self, ref: CheckpointRef) -> None:
        if ref.name == RESERVED:
            raise Forbidden(f"checkpoint {ref.checkpoint_id} is reserved")
        self.manifest(ref)
        self._remove(self.directory(ref))

    def remove_expired(self) -> None:
        for directory in self._store.expired():
            self._remove(directory)

    def _remove(self, directory: Path) -> None:
        """Without its manifest it is no checkpoint any more, however far the rest of the removal gets."""
        (directory / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)
        self._store.set_expiry(directory, None)

    def _model_directory(self, model_id: str) -> Path:
        return self._root / quote(model_id, safe="")

    def _found(self, model_id: str) -> Iterator[tuple[CheckpointRef, Manifest]]:
        for kind in get_args(Kind):
            for path in (self._model_directory(model_id) / kind).glob(f"[!.]*/{MANIFEST}"):
                manifest = _read(path.parent)
                if manifest is not None:
                    yield CheckpointRef(model_id, kind, path.parent.name), manifest

    def _row(self, ref: CheckpointRef, manifest: Manifest) -> CheckpointRow:
        expiry = self._store.expiry(self.directory(ref))
        return CheckpointRow(
            checkpoint_id=ref.checkpoint_id,
            checkpoint_type="training" if ref.kind == "weights" else "sampler",
            time=manifest.time,
            path=ref.uri("xorl"),
            tinker_path=ref.uri("tinker"),
            size_bytes=manifest.size_bytes,
            expires_at=iso_time(expiry) if expiry else None,
            user_metadata=manifest.user_metadata,
        )


def iso_time(unix_time: float) -> str:
    return datetime.datetime.fromtimestamp(unix_time, datetime.UTC).isoformat()


def _read(directory: Path) -> Manifest | None:
    try:
        return msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError):
        return None
