"""Export trained checkpoints and foreign classifiers to artefacts, and verify them."""
