"""Does continued pretraining help? Frozen probes at another site, before and after; and what bad settings do.

    python benchmarks/continued.py --label-maps FOLDER --work FOLDER --out results.json

Pretraining of a checkpoint that has seen images but no brains is continued on simulated scans of two sites with the
safe ladder and several seeds, and the encoder is probed frozen at a third site. Results are kept in --work and reused.
The procedure and its limits are described in docs/explanation/measurement.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rounds import figure, machine_facts, say, use_one_thread

FIELD_OF_VIEW_MM = 200.0
OWN, PAINTED = "the phantom's own geometry", "painted on label maps"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for data and runs; kept and reused")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    parser.add_argument("--picture", type=Path, help="file for the probe curves; default: WORK/probes.png")
    parser.add_argument("--label-maps", type=Path, help="FreeSurfer-numbered volumes; without them one cohort only")
    parser.add_argument("--init", help="a Hub id or folder to start from; default: trained here on dead leaves")
    parser.add_argument("--part", choices=("test", "development"), default="test", help="where the probes are run")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--unsafe-seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--sessions", type=int, default=120, help="for pretraining")
    parser.add_argument("--test-sessions", type=int, default=150)
    parser.add_argument("--spacing-mm", type=float, default=2.5, help="of the simulation")
    parser.add_argument("--slice-mm", type=float, default=5.0, help="distance of slices in the stores")
    parser.add_argument("--leaves", type=int, nargs=2, default=[240, 12], metavar=("STACKS", "SLICES"))
    parser.add_argument("--patches", type=int, nargs=3, default=[10, 8, 4], metavar=("SLICE", "GLOBAL", "LOCAL"),
                        help="side of a slice and of the crops, in patches; a slice shows 200 mm")  # fmt: skip
    parser.add_argument("--patch-size", type=int, default=8, help="of the new ViT; with --init that of the checkpoint")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--num-local", type=int, default=4)
    parser.add_argument("--prototypes", type=int, default=1024)
    parser.add_argument("--start-batch", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32, help="of the continued runs")
    parser.add_argument("--objective", choices=("self_distillation", "hybrid", "masked_autoencoder"),
                        default="masked_autoencoder", help="of the ladder's runs")  # fmt: skip
    parser.add_argument("--start-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--unsafe-steps", type=int, default=150, help="of the runs with bad settings")
    parser.add_argument(
        "--probe-target", default="slice_position", help="what the guard's probe looks at in the pretraining part"
    )
    parser.add_argument("--looks", type=int, default=12, help="probes of a run, after the one before its first step")
    parser.add_argument("--set-start", action="append", default=[], metavar="KEY=VALUE", help="of the start's recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the ladder's recipe")
    parser.add_argument("--set-unsafe", action="append", default=[], metavar="KEY=VALUE", help="of the unsafe recipe")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    use_one_thread(offline=options.init is None)
    started = time.perf_counter()
    result = {"machine": machine_facts(), "settings": {k: str(v) if isinstance(v, Path) else v
                                                       for k, v in vars(options).items()}}  # fmt: skip
    for name in ("work", "out", "picture", "label_maps"):
        result["settings"].pop(name)  # a machine's paths say nothing to a reader
    if options.init is not None:
        result["settings"]["init"] = Path(options.init).name
    result |= Experiment(options).run()
    result["minutes"] = figure((time.perf_counter() - started) / 60)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(table(result))


class Experiment:
    """All steps, in order; each result below `work` is named after all that it depends on."""

    def __init__(self, options: argparse.Namespace) -> None:
        from continued_runs import Sizes
        from shifted_cohorts import CONTRASTS

        from brainfound.models.loading import read_patch_size

        self.options, self.work = options, options.work
        patch_size = options.patch_size if options.init is None else read_patch_size(options.init, CONTRASTS)
        of_slice, of_global, of_local = options.patches
        self.side = of_slice * patch_size
        self.sizes = Sizes(
            patch_size, options.width, options.layers, options.heads, of_global, of_local, options.num_local,
            options.prototypes, options.batch, options.steps, options.start_steps, options.probe_target,
            options.looks, options.objective,
        )  # fmt: skip
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        cohorts: dict[str, Path | None] = {OWN: None}
        if self.options.label_maps is None:
            say(f"no --label-maps: the cohort {PAINTED} is left out")
        elif not self.options.label_maps.is_dir():
            say(f"--label-maps is no folder: the cohort {PAINTED} is left out")
        else:
            cohorts[PAINTED] = self.options.label_maps
        stores = {name: self._timed(f"data, {name}", lambda maps=maps: self._stores(maps))
                  for name, maps in cohorts.items()}  # fmt: skip
        start = self._timed("start", self.start)
        runs = self._timed("pretraining", lambda: self._pretrain(stores, start))
        found = {name: self._timed(f"probes, {name}", lambda name=name: self._probe(stores[name], start, runs[name]))
                 for name in cohorts}  # fmt: skip
        return {"cohorts": found, "seconds": self.seconds} | self._picture(found)

    def _timed(self, what: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        made = work()
        self.seconds[what] = figure(time.perf_counter() - started)
        say(f"{what}: {self.seconds[what]:.0f} s")
        return made

    def preprocessing(self) -> Any:
        from shifted_cohorts import CONTRASTS

        from brainfound.data.preprocessing.settings import Preprocessing

        pixel_mm = FIELD_OF_VIEW_MM / self.side
        spacing_mm = (pixel_mm, pixel_mm, self.options.slice_mm)
        return Preprocessing(contrasts=CONTRASTS, spacing_mm=spacing_mm, size=(self.side, self.side))

    def _stores(self, label_maps: Path | None) -> dict[str, Path]:
        """The folder of each part's store."""
        from shifted_cohorts import PARTS, key_of, make_store

        from brainfound.phantom.label_maps import find_label_maps

        options, preprocessing = self.options, self.preprocessing()
        maps = [] if label_maps is None else [(f.name, f.stat().st_size) for f in find_label_maps(label_maps)]
        folders = {}
        for part in PARTS:
            if part.name not in ("pretraining", options.part):
                continue
            num = options.sessions if part.name == "pretraining" else options.test_sessions
            settings = {"part": asdict(part), "num": num, "maps": maps,
                        "spacing_mm": options.spacing_mm, "preprocessing": preprocessing.model_dump()}  # fmt: skip
            kind = "own" if label_maps is None else "painted"
            folder = self.work / f"{kind}-{part.name}-{key_of(settings)}"
            make_store(folder, part, num, label_maps, options.spacing_mm, preprocessing, options.workers)
            folders[part.name] = folder / "store"
        return folders

    def start(self) -> str:
        """The starting checkpoint, trained on images without brains if none was given."""
        from continued_runs import from_scratch, run_once
        from dead_leaves import write_dead_leaves
        from shifted_cohorts import key_of

        from brainfound.data.store.prepare import prepare

        if self.options.init is not None:
            return self.options.init
        stacks, slices = self.options.leaves
        preprocessing = self.preprocessing()
        leaves = self.work / f"leaves-{key_of({'stacks': stacks, 'slices': slices, 'side': self.side})}"
        if not (leaves / "store").is_dir():
            pixel_mm = FIELD_OF_VIEW_MM / self.side
            cohort = write_dead_leaves(leaves / "cohort", stacks, slices, self.side, pixel_mm, seed=7)
            spacing_mm = (pixel_mm, pixel_mm, pixel_mm)
            prepare(cohort, leaves / "store", preprocessing.model_copy(update={"spacing_mm": spacing_mm}))
        recipe = from_scratch(replace(self.sizes, batch=self.options.start_batch), 0, tuple(self.options.set_start))
        folder = self.folder("start", recipe, leaves=leaves.name)
        run_once(recipe, leaves / "store", "none", folder, threads=self.options.workers)
        return str(folder / "export")

    def folder(self, name: str, recipe: Any, **made_from: str) -> Path:
        """Of a run, named after all that it depends on."""
        from shifted_cohorts import key_of

        return self.work / f"{name}-{key_of({'recipe': recipe.model_dump(mode='json'), **made_from})}"

    def _pretrain(self, stores: dict[str, dict[str, Path]], start: str) -> dict[str, dict[str, list[Path]]]:
        """Folders of the runs: cohort → kind → runs, several at a time."""
        from continued_runs import SMALL_START_LR, ladder, run_once, unsafe
        from worker_processes import in_processes

        options = self.options
        of_small_start = [f"optim.lr={SMALL_START_LR}"] if options.init is None else []
        few_steps = replace(self.sizes, steps=options.unsafe_steps)
        kinds = {
            "ladder": (ladder, self.sizes, options.seeds, of_small_start + options.set),
            "unsafe": (unsafe, few_steps, options.unsafe_seeds, options.set_unsafe),
        }
        folders: dict[str, dict[str, list[Path]]] = {}
        jobs = []
        for cohort, parts in stores.items():
            store, folders[cohort] = parts["pretraining"], {}
            for kind, (make, sizes, seeds, changes) in kinds.items():
                recipes = [make(sizes, seed, tuple(changes)) for seed in seeds]
                folders[cohort][kind] = [
                    self.folder(f"{kind}-{recipe.seed}", recipe, store=str(store), start=start) for recipe in recipes
                ]
                jobs += [(recipe, store, start, folder)
                         for recipe, folder in zip(recipes, folders[cohort][kind], strict=True)]  # fmt: skip
        in_processes(run_once, jobs, options.workers)
        return folders

    def _probe(self, parts: dict[str, Path], start: str, runs: dict[str, list[Path]]) -> dict[str, Any]:
        """Frozen probes of all models at the site of the test, and the paired comparisons."""
        from continued_runs import read_run
        from paired_outcomes import compare, score
        from probing import outcomes_of
        from shifted_cohorts import describe

        from brainfound.data.store import Store

        models = {"random weights": [f"random:{start}"], "start": [start]} | {
            name: [str(folder / "export") for folder in runs[kind]]
            for name, kind in (("continued, safe ladder", "ladder"), ("continued, settings of dinov2#204", "unsafe"))
            if runs[kind]
        }
        outcomes, ill = outcomes_of(models, parts[self.options.part], self.sizes.patch_size, self.options.workers)
        before = outcomes["start"]
        return {
            "data": {name: describe(Store.open(store)) for name, store in parts.items()},
            "scores": {name: score(found, ill) for name, found in outcomes.items()},
            "over_start": {name: compare(found, before, ill) for name, found in outcomes.items()
                           if name.startswith("continued")},
            "runs": {kind: [read_run(folder) for folder in folders] for kind, folders in runs.items()},
        }  # fmt: skip

    def _picture(self, found: dict[str, Any]) -> dict[str, Any]:
        from continued_figure import draw_probes

        draw_probes({name: of["runs"] for name, of in found.items()}, self.options.picture or self.work / "probes.png")
        return {}


def table(result: dict[str, Any]) -> str:
    """Scores, gains and the runs' ends, as Markdown."""
    lines = []
    for cohort, found in result["cohorts"].items():
        measures = list(next(iter(found["scores"].values())))
        lines += ["", f"**{cohort[0].upper()}{cohort[1:]}**", "", f"| encoder | {' | '.join(measures)} |",
                  "|---" * (len(measures) + 1) + "|"]  # fmt: skip
        for name, scores in found["scores"].items():
            cells = [f"{of['mean']:.3g} ({of['interval'][0]:.3g}–{of['interval'][1]:.3g})" for of in scores.values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        for name, gains in found["over_start"].items():
            cells = [f"{g['gain']:+.3g} ({g['interval'][0]:+.3g} to {g['interval'][1]:+.3g}), p = {g['p']:.2g}"
                     for g in gains.values()]  # fmt: skip
            lines.append(f"| gain of {name} over start | {' | '.join(cells)} |")
        for kind, runs in found["runs"].items():
            for run in runs:
                lines.append(f"- {kind}: {run['status']}; exported step {run['exported_step']}")
                lines += [f"  - {name}: {fall}" for name, fall in _furthest(run)]
    return "\n".join(lines)


def _furthest(run: dict[str, Any], num: int = 3) -> list[tuple[str, str]]:
    """The retention probes that fell furthest from the first look to the last."""
    ends = {name: (of["scores"][0], of["scores"][-1]) for name, of in run["retention"].items()}
    falls = {name: last - first for name, (first, last) in ends.items() if last is not None}  # None: not finite
    return [
        (name, " → ".join(f"{run['retention'][name]['scores'][look]:.3f}" for look in (0, -1)))
        for name in sorted(falls, key=lambda name: falls[name])[:num]
    ]


if __name__ == "__main__":
    main()
