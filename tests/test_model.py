"""Loading models, and response rows by every way a model offers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from miwv_fast.model import CausalLM, load_model
from miwv_fast.templates import TokenSequence
from support import byte_level, tiny_model


def sequences(vocab_size: int, count: int = 5) -> list[TokenSequence]:
    generator = np.random.default_rng(1)
    made = []
    for _ in range(count):
        ids = generator.integers(0, vocab_size, generator.integers(5, 30)).astype(np.int32)
        rows = np.sort(generator.choice(len(ids) - 1, generator.integers(1, 4), replace=False)).astype(np.int32)
        made.append(TokenSequence(ids, rows, ids[rows + 1]))
    return made


def reference(model, batch) -> list[float]:
    losses = []
    for sequence in batch:
        with torch.no_grad():
            logits = model(torch.from_numpy(sequence.ids)[None].long()).logits[0].double()
        picked = logits.log_softmax(-1)[sequence.rows.astype(np.int64), sequence.targets.astype(np.int64)]
        losses.append(-picked.mean().item())
    return losses


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gemma2"])
def test_rows_of_a_padded_batch(architecture):
    model = tiny_model(architecture, 300)
    lm = CausalLM(model, None, architecture)
    assert lm.keeps_rows
    batch = sequences(300)
    np.testing.assert_allclose(lm.response_nll(batch), reference(model, batch), atol=2e-5)


class Stubborn(torch.nn.Module):
    """A model whose `logits_to_keep` is missing, or means something else."""

    def __init__(self, inner, wrong: bool):
        super().__init__()
        self.inner, self.config, self.device, self.wrong = inner, inner.config, inner.device, wrong
        self.dtype = inner.dtype
        self.forward = self.with_keyword if wrong else self.without_keyword

    def with_keyword(self, input_ids, attention_mask, use_cache, logits_to_keep=None):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=0)

    def without_keyword(self, input_ids, attention_mask, use_cache):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_model_without_row_selection_gives_all_logits(wrong, caplog):
    model = tiny_model("llama", 300)
    lm = CausalLM(Stubborn(model, wrong), None, "stubborn")
    assert not lm.keeps_rows and "all of them are computed" in caplog.text
    batch = sequences(300)
    np.testing.assert_allclose(lm.response_nll(batch), reference(model, batch), atol=2e-5)


def test_load_from_a_folder(tmp_path):
    own = byte_level()
    tiny_model("llama", len(own)).to(torch.bfloat16).save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    lm = load_model(str(tmp_path))
    assert lm.model.dtype == torch.float32 and lm.max_length == 1024 and lm.device.type == "cpu"
    assert load_model(tmp_path, dtype="bfloat16").model.dtype == torch.bfloat16
    assert load_model(str(tmp_path), tokenizer=str(tmp_path)).tokenizer("hi").input_ids == own("hi").input_ids


def test_pickled_weights_are_refused(tmp_path):
    own = byte_level()
    model = tiny_model("llama", len(own))
    model.config.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load the model"):
        load_model(tmp_path)


def test_another_tokenizer_for_a_loaded_pair(tmp_path):
    own = byte_level()
    own.save_pretrained(tmp_path)
    model = tiny_model("llama", len(own))
    assert load_model((model, None), tokenizer=str(tmp_path)).tokenizer("hi").input_ids == own("hi").input_ids


def test_unusable_models(tmp_path):
    own = byte_level()
    own.save_pretrained(tmp_path)
    tiny_model("llama", len(own)).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cannot load the model .*no file named"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        load_model(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"no such model file.*missing\.gguf"):
        load_model(tmp_path / "missing.gguf")
    with pytest.raises(ValueError, match="cannot load the tokenizer 'no/such-model'"):
        load_model("no/such-model")
    with pytest.raises(TypeError, match="it is int"):
        load_model(3)
    with pytest.raises(TypeError, match="got 3 items"):
        load_model((1, 2, 3))
    with pytest.raises(ValueError, match="no CUDA device" if not torch.cuda.is_available() else "unknown device"):
        load_model(tmp_path, device="cuda" if not torch.cuda.is_available() else "gpu")
