"""Language models in their roles: student, behavior snapshot, sampler, teacher."""

from opdlab.policies.adapters import AdapterConfig
from opdlab.policies.behavior import BehaviorConfig, BehaviorPolicy
from opdlab.policies.engines.engine_sampler import EngineSampler
from opdlab.policies.engines.server_sampler import VLLMServerSampler
from opdlab.policies.engines.vllm_sampler import VLLMSampler
from opdlab.policies.language_model import LanguageModel, Scored
from opdlab.policies.routed_teacher import RoutedTeacher
from opdlab.policies.sampler import (
    Sampler,
    Samples,
    SamplingConfig,
    register_sampler,
    sample_rollouts,
    sampler_registry,
)
from opdlab.policies.self_teacher import SelfTeacher
from opdlab.policies.served.teacher import ServedTeacher
from opdlab.policies.target_cache import TargetCache
from opdlab.policies.teacher import (
    BaseTeacher,
    LocalTeacher,
    NoTeacher,
    Teacher,
    TeacherHolder,
    check_targets,
    share_vocabulary,
)
from opdlab.policies.tokenizers import StopTokens, check_same_vocabulary, single_token_ids, warn_of_stop_tokens
from opdlab.policies.transformers_sampler import TransformersSampler
from opdlab.types import TeacherRequest

__all__ = [
    "AdapterConfig",
    "BaseTeacher",
    "BehaviorConfig",
    "BehaviorPolicy",
    "EngineSampler",
    "LanguageModel",
    "LocalTeacher",
    "NoTeacher",
    "RoutedTeacher",
    "Sampler",
    "Samples",
    "SamplingConfig",
    "Scored",
    "SelfTeacher",
    "ServedTeacher",
    "StopTokens",
    "TargetCache",
    "Teacher",
    "TeacherHolder",
    "TeacherRequest",
    "TransformersSampler",
    "VLLMSampler",
    "VLLMServerSampler",
    "check_same_vocabulary",
    "check_targets",
    "register_sampler",
    "sample_rollouts",
    "sampler_registry",
    "share_vocabulary",
    "single_token_ids",
    "warn_of_stop_tokens",
]
