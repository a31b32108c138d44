"""The settings in groups, each a plain dataclass. `fedlora.setting` says what a declaration holds."""

from fedlora.groups.learning import AdapterConfig, DatasetConfig, ModelConfig, PartitionConfig, TrainConfig
from fedlora.groups.running import (
    CheckpointConfig,
    CompressionConfig,
    EngineConfig,
    EvaluateConfig,
    PrivacyConfig,
    ServerConfig,
)

__all__ = [
    "AdapterConfig", "CheckpointConfig", "CompressionConfig", "DatasetConfig", "EngineConfig", "EvaluateConfig", "ModelConfig",
    "PartitionConfig", "PrivacyConfig", "ServerConfig", "TrainConfig",
]  # fmt: skip
