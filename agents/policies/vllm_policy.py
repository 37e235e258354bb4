"""A policy that samples with vLLM in this process, for the lock-step driver.

Invariant: prompts are the token ids that lie on the tree, never text; every sample says which weights made it. vLLM's prefix
cache holds the keys and values: a turn computes what is new on its path, and what did not fill a block before.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from agents.policies.chat import ChatCodec
from agents.policies.engine_config import EngineConfig
from agents.policies.sampling import Sampling
from agents.policies.vllm_engine import VLLMEngine
from agents.policies.vllm_requests import Request, Requests
from allocation import Context, Sample

PROBE_SAMPLES, PROBE_TOKENS = 8, 2048
"""How many samples of the last batch, and of how many tokens, say how far new weights have moved the engine."""


class VLLMPolicy:
    """Samples actions from a causal language model that vLLM loads.

    Args:
        model: A local folder in transformers' format, or a hub id.
        tokenizer: Its tokenizer, with a chat template.
        max_new_tokens, temperature, top_p, top_k, stop, max_context, seed: See `Sampling`. Log-probs are those of the
            distribution that was sampled from.
        engine: Settings of the engine.
        template_kwargs: Passed to the chat template, such as `{"enable_thinking": False}`.
        entropy: Give each sample an entropy, in nats: minus the mean log-prob of its tokens. That is an estimate from one draw,
            right on average; vLLM does not give the distributions themselves.

    Attributes:
        engine: The engine, shared with siblings.
        computed: Tokens computed so far by kind; see `Requests`.

    Raises:
        ImportError: vLLM is not installed.
        FileNotFoundError: The model's folder is not there.
        ValueError: A setting is out of range, or vLLM refuses the model or the settings.
        RuntimeError: The process holds a vLLM engine already.
    """

    gives_features = False

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: Sequence[str] = (),
        max_context: int | None = None,
        seed: int = 0,
        engine: EngineConfig | None = None,
        template_kwargs: dict[str, Any] | None = None,
        entropy: bool = False,
    ):
        words = stop if isinstance(stop, str) else tuple(stop)
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, words, max_context, seed)  # type: ignore[arg-type]
        ChatCodec(tokenizer, template_kwargs)  # refuses a tokenizer before the engine takes its time to start
        self.engine = VLLMEngine(model, engine or EngineConfig(), tokenizer if sampling.stop else None)
        self.codec = ChatCodec(tokenizer, template_kwargs, stop_ids=self.engine.stop_ids)
        self._requests = Requests(self.codec, sampling, self.engine.max_length, entropy=entropy)
        self._probe: list[tuple[list[int], int]] = []

    @property
    def version(self) -> int:
        """Updates that the engine's weights have seen."""
        return self.engine.version

    @version.setter
    def version(self, value: int) -> None:
        self.engine.version = value

    @property
    def sampling(self) -> Sampling:
        """How actions are sampled."""
        return self._requests.sampling

    @property
    def max_length(self) -> int:
        """Most tokens of an episode."""
        return self._requests.max_length

    @property
    def computed(self) -> dict[str, int]:
        """Tokens computed so far: `prefill` and `decode`."""
        return self._requests.computed

    def act(self, contexts: Sequence[Context]) -> list[Sample]:
        """Samples one action for each context.

        Raises:
            ValueError: An environment gives no chat messages.
            RuntimeError: The policy is closed, or vLLM did not compute the ids that it was given.
        """
        asked = [self._requests.ask(context) for context in contexts]
        requests = [a for a in asked if isinstance(a, Request)]
        outputs = iter(self.engine.generate([r.ids for r in requests], [r.params for r in requests]))
        samples = [
            self._requests.answer(a, next(outputs), self.version) if isinstance(a, Request) else a for a in asked
        ]
        self._remember(requests, [s for a, s in zip(asked, samples, strict=True) if isinstance(a, Request)])
        return samples

    def _remember(self, requests: Sequence[Request], samples: Sequence[Sample]) -> None:
        """Keeps a few of the batch's sequences, the shortest first, to be scored again when the weights change."""
        probe: list[tuple[list[int], int]] = []
        for request, sample in sorted(zip(requests, samples, strict=True), key=lambda pair: len(pair[0].ids)):
            ids = [*request.ids, *sample.action_ids.tolist()][: self.engine.max_length - 1]
            if probe and (len(probe) == PROBE_SAMPLES or sum(len(i) for i, _ in probe) + len(ids) > PROBE_TOKENS):
                break
            if len(ids) > max(1, len(request.ids)):
                probe.append((ids, len(request.ids)))
        self._probe = probe or self._probe

    def reset_cache(self) -> None:
        """Forgets all keys and values; `sync` does."""
        self.engine.reset_cache()

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Returns the log-prob that the engine gives to each token; see `VLLMEngine.score`."""
        return self.engine.score(sequences)

    def encode(self, contexts: Sequence[Context]) -> NoReturn:
        """Is not possible: vLLM gives no hidden states.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "vLLM gives no hidden states of prefixes: predict success from their text (--predictor text)"
        )

    def sync(self, model: Any, version: int) -> dict[str, float]:
        """Takes over the learner's weights, adapters merged, and forgets the keys and values that the old ones gave.

        Returns:
            `engine/moved`: mean change of the log-probs (at temperature 1) of a few tokens sampled last, in nats; not there
            before anything was sampled. `time/sync`: seconds.
        """
        start = time.perf_counter()
        before = self._probe_logprobs()
        self.engine.load(model, version)
        figures = {}
        if len(before):
            figures["engine/moved"] = float(np.abs(self._probe_logprobs() - before).mean())
            self.engine.reset_cache()  # so that nothing counts as cached that no sample was charged for
        return figures | {"time/sync": time.perf_counter() - start}

    def _probe_logprobs(self) -> np.ndarray:
        scores = self.engine.score([ids for ids, _ in self._probe])
        return np.concatenate([[], *(s[prefix - 1 :] for s, (_, prefix) in zip(scores, self._probe, strict=True))])

    def sibling(self, *, seed: int, temperature: float | None = None) -> VLLMPolicy:
        """Returns a policy on the same engine with a random stream, a count and, if it is given, a temperature of its own."""
        other = copy.copy(self)
        sampling = replace(
            self.sampling, seed=seed, temperature=self.sampling.temperature if temperature is None else temperature
        )
        other._requests = Requests(self.codec, sampling, self.engine.max_length, entropy=self._requests.entropy)
        other._probe = []
        return other

    def state_dict(self) -> dict[str, Any]:
        """Returns what the next sample depends on besides the weights and the seed."""
        return {"requests": self._requests.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._requests.number = int(state["requests"])

    def close(self) -> None:
        """Ends the engine and frees its memory; its siblings end with it."""
        self.engine.close()
