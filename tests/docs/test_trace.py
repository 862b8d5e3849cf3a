"""Tests of the trace of frames per request: the definitions of the counts, and a recording of a real service."""

from docs.trace import TARGETS, Call, Measure, exceeded, measure, recorded, sequence, table

CALLS = [
    Call("loop", "service.a", "f"),
    Call("loop", "service.a", "g"),
    Call("loop", "service.b", "f"),
    Call("thread", "service.b", "f"),
    Call("loop", "service.a", "f"),
]


def test_measure_counts_changes_between_consecutive_frames() -> None:
    """A change of module or thread is counted between consecutive frames of all threads."""
    assert Measure(5, 2, 2, functions=3, thread_changes=2) == measure(CALLS)
    assert ["[loop] service.a: f g", "[loop] service.b: f", "[thread] service.b: f", "[loop] service.a: f"] == list(
        sequence(CALLS)
    )


def test_exceeded_lists_only_counts_above_a_target() -> None:
    """A count at its target passes. A count above it is listed. A request without a target always passes."""
    kind, target = next(iter(TARGETS.items()))
    assert [] == exceeded({kind: target, "no target": Measure(10**6, 10**6, 10**6)})
    above = exceeded({kind: target._replace(module_changes=target.module_changes + 1)})
    assert [f"{kind}: {target.module_changes + 1} module changes, target <= {target.module_changes}"] == above


def test_trace_records_every_thread_of_a_real_service() -> None:
    """The trace of each kind of request has frames of several threads, of at least 10 modules, of service and model."""
    traces = recorded(warm_up=2, measured=1)
    assert set(TARGETS) < set(traces)
    for kind, calls in traces.items():
        counts = measure(calls)
        assert counts.frames >= counts.functions >= counts.modules >= 10, kind
        assert counts.module_changes >= counts.modules - 1, kind
        assert counts.thread_changes >= 2, kind
        assert {"service", "model"} == {call.module.partition(".")[0] for call in calls}, kind
    assert measure(traces["anonymous prediction"]).frames < measure(traces["stored prediction"]).frames
    assert 2 + len(traces) == len(list(table({kind: measure(calls) for kind, calls in traces.items()})))
