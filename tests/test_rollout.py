"""A rollout trains on the ids that were sampled, and shows their text to rewards."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lightning_grpo.generation import Sampling, SamplingKey
from lightning_grpo.rollout import collect_rollout
from lightning_grpo.types import Completions, PromptBatch

VOCABULARY = {"<pad>": 0, "<eos>": 1, "h": 2, "e": 3, "l": 4, "o": 5, "he": 6, "ll": 7, "llo": 8}


class Scripted:
    """An engine that always says `he` and `llo`."""

    def generate(self, prompts, sampling, group_size, *, key, on_finished=None) -> Completions:
        num_rows = len(prompts) * group_size
        ids = torch.tensor([[6, 8, 1, 0]] * num_rows)
        mask = torch.tensor([[True, True, True, False]] * num_rows)
        return Completions(ids, mask, torch.zeros(ids.shape), torch.zeros(num_rows).bool())


def hello_tokenizer() -> PreTrainedTokenizerFast:
    merges = [("h", "e"), ("l", "l"), ("ll", "o"), ("he", "llo")]
    tokenizer = Tokenizer(models.BPE(VOCABULARY | {"hello": 9}, merges))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def test_sampled_ids_are_kept_where_their_text_would_be_tokenized_otherwise():
    tokenizer = hello_tokenizer()
    assert tokenizer("hello").input_ids == [9]
    chat = [{"role": "user", "content": "he"}]
    prompts = PromptBatch(["he", chat], [[6], [2, 3]], {"answer": ["a", "b"]}, [4, 7])
    rollout = collect_rollout(Scripted(), tokenizer, prompts, Sampling(), 2, key=SamplingKey(0, 0))
    assert rollout.completion_ids.tolist() == [[6, 8, 1, 0]] * 4
    message = [{"role": "assistant", "content": "hello"}]
    assert rollout.completions == ["hello", "hello", message, message]
    assert rollout.prompts == ["he", "he", chat, chat]
    assert rollout.columns == {"answer": ["a", "a", "b", "b"]}
    assert rollout.group_ids.tolist() == [4, 4, 7, 7]
    assert rollout.prompt_ids.tolist() == [[0, 6], [0, 6], [2, 3], [2, 3]]
    assert rollout.prompt_mask.tolist() == [[False, True]] * 2 + [[True, True]] * 2
    assert rollout.action_mask.tolist() == rollout.completion_mask.tolist()
