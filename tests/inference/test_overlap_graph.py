"""The overlap graph shares work between overlapping windows, and changes no bit of a prediction."""

import base64
import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.to_onnx import export_network, export_overlap_graph
from export.verify import synthetic_windows
from model import contract
from model.data import cmapss
from model.evaluation.evaluate import ARTEFACT, open_artefact
from model.training.network import EngineHealth, NetworkConfig
from model.training.overlap import OverlapNetwork
from model.windows import Readings, pad_left
from service.errors import ArtefactRejected
from service.inference import model_loader, onnx_model, overlap_graph
from service.inference.overlap_graph import OverlapGraph as Opened
from service.inference.overlap_graph import open_overlap_graph
from service.scoring import job, scorer
from tests.support.models import WINDOW, manifest_of, untrained, without
from tests.support.models import bundled as bundled_graph
from tests.support.scoring import flights, read, score, write


@pytest.fixture(scope="module")
def network() -> EngineHealth:
    """Return an untrained network of rolling means over 23 rows."""
    return untrained()


@pytest.fixture(scope="module")
def bundled() -> Opened:
    """Return the overlap graph of the committed artefact."""
    opened = open_overlap_graph(ARTEFACT, model_loader.open_model(ARTEFACT))
    assert opened is not None
    return opened


def shared(network: EngineHealth, rows: Readings) -> tuple[Readings, Readings, Readings]:
    """Return the logits of every window by the overlap graph, whether they are exact, and those of the network."""
    starts = np.arange(len(rows) - network.config.window + 1)
    windows = np.lib.stride_tricks.sliding_window_view(rows, network.config.window, axis=0).transpose(0, 2, 1)
    with torch.inference_mode():
        logits, _, exact = OverlapNetwork(network).eval()(torch.from_numpy(rows), torch.from_numpy(starts))
        own, _ = network(torch.from_numpy(windows.copy()))
    return logits.numpy(), exact.numpy(), own.numpy()


@settings(max_examples=60)
@given(st.data())
def test_exact_windows_of_overlap_graph_equal_the_network(network: EngineHealth, data: st.DataObject) -> None:
    """Exact windows have equal bits with padding, constant spells, repeated rows, broken sensors, in any order."""
    rows = synthetic_windows(network, 4, seed=data.draw(st.integers(0, 99))).reshape(-1, 17)
    at = st.integers(0, len(rows) - 1)
    for begin, length in data.draw(st.lists(st.tuples(at, st.integers(2, 9)), max_size=8)):
        channels = data.draw(st.sampled_from([slice(None), slice(3, 4), slice(5, 9), slice(3, None)]))
        rows[begin : begin + length, channels] = rows[begin, channels]
    for place in data.draw(st.lists(at, max_size=3)):
        rows[place, data.draw(st.integers(0, 16))] = data.draw(st.sampled_from([1e30, -1e6, 0.0, 3e38]))
    logits, exact, own = shared(network, rows)
    np.testing.assert_array_equal(own[exact].view(np.int32), logits[exact].view(np.int32))


def test_short_histories_and_inner_spells_are_exact(network: EngineHealth) -> None:
    """All windows are exact for an engine from its first flight, and for one with a constant spell inside."""
    flown = synthetic_windows(network, 1, seed=5)[0]
    flown[10:16, 4] = flown[10, 4]
    rows = np.concatenate([np.repeat(flown[:1], WINDOW - 1, axis=0), flown])
    logits, exact, own = shared(network, rows)
    spell = np.zeros(len(exact), np.bool_)
    spell[11:14] = True  # the newest row is in the spell, before its length is known
    np.testing.assert_array_equal(~spell, exact)
    np.testing.assert_array_equal(own[exact], logits[exact])
    assert (own[spell] != logits[spell]).any(axis=1).all()


def test_only_rolling_means_have_an_overlap_graph() -> None:
    """A recurrent backbone, and a window whose sums could be rounded, have no overlap graph."""
    assert export_overlap_graph(EngineHealth(NetworkConfig(window=12, backbone="conv-gru", hidden=8))) is None
    assert export_overlap_graph(EngineHealth(NetworkConfig(window=4096, hidden=8))) is None


def test_overlap_graph_has_the_bits_of_test_engines(bundled: Opened, cmapss_dir: Path) -> None:
    """On all test engines nine of ten windows are exact, and all logits equal those of the network."""
    model = bundled.model
    for subset in ("FD001", "FD002", "FD003", "FD004"):
        engines = [engine.telemetry.astype(np.float32) for engine in cmapss.read_test(cmapss_dir, subset)[:8]]
        rows = np.concatenate([np.concatenate([np.repeat(engine[:1], 99, axis=0), engine]) for engine in engines])
        ends = np.cumsum([99 + len(engine) for engine in engines])
        starts = np.concatenate(
            [np.arange(end - 99 - len(engine), end - 99) for end, engine in zip(ends, engines, strict=True)]
        )
        windows = np.concatenate(
            [np.stack([pad_left(engine[: k + 1], 100) for k in range(len(engine))]) for engine in engines]
        ).astype(np.float32)
        own = [model.run(windows[i : i + 64]) for i in range(0, len(windows), 64)]
        outputs = bundled.answers(rows, starts, 64)
        np.testing.assert_array_equal(np.concatenate([batch.logits for batch in own]), outputs.logits)
        np.testing.assert_array_equal(
            np.concatenate([batch.rul for batch in own if batch.rul is not None]), outputs.rul
        )
        assert bundled.run(rows, starts)[1].mean() > 0.9


@pytest.mark.parametrize("mixed", [False, True])
def test_job_output_with_and_without_overlap_graph_is_equal(
    windows: Readings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixed: bool
) -> None:
    """The output has equal bytes by engine and by flight, with many windows per call and with few."""
    table = flights(windows)
    if mixed:
        table = table.sort_by([("cycle", "ascending"), ("engine_id", "descending")])
    source = write(table, tmp_path / "a.parquet")
    called: list[int] = []
    monkeypatch.setattr(Opened, "run", _counting(Opened.run, called))
    assert 0 == score(source, tmp_path / "with.parquet")
    assert 400 in called
    monkeypatch.setattr(job, "open_overlap_graph", lambda *_: None)
    assert 0 == score(source, tmp_path / "without.parquet")
    assert (tmp_path / "with.parquet").read_bytes() == (tmp_path / "without.parquet").read_bytes()


def test_invalid_overlap_graph_is_ignored(windows: Readings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is missing, invalid, foreign or renamed is ignored, and predictions are unchanged."""
    expected = read(_scored(ARTEFACT, windows, tmp_path / "0", monkeypatch))
    manifest = open_artefact(ARTEFACT)[1]
    torch.manual_seed(3)
    other = EngineHealth(NetworkConfig(hidden=8)).eval()
    strange = [b"", b"no graph", export_overlap_graph(other), export_network(other, 100)]
    for k, content in enumerate(strange):
        path = tmp_path / f"{k}.onnx"
        contract.write(ARTEFACT.read_bytes(), manifest, path, content)
        assert open_overlap_graph(path, model_loader.open_model(path)) is None
        assert expected.equals(read(_scored(path, windows, tmp_path / f"of-{k}", monkeypatch)))
    torn = onnx.load_model_from_string(ARTEFACT.read_bytes())
    kept = {entry.key: entry.value for entry in torn.metadata_props} | {contract.OVERLAP_KEY: "%%%"}
    onnx.helper.set_model_props(torn, kept)
    contract.write(torn.SerializeToString(), manifest, tmp_path / "torn.onnx")
    assert open_overlap_graph(tmp_path / "torn.onnx", model_loader.open_model(tmp_path / "torn.onnx")) is None


@pytest.mark.parametrize(("kind", "kept"), [("Or", 0), ("Or", 1), ("And", 0), ("And", 1), ("Round", 0), ("Relu", 0)])
def test_incomplete_overlap_graph_is_rejected(tmp_path: Path, kind: str, kept: int) -> None:
    """Verification fails for a graph in which one Or, And, Round or Relu node only passes an input on."""
    content, manifest = bundled_graph(contract.OVERLAP_KEY), open_artefact(ARTEFACT)[1]
    for k, node in enumerate(content.graph.node):
        if node.op_type == kind:
            contract.write(ARTEFACT.read_bytes(), manifest, tmp_path / "m.onnx", without(content, k, kept))
            assert open_overlap_graph(tmp_path / "m.onnx", model_loader.open_model(tmp_path / "m.onnx")) is None, (
                node.output
            )


def test_overlap_graph_of_a_short_window_is_used(network: EngineHealth, tmp_path: Path) -> None:
    """The overlap graph of any trained network is used: verification needs equal bits and enough exact windows."""
    graphs = export_network(network, WINDOW), export_overlap_graph(network)
    contract.write(graphs[0], manifest_of(network), tmp_path / "m.onnx", graphs[1])
    assert open_overlap_graph(tmp_path / "m.onnx", model_loader.open_model(tmp_path / "m.onnx")) is not None


def test_batch_dependent_bits_disable_the_overlap_graph(bundled: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is not used on a processor that rounds a single window differently from a batch."""
    shared_run, alone = Opened.run, bundled.model.run

    def run(
        self: Opened, rows: onnx_model.Batch, starts: overlap_graph.WindowStarts
    ) -> tuple[onnx_model.Outputs, overlap_graph.Mask]:
        outputs, exact = shared_run(self, rows, starts)
        return (rounded(outputs) if len(starts) == 1 else outputs), exact

    def rounded(outputs: onnx_model.Outputs) -> onnx_model.Outputs:
        return onnx_model.Outputs(np.nextafter(outputs.logits, np.float32(9e9)), outputs.rul)

    model = dataclasses.replace(
        bundled.model, run=lambda batch: rounded(alone(batch)) if len(batch) == 1 else alone(batch)
    )
    monkeypatch.setattr(Opened, "run", run)
    assert open_overlap_graph(ARTEFACT, model) is None


def test_failing_overlap_graph_falls_back_to_the_network(bundled: Opened) -> None:
    """A job whose overlap graph fails continues with the network."""
    content = bundled_graph(contract.OVERLAP_KEY)
    empty = [node.input[0] for node in content.graph.node if node.op_type == "Equal"][
        -1
    ]  # the spans shorter than the longest
    bound = next(k for k, node in enumerate(content.graph.node) if node.output[0] == empty)
    failing = Opened(bundled.model, onnx_model.open_session(without(content, bound, 0), 1))
    rows = np.repeat(np.arange(100, dtype=np.float32), 17).reshape(100, 17) - 1e9  # no sensor contributes
    with pytest.raises(Exception, match="Out of range"):
        failing.run(rows, np.array([0]))
    np.testing.assert_array_equal(bundled.model.run(rows[None]).logits, failing.answers(rows, np.array([0]), 64).logits)


@given(st.lists(st.integers(0, 2**18), max_size=200, unique=True), st.integers(1, 3000))
def test_overlap_calls_do_not_exceed_the_verified_size(scattered: list[int], contiguous: int) -> None:
    """Grouped calls cover all windows in order, and none exceeds the verified number of windows or rows."""
    starts = np.union1d(np.array(scattered, np.int64), np.arange(contiguous))
    calls = scorer._group_starts(starts)
    np.testing.assert_array_equal(starts, np.concatenate(calls))
    assert all(
        len(call) <= overlap_graph.MAX_OVERLAP_WINDOWS and np.ptp(call) < overlap_graph.MAX_CALL_ROWS
        for call in calls
        if len(call)
    )


def test_inexact_overlap_graph_is_rejected(bundled: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that differs in one bit of one logit is rejected."""
    shared_run = Opened.run

    def wrong(
        self: Opened, rows: onnx_model.Batch, starts: overlap_graph.WindowStarts
    ) -> tuple[onnx_model.Outputs, overlap_graph.Mask]:
        outputs, exact = shared_run(self, rows, starts)
        outputs.logits.view(np.int32)[-1, -1] ^= 1
        return outputs, exact

    monkeypatch.setattr(Opened, "run", wrong)
    assert open_overlap_graph(ARTEFACT, bundled.model) is None


def test_changed_file_is_rejected(bundled: Opened, tmp_path: Path) -> None:
    """An overlap graph is read only from the file whose network was opened."""
    contract.write(ARTEFACT.read_bytes(), open_artefact(ARTEFACT)[1], tmp_path / "m.onnx", b"x")
    with pytest.raises(ArtefactRejected, match="the file changed while it was opened"):
        open_overlap_graph(tmp_path / "m.onnx", bundled.model)


def test_export_stores_overlap_graph_in_metadata() -> None:
    """The export stores the overlap graph as text in the metadata of the artefact."""
    text = onnx_model.read_metadata(ARTEFACT.read_bytes())[contract.OVERLAP_KEY]
    graph = onnx.load_model_from_string(base64.b64decode(text)).graph
    assert [contract.INPUT, contract.STARTS] == [value.name for value in graph.input]
    assert [contract.LOGITS, contract.RUL, contract.EXACT] == [value.name for value in graph.output]


def _counting(called: object, sizes: list[int]) -> object:
    def run(self: Opened, rows: onnx_model.Batch, starts: overlap_graph.WindowStarts) -> object:
        sizes.append(len(starts))
        return called(self, rows, starts)  # type: ignore[operator]  # the original method

    return run


def _scored(model: Path, windows: Readings, output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENGINE_HEALTH_MODEL", str(model))
    source, target = write(flights(windows), output.with_suffix(".csv")), output.with_suffix(".parquet")
    assert 0 == score(source, target)
    return target
