"""`python -m training sae COMMAND`: the commands of the lens. Each is a module, imported only when it runs."""

from __future__ import annotations

COMMANDS = {
    "collect": ("training.interpretability.runs.collect", "write the activations of an attention layer as a run"),
    "train": ("training.interpretability.runs.train_run", "train the sparse autoencoders of a run"),
    "study": ("training.interpretability.study.study_run", "measure what the features of a run are worth"),
    "explore": (
        "training.interpretability.explorer.explore",
        "write a page of the features of a run and of its alerts",
    ),
    "export": ("training.interpretability.export_lens", "write the lens of a run, for the service and `explain`"),
    "induction": (
        "training.interpretability.known_answers.induction",
        "measure whether autoencoders find the induction features of a small transformer",
    ),
    "recover": (
        "training.interpretability.known_answers.planted",
        "measure whether autoencoders recover a known dictionary",
    ),
}
"""Each command's module and purpose. The module defines `add_arguments(parser)` and `run(arguments)`."""
