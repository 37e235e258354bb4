"""A policy that samples with vLLM branch by branch, for `AsyncRunner`: what waits is batched with what is under way.

Invariant: as for `VLLMPolicy`, prompts are the ids on the tree and samples say which weights made them; and a sample depends on
the seed, the rollout's own seed and the turn, never on the order in which branches ask (where a batch's other members do not
change the rounding, as they may on a GPU).

The engine (vLLM's `AsyncLLM`) runs in a process of its own, its client on an event loop in a thread of the policy's own, so
that runs may come and go, each with its own loop. The process is started as a new Python: a script that makes such a policy
needs `if __name__ == "__main__":` around what it does.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

from agents.models import load_model
from agents.policies.chat import ChatCodec
from agents.policies.engine_config import EngineConfig
from agents.policies.loop_thread import LoopThread
from agents.policies.sampling import Sampling
from agents.policies.vllm_engine import check_fits, model_stop_ids, starting
from agents.policies.vllm_requests import Request, Requests
from agents.policies.weight_sync import write_weights
from allocation import Context, Sample

FIRST_VERSION = "0"


class AsyncVLLMPolicy:
    """Samples actions from a causal language model that vLLM loads, for each branch as soon as it asks.

    A task that is cancelled while it waits takes its request out of the engine.

    Args:
        model: A local folder in transformers' format, or a hub id.
        tokenizer: Its tokenizer, with a chat template.
        max_new_tokens, temperature, top_p, top_k, stop, max_context, seed: See `Sampling`. Log-probs are those of the
            distribution that was sampled from.
        engine: Settings of the engine; new weights always come by a file.
        template_kwargs: Passed to the chat template, such as `{"enable_thinking": False}`.
        entropy: Give each sample an entropy; see `VLLMPolicy`.

    Attributes:
        codec: The chat codec.
        version: Updates that the engine's weights have seen.

    Raises:
        ImportError: vLLM is not installed.
        FileNotFoundError: The model's folder is not there.
        ValueError: A setting is out of range, or vLLM refuses the model or the settings.
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
        self.version = int(FIRST_VERSION)
        self._numbers = itertools.count()
        self._thread = LoopThread("vllm policy")
        self._syncing = asyncio.Lock()
        try:
            with starting(model, engine or EngineConfig(), tokenizer if sampling.stop else None) as arguments:
                # The process must not be a copy of this one, whose threads would be missing in it.
                os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
                os.environ.setdefault("PYTHONWARNINGS", "ignore")  # those of its imports say nothing to users
                self._engine = self._thread.wait(_start(arguments))
        except BaseException:
            self._thread.close()
            raise
        self._end = weakref.finalize(self, _end, self._engine, self._thread)
        model_config = self._engine.model_config
        self.codec = ChatCodec(tokenizer, template_kwargs, stop_ids=model_stop_ids(model_config))
        self._requests = Requests(self.codec, sampling, int(model_config.max_model_len), entropy=entropy)

    @property
    def sampling(self) -> Sampling:
        """How actions are sampled."""
        return self._requests.sampling

    @property
    def max_length(self) -> int:
        """Most tokens of an episode."""
        return self._requests.max_length

    async def act(self, context: Context) -> Sample:
        """Samples an action; may be awaited in any event loop.

        Raises:
            ValueError: The environment gives no chat messages.
            RuntimeError: The policy is closed, its engine has died, or vLLM did not compute the ids that it was given.
        """
        return await self._thread.run(self._act(context))

    async def sync(self, model: Any, version: int) -> dict[str, float]:
        """Takes over weights, adapters merged, and forgets the keys and values that the old ones gave.

        Actions under way are finished with the old weights first; those asked for meanwhile wait for the new ones. What has
        begun is brought to its end even if whoever awaits it is cancelled.

        Args:
            model: The learner's model, which must not change meanwhile, or the folder of a model or checkpoint.
            version: Updates that the weights have seen.

        Returns:
            `time/sync`: seconds.

        Raises:
            ValueError: The weights are of a model of another kind or size.
            RuntimeError: The policy is closed or its engine has died.
        """
        start = time.perf_counter()
        await self._thread.run(self._sync(model, version))
        return {"time/sync": time.perf_counter() - start}

    def close(self) -> None:
        """Ends the engine's process and what is under way; may be called twice."""
        self._end()

    # All that follows runs on the policy's own loop.

    async def _act(self, context: Context) -> Sample:
        stream = None if context.seed is None else (context.seed, context.node.depth)
        asked = self._requests.ask(context, stream)
        if isinstance(asked, Sample):
            return asked
        with _death_explained():
            output = await self._answer(asked)
        return self._requests.answer(asked, output, _version(output))

    async def _answer(self, request: Request) -> Any:
        prompt, number = {"prompt_token_ids": request.ids}, str(next(self._numbers))
        async with aclosing(self._engine.generate(prompt, request.params, number)) as outputs:
            return await anext(outputs)  # it gives the finished answer only

    async def _sync(self, model: Any, version: int) -> None:
        # The engine must not be left between two versions, or with weights under another's name.
        await asyncio.shield(asyncio.create_task(self._replace_weights(model, version)))

    async def _replace_weights(self, model: Any, version: int) -> None:
        engine = self._engine
        with tempfile.TemporaryDirectory() as folder, _death_explained():
            async with self._syncing:
                path = await asyncio.to_thread(self._write, model, Path(folder))
                try:
                    await engine.pause_generation(mode="wait", clear_cache=True)
                    await engine.collective_rpc("receive_file", args=(str(path),))
                    await engine.update_weight_version(str(version))
                    self.version = version
                finally:
                    if not engine.errored:
                        await engine.resume_generation()

    def _write(self, model: Any, folder: Path) -> Path:
        """Writes weights as the engine reads them, if they fit."""
        if isinstance(model, str | Path):
            model, _ = load_model(str(model))
        check_fits(self._engine.model_config, model)
        return write_weights(model, folder)


async def _start(arguments: dict[str, Any]) -> Any:
    """Returns an `AsyncLLM` whose client belongs to the running loop."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments, disable_log_stats=True))
    try:
        await engine.update_weight_version(FIRST_VERSION)
        # Some models are refused by a kernel only once it runs; and what compiles itself then is compiled now.
        params = SamplingParams(max_tokens=2, seed=0, logprobs=0, detokenize=False)
        async for _ in engine.generate({"prompt_token_ids": [0]}, params, "first"):
            pass
    except BaseException:
        engine.shutdown()
        raise
    return engine


def _end(engine: Any, thread: LoopThread) -> None:
    """Ends an engine and the loop of its client, from any thread."""
    handler = engine.output_handler
    handler.get_loop().call_soon_threadsafe(handler.cancel)  # else it takes what comes next for an accident
    engine.shutdown()
    # It is called again when the engine is deleted, maybe by an interpreter that is ending.
    engine.shutdown = lambda: None
    thread.close()


def _version(output: Any) -> int:
    """Returns the version of the weights that an action was sampled with, as the engine says.

    One that was thrown out for want of memory, and goes on after an update, counts as the oldest of its tokens.
    """
    (answer,) = output.outputs
    return min(int(span.version) for span in answer.weight_versions)


@contextmanager
def _death_explained() -> Iterator[None]:
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise RuntimeError(
            "vLLM's engine process has died (if it said why, that is above): close() this policy and make another one"
        ) from error
