"""The guard on a cohort that was not used to set its limits: two kinds of bad settings, and the safe ladder.

    python benchmarks/guard_elsewhere.py --work FOLDER --out results.json

Options are those of `continued.py`, whose starting checkpoint is read from the same --work. The cohort is simulated
at two further sites, and none is probed. The result: which runs the guard stops, when, and by which limit.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from continued import Experiment, parse
from rounds import machine_facts, use_one_thread

SITES, COHORT_SEED = ("site-6", "site-7"), 104
HIGH_RATE = ("optim.lr=0.05", "optim.layer_decay=1.0", "optim.patch_embed_scale=1.0")
"""Of masked autoencoding: 50 times the ladder's rate here, for all blocks alike."""
BAD = ("settings of dinov2#204", "masked autoencoding, high rate")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    use_one_thread(offline=options.init is None)
    found = {"machine": machine_facts(), "runs": measure(options)}
    if options.out:
        options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(found["runs"]))


def measure(options: Any) -> dict[str, list[dict[str, Any]]]:
    """Kind of settings → how each seed's run went."""
    from continued_runs import SMALL_START_LR, ladder, read_run, run_once, unsafe
    from shifted_cohorts import Part, key_of, make_store
    from worker_processes import in_processes

    experiment = Experiment(options)
    start, preprocessing = experiment.start(), experiment.preprocessing()
    part = Part("elsewhere", SITES, COHORT_SEED, (0.0, 1.0))
    made_of = {"num": options.sessions, "mm": options.spacing_mm, "preprocessing": preprocessing.model_dump()}
    folder = options.work / f"own-elsewhere-{key_of(made_of)}"
    make_store(folder, part, options.sessions, None, options.spacing_mm, preprocessing, options.workers)
    short = replace(experiment.sizes, steps=options.unsafe_steps)
    rate = (f"optim.lr={SMALL_START_LR}",) if options.init is None else ()
    recipes = {
        BAD[0]: [unsafe(short, seed, tuple(options.set_unsafe)) for seed in options.unsafe_seeds],
        BAD[1]: [ladder(short, seed, (*HIGH_RATE, *options.set_unsafe)) for seed in options.unsafe_seeds],
        "safe ladder": [ladder(experiment.sizes, seed, (*rate, *options.set)) for seed in options.seeds],
    }
    runs = {
        kind: [
            (recipe, folder / "store", start, experiment.folder(f"elsewhere-{recipe.seed}", recipe, store=str(folder)))
            for recipe in of_kind
        ]
        for kind, of_kind in recipes.items()
    }
    in_processes(run_once, [job for jobs in runs.values() for job in jobs], options.workers)
    return {kind: [read_run(job[-1]) for job in jobs] for kind, jobs in runs.items()}


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """How the runs ended, as Markdown."""
    lines = ["| settings | ended | exported step | kept_slices |", "|---|---|---|---|"]
    for kind, of_kind in runs.items():
        for run in of_kind:
            kept = [score for score in run["retention"]["kept_slices"]["scores"] if score is not None]
            lines.append(f"| {kind} | {run['status']} | {run['exported_step']} | {kept[0]:.2f} → {kept[-1]:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
