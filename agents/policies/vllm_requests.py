"""What a policy asks of vLLM for a prefix, and the sample that it makes of the answer.

Invariant: what is asked are the ids of the path and nothing else; the ids and log-probs of a sample are the answer's, one
log-prob for each id. A request's random stream depends on the seed and on its number (or on what is given instead) alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from agents.policies.chat import ChatCodec
from agents.policies.paths import NO_IDS, context_ids, path_ids
from agents.policies.sampling import Sampling
from allocation import Context, Sample

LOWEST_TEMPERATURE = 0.01
"""vLLM raises a lower one to this without saying so in its log-probs."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prefix that waits for an action.

    Attributes:
        ids: All token ids up to the action.
        shown: Those of them that were shown since the parent's action, int64 [c].
        params: vLLM's `SamplingParams`.
    """

    ids: list[int]
    shown: np.ndarray
    params: Any


class Requests:
    """Numbers and words the requests of one policy.

    Args:
        codec: Its chat codec.
        sampling: Its settings.
        max_length: Most tokens of a path and its action together.
        entropy: Give samples an entropy.

    Attributes:
        number: Requests made so far.
        computed: Tokens that the engine has computed for the answers: `prefill`, prompt tokens that were in no cache, and
            `decode`, sampled tokens that were fed back (all but the last of an action, which the next turn's prefill computes).
            What an engine short of memory drops and computes again is not in it.

    Raises:
        ValueError: vLLM has no such temperature.
    """

    def __init__(self, codec: ChatCodec, sampling: Sampling, max_length: int, *, entropy: bool):
        if 0 < sampling.temperature < LOWEST_TEMPERATURE:
            raise ValueError(
                f"vLLM samples at no temperature between 0 and {LOWEST_TEMPERATURE}, got {sampling.temperature}: take 0"
            )
        self.codec, self.sampling, self.entropy = codec, sampling, entropy
        limit = sampling.max_context
        self.max_length = max_length if limit is None else min(limit, max_length)
        self.number = 0
        self.computed = {"prefill": 0, "decode": 0}

    def ask(self, context: Context, stream: tuple[int, ...] | None = None) -> Request | Sample:
        """Returns the request for a prefix, or the sample that ends its rollout if there is no room for an action.

        Args:
            context: The prefix.
            stream: What the request's random stream depends on besides the seed; `None` for the request's number.

        Raises:
            ValueError: The environment gives no chat messages.
        """
        shown = context_ids(self.codec, context)
        ids = path_ids(context, shown)
        room = self.max_length - len(ids)
        if room < 1:
            note = (
                f"the {len(ids)} tokens of the episode leave no room for an action within {self.max_length} "
                "(max_context, or what the model and the engine's memory can take)"
            )
            return Sample("", NO_IDS, NO_IDS.astype(np.float32), shown, finish_reason="context", note=note)
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = self.sampling
        params = SamplingParams(
            max_tokens=min(sampling.max_new_tokens, room),
            temperature=sampling.temperature,
            top_p=sampling.top_p if sampling.temperature else 1.0,
            top_k=sampling.top_k if sampling.temperature else 0,
            seed=stream_seed(sampling.seed, *((self.number,) if stream is None else stream)),
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            stop_token_ids=sorted(self.codec.stop_ids),
            ignore_eos=True,  # only the codec's stop ids end an action, whatever the engine takes the end token for
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(sampling.stop),
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.number += 1
        return Request(ids.tolist(), shown, params)

    def answer(self, request: Request, output: Any, version: int) -> Sample:
        """Returns the sample that an answer makes.

        Args:
            request: What was asked.
            output: vLLM's finished `RequestOutput`.
            version: Updates that the weights had seen.

        Raises:
            RuntimeError: The engine computed other ids than it was given, or its log-probs are not those of the sampled ids.
        """
        if output.prompt_token_ids != request.ids:
            raise RuntimeError(
                f"vLLM computed {len(output.prompt_token_ids)} prompt tokens that are not the {len(request.ids)} it was given, "
                "so the log-probs would belong to another prefix: install the vLLM that the extra trace-envs[vllm] asks for"
            )
        (answer,) = output.outputs
        ids, found = list(answer.token_ids), answer.logprobs
        if [found.token_ids[start] for start in found.start_indices] != ids:
            raise RuntimeError(
                f"vLLM gave log-probs for other tokens than the {len(ids)} it sampled: install the vLLM that the extra "
                "trace-envs[vllm] asks for"
            )
        logprobs = np.array([found.logprobs[start] for start in found.start_indices], dtype=np.float32)
        prefilled = len(request.ids) - output.num_cached_tokens
        self.computed["prefill"] += prefilled
        self.computed["decode"] += len(ids) - 1
        return Sample(
            self.codec.text_of(ids),
            np.array(ids, dtype=np.int64),
            logprobs,
            request.shown,
            finish_reason="length" if answer.finish_reason == "length" else "stop",
            prefilled=prefilled,
            entropy=-float(logprobs.mean()) if self.entropy else None,
            version=version,
        )


def stream_seed(*numbers: int) -> int:
    """Returns the seed of a request's own random stream, below 2**63: another one for other numbers."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
