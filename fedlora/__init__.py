"""fedlora: federated LoRA fine-tuning, simulated at scale and run on real devices by the same code."""

import os
import time
import warnings

STARTED = time.perf_counter()  # as near to the start of the process as this package can know

# Nothing of a run is reported to anybody; must be set before flwr and ray are imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are the parallelism
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same bits from the same GPU
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray will do anyway, without its warning
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # between transformers and peft
