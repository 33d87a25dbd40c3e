"""transformers_peer: Hugging Face transformers with the engine's weights, as a peer to time and a reference to compare with."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from distributed_sparse.llm import LLM
from distributed_sparse.model.sharding import ShardSpec
from distributed_sparse.model.weights import EMBEDDING, LM_HEAD, LayerWeights, load_weights
from distributed_sparse.tools.bench.accuracy import WrongResult, check_close
from distributed_sparse.tools.bench.models import BenchModel
from distributed_sparse.tools.bench.synthetic import blocks, synthetic_kv

MAX_LOGIT_ERROR = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""RMS error of centred log-probabilities over their RMS, above which an engine is wrong."""

TIE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""Two tokens count as tied if their logits differ by less than this share of the logits' standard deviation."""

CHECKED_PROMPT, CHECKED_DECODED = 64, 8
"""Tokens of the prompt that checks an engine, and how many of its last ones go through decode."""


def transformers_model(model: BenchModel) -> PreTrainedModel:
    """The model in transformers with torch's SDPA and the weights that an engine of one rank would load."""
    config = AutoConfig.from_pretrained(model.path, dtype=model.dtype)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=model.dtype)
    weights = load_weights(model.path, model.config, ShardSpec(0, 1), model.dtype, model.device, model.load_format)
    state = {EMBEDDING: weights.embedding, "model.norm.weight": weights.norm, LM_HEAD: weights.lm_head}
    for number, layer in enumerate(weights.layers):
        state |= {f"model.layers.{number}.{name}": tensor for name, tensor in _of_layer(layer, model).items()}
    hf.load_state_dict(state, strict=True, assign=True)
    # the rotary frequencies are in no checkpoint and have no values on the meta device: compute them
    rotary = type(hf.model.rotary_emb)(config=config)
    hf.model.rotary_emb = rotary.to(model.device)
    return hf.eval()


def _of_layer(layer: LayerWeights, model: BenchModel) -> dict[str, Tensor]:
    """A layer's tensors by their names in a checkpoint, with the fused projections split."""
    config = model.config
    q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    found: dict[str, Tensor | None] = {
        "input_layernorm.weight": layer.input_norm,
        "post_attention_layernorm.weight": layer.post_attention_norm,
        "self_attn.o_proj.weight": layer.o,
        "self_attn.o_proj.bias": layer.o_bias,
        "self_attn.q_norm.weight": layer.q_norm,
        "self_attn.k_norm.weight": layer.k_norm,
        "mlp.down_proj.weight": layer.down,
        "mlp.down_proj.bias": layer.down_bias,
    }
    for kind, qkv, gate_up in (("weight", layer.qkv, layer.gate_up), ("bias", layer.qkv_bias, layer.gate_up_bias)):
        if qkv is not None:
            parts = qkv.split([q_size, kv_size, kv_size])
            found |= {f"self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", parts)}
        if gate_up is not None:
            found |= {f"mlp.{name}_proj.{kind}": part for name, part in zip(("gate", "up"), gate_up.chunk(2))}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


class Truth:
    """transformers' log-probabilities of one short sequence, the reference of engines before they are timed.

    Attributes:
        hf: the model, loaded on first use; `drop` frees its memory and keeps the log-probabilities.
    """

    def __init__(self, model: BenchModel) -> None:
        self._model = model
        self._hf: PreTrainedModel | None = None
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(3, model.config.vocab_size, (CHECKED_PROMPT,), generator=generator).tolist()
        with torch.inference_mode():
            logits = self.hf(torch.tensor([self.tokens], device=model.device)).logits
        self._expected = logits[0, :-1].double().log_softmax(-1).cpu()

    @property
    def hf(self) -> PreTrainedModel:
        if self._hf is None:
            self._hf = transformers_model(self._model)
        return self._hf

    def drop(self) -> None:
        self._hf = None
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def check(self, name: str, llm: LLM) -> None:
        """Compare an engine's log-probabilities of that sequence, whose last tokens go through the engine's decode.

        Raises:
            WrongResult: they differ.
        """
        [score] = llm.score(self.tokens, whole_vocabulary=True, decode_last_prompt_tokens=CHECKED_DECODED)
        assert score.logprobs is not None
        found, mean = torch.from_numpy(score.logprobs).double(), self._expected.mean()
        what = "transformers' log-probabilities"
        check_close(name, found - mean, self._expected - mean, MAX_LOGIT_ERROR[self._model.dtype], what)


class TransformersDecode:
    """Greedy decode of a batch over a cache filled with `synthetic_kv`, like the engine's by `SyntheticShard`.

    Args:
        hf: the model.
        last_tokens: last prompt token of each sequence; those before it are in the cache.
        prompt_len: tokens of each prompt.
        num_tokens: tokens that a round generates per sequence.
    """

    def __init__(self, hf: PreTrainedModel, last_tokens: list[int], prompt_len: int, num_tokens: int) -> None:
        config = hf.config
        self.hf = hf
        self.filled, self.num_tokens = prompt_len - 1, num_tokens
        self.start = torch.tensor(last_tokens, device=hf.device)[:, None]
        heads = config.num_key_value_heads
        d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        with torch.inference_mode():
            self.static: Any = StaticCache(config=config, max_cache_len=prompt_len + num_tokens)
            self.static.early_initialization(len(last_tokens), heads, d, hf.dtype, hf.device)
            layers: list[Any] = self.static.layers
            for number, layer in enumerate(layers):
                for head in range(heads):
                    for block, own, where in blocks(0, self.filled):
                        k, v = synthetic_kv(number, head, block, d, hf.device)
                        layer.keys[:, head, where] = k[own].to(hf.dtype)
                        layer.values[:, head, where] = v[own].to(hf.dtype)

    @torch.inference_mode()
    def round(self, kind: str) -> tuple[list[float], list[list[int]]]:
        """Decode one request per sequence, starting from the filled cache.

        Args:
            kind: "dynamic" or "static".

        Returns:
            When each step's tokens arrived (`time.monotonic`), and the tokens of each sequence.
        """
        cache, tokens = self._cache(kind), self.start
        arrivals: list[float] = []
        found: list[list[int]] = []
        for _ in range(self.num_tokens):
            logits = self.hf(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            found.append(tokens[:, 0].tolist())  # waits for the device, as a client would
            arrivals.append(time.monotonic())
        return arrivals, [list(of_sequence) for of_sequence in zip(*found)]

    def _cache(self, kind: str) -> Any:
        if kind == "static":
            for layer in self.static.layers:
                layer.cumulative_length.fill_(self.filled)
            return self.static
        cache: Any = DynamicCache(config=self.hf.config)
        for own, layer in zip(cache.layers, self.static.layers):
            own.lazy_initialization(layer.keys, layer.values)
            own.keys, own.values = layer.keys[:, :, : self.filled], layer.values[:, :, : self.filled]
        return cache

    @torch.inference_mode()
    def check_tokens(self, name: str, of_engine: list[list[int]]) -> None:
        """Compare a dense engine's greedy tokens over the same cache with transformers', up to the first tie.

        Raises:
            WrongResult: the tokens differ where transformers' best token is no tie.
        """
        cache, tokens = self._cache("static"), self.start
        open_rows = set(range(len(of_engine)))
        for step in range(min(self.num_tokens, *(len(own) for own in of_engine))):
            logits = self.hf(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
            tokens = logits.argmax(-1, keepdim=True)
            for row in sorted(open_rows):
                what = f"{name}: token {step + 1} of sequence {row}"
                if not check_token(what, of_engine[row][step], logits[row], self.hf.dtype):
                    open_rows.discard(row)  # contexts differ from here on
            if not open_rows:
                return


@torch.inference_mode()
def first_token(hf: PreTrainedModel, prompt: list[int]) -> tuple[float, Tensor]:
    """Seconds from a prompt to its first greedy token, and that token's logits [V]."""
    started = time.monotonic()
    ids = torch.tensor([prompt], device=hf.device)
    logits = hf(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0, -1]
    int(logits.argmax())  # waits for the device
    return time.monotonic() - started, logits.float()


def check_token(what: str, token: int, logits: Tensor, dtype: torch.dtype) -> bool:
    """Whether a greedy token is transformers' own by its logits [V]. A tied token is allowed, too.

    Raises:
        WrongResult: transformers' best token is no tie with this one.
    """
    best = int(logits.argmax())
    margin = float((logits[best] - logits[token]) / logits.std())
    if margin > TIE[dtype]:
        raise WrongResult(
            f"{what} is {token}, and transformers' is {best}, better by {margin:.2g} standard deviations of the logits"
        )
    return token == best
