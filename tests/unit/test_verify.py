"""Teacher forcing on a solver that looks back, and which golden samples make a pair."""

import numpy as np

from edgedistill.compiler import compile_scheduler
from edgedistill.probes import Golden, record_golden, save_probes
from edgedistill.sampler import run_table
from runtimes.verify import _Timed

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
