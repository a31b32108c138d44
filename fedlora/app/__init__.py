"""An experiment from its settings to its results: the command's process, composition, runs, sweeps, records and reports."""
