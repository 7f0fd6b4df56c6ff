"""Floors and the report: what fails, in which words, and what ends up in the JSON."""

import json
import math

import numpy as np
import pytest

from edgedistill.agreement import Agreement, response_gain
from edgedistill.errors import ConfigError
from edgedistill.parity import FLOORS, ArtifactParity, ParityReport, RowParity, floor_of

RANDOM = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
EXACT = Agreement(math.inf, 0.0, 1.0)


def _agreement(snr: float) -> Agreement:
    return Agreement(snr, 0.25, 0.5)


def _artifact(precision: str = "float32", **changes) -> ArtifactParity:
    return ArtifactParity("a", "onnxruntime", "onnx", precision, 1024, **changes)


def _rows(*forced_and_free: tuple[float, float]) -> tuple[RowParity, ...]:
    return tuple(
        RowParity(i, 999.0, _agreement(forced), EXACT, EXACT, _agreement(free))
        for i, (forced, free) in enumerate(forced_and_free)
    )


def test_floors_fall_from_the_network_to_the_samples_and_give_a_reason():
    for floor in FLOORS.values():
        assert floor.raw >= floor.free >= floor.image > 0
        assert 0 < floor.sensitivity < 1
        assert len(floor.reason) > 30
    assert (FLOORS["float32"].raw, FLOORS["float16"].raw) == (100.0, 50.0)


@pytest.mark.parametrize("precision", FLOORS)
def test_rounding_moves_no_gain_out_of_its_floor_where_the_response_is_large_enough(
    precision: str,
) -> None:
    floor = FLOORS[precision]
    change = RANDOM / np.sqrt(np.mean(RANDOM**2))
    moved = (floor.faint + floor.rounding) * change
    gain = response_gain(floor.faint * change, moved)
    assert gain == pytest.approx(1 + floor.sensitivity)
    assert (FLOORS["float32"].faint, FLOORS["float16"].faint) == pytest.approx((1e-3, 0.04))


@pytest.mark.parametrize("precision", FLOORS)
def test_only_what_rounding_can_have_done_is_excused(precision: str) -> None:
    floor = FLOORS[precision]
    assert floor.excuses(1.0, 0.9 * floor.faint)
    assert not floor.excuses(1.0, 1.1 * floor.faint)
    assert floor.excuses(1 - 1.9 * floor.sensitivity, 0.9 * floor.faint)
    assert not floor.excuses(1 + 2.3 * floor.sensitivity, 0.9 * floor.faint)
    # A condition that is ignored, though its response is but thrice what rounding does.
    assert not floor.excuses(0.0, 3 * floor.rounding)
    assert floor.excuses(0.0, 0.5 * floor.rounding)


def test_an_unknown_precision_has_no_floor():
    with pytest.raises(ConfigError, match="No parity floor for precision 'int2'"):
        floor_of("int2")


def test_failures_name_the_worst_row_its_value_and_its_floor():
    artifact = _artifact(rows=_rows((120.0, 120.0), (99.9, 60.0), (101.0, 59.0)))
    assert artifact.verdict == "failed"
    assert artifact.failures == (
        "onnxruntime float32 'a': 99.9 dB SNR at row 1 (teacher-forced) against the reference, "
        "at least 100.0 dB is required.",
        "onnxruntime float32 'a': 59.0 dB SNR at row 2 (free-running) against the reference, "
        "at least 100.0 dB is required.",
    )


def test_the_floor_itself_passes():
    rows = _rows((100.0, 100.0))
    artifact = _artifact(rows=rows, image=_agreement(100.0), sensitivity={"w": 1.001 - 1e-12})
    assert (artifact.failures, artifact.verdict) == ((), "ok")


def test_samples_and_sensitivity_fail_by_themselves():
    floor = floor_of("int8").image
    artifact = _artifact(
        "int8", image=_agreement(floor - 0.1), sensitivity={"class": 0.05, "w": 1.0, "t": 1.3}
    )
    first, second, third = artifact.failures
    assert (
        f"{floor - 0.1:.1f} dB SNR of the samples against the reference, at least {floor:.1f} dB"
        in first
    )
    assert "a change of `class` moves the samples 0.050 times as far" in second
    assert "0.800 to 1.200 is required" in second
    assert "a change of `t` moves the samples 1.300 times as far" in third


def test_rows_without_a_network_count_free_running_only():
    row = RowParity(0, None, None, None, EXACT, _agreement(120.0))
    artifact = _artifact(rows=(row,))
    assert artifact.worst_forced is None
    assert artifact.worst_free == (0, 120.0)
    assert artifact.verdict == "ok"


def test_report_is_ok_only_when_something_ran_and_nothing_failed():
    good, skipped = _artifact(rows=_rows((120.0, 120.0))), _artifact(skipped="not installed")
    bad = _artifact(broken="it broke")

    def report(*artifacts: ArtifactParity) -> ParityReport:
        return ParityReport("student", "f" * 64, 4, (-1.0, 1.0), artifacts)

    assert report(good, skipped).ok
    assert not report(skipped).ok
    assert not report(good, bad).ok
    assert report(good, bad).failures == ("onnxruntime float32 'a': it broke",)


def test_json_is_plain_and_holds_every_number():
    artifact = _artifact(
        rows=_rows((math.inf, 101.5)), image=_agreement(-math.inf), output=RANDOM, call_ms=1.5
    )
    report = ParityReport("student", "f" * 64, 2, (-1.0, 1.0), (artifact,), {"numpy": "2"}, RANDOM)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    (item,) = data["artifacts"]
    assert item["rows"][0]["teacher_forced"]["raw"]["snr_db"] == 999.0
    assert item["rows"][0]["free_running"]["next"] == {
        "snr_db": 101.5,
        "max_abs": 0.25,
        "cosine": 0.5,
    }
    assert item["image"]["snr_db"] == -999.0
    assert (item["verdict"], item["call_ms"], item["size"]) == ("failed", 1.5, 1024)
    assert data["floors"]["float32"]["reason"] == FLOORS["float32"].reason
    assert "output" not in item
