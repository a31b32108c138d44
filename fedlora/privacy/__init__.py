"""What privacy costs: accounting, calibration, and the ledger of a run. Nothing here trains or sends anything."""
