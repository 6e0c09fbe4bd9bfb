"""Configuration: frozen dataclasses, one per group, and their text form.

`fields` says what a field is made of, `model`, `data`, `optimizer`, `training`, `sampling` and
`experiment` hold the groups, `gin` knows the syntax of gin files, and `load` turns files and flags
into an `ExperimentConfig` and back.
"""

from pldr_jax.config.data import DataConfig as DataConfig
from pldr_jax.config.experiment import GROUPS as GROUPS
from pldr_jax.config.experiment import ExperimentConfig as ExperimentConfig
from pldr_jax.config.fields import SEED_LIMIT as SEED_LIMIT
from pldr_jax.config.fields import ConfigError as ConfigError
from pldr_jax.config.fields import UnavailableError as UnavailableError
from pldr_jax.config.fields import expand_home as expand_home
from pldr_jax.config.fields import group_name as group_name
from pldr_jax.config.lora import LoraConfig as LoraConfig
from pldr_jax.config.model import HOW_BEGUN as HOW_BEGUN
from pldr_jax.config.model import HOW_COMPUTED as HOW_COMPUTED
from pldr_jax.config.model import ModelConfig as ModelConfig
from pldr_jax.config.optimizer import OptimizerConfig as OptimizerConfig
from pldr_jax.config.sampling import GenerationConfig as GenerationConfig
from pldr_jax.config.sampling import SamplingConfig as SamplingConfig
from pldr_jax.config.task import TaskConfig as TaskConfig
from pldr_jax.config.training import CALIBRATION_ROWS as CALIBRATION_ROWS
from pldr_jax.config.training import CheckpointConfig as CheckpointConfig
from pldr_jax.config.training import LossConfig as LossConfig
from pldr_jax.config.training import MeshConfig as MeshConfig
from pldr_jax.config.training import ParameterGroup as ParameterGroup
from pldr_jax.config.training import TrainingConfig as TrainingConfig
