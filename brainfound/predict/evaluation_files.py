"""The folder of an evaluation: its scores and cases, and the page that `brainfound report` draws of them.

summary.json   what was scored, and the scores
cases.tsv      the answers, one row per session (of partial input those of full input); subjects are numbered
report.md      the page; report.png where there is more than one score
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.data.store import Store
from brainfound.errors import UsageError
from brainfound.evaluate.partial_input import drop, headline_of_cases
from brainfound.evaluate.score_files import baselines_of, beside, columns_of, numbers_of, records
from brainfound.evaluate.scores import HEADLINE
from brainfound.evaluate.spread import spread_of, summarise
from brainfound.report.experiment import CASES_FILE, SCHEMA, SUMMARY_FILE
from brainfound.report.experiment_page import write_page
from brainfound.train.session_scores import SessionScores

_KIND = "evaluation"


def drops(results: Sequence[SessionScores]) -> list[float]:
    """Of each result how much worse its headline score is than with full input on the very same sessions.

    Args:
        results: of `evaluate` with partial input, full input first. A session that has none of a subset's contrasts
            is not scored with it, so what it is compared with may differ from row to row.
    """
    full = results[0].cases.set_index("row", drop=False)
    found = []
    for result in results:
        same = headline_of_cases(result.task, full.loc[result.cases["row"]])
        found.append(drop(result.task, same, headline_of_cases(result.task, result.cases)))
    return found


def require_free(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier evaluation, which is replaced.

    Raises:
        UsageError: it does.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    file = folder / SUMMARY_FILE
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8")).get("kind") != _KIND:
        raise UsageError("the folder holds something else", where=folder, remedy="Give another --out")


def write_evaluation(
    folder: Path,
    results: Sequence[SessionScores],
    store: Store,
    target: str,
    model: str,
    on: str,
    command: str = "",
) -> Path:
    """Write the folder.

    Args:
        results: of one evaluation; of several, those of partial input, full input first.
        store: what was scored.
        target, model, on: what was learnt, by which model, and which sessions were scored, in words.
        command: what was typed.

    Returns:
        The page.
    """
    task = results[0].task
    rows = [_row(result, store) for result in results]
    table = pd.DataFrame(rows)
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": _KIND,
        "target": target,
        "task": task,
        "headline": HEADLINE[task],
        "model": model,
        "on": on,
        "command": command,
        "data": {
            "data_hash": store.content_hash,
            "num_sessions": len(store),
            "num_subjects": int(store.sessions["subject"].nunique()),
            "contrasts": {
                name: int(count) for name, count in zip(store.contrasts, store.present.sum(axis=0), strict=True)
            },
        },
        "baselines": columns_of(table)[1],
        "scores": records(summarise(table[:1])),
    }
    if notes := list(dict.fromkeys(line for result in results for line in result.notes)):
        content["notes"] = notes
    if len(results) > 1:
        content["partial_input"] = records(_partial_rows(table, HEADLINE[task], drops(results)))
    folder.mkdir(parents=True, exist_ok=True)
    cases = results[0].cases.drop(columns=["subject", "session"])
    who = pd.factorize(store.sessions["subject"].astype(str))[0]
    cases.insert(0, "subject", who[cases["row"]])
    cases.to_csv(folder / CASES_FILE, sep="\t", index=False)
    (folder / SUMMARY_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return write_page(folder)


def _row(result: SessionScores, store: Store) -> dict[str, Any]:
    content = result.to_dict()
    scores = numbers_of(content["scores"])
    shown = [name for name in store.shown if name not in result.without]
    return {
        "contrasts": ", ".join(shown),
        "group": "all contrasts" if len(shown) == len(store.contrasts) else ", ".join(shown),
        "fold": "",
        "seed": 0,
        "num_test": content["num_sessions"],
        **scores,
        **beside(baselines_of(content), list(scores)),
    }


def _partial_rows(table: pd.DataFrame, headline: str, worse: Sequence[float]) -> pd.DataFrame:
    _, baselines = columns_of(table)
    rows = []
    for k, lost in enumerate(worse):
        part = table[k : k + 1]
        first = {"contrasts": part["contrasts"].iloc[0], "absence": "test" if k else "none", "score": headline}
        rows.append(first | spread_of(part, headline, baselines) | {"drop": lost, "num_test": part["num_test"].iloc[0]})
    return pd.DataFrame(rows)
