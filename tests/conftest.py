"""Fixtures that several rooms share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

# Before torch is imported anywhere: the suite runs on small machines, and no test may reach a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real brains: `BRAINFOUND_REAL_DATA`, or one next to the project; skipped where it is absent."""
    folder = Path(os.environ.get("BRAINFOUND_REAL_DATA", REPOSITORY.parent / "shared" / "realdata"))
    if not folder.is_dir():
        pytest.skip(f"no folder of real brains at {folder}: set BRAINFOUND_REAL_DATA to one")
    return folder


class Head:
    """A small synthetic head in millimetres, sampled on any grid; left-right, front-back and top-bottom differ."""

    lesion_centre_mm = np.array([18.0, 12.0, 8.0])
    lesion_radius_mm = 13.0

    @staticmethod
    def grid_mm(shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
        index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
        return index @ affine[:3, :3].T + affine[:3, 3]

    def image(self, shape: tuple[int, int, int], affine: np.ndarray, noise: float = 0.0, seed: int = 0) -> np.ndarray:
        mm = self.grid_mm(shape, affine)
        inside = ((mm / np.array([48.0, 60.0, 42.0])) ** 2).sum(-1) < 1
        values = 100 + 0.4 * mm[..., 0] + 0.7 * mm[..., 1] + 0.5 * mm[..., 2]
        image = np.where(inside, values, 0.0)
        if noise:
            rng = np.random.default_rng(seed)
            image = np.hypot(image + rng.normal(0, noise, shape), rng.normal(0, noise, shape))
        return image.astype(np.float32)

    def lesion(self, shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
        mm = self.grid_mm(shape, affine)
        return (((mm - self.lesion_centre_mm) ** 2).sum(-1) < self.lesion_radius_mm**2).astype(np.uint8)


@pytest.fixture(scope="session")
def head() -> Head:
    return Head()


def centred_affine(shape: tuple[int, int, int], linear: np.ndarray) -> np.ndarray:
    """An affine whose grid has its middle at 0 mm."""
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = -linear @ ((np.array(shape) - 1) / 2)
    return affine


@pytest.fixture(scope="session")
def centred():
    return centred_affine


@pytest.fixture
def write_scan(tmp_path: Path, head: Head):
    """Write the synthetic head, or given voxels, and return the path."""

    def write(name: str, data: np.ndarray | None = None, shape=(40, 48, 36), spacing=3.0, affine=None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if affine is None:
            affine = centred_affine(shape if data is None else data.shape[:3], np.eye(3) * spacing)
        data = head.image(shape, affine) if data is None else data
        nib.save(nib.Nifti1Image(data, affine), path)
        return path

    return write


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """A copy of the package, to be changed."""
    import brainfound

    folder = tmp_path / "package" / "brainfound"
    shutil.copytree(Path(brainfound.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def run_on_copy(package_copy: Path, tmp_path: Path):
    """Run a program with the changed package: run_on_copy(program, *arguments)."""

    def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        (tmp_path / "program.py").write_text(program)
        environment = {**os.environ, "PYTHONPATH": str(package_copy.parent), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "program.py", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)

    return run


@pytest.fixture(scope="session")
def make_cohort(head: Head):
    """Write a small manifest cohort: 3-mm heads whose brightness grows with age, with lesions in half of them."""

    def make(
        folder: Path, num_subjects: int = 6, contrasts: tuple[str, ...] = ("T1w", "T2w", "FLAIR"), seed: int = 0
    ) -> Path:
        rng = np.random.default_rng(seed)
        shape = (34, 42, 30)
        affine = centred_affine(shape, np.eye(3) * 3.0)
        base, lesion = head.image(shape, affine), head.lesion(shape, affine)
        rows = ["subject\tsession\tcontrast\tpath\tmask\tage_years\tsex\tsite\tdiagnosis"]
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(num_subjects):
            subject, ill = f"s{number:02d}", number % 2 == 1
            age = 20 + 60 * (number + 0.5) / num_subjects
            # A dark core that grows with age, and for patients a bright ball.
            core = ((head.grid_mm(shape, affine) ** 2).sum(-1) < (8 + 0.25 * age) ** 2) & (base > 0)
            for contrast in contrasts:
                image = base * rng.uniform(0.9, 1.1) + np.where(base > 0, rng.normal(0, 4, shape), 0)
                image[core] *= 0.3
                if ill:
                    image[lesion > 0] = base.max() * 1.6
                file = f"{subject}_{contrast}.nii.gz"
                nib.save(nib.Nifti1Image(image.astype(np.float32), affine), folder / file)
                mask = f"{subject}_mask.nii.gz"
                word = "patient" if ill else "healthy"
                site, sex = f"site{number % 3}", "FM"[number % 2]
                rows.append(f"{subject}\t1\t{contrast}\t{file}\t{mask}\t{age:.2f}\t{sex}\t{site}\t{word}")
            mask_data = lesion if ill else np.zeros_like(lesion)
            nib.save(nib.Nifti1Image(mask_data, affine), folder / f"{subject}_mask.nii.gz")
        (folder / "manifest.tsv").write_text("\n".join(rows) + "\n")
        return folder

    return make


@pytest.fixture(scope="session")
def small_store(tmp_path_factory, make_cohort):
    """A store of 12 sessions at 4 mm: three contrasts, 32 × 32 pixels, masks, ages, diagnoses."""
    from brainfound.data.preprocessing.settings import Preprocessing
    from brainfound.data.store.prepare import prepare

    folder = tmp_path_factory.mktemp("cohort")
    cohort = make_cohort(folder / "source", num_subjects=12)
    return prepare(cohort, folder / "store", Preprocessing(spacing_mm=(4, 4, 4), size=(32, 32)))


@pytest.fixture(scope="session")
def source(small_store) -> Path:
    """The cohort of which the small store was made."""
    return small_store.path.parent / "source"


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory) -> Path:
    """A small Dinov2 checkpoint in the Hub's format, with random weights."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8)
    folder = tmp_path_factory.mktemp("hub") / "dinov2-tiny"
    Dinov2Model(config).save_pretrained(folder)
    return folder
