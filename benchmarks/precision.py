"""Does bfloat16 harm fine-tuning? The same runs in float32 and in bfloat16, tested at another site.

    python benchmarks/precision.py --work FOLDER --out results.json

Master weights, optimiser and scoring are float32 in both; only the precision of the products in training differs.
`shifted_runs.py` explains how runs are made and judged.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from shifted_runs import Ways, finish, judge, recipe_of, run, shared_options, table

PRECISIONS = {"float32": "no", "bfloat16": "bf16"}


def main(arguments: list[str] | None = None) -> None:
    options = shared_options(__doc__).parse_args(arguments)
    print(table(finish(options, lambda: measure(options))))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    result = run(options, ways(options))
    return {"tasks": judge(result.pop("found"), options.permutations)} | result


def ways(options: argparse.Namespace) -> Ways:
    """The recipes of each precision."""
    return {
        name: partial(recipe_of, options=options, changes=[f'engine.precision="{precision}"'])
        for name, precision in PRECISIONS.items()
    }


if __name__ == "__main__":
    main()
