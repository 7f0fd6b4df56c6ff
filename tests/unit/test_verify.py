"""Teacher forcing on a solver that looks back, and which golden samples make a pair."""

import dataclasses

import numpy as np
import pytest

from edgedistill.agreement import snr_db
from edgedistill.compiler import compile_scheduler
from edgedistill.probes import Golden, record_golden, save_probes
from edgedistill.sampler import RowTrace, run_table
from edgedistill.table import Condition, Guidance
from runtimes.verify import _row, _Timed, compare_row

TABLE = compile_scheduler({"_class_name": "DPMSolverMultistepScheduler"}, 5, shape=(1, 4, 4))


def predict(feeds):
    return {"out_sample": np.tanh(feeds["sample"]) * np.float32(0.9)}


def golden_of(tmp_path) -> Golden:
    save_probes(record_golden(TABLE, {"unet": predict}, [0, 1], {}), tmp_path / "golden")
    return Golden.load(tmp_path / "golden", TABLE)


def test_a_row_starts_from_the_references_state_and_its_earlier_estimates(tmp_path):
    """An error in one row's prediction stays in that row, though the next two look back at it."""
    golden, spoilt = golden_of(tmp_path), 2
    label = TABLE.rows[spoilt].feeds["timestep"]

    def off(feeds):
        factor = np.float32(1.5 if feeds["timestep"] == label else 1.0)
        return {"out_sample": predict(feeds)["out_sample"] * factor}

    assert any(row.next.previous for row in TABLE.rows[spoilt + 1 :])
    traces = []
    run_table(TABLE, {"unet": off}, golden.noise, {}, traces.append, golden.rows)
    assert len(traces) == 5
    for trace in traces:
        same = np.array_equal(trace.next, golden.rows[trace.index]["next"])
        assert same == (trace.index != spoilt)


def test_a_pair_has_equal_noise_and_differs_in_one_condition():
    noise = [np.array([0.0, 0.0, 0.0, 1.0], np.float32)]
    conditions = {"class_labels": np.array([0, 1, 1, 2]), "w": np.array([1.0, 1.0, 2.0, 1.0])}
    golden = Golden(noise, conditions, (), np.zeros(4))
    assert list(golden.pairs()) == [("class_labels", 0, 1), ("w", 1, 2)]


def test_the_first_call_warms_up_and_is_not_timed():
    network = _Timed(predict)
    for _ in range(3):
        network({"sample": np.zeros(1)})
    assert len(network.seconds) == 3
    network.seconds = [9.0, 1.0, 3.0]
    assert network.median_ms == 2000


SCALE = 3.0
GUIDED = compile_scheduler(
    {"_class_name": "DDIMScheduler"},
    2,
    shape=(1, 32, 32),
    guidance=Guidance("cfg", None, SCALE, (1.0, 4.0), {"class_labels": 2}),
    conditions=(Condition("class_labels", "class", 2),),
)
LABELS = {"class_labels": np.array([0, 1])}


def answer(feeds):
    shift = np.reshape(feeds["class_labels"], (-1, 1, 1, 1)) * np.float32(0.01)
    return {"out_sample": np.tanh(feeds["sample"]) + shift}


def test_guidance_of_two_calls_is_not_counted_against_the_network(tmp_path):
    """Rounding of its two calls apart, guidance magnifies it by sqrt(g^2 + (g - 1)^2)."""
    rng = np.random.default_rng(0)

    def rounded(feeds):
        made = answer(feeds)["out_sample"]
        error = rng.standard_normal(made.shape, np.float32)
        return {"out_sample": made + np.float32(1e-3) * error}

    save_probes(record_golden(GUIDED, {"unet": answer}, [0, 1], LABELS), tmp_path / "golden")
    golden = Golden.load(tmp_path / "golden", GUIDED)
    forced: list[RowTrace] = []
    run_table(GUIDED, {"unet": rounded}, golden.noise, LABELS, forced.append, golden.rows)
    magnified = 20 * np.log10(np.hypot(SCALE, SCALE - 1))
    for trace, kept in zip(forced, golden.rows, strict=True):
        row = _row(trace, trace.next, kept)
        # The golden calls are what the network answers on its own.
        null = np.full(2, 2)
        for name, labels in (("conditional", LABELS["class_labels"]), ("unconditional", null)):
            fed = {"sample": kept["state"], "class_labels": labels}
            np.testing.assert_allclose(kept[name], answer(fed)["out_sample"], atol=1e-6)
        assert row.raw.snr_db == pytest.approx(
            snr_db(
                np.concatenate([kept["conditional"], kept["unconditional"]]),
                np.concatenate(trace.calls),
            )
        )
        assert row.guided.snr_db == pytest.approx(snr_db(kept["raw"], trace.raw))
        assert row.raw.snr_db - row.guided.snr_db == pytest.approx(magnified, abs=0.5)
        # A bundle of before has no calls: the prediction after guidance is held to the floor.
        old = {name: value for name, value in kept.items() if not name.endswith("conditional")}
        assert _row(trace, trace.next, old).raw == row.guided
        # So it is of a device that wrote no calls, where what guidance made of them is all there is.
        alone = compare_row(trace.index, trace.row, kept, {"raw": trace.raw}, None)
        assert (alone.raw, alone.guided, alone.free) == (row.guided, None, None)
        # Without guidance nothing else is told.
        plain = dataclasses.replace(trace, calls=())
        assert _row(plain, trace.next, old).guided is None
