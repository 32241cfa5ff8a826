"""Peak memory of scoring beyond that of the same forward pass without a head, for vocabularies and batch sizes.

    python benchmarks/head_memory.py --output benchmarks/results/head_memory_cpu.json

A Llama of one layer with random weights in float32; sequences of 2,048 tokens, of which every second is scored. Four
ways, each in a fresh process: `body`, the forward pass whose head gets nothing to do; `ours`; `rows`, transformers'
logits_to_keep and cross-entropy; `labels`, transformers' own loss of all positions. The figure of a way is the peak of
the resident set (on a GPU, of torch's allocator) during the call, less that of `body`. A way that would need more than
--limit GiB is stopped and said to do so.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCABS = (32_000, 128_000, 256_000)
TOKENS = (2048, 8192, 32768)
WAYS = ("body", "ours", "rows", "labels")
LENGTH = 2048
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabs", type=int, nargs="+", default=VOCABS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--limit", type=float, default=8, help="GiB that a way may add")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(measure(arguments))
        return
    table = []
    print("| V | tokens | " + " | ".join(f"{way}, MiB" for way in WAYS[1:]) + " |\n|---|---|---|---|---|")
    for vocab in arguments.vocabs:
        for tokens in arguments.tokens:
            peaks = {way: run(arguments, way, vocab, tokens) for way in WAYS}
            added = {way: None if peaks[way] is None else peaks[way] - peaks["body"] for way in WAYS[1:]}
            table.append({"vocab": vocab, "tokens": tokens, "body_mib": peaks["body"], "added_mib": added})
            cells = (f"more than {arguments.limit:g} GiB" if x is None else f"{x:,}" for x in added.values())
            print(f"| {vocab:,} | {tokens:,} | " + " | ".join(cells) + " |", flush=True)
    from command_line import processor
    from miwv_fast.info import package_versions

    device = processor() if arguments.device == "cpu" else torch.cuda.get_device_name()
    result = {
        "command": "python " + " ".join(["benchmarks/head_memory.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": device,
        "versions": package_versions(("miwv-fast", "torch", "transformers")),
        "hidden_size": arguments.hidden_size,
        "table": table,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def run(arguments: argparse.Namespace, way: str, vocab: int, tokens: int) -> int | None:
    """The peak of one way in MiB, in a process of its own; None if it needs more than the limit."""
    command = [sys.executable, __file__, "--way", way, "--vocabs", str(vocab), "--tokens", str(tokens)]
    command += ["--hidden-size", str(arguments.hidden_size), "--limit", str(arguments.limit)]
    done = subprocess.run([*command, "--device", arguments.device], capture_output=True, text=True)
    if done.returncode == 0:
        return int(done.stdout.split()[-1])
    if "allocate memory" in done.stderr or "OutOfMemory" in done.stderr:
        return None
    raise RuntimeError(done.stderr)


def measure(arguments: argparse.Namespace) -> int:
    (vocab,), (tokens,) = arguments.vocabs, arguments.tokens
    model = make_model(vocab, arguments.hidden_size).to(arguments.device)
    call = ways(model, vocab, tokens)[arguments.way]
    torch.set_num_threads(1)
    if arguments.device != "cpu":
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, (torch.cuda.memory_allocated() + arguments.limit * 2**30) / torch.cuda.mem_get_info()[1])
        )
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) // MIB
    before = status("VmRSS")
    space = int(status("VmSize") * 1024 + arguments.limit * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    call()
    return (status("VmHWM") - before) // 1024


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def make_model(vocab: int, hidden_size: int) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=1,
        num_attention_heads=hidden_size // 64,
        tie_word_embeddings=True,
        max_position_embeddings=LENGTH,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def ways(model: Any, vocab: int, tokens: int) -> dict[str, Callable[[], object]]:
    from miwv_fast.assembly import TokenSequence
    from miwv_fast.model import CausalLM

    generator = np.random.default_rng(0)
    count = max(1, tokens // LENGTH)
    ids = generator.integers(0, vocab, (count, min(tokens, LENGTH)), dtype=np.int32)
    rows = np.arange(1, ids.shape[1] - 1, 2, dtype=np.int32)
    batch = [TokenSequence(line, rows, line[rows + 1]) for line in ids]
    tensor = torch.from_numpy(ids).long().to(model.device)
    keep = torch.zeros(tensor.shape, dtype=torch.bool)
    keep[:, rows] = True
    keep = keep.to(model.device)
    labels = torch.full_like(tensor, -100)
    labels[:, rows + 1] = tensor[:, rows + 1]
    lm = CausalLM(model, None, "the model")

    def body() -> object:
        hook = model.lm_head.register_forward_pre_hook(lambda module, given: (given[0][:, :0],))
        try:
            return model(input_ids=tensor, use_cache=False)
        finally:
            hook.remove()

    def kept() -> object:
        logits = model(input_ids=tensor, use_cache=False, logits_to_keep=keep).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, -2), tensor[:, rows + 1].flatten(), reduction="none")

    def own_loss() -> object:
        return model(input_ids=tensor, use_cache=False, labels=labels).loss

    calls = {"body": body, "ours": lambda: lm.response_nll(batch), "rows": kept, "labels": own_loss}
    return {name: torch.inference_mode()(call) for name, call in calls.items()}


if __name__ == "__main__":
    main()
