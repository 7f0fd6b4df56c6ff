"""The packaged teacher: how it is made, opened and sampled, and how good it is."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from edgedistill.errors import BundleError, ConfigError
from edgedistill.evaluation.baselines import Settings, naive_baselines
from edgedistill.evaluation.report import Evaluator
from edgedistill.models import store
from edgedistill.models.run import sample_torch
from edgedistill.noise import noise_bank
from edgedistill.teacher import PACKAGED, Teacher

FOLDER = PACKAGED["digits"]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher.open("digits")


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator.open("digits")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("train_digits_teacher")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


def test_it_opens_from_the_package_and_in_diffusers_alike(teacher: Teacher) -> None:
    stock = UNet2DModel.from_pretrained(FOLDER, subfolder="unet", torch_dtype=torch.float32).eval()
    inputs = (torch.randn(3, 1, 8, 8), torch.tensor([999.0, 400.0, 0.0]), torch.tensor([0, 9, 10]))
    with torch.no_grad():
        assert torch.equal(teacher.network(*inputs).sample, stock(*inputs).sample)
    assert (teacher.shape, teacher.classes, teacher.null) == ((1, 8, 8), 10, {"class_labels": 10})
    assert teacher.prediction_type == "v_prediction"
    assert not any(
        p.requires_grad or p.dtype != torch.float32 for p in teacher.network.parameters()
    )


def test_a_network_folder_with_its_scheduler_beside_it_is_the_same_teacher(
    tmp_path: Path, teacher: Teacher
) -> None:
    store.save(teacher.network, tmp_path / "unet", torch.float16)
    text = (FOLDER / "scheduler" / "scheduler_config.json").read_text()
    (tmp_path / "unet" / "scheduler_config.json").write_text(text)
    assert Teacher.open(tmp_path / "unet").fingerprint == teacher.fingerprint
    (tmp_path / "unet" / "scheduler_config.json").rename(tmp_path / "scheduler_config.json")
    assert Teacher.open(tmp_path / "unet").fingerprint == teacher.fingerprint
    assert Teacher.open(tmp_path).fingerprint == teacher.fingerprint


def test_a_folder_without_a_scheduler_or_without_anything_is_refused(
    tmp_path: Path, teacher: Teacher
) -> None:
    store.save(teacher.network, tmp_path / "alone" / "unet")
    with pytest.raises(BundleError, match=r"has no scheduler_config\.json"):
        Teacher.open(tmp_path / "alone")
    with pytest.raises(
        BundleError, match="no such teacher; give 'digits', 'captioned_digits' or a diffusers"
    ):
        Teacher.open(tmp_path / "gone")


def test_guidance_needs_a_null_class() -> None:
    unguided = Teacher.open("digits", null_class=False)
    assert unguided.classes == 11
    assert unguided.table(2).nfe == 2
    with pytest.raises(ConfigError, match="guidance needs a null class"):
        unguided.table(2, guidance_scale=1.5)


def test_its_table_samples_what_diffusers_samples(teacher: Teacher) -> None:
    table, w = teacher.table(4, guidance_scale=1.5), 0.5
    scheduler = DDIMScheduler.from_pretrained(FOLDER, subfolder="scheduler")
    scheduler.set_timesteps(4)
    labels, null = torch.arange(6), torch.full((6,), 10)
    z = torch.from_numpy(noise_bank(table, range(6))[0])
    with torch.no_grad():
        for t in scheduler.timesteps:
            guided, free = (teacher.network(z, t, c).sample for c in (labels, null))
            z = scheduler.step((1 + w) * guided - w * free, t, z).prev_sample
    samples = sample_torch({"unet": teacher.network}, table, 6)
    np.testing.assert_allclose(samples, z.clip(-1, 1).numpy(), atol=1e-5)


def test_a_sample_depends_on_its_seed_and_class_alone(teacher: Teacher) -> None:
    table, modules = teacher.table(2), {"unet": teacher.network}
    many = sample_torch(modules, table, 7, batch=3)
    alone = sample_torch(modules, table, 1, seed=5, class_labels=[5])
    np.testing.assert_allclose(alone[0], many[5], atol=1e-5)
    other = sample_torch(modules, table, 1, seed=5, class_labels=[6])
    assert np.abs(other[0] - many[5]).max() > 0.5
    bank = noise_bank(table, range(7))
    np.testing.assert_array_equal(sample_torch(modules, table, 7, noise=bank, batch=3), many)


@pytest.mark.slow
def test_at_50_guided_steps_it_is_good(teacher: Teacher, evaluator: Evaluator) -> None:
    samples = sample_torch({"unet": teacher.network}, teacher.table(50, 1.5), 1000)
    report = evaluator.report(samples, np.arange(1000) % 10)
    assert report.frechet <= 0.9
    assert report.floor == pytest.approx(0.2955, abs=2e-3)
    assert report.accuracy >= 0.95
    assert report.diversity >= 0.75
    assert report.recall >= 0.6
    assert report.memorisation <= 0.02


def test_the_strongest_naive_teacher_is_found_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: Teacher, evaluator: Evaluator
) -> None:
    settings = Settings(
        steps=(2, 1), w=(0.0, 0.5), spacings=("trailing", "leading"), reference_steps=8, count=60
    )
    made = naive_baselines(teacher, evaluator, settings, tmp_path)
    assert len(made.tried) == 8
    for steps in (2, 1):
        best = min((item for item in made.tried if item[0] == steps), key=lambda item: item[3])
        kept = made.naive[steps]
        assert (kept.steps, kept.w, kept.spacing, kept.report.frechet) == best
        assert kept.spacing == "trailing"
        assert kept.report.frechet > made.teacher.frechet
    assert made.naive[1].report.mse_to_reference > 2 * made.naive[2].report.mse_to_reference

    monkeypatch.delattr(Teacher, "sample")
    again = naive_baselines(teacher, evaluator, settings, tmp_path)
    assert (again.teacher, again.naive, again.tried) == (made.teacher, made.naive, made.tried)
    np.testing.assert_array_equal(again.reference, made.reference)
    with pytest.raises(AttributeError, match="sample"):
        naive_baselines(teacher, evaluator, Settings(count=61), tmp_path)


def test_the_training_script_gives_the_same_bytes_for_the_same_seed(
    tmp_path: Path, example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        example.write(example.train(3, seed), tmp_path / name)
    weights = {
        name: (tmp_path / name / "unet" / store.WEIGHTS).read_bytes()
        for name in ("one", "two", "other")
    }
    assert weights["one"] == weights["two"] != weights["other"]
    check = importlib.import_module("teachers").check
    assert check(tmp_path / "one", example.SHIPPED) == 1
    assert (
        "Not the packaged bytes: unet/diffusion_pytorch_model.safetensors. Another"
        in capsys.readouterr().out
    )


def test_the_packaged_weights_survive_being_opened_and_written_again(
    tmp_path: Path, example: ModuleType, teacher: Teacher
) -> None:
    example.write(teacher.network, tmp_path)
    assert importlib.import_module("teachers").check(tmp_path, example.SHIPPED) == 0
