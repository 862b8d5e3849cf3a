"""Write all generated tables of the model card between their markers. The other text is written by hand.

    python docs/card.py             # the second half of `make evaluate`; takes 1 min on one core, needs C-MAPSS

Figures that need training (other seeds, anchors) are read from docs/study.json, which `make study` writes.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from tables import replaced

from model import model_card
from model.data import cmapss
from model.evaluation import robustness
from model.evaluation.evaluate import ARTEFACT, onnx_runner, open_artefact, predict_test_engines

CARD, STUDY = (Path(__file__).parent / name for name in ("model-card.md", "study.json"))


def build_tables() -> Iterator[tuple[str, Iterator[str]]]:
    """Yield the marker and the lines of each table."""
    folder, (session, manifest) = cmapss.data_folder(), open_artefact(ARTEFACT)
    predictions = predict_test_engines(onnx_runner(session), manifest.window or 1, folder)
    yield "results", model_card.results_table(predictions, manifest.temperature)
    yield "results-80-30", model_card.other_thresholds_table(ARTEFACT, manifest, folder)
    yield "coverage", model_card.coverage_table(predictions, manifest)
    yield "scalings", model_card.scalings_table(manifest)
    yield "telling", model_card.separability_table(predictions)
    yield "robustness", robustness.robustness_table(folder, session, manifest)
    yield "attribution", model_card.attribution_table(session, manifest, folder)
    for name, lines in json.loads(STUDY.read_text()).items():
        yield name, model_card.study_table(lines)


def main() -> None:
    """Write the tables into the card."""
    text = CARD.read_text()
    for name, lines in build_tables():
        text = replaced(text, name, lines)
        print(name, flush=True)
    CARD.write_text(text)


if __name__ == "__main__":
    main()
