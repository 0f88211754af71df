"""Model cards: a README.md with the front matter that the Hugging Face Hub reads.

The text is `model_cards/template.md`, filled with the recorded facts of a run. A fact that was not recorded reads "not
recorded".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import yaml

from brainfound.errors import UsageError
from brainfound.recipes import recipe_folder

NOT_RECORDED = "not recorded"
CARD_FILE = "README.md"
_SUMMARY = "A 2-D vision transformer adapted to 3-D brain MRI, slice by slice."
_TAGS = ("brainfound", "brain", "mri", "neuroimaging", "medical-imaging")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

# The facts with a place of their own in the template; any other fact is listed under "Also recorded".
_TABLE_FACTS = (
    "kind", "backbone", "stem", "aggregator", "adapter", "objective", "labels", "recipe", "steps", "training_data",
    "data_hash", "num_sessions", "num_subjects", "num_slices", "seed", "device", "versions",
)  # fmt: skip
_KNOWN_FACTS = {
    *_TABLE_FACTS, "name", "summary", "license", "tags", "base_model", "base_model_relation", "start", "datasets",
    "pipeline_tag", "contrasts", "preprocessing", "metrics", "model_class", "model_code", "repo_id",
}  # fmt: skip


def write_model_card(folder: str | Path, facts: Mapping[str, Any]) -> Path:
    """Write README.md into the folder of a model (`export/`, a bundle), in place of an existing one.

    Args:
        folder: created if needed.
        facts: any of: name, summary, kind, base_model (Hub id or folder), base_model_relation,
            start (what stands in place of a base model), backbone, stem, aggregator, adapter, objective,
            labels, contrasts (list), preprocessing (mapping), recipe, steps, training_data, data_hash, num_sessions,
            num_subjects, num_slices, seed, device, versions (mapping), license (Hub identifier), tags, datasets (Hub
            ids), pipeline_tag, model_class, model_code (how the model alone is loaded), repo_id, metrics. `metrics` is
            a mapping name → value, or a list of mappings with at least metric and value (more keys, such as data,
            contrasts, low and high, are more columns). A fact that is missing or None reads "not recorded"; any other
            fact is listed unchanged.

    Raises:
        UsageError: `metrics` has neither form, or a tag is not text.
    """
    folder = Path(folder)
    facts = {key: value for key, value in facts.items() if value is not None}
    example_contrasts = (facts.get("contrasts") or ("T1w",))[:2]
    load_from = facts.get("repo_id") or "path/to/this/folder"
    model_class = facts.get("model_class", "BrainFoundModel")
    model_code = f'from brainfound import {model_class}\n\nmodel = {model_class}.from_pretrained("{load_from}")'
    values = {key: _cell(facts.get(key)) for key in _TABLE_FACTS}
    values |= {
        "front_matter": _front_matter(facts),
        "name": _one_line(facts.get("name", folder.resolve().name)),
        "summary": str(facts.get("summary", _SUMMARY)).strip(),
        "base_model": _base_model(facts),
        "contrasts": ", ".join(facts["contrasts"]) if facts.get("contrasts") else NOT_RECORDED,
        "preprocessing": _mapping_table(facts.get("preprocessing"), ("setting", "value")),
        "metrics": _metrics_table(facts.get("metrics")),
        "other": _other(facts),
        "load_from": load_from,
        "example_scans": ", ".join(f'{name}="sub-01_{name}.nii.gz"' for name in example_contrasts),
        "model_code": facts.get("model_code") or model_code,
        "license_text": _cell(facts.get("license")),
    }
    template = Template((recipe_folder("model_cards") / "template.md").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CARD_FILE
    path.write_text(template.substitute(values), encoding="utf-8")
    return path


def _front_matter(facts: Mapping[str, Any]) -> str:
    content: dict[str, Any] = {"library_name": "brainfound", "license": _one_line(facts.get("license", "other"))}
    if "license" not in facts:
        # The Hub has no identifier of an unknown licence; "other" requires a name.
        content["license_name"] = "not-recorded"
    tags = facts.get("tags", ())
    if isinstance(tags, str) or not all(isinstance(tag, str) for tag in tags):
        raise UsageError("tags must be a list of text", where="tags", got=tags)
    content["tags"] = list(dict.fromkeys([*_TAGS, *tags]))
    if _hub_base_model(facts):
        content["base_model"] = facts["base_model"]
    content |= {key: _one_line(facts[key]) for key in ("base_model_relation", "pipeline_tag") if key in facts}
    if facts.get("datasets"):
        content["datasets"] = [_one_line(dataset) for dataset in facts["datasets"]]
    return "---\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True) + "---\n"


def _hub_base_model(facts: Mapping[str, Any]) -> bool:
    base = str(facts.get("base_model", ""))
    # An existing folder such as runs/teacher may look like an id of the Hub.
    return bool(_HUB_ID.fullmatch(base)) and not Path(base).exists()


def _base_model(facts: Mapping[str, Any]) -> str:
    if "base_model" not in facts:
        return _cell(facts.get("start"))
    if _hub_base_model(facts):
        return f"[{facts['base_model']}](https://huggingface.co/{facts['base_model']})"
    # Only the name of a folder, or of the run that exported it: its path is private.
    path = Path(str(facts["base_model"]))
    return f"{_cell('/'.join(path.parts[-2:] if path.name == 'export' else path.parts[-1:]))} (a local folder)"


def _other(facts: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in facts.items() if key not in _KNOWN_FACTS and value not in ("", [], {})}
    return "## Also recorded\n\n" + _mapping_table(rest, ("fact", "value")) + "\n" if rest else ""


def _metrics_table(metrics: Any) -> str:
    if not metrics:
        return NOT_RECORDED
    if isinstance(metrics, Mapping):
        metrics = [{"metric": name, "value": value} for name, value in metrics.items()]
    if isinstance(metrics, str) or not isinstance(metrics, Sequence):
        raise UsageError("metrics must be a mapping or a list of mappings", where="metrics", got=type(metrics).__name__)
    for row in metrics:
        if not isinstance(row, Mapping) or not {"metric", "value"} <= row.keys():
            raise UsageError("a row of metrics must have metric and value", where="metrics", got=row)
    columns = list(dict.fromkeys(["metric", "value", *(key for row in metrics for key in row)]))
    return format_table(columns, [[_text_or_missing(row.get(column)) for column in columns] for row in metrics])


def _mapping_table(content: Mapping[str, Any] | None, header: tuple[str, str]) -> str:
    if not content:
        return NOT_RECORDED
    return format_table(header, [[key, _text(value)] for key, value in content.items()])


def _cell(value: Any) -> str:
    return _escaped(_text_or_missing(value))


def _text_or_missing(value: Any) -> str:
    return NOT_RECORDED if value is None or value in ("", [], {}) else _text(value)


def _text(value: Any) -> str:
    """A value as text; a None inside a fact is a setting, not a missing fact."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    if value is None:
        return "null"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; each cell becomes one line and its pipes are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_escaped(text) for text in line) + " |" for line in lines)
