"""A policy that samples from any causal language model of transformers, keeping keys and values along the tree.

Invariant: each token of a forest is computed once (but for the last token of a prefix that is branched, which is fed again
to see what follows it); the ids in a `Sample` are the ids that were sampled.

How a turn goes: the distinct prefixes of the batch are assembled from stored segments, their new tokens are computed, rows
are repeated where several rollouts leave one prefix, and the batch is decoded token by token. A node's segment holds the
keys and values of its action and of what the environment answered; segments live until their tree is finished, or
until the weights change (`reset_cache`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from agents.policies.chat import ChatCodec, new_messages
from agents.policies.ragged_cache import RaggedCache
from allocation import Context, Sample, Tree

# Rows that have finished are dropped from the batch once they make up this share of it: dropping copies the cache.
COMPACT_SHARE = 0.4


class TransformersPolicy:
    """Samples actions from a causal language model.

    Args:
        model: A transformers causal language model; it is put into evaluation mode while sampling.
        tokenizer: Its tokenizer, with a chat template.
        max_new_tokens: Token limit of one action.
        temperature: 0 is greedy. Log-probs are those of the distribution that was sampled from.
        seed: Seeds the sampling.
        batch_tokens: Most positions (rows times longest path) of one batch of decoding.
        entropy: Give each sample the mean entropy of the distributions that its tokens were drawn from, in nats (at temperature
            0, of the model's own), for allocators that go by it (`Allocator.uses_entropy`). Costs one pass over the logits.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        seed: int = 0,
        batch_tokens: int = 12_288,
        entropy: bool = False,
    ):
        if temperature < 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.model, self.codec = model, ChatCodec(tokenizer)
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.batch_tokens, self.entropy = batch_tokens, entropy
        self.max_length = int(getattr(model.config, "max_position_embeddings", 1 << 30))
        self.generator = torch.Generator(device=model.device).manual_seed(seed)
        self._num_layers = int(model.config.num_hidden_layers)
        self._segments: weakref.WeakKeyDictionary[Tree, dict[int, torch.Tensor]] = weakref.WeakKeyDictionary()
        self._pending: dict[int, tuple[weakref.ref[Tree], int, np.ndarray, torch.Tensor]] = {}
        self._hidden: torch.Tensor | None = None

    def _remember_hidden(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        self._hidden = args[0].detach()

    def reset_cache(self) -> None:
        """Forgets all keys and values; call it when the weights have changed."""
        self._segments.clear()
        self._pending.clear()

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
        out, computed = np.zeros((len(contexts), int(self.model.config.hidden_size)), np.float32), 0
        ids = [self._context_ids(c) for c in contexts]
        lengths = [self._path_length(c) + len(i) for c, i in zip(contexts, ids, strict=True)]
        fitting = [i for i, length in enumerate(lengths) if length <= self.max_length]
        with self._evaluation_mode():
            for start in range(0, len(fitting), 64):
                chunk = fitting[start : start + 64]
                _, _, hidden, counts = self._prefill([contexts[i] for i in chunk], [ids[i] for i in chunk])
                out[chunk] = hidden.float().cpu().numpy()
                computed += sum(counts)
        return out, computed

    @torch.inference_mode()
    def act(self, contexts: Sequence[Context]) -> list[Sample]:
        """Samples one action for each context."""
        for tree in [t for t in self._segments if t.finished]:
            del self._segments[tree]
        ids = [self._context_ids(c) for c in contexts]
        lengths = [self._path_length(c) + len(i) for c, i in zip(contexts, ids, strict=True)]
        samples: dict[int, Sample] = {}
        with self._evaluation_mode():
            for batch in self._batches(contexts, lengths):
                fitting = [i for i in batch if lengths[i] + 1 <= self.max_length]
                for i in batch:
                    if i not in fitting:
                        nothing = np.zeros(0, dtype=np.int64)
                        samples[i] = Sample("", nothing, nothing.astype(np.float32), ids[i], None, "length")
                if fitting:
                    acted = self._act([contexts[i] for i in fitting], [ids[i] for i in fitting])
                    samples |= dict(zip(fitting, acted, strict=True))
        return [samples[i] for i in range(len(contexts))]

    def _batches(self, contexts: Sequence[Context], lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yields indices in groups of similar length: every row of a batch pays for its longest one at every token."""
        order = sorted(range(len(contexts)), key=lambda i: (lengths[i], contexts[i].tree.index, contexts[i].node.id))
        batch: list[int] = []
        for i in order:
            if batch and (len(batch) + 1) * (lengths[i] + self.max_new_tokens) > self.batch_tokens:
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
        cache, logits, hidden, prefilled = self._prefill([contexts[i] for i in first], [ids[i] for i in first])
        if len(first) < len(contexts):
            # Several rollouts leave one prefix: repeat its row.
            order = torch.tensor(source, device=logits.device)
            cache.select(order)
            logits = logits[order]
        features = hidden.float().cpu().numpy()
        samples = []
        for i, (tokens, logprobs, entropies) in enumerate(self._decode(cache, logits, contexts)):
            row = source[i]
            ended = tokens[-1] == self.codec.end_id
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
                )
            )
        return samples

    # Tokens.

    def _context_ids(self, context: Context) -> np.ndarray:
        """Returns the ids shown at a node since the action that led to it."""
        node = context.node
        if node.context_ids is not None:
            return node.context_ids
        messages = context.info.get("messages")
        if messages is None:
            raise ValueError("this policy needs environments that give info['messages'] (OpenAI-style chat messages)")
        if node.parent is None:
            return self.codec.prompt_ids(messages, context.info.get("tools"))
        assert node.sample is not None
        action = node.sample.action_ids
        ended = len(action) > 0 and int(action[-1]) == self.codec.end_id
        return self.codec.delta_ids(new_messages(messages), ended=ended)

    @staticmethod
    def _path_length(context: Context) -> int:
        """Returns the tokens on the path up to the node's action; its own context ids come on top."""
        path = context.tree.path(context.node)
        return sum(len(n.sample.action_ids) for n in path if n.sample is not None) + sum(
            len(n.context_ids) for n in path[:-1] if n.context_ids is not None
        )

    # Computation.

    def _forward(self, cache: RaggedCache, ids: torch.Tensor, keep: torch.Tensor | int) -> torch.Tensor:
        mask, position = cache.prepare(ids.shape[1])
        # The input of the output layer is the last hidden state, for every architecture. The hook is gone afterwards: the
        # learner's passes through the same model are not to be remembered, and the model may outlive this policy.
        hook = self.model.get_output_embeddings().register_forward_pre_hook(self._remember_hidden)
        try:
            return self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
            ).logits
        finally:
            hook.remove()

    def _prefill(
        self, contexts: Sequence[Context], context_ids: Sequence[np.ndarray]
    ) -> tuple[RaggedCache, torch.Tensor, torch.Tensor, list[int]]:
        """Computes what is new on each path.

        Returns:
            The cache, the logits and hidden states at the end of each row ([n, vocabulary], [n, d]), and the number of tokens
            computed for each row.
        """
        known: list[list[torch.Tensor]] = []
        fresh: list[np.ndarray] = []
        for context, ids in zip(contexts, context_ids, strict=True):
            path = context.tree.path(context.node)
            stored = self._segments.setdefault(context.tree, {})
            at = next((i for i, node in enumerate(path) if node.id not in stored), len(path))
            segments = [stored[node.id] for node in path[:at]]
            todo = [_tokens_of(n, ids if n is context.node else None) for n in path[at:]]
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
        lengths = torch.tensor([sum(s.shape[2] for s in k) for k in known], device=device)
        counts = [len(f) for f in fresh]
        longest = max(counts)
        room = int(lengths.max()) + longest + self.max_new_tokens
        cache = RaggedCache(self._num_layers, lengths, room, self.max_length)
        for row, segments in enumerate(known):
            start = 0
            for segment in segments:
                cache.lay(row, start, segment)
                start += segment.shape[2]
        inputs = torch.full((len(fresh), longest), self.codec.end_id, device=device)
        for row, tokens in enumerate(fresh):
            inputs[row, : len(tokens)] = torch.from_numpy(tokens)
        last = torch.tensor([c - 1 for c in counts], device=device)
        keep, where = torch.unique(last, return_inverse=True)
        logits = self._forward(cache, inputs, keep)[cache.rows, where]
        assert self._hidden is not None
        hidden = self._hidden[cache.rows, where]
        cache.lengths = cache.lengths + torch.tensor(counts, device=device)
        for row, (context, tokens) in enumerate(zip(contexts, context_ids, strict=True)):
            stored = self._segments[context.tree]
            stop = int(cache.lengths[row])
            for node in reversed(context.tree.path(context.node)):
                start = stop - len(_tokens_of(node, tokens if node is context.node else None))
                if node.id not in stored:
                    stored[node.id] = cache.cut(row, start, stop)
                stop = start
        return cache, logits, hidden, counts

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
        alive = list(range(n))
        in_batch = list(range(n))
        for count in range(1, self.max_new_tokens + 1):
            ids, lps, spread = self._sample(logits)
            still = []
            for row, (t, lp) in enumerate(zip(ids.tolist(), lps.tolist(), strict=True)):
                i = in_batch[row]
                if i < 0:
                    continue
                tokens[i].append(t)
                logprobs[i].append(lp)
                if spread is not None:
                    entropies[i].append(spread[row])
                room = start[i] + count + 1 <= self.max_length
                if t == self.codec.end_id or count == self.max_new_tokens or not room:
                    context = contexts[i]
                    # The last token was sampled but not fed, so its keys are not there yet.
                    segment = cache.cut(row, start[i], start[i] + count - 1)
                    self._pending[context.slot] = (
                        weakref.ref(context.tree),
                        context.node.id,
                        np.array(tokens[i], dtype=np.int64),
                        segment,
                    )
                    in_batch[row] = -1
                else:
                    still.append(row)
            alive = still
            if not alive:
                break
            if len(alive) < (1 - COMPACT_SHARE) * len(in_batch):
                rows = torch.tensor(alive, device=ids.device)
                cache.select(rows)
                ids = ids[rows]
                in_batch = [in_batch[r] for r in alive]
            logits = self._forward(cache, ids[:, None], 1)[:, -1]
            cache.lengths = cache.lengths + 1
        return list(zip(tokens, logprobs, entropies, strict=True))

    def _sample(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[float] | None]:
        """Draws one token a row; returns ids and log-probs, each [rows], and the rows' entropies where they are asked for."""
        scaled = logits.float() / (self.temperature or 1.0)
        logprobs = torch.log_softmax(scaled, -1)
        if self.temperature == 0:
            ids = logprobs.argmax(-1)
        else:
            # Inverse transform: one uniform number a row, where torch.multinomial draws one for each entry of the vocabulary.
            cumulative = logprobs.exp().cumsum(-1)
            drawn = torch.rand(len(logits), 1, generator=self.generator, device=logits.device) * cumulative[:, -1:]
            ids = (cumulative <= drawn).sum(-1).clamp(max=logits.shape[-1] - 1)
        entropies = torch.special.entr(logprobs.exp()).sum(-1).tolist() if self.entropy else None
        return ids, logprobs.gather(-1, ids[:, None])[:, 0], entropies


def _tokens_of(node: Any, context_ids: np.ndarray | None) -> np.ndarray:
    """Returns the ids of a node's segment: its action, then what the environment answered."""
    action = node.sample.action_ids if node.sample is not None else np.zeros(0, dtype=np.int64)
    context = node.context_ids if context_ids is None else context_ids
    return np.concatenate([action, context])
