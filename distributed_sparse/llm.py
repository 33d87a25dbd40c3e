"""LLM: the Python API, as in vLLM: starts an engine and generates from prompts."""

from __future__ import annotations

import itertools
import logging
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from distributed_sparse.client.client import Client, EngineError, Service
from distributed_sparse.client.generation_defaults import default_sampling_params
from distributed_sparse.client.output_builder import OutputBuilder, block_arrays, refused_output
from distributed_sparse.client.prompts import Prompt, is_single_prompt, parse_prompt
from distributed_sparse.client.stream import Stream
from distributed_sparse.client.tokenizer import (
    apply_chat,
    doubled_bos,
    encode_prompt,
    find_chat_template,
    load_tokenizer,
    tokenizer_json,
)
from distributed_sparse.config import EngineConfig
from distributed_sparse.driver.detokenizer import Detokenizer
from distributed_sparse.driver.request_validation import validate_request
from distributed_sparse.model.checkpoint import absolute_path, resolve_checkpoint
from distributed_sparse.model.config import ModelConfig
from distributed_sparse.model.limits import resolve_eos_token_ids, resolve_max_model_len
from distributed_sparse.model.sharding import check_divisibility
from distributed_sparse.outputs import RequestOutput, ScoreOutput
from distributed_sparse.protocol.client import ModelInfo, NewRequest, RequestUpdate
from distributed_sparse.ranks.base import ShardFailure
from distributed_sparse.ranks.worker import ShardFactory
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.selection import layer_configs
from distributed_sparse.trace import parse_trace
from distributed_sparse.utils.process import on_usable_thread
from distributed_sparse.utils.progress import Progress
from distributed_sparse.utils.validation import check_int, check_keys, shown
from distributed_sparse.utils.vllm_names import CALL, drop_neutral

logger = logging.getLogger(__name__)


class LLM:
    """An engine with a loaded model. Use it in a `with` block or call `shutdown()`; garbage collection also shuts it down.

    In a forked child its methods raise RuntimeError, and `shutdown` does nothing.

    Args:
        model: local checkpoint folder or Hugging Face hub id.
        engine_args: the other fields of `EngineConfig`: tensor_parallel_size, sparse, max_model_len, ... Unsupported
            arguments of vLLM's LLM are accepted at values that change nothing.

    Raises:
        ValueError: a setting is invalid; the message names it, its value and the remedy.
        EngineError: a shard did not start; the message gives the reason.
    """

    _shard_factory: ShardFactory | None = None  # None: `Shard` itself

    def __init__(self, model: str, **engine_args: Any) -> None:
        self._open(EngineConfig.from_dict({"model": model, **engine_args}, "LLM"))

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLM:
        """Start the engine that `config` describes, for example one from `EngineConfig.from_yaml`."""
        llm = cls.__new__(cls)
        llm._open(config)
        return llm

    def _open(self, config: EngineConfig) -> None:
        path = resolve_checkpoint(config.model, config.load_format)
        model = ModelConfig.from_pretrained(path)
        check_divisibility(model, config.tensor_parallel_size)
        layer_configs(config.resolve_sparse(), model.num_hidden_layers, config.page_size)
        self.config, self.model_config = config, model
        self._checkpoint = path
        self._default_params: SamplingParams | None = None
        self.max_model_len = resolve_max_model_len(config.max_model_len, model)
        self.tokenizer = load_tokenizer(config.tokenizer or str(path))
        text = tokenizer_json(self.tokenizer) if self.tokenizer is not None else None
        self._detokenizer = Detokenizer(text) if text is not None else None
        self._warned_of_bos = False
        info = ModelInfo(
            vocab_size=model.vocab_size,
            num_layers=model.num_hidden_layers,
            num_kv_heads=model.num_key_value_heads,
            eos_token_ids=resolve_eos_token_ids(model, self.tokenizer),
            max_model_len=self.max_model_len,
            name=config.model,
        )
        try:
            self._client = Client(self._start_service(info, text))
        except ShardFailure as failure:
            raise EngineError(str(failure)) from failure
        self._request_prefix, self._request_numbers = uuid.uuid4().hex[:8], itertools.count()
        self._finalizer = weakref.finalize(self, self._client.close)
        for rank in self.stats()["ranks"] if logger.isEnabledFor(logging.INFO) else ():
            logger.info(
                "rank %d: node %s (%s), %s, KV heads %d to %d, %.2f GB of weights, %.2f GB of cache, %.2f GB of metadata",
                *(rank[name] for name in ("rank", "node_id", "hostname", "device")),
                *(rank["kv_heads"][0], rank["kv_heads"][1] - 1),
                *(rank[name] / 1e9 for name in ("weight_bytes", "cache_bytes", "metadata_bytes")),
            )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **vllm_args: Any,
    ) -> list[RequestOutput]:
        """Complete prompts in batches.

        Args:
            prompts: a str, list[int], `TextPrompt` or `TokensPrompt`, or a list of those. The tokenizer adds
                its special tokens to text.
            sampling_params: one for all, or one per prompt; None: `get_default_sampling_params`.
            use_tqdm: show progress on standard error: a bar on a terminal, elsewhere a line every 10 s.
            vllm_args: other arguments of vLLM's `generate`, at values that change nothing (`lora_request=None`).

        Returns:
            One output per prompt, in the same order. If a request of a list is rejected or fails, its output has `error` set
            and a completion with finish_reason "error"; the other requests continue.

        Raises:
            ValueError: a single prompt is rejected, `prompts` has the wrong type, or the number of sampling_params differs
                from the number of prompts.
            EngineError: the engine failed on a single prompt.
        """
        self._client.origin.check()
        check_keys(drop_neutral(vllm_args, CALL), ("prompts", "sampling_params", "use_tqdm"), "generate")
        single = is_single_prompt(prompts)
        given: list[Any] = [prompts] if single else list(cast(Any, prompts))
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        one_for_all = not isinstance(sampling_params, Sequence)
        params: list[Any] = [sampling_params] * len(given) if one_for_all else list(cast(Any, sampling_params))
        if len(params) != len(given):
            raise ValueError(f"{len(params)} sampling_params for {len(given)} prompts; give one for all, or one per prompt")
        outputs = self._run(given, params, use_tqdm)
        if single:
            outputs[0].raise_error()
        return [builder.output for builder in outputs]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template_args: Any,
    ) -> list[RequestOutput]:
        """Apply the tokenizer's chat template to conversations and `generate`. No second BOS is added.

        Args:
            messages: one conversation, or a list of them; a message is {"role": ..., "content": ...}.
            template_args: arguments of `apply_chat`: add_generation_prompt, continue_final_message, and the template's own
                variables, directly or in `chat_template_kwargs`.

        Returns:
            One output per conversation. The output of a malformed conversation in a list has `error` set; the others continue.

        Raises:
            ValueError: there is no tokenizer or template, an argument is invalid, or a single conversation is malformed.
        """
        self._client.origin.check()
        tokenizer = self._need_tokenizer("chat")
        template_args = drop_neutral(template_args, CALL)
        template_args |= template_args.pop("chat_template_kwargs", None) or {}
        find_chat_template(tokenizer, template_args)
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise ValueError(f"messages={shown(messages)} must be a list of {{'role': ..., 'content': ...}} or a list of those")
        if messages and not any(isinstance(conversation, (list, tuple)) for conversation in messages):
            return self.generate(apply_chat(tokenizer, cast(Any, messages), **template_args), sampling_params, use_tqdm)
        prompts: list[Any] = []
        for conversation in messages:
            try:
                prompts.append(apply_chat(tokenizer, cast(Any, conversation), **template_args))
            except ValueError as error:
                prompts.append(error)
        return self.generate(prompts, sampling_params, use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None) -> Stream:
        """Complete one prompt; iterate (`for` or `async for`) over outputs that grow with every token.

        Leaving the loop early or calling `Stream.close()` aborts the request.

        Raises:
            ValueError: the request is invalid.
        """
        self._client.origin.check()
        params = sampling_params if sampling_params is not None else self.get_default_sampling_params()
        request, builder = self._prepare(prompt, params, request_id)
        self._validate(request)
        return Stream(self, self._client, request, builder)

    def score(
        self,
        token_ids: Sequence[int] | Sequence[Sequence[int]],
        whole_vocabulary: bool = False,
        decode_last_prompt_tokens: int = 0,
        seed: int | None = None,
        trace_steps: Sequence[int] | None = None,
        use_tqdm: bool = False,
        first: int = 1,
    ) -> list[ScoreOutput]:
        """Return the log-probability of each given token after the tokens before it, without sampling.

        Args:
            token_ids: one sequence, or a list of sequences.
            whole_vocabulary: also return the log-probabilities of every token at every position.
            decode_last_prompt_tokens: number of last tokens that go through sparse decode one by one, not dense prefill.
            seed: seed of methods that sample tokens (random, vattention); None: derived at admission, as in `SamplingParams`.
            trace_steps: decode steps to trace with trace=True; None: all.
            first: index of the first token to score. Prefill chunks before it compute no logits, which saves most of the time
                and memory of scoring a long prompt with a large vocabulary.

        Raises:
            ValueError: a sequence is invalid.
            EngineError: the engine failed.
        """
        self._client.origin.check()
        sequences: list[Any] = [token_ids] if is_single_prompt(token_ids) else list(token_ids)
        for sequence in sequences:
            if not isinstance(sequence, Sequence) or isinstance(sequence, str | bytes | bytearray):
                raise ValueError(f"token_ids={shown(sequence)} must be a list of token ids, or a list of such lists")
        params = SamplingParams(
            max_tokens=1,
            prompt_logprobs=-1 if whole_vocabulary else 0,
            decode_last_prompt_tokens=decode_last_prompt_tokens,
            seed=seed,
            trace_steps=trace_steps,
        )
        check_int("first", first, 1, remedy="nothing predicts token 0")
        requests = [
            NewRequest(self._new_request_id(), list(sequence), params, score=True, first_scored=first) for sequence in sequences
        ]
        for request in requests:
            self._validate(request)
        scores = {request.request_id: ScoreOutput(request.prompt_token_ids, first) for request in requests}
        with Progress(total=len(requests), disable=not use_tqdm, desc="Scored prompts") as bar:
            for update in self._updates(requests):
                for block in update.prompt_logprobs:
                    _, logprobs, _ = block_arrays(block)
                    scores[update.request_id].add(block.position, logprobs, whole_vocabulary)
                for trace in update.traces:
                    scores[update.request_id].trace.append(parse_trace(trace.ranks))
                if update.finished:
                    bar.update()
                    if update.error is not None:
                        raise EngineError(update.error)
        return list(scores.values())

    def abort(self, request_id: str | Sequence[str]) -> None:
        """Abort requests by id. They keep their tokens and get finish_reason "abort". Unknown ids are ignored."""
        self._client.abort([request_id] if isinstance(request_id, str) else list(request_id))

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the default sampling parameters, from the checkpoint's generation_config.json.

        Raises:
            ValueError: generation_config.json is malformed.
        """
        if self._default_params is None:
            self._default_params = default_sampling_params(self._checkpoint)
        return self._default_params.clone()

    def get_tokenizer(self) -> Any:
        """Return the transformers tokenizer. Raises ValueError if the model has none."""
        return self._need_tokenizer("get_tokenizer")

    @property
    def client(self) -> Client:
        """The connection to the Driver, for callers that read raw updates."""
        return self._client

    def stats(self) -> dict[str, Any]:
        """Return the engine's counters: steps, requests, pages, ranks, attention (density, bytes read), all-reduce, times."""
        return self._client.stats()

    def health(self) -> bool:
        """Return True only if a step recently completed on every rank."""
        return self._client.health()

    def shutdown(self) -> None:
        """End all requests and processes of the engine. Idempotent."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _start_service(self, info: ModelInfo, tokenizer: str | None) -> Service:
        """Start the Driver: in this process for one rank, else in a Ray actor. Imports Ray only if it is used."""
        sparse = self.config.sparse
        if sparse is not None and isinstance(sparse.get("hash_weights"), str):
            sparse = sparse | {"hash_weights": absolute_path(sparse["hash_weights"])}
        config = replace(self.config, model=absolute_path(self.config.model), sparse=sparse)
        if config.uses_ray:
            from distributed_sparse.ray_backend.driver_actor import connect_driver

            return connect_driver(config, info, tokenizer, self._shard_factory)
        from distributed_sparse.driver.service import DriverService
        from distributed_sparse.ranks.in_process import InProcessGroup

        service = DriverService(config, info, tokenizer, InProcessGroup(config, self._shard_factory))
        on_usable_thread(service.start)
        return service

    def _run(self, prompts: list[Any], params: list[SamplingParams], use_tqdm: bool) -> list[OutputBuilder]:
        builders: dict[str, OutputBuilder] = {}
        requests = []
        for prompt, own_params in zip(prompts, params):
            try:
                request, builder = self._prepare(prompt, own_params, None)
                self._validate(request)
                requests.append(request)
            except Exception as error:  # the other prompts of the list continue
                what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                builder = refused_output(self._new_request_id(), prompt, what)
            builders[builder.output.request_id] = builder
        refused = len(prompts) - len(requests)
        with Progress(total=len(prompts), initial=refused, disable=not use_tqdm, desc="Prompts") as bar:
            tokens = 0
            for update in self._updates(requests):
                builders[update.request_id].add(update)
                tokens += sum(len(sample.token_ids) for sample in update.samples)
                if update.finished:
                    bar.set_postfix({"output tokens": tokens}, refresh=False)
                    bar.update()
        return list(builders.values())

    def _updates(self, requests: list[NewRequest]) -> Iterator[RequestUpdate]:
        """Submit requests and yield their updates until all have finished; leaving early aborts the unfinished ones."""
        if not requests:
            return
        updates = self._client.submit(requests)
        running = {request.request_id for request in requests}
        try:
            while running:
                update = updates.get()
                if update.finished:
                    running.discard(update.request_id)
                yield update
        finally:
            if running and self._client.origin.is_here:
                self.abort(list(running))

    def _new_request_id(self) -> str:
        """Return an id that does not collide with request ids of callers."""
        return f"{self._request_prefix}-{next(self._request_numbers)}"

    def _prepare(self, prompt: Any, params: SamplingParams, request_id: str | None) -> tuple[NewRequest, OutputBuilder]:
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params={shown(params)} must be a SamplingParams; write SamplingParams(max_tokens=16)")
        if isinstance(prompt, ValueError):  # a malformed conversation from `chat`
            raise prompt
        text, token_ids = parse_prompt(prompt)
        if token_ids is None:
            token_ids = encode_prompt(self._need_tokenizer("a text prompt"), cast(str, text))
            self._warn_of_doubled_bos(token_ids)
        params = params.clone()  # the caller may change theirs while the request runs
        if params.logprobs == -1:
            params.logprobs = self.model_config.vocab_size
        request_id = request_id or self._new_request_id()
        decode_token = self._detokenizer.decode_token if self._detokenizer is not None else None
        return NewRequest(request_id, token_ids, params), OutputBuilder(request_id, text, token_ids, params, decode_token)

    def _validate(self, request: NewRequest) -> None:
        validate_request(
            request.prompt_token_ids,
            request.params,
            vocab_size=self.model_config.vocab_size,
            max_model_len=self.max_model_len,
            max_num_seqs=self.config.max_num_seqs,
            has_tokenizer=self.tokenizer is not None,
            traces=self.config.trace,
            score=request.score,
        )

    def _warn_of_doubled_bos(self, token_ids: list[int]) -> None:
        if not self._warned_of_bos and (bos := doubled_bos(self._need_tokenizer("a text prompt"), token_ids)) is not None:
            self._warned_of_bos = True
            logger.warning(
                "a text prompt begins with %r, and the tokenizer adds another one; leave it out of the text, or give token ids "
                "(or messages to chat). Logged once per engine",
                bos,
            )

    def _need_tokenizer(self, what: str) -> Any:
        if self.tokenizer is None:
            raise ValueError(f"{what} needs a tokenizer, and {self.config.model!r} has none; give token ids, or tokenizer=")
        return self.tokenizer
