"""What trainers need to read a selection: LLaMA-Factory an entry in a list, TRL its own form of the records."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from miwv_fast.export import write_records
from miwv_fast.files import write_atomically
from miwv_fast.shapes import ROLES, SYSTEM_FIELDS, Pair, Record, message_keys, parse_record, recognize, system_field
from miwv_fast.templates import compile_pair

_T = TypeVar("_T")

TRAINERS = ("llama-factory", "trl")


def check_trainer(trainer: str, kind: str) -> None:
    """Raises ValueError for an unknown trainer, or one that doesn't read files of this kind."""
    if trainer not in TRAINERS:
        raise ValueError(f"unknown trainer {trainer!r}; known are {', '.join(TRAINERS)}")
    if kind == "datasets":
        raise ValueError(f"{trainer} reads files: write .jsonl or .parquet")


def write_for_trainer(
    trainer: str, path: Path, rows: Sequence[Mapping[str, Any]], kind: str, manifest: Mapping[str, Any]
) -> str:
    """Writes records as a trainer reads them, and beside them what tells it so; returns the command that trains.

    LLaMA-Factory takes the records as they came (`llama_factory_records`) and an entry in `dataset_info.json`; TRL a
    form of its own (`trl_records`) and a configuration. `manifest` is that of the run. Raises ValueError, before
    anything is written, where the trainer cannot read the records.
    """
    name = str(manifest.get("model", {}).get("name", ""))
    model = shlex.quote(name) if name and not name.endswith(".gguf") else "MODEL"
    common = f"--model_name_or_path {model} --output_dir trained"
    if trainer == "llama-factory":
        rows = llama_factory_records(rows)
        entry = llama_factory_entry(path.name, rows)
        write_records(path, rows, kind)
        add_to_dataset_info(path, entry)
        template = " --template alpaca" if manifest.get("template", {}).get("name") == "alpaca" else ""
        place = f"--dataset_dir {shlex.quote(str(path.parent))} --dataset {shlex.quote(path.stem)}"
        return f"llamafactory-cli train --stage sft --do_train {common}{template} {place}"
    if "template" not in manifest:
        raise ValueError("these scores do not say with which template the records were scored, which TRL's form needs")
    write_records(path, trl_records(rows, manifest["template"]), kind)
    config = write_trl_config(path, kind)
    return f"trl sft --config {shlex.quote(str(config))} {common}"


def llama_factory_records(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The records as they came, unless one is a conversation that LLaMA-Factory leaves out or stops at.

    That is one whose last turn nobody answers, of bare texts, of pairs, or with a text in parts, or in TRL's form. Then
    all records become `messages` of text, up to the last answer, with their other fields.
    """
    if all(map(_is_plain, rows)):
        return rows
    return [
        {name: value for name, value in row.items() if name not in _fields(recognize(row))}
        | {"messages": _messages(parse_record(row))}
        for row in rows
    ]


def _is_plain(row: Mapping[str, Any]) -> bool:
    shape = recognize(row)
    if isinstance(shape, Pair):
        return not shape.is_conversation(row)
    role, content = message_keys(row[shape])
    if not all(isinstance(m, Mapping) and isinstance(m.get(content), str) for m in row[shape]):
        return False
    said = [message.get(role) for message in row[shape]]
    asked = said[1:] if ROLES.get(said[0]) == "system" else said
    return len(asked) == 2 * len(parse_record(row).turns)


def _fields(shape: Pair | str) -> tuple[str, ...]:
    """The fields that a record's text stands in."""
    if isinstance(shape, str):
        return shape, *SYSTEM_FIELDS
    return *shape.fields, "history", *SYSTEM_FIELDS


def llama_factory_entry(file: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What LLaMA-Factory's `dataset_info.json` says of a file of these records, all of one shape.

    Raises ValueError where the records have several shapes, or several names for one role.
    """
    shape = _one([recognize(row) for row in rows], "shapes")
    systems = [name for name in map(system_field, rows) if name]
    system = {"system": _one(systems, "fields of a system text")} if systems else {}
    if isinstance(shape, str):
        role, content = _one([message_keys(row[shape]) for row in rows], "names of role and text")
        said = [message[role] for row in rows for message in row[shape]]
        tags = {"role_tag": role, "content_tag": content}
        for meant in ("user", "assistant", "system"):
            names, tag = [name for name in ROLES if ROLES[name] == meant], f"{meant}_tag"
            tags[tag] = _one([name for name in said if name in names] or [names[0]], f"names for {tag}")
        columns = {"messages": shape, **system}
        return {"file_name": file, "formatting": "sharegpt", "columns": columns, "tags": tags}
    columns = {"prompt": shape.instruction, "response": shape.response, **system}
    if inputs := [name for name in shape.inputs if any(row.get(name) for row in rows)]:
        columns["query"] = _one(inputs, "fields of an input")
    if any(len(parse_record(row).turns) > 1 for row in rows):
        columns["history"] = "history"
    return {"file_name": file, "columns": columns}


def _one(found: Sequence[_T], what: str) -> _T:
    distinct = list(dict.fromkeys(found))
    if len(distinct) != 1:
        names = ", ".join(sorted(map(str, distinct)))
        raise ValueError(f"the selected records have {len(distinct)} {what} ({names}), LLaMA-Factory reads one")
    return distinct[0]


def add_to_dataset_info(path: Path, entry: Mapping[str, Any]) -> None:
    """Adds an entry, named like the file without its suffix, to the `dataset_info.json` beside the file.

    Other entries stay as they are. Raises ValueError where the present file is no JSON object.
    """
    info = path.with_name("dataset_info.json")
    entries: Any = {}
    if info.exists():
        try:
            entries = json.loads(info.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{info} is not JSON: {error}") from error
        if not isinstance(entries, dict):
            raise ValueError(f"{info} should be a JSON object, it is a {type(entries).__name__}")
    entries[path.stem] = entry
    text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
    write_atomically(info, lambda out: out.write_text(text, encoding="utf-8"))


def trl_records(rows: Sequence[Mapping[str, Any]], template: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records as TRL's SFT trainer reads them.

    Single pairs become `prompt` and `completion`: text by the run's template (`name` and `source` in its manifest), or
    lists of messages where that is `chat`. Where there are conversations, or pairs with a history, all become
    `messages`.
    """
    records = [parse_record(row) for row in rows]
    single = (
        len(record.turns) == 1 and isinstance(recognize(row), Pair) for record, row in zip(records, rows, strict=True)
    )
    if not all(single):
        return [{"messages": _messages(record)} for record in records]
    if template["name"] == "chat":
        messages = [_messages(record) for record in records]
        return [{"prompt": each[:-1], "completion": each[-1:]} for each in messages]
    prompt, _ = compile_pair(template["name"], template["source"])
    turns = [record.turns_with_system[0] for record in records]
    return [{"prompt": prompt(t.instruction, t.input), "completion": t.response} for t in turns]


def _messages(record: Record) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": record.system}] if record.system else []
    for turn in record.turns:
        messages.append({"role": "user", "content": turn.prompt})
        messages.append({"role": "assistant", "content": turn.response})
    return messages


def write_trl_config(path: Path, kind: str) -> Path:
    """Writes the part of a TRL configuration that names a file of records, beside the file; returns its path.

    `kind` is `jsonl` or `parquet`.
    """
    config = path.with_suffix(".trl.yaml")
    # JSON strings are YAML strings, whatever stands in a path.
    lines = [
        "datasets:",
        f"  - path: {'json' if kind == 'jsonl' else kind}",
        f"    data_files: {json.dumps(str(path.resolve()))}",
    ]
    write_atomically(config, lambda out: out.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    return config
