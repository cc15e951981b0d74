"""Figures and pages made from results.

`prototok report RUN` reads a run folder (`results`), makes the tables and charts of each of the
paper's experiments (`experiments`, one a module) beside the paper's own numbers (`paper`),
checks the paper's findings on them (`findings`), and writes one HTML page (`page`) and files
beside it (`build`).
"""
