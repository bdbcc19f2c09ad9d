"""transformers' mixins on the four families: a tester that makes small configurations and inputs, and a class for each.

Collected by `make test-transformers` alone, which brings the mixins.
"""

import unittest
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers_tests.test_training_mixin import TrainingTesterMixin

HEADS = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


class Tester:
    """What the mixins ask for a model and its inputs, by the names that they use."""

    __test__ = False

    batch_size = 5
    seq_length = 7
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True
    pad_token_id = 0

    def __init__(self, family: str) -> None:
        self.family = family
        self.base_model_class = getattr(transformers, f"{family}Model")
        self.causal_lm_class = getattr(transformers, f"{family}ForCausalLM")
        self.sequence_classification_class = getattr(transformers, f"{family}ForSequenceClassification")

    def get_config(self) -> PreTrainedConfig:
        config_class = getattr(transformers, f"{self.family}Config")
        return config_class(
            vocab_size=99,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=128,
            pad_token_id=self.pad_token_id,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
        config = self.get_config()
        input_ids = ids_tensor([self.batch_size, self.seq_length], config.vocab_size)
        return config, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class OnFamily(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    family: str
    model_tester: Any = None

    def setUp(self) -> None:
        self.model_tester = Tester(self.family)
        kinds = ("Model", *HEADS)
        self.all_model_classes = tuple(getattr(transformers, f"{self.family}{kind}") for kind in kinds)


class TestLlama(OnFamily, unittest.TestCase):
    family = "Llama"


class TestMistral(OnFamily, unittest.TestCase):
    family = "Mistral"


class TestQwen2(OnFamily, unittest.TestCase):
    family = "Qwen2"


class TestQwen3(OnFamily, unittest.TestCase):
    family = "Qwen3"
