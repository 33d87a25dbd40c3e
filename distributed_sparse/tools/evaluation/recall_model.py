"""recall_model: writes the recall checkpoint, a small Llama whose weights are constructed, not trained.

It recalls, from anywhere in its context, the symbol that followed an earlier mention of the current symbol:

- Layer 0, attention: every head attends one position back and copies its share of the previous token's codeword.
- Layer 1, MLP: a symbol after a symbol is a *fact*; only there the previous token's codeword is kept.
- Layer 2, attention: the query is the current symbol's codeword, the keys are the facts' codewords, the values are the
  tokens' own codewords. Heads of another class than the symbol's, and symbols without a fact, attend to BOS, whose value is 0.
- Layer 3, attention: the same with the result of layer 2 as query, if the question was ``<ask-twice>``.
- Layer 3, MLP: passes the result of layer 2 on, unless the question was ``<ask-twice>``.
- The output matrix compares the answer with every symbol's codeword; an empty answer gives EOS.

Position: layer 0 uses the fast rotary pairs, layers 2 and 3 the slow ones, which barely rotate within 32K tokens.
A wrong head mapping, a missing head or swapped shards change the answers, because each KV head serves two classes of symbols,
one for each of its query heads; the two halves of an answer, neither of which identifies the symbol, come from different KV
heads; and keys and values have a different layout in every head.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from distributed_sparse.tools.evaluation.recall_vocabulary import (
    ASK_TWICE,
    BOS,
    CLASS_BITS,
    CODE_LENGTH,
    EOS,
    FIRST_SYMBOL,
    LOWER_HALF,
    MAX_LENGTH,
    NUM_BYTES,
    NUM_SYMBOLS,
    UPPER_HALF,
    VOCAB_SIZE,
    codewords,
    save_tokenizer,
)

RECALL_VERSION = 1
"""Increases whenever the weights or the vocabulary change."""

NUM_LAYERS = 4
HIDDEN_SIZE = 128
INTERMEDIATE_SIZE = 32
HEAD_DIM = 64
NUM_HEADS = 16
NUM_KV_HEADS = 8
ROPE_THETA = 1e8

# Channels of the residual stream.
CONSTANT, IS_BOS, IS_SYMBOL, IS_TWICE, ASKED_TWICE = range(5)
OWN, PREVIOUS, FACT, FOUND, ANSWER = (slice(5 + i * CODE_LENGTH, 5 + (i + 1) * CODE_LENGTH) for i in range(5))

CONSTANT_VALUE = 128.0  # far above the rest of the stream, so that RMSNorm's scale is nearly constant
NEIGHBOUR_PAIRS = 12
NEIGHBOUR_LOGIT = 24.0  # per rotary pair; one position off it is lower by 0.68, any other position by more
MATCH_LOGIT = 48.0  # a codeword with itself; with another codeword at most a third
BOS_LOGIT = 45.0  # above every other codeword, and above the symbol's own if a head's three places are missing
BOS_LOGIT_SECOND = 30.0  # for the second hop, whose query is the first hop's result: 0.95 of a codeword
BOS_LOGIT_OFF_CLASS = 65.0  # above every codeword
TWICE_LOGIT = 30.0  # layer 3 attends to BOS unless the question was <ask-twice>
EOS_LOGIT, SYMBOL_LOGIT, OTHER_LOGIT = 2.0, -1.0, -4.0  # without an answer


def save_recall_checkpoint(directory: str | Path, seed: int = 0) -> None:
    """Write the recall model as a Hugging Face checkpoint (float32, about 8 MB).

    Args:
        directory: created if needed; gets config.json, generation_config.json, model.safetensors, tokenizer.json and
            tokenizer_config.json.
        seed: chooses the layout of keys and values within each head, and the bytes' small codes.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_tokenizer(directory)
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_file(recall_weights(seed), directory / "model.safetensors", metadata={"format": "pt"})
    # last: a directory with config.json is complete
    (directory / "config.json").write_text(json.dumps(recall_config(), indent=2) + "\n")


def ensure_recall_checkpoint(directory: str | Path) -> bool:
    """Write the recall model if the directory has none, or one of another version; return whether it was written.

    Raises:
        ValueError: the directory holds another model.
    """
    path = Path(directory) / "config.json"
    if path.exists():
        config = json.loads(path.read_text())
        if config == recall_config():
            return False
        if "recall_version" not in config:
            raise ValueError(f"{directory} is not a recall checkpoint; give another folder, which will be created")
    save_recall_checkpoint(directory)
    return True


def recall_config() -> dict:
    """The model's config.json: a Llama with 8 KV heads, which 1, 2, 4 and 8 ranks can share."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_LENGTH,
        "rms_norm_eps": 1e-5,
        "rope_theta": ROPE_THETA,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
        "recall_version": RECALL_VERSION,
    }


def recall_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint by its Hugging Face name, float32, in ``nn.Linear``'s shape [out, in]."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(NUM_LAYERS):
        name = f"model.layers.{layer}."
        q, kv = (NUM_HEADS, HEAD_DIM, HIDDEN_SIZE), (NUM_KV_HEADS, HEAD_DIM, HIDDEN_SIZE)
        attention = _zeros(q_proj=q, k_proj=kv, v_proj=kv, o_proj=(HIDDEN_SIZE, NUM_HEADS, HEAD_DIM))
        up, down = (INTERMEDIATE_SIZE, HIDDEN_SIZE), (HIDDEN_SIZE, INTERMEDIATE_SIZE)
        mlp = _zeros(gate_proj=up, up_proj=up, down_proj=down)
        if layer == 0:
            _copy_previous_token(attention, rng)
        elif layer == 1:
            _copy_when(mlp, PREVIOUS, FACT, flag=IS_SYMBOL, wanted=True)
        elif layer == 2:
            _look_up(attention, OWN, FOUND, class_offset=3, bos_logit=BOS_LOGIT, only_twice=False, rng=rng)
        else:
            _look_up(attention, FOUND, ANSWER, class_offset=5, bos_logit=BOS_LOGIT_SECOND, only_twice=True, rng=rng)
            _copy_when(mlp, FOUND, ANSWER, flag=ASKED_TWICE, wanted=False)
        for part, weight in attention.items():
            flat = weight.reshape(HIDDEN_SIZE, -1) if part == "o_proj" else weight.reshape(-1, HIDDEN_SIZE)
            tensors[f"{name}self_attn.{part}.weight"] = flat
        tensors |= {f"{name}mlp.{part}.weight": weight for part, weight in mlp.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}{norm}.weight"] = _norm_weight()
    tensors["model.norm.weight"] = _norm_weight()
    tensors["model.embed_tokens.weight"] = _embedding(rng)
    tensors["lm_head.weight"] = _output_matrix(rng)
    return tensors


def _zeros(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def _norm_weight() -> np.ndarray:
    """Undoes RMSNorm's division by the root mean square, so that layers read the residual stream's values."""
    return np.full(HIDDEN_SIZE, CONSTANT_VALUE / HIDDEN_SIZE**0.5, np.float32)


def _embedding(rng: np.random.Generator) -> np.ndarray:
    weight = np.zeros((VOCAB_SIZE, HIDDEN_SIZE), np.float32)
    weight[:, CONSTANT] = CONSTANT_VALUE
    weight[BOS, IS_BOS] = 1.0
    weight[ASK_TWICE, IS_TWICE] = 1.0
    symbols = slice(FIRST_SYMBOL, FIRST_SYMBOL + NUM_SYMBOLS)
    weight[symbols, IS_SYMBOL] = 1.0
    weight[symbols, OWN] = codewords()
    # non-zero, so that mixed-up keys and values of bytes change the result; small, so that page bounds stay tight
    weight[:NUM_BYTES, OWN] = rng.choice([-0.125, 0.125], size=(NUM_BYTES, CODE_LENGTH))
    return weight


def _output_matrix(rng: np.random.Generator) -> np.ndarray:
    weight = np.zeros((VOCAB_SIZE, HIDDEN_SIZE), np.float32)
    symbols = slice(FIRST_SYMBOL, FIRST_SYMBOL + NUM_SYMBOLS)
    weight[symbols, ANSWER] = codewords()
    prior = np.full(VOCAB_SIZE, OTHER_LOGIT)
    prior[symbols] = SYMBOL_LOGIT
    prior += rng.permutation(np.linspace(-0.5, 0.5, VOCAB_SIZE))  # so that tokens do not tie
    prior[EOS] = EOS_LOGIT
    weight[:, CONSTANT] = prior / CONSTANT_VALUE
    return weight


def _copy_previous_token(attention: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    """Each KV head carries three places of the codeword: its first query head copies one, its second the other two.

    q and k are constants on the fast rotary pairs, rotated by one position, so that the logit peaks at distance one.
    """
    places_per_head = CODE_LENGTH // NUM_KV_HEADS
    amplitude = (NEIGHBOUR_LOGIT * HEAD_DIM**0.5) ** 0.5 / CONSTANT_VALUE
    pairs = np.arange(NEIGHBOUR_PAIRS)
    frequency = ROPE_THETA ** (-2.0 * pairs / HEAD_DIM)
    for kv_head in range(NUM_KV_HEADS):
        phase = rng.uniform(0.0, 2.0 * np.pi, NEIGHBOUR_PAIRS)
        k = attention["k_proj"][kv_head]
        k[pairs, CONSTANT] = amplitude * np.cos(phase)
        k[pairs + HEAD_DIM // 2, CONSTANT] = amplitude * np.sin(phase)
        first, second = 2 * kv_head, 2 * kv_head + 1
        for head in (first, second):
            q = attention["q_proj"][head]
            q[pairs, CONSTANT] = amplitude * np.cos(phase - frequency)
            q[pairs + HEAD_DIM // 2, CONSTANT] = amplitude * np.sin(phase - frequency)
        layout = rng.permutation(HEAD_DIM)
        for i in range(places_per_head):
            place = kv_head * places_per_head + i
            attention["v_proj"][kv_head, layout[i], OWN.start + place] = 1.0
            attention["o_proj"][PREVIOUS.start + place, second if i else first, layout[i]] = 1.0
        if kv_head == 0:
            attention["v_proj"][kv_head, layout[places_per_head], IS_TWICE] = 1.0
            attention["o_proj"][ASKED_TWICE, second, layout[places_per_head]] = 1.0


def _look_up(
    attention: dict[str, np.ndarray],
    source: slice,
    target: slice,
    *,
    class_offset: int,
    bos_logit: float,
    only_twice: bool,
    rng: np.random.Generator,
) -> None:
    """Write to ``target`` the codeword of the symbol that follows the symbol whose codeword is in ``source``.

    Symbols of class c get the lower half of their answer from the first query head of KV head c, the upper half from the
    second query head of KV head c + class_offset.
    """
    code_scale = (MATCH_LOGIT * HEAD_DIM**0.5 / CODE_LENGTH) ** 0.5
    slow_pairs = np.arange(HEAD_DIM // 2 - CODE_LENGTH // 2 - 1, HEAD_DIM // 2 - 1)
    slow_dims = np.concatenate([slow_pairs, slow_pairs + HEAD_DIM // 2])
    bos_dim = HEAD_DIM // 2 - 1  # of the slowest pair
    bos_scale = 8.0
    logit = HEAD_DIM**0.5 / bos_scale  # one logit of BOS, in units of q
    # the sum of class bits times signs is 3 within the class and at most 1 outside
    step = (BOS_LOGIT_OFF_CLASS - bos_logit) / 2.0
    base = bos_logit + step * CLASS_BITS + (TWICE_LOGIT if only_twice else 0.0)
    code = np.arange(CODE_LENGTH)
    for kv_head in range(NUM_KV_HEADS):
        k_layout = rng.permutation(slow_dims)
        k_sign = rng.choice([-1.0, 1.0], CODE_LENGTH)
        v_layout = rng.permutation(HEAD_DIM)[:CODE_LENGTH]
        attention["k_proj"][kv_head, k_layout, FACT.start + code] = code_scale * k_sign
        attention["k_proj"][kv_head, bos_dim, IS_BOS] = bos_scale
        attention["v_proj"][kv_head, v_layout, OWN.start + code] = 1.0
        for head, symbol_class, half in (
            (2 * kv_head, kv_head, LOWER_HALF),
            (2 * kv_head + 1, (kv_head - class_offset) % NUM_KV_HEADS, UPPER_HALF),
        ):
            q = attention["q_proj"][head]
            q[k_layout, source.start + code] = code_scale * k_sign
            q[bos_dim, CONSTANT] = logit * base / CONSTANT_VALUE
            for bit in range(CLASS_BITS):
                q[bos_dim, source.start + bit] = -logit * step * (1.0 if symbol_class >> bit & 1 else -1.0)
            if only_twice:
                q[bos_dim, ASKED_TWICE] = -logit * TWICE_LOGIT
            attention["o_proj"][target.start + code[half], head, v_layout[half]] = 1.0


def _copy_when(mlp: dict[str, np.ndarray], source: slice, target: slice, *, flag: int, wanted: bool) -> None:
    """Add ``source`` to ``target`` if the flag is as wanted: silu(8) is nearly 8, silu(-8) nearly 0."""
    neurons, code = np.arange(CODE_LENGTH), np.arange(CODE_LENGTH)
    sign = 8.0 if wanted else -8.0
    mlp["gate_proj"][neurons, CONSTANT] = -sign / CONSTANT_VALUE
    mlp["gate_proj"][neurons, flag] = 2.0 * sign
    mlp["up_proj"][neurons, source.start + code] = 1.0 / 8.0
    mlp["down_proj"][target.start + code, neurons] = 1.0
