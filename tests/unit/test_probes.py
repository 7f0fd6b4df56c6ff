"""Which samples are golden, and that probes come back as they were."""

import numpy as np
import pytest

from edgedistill.errors import BundleError
from edgedistill.probes import golden_samples, load_probes, save_probes, spread_conditions
from edgedistill.table import Condition, Guidance, Row, SamplerTable, Stage


def table(conditions=(), guidance=Guidance()):  # noqa: B008
    stage = Stage((1, 2, 2), (Row(("unet",), x0=(0.0, 1.0)),))
    return SamplerTable((stage,), 1, conditions=conditions, guidance=guidance)


def test_without_conditions_every_sample_is_its_own():
    assert golden_samples(table()) == (list(range(8)), {})
    assert spread_conditions(table(), 3) == {}


@pytest.mark.parametrize(("default", "far"), [(1.0, 3.0), (2.5, 1.0)])
def test_each_condition_changes_alone_on_the_same_noise(default, far):
    classes = Condition("class_labels", "class", 3)
    seeds, given = golden_samples(table((classes,), Guidance("embedded", "w", default, (1.0, 3.0))))
    assert seeds == [0, 1, 2, 3, 0, 1, 2, 3]
    np.testing.assert_array_equal(given["class_labels"], [0, 1, 2, 0, 1, 1, 0, 0])
    w, changed = default - 1, far - 1
    np.testing.assert_array_equal(given["w"], [w, w, w, w, w, changed, w, changed])


def test_a_condition_with_one_value_is_not_changed():
    one = Condition("class_labels", "class", 1)
    seeds, given = golden_samples(table((one,), Guidance("embedded", "w", 2.0, (2.0, 2.0))))
    assert seeds == list(range(8))
    np.testing.assert_array_equal(given["w"], np.ones(8))


def test_calibration_goes_through_the_guidance_range():
    given = spread_conditions(table(guidance=Guidance("embedded", "w", 1.0, (1.0, 3.0))), 5)
    np.testing.assert_array_equal(given["w"], [0, 0.5, 1, 1.5, 2])


def test_probes_come_back_to_the_bit(tmp_path):
    rng = np.random.default_rng(0)
    probes = {
        "noise.0": rng.standard_normal((2, 1, 3, 3)).astype(np.float32),
        "condition.class_labels": np.arange(2, dtype=np.int32),
        "strided": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    }
    save_probes(probes, tmp_path / "probes" / "golden.safetensors")
    held = load_probes(tmp_path / "probes" / "golden.safetensors")
    assert held.keys() == probes.keys()
    for name, value in probes.items():
        np.testing.assert_array_equal(held[name], value)
        assert held[name].dtype == value.dtype


def test_probes_that_cannot_be_read_are_one_clear_error(tmp_path):
    with pytest.raises(BundleError, match=r"golden\.safetensors: no such file; .* export it anew"):
        load_probes(tmp_path / "golden.safetensors")
    (tmp_path / "golden.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(BundleError, match="not a whole safetensors file"):
        load_probes(tmp_path / "golden.safetensors")
