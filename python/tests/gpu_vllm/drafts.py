"""Speculative decoding without a draft model, for vLLM 0.26 in this process: drafts are tokens that another engine has chosen,
every fourth of them replaced by a wrong one; without such tokens, all are wrong.

Model runner V2 of 0.26 has no n-gram drafts. This takes their place.
"""

import re

import torch

#: Tokens by a prompt's number, and the length of the prompts.
known: dict[int, list[int]] = {}
prompt_length = 0


def install() -> None:
    """Once, before the engine is made."""
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

    class Drafts(BaseSpeculator):
        supports_mm_inputs = False
        draft_logits = None
        model = torch.nn.Module()

        def __init__(self, vllm_config, device):
            self.count, self.device = vllm_config.num_speculative_tokens, device
            self.rows = vllm_config.scheduler_config.max_num_seqs

        def init_cudagraph_manager(self, cudagraph_mode):
            pass

        def capture(self):
            pass

        def propose(self, input_batch, *args, num_rejected=None, dummy_run=False, **kwargs):
            rows = input_batch.num_reqs
            wrong = torch.zeros(rows, self.count, dtype=torch.int64, device=self.device)
            if dummy_run or not known:
                return wrong
            # By position: metadata, slots, two kinds of states, sampled, rejected.
            num_rejected = args[5] if num_rejected is None else num_rejected
            numbers = [int(re.search(r"-(\d{1,3})(?:-\w{8})?$", name)[1]) for name in input_batch.req_ids]
            choices = torch.tensor([known[number] for number in numbers]).to(self.device)
            newest = input_batch.seq_lens[:rows] - num_rejected - prompt_length
            places = newest[:, None] + torch.arange(1, self.count + 1, device=self.device)
            drafts = choices.gather(1, places.long().clamp(0, choices.shape[1] - 1))
            return torch.where(places % 4 == 3, wrong, drafts)

    model_runner.init_speculator = Drafts
    VllmConfig._get_v2_model_runner_unsupported_features = lambda self: []
