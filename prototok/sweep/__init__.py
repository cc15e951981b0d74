"""Sweeps: the paper's experiments as resumable units of work, and the folder they leave behind.

A *unit* (`prototok.sweep.unit.Unit`) is the smallest thing that is fitted and recorded: one text
with one seed, or all rows that share a vector. Its key is a hash of its specification.

    RUN/
      run.json                      format version, and each planned experiment's settings
      plan.parquet                  one row an (experiment, unit): `schema.PLAN`
      texts.parquet                 the target texts, cut to the longest N asked for: `schema.TEXTS`
      tensors/<key>.safetensors     the vectors of a unit (`ProtoTokens` or `MemFit`), written first
      fits/<key>.parquet            the commit record: one row a (text, seed): `schema.FITS`
      failed/<key>.json             why a unit could not be done: `schema.FAILED`
      compacted/<experiment>.parquet  shards that `compact` merged, the same rows
      tmp/                          files that are being written

A unit is done when its shard is in `fits/` or its rows are in `compacted/`, and only then. The
folder is the only state: launchers keep nothing that they could not find out from it again.

Readers (`prototok.sweep.run_folder.RunFolder`):

    run = RunFolder.open("RUN")
    run.settings()         {experiment: its settings as planned}
    run.plan()             pyarrow.Table, `schema.PLAN`
    run.texts()            pyarrow.Table, `schema.TEXTS`
    run.fits("table3")     pyarrow.Table, `schema.FITS`, of the units that experiment asked for
    run.failures()         pyarrow.Table, `schema.FAILED`
    run.tensors(key)       ProtoTokens or MemFit; row i of the shard is its text i, seed 0
"""
