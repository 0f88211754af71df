"""Draw the pictures of the documentation from simulated heads, with the package and matplotlib alone.

    python docs/pictures/draw.py                 # all pictures, about a minute of one core
    python docs/pictures/draw.py --work FOLDER   # keep the cohort, the store and the runs

Every picture shows a real output of the tool: a cohort is simulated and prepared, a tiny ViT is pretrained and
fine-tuned on it for a few steps, and a held-out session is predicted and explained. The models are far too small and
too briefly trained for a result; the measured results are in docs/reference/results.md.

Axes: S slices, C contrasts, H W pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import nibabel as nib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.transforms import Affine2D
from PIL import Image

import brainfound
from brainfound.data.store.contact_sheet import write_contact_sheet
from brainfound.report.curves import plot_curves

HERE = Path(__file__).parent
CONTRASTS = ("T1w", "T2w", "FLAIR")
BLUE, ORANGE, GREEN, INK, GREY = "#0072B2", "#D55E00", "#009E73", "#1F2933", "#8A94A0"
# The panels of curves.png that a reader looks at first.
CURVES = ("loss", "lr", "teacher_entropy", "target_entropy", "effective_rank", "mean_cosine", "grad_norm")
CURVES += ("probe", "view_margin", "ln_k")
LESION = ListedColormap([ORANGE])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="keep what is made in this folder, and reuse what is there")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder of the pictures")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        store, runs = make(work)
        draw(store, runs, work, options.out)


def make(work: Path) -> tuple[brainfound.Store, dict[str, Path]]:
    """Simulate, prepare, pretrain and fine-tune, each once."""
    if not (work / "cohort").exists():
        command = ["phantom", str(work / "cohort"), "--subjects", "12", "--seed", "7", "--spacing-mm", "2.5"]
        command += ["--contrasts", ",".join(CONTRASTS), "--missing", "0", "--quiet"]
        subprocess.run([sys.executable, "-m", "brainfound", *command], check=True, stdout=subprocess.DEVNULL)
    settings = brainfound.Preprocessing(contrasts=CONTRASTS, spacing_mm=(2.5, 2.5, 5), size=(80, 80))
    store = brainfound.prepare(work / "cohort", work / "store", settings)
    runs = {"pretrain": work / "pretrain", "mask": work / "mask", "age": work / "age"}
    if not (runs["pretrain"] / "export").exists():
        steps = ["engine.steps=20", "engine.batch_size=12", "engine.log_every=2"]
        steps += ["probe.every=10", "probe.max_sessions=12", "probe.retention=[]"]
        brainfound.pretrain("pretrain-demo", store, out=runs["pretrain"], quiet=True, overrides=steps)
    start = runs["pretrain"] / "export"
    shared = ["engine.precision=no", "evaluate_every=0", "frozen_baseline=false", "augmentation=mild"]
    shared += ["engine.batch_size=4", "split.seed=1"]
    if not (runs["mask"] / "export").exists():
        fine = [*shared, "engine.steps=30", "task.decoder_width=32", "optim.lr=1e-3", "optim.head_lr=2e-3"]
        fine += ["task.merge_codes=true", "num_slices=5", "task.foreground_share=0.8", "engine.log_every=10"]
        recipe, adapter = "finetune-segmentation", "lora-r16-all"
        brainfound.finetune(recipe, store, start, "mask", out=runs["mask"], adapter=adapter, overrides=fine, quiet=True)
    if not (runs["age"] / "export").exists():
        coarse = [*shared, "engine.steps=8", "num_slices=8", "optim.head_lr=1e-2", "aggregator=attention"]
        brainfound.finetune(
            "finetune-regression", store, start, "age_years", out=runs["age"], overrides=coarse, quiet=True
        )
    return store, runs


def draw(store: brainfound.Store, runs: dict[str, Path], work: Path, out: Path) -> None:
    held_out = set(brainfound.Split.load(runs["mask"] / "splits.json").parts()["test"])
    index = max(
        (i for i in range(len(store)) if store[i].subject in held_out and store[i].mask is not None),
        key=lambda i: (store[i].mask > 0).sum(),
    )
    stack = store[index]
    sessions = brainfound.Cohort.read(work / "cohort").sessions()
    scans = next(session.scans for session in sessions if session.subject == stack.subject)
    files = {contrast: Path(scans[contrast]) for contrast in CONTRASTS}
    prediction = brainfound.load(runs["mask"]).predict(**{c: str(file) for c, file in files.items()})
    draw_road(stack, files, prediction, out / "road.png")
    draw_contact_sheet(store, work, out / "contact-sheet.png")
    draw_curves(runs["pretrain"], work, out / "curves.png")
    draw_partial_input(runs["mask"], store, work, out / "partial-input.png")
    draw_missing(runs["mask"], files, stack, out / "missing-contrast.png")
    draw_explanation(runs["age"], files, stack, out / "explanation.png")
    for name in ("road", "contact-sheet", "curves", "partial-input", "missing-contrast", "explanation"):
        path = out / f"{name}.png"
        shrink(path)
        print(path.name, f"{path.stat().st_size / 1000:.0f} kB")


def new_figure(width: float, height: float, dpi: int = 110) -> Figure:
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def shrink(path: Path) -> None:
    """A palette of 256 colours: a third of the size, and no difference that an eye finds."""
    image = Image.open(path).convert("RGB")
    image.quantize(256, kmeans=4, dither=Image.Dither.NONE).save(path, optimize=True)


def axial(image: nib.Nifti1Image, height_mm: float) -> tuple[np.ndarray, tuple[float, float]]:
    """The slice of a scan nearest to a height, anterior up and the subject's left on the left; pixel sizes in mm."""
    canonical = nib.as_closest_canonical(image)
    data = np.asanyarray(canonical.dataobj, dtype=np.float32)
    index = np.linalg.inv(canonical.affine) @ [0, 0, height_mm, 1]
    k = int(np.clip(round(index[2]), 0, data.shape[2] - 1))
    zooms = canonical.header.get_zooms()
    return data[:, ::-1, k].T, (float(zooms[0]), float(zooms[1]))


def slice_of(stack: brainfound.Stack) -> int:
    return int((stack.mask > 0).sum(axis=(1, 2)).argmax())


def height_of(stack: brainfound.Stack, s: int) -> float:
    """The height of a slice's middle in the scanner's mm."""
    _, rows, columns = stack.mask.shape
    return float((stack.affine @ [s, rows / 2, columns / 2, 1])[2])


def show(axes, pixels: np.ndarray, mask: np.ndarray | None = None, aspect: float = 1.0, **kwargs) -> None:
    shown = pixels[pixels > 0]
    high = np.percentile(shown, 99.5) if shown.size else 1
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=high, aspect=aspect, interpolation="bilinear", **kwargs)
    if mask is not None:
        axes.imshow(np.ma.masked_less(mask, 0.5), cmap=LESION, alpha=0.55, aspect=aspect, interpolation="nearest")
    axes.axis("off")


# The picture of the README: scan → stack → ViT → prediction in native space.


def draw_road(stack: brainfound.Stack, files: dict[str, Path], prediction, path: Path) -> None:
    figure = new_figure(13, 4.15, dpi=120)
    page = figure.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, 13), ylim=(0, 4.15))
    page.axis("off")
    titles = {1.35: "Session", 4.5: "Stack of slices", 7.85: "Vision transformer", 11.5: "Prediction"}
    notes = {
        1.35: "NIfTI scans, each on its own grid",
        4.5: "one contrast per channel",
        7.85: "from the Hub; adapted with LoRA",
        11.5: "on the grid of the input file",
    }
    for x, title in titles.items():
        page.text(x, 3.88, title, ha="center", va="center", fontsize=14, color=INK, fontweight="bold")
        page.text(x, 0.24, notes[x], ha="center", va="center", fontsize=10.5, color=GREY)
    _draw_scans(figure, page, stack, files)
    _draw_stack(figure, stack)
    _draw_vit(page, stack)
    _draw_answer(figure, page, stack, files, prediction)
    for left, right in ((2.62, 3.12), (5.78, 6.28), (9.42, 9.92)):
        page.add_patch(
            FancyArrowPatch((left, 2.05), (right, 2.05), arrowstyle="-|>", mutation_scale=24, color=BLUE, lw=3)
        )
    figure.savefig(path)


def _inset(figure: Figure, left: float, bottom: float, width: float, height: float):
    return figure.add_axes((left / 13, bottom / 4.15, width / 13, height / 4.15))


def _draw_scans(figure, page, stack, files) -> None:
    height = height_of(stack, slice_of(stack))
    for i, (contrast, file) in enumerate(files.items()):
        pixels, (dx, dy) = axial(nib.load(file), height)
        left, bottom, side = 0.22 + 0.44 * i, 1.72 - 0.52 * i, 1.62
        page.add_patch(
            FancyBboxPatch(
                (left, bottom),
                side,
                side * 1.1,
                boxstyle="round,pad=0.03",
                facecolor="black",
                edgecolor="white",
                lw=2,
                zorder=2 + i,
            )
        )
        axes = _inset(figure, left, bottom, side, side * 1.1)
        axes.set_zorder(3 + i)
        show(axes, pixels, aspect=dy / dx)
        axes.text(0.05, 0.95, contrast, transform=axes.transAxes, color="white", fontsize=9, va="top")


def _draw_stack(figure, stack) -> None:
    """Every third slice, seen from the side; a pale red is T1w, a pale green T2w, a pale blue FLAIR."""
    axes = _inset(figure, 3.15, 0.45, 2.65, 3.25)
    axes.axis("off")
    middle = slice_of(stack)
    chosen = [
        s
        for s in range(middle - 9, middle + 13, 3)
        if 0 <= s < len(stack.pixels) and stack.pixels[s].any(axis=0).mean() > 0.2
    ]
    size = stack.pixels.shape[-1]
    for i, s in enumerate(chosen):
        colour = np.moveaxis(stack.pixels[s].astype(float) / 255, 0, -1)
        alpha = (colour.max(axis=-1) > 0.04).astype(float)
        colour = 0.62 * colour.mean(axis=-1, keepdims=True) + 0.38 * colour
        rgba = np.dstack([np.clip(colour * 1.15, 0, 1), alpha])
        transform = Affine2D().scale(1, -0.52).skew_deg(-28, 0).translate(0, 13.5 * i) + axes.transData
        axes.add_patch(
            Rectangle(
                (0, 0), size, size, facecolor="#51606E", edgecolor="white", lw=0.8, alpha=0.42, transform=transform
            )
        )
        axes.imshow(rgba, transform=transform, extent=(0, size, size, 0), interpolation="bilinear", zorder=2 + i)
    axes.set(xlim=(-3, size * 1.32), ylim=(-size * 0.56, 13.5 * len(chosen)))
    axes.set_aspect("auto")


def _draw_vit(page, stack) -> None:
    s = slice_of(stack)
    grey = stack.pixels[s, 2] / 255
    # Patches of the slice, apart from each other.
    count, cell, left, bottom = 6, 0.2, 6.4, 1.36
    step = grey.shape[0] // count
    for row in range(count):
        for column in range(count):
            patch = grey[row * step : (row + 1) * step, column * step : (column + 1) * step]
            x, y = left + column * (cell + 0.025), bottom + (count - 1 - row) * (cell + 0.025)
            page.imshow(patch, cmap="gray", vmin=0, vmax=1, extent=(x, x + cell, y, y + cell), zorder=3)
    page.text(left + 0.66, bottom - 0.2, "patches", ha="center", va="center", fontsize=9.5, color=INK)
    for i in range(5):
        _box(page, 7.98 + 0.16 * i, 1.15, 0.11, 1.8, "#BBD7EA" if i % 2 else "#8FBFDF")
    page.text(8.36, 0.95, "blocks", ha="center", va="center", fontsize=9.5, color=INK)
    page.text(8.36, 3.1, "+ adapters", ha="center", va="center", fontsize=9.5, color=ORANGE)
    page.annotate("", (7.93, 2.05), (7.76, 2.05), arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1.5})
    _box(page, 8.93, 2.42, 0.42, 0.62, "#F6C9A8")
    _box(page, 8.93, 1.05, 0.42, 0.62, "#BFE3D5")
    page.text(9.14, 2.73, "aggre-\ngator", ha="center", va="center", fontsize=7.2, color=INK)
    page.text(9.14, 1.36, "deco-\nder", ha="center", va="center", fontsize=7.2, color=INK)
    for y in (2.73, 1.36):
        page.annotate("", (8.91, y), (8.76, 2.05), arrowprops={"arrowstyle": "-", "color": GREY, "lw": 1.3})
    page.set(xlim=(0, 13), ylim=(0, 4.15), aspect="auto")


def _box(page, x: float, y: float, width: float, height: float, colour: str) -> None:
    style = "round,pad=0.01,rounding_size=0.04"
    page.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor="none", zorder=2))


def _draw_answer(figure, page, stack, files, prediction) -> None:
    height = height_of(stack, slice_of(stack))
    scan, (dx, dy) = axial(nib.load(files["T1w"]), height)
    mask, _ = axial(prediction.image, height)
    page.add_patch(
        FancyBboxPatch(
            (10.1, 0.62), 2.75, 2.92, boxstyle="round,pad=0.03", facecolor="black", edgecolor="none", zorder=2
        )
    )
    axes = _inset(figure, 10.1, 0.95, 2.75, 2.55)
    axes.set_zorder(4)
    show(axes, scan, mask, aspect=dy / dx)
    volume = sum(prediction.answer["volumes_mm3"].values()) / 1000
    page.text(
        11.48, 0.78, f"lesion {volume:.0f} ml", ha="center", va="center", color="#FFB27A", fontsize=10.5, zorder=5
    )


# The pictures of the pages.


def draw_contact_sheet(store, work: Path, path: Path) -> None:
    write_contact_sheet(store, work / "sheet.png", keep_ids=False, max_sessions=5)
    image = Image.open(work / "sheet.png").convert("RGB")
    image.thumbnail((1000, 1000), Image.Resampling.LANCZOS)
    image.save(path)


def draw_curves(run: Path, work: Path, path: Path) -> None:
    """curves.png of the run, with the panels of the numbers in CURVES."""
    copy = work / "curves"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for name in ("recipe.yaml", "run.json"):
        shutil.copy(run / name, copy / name)
    kept = []
    for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        is_kept = {k: k == "step" or (k.startswith(CURVES) and not k.startswith("probe_")) for k in record}
        kept.append({k: v for k, v in record.items() if is_kept[k]})
    (copy / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
    image = Image.open(plot_curves(copy)).convert("RGB")
    image.thumbnail((1250, 1250), Image.Resampling.LANCZOS)
    image.save(path)


def draw_partial_input(run: Path, store, work: Path, path: Path) -> None:
    """report.png of `evaluate --partial-input --out`."""
    out = work / "report"
    shutil.rmtree(out, ignore_errors=True)
    brainfound.evaluate(run, store, partial_input=True, frozen=False, out=out)
    shutil.copy(out / "report.png", path)


def draw_missing(run: Path, files: dict[str, Path], stack, path: Path) -> None:
    """The same session, predicted from all contrasts, without FLAIR, and from FLAIR alone."""
    predictor = brainfound.load(run)
    height = height_of(stack, slice_of(stack))
    native = nib.load(files["T1w"])
    scan, (dx, dy) = axial(native, height)
    truth, _ = axial(stack.to_native((stack.mask > 0).astype(np.uint8), order=0), height)
    figure = new_figure(10, 3.0)
    shown = [("reference", truth)]
    for names in (CONTRASTS, ("T1w", "T2w"), ("FLAIR",)):
        answer = predictor.predict(**{name: str(files[name]) for name in names})
        mask, _ = axial(_on(native, answer.image), height)
        shown.append((" + ".join(names), mask))
    for i, (title, mask) in enumerate(shown):
        axes = figure.add_axes((0.005 + i * 0.2485, 0.01, 0.2435, 0.86))
        axes.set_facecolor("black")
        show(axes, scan, mask, aspect=dy / dx)
        axes.set_title(title, fontsize=11, color=INK)
    figure.savefig(path)


def _on(reference: nib.Nifti1Image, mask: nib.Nifti1Image) -> nib.Nifti1Image:
    """A mask on the grid of another scan of the session, by its nearest voxel, for one picture."""
    index = np.stack(np.meshgrid(*map(np.arange, reference.shape), indexing="ij"), axis=-1)
    matrix = np.linalg.inv(mask.affine) @ reference.affine
    there = np.rint(index @ matrix[:3, :3].T + matrix[:3, 3]).astype(int)
    data = np.asanyarray(mask.dataobj)
    inside = ((there >= 0) & (there < data.shape)).all(axis=-1)
    there = np.clip(there, 0, np.array(data.shape) - 1)
    return nib.Nifti1Image((data[tuple(np.moveaxis(there, -1, 0))] * inside).astype(np.uint8), reference.affine)


def draw_explanation(run: Path, files: dict[str, Path], stack, path: Path) -> None:
    """The maps of `explain` on the reference scan, through the middle of the head."""
    explanation = brainfound.load(run).explain(**{c: str(file) for c, file in files.items()})
    native = nib.load(files["T1w"])
    weights = explanation.numbers["slice-attention"]["weights"]
    canonical = nib.as_closest_canonical(native)
    centre = canonical.affine @ [*(np.array(canonical.shape) / 2), 1]
    scan, (dx, dy) = axial(native, centre[2] + 8)
    head = stack.pixels.any(axis=1).astype(np.uint8)
    inside, _ = axial(stack.to_native(head, order=0), centre[2] + 8)
    figure = new_figure(12, 3.1)
    titles = {
        "slice-attention": "slice attention",
        "rollout": "attention rollout",
        "gradient": "gradient × input (FLAIR)",
        "pca": "principal components",
    }
    for i, (method, title) in enumerate(titles.items()):
        axes = figure.add_axes((0.005 + i * 0.2485, 0.02, 0.235, 0.84))
        image = explanation.maps[method]
        if method == "slice-attention":
            axes.set_position((0.045 + i * 0.2485, 0.16, 0.185, 0.68))
            axes.barh(explanation.positions_mm, weights, height=4, color=BLUE)
            axes.axvline(1 / len(weights), color=GREY, linestyle="--", linewidth=1)
            axes.set_xlabel("weight (dashed: even)", fontsize=9)
            axes.set_ylabel("height of the slice, mm", fontsize=9)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        else:
            data = np.asanyarray(image.dataobj)
            if method == "pca":
                planes = [axial(nib.Nifti1Image(data[..., k], image.affine), centre[2] + 8)[0] for k in range(3)]
                axes.imshow(np.clip(np.dstack(planes), 0, 1), aspect=dy / dx)
            else:
                volume = data[..., 2] if data.ndim == 4 else data
                plane, _ = axial(nib.Nifti1Image(volume, image.affine), centre[2] + 8)
                axes.imshow(scan, cmap="gray", vmax=np.percentile(scan[scan > 0], 99.5), aspect=dy / dx)
                plane = np.ma.masked_where(inside == 0, plane)
                limit = float(np.percentile(np.abs(plane.compressed()), 99)) or 1.0
                low, colours = (-limit, "RdBu_r") if method == "gradient" else (plane.min(), "viridis")
                axes.imshow(plane, cmap=colours, vmin=low, vmax=limit, alpha=0.5, aspect=dy / dx)
            axes.axis("off")
        axes.set_title(title, fontsize=11, color=INK)
    figure.savefig(path)


if __name__ == "__main__":
    main()
