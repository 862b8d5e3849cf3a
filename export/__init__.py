"""From a trained checkpoint to the artefact, and the proof that they answer alike."""
