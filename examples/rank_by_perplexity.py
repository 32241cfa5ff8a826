"""Ranks prompt-response pairs by the perplexity of the response: a selection method of one's own on `miwv_fast.ops`.

    python examples/rank_by_perplexity.py pairs.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct

`pairs.jsonl` has an object with `prompt` and `response` on each line. What belongs to the kernels are two calls:
`rows_from_labels` turns labels in the convention of Hugging Face into the rows of logits that are needed, and
`response_nll` reads those rows, where they lie in the model's output, once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from miwv_fast import ops


def make_batch(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels, int64 [B, T], padded on the right; prompts and padding have label -100."""
    prompts = [tokenizer(prompt).input_ids for prompt, _ in pairs]
    responses = [tokenizer(response, add_special_tokens=False).input_ids for _, response in pairs]
    width = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    ids = torch.zeros(len(pairs), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(response)
    return ids, mask, labels


@torch.inference_mode()
def response_losses(pairs: Sequence[tuple[str, str]], model: Any, tokenizer: Any, batch: int = 8) -> torch.Tensor:
    """Mean negative log-likelihood in nats of each response, float32 [N]."""
    losses = []
    for begin in range(0, len(pairs), batch):
        ids, mask, labels = (values.to(model.device) for values in make_batch(pairs[begin : begin + batch], tokenizer))
        logits = model(input_ids=ids, attention_mask=mask).logits
        rows, targets, offsets = ops.rows_from_labels(labels)
        losses.append(ops.response_nll(logits, targets, offsets, rows).cpu())
    return torch.cat(losses)


def main() -> None:
    """Prints perplexity and prompt of each pair, the most surprising response first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs")
    parser.add_argument("--model", required=True)
    options = parser.parse_args()
    with open(options.pairs, encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines if line.strip()]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    losses = response_losses([(record["prompt"], record["response"]) for record in records], model, tokenizer)
    for place in losses.argsort(descending=True).tolist():
        print(f"{losses[place].exp():10.2f}  {records[place]['prompt'][:80]!r}")


if __name__ == "__main__":
    main()
