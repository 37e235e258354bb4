"""A policy that samples from any causal language model of transformers, keeping keys and values along the tree.

Invariant: each token of a forest is computed once (but for the last token of a prefix that is branched, which is fed again
to see what follows it); the ids in a `Sample` are the ids that were sampled.

How a turn goes: the distinct prefixes of the batch are assembled from stored segments, their new tokens are computed, rows
are repeated where several rollouts leave one prefix, and the batch is decoded token by token. A node's segment holds the
keys and values of its action and of what the environment answered; segments live until their tree is finished, or
until the weights change (`reset_cache`).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from agents.policies.attention_kinds import Attention, check_attention
from agents.policies.chat import ChatCodec
from agents.policies.drawing import StopStrings, draw
from agents.policies.paths import NO_IDS, context_ids, path_length, segment_ids
from agents.policies.ragged_cache import RaggedCache, similar
from agents.policies.sampling import Sampling
from agents.tokenizer_checks import check_tokenizer, model_stop_ids
from allocation import Context, Sample, Tree


class TransformersPolicy:
    """Samples actions from a causal language model.

    Args:
        model: A transformers causal language model; it is put into evaluation mode while sampling.
        tokenizer: Its tokenizer, with a chat template.
        max_new_tokens, temperature, top_p, top_k, stop, max_context, seed: See `Sampling`. Log-probs are those of the
            distribution that was sampled from.
        batch_tokens: Most positions (rows times longest path) of one batch of decoding.
        entropy: Give each sample the mean entropy of the distributions that its tokens were drawn from, in nats (at temperature
            0, of the model's own), for allocators that go by it (`Allocator.uses_entropy`). Costs one pass over the logits.
        compile: Compile the model's forward pass with `torch.compile`; the first turns take longer then.
        template_kwargs: Passed to the chat template, such as `{"enable_thinking": False}`.

    Attributes:
        version: Updates that the weights have seen.
        computed: Positions that went through the model so far: `prefill`, `decode` (sampled tokens that were fed back) and
            `padding` (places of a batch that held nothing).

    Raises:
        ValueError: A setting is out of range, the tokenizer and its template do not fit the model, or the model cannot compute
            rows of different lengths exactly (`check_attention`).
    """

    gives_features = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: Sequence[str] = (),
        max_context: int | None = None,
        seed: int = 0,
        batch_tokens: int = 12_288,
        entropy: bool = False,
        compile: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ):
        words = stop if isinstance(stop, str) else tuple(stop)
        self.sampling = Sampling(max_new_tokens, temperature, top_p, top_k, words, max_context, seed)  # type: ignore[arg-type]
        self.model, self.codec = model, ChatCodec(tokenizer, template_kwargs, model_stop_ids(model))
        check_tokenizer(model, tokenizer, self.codec)
        self.batch_tokens, self.entropy = batch_tokens, entropy
        longest = int(getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 30))
        self.max_length = longest if max_context is None else min(longest, max_context)
        self.version = 0
        self.computed = {"prefill": 0, "decode": 0, "padding": 0}
        self._stop = StopStrings(tokenizer, self.sampling.stop)
        self._attention = Attention.of(model)
        check_attention(model, self._attention)
        self._run = torch.compile(model, dynamic=True) if compile else model
        self.generator = torch.Generator(device=model.device).manual_seed(seed)
        self._num_layers = int(model.config.get_text_config().num_hidden_layers)
        self._segments: weakref.WeakKeyDictionary[Tree, dict[int, torch.Tensor]] = weakref.WeakKeyDictionary()
        self._pending: dict[int, tuple[weakref.ref[Tree], int, np.ndarray, torch.Tensor]] = {}
        self._hidden: torch.Tensor | None = None

    def _remember_hidden(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        self._hidden = args[0].detach()

    def reset_cache(self) -> None:
        """Forgets all keys and values; call it when the weights have changed."""
        self._segments.clear()
        self._pending.clear()

    def sync(self, model: Any, version: int) -> dict[str, float]:
        """Forgets what the old weights gave; the new ones are in the model already.

        Raises:
            ValueError: The model is not the one that this policy samples from.
        """
        if model is not self.model:
            raise ValueError(
                "this policy samples from the model that it was made with; make another policy for another model"
            )
        self.reset_cache()
        self.version = version
        return {}

    def sibling(self, *, seed: int, temperature: float | None = None) -> TransformersPolicy:
        """Returns a policy on the same model with a random stream, a cache and, if it is given, a temperature of its own."""
        other = copy.copy(self)
        given = self.sampling.temperature if temperature is None else temperature
        other.sampling = replace(self.sampling, seed=seed, temperature=given)
        other.generator = torch.Generator(device=self.model.device).manual_seed(seed)
        other.computed = dict.fromkeys(self.computed, 0)
        other._segments, other._pending = weakref.WeakKeyDictionary(), {}
        return other

    def state_dict(self) -> dict[str, Any]:
        """Returns what the next sample depends on besides the weights and the seed."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.generator.set_state(state["generator"])

    def close(self) -> None:
        """Frees all keys and values."""
        self.reset_cache()

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    @torch.inference_mode()
    def encode(self, contexts: Sequence[Context]) -> tuple[np.ndarray, int]:
        """Returns the last hidden state at the end of each context, float32 [n, d], and the number of tokens computed.

        What was computed is kept for `act`. A context longer than the model's length is not computed; its state is zero.
        """
        width = int(self.model.config.get_text_config().hidden_size)
        out, computed = np.zeros((len(contexts), width), np.float32), 0
        ids = [context_ids(self.codec, c) for c in contexts]
        lengths = [path_length(c) + len(i) for c, i in zip(contexts, ids, strict=True)]
        fitting = [i for i, length in enumerate(lengths) if length <= self.max_length]
        with self._evaluation_mode():
            for start in range(0, len(fitting), 64):
                chunk = fitting[start : start + 64]
                _, place, _, hidden, counts = self._prefill([contexts[i] for i in chunk], [ids[i] for i in chunk])
                out[chunk] = hidden.float().cpu().numpy()[place]
                computed += sum(counts)
        return out, computed

    @torch.inference_mode()
    def act(self, contexts: Sequence[Context]) -> list[Sample]:
        """Samples one action for each context."""
        self._free()
        ids = [context_ids(self.codec, c) for c in contexts]
        lengths = [path_length(c) + len(i) for c, i in zip(contexts, ids, strict=True)]
        samples: dict[int, Sample] = {}
        with self._evaluation_mode():
            for batch in self._batches(contexts, lengths):
                fitting = [i for i in batch if lengths[i] + 1 <= self.max_length]
                for i in batch:
                    if lengths[i] + 1 > self.max_length:
                        samples[i] = self._no_room(ids[i], lengths[i])
                if fitting:
                    acted = self._act([contexts[i] for i in fitting], [ids[i] for i in fitting])
                    samples |= dict(zip(fitting, acted, strict=True))
        return [samples[i] for i in range(len(contexts))]

    def _free(self) -> None:
        """Forgets the keys and values of trees that are finished."""
        for tree in [t for t in self._segments if t.finished]:
            del self._segments[tree]
        for slot, (left, *_) in list(self._pending.items()):
            if (pending := left()) is None or pending.finished:
                del self._pending[slot]

    def _no_room(self, shown: np.ndarray, length: int) -> Sample:
        note = (
            f"the {length} tokens of the episode leave no room for an action within {self.max_length} (max_context, or what "
            "the model can take)"
        )
        nothing = np.zeros(0, dtype=np.float32)
        return Sample("", NO_IDS, nothing, shown, finish_reason="context", version=self.version, note=note)

    def _batches(self, contexts: Sequence[Context], lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yields indices in groups of similar length: every row of a batch pays for its longest one at every token."""
        order = sorted(range(len(contexts)), key=lambda i: (lengths[i], contexts[i].tree.index, contexts[i].node.id))
        batch: list[int] = []
        for i in order:
            if batch and (len(batch) + 1) * (lengths[i] + self.sampling.max_new_tokens) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _act(self, contexts: Sequence[Context], ids: Sequence[np.ndarray]) -> list[Sample]:
        """Acts on one batch whose paths all fit into the model's length."""
        index: dict[tuple[int, int], int] = {}
        first: list[int] = []
        source: list[int] = []
        for i, context in enumerate(contexts):
            key = (id(context.tree), context.node.id)
            if key not in index:
                index[key] = len(first)
                first.append(i)
            source.append(index[key])
        cache, place, logits, hidden, prefilled = self._prefill([contexts[i] for i in first], [ids[i] for i in first])
        rows = [place[row] for row in source]
        if rows != list(range(len(first))):
            # Several rollouts leave one prefix: repeat its row.
            order = torch.tensor(rows, device=logits.device)
            cache.select(order)
            logits = logits[order]
        features = hidden.float().cpu().numpy()[place]
        samples = []
        for i, (tokens, logprobs, entropies) in enumerate(self._decode(cache, logits, contexts)):
            row = source[i]
            ended = tokens[-1] in self.codec.stop_ids or self._stop.hit(tokens)
            samples.append(
                Sample(
                    self.codec.text_of(tokens),
                    np.array(tokens, dtype=np.int64),
                    np.array(logprobs, dtype=np.float32),
                    ids[i],
                    features[row],
                    "stop" if ended else "length",
                    prefilled[row] if first[row] == i else 0,
                    float(np.mean(entropies)) if entropies else None,
                    self.version,
                )
            )
        return samples

    # Computation.

    def _forward(self, cache: RaggedCache, ids: torch.Tensor, keep: torch.Tensor | int) -> torch.Tensor:
        # The input of the output layer is the last hidden state, for every architecture. The hook is gone afterwards: the
        # learner's passes through the same model are not to be remembered, and the model may outlive this policy.
        hook = self.model.get_output_embeddings().register_forward_pre_hook(self._remember_hidden)
        try:
            return self._run(**self._attention.inputs(cache, ids), logits_to_keep=keep).logits
        finally:
            hook.remove()

    def _prefill(
        self, contexts: Sequence[Context], context_ids: Sequence[np.ndarray]
    ) -> tuple[RaggedCache, list[int], torch.Tensor, torch.Tensor, list[int]]:
        """Computes what is new on each path.

        Returns:
            The cache; the row of each context in it; by row, logits and hidden states at the end ([n, vocabulary], [n, d]); by
            context, the number of tokens computed.
        """
        known: list[list[torch.Tensor]] = []
        fresh: list[np.ndarray] = []
        for context, ids in zip(contexts, context_ids, strict=True):
            path = context.tree.path(context.node)
            stored = self._segments.setdefault(context.tree, {})
            at = next((i for i, node in enumerate(path) if node.id not in stored), len(path))
            segments = [stored[node.id] for node in path[:at]]
            todo = [segment_ids(n, ids if n is context.node else None) for n in path[at:]]
            if at == len(path):
                # Everything is known but what follows the last token: feed that one again.
                segments[-1] = segments[-1][:, :, :-1]
                todo = [ids[-1:]]
            elif at == len(path) - 1:
                action = self._pending_segment(context)
                if action is not None:
                    segments.append(action)
                    todo[0] = todo[0][action.shape[2] :]
            known.append(segments)
            fresh.append(np.concatenate(todo))
        device = self.model.device
        # Rows of similar length are computed together, so they stand together.
        order = sorted(range(len(fresh)), key=lambda i: -len(fresh[i]))
        known, fresh = [known[i] for i in order], [fresh[i] for i in order]
        lengths = torch.tensor([sum(s.shape[2] for s in k) for k in known], device=device)
        counts = [len(f) for f in fresh]
        room = int(lengths.max()) + counts[0] + self.sampling.max_new_tokens
        cache = RaggedCache(self._num_layers, lengths, room, self.max_length)
        for row, segments in enumerate(known):
            start = 0
            for segment in segments:
                cache.lay(row, start, segment)
                start += segment.shape[2]
        ends = [self._compute(cache.part(a, b), fresh[a:b]) for a, b in similar(counts)]
        logits, hidden = (torch.cat(parts) for parts in zip(*ends, strict=True))
        cache.lengths = cache.lengths + torch.tensor(counts, device=device)
        for row, i in enumerate(order):
            context, tokens = contexts[i], context_ids[i]
            stored = self._segments[context.tree]
            stop = int(cache.lengths[row])
            for node in reversed(context.tree.path(context.node)):
                start = stop - len(segment_ids(node, tokens if node is context.node else None))
                if node.id not in stored:
                    stored[node.id] = cache.cut(row, start, stop)
                stop = start
        place = [0] * len(order)
        for row, i in enumerate(order):
            place[i] = row
        return cache, place, logits, hidden, [counts[row] for row in place]

    def _compute(self, cache: RaggedCache, fresh: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes new tokens of some rows; returns the logits and hidden states at their ends."""
        counts, device = [len(f) for f in fresh], self.model.device
        inputs = torch.full((len(fresh), max(counts)), self.codec.end_id, device=device)
        for row, tokens in enumerate(fresh):
            inputs[row, : len(tokens)] = torch.from_numpy(tokens)
        self.computed["prefill"] += sum(counts)
        self.computed["padding"] += inputs.numel() - sum(counts)
        keep, where = torch.unique(torch.tensor([c - 1 for c in counts], device=device), return_inverse=True)
        logits = self._forward(cache, inputs, keep)[cache.rows, where]
        assert self._hidden is not None
        return logits, self._hidden[cache.rows, where]

    def _pending_segment(self, context: Context) -> torch.Tensor | None:
        """Returns the keys and values of the action that led to a node, if this policy has just sampled it."""
        if context.slot not in self._pending or context.node.sample is None:
            return None
        tree, parent, tokens, segment = self._pending[context.slot]
        same = tree() is context.tree and parent == context.node.parent
        return segment if same and np.array_equal(tokens, context.node.sample.action_ids) else None

    def _decode(
        self, cache: RaggedCache, logits: torch.Tensor, contexts: Sequence[Context]
    ) -> list[tuple[list[int], list[float], list[float]]]:
        """Samples until every row has ended; returns ids, log-probs and (where asked for) entropies for each."""
        n = len(contexts)
        tokens: list[list[int]] = [[] for _ in range(n)]
        logprobs: list[list[float]] = [[] for _ in range(n)]
        entropies: list[list[float]] = [[] for _ in range(n)]
        start = cache.lengths.tolist()
        alive = list(range(n))  # by row of the cache
        sampling, stop_ids = self.sampling, self.codec.stop_ids
        for count in range(1, sampling.max_new_tokens + 1):
            ids, lps, spread = draw(logits, sampling, self.generator, entropy=self.entropy)
            ended = []
            for row, (t, lp) in enumerate(zip(ids.tolist(), lps.tolist(), strict=True)):
                i = alive[row]
                tokens[i].append(t)
                logprobs[i].append(lp)
                if spread is not None:
                    entropies[i].append(spread[row])
                room = start[i] + count + 1 <= self.max_length
                if t in stop_ids or count == sampling.max_new_tokens or not room or self._stop.hit(tokens[i]):
                    # The last token was sampled but not fed, so its keys are not there yet.
                    segment = cache.cut(row, start[i], start[i] + count - 1)
                    context, said = contexts[i], np.array(tokens[i], dtype=np.int64)
                    self._pending[context.slot] = weakref.ref(context.tree), context.node.id, said, segment
                    ended.append(row)
            if ended:
                was = cache.drop(ended)
                alive = [alive[row] for row in was]
                ids = ids[torch.tensor(was, dtype=torch.int64, device=ids.device)]
            if not alive:
                break
            self.computed["decode"] += len(alive)
            logits = self._forward(cache, ids[:, None], 1)[:, -1]
            cache.lengths = cache.lengths + 1
        return list(zip(tokens, logprobs, entropies, strict=True))
