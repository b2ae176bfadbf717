"""Transformers of both libraries as they are, small and with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

WORDS = 50


@dataclass(frozen=True)
class Subject:
    """A model and what it is called with.

    Attributes:
        build: makes the model, the same every time.
        batch: what it is called with.
        embeddings: how many tables it has.
    """

    build: Callable[[], nn.Module]
    batch: dict[str, Tensor] | Tensor
    embeddings: int = 0


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def built() -> nn.Module:
        torch.manual_seed(0)
        return build().eval()

    return built


def texts(count: int = 4, length: int = 7) -> dict[str, Tensor]:
    """Token numbers with padding on the right, and the mask that says so."""
    draws = torch.Generator().manual_seed(1)
    ids = torch.randint(1, WORDS, (count, length), generator=draws)
    mask = (torch.arange(length) < torch.randint(3, length + 1, (count, 1), generator=draws)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def images(side: int = 16) -> Tensor:
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))


def encoder_sizes(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return sizes | {"vocab_size": WORDS, "max_position_embeddings": 16} | more


def of_transformers(name: str) -> Subject:
    library = pytest.importorskip("transformers")

    def build(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
        return seeded(lambda: getattr(library, model)(getattr(library, config)(**settings)))

    pictures = {"image_size": 16, "num_labels": 5}
    if name == "bert":
        return Subject(build("BertForSequenceClassification", "BertConfig", **encoder_sizes()), texts(), 3)
    if name == "minilm":  # the sizes of MiniLM-L6 but for depth and vocabulary
        sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 1}
        return Subject(build("BertModel", "BertConfig", **encoder_sizes(**sizes)), texts(), 3)
    if name == "distilbert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 16}
        return Subject(
            build("DistilBertForSequenceClassification", "DistilBertConfig", vocab_size=WORDS, **sizes), texts(), 2
        )
    if name == "vit":
        sizes = encoder_sizes(patch_size=4) | pictures
        return Subject(build("ViTForImageClassification", "ViTConfig", **sizes), {"pixel_values": images()})
    if name == "swin":
        sizes = {"patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4} | pictures
        return Subject(build("SwinForImageClassification", "SwinConfig", **sizes), {"pixel_values": images()})
    if name == "gpt2":
        sizes = {"vocab_size": WORDS, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
        special = {"bos_token_id": 0, "eos_token_id": 0}
        return Subject(build("GPT2LMHeadModel", "GPT2Config", **sizes, **special), texts(), 2)
    assert name == "llama"
    sizes = encoder_sizes(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    special = {"tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0}
    return Subject(build("LlamaForCausalLM", "LlamaConfig", **sizes, **special), texts(), 1)


def of_timm(name: str) -> Subject:
    models = pytest.importorskip("timm").models
    if name == "timm vit":
        sizes: dict[str, Any] = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
        kind = models.vision_transformer.VisionTransformer
    else:
        sizes = {"patch_size": 2, "embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4}
        kind = models.swin_transformer.SwinTransformer
    return Subject(seeded(lambda: kind(img_size=16, num_classes=5, **sizes)), images())


NAMES = ("bert", "distilbert", "minilm", "vit", "swin", "gpt2", "llama", "timm vit", "timm swin")


@pytest.fixture(params=NAMES)
def subject(request: pytest.FixtureRequest) -> Subject:
    """Each model in turn."""
    return of_timm(request.param) if request.param.startswith("timm") else of_transformers(request.param)


@pytest.fixture
def model_named() -> Callable[[str], Subject]:
    """One of them by its name."""
    return lambda name: of_timm(name) if name.startswith("timm") else of_transformers(name)
