"""LoRA adapters of PEFT on a quantized base: what is quantized, merged, saved and resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import nipq
from nipq.config import Config, Rule
from nipq.errors import OrderError
from nipq.prepare.layer_table import layer_table, quantizers, set_phase_

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT's own

IDS = torch.arange(32).reshape(4, 8)
BATCH = {"input_ids": IDS, "labels": IDS}


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 32, "max_position_embeddings": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def adapted(model: nn.Module) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def test_adapters_stay_float_unless_a_rule_names_them() -> None:
    model = adapted(llama())
    notes = {finding.name: finding.reason for finding in nipq.validate(model, BATCH)}
    adapters = [name for name in notes if "lora_A" in name or "lora_B" in name]
    assert len(adapters) == 2
    assert all("adapter" in notes[name] for name in adapters)
    assert not [row.name for row in layer_table(nipq.prepare_(model, BATCH)) if "lora" in row.name]
    asked = Config(rules=(Rule("*lora_A*", weight_bits=4),))
    found = [row.name for row in layer_table(nipq.prepare_(adapted(llama()), BATCH, asked)) if "lora" in row.name]
    assert len(found) == 1


@torch.no_grad()
@pytest.mark.parametrize("safe", [False, True])
def test_merging_moves_the_float_weight_of_a_quantized_base(safe: bool) -> None:
    base = nipq.prepare_(llama(), BATCH)
    nipq.calibrate_(base, [BATCH])
    model = adapted(base)
    layer = model.model.model.layers[0].self_attn.q_proj
    weight = layer.base_layer.get_parameter("parametrizations.weight.original")
    expected = weight + layer.get_delta_weight("default")
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=safe)
    found = merged.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(found.get_parameter("parametrizations.weight.original").data, expected)


def trainer(folder: Path, steps: int, *, model: nn.Module | None = None, **given: Any) -> Any:
    settings: dict[str, Any] = {
        "save_steps": 2,
        "report_to": [],
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
    }
    settings |= {"save_strategy": "steps", "logging_steps": 1, "use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(str(folder), max_steps=steps, **settings | given)
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    made = transformers.Trainer(model or adapted(llama()), arguments, train_dataset=data, eval_dataset=data)
    nipq_trainer = pytest.importorskip("nipq.integrations.transformers")
    nipq_trainer.quantize(made, nipq.AverageBits(weights=4), calibration_batches=1, allocation_batches=1)
    return made


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_a_resumed_run_ends_where_one_without_a_break_does(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", 6)
    whole.train()
    halved = trainer(tmp_path / "whole", 6)
    with torch.no_grad():
        for row in layer_table(halved.model):
            row.weight.alpha_raw.add_(1)  # what the checkpoint must bring back
    halved.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    expected, found = state(whole.model), state(halved.model)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=key)


def test_a_checkpoint_without_the_quantizers_is_refused(tmp_path: Path) -> None:
    first = trainer(tmp_path, 2)
    first.train()
    (tmp_path / "checkpoint-2" / "nipq_quantizers.safetensors").unlink()
    with pytest.raises(OrderError, match="expected the quantizers of the base model"):
        trainer(tmp_path, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_quantizers_of_a_base_prepared_before_are_learned(tmp_path: Path) -> None:
    base = nipq.prepare_(llama(), BATCH)
    nipq.calibrate_(base, [BATCH])
    made = trainer(tmp_path, 4, model=adapted(base))  # get_peft_model stops all that is no adapter
    before = {q.name: q.alpha.detach().clone() for q in quantizers(made.model)}
    made.train()
    moved = [q.name for q in quantizers(made.model) if not torch.equal(q.alpha.detach(), before[q.name])]
    assert len(moved) > len(before) // 2


def test_the_best_checkpoint_comes_back_with_its_quantizers(tmp_path: Path) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    made = trainer(tmp_path, 4, **best)
    made.train()
    with torch.no_grad():
        for quantizer in quantizers(made.model):
            quantizer.alpha_raw.add_(1)  # as steps after the best one do
    made._load_best_model()
    folder = Path(made.state.best_model_checkpoint)
    saved, found = load_file(folder / "nipq_quantizers.safetensors"), made.model.state_dict()
    assert len(saved) > 40
    for key, value in saved.items():
        assert torch.equal(found[key], value), key
    assert made.evaluate()["eval_loss"] == pytest.approx(made.state.best_metric)


def test_a_copy_of_a_layer_that_an_adapter_trains_is_refused_or_stands_for_it() -> None:
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    base = nipq.prepare_(llama(), BATCH)
    with pytest.raises(OrderError, match="lm_head: expected one prepared layer of that name"):
        layer_table(peft.get_peft_model(base, lora))
    names = [row.name for row in layer_table(nipq.prepare_(peft.get_peft_model(llama(), lora), BATCH))]
    assert [name for name in names if "lm_head" in name] == ["base_model.model.lm_head.modules_to_save.default"]


@torch.no_grad()
@pytest.mark.parametrize(
    "adapter",
    [
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        peft.LoHaConfig(r=2, target_modules=["q_proj"]),
        peft.VeraConfig(r=2, target_modules=["q_proj"]),
        peft.AdaLoraConfig(target_modules=["q_proj"], total_step=4),
    ],
    ids=lambda adapter: adapter.peft_type.value,
)
def test_other_adapters_merge_into_the_float_weight(adapter: Any) -> None:
    base = nipq.prepare_(llama(), BATCH)
    nipq.calibrate_(base, [BATCH])
    model = peft.get_peft_model(base, adapter).eval()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("ia3", "hada", "vera_lambda", "lora_E")):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    set_phase_(model, "float")
    expected = model(**BATCH).logits
    torch.testing.assert_close(model.merge_and_unload()(**BATCH).logits, expected)
