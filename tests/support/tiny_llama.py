"""A Llama of Hugging Face's over the data of parallel_models: what people share inside a replica."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.parallel_models import WIDTH


class TinyLlama(LlamaForCausalLM):
    """A token is the largest of the inputs at its place; the ``first`` place of a part of a sequence may be given."""

    def forward(self, inputs: Tensor, first: int = 0) -> Tensor:
        tokens = inputs.argmax(-1)
        places = torch.arange(first, first + tokens.shape[1]).expand_as(tokens)
        logits: Tensor = super().forward(input_ids=tokens, position_ids=places, use_cache=False).logits
        return logits


def llama(**options: Any) -> TinyLlama:
    torch.manual_seed(9)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": WIDTH}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, **sizes)
    config._attn_implementation = "sdpa"
    return TinyLlama(config, **options)
