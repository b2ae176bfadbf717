"""Checkpoints: written whole or not at all. A file of whole tensors is read without running anything stored in it.

Where processes hold parts of tensors, the parts lie in a folder beside the file, written by all of them at once
through ``torch.distributed.checkpoint``; the file names the folder, so it is the file that makes a checkpoint valid. A
folder is named anew every time and goes when the next file is there. Any number of processes can read it, one as well.
Their index is a pickle, of which nothing but the plain records of an index is built.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from nipq.distributed import all_or_none, all_present, from_rank_zero, is_sharded, rank, whole
from nipq.errors import DistributedError, FileFormatError, first_line
from nipq.files import check_seal, seal, written_whole

FORMAT = "nipq.train.checkpoint"
#: 2: the state of a QATSession; 1 held those of its parts.
VERSION = 2
#: Entries of a placeholder for a sharded tensor.
PLACEHOLDER = {"shard", "shape", "dtype"}


@dataclass
class Progress:
    """Progress of a run: everything that is not in a state dict and cannot be derived from the config.

    Attributes:
        stage: ``float``, ``search``, ``finetune`` or ``done``.
        epoch: epochs of the stage that are complete.
        step: steps of the present epoch that are complete.
        sums: loss, hits and images so far in the present epoch.
        rows: rows of the metrics file that belong to this state.
        steps_total: training steps since the start of the run.
        states: metrics of each named state of the model (``float``, ``frozen``, ``bn``, ``finetuned``).
        seconds: training time so far; the only entry that differs between runs.
    """

    stage: str = "float"
    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    rows: int = 0
    steps_total: int = 0
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Checkpoint:
    """All of a run at one moment.

    Attributes:
        progress: how far the run has come.
        model: state dict of the model.
        optimizers: states of the stage's optimizers, or ``None`` where nothing is trained.
        average: state of the float stage's weight average, or ``None``.
        session: state of the QAT session, or ``None`` outside of it.
    """

    progress: Progress
    model: dict[str, Tensor]
    optimizers: list[dict[str, Any]] | None = None
    average: dict[str, Any] | None = None
    session: dict[str, Any] | None = None

    def save(self, path: Path) -> None:
        """Write the file; a kill leaves the old or the new one. All processes call it, the first one writes.

        Args:
            path: the file.
        """
        parts: dict[str, Tensor] = {}
        content = {f.name: _apart(getattr(self, f.name), f.name, parts) for f in fields(self) if f.name != "progress"}
        content |= {"format": FORMAT, "version": VERSION, "progress": asdict(self.progress), "shards": None}
        if parts:
            content["shards"] = from_rank_zero(lambda: f"{path.stem}-{uuid4().hex}.shards")
            try:
                with all_present("writing a checkpoint"):
                    save(parts, checkpoint_id=path.with_name(content["shards"]))
            except CheckpointException as error:
                raise DistributedError(
                    f"expected every process to write its part of {path}, found that one could not ({_reason(error)}); "
                    "the checkpoint before is as it was: make room, then continue with --resume"
                ) from error
        with all_or_none("writing a checkpoint"):
            if rank() == 0:
                with written_whole(path) as temporary:
                    torch.save(content, temporary)
                    seal(temporary)
                for folder in path.parent.glob(f"{path.stem}-*.shards"):
                    if folder.name != content["shards"]:
                        shutil.rmtree(folder, ignore_errors=True)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint.

        Args:
            path: the file.

        Returns:
            The checkpoint, on the CPU.

        Raises:
            FileFormatError: if the file is damaged, is something else, or is of another version.
        """
        check_seal(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise FileFormatError(
                f"expected a checkpoint in {path}, could not read it ({_reason(error)}); "
                "restore the file or start a new folder"
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise FileFormatError(
                f"expected a checkpoint of nipq train in {path}, found something else; "
                "restore the file or start a new folder"
            )
        if content.get("version") != VERSION:
            raise FileFormatError(
                f"expected checkpoint version {VERSION} in {path}, found {content.get('version')!r}; "
                "continue with the nipq release that wrote it"
            )
        try:
            kept = {key: content[key] for key in ("model", "optimizers", "average", "session")}
            if content.get("shards") is not None:
                kept = _joined(kept, _folder(path, content["shards"]))
            progress = Progress(**content["progress"])
            if not isinstance(kept["model"], dict) or not isinstance(progress.rows, int):
                raise TypeError("of another type")
            return cls(progress=progress, **kept)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FileFormatError(f"the checkpoint {path} lacks entries ({error}); start a new folder") from error


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model, of which each process may hold a part, on the CPU; all processes call it."""
    return {name: whole(tensor.detach()).cpu() for name, tensor in model.state_dict().items()}


def _apart(tree: Any, name: str, parts: dict[str, Tensor]) -> Any:  # noqa: ANN401
    """The tree with every sharded tensor replaced by where to find it; the tensors themselves go to ``parts``."""
    if isinstance(tree, dict):
        return {key: _apart(value, f"{name}/{key}", parts) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_apart(value, f"{name}/{place}", parts) for place, value in enumerate(tree)]
    if isinstance(tree, Tensor) and is_sharded(tree):
        parts[name] = tree.detach()
        return {"shard": name, "shape": list(tree.shape), "dtype": str(tree.dtype).removeprefix("torch.")}
    return tree


def _folder(path: Path, name: str) -> Path:
    """The folder of shards that a checkpoint names; it lies beside it."""
    try:
        return path.with_name(name)
    except ValueError as error:
        raise FileFormatError(
            f"expected in {path} the name of the folder of its shards, found {name!r}; restore the file or start a new "
            "folder"
        ) from error


def _joined(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The tree with all tensors in it, whole."""
    tensors: dict[str, Tensor] = {}
    found: dict[str, Any] = _filled(tree, lambda entry: tensors.setdefault(entry["shard"], _empty(entry)))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)  # this process reads alone
            load(tensors, checkpoint_id=folder, storage_reader=_IndexReader(folder), no_dist=True)
    except (Exception, CheckpointException) as error:  # torch's own is no Exception
        raise FileFormatError(
            f"expected the shards of a checkpoint in {folder}, could not read them ({_reason(error)}); restore the "
            "folder or start a new one"
        ) from error
    return found


#: Where the classes are that an index of shards may name, and those of them that are not in torch's metadata.
_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"),
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Builds the plain records of an index, and nothing else that a pickle may name."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - a class
        """Find one of the classes that an index holds."""
        found = (module, name)
        known = module == _METADATA and name.isidentifier() and isinstance(getattr(metadata, name, None), type)
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not (known or dtype or found in _ALLOWED):
            raise pickle.UnpicklingError(f"the index names {module}.{name}, which no index of shards does")
        return super().find_class(module, name)


class _IndexReader(FileSystemReader):
    """Reads shards without running anything that their index, a pickle, may name."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> metadata.Metadata:  # noqa: ANN401 - torch's own
        """Read the index."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, metadata.Metadata):
            raise pickle.UnpicklingError("it is no index of shards")
        storage = getattr(found, "storage_meta", None) or metadata.StorageMeta()
        storage.load_id = self.load_id
        found.storage_meta = storage
        return found


def _reason(error: BaseException) -> str:
    """One line about an error; of torch's collection of errors, about the first rank's."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return first_line(error)


def _filled(tree: Any, read: Callable[[dict[str, Any]], Tensor]) -> Any:  # noqa: ANN401
    if isinstance(tree, dict):
        return read(tree) if tree.keys() == PLACEHOLDER else {key: _filled(value, read) for key, value in tree.items()}
    return [_filled(value, read) for value in tree] if isinstance(tree, list) else tree


def _empty(entry: dict[str, Any]) -> Tensor:
    return torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
