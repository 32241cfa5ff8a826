"""Loading models: by folder, by pair, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from transformers import AutoTokenizer

from miwv_fast import ops
from miwv_fast.devices import choose_device
from miwv_fast.embedding import embed
from miwv_fast.model import load_model
from miwv_fast.progress import Progress
from support import byte_level, tiny_model


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
    assert load_model((model, str(tmp_path))).tokenizer("hi").input_ids == own("hi").input_ids
    for wrong in (5, None):
        with pytest.raises(TypeError, match=f"a tokenizer is one of transformers, .* this is {wrong}"):
            load_model((model, wrong))
    model.save_pretrained(tmp_path)
    for given in ((model, own), str(tmp_path)):
        with pytest.raises(TypeError, match="a tokenizer is one of transformers, or its name or folder, this is 5"):
            load_model(given, tokenizer=5)


def test_a_tokenizer_that_does_not_tell_its_control_tokens(tmp_path, monkeypatch):
    """Where mistral-common is installed and there is a tekken.json, transformers gives such a one."""
    own = byte_level()
    model = tiny_model("llama", len(own))
    model.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    own.__class__ = type("MistralCommonBackend", (type(own),), {"added_tokens_decoder": lambda self: {}})
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: own)
    for given in (tmp_path, (model, own)):
        with pytest.raises(ValueError, match=r"a MistralCommonBackend, .* that has a tokenizer\.json"):
            load_model(given)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_checkpoint_without_a_tokenizer(tmp_path, kind):
    """Of the second kind transformers makes an empty one."""
    tiny_model(kind, 100).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"there is none in this folder; give one as tokenizer \(--tokenizer\)"):
        load_model(tmp_path)


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
    with pytest.raises(ValueError, match="cannot load the model 'no/such-model'"):
        load_model("no/such-model")
    with pytest.raises(ValueError, match="the empty text for its name"):
        load_model("")
    with pytest.raises(ValueError, match=r"the model is in torch.float64; .*give one of them as dtype"):
        load_model((tiny_model("llama", len(own)).double(), own))
    with pytest.raises(TypeError, match="it is int"):
        load_model(3)
    with pytest.raises(TypeError, match="got 3 items"):
        load_model((1, 2, 3))
    with pytest.raises(ValueError, match="no CUDA device" if not torch.cuda.is_available() else "unknown device"):
        load_model(tmp_path, device="cuda" if not torch.cuda.is_available() else "gpu")


def test_devices_that_cannot_run_the_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ops, "build_info", lambda: {"cuda": True})
    assert [choose_device(device) for device in ("auto", "cuda", "cuda:1")] == ["cuda", "cuda", "cuda:1"]
    with pytest.raises(ValueError, match="'cuda:2': the last CUDA device is cuda:1"):
        choose_device("cuda:2")
    monkeypatch.setattr(ops, "build_info", lambda: {"cuda": False})
    assert choose_device("auto") == "cpu"
    with pytest.raises(ValueError, match=r"'cuda:1': this build of miwv-fast has no CUDA kernels.*MIWV_CUDA_WHEELS"):
        choose_device("cuda:1")


def test_loaded_models_where_no_kernel_is(monkeypatch):
    own = byte_level()
    model = tiny_model("llama", len(own))
    around = torch.nn.Sequential(model)
    around.config = model.config
    with pytest.raises(TypeError, match="the first is no model of transformers: Sequential"):
        load_model((around, own))
    with pytest.raises(TypeError, match="the first is no model of transformers: Linear"):
        load_model((model.lm_head, own))
    with pytest.raises(ValueError, match="device 'meta': the kernels run on cpu and cuda"):
        load_model((tiny_model("llama", len(own)).to("meta"), own))
    monkeypatch.setattr(type(model), "device", torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ops, "build_info", lambda: {"cuda": False})
    with pytest.raises(ValueError, match="'cuda:0': this build of miwv-fast has no CUDA kernels"):
        load_model((model, own))


def test_code_in_a_model_folder_is_never_run(tmp_path):
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w').close()\n"
    for name in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
        (tmp_path / name).write_text(code)
    own = {"AutoConfig": "configuration_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    tokenizer = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["tokenization_own.T", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="cannot load the"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="cannot load the embedder"):
        embed(pa.chunked_array([["a"]], pa.large_string()), tmp_path, "cpu", Progress(False))
    assert not marker.exists()


def test_pickled_weights_of_an_embedder_are_refused(tmp_path, minilm):
    for path in Path(minilm).rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            (tmp_path / path.relative_to(minilm)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / path.relative_to(minilm))
    torch.save({"never": "loaded"}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load the embedder"):
        embed(pa.chunked_array([["a"]], pa.large_string()), tmp_path, "cpu", Progress(False))
