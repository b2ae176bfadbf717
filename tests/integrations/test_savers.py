"""Tied weights and shared bit-widths go through the programs that save models, before and after the freeze."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import nipq
from nipq.config import BitRange, Config
from nipq.prepare.layer_table import quantizers

transformers = pytest.importorskip("transformers")

IDS = torch.arange(32).reshape(4, 8)
BATCH = {"input_ids": IDS, "labels": IDS}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt2() -> Any:
    settings = {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "vocab_size": 32,
        "n_positions": 16,
        "loss_type": "ForCausalLM",
    }
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings, **TOKENS))


def bert() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 32, "max_position_embeddings": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **heads))


def llama() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 32, "tie_word_embeddings": True}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **TOKENS))


class Shared(nn.Module):
    """Two layers that read the same tensor and share their bit-widths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = torch.relu(self.stem(input_ids.float()))
        return {"logits": self.left(x) * self.right(x)}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Config]] = {
    "gpt2": (gpt2, Config(embedding_bits=BitRange())),
    "bert": (bert, Config()),
    "llama": (llama, Config()),
    "shared bits": (Shared, Config(shared_bits=("left", "right"), input_bits=None)),
}


def made(name: str, seed: int = 0) -> nn.Module:
    build, config = NETWORKS[name]
    torch.manual_seed(seed)
    return nipq.prepare_(build(), BATCH, config)


def through_safetensors(model: nn.Module, fresh: nn.Module, folder: Path) -> None:
    save_model(model, str(folder / "model.safetensors"))
    load_model(fresh, folder / "model.safetensors")


def through_a_state_dict(model: nn.Module, fresh: nn.Module, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "model.pt")
    fresh.load_state_dict(torch.load(folder / "model.pt", weights_only=True))


def through_the_trainer(model: nn.Module, fresh: nn.Module, folder: Path) -> None:
    arguments = transformers.TrainingArguments(str(folder), report_to=[], use_cpu=True)
    transformers.Trainer(model, arguments).save_model(str(folder))
    transformers.Trainer(fresh, arguments)._load_from_checkpoint(str(folder))


def through_accelerate(model: nn.Module, fresh: nn.Module, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    for which, one in (("save_state", model), ("load_state", fresh)):
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.prepare(one)
        getattr(accelerator, which)(str(folder / "state"))
        accelerator.free_memory()


def through_distributed_checkpoint(model: nn.Module, fresh: nn.Module, folder: Path) -> None:
    if all(quantizer.is_frozen for quantizer in quantizers(model)):
        nipq.freeze_bits_(fresh)  # it reads what the fresh model has
    saved, state = get_model_state_dict(model), get_model_state_dict(fresh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own: one process, deprecated storage
        dcp.save(saved, checkpoint_id=folder / "dcp", no_dist=True)
        dcp.load(state, checkpoint_id=folder / "dcp", no_dist=True)
    set_model_state_dict(fresh, state)


WAYS = [
    through_safetensors, through_a_state_dict, through_the_trainer, through_accelerate, through_distributed_checkpoint
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("frozen", [False, True], ids=["learned", "frozen"])
@pytest.mark.parametrize("save", WAYS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_fresh_model_takes_the_state(
    name: str, save: Callable[[nn.Module, nn.Module, Path], None], frozen: bool, tmp_path: Path
) -> None:
    model, fresh = made(name), made(name, seed=1)
    nipq.calibrate_(model, [BATCH])
    if frozen:
        nipq.freeze_bits_(model, nipq.AverageBits(weights=4))
    save(model, fresh, tmp_path)
    expected, found = model.state_dict(), fresh.state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert torch.equal(fresh.eval()(**BATCH)["logits"], model.eval()(**BATCH)["logits"])


@pytest.mark.parametrize("name", ["gpt2", "llama", "shared bits"])
def test_no_two_tensors_of_a_state_dict_share_memory(name: str, tmp_path: Path) -> None:
    state = {key: value.contiguous() for key, value in made(name).state_dict().items()}
    save_file(state, tmp_path / "state.safetensors")  # refuses shared memory
    assert (tmp_path / "state.safetensors").is_file()
