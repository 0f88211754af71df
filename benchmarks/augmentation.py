"""Does each task need its own augmentation? Fine-tuning with none, mild and strong, tested at another site.

    python benchmarks/augmentation.py --work FOLDER --out results.json

The presets are those of `brainfound.finetuning.volumes.PRESETS`; nothing is chosen here. `shifted_runs.py` explains
how runs are made and judged.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from shifted_runs import finish, judge, recipe_of, run, shared_options, table

PRESETS = ("none", "mild", "strong")


def main(arguments: list[str] | None = None) -> None:
    parser = shared_options(__doc__)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    options = parser.parse_args(arguments)
    print(table(finish(options, lambda: measure(options))))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from brainfound.finetuning import volumes

    ways = {name: partial(recipe_of, options=options, preset=name) for name in options.presets}
    result = run(options, ways)
    presets = {name: volumes.PRESETS[name].model_dump(mode="json") for name in options.presets}
    return {"presets": presets, "tasks": judge(result.pop("found"), options.permutations)} | result


if __name__ == "__main__":
    main()
